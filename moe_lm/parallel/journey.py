"""Rows on their way between the ranks of a group, while something else is computed, forward and backward.

A journey is announced (`depart`), under way (`start`), and over (`arrive`); its gradients travel in the other
direction. Autograd goes through a graph in the reverse of the order in which it was made. So what is computed between
`depart` and `arrive` has its gradients computed while those of the journey travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm.model.moe import Copies
from moe_lm.parallel.exchange import Exchange


class Journey:
    """One exchange of rows, of one tensor or of several with the same splits.

    Its methods are no part of a compiled graph; what is computed between them is.
    """

    def __init__(self, group: dist.ProcessGroup, exchange: Exchange) -> None:
        self.group, self.exchange = group, exchange
        self.cargo: Sequence[Tensor] = ()
        self.wanted: Sequence[bool] = ()  # the tensors of the cargo that get a gradient
        self.sent: list[int] = []  # rows to each rank, in the forward pass
        self.received: list[int] = []
        self.copies: Sequence[Copies] = ()
        self._mark: torch.cuda.Event | None = None
        self._under_way: list[tuple[dist.Work, Tensor, Tensor]] = []  # rows that leave must outlive their exchange

    @torch.compiler.disable
    def depart(self, *cargo: Tensor) -> Tensor:
        """Announce what will travel. The result stands for it in the graph until it arrives."""
        self._mark = self.exchange.mark()
        return _Depart.apply(self, *cargo)

    @torch.compiler.disable
    def start(self, sent: list[int], received: list[int], copies: Sequence[Copies] = ()) -> None:
        """Send `sent` rows of the cargo to the ranks and receive `received` from them.

        With `copies` it is the first ones of those that are sent, for each tensor its own. Neither making nor sending
        them waits for what was queued since they departed.
        """
        self.sent, self.received = sent, received
        with self.exchange.beside(self._mark):
            if copies:
                self.copies = [some.first(sum(sent)) for some in copies]
                self.cargo = [some.take(tensor) for some, tensor in zip(self.copies, self.cargo, strict=True)]
            self._send(self.cargo, sent, received)
        self.cargo = ()

    @torch.compiler.disable
    def arrive(self, departed: Tensor) -> tuple[Tensor, ...]:
        """Wait for the rows, sorted by the rank that they come from: a tensor for each that departed."""
        return _Arrive.apply(departed, self)

    def _send(self, tensors: Sequence[Tensor], sent: list[int], received: list[int]) -> None:
        for rows in tensors:
            rows = rows.contiguous()
            coming = rows.new_empty(sum(received), *rows.shape[1:])
            work = dist.all_to_all_single(coming, rows, received, sent, group=self.group, async_op=True)
            self._under_way.append((work, rows, coming))

    def _receive(self) -> list[Tensor]:
        for work, _, _ in self._under_way:
            work.wait()
        arrived = [coming for _, _, coming in self._under_way]
        self._under_way.clear()
        return arrived


class _Depart(torch.autograd.Function):
    """In the backward pass: wait for the gradients, and add up those of copies."""

    @staticmethod
    def forward(ctx: Any, journey: Journey, *cargo: Tensor) -> Tensor:
        ctx.journey = journey
        journey.cargo, journey.wanted = cargo, ctx.needs_input_grad[1:]
        return cargo[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        journey: Journey = ctx.journey
        with journey.exchange.waiting():
            arrived = iter(journey._receive())
        gradients = [next(arrived) if wanted else None for wanted in journey.wanted]
        if journey.copies:
            pairs = zip(journey.copies, gradients, strict=True)
            gradients = [None if gradient is None else copies.add_up(gradient) for copies, gradient in pairs]
        return None, *gradients


class _Arrive(torch.autograd.Function):
    """In the backward pass: send the gradients of what arrived."""

    @staticmethod
    def forward(ctx: Any, departed: Tensor, journey: Journey) -> tuple[Tensor, ...]:
        ctx.journey = journey
        with journey.exchange.waiting():  # the main stream's wait alone, not what was hidden behind its work
            # Sent beside the main stream, the rows are waited for there, so that their memory is not taken too early.
            with journey.exchange.beside():
                arrived = tuple(journey._receive())
            journey.exchange.join([*arrived, *(tensor for copies in journey.copies for tensor in copies)])
        ctx.mark_non_differentiable(*(rows for rows, wanted in zip(arrived, journey.wanted, strict=True) if not wanted))
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        journey: Journey = ctx.journey
        wanted = [gradient for gradient, wanted in zip(gradients, journey.wanted, strict=True) if wanted]
        journey._send(wanted, journey.received, journey.sent)
        return wanted[0].new_empty(0), None
