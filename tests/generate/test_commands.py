"""`moe-lm sample` as a user meets them: what is on stdout, what on stderr, how they end."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_lm.config.generation import SampleConfig
from moe_lm.generate.decode import Settings
from moe_lm.generate.sample import Prompt, write_samples
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import GREEDY, Sampling
from tests.texts import text_of

MakeRun = Callable[..., Path]


def sample(run: Path, **changes: object) -> None:
    text = SampleConfig(**{"max_new_tokens": 20, "temperature": 0.0, "seed": 0} | changes)  # type: ignore[arg-type]
    write_samples(Session.load(run), [Prompt("import ")], 1, Settings.of(text), text.stop, plain=True)


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


def test_bad_input_is_refused_in_a_sentence(run: Path, moe_lm: Callable, tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    (tmp_path / "half.jsonl").write_text('"fine"\n{"prompt": "a\\ud800"}')
    long = "1 2 3 4 5 6 7 8 9 " * 20
    for options, error in {
        ("-p", long): "max_position_embeddings=64; shorten it, or drop its beginning with --truncate left",
        ("-p", "caf\udce9"): "--prompt is not UTF-8 text at character 3",
        ("-p", "a", "--device", "tpu"): "device 'tpu' is not available on this machine",
        ("-p", "a", "--num", 2, "--device", "tpu"): "device 'tpu' is not available on this machine",
        ("-p", "a", "--greedy", "--temperature", 0.9): "--temperature 0.9 draws and --greedy never does",
        ("-p", "a", "--stop", ""): "a stop string is empty",
        ("-p", "a", "--logit-bias", "1024=1"): "logit_bias 1024=1.0 names no token; the ids end at 1023",
        ("-p", "a", "--logit-bias", "1024=1", "--beams", 2): "logit_bias 1024=1.0 names no token; the ids end at 1023",
        ("--file", tmp_path / "latin.jsonl"): "latin.jsonl is not UTF-8 text at byte 15",
        ("--file", tmp_path / "half.jsonl"): "half.jsonl, line 2: the text holds half of a surrogate pair",
    }.items():
        done = moe_lm("sample", run, *options)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: ")
        assert error in done.err
    assert moe_lm("sample", run, "-p", long, "--truncate", "left", "--max-new-tokens", 2).code == 0
    assert moe_lm("sample", run, "-p", "a", "--top-k", 10**6, "--max-new-tokens", 2).code == 0


def test_a_checkpoint_that_is_not_complete_is_refused_by_every_verb(run: Path, moe_lm: Callable) -> None:
    [complete] = run.glob("checkpoints/*/COMPLETE")
    complete.unlink()
    for verb in (("sample", run, "-p", "a"), ("chat", run), ("explain", run, "-p", "a")):
        done = moe_lm(*verb)
        assert (done.code, done.out) == (2, "")
        assert "holds no complete checkpoint" in done.err


def test_a_full_disk_is_a_sentence(run: Path, moe_lm: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
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
