"""The settings of the optimisation: steps, rates, balance, and the objective of preference tuning."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from moe_lm.common.errors import UsageError
from moe_lm.config.section import Section

Share = Annotated[float, Field(ge=0, lt=1)]


def _recomputation(value: Any) -> Any:
    """Once the setting was true or false, written in any way; configs of older versions have it."""
    try:
        return "full" if TypeAdapter(bool).validate_python(value) else "none"
    except ValidationError:
        return value


def _number_of_tokens(value: Any) -> Any:
    """`10B`, `10b` and `300M` are numbers too, as people write them."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmbgt])\s*", value.lower()) if isinstance(value, str) else None
    return value if found is None else f"{found[1]}e{UNITS[found[2]]}"


UNITS = {"k": 3, "m": 6, "b": 9, "g": 9, "t": 12}  # powers of ten
NumberOfTokens = Annotated[float, BeforeValidator(_number_of_tokens, json_schema_input_type=float | str)]
EVALUATED = 2**24  # tokens of a source that an evaluation reads, unless the config says more
LENGTHS = ("steps", "tokens", "epochs")  # of which a config gives one
Recomputation = Annotated[Literal["none", "selective", "full"], BeforeValidator(_recomputation)]


class BalanceConfig(Section):
    """How the load of experts is kept even: router biases that a step moves, and losses that are added."""

    bias_update: Literal["sign", "quantile"] = Field(
        default="sign",
        description="sign: a step moves each bias at a fixed rate towards an even load; quantile: it sets each to what "
        "would have given the expert its share of the step's tokens (Kimi K3), best with many tokens an expert",
    )
    quantile_memory: Share = Field(
        default=0.0, description="quantile: share of the old bias that a step keeps; larger for small batches"
    )
    bias_update_rate: float = Field(
        default=1e-3,
        ge=0,
        description="sign: change of a router bias in a step (DeepSeek-V3's gamma); 0 leaves biases as they are, which "
        "is the default of fine-tuning",
    )
    sequence_loss: float = Field(default=1e-4, ge=0, description="weight of each sequence's balance loss (DeepSeek-V3)")
    batch_loss: float = Field(
        default=0.0, ge=0, description="weight of the balance loss of the global batch (Switch, GShard)"
    )
    z_loss: float = Field(default=0.0, ge=0, description="weight of the router z-loss (ST-MoE)")

    @property
    def moves_biases(self) -> bool:
        return self.bias_update == "quantile" or self.bias_update_rate > 0

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if self.bias_update != "quantile":
            self.refuse_any(["quantile_memory"], "needs bias_update=quantile; set it, or take quantile_memory away")
        else:
            why = "is of bias_update=sign alone, as quantile has no rate; take bias_update_rate away, or bias_update"
            self.refuse_any(["bias_update_rate"], why)
        return self


def with_still_biases(balance: dict[str, Any]) -> dict[str, Any]:
    """The settings of a balance in which router biases stay as they are, unless it says otherwise."""
    return balance if balance.get("bias_update") == "quantile" else {"bias_update_rate": 0.0, **balance}


class OptimizerConfig(Section):
    """AdamW or LAMB for all weights, or Muon for the hidden matrices and AdamW for the rest."""

    name: Literal["adamw", "muon", "lamb"] = Field(default="adamw", description="optimizer")
    lr: float = Field(
        default=3e-4, gt=0, description="peak learning rate of AdamW or LAMB; of what Muon leaves to AdamW"
    )
    betas: tuple[Share, Share] = Field(default=(0.9, 0.95), description="decay of the first and second moment")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay, on matrices only")
    muon_lr: float = Field(default=0.02, gt=0, description="peak learning rate of Muon, per unit of RMS update")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="momentum of Muon")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="also keep an exponential moving average of the weights with this decay, like 0.999, which "
        "`moe-lm merge RUN --ema` makes a run of; null: none",
    )


class ScheduleConfig(Section):
    """The learning rate over the run: a linear warm-up, then a shape over the remaining steps."""

    name: Literal["cosine", "wsd", "multistep", "constant"] = Field(default="cosine", description="shape")
    warmup_steps: int = Field(default=100, ge=0, description="steps of the warm-up")
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="wsd: share of steps in the final linear decay")
    milestones: tuple[Share, ...] = Field(
        default=(0.8, 0.9), description="multistep: shares of the steps where the rate falls"
    )
    factor: float = Field(default=0.316, gt=0, lt=1, description="multistep: factor on the rate at a milestone")
    min_ratio: float = Field(default=0.1, ge=0, le=1, description="cosine, wsd: final rate over peak rate")


class ScheduledSamplingConfig(Section):
    """Answer tokens replaced in the input by the model's own choice, from a forward pass without gradient."""

    share: float = Field(gt=0, le=1, description="share of the answer tokens in the input to replace")
    ramp_steps: int = Field(default=0, ge=0, description="steps over which the share grows linearly from 0")


class PreferenceConfig(Section):
    """Direct preference optimisation (arXiv 2305.18290); the reference is the model that training starts from."""

    beta: float = Field(default=0.1, gt=0, description="how strongly the policy is held to the reference")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="share of pairs assumed mislabelled (cDPO)")
    sft_weight: float = Field(default=0.0, ge=0, description="weight of the preferred answer's added loss per token")


class GuardConfig(Section):
    """What a run does about NaN, infinity, and a loss far outside its recent range, upwards."""

    max_skipped: int = Field(
        default=10,
        gt=0,
        description="steps skipped in a row after which the run goes back to its newest good checkpoint and leaves out "
        "the data that it has read since",
    )
    spike_threshold: float | None = Field(
        default=6.0,
        gt=0,
        description="robust standard deviations above the median of the last 100 losses from which a loss is a spike; "
        "null: no loss is",
    )
    on_spike: Literal["log", "skip"] = Field(
        default="log", description="log: take the step of a spike and say so; skip: do not take it"
    )
    max_spike_steps: int = Field(
        default=50, gt=0, description="steps in a row with a spike after which the run goes back, as with max_skipped"
    )
    max_rollbacks: int = Field(
        default=3, ge=0, description="times a run goes back, in all of its life; at the next it ends with an error"
    )


class TrainConfig(Section):
    """The optimisation: how many steps, of how many sequences, at which rates.

    One of `steps`, `tokens` and `epochs` says how long the run is. The config of a run folder has the steps.
    """

    steps: int = Field(default=0, ge=0, description="optimizer steps of the run; 0: as tokens or epochs say")
    tokens: NumberOfTokens | None = Field(
        default=None,
        gt=0,
        description="tokens of the run, also written `10e9` or `10B`, in place of steps; rounded up to whole steps",
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="how often the run reads its training data, all sources together, in place of steps; rounded up to "
        "whole steps",
    )
    hours: float | None = Field(
        default=None,
        gt=0,
        description="wall-clock time in which the process saves and ends, exit code 75 if steps are left; the same "
        "command goes on for as long again; null: no limit",
    )
    global_batch_size: int = Field(gt=0, description="sequences of a step, over all devices")
    micro_batch_size: int | None = Field(
        default=None, gt=0, description="sequences of a forward pass on one device; null: all of its share at once"
    )
    seed: int = Field(default=1234, ge=0, lt=2**63, description="seed of initial weights, shuffling and dropout")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    balance: BalanceConfig = BalanceConfig()
    scheduled_sampling: ScheduledSamplingConfig | None = Field(
        default=None, description="null: the model always reads the answers of the data"
    )
    clip_norm: float | None = Field(default=1.0, gt=0, description="greatest norm of the gradient; null: no clipping")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="number format of the forward pass; auto: bfloat16 where the device is fast at it (GPUs, and CPUs "
        "with AVX-512 BF16 or AMX), elsewhere float32",
    )
    residual_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="number format of the residual stream, from the embedding on; bfloat16 halves its bytes and "
        "rounds every sum, and is taken where products are bfloat16",
    )
    compile: bool = Field(default=False, description="run the model through torch.compile")
    activation_checkpointing: Recomputation = Field(
        default="none",
        description="activations to recompute in the backward pass instead of keeping them; selective: the cheap "
        "ones, such as norms and activation functions; full: all of a block but its input",
    )
    guards: GuardConfig = GuardConfig()
    freeze_router: bool | None = Field(default=None, description="do not train the router; null: only with lora")
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_batches: int | None = Field(
        default=None,
        gt=0,
        description=f"global batches of each source in an evaluation; null: all, up to {EVALUATED:,} tokens",
    )
    early_stopping: int | None = Field(
        default=None,
        gt=0,
        description="end the run after this many evaluations in a row without a new lowest held-out loss; null: never",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [f"{name}={getattr(self, name):g}" for name in LENGTHS if self.is_set(name)]
        if not given:
            raise ValueError(f"nothing says how long the run is; set one of {', '.join(LENGTHS)}")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say how long the run is; keep one of them")
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        if self.micro_batch_size is not None:
            self.require_divisor("micro_batch_size", self.micro_batch_size, "global_batch_size")
        return self

    @model_validator(mode="after")
    def _dtypes_fit(self) -> Self:
        if self.precision == "float32" and self.residual_dtype == "bfloat16":
            raise ValueError(
                "residual_dtype=bfloat16 rounds between products of precision=float32; set precision to bfloat16 or "
                "auto, or take residual_dtype away"
            )
        return self

    def batches_of_evaluation(self, row_length: int) -> int:
        """Global batches of a source that an evaluation reads at most."""
        return self.eval_batches or max(1, EVALUATED // (self.global_batch_size * row_length))

    def with_tokens_as_steps(self, row_length: int) -> TrainConfig:
        """The same with `tokens`, padding counted, as steps."""
        if self.tokens is None:
            return self
        steps = math.ceil(self.tokens / (self.global_batch_size * row_length))
        return self.model_copy(update={"steps": steps, "tokens": None})

    def with_epochs_as_steps(self, rows: Callable[[], int]) -> TrainConfig:
        """The same with `epochs` as steps; `rows` counts the rows of the training data, if that is asked for."""
        if self.epochs is None:
            return self
        steps = max(1, math.ceil(self.epochs * rows() / self.global_batch_size))
        return self.model_copy(update={"steps": steps, "epochs": None})

    def rows_at_once(self, row_groups: int) -> int:
        """Rows of a forward pass of each of the ranks, or groups of ranks, that have rows of their own.

        Raises UsageError when they do not divide its share of the batch.
        """
        share = max(1, self.global_batch_size // row_groups)
        rows = min(self.micro_batch_size or share, share)
        if share % rows:
            raise UsageError(
                f"train.micro_batch_size={rows} does not divide the {share} sequences of a rank, which are "
                f"train.global_batch_size={self.global_batch_size} over {row_groups} ranks or groups of ranks; "
                "choose a divisor",
                common=True,
            )
        return rows
