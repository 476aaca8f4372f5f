"""Beam search: the most probable continuations of a prompt.

Scores, candidates and the end of the search are those of transformers' `generate`, so that both give the same
tokens. Shapes: K beams, C candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.config.generation import SampleConfig
from moe_lm.generate.forward import cache_for, capacity_for, check_prompt, extend, prefill, room
from moe_lm.generate.penalties import Text, check_ids, penalised
from moe_lm.generate.strategies import check_logits
from moe_lm.model.transformer import LanguageModel

NEVER = -1e9  # a score that no text has


class Beam(NamedTuple):
    """A finished text without its stop token; `finish` is "stop" or "length"."""

    ids: list[int]
    score: float
    finish: str


@torch.inference_mode()
def search(
    model: LanguageModel,
    prompt: Sequence[int],
    config: SampleConfig,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    ends: Callable[[Sequence[int]], bool] = lambda ids: False,
) -> list[Beam]:
    """The best `config.num` texts after the prompt, best first, of a search with `config.beams`, which is set.

    A text's score is its log-probability divided by its length, stop token included, to the power of
    `length_penalty`. The search ends when as many texts as beams have ended and no running beam would beat the worst
    of them if it ended now. Penalties change log-probabilities here, not logits.
    A text ends before a token of `stop_ids`, at its greatest length, or when `ends` says so of its ids, which then
    stay as they are: a stop string is complete. Only ids below `vocab_size` are chosen. Raises UsageError for a
    prompt that is empty or too long, MoeLmError for logits that are not a distribution.
    """
    assert config.beams is not None
    check_prompt(model.config, prompt, model.config.max_position_embeddings)
    check_ids(config, vocab_size or model.config.vocab_size)
    limit = min(config.max_new_tokens, room(model.config, prompt))
    beams = _Beams(prompt, config, config.beams, frozenset(stop_ids), limit, ends)
    cache = cache_for(model, config.beams, capacity_for(model.config, [len(prompt)], limit))
    logits_KV = prefill(model, [prompt], cache.view(0, 1)).logits.expand(config.beams, -1)
    cache.take_rows(torch.zeros(config.beams, dtype=torch.long, device=model.device))
    while True:
        check_logits(logits_KV)
        parents = beams.advance(logits_KV[:, :vocab_size].float().log_softmax(-1))
        if beams.done:
            return sorted(beams.texts(), key=lambda beam: -beam.score)[: config.num]
        cache.take_rows(torch.tensor(parents, device=model.device))
        logits_KV = extend(model, cache, [ids[-1:] for ids in beams.running]).logits


class _Beams:
    """K beams that compete, and the K best texts that have ended."""

    def __init__(
        self,
        prompt: Sequence[int],
        config: SampleConfig,
        width: int,
        stop_ids: frozenset[int],
        limit: int,
        ends: Callable[[Sequence[int]], bool],
    ) -> None:
        self.prompt, self.config, self.stop_ids, self.limit, self.ends = prompt, config, stop_ids, limit, ends
        self.width, self.candidates = width, max(2, 1 + len(stop_ids)) * width
        self.running: list[list[int]] = [[] for _ in range(self.width)]
        # All beams begin with the same text: only the first one's continuations count.
        self.scores = torch.tensor([0.0] + [NEVER] * (self.width - 1))
        self.ended: list[list[int]] = [[] for _ in range(self.width)]
        self.ended_scores = torch.full((self.width,), NEVER)
        self.full = torch.zeros(self.width, dtype=torch.bool)  # places of `ended` that hold a text
        self.improvable, self.done = True, False

    def advance(self, log_p_KV: Tensor) -> list[int]:
        """Make every beam a token longer. Returns, for each, the number of the beam that it continues."""
        log_p_KV = self._penalised(log_p_KV)
        total = (log_p_KV.cpu() + self.scores[:, None]).flatten()
        log_p_C, index_C = total.topk(min(self.candidates, len(total)))
        vocabulary = log_p_KV.shape[-1]
        parents, tokens = (index_C // vocabulary).tolist(), (index_C % vocabulary).tolist()
        texts = [[*self.running[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        hits_C = torch.tensor([self._ends(ids) for ids in texts])
        self._collect(texts, log_p_C, hits_C)
        going_on = log_p_C + hits_C.float() * NEVER
        best = going_on.topk(self.width).indices
        self.scores = going_on[best]
        self.running = [texts[place] for place in best.tolist()]
        self._judge(bool(hits_C.all()))
        return [parents[place] for place in best.tolist()]

    def texts(self) -> list[Beam]:
        """The texts that have ended."""
        beams = []
        for ids, score, there in zip(self.ended, self.ended_scores.tolist(), self.full.tolist(), strict=True):
            if there:
                stopped = ids[-1] in self.stop_ids
                finish = "stop" if stopped or self.ends(ids) else "length"
                beams.append(Beam(ids[:-1] if stopped else ids, score, finish))
        return beams

    def _penalised(self, log_p_KV: Tensor) -> Tensor:
        short = len(self.running[0]) < self.config.min_new_tokens
        forbidden = self.stop_ids if short else frozenset[int]()
        texts = [Text([*self.prompt, *ids], len(self.prompt), forbidden) for ids in self.running]
        return penalised(log_p_KV, self.config, texts)

    def _ends(self, ids: list[int]) -> bool:
        return len(ids) >= self.limit or ids[-1] in self.stop_ids or self.ends(ids)

    def _collect(self, texts: list[list[int]], log_p_C: Tensor, hits_C: Tensor) -> None:
        """Keep the best texts that have ended.

        Only the first K candidates count; the others are there so that K beams can go on.
        """
        new_C = hits_C & (torch.arange(len(hits_C)) < self.width)
        if not self.improvable:
            return
        scores_C = log_p_C / len(texts[0]) ** self.config.length_penalty + (~new_C).float() * NEVER
        scores = torch.cat((self.ended_scores, scores_C))
        best = scores.topk(self.width).indices
        both, there = [*self.ended, *texts], torch.cat((self.full, new_C))
        self.ended = [both[place] for place in best.tolist()]
        self.ended_scores, self.full = scores[best], there[best]

    def _judge(self, all_hit: bool) -> None:
        """Decide whether a running beam would be among the best texts if it ended now."""
        possible = self.scores[0] / len(self.running[0]) ** self.config.length_penalty
        worst = torch.where(self.full, self.ended_scores.min(), NEVER)
        self.improvable = self.improvable and bool((possible > worst).any())
        self.done = not self.improvable or all_hit
