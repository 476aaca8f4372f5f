"""A fact in a text: where it stands, what the scores are by definition, and a model that finds it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lm.common.errors import MoeLmError
from moe_lm.config.data import DataConfig, SourceConfig
from moe_lm.config.reading import dump_config
from moe_lm.config.run import PretrainConfig
from moe_lm.config.training import TrainConfig
from moe_lm.evaluate.needle import ANSWERS, PLACES, Haystacks, NeedleScore, NeedleScores, filler_of, grid
from moe_lm.model.transformer import LanguageModel
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import MoeLm, SaveRun
from tests.processes import ROOT
from tests.tiny import logits_of, tiny_model

TINY = ROOT / "tokenizer" / "tiny"
DOT = 15  # a filler token; the tokenizer has it as a byte


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(vocab_size=1024, max_position_embeddings=128).eval()


@pytest.fixture(scope="module")
def haystacks(tiny_tokenizer: Tokenizer) -> Haystacks:
    return Haystacks(tiny_tokenizer, np.full(300, DOT))


def test_no_two_answers_begin_alike(haystacks: Haystacks, tiny_tokenizer: Tokenizer) -> None:
    letters = [answer[1] for answer in ANSWERS]
    assert len(set(letters)) == len(letters)
    assert len(haystacks.answers) == len(set(haystacks.answers)) > 15
    assert all(answer[0] == " " for answer in ANSWERS)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_fact_stands_at_its_depth_and_the_text_ends_before_the_answer(
    haystacks: Haystacks, tiny_tokenizer: Tokenizer, depth: float
) -> None:
    text = haystacks.make(120, depth, trial=3)
    assert len(text.ids) == 120
    assert text.ids[0] == tiny_tokenizer.bos_id
    before, fact, after = tiny_tokenizer.decode(text.ids).partition("\nThe secret word of ")
    dot = tiny_tokenizer.decode([DOT])
    place, _, rest = (fact + after).removeprefix("\nThe secret word of ").partition(" is ")
    answer, _, rest = rest.partition(".\n")
    filler = rest.removesuffix(f"\nThe secret word of {place} is")
    assert (before, filler) == (dot * len(before), dot * len(filler))
    assert len(before) == round(depth * (len(before) + len(filler)))
    assert place in PLACES
    assert tiny_tokenizer.encode(f" {answer}")[0] == haystacks.answers[text.right]
    other = haystacks.make(120, 0.5, trial=3)
    assert (other.right, sorted(other.ids)) == (text.right, sorted(text.ids))
    assert len({haystacks.make(120, depth, trial).right for trial in range(20)}) > 5


def test_scores_are_log_probabilities_of_the_answers_first_tokens(model: LanguageModel, haystacks: Haystacks) -> None:
    """In batches of several texts and in ones of one."""
    told: list[tuple[int, int]] = []
    scores = grid(model, haystacks, [60, 100], 2, 3, tell=lambda done, total: told.append((done, total)))
    assert [(cell.length, cell.depth) for cell in scores.cells] == [(60, 0), (60, 1), (100, 0), (100, 1)]
    assert told[-1] == (12, 12)
    for cell in scores.cells:
        nll = found = 0.0
        for trial in range(3):
            text = haystacks.make(cell.length, cell.depth, trial)
            with torch.no_grad():
                logits = logits_of(model, text.ids)[-1][haystacks.answers]
            nll -= float(logits.log_softmax(-1)[text.right]) / 3
            found += float(logits.argmax() == text.right) / 3
        assert (cell.found, cell.nll) == (pytest.approx(found), pytest.approx(nll, abs=1e-4))
    assert scores.choices == len(haystacks.answers)


def test_a_model_that_looks_back_only_so_far_finds_what_is_there(haystacks: Haystacks) -> None:
    found = grid(_Reaching(), haystacks, [60, 160], 3, 4)  # type: ignore[arg-type]
    assert [[cell.found for cell in found.cells if cell.length == length] for length in (60, 160)] == [
        [1.0, 1.0, 1.0], [0.0, 0.0, 1.0],
    ]  # fmt: skip


class _Reaching:
    """The parts of a language model that are asked. It thinks likeliest what followed the same token before."""

    device = torch.device("cpu")
    reach = 60

    def model(self, ids_1T: Tensor, positions_1T: Tensor, attend: object) -> tuple[Tensor, list[object]]:
        hidden = torch.zeros(1, ids_1T.shape[1], 1024)
        for end in range(ids_1T.shape[1]):
            begin = max(end - int(positions_1T[0, end]), end - self.reach)
            same = [place for place in range(begin, end) if ids_1T[0, place] == ids_1T[0, end]]
            hidden[0, end, ids_1T[0, same[-1] + 1] if same else 0] = 9.0
        return hidden, []

    def lm_head(self, hidden: Tensor) -> Tensor:
        return hidden


def test_filler_is_text_without_the_ends_of_documents() -> None:
    documents = iter([[0, 5, 6, 1], [0, 7, 1], [0, 8, 9, 1]])
    assert filler_of(documents, 3).tolist() == [5, 6, 7]
    assert next(documents) == [0, 8, 9, 1]  # no more is read than is wanted
    assert filler_of([], 3).tolist() == []


def test_the_table_has_a_line_for_each_length() -> None:
    cells = [NeedleScore(1024, 0.0, 1.0, 0.1, 8), NeedleScore(1024, 1.0, 0.5, 0.7, 8)]
    lines = str(NeedleScores(cells, 25)).splitlines()
    assert [line.split() for line in lines[:2]] == [["tokens", "0%", "100%", "all"], ["1,024", "100%", "50%", "75%"]]
    assert len(lines[0]) == len(lines[1])
    assert lines[2].endswith("8 texts each, a guess finds 4%")


def test_the_verb_reads_files_and_prints_the_grid(
    model: LanguageModel, tmp_path: Path, save_run: SaveRun, moe_lm: MoeLm
) -> None:
    data = DataConfig(sources=(SourceConfig(name="a", path="a"),), tokenizer=TINY, shards=tmp_path, sequence_length=128)
    train = TrainConfig(steps=1, global_batch_size=1, precision="float32")
    config = PretrainConfig(run_dir=tmp_path / "run", model=model.config, data=data, train=train)
    run, text = save_run(model, dump_config(config)), tmp_path / "text.txt"
    text.write_text("The same text, and no other.\n" * 60)
    done = moe_lm("eval", run, text, "--needle", "--depths", 2, "--trials", 2)
    assert (done.code, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines()[:3]] == ["tokens", "64", "128"]
    for options, message in {
        ("--needle", "--lengths", "20"): "a text of 20 tokens has no room for a fact and its question",
        ("--needle", "--lengths", "128,9999"): "less than the 9,999 of --lengths; give files with more text",
        ("--needle", "--stride", "4"): "--stride 4 has no meaning for --needle",
        ("--needle", "--lengths", "64,64"): "--lengths 64,64 has one twice",
        ("--lengths", "64"): "belongs to --needle",
        ("--tasks", "piqa_offline", "--needle"): "has no meaning for --tasks",
    }.items():
        done = moe_lm("eval", run, text, *options)
        assert (done.code, message in done.err) == (2, True), done.err
    assert "there are no shards in" in moe_lm("eval", run, "--needle").err


def test_what_cannot_be_looked_at_is_refused(haystacks: Haystacks, model: LanguageModel) -> None:
    broken = LanguageModel(model.config)
    broken.load_state_dict(model.state_dict() | {"lm_head.weight": torch.full((1024, 32), math.nan)})
    with pytest.raises(MoeLmError, match="the loss at 60 tokens is nan"):
        grid(broken, haystacks, [60], 1, 1)
