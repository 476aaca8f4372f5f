"""Decoding without a cache: the whole text goes through the model for every token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lm.generate.decode import Settings, Step
from moe_lm.generate.penalties import Text
from moe_lm.model.attention import PackedAttention
from moe_lm.model.transformer import LanguageModel, ModelOutput
from tests.tiny import LATENT, tiny_model

VOCABULARY, POSITIONS = 97, 40
KINDS: dict[str, dict[str, Any]] = {  # changes of the tiny config
    "grouped-query": {},
    "one query head a key head": {"num_key_value_heads": 4},
    "latent": LATENT | {"v_head_dim": 16, "rope_interleave": True},
    "dense, tied": {"n_routed_experts": 0, "tie_word_embeddings": True},
    "classic": {
        "n_routed_experts": 0, "norm_type": "layernorm", "position_embedding": "learned", "use_qk_norm": False,
    },
    "sinusoidal, softmax router": {"position_embedding": "sinusoidal", "scoring_func": "softmax"},
}  # fmt: skip


def build(kind: str = "grouped-query") -> LanguageModel:
    """A model in plain kernels, whose tokens are far from equally likely."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "initializer_range": 0.3}
    return tiny_model(3, **sizes | KINDS[kind]).eval()


@torch.inference_mode()
def full_output(model: LanguageModel, ids: Sequence[int]) -> ModelOutput:
    attend = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
    output: ModelOutput = model(torch.tensor([ids]), torch.arange(len(ids))[None], attend)
    return output


def full_logits(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    """Logits `[S, V]`."""
    return full_output(model, ids).logits[0]


def uncached_steps(
    model: LanguageModel, request: int, prompt: Sequence[int], settings: Settings, stop_ids: Sequence[int] = ()
) -> list[Step]:
    """The steps of a request, without log-probabilities."""
    ids, generator, steps = list(prompt), torch.Generator().manual_seed(settings.seed), list[Step]()
    while not steps or steps[-1].finish is None:
        forbidden = stop_ids if len(steps) < settings.min_new_tokens else ()
        output = full_output(model, ids)
        [token] = settings.sampling(output.logits[:, -1], [generator], [Text(ids, len(prompt), forbidden)]).tolist()
        if token in stop_ids:
            return [*steps, Step(request, None, "stop")]
        ids.append(token)
        finish = "length" if len(steps) + 1 == settings.max_new_tokens else None
        experts = tuple(map(strongest_first, output.routings)) if settings.routing else None
        steps.append(Step(request, token, finish, experts=experts))
    return steps


def uncached(model: LanguageModel, prompt: Sequence[int], settings: Settings) -> list[int]:
    """The ids of a text."""
    return texts(uncached_steps(model, 0, prompt, settings))[0]


def strongest_first(routing: Any) -> tuple[int, ...]:
    """The experts of the last token, the one with the largest weight first."""
    return tuple(routing.experts[-1][routing.weights[-1].argsort(descending=True)].tolist())


def texts(steps: Iterable[Step]) -> dict[int, list[int]]:
    """The ids of every request."""
    found: dict[int, list[int]] = {}
    for step in steps:
        found.setdefault(step.request, []).extend([] if step.token is None else [step.token])
    return found
