"""Samples and tasks during training: what they say, and that training is the same to the bit without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.common.errors import UsageError
from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.engine.engine import Engine
from moe_lm.evaluate.scoring import Request, SessionScorer
from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.training_loss import NextToken
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train import pretrain
from moe_lm.train.probes import SAMPLING, Asked, Probes
from tests.conftest import Done
from tests.loops import sigterm
from tests.processes import events, layout, metrics
from tests.runs import assert_same_run
from tests.tiny import engine_of, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["def main(", "", "import os\nimport"]
SHORT = (
    "train.steps=4", "train.eval_every=2", "train.eval_batches=1", "log.sample_tokens=5",
    "log.sample_prompts=[ba den gi, ko lum]",
)  # fmt: skip


def config_of(tiny_pretrain: Path, run_dir: Path, *settings: str) -> PretrainConfig:
    return load_config(PretrainConfig, tiny_pretrain, [f"run_dir={run_dir}", *settings])


@pytest.fixture
def model() -> LanguageModel:
    return tiny_model(vocab_size=1024)


@pytest.fixture
def engine(model: LanguageModel, tiny_pretrain: Path) -> Engine:
    return engine_of(model, config_of(tiny_pretrain, Path("nowhere")).train)


@pytest.fixture
def asked(engine: Engine, tiny_pretrain: Path, tiny_tokenizer: Tokenizer) -> Asked:
    return Asked(engine, config_of(tiny_pretrain, Path("nowhere")), tiny_tokenizer, lambda: False)


def session_of(model: LanguageModel, tokenizer: Tokenizer) -> Session:
    return Session(Path("nowhere"), model.eval(), tokenizer)


def test_scores_in_training_are_those_of_a_loaded_run(
    asked: Asked, engine: Engine, model: LanguageModel, tiny_tokenizer: Tokenizer
) -> None:
    draw = torch.Generator().manual_seed(1)
    requests = []
    for context, continuation in [(1, 1), (9, 3), (40, 20), (3, 2), (70, 5), (30, 34), (2, 9), (12, 1), (5, 5)]:
        ids = torch.randint(3, 1024, (context + continuation,), generator=draw).tolist()
        requests.append(Request(ids[:context], ids[context:]))
    found = asked.score(requests)
    expected = SessionScorer(session_of(model, tiny_tokenizer)).score(requests)
    assert [score.is_greedy for score in found] == [score.is_greedy for score in expected]
    theirs = [score.log_likelihood for score in expected]
    assert [score.log_likelihood for score in found] == pytest.approx(theirs, abs=1e-4)
    assert isinstance(engine.loss.objective, NextToken)


def test_of_an_answer_that_is_longer_than_a_row_the_end_is_scored(asked: Asked) -> None:
    """An evaluation during training ends no run."""
    ids = torch.randint(3, 1024, (asked.max_length + 8,), generator=torch.Generator().manual_seed(1)).tolist()
    end = len(ids) - asked.max_length
    [long, same] = asked.score([Request(ids[:3], ids[3:]), Request(ids[:end], ids[end:])])
    assert long == same
    assert asked.shortened == 1


@pytest.mark.parametrize("sampling", [SAMPLING, SAMPLING.model_copy(update={"temperature": 0.0})])
def test_texts_in_training_are_those_of_cached_decoding(
    asked: Asked, model: LanguageModel, tiny_tokenizer: Tokenizer, sampling: Any
) -> None:
    session = session_of(model, tiny_tokenizer)
    prompts = [session.prompt_ids(prompt, 12) for prompt in PROMPTS]
    settings = Settings(12, sampling, seed=3)
    expected = [""] * len(prompts)
    for delta in session.write(prompts, settings):
        expected[delta.row] += delta.text
    # A character that the last token leaves unfinished is shown by its mark here, and not at all there.
    assert [text.rstrip("\ufffd") for text in asked.write(prompts, settings, ())] == expected


def test_greedy_is_seen(asked: Asked, model: LanguageModel, tiny_tokenizer: Tokenizer) -> None:
    session = session_of(model, tiny_tokenizer)
    prompt = session.prompt_ids("import", 5)
    steps = [delta.step.token for delta in session.write([prompt], Settings(5))]
    written = [token for token in steps if token is not None]
    [right, wrong] = asked.score([Request(prompt, written), Request(prompt, [*written[:-1], written[-1] ^ 1])])
    assert right.is_greedy
    assert not wrong.is_greedy


def test_a_run_with_samples_is_bitwise_the_run_without(tmp_path: Path, tiny_pretrain: Path) -> None:
    with_samples, without = tmp_path / "with", tmp_path / "without"
    pretrain.run(config_of(tiny_pretrain, with_samples, *SHORT))
    pretrain.run(config_of(tiny_pretrain, without, *SHORT, "log.sample_prompts=[]"))
    assert_same_run(with_samples, without)
    assert events(without, "sample") == []
    found = events(with_samples, "sample")
    assert [(event["step"], event["prompt"]) for event in found] == [
        (step, prompt) for step in (2, 4) for prompt in ("ba den gi", "ko lum")
    ]
    assert all(event["text"] for event in found)
    session = Session.load(with_samples, device="cpu")
    prompts = [session.prompt_ids(event["prompt"], 5) for event in found[-2:]]
    expected = ["", ""]
    for delta in session.write(prompts, Settings(5, SAMPLING)):
        expected[delta.row] += delta.text
    assert [event["text"].rstrip("\ufffd") for event in found[-2:]] == expected
    log = (with_samples / "train.log").read_text()
    assert 'sample after step 4: "ba den gi" -> "' in log


def test_a_signal_between_samples_ends_the_run_which_makes_them_when_it_goes_on(
    tmp_path: Path, tiny_pretrain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Probes.ask

    def with_signal(self: Probes, engine: Engine, step: int, heed: Callable[[], bool]) -> Any:
        def heed_once() -> bool:
            if step == 2 and not heard:
                heard.append(step)
                sigterm()
            return heed()

        return ask(self, engine, step, heed_once)

    heard: list[int] = []
    monkeypatch.setattr(Probes, "ask", with_signal)
    config = config_of(tiny_pretrain, tmp_path / "run", *SHORT)
    stopped = pretrain.run(config)
    assert (stopped.stopped, stopped.step) == (True, 2)
    assert events(config.run_dir, "sample") == []
    assert "val_loss" not in metrics(config.run_dir)[-1]
    assert not pretrain.run(config).stopped
    assert [event["step"] for event in events(config.run_dir, "sample")] == [2, 2, 4, 4]
    assert [line["step"] for line in metrics(config.run_dir) if "val_loss" in line] == [2, 4]


class FailingTasks:
    """Tasks that have an error of their own, or let one of the model pass."""

    def __init__(self, asks: bool) -> None:
        self.asks = asks

    def run(self, model: Asked, limit: float | None) -> list[Any]:
        if self.asks:
            model.score([Request([5, 6], [7])])
        raise KeyError("label")


def test_an_error_of_the_tasks_is_an_event_and_training_goes_on(
    engine: Engine, tiny_pretrain: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_pretrain, Path("nowhere"), "log.sample_prompts=[a]", "log.sample_tokens=1")
    found = Probes(config, tiny_tokenizer, FailingTasks(asks=False)).ask(engine, 7, lambda: False)  # type: ignore[arg-type]
    assert found is not None
    assert [event.kind for event in found] == ["failed_tasks", "sample"]
    assert found[0].text == "warning: the tasks could not be answered after step 7: 'label'; training goes on"
    without_samples = config_of(tiny_pretrain, Path("nowhere"))
    asking = Probes(without_samples, tiny_tokenizer, FailingTasks(asks=True))  # type: ignore[arg-type]
    assert asking.ask(engine, 7, lambda: True) is None, "a signal is no error of the tasks"

    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine, "forward_shares", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        asking.ask(engine, 7, lambda: False)


def test_without_held_out_text_there_is_no_evaluation_to_sample_at(
    tmp_path: Path, tiny_pretrain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "validation_batches", lambda *_: {})
    with pytest.raises(UsageError, match=r"there is no held-out data to evaluate; set data\.validation_fraction"):
        pretrain.run(config_of(tiny_pretrain, tmp_path, *SHORT))


def test_in_fine_tuning_a_prompt_is_a_users_message(
    moe_lm: Callable[..., Done], finetune_config: Path, tmp_path: Path
) -> None:
    done = moe_lm("finetune", finetune_config, "train.steps=1", "log.sample_prompts=[say table]", "log.sample_tokens=2")
    assert done.code == 0, done.err
    assert [event["step"] for event in events(tmp_path / "run", "sample")] == [0, 1]
    session = Session.load(tmp_path / "run", device="cpu")
    chat = session.chat([{"role": "user", "content": "say table"}], Settings(2, SAMPLING))
    expected = "".join(delta.text for delta in chat)
    assert events(tmp_path / "run", "sample")[-1]["text"].rstrip("\ufffd") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("parallel.engine=torch",),
        layout(expert_parallel_size=2, zero_stage=1),
        layout(expert_parallel_size=1, zero_stage=3),
        ("parallel.sequence_parallel_size=2",),
    ],
)
def test_two_ranks_write_what_one_process_writes(
    tmp_path: Path, tiny_pretrain: Path, run_ranks: Callable[..., list[Done]], settings: tuple[str, ...]
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    pretrain.run(config_of(tiny_pretrain, alone, *SHORT))
    ranks = run_ranks(2, "pretrain", tiny_pretrain, f"run_dir={together}", *SHORT, *settings)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err
    assert [(event["step"], event["text"]) for event in events(together, "sample")] == [
        (event["step"], event["text"]) for event in events(alone, "sample")
    ]


@pytest.mark.slow
def test_tasks_in_training_are_those_of_the_checkpoint(
    tmp_path: Path, tiny_pretrain: Path, shared_data: Path, moe_lm: Callable[..., Done]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'moe-lm[eval]'")
    from moe_lm.config.generation import TasksConfig
    from moe_lm.evaluate.tasks import evaluate_tasks

    with_tasks, without = tmp_path / "with", tmp_path / "without"
    data = f"log.task_data={shared_data / 'eval'}"
    asked = ("log.eval_tasks=[blimp_offline, piqa_offline]", "log.eval_tasks_limit=20", data)
    pretrain.run(config_of(tiny_pretrain, with_tasks, *SHORT, "data.sequence_length=128", *asked))
    pretrain.run(config_of(tiny_pretrain, without, *SHORT, "data.sequence_length=128"))
    assert_same_run(with_tasks, without)
    found = events(with_tasks, "tasks")
    assert [event["step"] for event in found] == [2, 4]
    wanted = TasksConfig(tasks=("blimp_offline", "piqa_offline"), limit=20, task_data=shared_data / "eval")
    expected = {result.name: result.figures() for result in evaluate_tasks(with_tasks, wanted)}
    assert found[-1]["tasks"] == expected
