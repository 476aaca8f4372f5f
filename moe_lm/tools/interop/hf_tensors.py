"""The tensors of a Hugging Face folder that make up each tensor of ours.

Ours are those of `LanguageModel`, in a checkpoint under `model.` and their name. The routed experts of a layer are one
stack `[E, in, out]` here and E matrices `[out, in]` there; everything else is the same tensor, perhaps renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from moe_lm.checkpoint.checkpoint import MODEL_PREFIX
from moe_lm.checkpoint.read import TensorSource, pieces
from moe_lm.common.errors import MoeLmError
from moe_lm.config.model import ModelConfig
from moe_lm.model.size import on_meta
from moe_lm.tools.interop.families import Family

LISTED = 5  # names in an error; the others are counted
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTER_BIAS = "e_score_correction_bias"
INVERSE_FREQUENCIES = re.compile(r"rotary_emb\.inv_freq$")
STACKS = ("experts.gate_up_proj", "experts.down_proj")
LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Part(NamedTuple):
    """A tensor of theirs: the transpose of expert `expert` of our stack, or the whole of our tensor.

    In the stacks that `transformers` has in memory the expert is one of its matrices, or `within`, some rows of that.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None
    within: slice | None = None


class TensorPair(NamedTuple):
    """A tensor of ours and its parts there; a router's bias has none in a family without such biases."""

    ours: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    copied: bool = False  # a tied head, which a folder does not hold a second time

    @property
    def is_bias_of_router(self) -> bool:
        return self.ours.endswith(ROUTER_BIAS)


def tensor_pairs(config: ModelConfig, family: Family) -> list[TensorPair]:
    """Every tensor of the model, in the model's order."""
    pairs = []
    for name, tensor in on_meta(config).state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith(ROUTER_BIAS) and not family.router_bias:
            parts: tuple[Part, ...] = ()
        elif ".experts." in name:
            layer, matrix = name.split("mlp.experts.")
            one = (shape[2], shape[1])
            form = layer + family.expert_tensors[matrix]
            parts = tuple(Part(form.format(expert=expert), one, expert) for expert in range(shape[0]))
        else:
            theirs = EMBEDDING if name == HEAD and config.tie_word_embeddings else name
            for ours, other in family.tensors.items():
                theirs = theirs.replace(ours, other)
            in_a_row = name.endswith(ROUTER_BIAS) and family.router_bias_shape == "1 E"
            parts = (Part(theirs, (1, *shape) if in_a_row else shape, None),)
        copied = name == HEAD and config.tie_word_embeddings
        pairs.append(TensorPair(MODEL_PREFIX + name, shape, parts, copied))
    return pairs


def as_found(pairs: Sequence[TensorPair], names: Iterable[str]) -> list[TensorPair]:
    """The same pairs, with their parts where a folder with these names has them.

    Beside published names these are those of `transformers` 5 in memory, which state dicts of FSDP and accelerate keep:
    a layer's experts as stacks, `experts.gate_up_proj` [E, 2F, D], gates above ups, and `experts.down_proj` [E, D, F].
    """
    present = set(names)
    return [pair._replace(parts=tuple(_as_found(part, pair, present) for part in pair.parts)) for pair in pairs]


def _as_found(part: Part, pair: TensorPair, present: set[str]) -> Part:
    in_memory = part.name.replace("block_sparse_moe.", "mlp.")  # as Mixtral's layers are called there
    if part.name in present or in_memory in present:
        return part if part.name in present else part._replace(name=in_memory)
    if part.expert is None:
        return part
    layer, matrix = in_memory.partition("experts.")[0], pair.ours.rpartition(".")[2]
    rows, columns = part.shape
    name, height = (STACKS[1], rows) if matrix == "down_proj" else (STACKS[0], 2 * rows)
    within = slice(rows, height) if matrix == "up_proj" else slice(0, rows)
    stack = Part(f"{layer}{name}", (pair.shape[0], height, columns), part.expert, within)
    return stack if stack.name in present else part


def check_counts(source: TensorSource, config: ModelConfig, origin: str) -> None:
    """Raise MoeLmError when a folder has far too few tensors for its config.json, before a name is made for each."""
    present = sum(max(1, *source.shape(name)[:1]) if name.endswith(STACKS) else 1 for name in source.names())
    least = config.num_hidden_layers + len(config.moe_layers) * config.n_routed_experts
    if least > 1000 + 4 * present:
        raise MoeLmError(
            f"{origin} holds {present} tensors, but num_hidden_layers={config.num_hidden_layers} and "
            f"{config.n_routed_experts} experts of its config.json promise more than {least}; copy both again"
        )


def check_complete(source: TensorSource, pairs: Sequence[TensorPair], config: ModelConfig, origin: str) -> list[str]:
    """Compare a folder's tensors with those of the model; returns a sentence for each kind of tensor that is left out.

    Raises MoeLmError listing what is missing or unknown, or naming file and tensor of a wrong shape or data type.
    """
    needed = {part.name: part for pair in pairs for part in pair.parts}
    present = set(source.names())
    missing = sorted(needed.keys() - present)
    unexpected = [name for name in sorted(present - needed.keys()) if not _why_left_out(name, config)]
    if missing:
        there = f"; there instead: {some(unexpected)}" if unexpected else ""
        raise MoeLmError(f"{origin} lacks {len(missing)} tensors that its config.json promises: {some(missing)}{there}")
    for name, part in needed.items():
        shape = source.shape(name)
        if shape != part.shape:
            raise MoeLmError(
                f"{source.where(name)}: tensor {name} is {list(shape)}, expected {list(part.shape)} by config.json"
            )
        source.dtype(name)
    if config.tie_word_embeddings and HEAD in present:
        _check_tied(source, origin)
    if unexpected:
        raise MoeLmError(
            f"{origin} holds {len(unexpected)} tensors that its config.json does not explain: {some(unexpected)}; "
            "dropping them would change the model"
        )
    left_out: dict[str, list[str]] = {}
    for name in sorted(present - needed.keys()):
        left_out.setdefault(_why_left_out(name, config), []).append(name)
    return [f"left out: {why}, {len(names)} tensors ({some(names)})" for why, names in left_out.items()]


def _check_tied(source: TensorSource, origin: str) -> None:
    """Raise MoeLmError for a head that differs from the embedding, although config.json says that they are tied."""
    same = source.shape(HEAD) == source.shape(EMBEDDING) and all(
        torch.equal(*both) for both in zip(pieces(source, HEAD), pieces(source, EMBEDDING), strict=True)
    )
    if not same:
        raise MoeLmError(
            f"{origin}: tie_word_embeddings=True, but {HEAD} differs from {EMBEDDING}; correct config.json"
        )


def _why_left_out(name: str, config: ModelConfig) -> str:
    if INVERSE_FREQUENCIES.search(name):
        return "rotary frequencies, which config.json gives"
    if name == HEAD and config.tie_word_embeddings:
        return "the head, which config.json says is the embedding"
    return ""


def some(names: Sequence[str]) -> str:
    """The first LISTED names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
