"""Writes down what a step runs, on fake tensors: every operator with its place, its reads and writes, and lifetimes.

The operators are those below autograd, as a device would be given them. Nothing is computed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_lm.parallel.simulated import ranks_of, unboxed
from moe_lm.tools.plan import operators
from moe_lm.tools.plan.places import Place, Places
from moe_lm.tools.plan.trace import CollectiveKind, Product


@dataclass
class Kernel:
    """An operator that moves data. `reads` and `writes` are bytes by the number of a storage."""

    name: str
    place: Place
    reads: dict[int, int]
    writes: dict[int, int]
    shapes: tuple[tuple[torch.dtype, tuple[int, ...]], ...]  # of the tensors that it makes
    product: Product | None
    launches: int
    pointwise: bool
    reduction: str | None  # `rows`: along the last dimension; `columns`: along others
    bytes: int = 0  # moved, if it is not a product; fusion changes it


@dataclass
class Exchange:
    """A collective between kernel `start` and, once it is waited for, kernel `wait`."""

    kind: CollectiveKind
    bytes: int
    ranks: tuple[int, ...]
    place: Place
    start: int
    dtype: torch.dtype
    width: int  # of a row
    wait: int | None = None


@dataclass
class Life:
    """A storage from the kernel that makes it to the one before which it is freed, None if it stays."""

    bytes: int
    place: Place
    born: int
    died: int | None = None
    is_gradient: bool = False


@dataclass(frozen=True)
class HostRead:
    """A value that the host reads from the device, or a shape that depends on one."""

    operator: str
    place: Place
    expected: bool


@dataclass
class Recording:
    kernels: list[Kernel] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)  # by the number of a storage
    reads: list[HostRead] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Records the operators that run within it.

    `counts` answers the host's read of an exchange's counts: a value by its index, or None for any other read, which a
    device would have to be waited for without need. Where a shape depends on data, as in `repeat_interleave` without
    its size, `rows` stands in for it.
    """

    def __init__(self, places: Places, rows: int, counts: Callable[[Place, int], int | None]) -> None:
        super().__init__()
        self.recording = Recording()
        self._places = places
        self._rows = rows
        self._counts = counts
        self._numbers: dict[int, int] = {}  # of storages that live, by their address
        self._waiting: dict[int, Exchange] = {}
        self._works: list[Any] = []  # so that no address is used twice
        self._scalars: tuple[object, int] = None, 0  # where the last one was read, and how many before it

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Count the storages of these tensors as always there."""
        for tensor in tensors:
            self._number(tensor, Place("head", None, "forward", ""), resident=True)

    def gradient(self, tensor: Tensor) -> None:
        """Count a tensor as the gradient of a parameter, which outlives its pass."""
        self.recording.lives[self._number(tensor, self._places.now())].is_gradient = True

    def waited(self, work: object) -> None:
        """Note that an exchange is waited for."""
        exchange = self._waiting.pop(id(work), None)
        if exchange is not None:
            exchange.wait = len(self.recording.kernels)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        name = func._schema.name
        place = self._places.now()
        if name in operators.DATA_DEPENDENT and not (name.endswith("repeat_interleave") and kwargs.get("output_size")):
            return self._host_read(func, name, place, args, kwargs)
        result = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        kind = operators.collective_kind(name)
        if kind is not None:
            self._exchange(kind, place, args, inputs, result)
        elif not self._is_view(func, inputs, outputs):
            self._kernel(func, name, place, args, inputs, outputs)
        for output in outputs:
            self._number(output, place)
        return result

    def _host_read(self, func: Any, name: str, place: Place, args: Any, kwargs: Any) -> Any:
        if name == "aten::_local_scalar_dense":
            return self._scalar(args[0], place)
        self.recording.reads.append(HostRead(name.replace("::", "."), place, expected=False))
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._stand_in(func, name, args, kwargs)

    def _scalar(self, tensor: Tensor, place: Place) -> Any:
        """A value that the host reads; the values of one `tolist` come in one copy."""
        key = (place, len(self.recording.kernels))
        index = self._scalars[1] + 1 if self._scalars[0] == key else 0
        self._scalars = key, index
        value = self._counts(place, index)
        if index == 0:
            self.recording.reads.append(HostRead("aten._local_scalar_dense", place, value is not None))
        if value is not None:
            return value
        return False if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1

    def _stand_in(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A result of a likely size, so that the rest of the step is recorded too."""
        if name == "aten::repeat_interleave":
            return func(*args, **{**kwargs, "output_size": self._rows})
        if name in ("aten::equal", "aten::is_nonzero"):
            return False
        tensor = args[0]
        if name == "aten::nonzero":
            return tensor.new_empty((self._rows, tensor.ndim), dtype=torch.int64)
        return tensor.new_empty((self._rows,))

    def _exchange(self, kind: CollectiveKind, place: Place, args: Any, inputs: list[Tensor], result: Any) -> None:
        # An operator of compiled graphs takes the name of a group, and its result is waited for where it is made.
        group = next((leaf for leaf in tree_leaves(args) if _is_group(leaf)), args[-1])
        largest = max((operators.held_bytes(tensor) for tensor in inputs), default=0)
        start, dtype, width = len(self.recording.kernels), inputs[0].dtype, inputs[0].shape[-1] if inputs[0].ndim else 1
        exchange = Exchange(kind, largest, ranks_of(group), place, start, dtype, width)
        self.recording.exchanges.append(exchange)
        if isinstance(group, str):
            exchange.wait = start
        for work in tree_leaves(result):
            if not isinstance(work, Tensor):
                works = unboxed(work)
                self._works.append(works)
                self._waiting[id(works)] = exchange

    def _kernel(
        self, func: Any, name: str, place: Place, args: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        if name in operators.ALLOCATES:
            return
        product = operators.product(name, args, outputs)
        reads, writes = Counter[int](), Counter[int]()
        written = sum(map(operators.held_bytes, outputs))
        for tensor in inputs:
            size = operators.held_bytes(tensor)
            reads[self._number(tensor, place)] += min(size, written) if name in operators.GATHERS else size
        for tensor in outputs:
            writes[self._number(tensor, place)] += operators.held_bytes(tensor)
        for number in reads.keys() & writes.keys():
            if name in ("aten::copy_", "aten::fill_", "aten::zero_"):
                del reads[number]  # overwritten, not read
        pointwise = torch.Tag.pointwise in func.tags or name in operators.POINTWISE
        self.recording.kernels.append(
            Kernel(
                name=name,
                place=place,
                reads=dict(reads),
                writes=dict(writes),
                shapes=tuple((tensor.dtype, tuple(tensor.shape)) for tensor in outputs),
                product=product,
                launches=operators.LAUNCHES.get(name, 1),
                pointwise=pointwise,
                reduction=_reduction(func, name, inputs, outputs),
                bytes=0 if product else sum(reads.values()) + sum(writes.values()),
            )
        )

    def _is_view(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        if not outputs or func._schema.is_mutable:
            return not outputs
        held = {tensor.untyped_storage()._cdata for tensor in inputs}
        return all(tensor.untyped_storage()._cdata in held for tensor in outputs)

    def _number(self, tensor: Tensor, place: Place, resident: bool = False) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            number = len(self.recording.lives)
            size = 0 if resident else storage.nbytes()
            self._numbers[key] = number
            self.recording.lives.append(Life(size, place, len(self.recording.kernels)))
            weakref.finalize(storage, self._freed, key, number).atexit = False
        return self._numbers[key]

    def _freed(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self.recording.lives[number].died = len(self.recording.kernels)


def _reduction(func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> str | None:
    if name in operators.ROW_REDUCTIONS:
        return "rows"
    if torch.Tag.reduction not in func.tags or not inputs or not outputs:
        return None
    before, after = inputs[0], outputs[0]
    kept = tuple(after.shape[: before.ndim - 1])
    return "rows" if before.ndim and kept == tuple(before.shape[:-1]) else "columns"


def _is_group(leaf: object) -> bool:
    return isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type())
