"""The engine on DeepSpeed: expert and data parallelism with ZeRO 1, 2 or 3.

DeepSpeed recognises experts by a class and by attributes that are internal to it (`_mark_experts`), and keeps weights
and moments in flat partitions with a layout of its own (deepspeed_zero.py). All use of its internals is in these two
files; tests/engine/test_deepspeed_contract.py fails when a new DeepSpeed changes them.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_lm.common.process import cores
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch
from moe_lm.engine.deepspeed_config import deepspeed_json
from moe_lm.engine.deepspeed_zero import ByPartition, Zero, born_divided, several_dtypes
from moe_lm.engine.engine import Engine, Update
from moe_lm.engine.frozen import left_to_base, narrow_frozen
from moe_lm.kernels.rounding import narrow_trained
from moe_lm.model.moe import MoE, logical, logical_names
from moe_lm.model.transformer import LanguageModel, is_expert
from moe_lm.objective.training_loss import LossParts, StepCounts, TrainingLoss
from moe_lm.optim.groups import build_optimizer, parameter_groups, set_learning_rate, step_on_threads
from moe_lm.optim.matrices import Share
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.logical import Piece, assign, pieces_of_run
from moe_lm.parallel.process_group import leave as leave_group
from moe_lm.parallel.topology import Topology

LIKE = ("rule", "weight_decay", "matrices")  # what the parameters of a group have in common


class DeepSpeedEngine(Engine):
    """Float32 master weights, gradients and moments, divided as ZeRO's stage says.

    Where the device is fast at bfloat16, matrices that are multiplied are bfloat16, and after a step ZeRO rounds and
    gathers them. What has another use is float32: router, norms, biases, embedding.
    """

    def __init__(
        self,
        loss: TrainingLoss,
        train: TrainConfig,
        parallel: ParallelConfig,
        topology: Topology,
        device: torch.device,
        mesh: DeviceMesh,
        exchange: Exchange | None = None,
        before_step: Callable[[int], None] | None = None,
        fill: Callable[[str, Tensor, int], None] | None = None,
    ) -> None:
        """With ZeRO 3 the model is on the meta device; `fill` fills rows of its parameters (build.py)."""
        super().__init__(loss, train, topology, device, exchange, before_step)
        stage = parallel.zero_stage or 1
        self.mesh = mesh
        self.first_expert = self.model.moe_layers[0].experts.indices.start if self.model.moe_layers else 0
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        settings = deepspeed_json(train, parallel, topology.world_size, cuda=device.type == "cuda")
        deepspeed = _import_deepspeed(topology)
        masters = narrow_trained(self.model, self.dtype)
        _mark_experts(self.model, mesh.size(1), stage)
        optimizer = ByPartition(_split(parameter_groups(self.trained(), train.optimizer)), {})
        if parallel.offload_optimizer:
            step_on_threads(optimizer, max(torch.get_num_threads(), cores() // topology.ranks_on_this_host))
        if stage == 3:
            assert fill is not None
            masters = born_divided(self.model, settings, fill)
        with several_dtypes():
            self.wrapped, *_ = deepspeed.initialize(model=loss, optimizer=optimizer, config=settings)
        self.zero = Zero(self.wrapped.optimizer, stage)
        for flat, group, share in self.zero.partitions():
            optimizer.add(flat, self._build_optimizer({**group, "params": [flat]}, share))
        self.zero.link()
        self.optimizers = list(optimizer.own.values())
        self.zero.set_masters({parameter: masters[name] for name, parameter in self.trained() if name in masters})
        if stage < 3:  # stage 3 would gather and divide them once more
            narrow_frozen(self.model, self.dtype)

    def _build_optimizer(self, group: dict[str, Any], share: Share) -> torch.optim.Optimizer:
        return build_optimizer(group["rule"], [group], self.config.optimizer, self.dtype, lambda _: share, self.device)

    def _forward_backward(self, batch: Batch, counts: StepCounts, last: bool) -> LossParts:
        self.wrapped.set_gradient_accumulation_boundary(last)
        part = self._forward(batch, counts)
        # DeepSpeed averages over the ranks, for experts too, but the parts already add up to the global loss.
        self.wrapped.backward(part.loss * self.topology.world_size, scale_wrt_gas=False)
        if not last:
            self.wrapped.step()  # counts the micro-batch
        return part

    def _clip_and_update(self, factor: float, accepted: bool) -> Update:
        set_learning_rate(self.optimizers, factor)
        self.zero.skip = not accepted
        self.wrapped.step()
        grad_norm = float(self.wrapped.get_global_grad_norm())
        return Update(grad_norm, skipped=not self.wrapped.was_step_applied() or not math.isfinite(grad_norm))

    def gradients(self) -> dict[str, Tensor | Piece]:
        from deepspeed.utils import safe_get_full_grad

        gradients: dict[str, Tensor | Piece] = {}
        for name, parameter in self.trained():
            gradients |= self._kept_alike(name, safe_get_full_grad(parameter))
        return gradients

    def state(self) -> dict[str, Tensor | Piece]:
        state: dict[str, Tensor | Piece] = {}
        for name, parameter in self._kept_frozen():
            run = self.zero.run_of_frozen(parameter)
            found = self._kept_alike(name, parameter.detach()) if run is None else self._pieces(name, *run)
            state |= {f"model.{part}": tensor for part, tensor in found.items()}
        names = {parameter: name for name, parameter in self.trained()}
        for parameter, flat, part in self.zero.runs():
            name = names[parameter]
            start, offset, length = (0, 0, 0) if part is None else (part.start, part.offset, part.length)
            for key, tensor in {"model": flat, **self.zero.optimizer.optimizer.state[flat]}.items():
                if tensor.ndim == 0:  # a count of steps, the same for all of a partition
                    found = dict.fromkeys(logical_names(name), tensor)
                else:
                    found = self._pieces(name, tensor.detach().narrow(0, offset, length), start)
                state |= {f"{key}.{part}": tensor for part, tensor in found.items()}
        if self.model.config.tie_word_embeddings and "model.model.embed_tokens.weight" in state:
            state["model.lm_head.weight"] = state["model.model.embed_tokens.weight"]
        state |= {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        return state | self._common_state()

    def load_state(self, state: Mapping[str, Tensor | Piece]) -> None:
        assign({name: tensor for name, tensor in self.state().items() if name not in self._common_state()}, state)
        self.zero.weights_changed()
        self._load_common_state(state)

    def _kept_frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Frozen parameters that a checkpoint holds nevertheless."""
        elsewhere = left_to_base(self.model)
        named = self.model.named_parameters()
        return ((name, p) for name, p in named if not p.requires_grad and elsewhere.isdisjoint(logical_names(name)))

    def _pieces(self, name: str, run: Tensor, start: int) -> dict[str, Tensor | Piece]:
        """A run of a parameter's elements, from `start` on, as pieces of its logical tensors."""
        experts = self.model.config.n_routed_experts
        return dict(pieces_of_run(name, run, start, self.shapes[name], self.first_expert, experts))

    def _kept_alike(self, name: str, tensor: Tensor) -> dict[str, Tensor | Piece]:
        """A parameter, or a tensor like it, under its logical names. Other ranks keep the same: of experts, some."""
        if not is_expert(name):
            return dict(logical(name, tensor.view(self.shapes[name])))
        copy, copies = self.mesh.get_local_rank(0), self.mesh.size(0)
        pieces = pieces_of_run(
            name, tensor.reshape(-1), 0, self.shapes[name], self.first_expert, self.model.config.n_routed_experts
        )
        return {part: piece._replace(copy=copy, copies=copies) for part, piece in pieces.items()}

    def close(self, leave: bool = True) -> None:
        self.wrapped.destroy()
        if leave:
            leave_group()


def _import_deepspeed(topology: Topology) -> Any:
    """Import DeepSpeed without its log messages and without its shared-memory op.

    On a CPU it compiles that op at the first start, which takes 40 s, and hangs forever on the lock of a build that was
    killed. gloo does the same work.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it finds nothing else
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.comm

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))  # DeepSpeed needs one; a single process has none
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _mark_experts(model: LanguageModel, expert_parallel_size: int, stage: int) -> None:
    """Set what DeepSpeed recognises experts by: the class of the layer, and the group names of its parameters."""
    from deepspeed.utils import groups

    trained = any(p.requires_grad for layer in model.moe_layers for p in layer.experts.parameters())
    layer_class, group_name = _layer_class(trained or stage == 3), f"ep_size_{expert_parallel_size}"
    for layer in model.moe_layers:
        layer.__class__ = layer_class
        vars(layer).update(num_experts=model.config.n_routed_experts, expert_parallel_size=expert_parallel_size)
        for parameter in layer.experts.parameters():
            for attribute, value in {
                "allreduce": False,
                "group_name": group_name,
                "ds_zero_placement_family": "autoep_expert",
                "ds_zero_partition_group_name": group_name,
            }.items():
                setattr(parameter, attribute, value)
            if stage == 3:  # DeepSpeed would only find the ranks that share them when it has divided all else
                groups._create_expert_and_data_parallel(expert_parallel_size)
                shared_by = groups._get_expert_data_parallel_group(group_name)
                parameter.ds_zero_partition_process_group = shared_by  # type: ignore[attr-defined]


def _layer_class(known: bool) -> type[MoE]:
    """The MoE layer; if its experts are to be `known`, under the base class by which every stage recognises them.

    Stages 1 and 2 insist on an optimizer group for known experts, so frozen ones must not be known there and only need
    their process groups. In stage 3 they must be known, or it divides them over ranks that have other experts.
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups

    class GroupedMoE(MoE):
        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False, **_: object) -> None:
            groups._create_expert_and_data_parallel(
                self.expert_parallel_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )

    class DeepSpeedMoE(GroupedMoE, AutoEPMoELayer):
        pass

    return DeepSpeedMoE if known else GroupedMoE


def _split(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of parameters of one data type that are reduced over the same ranks; DeepSpeed needs a name for each.

    It takes the first group's data type for that of all gradients, so float32 comes first: it has at least the norms.
    """
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    named = []
    for group in groups:
        for dtype in {parameter.dtype: None for parameter in group["params"]}:
            params = [parameter for parameter in group["params"] if parameter.dtype == dtype]
            named.append({**group, "params": params, "name": f"{[group[key] for key in LIKE]}, {dtype}"})
    split: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(named)
    return sorted(
        (group for group in split if group["params"]), key=lambda group: group["params"][0].dtype != torch.float32
    )
