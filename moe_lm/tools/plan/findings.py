"""Mistakes that cost a GPU time or memory, found in a recording and named with their place."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_lm.config.model import ModelConfig
from moe_lm.tools.plan.places import Place
from moe_lm.tools.plan.recording import Kernel, Recording
from moe_lm.tools.plan.trace import Finding


def check(recording: Recording, tokens: int, config: ModelConfig, dtype: torch.dtype) -> list[Finding]:
    """Every mistake once, in the order in which a step meets them."""
    found = [*hidden_syncs(recording), *all_logits(recording, tokens, config.vocab_size)]
    if dtype != torch.float32:
        found += float32_rows(recording, tokens, config)
    return list(dict.fromkeys(found))


def hidden_syncs(recording: Recording) -> Iterator[Finding]:
    """Host reads and shapes that depend on data, but for the counts of an exchange."""
    for read in recording.reads:
        if not read.expected:
            text = f"the host waits for the device at {read.operator}; take the value from what the host knows"
            yield _finding("hidden sync", read.place, text)


def all_logits(recording: Recording, tokens: int, vocabulary: int) -> Iterator[Finding]:
    """A tensor with a number for every token and every entry of the vocabulary."""
    for kernel in recording.kernels:
        for dtype, shape in kernel.shapes:
            if shape and shape[-1] == vocabulary and _size(shape) == tokens * vocabulary:
                text = f"{kernel.name} makes {dtype} {list(shape)}, the logits of all positions at once; use chunks"
                yield _finding("all logits", kernel.place, text)


def float32_rows(recording: Recording, tokens: int, config: ModelConfig) -> Iterator[Finding]:
    """Rows of tokens gathered for their experts, or sent to another rank, in float32 where bfloat16 is multiplied."""
    for kernel in recording.kernels:
        is_gather = kernel.name.endswith(("index_select", "index", "gather"))
        if not is_gather or kernel.place.part not in ("dispatch", "experts"):
            continue
        for dtype, shape in kernel.shapes:
            if dtype == torch.float32 and len(shape) == 2 and shape[1] == config.hidden_size:
                yield _finding("float32 rows", kernel.place, _gathered(kernel, shape))
    for exchange in recording.exchanges:
        if exchange.kind == "all_to_all" and exchange.dtype == torch.float32 and exchange.width == config.hidden_size:
            text = "rows are sent to other ranks in float32, which are multiplied in bfloat16; cast them before"
            yield _finding("float32 rows", exchange.place, text)


def _gathered(kernel: Kernel, shape: tuple[int, ...]) -> str:
    return f"{kernel.name} makes {list(shape)} in float32, which is multiplied in bfloat16; cast before it"


def _finding(kind: str, place: Place, text: str) -> Finding:
    return Finding(kind, place.part, place.during, place.where, text)  # type: ignore[arg-type]


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
