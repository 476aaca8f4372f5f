"""Needle in a haystack: does a model find a fact that stands far back in its context?

A short fact is put into other text at a depth, and the text ends with the beginning of the same sentence. The model has
found the fact if it thinks its last word likelier than the same words of other facts, which the text does not have. A
small model that was never taught to answer can do that too.

All answers begin with different tokens, so that one forward pass scores them all, from the logits of one position.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.generation import NeedleConfig
from moe_lm.config.run import PretrainConfig
from moe_lm.data.batches import IGNORE
from moe_lm.data.packing import Example, pack_examples
from moe_lm.evaluate.perplexity import check_window, precision_of, run_config
from moe_lm.evaluate.scoring import TOKENS_AT_ONCE
from moe_lm.evaluate.texts import file_texts, held_out_texts
from moe_lm.generate.session import Session
from moe_lm.model.attention import PackedAttention, segment_positions
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.training_loss import Predictions
from moe_lm.tokenizer.tokenizer import Tokenizer

FACT = "\nThe secret word of {place} is{answer}.\n"
QUESTION = "\nThe secret word of {place} is"
PLACES = ("Lisbon", "Cairo", "Oslo", "Lima", "Kyoto", "Dublin", "Prague", "Havana")
ANSWERS = tuple(  # no two begin with the same letter, so that few begin with the same token
    f" {word}" for word in "apple bread candle door eagle fish garden horse iron jar king lamp mountain night orange "
    "paper queen river ship table umbrella valley window yellow".split()
)  # fmt: skip
HAYSTACKS = 8  # as many tokens of filler as this many of the longest texts, for different ones to be drawn
SHORTEST = 64  # tokens of a text whose length follows from the model

Tell = Callable[[int, int], None]


class NeedleScore(NamedTuple):
    """How often the fact was found in texts of `length` tokens at a depth, from 0 (the beginning) to 1 (the end)."""

    length: int
    depth: float
    found: float  # share of the trials
    nll: float  # of the right answer among all, in nats, mean
    trials: int


@dataclass(frozen=True)
class NeedleScores:
    """A grid of scores, by length and then by depth; a guess finds one in `choices` facts."""

    cells: Sequence[NeedleScore]
    choices: int

    def __str__(self) -> str:
        """A line for each length, with the share found at each depth."""
        depths = [f"{depth:.0%}" for depth in sorted({cell.depth for cell in self.cells})]
        rows = [("tokens", [*depths, "all"])]
        for length, group in itertools.groupby(self.cells, lambda cell: cell.length):
            shares = [cell.found for cell in group]
            rows.append((f"{length:,}", [f"{share:.0%}" for share in [*shares, sum(shares) / len(shares)]]))
        lines = [f"{name:>9}" + "".join(f"{cell:>7}" for cell in cells) for name, cells in rows]
        trials = self.cells[0].trials
        lines.append(
            f"share of facts found, by the length of the text and the depth of the fact; {trials} texts each, a guess "
            f"finds {1 / self.choices:.0%}"
        )
        return "\n".join(lines)


def evaluate_needle(
    run: Path,
    config: NeedleConfig,
    files: Sequence[Path] = (),
    base: Path | None = None,
    tell: Tell = lambda done, total: None,
) -> NeedleScores:
    """Look for facts in the run's held-out text, or in that of files, at every length and depth.

    Lengths are by default the rows of the run's training, or the positions of a model that was not trained here, and
    halves of it down to an eighth. The precision is that of training. `tell` hears how many texts are read, and of how
    many. Raises UsageError for a length that the model or the filler is too short for, or that has no room for a fact.
    """
    session = Session.load(run, base=base, decoding=False)
    settings, model = run_config(session.checkpoint), session.model
    positions = model.config.max_position_embeddings
    longest = min(settings.data.longest, positions) if isinstance(settings, PretrainConfig) else positions
    lengths = config.lengths or [size for part in (8, 4, 2, 1) if (size := longest // part) >= SHORTEST] or [longest]
    check_window(model, "--lengths", max(lengths))
    tokenizer = session.tokenizer
    texts = file_texts(files, tokenizer) if files else held_out_texts(run, settings, tokenizer)
    documents = itertools.chain.from_iterable(text.documents for text in texts)
    filler = filler_of(documents, HAYSTACKS * max(lengths))
    haystacks = Haystacks(tokenizer, filler)
    return grid(model, haystacks, lengths, config.depths, config.trials, precision_of(session), tell)


def filler_of(documents: Iterable[ArrayLike], wanted: int) -> NDArray[np.int64]:
    """The text of documents without their ends, `wanted` tokens or as many as there are."""
    found: list[NDArray[np.int64]] = []
    size = 0
    for ids in documents:
        found.append(np.asarray(ids, np.int64)[1:-1])
        size += len(found[-1])
        if size >= wanted:
            break
    return np.concatenate(found) if found else np.zeros(0, np.int64)


class Haystack(NamedTuple):
    """A text that ends where the answer follows, and the number of the right one."""

    ids: list[int]
    right: int


class Haystacks:
    """Makes texts with a fact out of filler; `answers` are the first tokens in which the answers differ."""

    def __init__(self, tokenizer: Tokenizer, filler: NDArray[np.int64]) -> None:
        self._tokenizer, self._filler = tokenizer, filler
        options = [tokenizer.encode(answer) for answer in ANSWERS]
        alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*options, strict=False))
        self._shared = [tokens[0] for tokens in alike]
        first = [ids[len(self._shared)] for ids in options]
        times = Counter(first)
        self._chosen = [number for number, token in enumerate(first) if times[token] == 1]
        self.answers = [first[number] for number in self._chosen]

    def make(self, length: int, depth: float, trial: int) -> Haystack:
        """A text of `length` tokens; those of a trial have the same filler and fact at every depth.

        Raises UsageError for a length that has no room for a fact, or more than the filler has.
        """
        draw = random.Random(f"{length}/{trial}")
        place, right = draw.choice(PLACES), draw.randrange(len(self._chosen))
        fact = self._tokenizer.encode(FACT.format(place=place, answer=ANSWERS[self._chosen[right]]))
        question = [*self._tokenizer.encode(QUESTION.format(place=place)), *self._shared]
        room = length - 1 - len(fact) - len(question)
        if room < 0:
            raise UsageError(
                f"a text of {length} tokens has no room for a fact and its question, which have "
                f"{1 + len(fact) + len(question)}; give longer --lengths"
            )
        if room > len(self._filler):
            raise UsageError(
                f"the text to hide a fact in has {len(self._filler):,} tokens, less than the {length:,} of --lengths; "
                "give files with more text, or shorter lengths"
            )
        begin = draw.randrange(len(self._filler) - room + 1)
        filler = self._filler[begin : begin + room].tolist()
        before = round(depth * room)
        return Haystack([self._tokenizer.bos_id, *filler[:before], *fact, *filler[before:], *question], right)


def grid(
    model: LanguageModel,
    haystacks: Haystacks,
    lengths: Sequence[int],
    depths: int,
    trials: int,
    dtype: torch.dtype = torch.float32,
    tell: Tell = lambda done, total: None,
) -> NeedleScores:
    """The scores of every length and depth: `depths` of them, evenly from 0 to 1, or a single one in the middle."""
    shares = [place / (depths - 1) for place in range(depths)] if depths > 1 else [0.5]
    total, done = len(lengths) * depths * trials, 0
    cells: list[NeedleScore] = []
    for length, depth in itertools.product(sorted(lengths, reverse=True), shares):  # memory fails early
        found = nll = 0.0
        texts = [haystacks.make(length, depth, trial) for trial in range(trials)]
        at_once = max(1, TOKENS_AT_ONCE // length)
        for group in (texts[first : first + at_once] for first in range(0, trials, at_once)):
            for log_probs, text in zip(_log_probs(model, group, haystacks.answers, dtype), group, strict=True):
                found += int(log_probs.argmax()) == text.right
                nll -= float(log_probs[text.right])
            tell(done := done + len(group), total)
        if not np.isfinite(nll):
            raise MoeLmError(f"the loss at {length} tokens is {nll}; the weights are damaged or training diverged")
        cells.append(NeedleScore(length, depth, found / trials, nll / trials, trials))
    return NeedleScores(sorted(cells), len(haystacks.answers))


@torch.inference_mode()
def _log_probs(
    model: LanguageModel, texts: Sequence[Haystack], answers: Sequence[int], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The log-probability of each answer among all, `[answers]`, for each text; all in one packed row."""
    examples = []
    for text in texts:
        targets = np.full(len(text.ids), IGNORE, np.int64)
        targets[-1] = answers[text.right]
        examples.append(Example(np.array(text.ids, np.int64), targets))
    batch = pack_examples([examples], sum(len(text.ids) for text in texts), pad_id=0)[0].to(model.device)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen)
        positions_1T = segment_positions(batch.cu_seqlens, batch.input_ids.shape)
        hidden_1TD, _ = model.model(batch.input_ids, positions_1T, attend)
        logits_CV = Predictions(model.lm_head, hidden_1TD).logits(batch.targets != IGNORE)
    return iter(logits_CV[:, list(answers)].log_softmax(-1).cpu())
