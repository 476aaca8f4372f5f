"""Every setting of a run: one YAML file, six sections, unknown keys are errors.

`config_file.py` reads such a file. The resolved config is what a run folder and a checkpoint keep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moe_lm.common.errors import UsageError
from moe_lm.config.chat import ChatDataConfig
from moe_lm.config.lora import LoraConfig
from moe_lm.config.model import ModelConfig
from moe_lm.config.section import Section

Share = Annotated[float, Field(ge=0, lt=1)]


class SourceConfig(Section):
    """Documents: local files (`path`, globs allowed), a `datasets` data set (`dataset`), or a Python library."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    path: str | None = Field(default=None, description="file, folder or glob: .txt .md .py .jsonl .json .parquet")
    dataset: str | None = Field(default=None, description="anything `datasets.load_dataset` takes")
    subset: str | None = Field(default=None, description="the data set's configuration name")
    split: str = "train"
    text_field: str = "text"
    stdlib: bool = Field(default=False, description="the source of the running Python's standard library")
    weight: float = Field(default=1.0, gt=0, description="share of the training sequences, relative to the others")
    max_bytes: int | None = Field(default=None, gt=0, description="stop after this much text")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum([self.path is not None, self.dataset is not None, self.stdlib]) != 1:
            raise ValueError(f"source {self.name!r} needs exactly one of path, dataset, stdlib")
        if self.dataset is None and (self.subset is not None or self.split != "train"):
            raise ValueError(f"source {self.name!r}: subset and split belong to a dataset; remove them")
        return self


class TokenizerRecipe(Section):
    """What `tokenizer train` builds a byte-level BPE from."""

    output: Path = Field(description="folder for tokenizer.json, tokenizer_config.json and the chat template")
    vocab_size: int = Field(gt=262, description="ids in all: special tokens, 256 bytes, merges")
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    validation_fraction: float = Field(default=0, ge=0, lt=1, description="share of documents to leave out, by hash")
    max_token_bytes: int = Field(default=16, gt=1, description="longest token, in bytes")


class DataConfig(Section):
    """What `prepare` turns into token shards and what pretraining reads from them."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    tokenizer: Path
    shards: Path = Field(description="folder of token shards, one subfolder a source")
    validation_fraction: float = Field(default=0.01, ge=0, lt=1, description="share of documents held out, by hash")
    sequence_length: int = Field(default=512, gt=1)
    separate_documents: bool = Field(default=True, description="no attention across documents in a packed row")
    workers: int | None = Field(default=None, gt=0, description="processes for `prepare`; None: one a core")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ, got {names}")
        return self


class BalanceConfig(Section):
    """How expert load is kept even. The bias moves by a fixed rate; the losses are added to the training loss."""

    bias_update_rate: float = Field(
        default=1e-3, ge=0, description="DeepSeek-V3's gamma; 0, in fine-tuning the default, leaves biases as they are"
    )
    sequence_loss: float = Field(default=1e-4, ge=0, description="DeepSeek-V3's sequence-wise alpha")
    batch_loss: float = Field(default=0.0, ge=0, description="auxiliary loss over the global batch (Switch, GShard)")
    z_loss: float = Field(default=0.0, ge=0, description="ST-MoE's router z-loss")


class OptimizerConfig(Section):
    """AdamW or LAMB everywhere, or Muon for the hidden matrices and AdamW for the rest."""

    name: Literal["adamw", "muon", "lamb"] = "adamw"
    lr: float = Field(default=3e-4, gt=0, description="AdamW's or LAMB's peak learning rate")
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled, on matrices only")
    muon_lr: float = Field(default=0.02, gt=0, description="Muon's peak learning rate, per unit of RMS update")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)


class ScheduleConfig(Section):
    """Linear warm-up, then a shape over the remaining steps."""

    name: Literal["cosine", "wsd", "multistep", "constant"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="wsd: the last share of steps, linear decay")
    milestones: tuple[Share, ...] = Field(default=(0.8, 0.9), description="multistep: shares of all steps")
    factor: float = Field(default=0.316, gt=0, lt=1, description="multistep: the rate is multiplied at a milestone")
    min_ratio: float = Field(default=0.1, ge=0, le=1, description="final rate over peak rate (cosine, wsd)")


class ScheduledSamplingConfig(Section):
    """Tokens of the answers that the model reads as it would have written them, by a pass ahead without gradient."""

    share: float = Field(gt=0, le=1, description="of the target tokens that stand in the input of later ones")
    ramp_steps: int = Field(default=0, ge=0, description="steps over which the share grows from 0 in a line")


class TrainConfig(Section):
    """The optimisation: how many steps of how many sequences, with what rates."""

    steps: int = Field(gt=0)
    global_batch_size: int = Field(gt=0, description="sequences a step, over all devices")
    micro_batch_size: int | None = Field(default=None, gt=0, description="sequences a forward pass; None: no split")
    seed: int = Field(default=1234, ge=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    balance: BalanceConfig = BalanceConfig()
    scheduled_sampling: ScheduledSamplingConfig | None = None
    clip_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    freeze_router: bool | None = Field(default=None, description="None: no, but with lora yes")
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_batches: int | None = Field(default=None, gt=0, description="global batches an evaluation; None: all")

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        micro = self.micro_batch_size
        if micro is not None and self.global_batch_size % micro:
            raise ValueError(
                f"micro_batch_size={micro} does not divide global_batch_size={self.global_batch_size}; choose a divisor"
            )
        return self


class ParallelConfig(Section):
    """Where the run computes, and how it is spread over the processes that a launcher started.

    `engine: torch` is one device or plain data parallelism. `engine: deepspeed` adds expert parallelism and ZeRO.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    engine: Literal["torch", "deepspeed"] = "torch"
    expert_parallel_size: int = Field(default=1, gt=0, description="processes that share one copy of the experts")
    zero_stage: Literal[1, 2, 3] | None = Field(default=None, description="None: 1 with deepspeed")
    offload_optimizer: bool = Field(default=False, description="moments and master weights in host memory")
    deepspeed: dict[str, Any] = Field(default={}, description="further keys of DeepSpeed's own JSON")
    timeout_seconds: float = Field(default=600, gt=0, description="how long a rank waits for the others")

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        if self.engine == "deepspeed":
            return self
        for name, given in (
            ("expert_parallel_size", self.expert_parallel_size > 1),
            ("zero_stage", self.zero_stage is not None),
            ("offload_optimizer", self.offload_optimizer),
            ("deepspeed", bool(self.deepspeed)),
        ):
            if given:
                raise ValueError(f"{name}={getattr(self, name)} needs engine=deepspeed; set it, or take {name} away")
        return self


class CheckpointConfig(Section):
    """When to save, and what to keep."""

    every: int = Field(default=500, ge=0, description="steps between checkpoints; 0: only at the end and on a signal")
    keep: int = Field(default=2, gt=0, description="the newest checkpoints that stay")
    background: bool = Field(default=False, description="training goes on while one is written, for a copy in memory")
    allow_changes: bool = Field(default=False, description="go on from one of other settings, tokenizer or data")


class LogConfig(Section):
    """What is written while training."""

    every: int = Field(default=10, gt=0, description="steps between lines in train.log")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = "moe-lm"


class PretrainConfig(Section):
    """One pretraining run."""

    run_dir: Path
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def row_length(self) -> int:
        """Tokens of a row of a batch."""
        return self.data.sequence_length

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        check_positions(self.model, self.data.sequence_length)
        check_experts(self.model, self.parallel)
        check_optimizer(self.train.optimizer, self.parallel)
        check_router(self.model, self.train)
        return self


class PreferenceConfig(Section):
    """Direct preference optimisation (arXiv 2305.18290); the reference is the model that training starts from."""

    beta: float = Field(default=0.1, gt=0, description="how dearly the policy pays for leaving the reference")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="share of pairs labelled wrong (cDPO)")
    sft_weight: float = Field(default=0.0, ge=0, description="of the preferred answer's loss a token, added")


class FinetuneConfig(Section):
    """One fine-tuning run; the model's shape and the tokenizer come with `start_from`."""

    run_dir: Path
    start_from: Path = Field(description="a run folder or a checkpoint in it")
    lora: LoraConfig | None = Field(default=None, description="None: all weights are trained")
    preference: PreferenceConfig | None = Field(default=None, description="None: learn the answers; else prefer some")
    data: ChatDataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def row_length(self) -> int:
        """Tokens of a row of a batch; one of pairs has room for both answers."""
        return self.data.sequence_length * (1 if self.preference is None else 2)

    @model_validator(mode="before")
    @classmethod
    def _keep_router_biases(cls, values: Any) -> Any:
        """A model's balance was found in pretraining, and most families of public models have no bias to give back."""
        train = values.get("train") if isinstance(values, dict) else None
        if not isinstance(train, dict) or not isinstance(balance := train.get("balance", {}), dict):
            return values
        return {**values, "train": {**train, "balance": {"bias_update_rate": 0.0, **balance}}}

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        check_optimizer(self.train.optimizer, self.parallel)
        name = self.train.optimizer.name
        if self.lora is not None and name != "adamw":
            raise ValueError(
                f"train.optimizer.name={name} is made for whole matrices, and lora trains factors of which one begins "
                "at zero; use adamw, or take lora away"
            )
        if self.preference is not None:
            self._check_pairs()
        return self

    def _check_pairs(self) -> None:
        """Refuse what preference tuning does not read."""
        for name, given, instead in (
            ("data.separate_documents=false", not self.data.separate_documents, "take it away"),
            ("data.truncate=left", self.data.truncate != "skip", "set it to skip"),
            ("data.train.weight", any(source.weight is not None for source in self.data.train), "take it away"),
            ("train.scheduled_sampling", self.train.scheduled_sampling is not None, "take one of them away"),
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


def rows_at_once(train: TrainConfig, world_size: int) -> int:
    """Rows of a forward pass. Raises UsageError when they do not divide a rank's share of the global batch."""
    share = max(1, train.global_batch_size // world_size)
    rows = min(train.micro_batch_size or share, share)
    if share % rows:
        raise UsageError(
            f"train.micro_batch_size={rows} does not divide the {share} sequences of a rank, which are "
            f"train.global_batch_size={train.global_batch_size} over {world_size} processes; choose a divisor",
            common=True,
        )
    return rows


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


def check_optimizer(optimizer: OptimizerConfig, parallel: ParallelConfig) -> None:
    """Raise UsageError when the engine divides the matrices that the optimizer needs whole."""
    if parallel.engine == "deepspeed" and optimizer.name != "adamw":
        raise UsageError(
            f"train.optimizer.name={optimizer.name} needs whole matrices, which ZeRO divides; use adamw with "
            "parallel.engine=deepspeed, or parallel.engine=torch"
        )


def check_router(model: ModelConfig, train: TrainConfig) -> None:
    """Raise UsageError when a router is to be frozen that the model does not have."""
    if train.freeze_router and not model.moe_layers:
        raise UsageError("train.freeze_router=true, but the model has no routed experts; take it away")


def check_vocabulary(model: ModelConfig, tokenizer_size: int) -> None:
    """Raise UsageError when the tokenizer has ids that the model has no embedding for."""
    if model.vocab_size < tokenizer_size:
        raise UsageError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {tokenizer_size} ids; "
            f"set model.vocab_size to at least {tokenizer_size}"
        )
