"""Work that ranks share: each does its part, and all of them learn what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from moe_lm.common.errors import MoeLmError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Ranks that act together: all that train, or the one process that there is.

    `group` is theirs alone when another thread than the training's speaks through it.
    """

    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def each(self, action: Callable[[], T], expected: tuple[type[Exception], ...]) -> list[T]:
        """Run `action` on every rank, wait for all, and return what it gave on each.

        When it raised one of the `expected` kinds anywhere, every rank raises that of the first such rank.
        """
        mine: T | None = None
        error: Exception | None = None
        try:
            mine = action()
        except expected as raised:
            error = raised
        outcomes = [(mine, error)]
        if dist.is_initialized():
            outcomes = [(None, None)] * self.size
            dist.all_gather_object(outcomes, (mine, error), group=self.group)
        for _, error in outcomes:
            if error is not None:
                if isinstance(error, MoeLmError):
                    error.common = True
                raise error
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def first(self, action: Callable[[], T], expected: tuple[type[Exception], ...]) -> T:
        """Run `action` on rank 0 alone; every rank waits for it, and returns or raises what it did there."""
        return self.each(lambda: action() if self.rank == 0 else None, expected)[0]  # type: ignore[return-value]


def ranks_of_their_own() -> Ranks:
    """All ranks, with a group for a thread beside the training; every rank calls this at the same point."""
    return Ranks(dist.new_group(backend="gloo") if dist.is_initialized() else None)


def part(ranks: Ranks) -> None:
    """Give up a group of their own."""
    if ranks.group is not None:
        dist.destroy_process_group(ranks.group)
