"""The flat partitions in which DeepSpeed's ZeRO keeps weights and moments, each stepped by its own optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lm.common.errors import MoeLmError
from moe_lm.optim.matrices import Part, Share
from moe_lm.parallel.process_group import Ranks


class ByPartition(torch.optim.Optimizer):
    """What DeepSpeed divides and then steps group by group: each flat partition has an optimizer of its own."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self.own: dict[Tensor, torch.optim.Optimizer] = {}

    def add(self, flat: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.own[flat] = optimizer
        self.state[flat] = optimizer.state[flat]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                self.own[flat].step()


class Zero:
    """DeepSpeed's ZeRO optimizer.

    With `skip` it drops the gradients instead of taking a step, as it does by itself when their norm is not finite.
    """

    def __init__(self, optimizer: Any, stage: int) -> None:
        self.optimizer, self.stage, self.skip = optimizer, stage, False
        # Every stage calls this between the norm and the update, and looks at `overflow` once more afterwards.
        optimizer._update_scale = self._note_skip
        if stage == 3:
            self.flat = optimizer.fp32_partitioned_groups_flat
            self._process_groups, self._parts = optimizer.sub_group_process_groups, self._divided_one_by_one
        else:
            self.flat = optimizer.single_partition_of_fp32_groups
            self._process_groups, self._parts = optimizer.real_dp_process_group, self._divided_together
        if stage == 3:
            self.parameters = optimizer.fp16_groups
            self.partition_of = {p.ds_id: index for index, group in enumerate(self.parameters) for p in group}
        else:
            self.parameters = optimizer.bit16_groups
            self.partition_of = {id(p): index for index, group in enumerate(self.parameters) for p in group}
        if stage == 2 and optimizer.cpu_offload:
            # DeepSpeed makes these when they are first needed, in the data type of the weights: it would round the sum.
            for number in optimizer.grad_position:
                size, pinned = optimizer.param_dict[number].numel(), optimizer.cpu_offload_pin_memory
                optimizer.accumulated_grads_in_cpu[number] = torch.zeros(size, dtype=torch.float32, pin_memory=pinned)

    def _note_skip(self, overflow: bool = False) -> None:
        self.optimizer.overflow = overflow or self.skip

    def partitions(self) -> Iterator[tuple[Tensor, dict[str, Any], Share]]:
        """The flat partitions of this rank, each with its group, and what the ranks have of the group's parameters."""
        for index, flat in enumerate(self.flat):
            number = self.optimizer.sub_group_to_group_id[index] if self.stage == 3 else index
            ranks = Ranks(self._process_groups[index])
            share = Share([list(self._parts(index, rank)) for rank in range(ranks.size)], ranks)
            yield flat, self.optimizer.optimizer.param_groups[number], share

    def runs(self) -> Iterator[tuple[nn.Parameter, Tensor, Part | None]]:
        """The parameters, each with the flat partition of its group, and this rank's run of its elements there."""
        for index, flat in enumerate(self.flat):
            rank = Ranks(self._process_groups[index]).rank
            parts = {part.parameter: part for part in self._parts(index, rank)}
            for number, parameter in enumerate(self.parameters[index]):
                yield parameter, flat, parts.get(number)

    def _divided_together(self, index: int, rank: int) -> Iterator[Part]:
        """Stages 1 and 2 cut the parameters of a group, one after another, into equal pieces."""
        size = int(self.optimizer.partition_size[index])
        begin, offsets = rank * size, self.optimizer.round_robin_bit16_offsets[index]
        for number, (parameter, offset) in enumerate(zip(self.parameters[index], offsets, strict=True)):
            first, last = max(offset, begin), min(offset + parameter.numel(), begin + size)
            if first < last:
                yield Part(number, tuple(parameter.shape), first - offset, last - first, 0, first - begin)

    def _divided_one_by_one(self, index: int, rank: int) -> Iterator[Part]:
        """Stage 3 cuts every parameter into equal pieces, and a partition has one of each."""
        offset = 0
        for number, parameter in enumerate(self.parameters[index]):
            size = parameter.partition_numel()
            length = min(size, parameter.ds_numel - rank * size)
            if length > 0:
                yield Part(number, tuple(parameter.ds_shape), rank * size, length, 0, offset)
            offset += size

    def link(self) -> None:
        """Let DeepSpeed find the states of the partitions' optimizers."""
        if self.stage < 3:
            # DeepSpeed does this after the first group's first step, and so only for that group.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def run_of_frozen(self, parameter: nn.Parameter) -> tuple[Tensor, int] | None:
        """This rank's run of a frozen parameter's elements, and its start, where it is divided: in stage 3."""
        if self.stage < 3:
            return None
        kept: Any = parameter
        size = kept.ds_tensor.ds_numel
        start = min(kept.ds_zero_partition_rank * size, kept.ds_numel)
        return kept.ds_tensor.detach().narrow(0, 0, min(size, kept.ds_numel - start)), start

    def set_masters(self, exact: Mapping[nn.Parameter, Tensor]) -> None:
        """Set float32 weights, which DeepSpeed took from rounded ones: whole, or with stage 3 this rank's shares."""
        for parameter, flat, part in self.runs():
            if part is not None and parameter in exact:
                first = 0 if self.stage == 3 else part.start
                run = exact[parameter].view(-1)[first : first + part.length]
                flat.data[part.offset : part.offset + part.length] = run

    def weights_changed(self) -> None:
        """Give the model the float32 weights that were set in the partitions."""
        if self.stage == 3:
            # A forward pass before this, such as that of a reference, leaves some whole weights here: the old ones.
            self.optimizer.parameter_offload.partition_all_parameters()
            for index in range(len(self.flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        else:
            self.optimizer.update_lp_params()


@torch.no_grad()
def born_divided(
    model: nn.Module, settings: dict[str, Any], fill: Callable[[str, Tensor, int], None]
) -> dict[str, Tensor]:
    """Make the parameters of a model on the meta device, of each only this rank's share, as stage 3 keeps it.

    A whole one exists for a moment, but only the rows of which this rank has a part are filled. Returns the float32
    shares of the weights that are kept in another data type, by name.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    names = {parameter: name for name, parameter in model.named_parameters()}
    exact: dict[str, Tensor] = {}

    class Born(Init):
        def _convert_to_zero_parameters(self, parameters: Iterator[Any]) -> None:
            for parameter in parameters:
                _materialise(parameter, self.local_device)
                self._convert_to_deepspeed_param(parameter)
                share = -(-parameter.numel() // parameter.ds_zero_partition_world_size)
                start = min(parameter.ds_zero_partition_rank * share, parameter.numel())
                stop = min(start + share, parameter.numel())
                row = parameter[0].numel()
                first, last = start // row, -(-stop // row)
                rows = parameter.data[first:last].float()  # itself, if it is float32
                if start < stop:
                    fill(names[parameter], rows, first)
                if parameter.dtype != torch.float32:
                    parameter.data[first:last] = rows
                    exact[names[parameter]] = rows.view(-1)[start - first * row : stop - first * row].clone()
                parameter.partition()
                parameter.ds_tensor[stop - start :] = 0

    def convert() -> None:
        Born(module=model, config_dict_or_path=settings, dtype=torch.float32)

    Ranks().each(convert, (MoeLmError,))
    return exact


def _materialise(parameter: nn.Parameter, device: torch.device) -> None:
    """Give a parameter of the meta device memory; it stays the same object, with all its attributes."""
    real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
    real.__dict__.update(parameter.__dict__)
    real.grad_dtype = parameter.grad_dtype
    torch.utils.swap_tensors(parameter, real)


class _FlatBuffers:
    """Tensors of one data type after another, each in a flat buffer of its own, as if there were a single buffer."""

    def __init__(self, flatten: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]) -> None:
        runs = [list(run) for _, run in itertools.groupby(tensors, lambda tensor: tensor.dtype)]
        self.buffers = [flatten(run) for run in runs]

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        for buffer in self.buffers:
            if start < buffer.numel() or buffer is self.buffers[-1]:
                return buffer.narrow(dim, start, length)
            start -= buffer.numel()
        raise AssertionError


@contextmanager
def several_dtypes() -> Iterator[None]:
    """While DeepSpeed is set up: let stage 3 flatten weights of several data types, which it takes for one."""
    from deepspeed.runtime.zero import stage3

    flatten = stage3.defragment
    stage3.defragment = partial(_FlatBuffers, flatten)
    try:
        yield
    finally:
        stage3.defragment = flatten
