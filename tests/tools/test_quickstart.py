"""The quickstart on a text of one's own: its folder, its sizes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from moe_lm.common.errors import UsageError
from moe_lm.config.data import SourceConfig
from moe_lm.config.model import ModelConfig
from moe_lm.model.size import count_parameters
from moe_lm.tools.quickstart.results import PROMPT_CHARACTERS, beginning, next_steps
from moe_lm.tools.quickstart.setup import Setup, claim, default_folder
from moe_lm.tools.sizes import HELD_OUT, SHAPES, Sizes, held_out_share, piece_bytes
from tests.conftest import MoeLm


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gone.txt", None, "gone.txt does not exist; correct the path"),
        ("empty.txt", b"", "has no usable document: 1 skipped: empty document"),
        ("paper.pdf", b"%PDF-1.7 text", "paper.pdf is not plain text; convert it first"),
        ("table.csv", b"a,b\n1,2\n", "table.csv is not plain text; write its text column as .jsonl"),
        ("image.txt", b"\x89PNG\0\0", "has no usable document: 1 skipped: invalid UTF-8"),
        ("nul.txt", b"a\0b", "has no usable document: 1 skipped: NUL byte"),
    ],
)
def test_what_is_no_text_is_one_sentence(
    tmp_path: Path, moe_lm: MoeLm, name: str, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = moe_lm("quickstart", "--corpus", tmp_path / name, "--run-dir", tmp_path / "run")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert sentence in done.err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_for_this_text_is_refused(tmp_path: Path, moe_lm: MoeLm) -> None:
    text, other = tmp_path / "my.txt", tmp_path / "other.txt"
    for file in (text, other):
        file.write_text("Some text.\n" * 300)
    for name in ("of other", "strange"):
        (tmp_path / name).mkdir()
    (tmp_path / "of other" / "corpus.txt").write_text(str(other))
    (tmp_path / "strange" / "model.safetensors").touch()
    for folder, sentence in (
        ("of other", f"is of {other}; give another --run-dir for {text}"),
        ("strange", "holds something else; give another --run-dir"),
        ("my.txt/run", "cannot write to the run folder"),
    ):
        done = moe_lm("quickstart", "--corpus", text, "--run-dir", tmp_path / folder)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert sentence in done.err


@pytest.mark.parametrize(
    ("corpus", "folder"),
    [
        (None, "runs/quickstart"),
        ("texts/my book.txt", "runs/my-book"),
        ("novels/", "runs/novels"),
        ("novels/*.txt.xz", "runs/novels"),
        ("*.txt", "runs/text"),
    ],
)
def test_every_text_has_a_folder_of_its_own(corpus: str | None, folder: str) -> None:
    assert default_folder(None if corpus is None else Path(corpus)) == Path(folder)


def test_a_small_text_gets_a_small_model_and_pieces_of_which_few_are_held_out(tmp_path: Path) -> None:
    totals = []
    for size in (20_000, 200_000, 1_000_000, 3_000_000, 50_000_000):
        with (tmp_path / "text.txt").open("wb") as file:
            file.truncate(size)
        sizes = Sizes.of(SourceConfig(name="text", path=str(tmp_path / "text.txt")))
        parameters = count_parameters(ModelConfig(vocab_size=sizes.vocab_size, **sizes.model)).total
        assert sizes.piece_bytes <= max(size / 50, 2048)
        totals.append((sizes.vocab_size, parameters))
    assert totals == sorted(totals)
    assert totals[1][0] == 512
    assert totals[1][1] < 1.2e6
    assert totals[-1] == (4096, 10_234_624)  # the quickstart's own
    assert [shape.text_bytes for shape in SHAPES] == sorted(shape.text_bytes for shape in SHAPES)


def setup_of(text: Path, minutes: float) -> Setup:
    return Setup(text.with_name("run"), text, minutes, Console(), started=0.0)


def test_a_changed_text_is_named_and_other_minutes_read_the_same_text(tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("A line of some words.\n" * 50_000)
    claim(setup_of(text, 0.1))
    source = setup_of(text, 0.1).source
    assert source["max_bytes"] == 500_000
    claim(setup_of(text, 1))
    assert setup_of(text, 1).source == source
    with text.open("a") as file:
        file.write("One more.\n")
    with pytest.raises(UsageError, match=r"my.txt has changed since .*run was made of it; give another --run-dir"):
        claim(setup_of(text, 1))


@pytest.mark.parametrize("size", [3_000, 60_000])
def test_of_a_small_text_without_blank_lines_some_is_held_out_and_not_much(tmp_path: Path, size: int) -> None:
    text = tmp_path / "tiny.txt"
    text.write_text("A line of some words.\n" * (size // 22))
    source = SourceConfig(name="corpus", path=str(text))
    share = held_out_share(source.model_copy(update={"piece_bytes": piece_bytes(source)}))
    assert 0 < share <= (0.35 if size < 60_000 else 2 * HELD_OUT)


def test_a_text_of_one_piece_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("A single line of some words, " * 300)
    with pytest.raises(UsageError, match=r"one.txt is too short to be trained on: its 8,700 bytes are one piece"):
        claim(setup_of(text, 1))
    assert not (tmp_path / "run").exists()


def test_a_prompt_is_the_beginning_of_a_line_that_says_something() -> None:
    line = "It was a bright cold day in April, and the clocks were striking thirteen."
    assert beginning(f"\nCHAPTER I\n\n  {line}\n") == "It was a bright cold day in April, and"
    assert beginning("short\nlines\n") == ""
    assert beginning("学" * 60) == "学" * PROMPT_CHARACTERS


def test_a_walk_that_was_too_short_to_learn_says_so(tmp_path: Path) -> None:
    setup = setup_of(tmp_path / "text.txt", 0.3)
    poor, better = ({"val_bits_per_byte": bits, "unigram_bits_per_byte": 2.7, "samples": []} for bits in (2.8, 2.6))
    first, *others = next_steps(setup, poor)
    assert first == "The model is still worse than token frequencies: 0.3 minutes were too few; give it more, as below."
    assert others == list(next_steps(setup, better))
    assert "quickstart --minutes 0.6" in others[-1]
