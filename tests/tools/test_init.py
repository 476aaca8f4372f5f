"""`moe-lm init`: every config that it writes can be started as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from moe_lm.config.data import TokenizerRecipe
from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.tools.init.kinds import KINDS
from tests.conftest import MoeLm
from tests.processes import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("pretrain", "tokenizer")])
def test_a_config_with_a_start_passes_a_dry_run(here: Path, pretrained: Path, moe_lm: MoeLm, kind: str) -> None:
    rows = [{"prompt": f"say {n}", "chosen": "yes", "rejected": "no"} for n in range(40)]
    if kind in ("finetune", "lora"):
        rows = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(40)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "rows.jsonl" if kind in ("finetune", "lora", "dpo") else "my.txt"
    done = moe_lm("init", data, "--for", kind, "--out", "mine.yaml", "--start-from", pretrained)
    assert (done.code, done.err) == (0, "")
    text = (here / "mine.yaml").read_text()
    assert f"# moe-lm {KINDS[kind].verb} mine.yaml: " in text
    settings = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    explained = sum("  # " in line for line in settings) + text.count("\n  # ") + text.count("\n    # ")
    assert explained >= 0.6 * len(settings)
    if kind == "continue":
        assert moe_lm("prepare", "mine.yaml").code == 0
    dry = moe_lm(KINDS[kind].verb, "mine.yaml", "--dry-run")
    assert (dry.code, dry.err) == (0, "")
    assert "parameters" in dry.out


def test_what_init_says_is_held_out_is_what_prepare_holds_out(here: Path, moe_lm: MoeLm) -> None:
    """Also of a text without blank lines, which has fewer pieces than its size says."""
    lines = (f"{n} times {n + 7} is {n * (n + 7)}, as everyone knows\n" for n in range(1500))
    (here / "lines.txt").write_text("".join(lines))
    done = moe_lm("init", "lines.txt", "--minutes", "0.1")
    found = re.search(r"bytes, (\d+\.\d)% is held out", done.out)
    assert found is not None, done
    assert 0 < float(found[1]) <= 10
    assert moe_lm("tokenizer", "train", "lines-tokenizer.yaml").code == 0
    prepared = re.search(r"held out: .* \((\d+\.\d)%\)", moe_lm("prepare", "lines.yaml").out)
    assert prepared is not None
    assert float(prepared[1]) == pytest.approx(float(found[1]), abs=1)  # of tokens, and of characters


def test_a_text_becomes_a_model_by_the_commands_that_init_names(here: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("init", "my.txt", "--minutes", "0.1")
    assert "wrote my.yaml" in done.out
    config = load_config(PretrainConfig, here / "my.yaml")
    assert load_config(TokenizerRecipe, here / "my-tokenizer.yaml").output == config.data.tokenizer
    assert "tokens/s just now), reading the text about" in done.out
    commands = [line.split()[1:] for line in done.out.partition("next:\n")[2].splitlines()]
    assert [words[0] for words in commands] == ["tokenizer", "prepare", "pretrain", "pretrain"]
    *before, last = commands
    for words in [*before, [*last, "train.steps=2", "train.eval_batches=1"]]:
        assert moe_lm(*words).code == 0, words
    assert (here / "runs" / "my" / "pretrain" / "checkpoints" / "step-00000002").is_dir()
    again = moe_lm("init", "my.txt", "--minutes", "0.1", "--force")
    assert "run_dir: runs/my-2/pretrain, as runs/my/pretrain holds a run" in again.out
    assert load_config(PretrainConfig, here / "my.yaml").data.tokenizer == Path("runs/my-2/tokenizer")


def test_without_a_text_or_a_start_it_says_what_is_to_be_set(here: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("init", "--for", "lora", "--out", "lora.yaml")
    assert "\nstart_from: a placeholder; first set it to a run" in done.out
    assert (
        moe_lm("init", "--out", "bare.yaml")
        .out.partition("next:\n")[2]
        .startswith("  moe-lm tokenizer train bare-tokenizer.yaml\n  moe-lm prepare bare.yaml\n")
    )
    recipe = load_config(TokenizerRecipe, here / "bare-tokenizer.yaml")
    config = load_config(PretrainConfig, here / "bare.yaml")
    assert (recipe.output, recipe.vocab_size) == (config.data.tokenizer, config.model.vocab_size)


def test_nothing_is_written_over_unless_one_says_so(here: Path, moe_lm: MoeLm) -> None:
    for out in ("mine.yaml", "other.yaml"):
        assert moe_lm("init", "--for", "tokenizer", "--out", out).code == 0
    (here / "mine.yaml").write_text("mine")
    done = moe_lm("init", "--for", "tokenizer", "--out", "mine.yaml")
    assert (done.code, (here / "mine.yaml").read_text()) == (2, "mine")
    assert "mine.yaml is there already; give another --out, or --force" in done.err
    assert moe_lm("init", "--for", "tokenizer", "--out", "mine.yaml", "--force").code == 0
    assert yaml.safe_load((here / "mine.yaml").read_text()) == yaml.safe_load((here / "other.yaml").read_text())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("gone.txt",), "gone.txt does not exist"),
        (("empty.txt",), "(empty.txt) has no usable document: 1 skipped: empty document"),
        (("bytes.txt", "--for", "tokenizer"), "(bytes.txt) has no usable document: 1 skipped: invalid UTF-8"),
        (("rows.jsonl", "--for", "lora", "--start-from", "nowhere"), "nowhere"),
        (("--for", "tokenizer", "--out", "my.txt/x.yaml"), "cannot write my.txt/x.yaml"),
    ],
)
def test_what_cannot_be_written_for_is_one_sentence(
    here: Path, moe_lm: MoeLm, arguments: tuple[str, ...], sentence: str
) -> None:
    (here / "empty.txt").touch()
    (here / "bytes.txt").write_bytes(bytes(range(128, 256)))
    done = moe_lm("init", *arguments)
    assert done.code in (1, 2)
    assert sentence in done.err
    assert done.err.count("\n") == 1
