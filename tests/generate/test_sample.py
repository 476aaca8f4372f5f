"""`moe-lm sample`: one text as it is written, many as JSON lines, beams, log-probabilities, and all that it refuses."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.config.generation import SampleConfig
from moe_lm.generate.beams import search
from moe_lm.generate.decode import Settings, generate
from moe_lm.generate.sample import Prompt, write_samples
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.model.transformer import LanguageModel
from tests.conftest import Done
from tests.generate.conftest import MakeRun
from tests.texts import text_of

MoeLm = Callable[..., Done]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "import ", "id": 7}\n\n"def "\n{"prompt": "café 你好"}\n', encoding="utf-8")
    return file


def sample(run: Path, **changes: object) -> None:
    options = SampleConfig(**{"max_new_tokens": 20, "temperature": 0.0, "seed": 0} | changes)  # type: ignore[arg-type]
    write_samples(Session.load(run), [Prompt("import ")], options, plain=True)


def test_sample_writes_the_text_alone_and_its_speed_beside_it(
    session: Session, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(run)
    captured = capsys.readouterr()
    assert captured.out == text_of(session.complete("import ", Settings(20, GREEDY))) + "\n"
    assert re.fullmatch(r"20 tokens, \d+\.\d tokens/s, seed 0\n", captured.err)


def test_one_token_has_no_speed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample(run, max_new_tokens=1)
    assert capsys.readouterr().err == "1 tokens, seed 0\n"


def test_sample_without_a_seed_says_the_one_that_gives_the_same_text(
    session: Session, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(run, temperature=1.5, top_k=100, top_p=0.9, seed=None, stop=["zz"])
    captured = capsys.readouterr()
    seed = int(captured.err.split()[-1])
    settings = Settings(20, Sampling(temperature=1.5, top_k=100, top_p=0.9), seed)
    assert captured.out == text_of(session.complete("import ", settings, ["zz"])) + "\n"


def test_sampling_imports_nothing_that_only_training_needs(run: Path) -> None:
    program = (
        "import sys; from moe_lm.cli.main import main\n"
        f"sys.argv = ['moe-lm', 'sample', {str(run)!r}, '--prompt', '', '--max-new-tokens', '2', '--greedy']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "found = sys.modules.keys() & {'deepspeed', 'accelerate', 'datasets', 'pyarrow', 'transformers'}\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_sample_of_a_file_is_a_line_with_a_seed_that_gives_it_again(
    moe_lm: MoeLm, run: Path, prompts: Path, session: Session
) -> None:
    options = ("--max-new-tokens", 9, "--temperature", 1.3, "--min-p", 0.01)
    done = moe_lm("sample", run, "--file", prompts, "--num", 2, "--seed", 40, *options)
    assert done.code == 0
    found = lines(done.out)
    assert [(line["prompt"], line["sample"], line["seed"]) for line in found] == [
        (text, number, 40 + 2 * place + number)
        for place, text in enumerate(["import ", "def ", "café 你好"])
        for number in (0, 1)
    ]
    assert [line.get("id") for line in found] == [7, 7, None, None, None, None]
    for line in found:
        settings = Settings(9, Sampling(temperature=1.3, min_p=0.01), line["seed"])
        assert line["text"] == text_of(session.complete(line["prompt"], settings))
        assert line["finish"] in ("stop", "length")
    assert done.err.startswith("6 samples, ")
    alone = moe_lm("sample", run, "--prompt", "def ", "--seed", 43, *options)
    assert alone.out == found[3]["text"] + "\n"


def test_out_gets_the_lines_and_stdout_none(moe_lm: MoeLm, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    done = moe_lm("sample", run, "-p", "import ", "--out", out, "--greedy", "--max-new-tokens", 5)
    assert done.out == ""
    [line] = lines(out.read_text(encoding="utf-8"))
    assert line["text"] + "\n" == moe_lm("sample", run, "-p", "import ", "--greedy", "--max-new-tokens", 5).out
    assert f"1 samples in {out}" in done.err


def test_the_prompt_can_come_from_stdin(moe_lm: MoeLm, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def typed(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    expected = moe_lm("sample", run, "-p", "import é", "--greedy", "--max-new-tokens", 5).out
    typed("import é\n".encode())
    assert moe_lm("sample", run, "-", "--greedy", "--max-new-tokens", 5).out == expected
    typed('"import é"\n'.encode())
    [line] = lines(moe_lm("sample", run, "--file", "-", "--greedy", "--max-new-tokens", 5).out)
    assert line["text"] + "\n" == expected


def test_a_terminal_gets_blocks(
    moe_lm: MoeLm, run: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = lines(moe_lm("sample", run, "--file", prompts, "--greedy", "--max-new-tokens", 5).out)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    done = moe_lm("sample", run, "--file", prompts, "--greedy", "--max-new-tokens", 5)
    assert done.out == "".join(f"--- {e['prompt']!r}, sample 0, {e['finish']}\n{e['text']}\n" for e in expected)


def test_logprobs_alone_and_with_a_number(moe_lm: MoeLm, run: Path, session: Session) -> None:
    [line] = lines(moe_lm("sample", run, "--logprobs", "-p", "import ", "--greedy", "--max-new-tokens", 4).out)
    ids = session.prompt_ids("import ", 4)
    [expected] = generate(session.model, [ids], Settings(4), session.tokenizer.stop_ids, session.tokenizer.vocab_size)
    assert [token["id"] for token in line["logprobs"]] == expected
    assert all(token["top"] == [] and token["logprob"] < 0 for token in line["logprobs"])
    [line] = lines(moe_lm("sample", run, "-p", "import ", "--greedy", "--max-new-tokens", 4, "--logprobs", 3).out)
    for token in line["logprobs"]:
        assert len(token["top"]) == 3
        assert token["top"][0] == {name: token[name] for name in ("id", "token", "logprob")}


def test_beams_are_the_best_texts_and_end_before_a_stop_string(moe_lm: MoeLm, run: Path, session: Session) -> None:
    options = ("--beams", 4, "--max-new-tokens", 8, "--length-penalty", 0.5)
    found = lines(moe_lm("sample", run, "-p", "import ", "--num", 3, *options).out)
    config = SampleConfig(beams=4, num=3, length_penalty=0.5, max_new_tokens=8)
    ids, tokenizer = session.prompt_ids("import ", 8), session.tokenizer
    expected = search(session.model, ids, config, tokenizer.stop_ids, tokenizer.vocab_size)
    assert [line["score"] for line in found] == pytest.approx([beam.score for beam in expected])
    assert [line["text"] for line in found] == [tokenizer.decode(beam.ids).removesuffix("\ufffd") for beam in expected]
    stop = found[0]["text"][2:4]
    stopped = lines(moe_lm("sample", run, "-p", "import ", "--num", 3, "--stop", stop, *options).out)
    assert "stop" in {line["finish"] for line in stopped}
    assert not any(stop in line["text"] for line in stopped)


def test_penalties_reach_the_beam_search(moe_lm: MoeLm, run: Path, session: Session) -> None:
    options = ("--beams", 4, "--repetition-penalty", 1.3, "--logit-bias", "9=-inf")
    found = lines(moe_lm("sample", run, "-p", "import ", "--num", 4, "--max-new-tokens", 6, *options).out)
    bias = ((9, float("-inf")),)
    config = SampleConfig(beams=4, num=4, max_new_tokens=6, repetition_penalty=1.3, logit_bias=bias)
    ids, tokenizer = session.prompt_ids("import ", 6), session.tokenizer
    expected = search(session.model, ids, config, tokenizer.stop_ids, tokenizer.vocab_size)
    assert [line["score"] for line in found] == pytest.approx([beam.score for beam in expected])


def test_every_strategy_reaches_the_draw(moe_lm: MoeLm, run: Path, session: Session) -> None:
    done = moe_lm(
        "sample", run, "-p", "import ", "--seed", 3, "--max-new-tokens", 12, "--min-new-tokens", 2, "--top-k", 90,
        "--top-p", 0.95, "--min-p", 0.001, "--typical-p", 0.9, "--repetition-penalty", 1.2, "--presence-penalty", 0.3,
        "--frequency-penalty", 0.2, "--no-repeat-ngram", 2, "--logit-bias", "300=1.5", "--temperature", 1.1,
    )  # fmt: skip
    sampling = Sampling(
        temperature=1.1, top_k=90, top_p=0.95, min_p=0.001, typical_p=0.9, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, no_repeat_ngram=2, logit_bias=((300, 1.5),),
    )  # fmt: skip
    settings = Settings(12, sampling, 3, 2)
    assert done.out == text_of(session.complete("import ", settings)) + "\n"


def test_stop_strings_end_each_sample_by_itself(moe_lm: MoeLm, run: Path) -> None:
    options = ("-p", "import ", "--num", 5, "--seed", 1, "--max-new-tokens", 12, "--temperature", 1.2)
    free = lines(moe_lm("sample", run, *options).out)
    stop = free[2]["text"][4:6]
    done = moe_lm("sample", run, *options, "--stop", stop)
    assert done.code == 0, done.err
    for before, line in zip(free, lines(done.out), strict=True):
        assert line["text"] == before["text"].split(stop)[0]
        assert (line["finish"] == "stop") == (stop in before["text"] or before["finish"] == "stop")


def test_a_prompt_that_is_too_long_is_refused_or_loses_its_beginning(
    moe_lm: MoeLm, run: Path, session: Session, tmp_path: Path
) -> None:
    long = "1 2 3 4 5 6 7 8 9 " * 20
    done = moe_lm("sample", run, "-p", long, "--greedy")
    assert done.code == 2
    assert "more than the model's max_position_embeddings=64; shorten it, or drop its beginning with --trun" in done.err
    file = tmp_path / "long.jsonl"
    file.write_text(f'"a"\n{json.dumps(long)}\n')
    done = moe_lm("sample", run, "--file", file)
    assert done.code == 2
    assert done.err.startswith(f"error: {file}, line 2: the prompt has ")
    done = moe_lm("sample", run, "-p", long, "--greedy", "--max-new-tokens", 10, "--truncate", "left")
    ids = session.prompt_ids(long, 10, truncate=True)
    assert ids == [session.tokenizer.bos_id, *session.tokenizer.encode(long)[-54:]]
    [expected] = generate(session.model, [ids], Settings(10), session.tokenizer.stop_ids, session.tokenizer.vocab_size)
    assert done.out == session.tokenizer.decode(expected).removesuffix("\ufffd") + "\n"
    assert len(session.prompt_ids(long, 500, truncate=True)) == 32
    assert session.prompt_ids("a b", 10, truncate=True) == session.prompt_ids("a b", 10)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'"a"\n{"prompt": \n', "line 2 is not JSON"), (b'{"text": "a"}\n', "line 1 has no prompt that is a string"),
        (b'{"prompt": 3}\n', "line 1 has no prompt"), (b"[]\n", "line 1 has no prompt"), (b"\n \n", "holds no prompts"),
        (b'"caf\xe9"\n', "is not UTF-8 text at byte 4"), (b'"\\ud800"\n', "line 1: the text holds half of a surrogate"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_list_of_prompts_is_refused(
    moe_lm: MoeLm, run: Path, tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    done = moe_lm("sample", run, "--file", file)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith(f"error: {file}")
    assert said in done.err


def test_a_text_that_fills_the_model_says_so(run: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("sample", run, "-p", "a", "--max-new-tokens", 1000, "--min-new-tokens", 1000)
    last = Session.load(run).model.config.max_position_embeddings
    assert done.err.rstrip().endswith(f"; it ends at the model's last position, {last}")
    assert "last position" not in moe_lm("sample", run, "-p", "a", "--max-new-tokens", 3).err


def test_the_tokenizer_of_a_run_is_inspected_in_its_checkpoint(run: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("tokenizer", "inspect", run)
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing given to continue"), (["-", "-p", "a"], "- and --prompt given"), (["b"], "b is not a source"),
        (["-p", "a", "--length-penalty", 2], "--length-penalty 2.0 belongs to a beam search"),
        (["-p", "a", "--length-penalty", 1.0], "--length-penalty 1.0 belongs to a beam search; give --beams too"),
        (["-p", "a", "--beams", 2, "--temperature", 0.8], "--temperature 0.8 has no meaning with --beams"),
        (["-p", "a", "--beams", 2, "--top-k", 3], "--top-k 3 has no meaning with --beams, which draws nothing"),
        (["-p", "a", "--num", 3, "--greedy"], "--num 3 texts would be equal, as nothing is drawn"),
        (["-p", "a", "--beams", 2, "--greedy"], "--greedy has no meaning with --beams, which draws nothing"),
        (["-p", "a", "--beams", 2, "--seed", 3], "--seed 3 has no meaning with --beams"),
        (["-p", "a", "--beams", 2, "--num", 3], "--num 3 is more than --beams 2"),
        (["-p", "a", "--logit-bias", "x=1"], "--logit-bias x=1: expected ID=BIAS"),
        (["-p", "a", "--min-new-tokens", 300], "--min-new-tokens 300 is more than --max-new-tokens 200"),
        (["-p", "a", "--stop", "", "--num", 2], "a stop string is empty"),
        (["-p", "a", "--stop", "", "--beams", 2], "a stop string is empty"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["-p", "caf\udce9"], "--prompt is not UTF-8 text at character 3"),
        (["-p", "a", "--device", "tpu"], "device 'tpu' is not available on this machine"),
        (["-p", "a", "--num", 2, "--device", "tpu"], "device 'tpu' is not available on this machine"),
        (["-p", "a", "--greedy", "--temperature", 0.9], "--temperature 0.9 draws and --greedy never does"),
        (["-p", "a", "--stop", ""], "a stop string is empty"),
        (["-p", "a", "--logit-bias", "1024=1"], "logit_bias 1024=1.0 names no token; the ids end at 1023"),
        (["-p", "a", "--logit-bias", "1024=1", "--beams", 2], "logit_bias 1024=1.0 names no token"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_sentence(moe_lm: MoeLm, run: Path, arguments: list[object], said: str) -> None:
    done = moe_lm("sample", run, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_an_output_that_cannot_be_written_is_an_error(moe_lm: MoeLm, run: Path, tmp_path: Path) -> None:
    done = moe_lm("sample", run, "-p", "a", "--out", tmp_path / "nowhere" / "x.jsonl")
    assert done.code == 1
    assert "cannot be written" in done.err


def test_row_34_of_bad_input_while_sampling(moe_lm: MoeLm, make_run: MakeRun) -> None:
    """NaN logits, top-k above the vocabulary, temperature 0, an empty prompt."""
    run = make_run()
    wide = moe_lm("sample", run, "-p", "", "--top-k", 10**9, "--num", 2, "--seed", 1, "--max-new-tokens", 4)
    assert [line["tokens"] for line in lines(wide.out)] == [4, 4]
    cold = moe_lm("sample", run, "-p", "", "--temperature", 0, "--max-new-tokens", 4)
    assert cold.out == moe_lm("sample", run, "-p", "", "--greedy", "--max-new-tokens", 4).out


@pytest.mark.parametrize("options", [[], ["--num", 2], ["--beams", 2]])
def test_nan_logits_are_a_clear_error(moe_lm: MoeLm, make_run: MakeRun, options: list[object]) -> None:
    def damage(model: LanguageModel) -> None:
        with torch.no_grad():
            model.model.norm.weight[3] = torch.nan

    done = moe_lm("sample", make_run(damage), "-p", "a", *options)
    assert done.code == 1
    assert "logits are not numbers" in done.err


def test_a_checkpoint_that_is_not_complete_is_refused_by_every_verb(run: Path, moe_lm: MoeLm, tmp_path: Path) -> None:
    [complete] = run.glob("checkpoints/*/COMPLETE")
    complete.unlink()
    finetune = tmp_path / "finetune.yaml"
    finetune.write_text(
        f"run_dir: {tmp_path}/other\nstart_from: {run}\ndata: {{train: [chat.jsonl]}}\n"
        "train: {steps: 1, global_batch_size: 1}\n"
    )
    verbs: tuple[tuple[object, ...], ...] = (
        ("sample", run, "-p", "a"), ("chat", run), ("explain", run, "-p", "a"), ("serve", run, "--port", 0),
        ("eval", run), ("export", run, tmp_path / "out"), ("upcycle", run, "--run-dir", tmp_path / "up"),
        ("finetune", finetune),
    )  # fmt: skip
    for verb in verbs:
        done = moe_lm(*verb)
        assert (done.code, done.out) == (2, "")
        assert "holds no complete checkpoint" in done.err


def test_a_full_disk_is_a_sentence(run: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch) -> None:
    done = moe_lm("sample", run, "-p", "a", "--max-new-tokens", 2, "--out", "/dev/full")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error: /dev/full cannot be written (No space left on device); choose another --out\n"
    for verb in (["sample", run, "-p", "a"], ["sample", run, "-p", "a", "--num", 2], ["--version"]):
        with open("/dev/full", "w", encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            done = moe_lm(*verb)
        assert done.code == 1
        assert done.err == (
            "error: stdout cannot be written (No space left on device); free some space, or send it elsewhere\n"
        )
