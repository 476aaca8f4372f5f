"""Every setting of a run, and what must hold between its sections.

`reading.py` reads such a config from a YAML file. The resolved config is what a run folder and a checkpoint keep.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moe_lm.common.errors import UsageError
from moe_lm.common.storage import is_remote
from moe_lm.config.data import ChatDataConfig, DataConfig, Phase
from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.section import Section
from moe_lm.config.training import PreferenceConfig, TrainConfig, with_still_biases

AttentionKernel = Literal[
    "auto", "plain", "segments", "cpp", "torch_varlen", "flash_attn_2", "flash_attn_3", "flash_attn_4"
]


class ParallelConfig(Section):
    """Where the run computes, and how it is spread over the processes that a launcher started.

    `engine: torch` is one device or plain data parallelism. `engine: deepspeed` adds expert parallelism and ZeRO.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="auto: the fastest there is")
    engine: Literal["torch", "deepspeed"] = Field(default="torch", description="engine that runs the steps")
    attention_kernel: AttentionKernel = Field(
        default="auto", description="what computes attention; auto: the fastest that serves here (`moe-lm doctor`)"
    )
    expert_parallel_size: int = Field(default=1, gt=0, description="processes that share one copy of the experts")
    sequence_parallel_size: int = Field(
        default=1,
        gt=0,
        description="processes that share the rows of the batch, each with as many positions of a row; attention is "
        "divided by heads, and its rows travel there and back",
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        default=None,
        description="what ZeRO divides over the processes; 1: optimizer state, 2: and gradients, 3: and weights; 2 and "
        "3 communicate in every micro-batch, 1 once a step; null: 1 with deepspeed",
    )
    offload_optimizer: bool = Field(default=False, description="keep moments and master weights in host memory")
    timeout_seconds: float = Field(default=600, gt=0, description="seconds that a rank waits for the others")

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        if self.engine != "deepspeed":
            for name in ("expert_parallel_size", "zero_stage", "offload_optimizer"):
                self.refuse_any([name], f"needs engine=deepspeed; set it, or take {name} away")
        return self

    @property
    def least_processes(self) -> int:
        """The smallest number of processes that can be divided so."""
        return math.lcm(self.expert_parallel_size, self.sequence_parallel_size)

    def row_groups(self, world_size: int) -> int:
        """Groups of processes with rows of their own; without sequence parallelism each process is one."""
        return max(1, world_size // self.sequence_parallel_size)


OnDamage = Literal["previous", "stop"]


class CheckpointConfig(Section):
    """When to save, and what to keep."""

    every: int = Field(default=500, ge=0, description="steps between checkpoints; 0: only at the end and on a signal")
    keep: int = Field(default=2, gt=0, description="newest checkpoints to keep")
    best: bool = Field(
        default=False,
        description="also save at an evaluation whose held-out loss is the lowest so far, and keep that checkpoint",
    )
    archive_every: int = Field(default=0, ge=0, description="steps between checkpoints that are kept for good; 0: none")
    export: Literal["hf"] | None = Field(
        default=None,
        description="hf: write the model at the end of the run as a Hugging Face folder too, RUN/export/step-N",
    )
    background: bool = Field(
        default=True,
        description="train on while saving, at the price of a copy of what a rank writes in the memory of its host",
    )
    upload_to: str | None = Field(
        default=None,
        description="URL, like s3://bucket/run, to which each checkpoint is also copied, and from which a run whose "
        "folder is lost goes on",
    )
    upload_timeout: float = Field(
        default=1800, ge=0, description="seconds that the end of a run waits for its last checkpoint to be uploaded"
    )
    on_damage: OnDamage = Field(
        default="previous",
        description="when the newest checkpoint is damaged: previous moves it aside and goes on from the newest sound "
        "one; stop ends with an error",
    )
    allow_changes: bool = Field(
        default=False,
        description="resume from a checkpoint that has other settings, another tokenizer or other data; for one start "
        "only, so it belongs on the command line",
    )

    @model_validator(mode="after")
    def _is_a_url(self) -> Self:
        if self.upload_to is not None and not is_remote(self.upload_to):
            raise ValueError(
                f"upload_to={self.upload_to} is no URL; expected one like s3://bucket/run, or file:///mnt/run"
            )
        return self


TrackerName = Literal["tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "aim", "clearml", "swanlab", "dvclive"]


class LogConfig(Section):
    """The reports of training: how often, and to which programs."""

    every: int = Field(default=10, gt=0, description="steps between lines of train.log")
    alarms: bool = Field(
        default=True, description="say when the figures show a known disease, such as dead experts, and its cure"
    )
    trackers: tuple[TrackerName, ...] = Field(default=(), description="programs that figures are also sent to")
    project: str = Field(default="moe-lm", description="project's name in the trackers")
    sample_prompts: tuple[str, ...] = Field(
        default=(),
        description="texts that the model goes on with at each evaluation (`train.eval_every`); in fine-tuning they "
        "are a user's messages",
    )
    sample_tokens: int = Field(default=64, gt=0, description="tokens of each sample; one costs a forward pass")
    eval_tasks: tuple[str, ...] = Field(
        default=(), description="tasks, as of `moe-lm eval --tasks`, that are run at each evaluation"
    )
    eval_tasks_limit: int | None = Field(
        default=200, gt=0, description="examples of each of `eval_tasks`, its first ones; null: all"
    )
    task_data: Path | None = Field(default=None, description="folder with the files of the tasks in eval/tasks")


class PretrainConfig(Section):
    """One pretraining run: from fresh weights, or on from those of another model (`start_from`).

    With a start, `model` may be left out or name only what differs, which may be positions: `rope_theta`,
    `rope_scaling` and `max_position_embeddings`. The config of the run folder has the whole model.
    """

    run_dir: Path = Field(description="folder of the run: config, logs, checkpoints")
    start_from: Path | None = Field(
        default=None,
        description="run folder, or a checkpoint in one, whose model is trained on from step 0; null: fresh weights",
    )
    start_with_optimizer: bool = Field(default=False, description="take the moments of the start's optimizer along")
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    # Only fine-tuning has these.
    lora: ClassVar[None] = None
    preference: ClassVar[None] = None

    @property
    def row_length(self) -> int:
        """Tokens of a row of a batch."""
        return self.data.sequence_length

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the run, of which there is at least one. Raises UsageError for one without a step."""
        return self.data.phases_over(self.train.steps, self.train.global_batch_size)

    def mix(self, phase: Phase) -> dict[str, float]:
        """The share of each source in a phase."""
        names = [source.name for source in self.data.sources]
        return {name: weight / sum(phase.weights) for name, weight in zip(names, phase.weights, strict=True)}

    @property
    def in_longest_phase(self) -> PretrainConfig:
        """The config as if all of the run had its longest rows, evaluated ones too, for which memory must do."""
        data, train = self.data, self.train
        most = max(data.lengths)
        fewer = {
            name: rows * data.sequence_length // most
            for name in ("global_batch_size", "micro_batch_size")
            if (rows := getattr(train, name)) is not None
        }
        longest = data.model_copy(update={"sequence_length": most, "phases": ()})
        return self.model_copy(update={"data": longest, "train": train.model_copy(update=fewer)})

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.start_from is None:
            self.refuse_any(["start_with_optimizer"], "needs start_from; set it, or take start_with_optimizer away")
        check_positions(self.model, self.data.sequence_length)
        check_phases(self)
        check_experts(self.model, self.parallel)
        check_engine(self.train, self.parallel)
        check_router(self.model, self.train)
        check_heads(self.model, self.parallel)
        check_parts_of_rows(self.train, self.parallel, self.data.lengths)
        return self

    @model_validator(mode="after")
    def _tokens_are_steps(self) -> Self:
        train = self.train.with_tokens_as_steps(self.row_length)
        return self if train is self.train else self.model_copy(update={"train": train})


class FinetuneConfig(Section):
    """One fine-tuning run; the model's shape and the tokenizer come with `start_from`."""

    run_dir: Path = Field(description="folder of the run: config, logs, checkpoints")
    start_from: Path = Field(description="run folder, or a checkpoint in one, that training starts from")
    lora: LoraConfig | None = Field(default=None, description="null: train all weights")
    preference: PreferenceConfig | None = Field(
        default=None, description="null: learn the answers; a section: prefer one answer of each pair (DPO)"
    )
    data: ChatDataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    # Only pretraining has it.
    start_with_optimizer: ClassVar[bool] = False

    @property
    def row_length(self) -> int:
        """Tokens of a row of a batch; a row of pairs has room for both answers."""
        return self.data.sequence_length * (1 if self.preference is None else 2)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The only phase of the run."""
        return (Phase(0, self.train.global_batch_size, self.data.sequence_length, ()),)

    @property
    def in_longest_phase(self) -> FinetuneConfig:
        """The config itself, whose rows are equally long."""
        return self

    @model_validator(mode="before")
    @classmethod
    def _keep_router_biases(cls, values: Any) -> Any:
        """The balance was found in pretraining, and most families of public models have no bias to give back."""
        train = values.get("train") if isinstance(values, dict) else None
        if not isinstance(train, dict) or not isinstance(balance := train.get("balance", {}), dict):
            return values
        return {**values, "train": {**train, "balance": with_still_biases(balance)}}

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        check_engine(self.train, self.parallel)
        check_parts_of_rows(self.train, self.parallel, [self.data.sequence_length])
        name = self.train.optimizer.name
        if self.lora is not None and name != "adamw":
            raise ValueError(
                f"train.optimizer.name={name} is made for whole matrices, and lora trains two factors of which one "
                "begins at zero; use adamw, or take lora away"
            )
        if self.preference is not None:
            self._check_pairs()
        return self

    @model_validator(mode="after")
    def _tokens_are_steps(self) -> Self:
        train = self.train.with_tokens_as_steps(self.row_length)
        return self if train is self.train else self.model_copy(update={"train": train})

    def _check_pairs(self) -> None:
        """Refuse what preference tuning does not read."""
        for name, given, instead in (
            ("data.separate_documents=false", not self.data.separate_documents, "take it away"),
            ("data.truncate=left", self.data.truncate != "skip", "set it to skip"),
            ("data.train.weight", any(source.weight is not None for source in self.data.train), "take it away"),
            ("train.scheduled_sampling", self.train.scheduled_sampling is not None, "take one of them away"),
            ("parallel.sequence_parallel_size", self.parallel.sequence_parallel_size > 1, "take it away"),
        ):
            if given:
                raise UsageError(f"{name} does not go with preference, whose pairs are compared whole; {instead}")


RunConfig = PretrainConfig | FinetuneConfig


def check_positions(model: ModelConfig, sequence_length: int) -> None:
    """Raise UsageError when rows are longer than the positions that the model knows."""
    if sequence_length > model.max_position_embeddings:
        raise UsageError(
            f"data.sequence_length={sequence_length} is longer than model.max_position_embeddings="
            f"{model.max_position_embeddings}; shorten the one or raise the other"
        )


def check_phases(config: PretrainConfig) -> None:
    """Raise UsageError for a phase whose rows do not fit the model, a step or a micro-batch, or that has no step."""
    data, train = config.data, config.train
    for number, phase in enumerate(data.phases, 1):
        length = phase.sequence_length or data.sequence_length
        said = f"sequence_length={length} of phase {number} of data.phases"
        if length > config.model.max_position_embeddings:
            raise UsageError(
                f"{said} is longer than model.max_position_embeddings={config.model.max_position_embeddings}; shorten "
                "the one or raise the other"
            )
        for name, rows in (("step", train.global_batch_size), ("micro-batch", train.micro_batch_size)):
            if rows is not None and rows * data.sequence_length % length:
                raise UsageError(
                    f"{said} does not divide the {rows * data.sequence_length} tokens of a {name}, which are "
                    f"{rows} rows of data.sequence_length={data.sequence_length}; choose a divisor"
                )
    if train.steps and data.phases:
        _ = config.phases


def check_experts(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise UsageError when the experts cannot be divided over the expert-parallel ranks."""
    size, experts = parallel.expert_parallel_size, model.n_routed_experts
    if size > 1 and experts == 0:
        raise UsageError(
            f"parallel.expert_parallel_size={size}, but the model has no routed experts; set it to 1, or set "
            "model.n_routed_experts"
        )
    if experts % size:
        raise UsageError(
            f"parallel.expert_parallel_size={size} does not divide model.n_routed_experts={experts}; choose a divisor"
        )


def check_heads(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise UsageError when the ranks that share rows cannot divide the model's attention, or its rows."""
    size, heads = parallel.sequence_parallel_size, model.num_attention_heads
    if heads % size:
        raise UsageError(
            f"parallel.sequence_parallel_size={size} does not divide model.num_attention_heads={heads}; choose a "
            "divisor"
        )
    if size > 1 and model.capacity_factor is not None:
        raise UsageError(
            f"parallel.sequence_parallel_size={size} does not go with model.capacity_factor, for which a row's tokens "
            "are counted in order; take one of them away"
        )


def check_parts_of_rows(train: TrainConfig, parallel: ParallelConfig, lengths: Collection[int]) -> None:
    """Raise UsageError when the ranks that share rows cannot divide those of one of these `lengths`."""
    size = parallel.sequence_parallel_size
    for length in lengths:
        if length % size:
            raise UsageError(
                f"parallel.sequence_parallel_size={size} does not divide data.sequence_length={length}; choose a "
                "divisor, or another length"
            )
    if size > 1 and train.scheduled_sampling is not None:
        raise UsageError(
            f"parallel.sequence_parallel_size={size} does not go with train.scheduled_sampling, where a rank would "
            "read the prediction of another one; take one of them away"
        )


def check_engine(train: TrainConfig, parallel: ParallelConfig) -> None:
    """Raise UsageError for a compiled model that does not go with how the engine divides weights."""
    if train.compile and parallel.zero_stage == 3:
        raise UsageError(
            "train.compile=true does not go with parallel.zero_stage=3, which fetches weights between the operations "
            "of a block; set one of them otherwise"
        )


def check_router(model: ModelConfig, train: TrainConfig) -> None:
    """Raise UsageError when a router is to be frozen, or balanced, that is not there or has no choice."""
    if train.balance.bias_update == "quantile" and model.num_experts_per_tok >= model.n_routed_experts:
        raise UsageError(
            f"train.balance.bias_update=quantile, but model.num_experts_per_tok={model.num_experts_per_tok} leaves "
            f"model.n_routed_experts={model.n_routed_experts} without a choice; take bias_update away"
        )
    if train.freeze_router and not model.moe_layers:
        raise UsageError("train.freeze_router=true, but the model has no routed experts; take it away")
