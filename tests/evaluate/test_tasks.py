"""Tasks of lm-eval on a run itself: example by example what lm-eval finds for the exported model in `transformers`."""

from __future__ import annotations

import json
import lzma
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_lm.common.errors import MoeLmError
from moe_lm.config.generation import TasksConfig
from moe_lm.evaluate.tasks import TASK_DATA, TaskResult, evaluate_tasks, table
from moe_lm.generate.session import Session
from tests.conftest import MoeLm, SaveRun
from tests.processes import ROOT
from tests.tiny import logits_of, tiny_model

HELLASWAG = {
    "activity_label": "Tidying", "ctx_a": "A woman sorts [step] paper.", "ctx_b": "she", "label": 2,
    "endings": ["eats  it.", "sings [title] a song.", "files it away.", "is paper."],
}  # fmt: skip
ARC = {
    "question": {"stem": "What is ice?", "choices": [{"text": text, "label": label} for text, label in
                 (("Water", "A"), ("Fire", "B"), ("Air", "C"))]},
    "answerKey": "A",
}  # fmt: skip
WIND = {
    "question": {"stem": "What is wind?", "choices": [{"text": text, "label": label} for text, label in
                 (("Water", "1"), ("Fire", "2"), ("Moving air", "3"))]},
    "answerKey": "3",
}  # fmt: skip
PIQA = {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Turn the jar into a lid and the lid into tea."}
SENTENCES = [("The cats sleep here.", "The cats sleeps here."), ("Who did she see?", "Who did she see him?")]


@pytest.fixture
def task_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few examples of every local task, in their authors' formats."""
    folder = tmp_path / "task data"
    folder.mkdir()
    blimp = [{"sentence_good": good, "sentence_bad": bad, "UID": "agreement"} for good, bad in SENTENCES]
    passages = [{"text": f"def main( self ):\n    return number {number} of self"} for number in range(5)]
    lines: dict[str, list[dict[str, Any]]] = {
        "blimp.jsonl": blimp, "lambada_test.jsonl": passages,
        "piqa-valid.jsonl": [PIQA | {"goal": f"Open {number} jars"} for number in range(4)],
        "hellaswag_val.jsonl": [HELLASWAG | {"ctx_b": f"{name} goes on and"} for name in ("she", "ann", "bea")],
        "ARC-Easy-Test.jsonl": [ARC, WIND], "ARC-Challenge-Test.jsonl": [WIND, ARC],
    }  # fmt: skip
    for name, rows in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / (name + ".xz")).write_bytes(lzma.compress(text))
    (folder / "valid-labels.lst").write_text("0\n1\n0\n0\n")
    monkeypatch.setenv(TASK_DATA, str(folder))
    return folder


OFFLINE = ("blimp", "lambada", "piqa", "hellaswag", "arc_easy", "arc_challenge")


def write_tasks(folder: Path, data: Path) -> None:
    """Two tasks of the kinds that eval/tasks has not."""
    folder.mkdir()
    rows = [{"text": f"import os\nimport sys  # {number}\n" * (number + 1), "bad": "x"} for number in range(5)]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(data / "rows.jsonl")}},
        "validation_split": "validation", "doc_to_text": "", "doc_to_target": "{{text}}", "metadata": {"version": 1},
    }  # fmt: skip
    rolling = common | {
        "task": "rolling", "output_type": "loglikelihood_rolling",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    }  # fmt: skip
    writing = common | {
        "task": "writing", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{bad}}",
        "generation_kwargs": {"until": ["\n\n", "self"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    for task in (rolling, writing):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("chat", [False, True])
def test_every_answer_is_that_of_lm_eval_for_the_export(
    pretrained: Path, task_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'moe-lm[eval]'")
    from lm_eval.tasks import TaskManager

    from moe_lm.evaluate import tasks
    from moe_lm.tools.interop.exporting import export_run

    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_HOME", str(tmp_path / "hub"))):
        monkeypatch.setenv(name, value)
    write_tasks(tmp_path / "tasks", task_data)
    names = [*(f"{name}_offline" for name in OFFLINE), "rolling", "writing"]
    for task in (ROOT / "eval/tasks").iterdir():
        if task.is_file():
            (tmp_path / "tasks" / task.name).write_bytes(task.read_bytes())
    monkeypatch.setattr(tasks, "LOCAL_TASKS", tmp_path / "tasks")

    file = tmp_path / "out" / "found.json"
    config = TasksConfig(tasks=tuple(names), batch_size=3, num_fewshot=1, output=file, apply_chat_template=chat)
    results = tasks.evaluate_tasks(pretrained, config)
    ours = json.loads(file.read_text())

    export_run(pretrained, tmp_path / "exported")
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "exported"), "dtype": "float32"},
        tasks=names,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=4,
        num_fewshot=1,
        apply_chat_template=chat,
        bootstrap_iters=tasks.BOOTSTRAPS,
    )
    answers = 0
    for line in ours["samples"]:
        [same] = [item for item in theirs["samples"][line["task"]] if item["doc_id"] == line["doc_id"]]
        assert json.loads(json.dumps(same["arguments"], default=str)) == line["arguments"]
        for mine, yours in zip(line["filtered_resps"], same["filtered_resps"], strict=True):
            answers += 1
            if isinstance(yours, str):
                assert mine == yours
            elif isinstance(yours, tuple | list):
                assert float(mine[0]) == pytest.approx(float(yours[0]), abs=1e-4)
                assert bool(mine[1]) is bool(yours[1])
            else:
                assert float(mine) == pytest.approx(float(yours), abs=1e-4)
    assert answers == 2 * 2 + 5 + 2 * 4 + 4 * 3 + 3 * 2 + 3 * 2 + 5 + 5
    assert {result.name for result in results} == set(names)
    for result in results:
        for name, (value, error) in result.metrics.items():
            expected = theirs["results"][result.name]
            assert value == pytest.approx(expected[f"{name},none"], rel=1e-4), result.name
            if error is not None:
                assert error == pytest.approx(expected[f"{name}_stderr,none"], rel=1e-4, abs=1e-9), result.name
        assert result.examples == theirs["n-samples"][result.name]["effective"]


@pytest.mark.slow
def test_the_prompts_are_those_of_lm_evals_own_tasks(task_data: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'moe-lm[eval]'")
    from datasets import Dataset
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.hellaswag.utils import process_docs

    own = TaskManager(include_path=str(ROOT / "eval/tasks"), include_defaults=False)
    tasks = own.load([f"{name}_offline" for name in OFFLINE])["tasks"]
    theirs = {"blimp": "blimp/_template_yaml", "piqa": "piqa/piqa.yaml", "arc_easy": "arc/arc_easy.yaml"}
    for name, file in theirs.items():
        text = (Path(lm_eval.__file__).parent / "tasks" / file).read_text()
        expected = yaml.safe_load(text)
        task = tasks[f"{name}_offline"].config
        assert (task.doc_to_text, task.output_type) == (expected["doc_to_text"], expected["output_type"])
        assert [metric["metric"] for metric in task.metric_list] == [item["metric"] for item in expected["metric_list"]]
    docs = list(tasks["hellaswag_offline"].validation_docs())
    rows = [HELLASWAG | {"ctx_b": f"{name} goes on and"} for name in ("she", "ann", "bea")]
    for doc, expected in zip(docs, process_docs(Dataset.from_list(rows)), strict=True):
        assert (doc["query"], doc["choices"]) == (expected["query"], expected["choices"])
    arc = tasks["arc_challenge_offline"]
    assert [arc.doc_to_target(doc) for doc in arc.validation_docs()] == [2, 0]
    passage = next(iter(tasks["lambada_offline"].validation_docs()))
    words = passage["text"].split(" ")
    task = tasks["lambada_offline"]
    assert (task.doc_to_text(passage), task.doc_to_target(passage)) == (" ".join(words[:-1]), f" {words[-1]}")


def log_likelihood(session: Session, text: str) -> float:
    """Log-likelihood of a text after `<|bos|>`, in nats."""
    ids = [session.tokenizer.bos_id, *session.tokenizer.encode(text)]
    log_probs = logits_of(session.model, ids[:-1]).log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_is_evaluated_on_files_at_hand(
    moe_lm: MoeLm, pretrained: Path, shared_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'moe-lm[eval]'")
    data, file = shared_data / "eval", tmp_path / "found.json"
    names = "blimp_offline,lambada_offline,piqa_offline"
    done = moe_lm("eval", pretrained, "--tasks", names, "--task-data", data, "--limit", 20, "--output", file)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0] == ["task", "metric", "value", "stderr", "examples"]
    assert [row[:2] for row in rows[1:-1]] == [
        ["blimp_offline", "acc"], ["lambada_offline", "acc"], ["lambada_offline", "perplexity"],
        ["piqa_offline", "acc"], ["piqa_offline", "acc_norm"],
    ]  # fmt: skip
    assert all(float(row[2]) >= 0 and float(row[3]) >= 0 and row[4] == "20" for row in rows[1:-1])
    found = json.loads(file.read_text())
    assert found["results"]["blimp_offline"]["n"] == 20
    answers = [line for line in found["samples"] if line["task"] == "blimp_offline"]
    assert found["results"]["blimp_offline"]["acc"] == pytest.approx(sum(line["acc"] for line in answers) / 20)
    session = Session.load(pretrained, device="cpu")
    with torch.inference_mode():
        for line in answers:
            sides = [line["doc"][name] for name in ("sentence_good", "sentence_bad")]
            expected = [log_likelihood(session, f" {side}") for side in sides]
            assert [float(answer[0]) for answer in line["filtered_resps"]] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_one_sentence(
    moe_lm: MoeLm, pretrained: Path, task_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'moe-lm[eval]'")
    (task_data / "valid-labels.lst").write_text("0\n")
    done = moe_lm("eval", pretrained, "--tasks", "piqa_offline")
    assert (done.code, done.err) == (
        2, "error: piqa-valid.jsonl has 4 lines, valid-labels.lst 1; download both again\n",
    )  # fmt: skip
    done = moe_lm("eval", pretrained, "--tasks", "blimp_offline", "--task-data", task_data.parent)
    assert done.code == 2
    assert f"there is no blimp*.jsonl in {task_data.parent}; put BLiMP's data/*.jsonl" in done.err
    assert os.environ[TASK_DATA] == str(task_data)  # as it was
    done = moe_lm("eval", pretrained, "--tasks", "blimp_ofline,piqa_offline")
    assert done.code == 2
    assert "there is no task blimp_ofline; did you mean blimp_offline" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", 3], "--limit 3.0 belongs to --tasks"),
        (["--output", "found.json"], "--output found.json belongs to --tasks"),
        (["--tasks", "piqa_offline", "--limit", 1.5], "--limit 1.5 is no number of examples"),
        (["README.md", "--tasks", "piqa_offline"], "FILES README.md has no meaning for --tasks; leave it out"),
        (["--tasks", "piqa_offline", "--stride", 4], "--stride 4 has no meaning for --tasks; leave it out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(moe_lm: MoeLm, options: list[object], message: str) -> None:
    done = moe_lm("eval", "nowhere", *options)
    assert done.code == 2
    assert message in done.err


def test_without_lm_eval_one_is_told_how_to_get_it(
    moe_lm: MoeLm, save_run: SaveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = moe_lm("eval", save_run(tiny_model(vocab_size=1024)), "--tasks", "piqa_offline")
    assert done.code == 1
    assert done.err.startswith("error: tasks need lm-eval, which is not installed; ")
    assert "[eval]'" in done.err


def test_an_output_that_cannot_be_written_is_said_before_anything_is_answered(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = TasksConfig(tasks=("piqa_offline",), output=tmp_path / "file" / "found.json")
    with pytest.raises(MoeLmError, match=r"found\.json: Not a directory; name another --output|File exists"):
        evaluate_tasks(Path("nowhere"), config)


def test_the_table_has_a_line_for_each_metric() -> None:
    lambada = TaskResult("lambada", {"acc": (0.25, 0.125), "perplexity": (1234.5, None)}, examples=5153)
    assert table([lambada]).splitlines() == [
        "task     metric          value  stderr  examples",
        "lambada  acc            0.2500  0.1250     5,153",
        "lambada  perplexity  1234.5000             5,153",
    ]
    assert lambada.figures() == {
        "acc": 0.25, "stderr": 0.125, "perplexity": 1234.5, "perplexity_stderr": None, "n": 5153,
    }  # fmt: skip


def test_tasks_may_be_separated_by_commas() -> None:
    assert TasksConfig(tasks=("piqa, arc_easy", "blimp")).tasks == ("piqa", "arc_easy", "blimp")
