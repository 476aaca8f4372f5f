"""What `torch.compile` makes of the operators within a compiled graph: a model of inductor's fusion, from outside.

Pointwise operators and reductions between two products (or sorts, or exchanges) become one kernel where one reads what
the other writes, or both read the same. Such a kernel reads its inputs once and writes what others read; what is made
and read within it moves nothing. A reduction along rows stays in the kernel of its rows; one along columns, such as the
gradient of a norm's weight, ends it. Of what the backward pass reads, a kernel's results are computed again from its
inputs where those are fewer bytes, as the partitioner of AOTAutograd does, unless a product reads them.

eval/LOG.md holds it against inductor's own counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from moe_lm.tools.plan.recording import Kernel, Recording


def fuse(recording: Recording) -> None:
    """Change the kernels of every compiled graph to those that inductor would make: their bytes and launches.

    Lifetimes change too: a storage that is never written has none.
    """
    regions: dict[int, list[int]] = defaultdict(list)
    for index, kernel in enumerate(recording.kernels):
        if kernel.place.region is not None:
            regions[kernel.place.region].append(index)
    groups = [group for indices in regions.values() for group in _groups(recording.kernels, indices)]
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    readers: dict[int, set[int]] = defaultdict(set)  # of a storage, by kernel
    for index, kernel in enumerate(recording.kernels):
        for storage in kernel.reads:
            readers[storage].add(index)
    kept = [_kept(recording, group, number, group_of, readers) for number, group in enumerate(groups)]
    instead: dict[int, dict[int, int]] = {}  # read in place of a storage: others, with their bytes
    for group, written in zip(groups, kept, strict=True):
        instead |= _recomputed(recording, group, written, readers)
    for group, written in zip(groups, kept, strict=True):
        _merge(recording, group, written, instead)


def _groups(kernels: Sequence[Kernel], indices: Sequence[int]) -> list[list[int]]:
    """The kernels of a graph that become one, by index."""
    level_of: dict[int, int] = {}  # of a storage: the products, sorts and column reductions before it
    parent = {index: index for index in indices if _is_fusible(kernels[index])}
    seen: dict[tuple[int, int], int] = {}  # the last kernel of a level that touched a storage

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for index in indices:
        kernel = kernels[index]
        level = max((level_of.get(storage, 0) for storage in kernel.reads), default=0)
        ends = not _is_fusible(kernel) or kernel.reduction == "columns"
        for storage in kernel.writes:
            level_of[storage] = level + 1 if ends else level
        if not _is_fusible(kernel):
            continue
        for storage in (*kernel.reads, *kernel.writes):
            if (level, storage) in seen:
                parent[root(index)] = root(seen[level, storage])
            seen[level, storage] = index
    groups: dict[int, list[int]] = defaultdict(list)
    for index in parent:
        groups[root(index)].append(index)
    return list(groups.values())


def _is_fusible(kernel: Kernel) -> bool:
    return kernel.product is None and (kernel.pointwise or kernel.reduction is not None)


def _kept(
    recording: Recording, group: Sequence[int], number: int, group_of: dict[int, int], readers: dict[int, set[int]]
) -> dict[int, int]:
    """What a fused kernel writes: what is read outside of it, or outlives the step's kernels."""
    written: dict[int, int] = {}
    for index in group:
        for storage, size in recording.kernels[index].writes.items():
            outside = any(group_of.get(reader) != number for reader in readers[storage])
            life = recording.lives[storage]
            if outside or life.is_gradient or life.died is None or life.born < min(group):
                written[storage] = size
    return written


def _recomputed(
    recording: Recording, group: Sequence[int], written: dict[int, int], readers: dict[int, set[int]]
) -> dict[int, dict[int, int]]:
    """The storages that only the backward pass reads, in fusible kernels, with the inputs to compute them from.

    Empty if the inputs are no fewer bytes.
    """
    kernels = recording.kernels
    if kernels[group[0]].place.during == "backward":
        return {}
    saved = {
        storage
        for storage in written
        if readers[storage]
        and all(
            reader in group
            or (
                (_is_fusible(kernels[reader]) and kernels[reader].place.region is not None)
                and kernels[reader].place.during == "backward"
            )
            for reader in readers[storage]
        )
    }
    inputs = _inputs(kernels, group)
    new = sum(size for storage, size in inputs.items() if not _is_saved(recording, storage, group))
    if not saved or new > sum(written[storage] for storage in saved):
        return {}
    last = max(recording.lives[storage].died or 0 for storage in saved)
    for storage in inputs:
        life = recording.lives[storage]
        life.died = life.died and max(life.died, last)
    return dict.fromkeys(saved, inputs)


def _is_saved(recording: Recording, storage: int, group: Sequence[int]) -> bool:
    """Whether a storage is there in the backward pass anyway."""
    died = recording.lives[storage].died
    return died is None or (died > max(group) and recording.kernels[died - 1].place.during == "backward")


def _inputs(kernels: Sequence[Kernel], group: Sequence[int]) -> dict[int, int]:
    made = {storage for index in group for storage in kernels[index].writes}
    inputs: dict[int, int] = {}
    for index in group:
        for storage, size in kernels[index].reads.items():
            if storage not in made:
                inputs[storage] = max(size, inputs.get(storage, 0))
    return inputs


def _merge(
    recording: Recording, group: Sequence[int], written: dict[int, int], instead: dict[int, dict[int, int]]
) -> None:
    """Give the group's bytes and launch to its last kernel, and none to the others."""
    kernels = recording.kernels
    reads: dict[int, int] = {}
    for storage, size in _inputs(kernels, group).items():
        for other, bytes_ in instead.get(storage, {storage: size}).items():
            reads[other] = max(bytes_, reads.get(other, 0))
    writes = {storage: size for storage, size in written.items() if storage not in instead}
    for index in group:
        for storage in kernels[index].writes:
            if storage not in writes:
                recording.lives[storage].bytes = 0
        kernels[index].bytes = kernels[index].launches = 0
    if writes:
        kernels[group[-1]].bytes = sum(reads.values()) + sum(writes.values())
        kernels[group[-1]].launches = 1
