"""The start of continued pretraining: the model, the tokenizer and the moments that a run takes over from another.

A config with `start_from` may leave out what the start has. `completed` puts it in before the config is checked, so
that everywhere else a config is whole; `find` refuses one that does not fit its start.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from moe_lm.checkpoint import checkpoint, read
from moe_lm.checkpoint.checkpoint import OPTIMIZER, TOKENIZER
from moe_lm.checkpoint.lineage import Start, find_first_start, is_at
from moe_lm.checkpoint.read import read_model_config
from moe_lm.common import hub
from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig, with_rope_parameters
from moe_lm.config.run import PretrainConfig
from moe_lm.config.training import BalanceConfig, OptimizerConfig, with_still_biases
from moe_lm.engine.engine import LOAD, Engine
from moe_lm.optim.average import EMA, STEPS
from moe_lm.tokenizer.tokenizer import Tokenizer

ROTARY = ("rope_theta", "rope_scaling")
Values = dict[str, Any]


def completed(values: Values) -> Values:
    """The values of a pretraining config with those that it leaves to its start.

    The model, in which it may name positions alone; the tokenizer; and no moving router biases where the start has none
    because its softmax router never had any. Raises UsageError for a model that is not the start's.
    """
    run_dir, start_from, model = (values.get(name) for name in ("run_dir", "start_from", "model"))
    if not isinstance(run_dir, str) or not isinstance(start_from, str) or not isinstance(model, dict | None):
        return values  # the check of the config says what is wrong
    if Path(start_from).resolve() == Path(run_dir).resolve():
        raise UsageError(
            f"start_from={start_from} is run_dir itself, where a run goes on without it; choose another run_dir"
        )
    start = find_first_start(Path(run_dir), Path(start_from))
    shape = shape_of(start)
    try:
        given = with_rope_parameters(model or {})
    except ValueError as error:
        raise UsageError(f"model: {error}") from error
    check_shape(given, shape, start_from)
    if "max_position_embeddings" not in given:
        check_lengths(values.get("data"), shape)
    values = {**values, "model": shape.model_dump(mode="json") | _with_trained_length(given, shape)}
    if isinstance(data := values.get("data"), dict) and _is_left_out(data.get("tokenizer")):
        home = start.origin if is_at(start.origin, start.fingerprint) else start.folder  # which does not stay as long
        values["data"] = {**data, "tokenizer": str(checkpoint.verified_path(home, TOKENIZER))}
    train = values.get("train")
    balance = train.get("balance", {}) if isinstance(train, dict) else None
    if isinstance(train, dict) and isinstance(balance, dict) and _has_no_biases(start, shape):
        values["train"] = {**train, "balance": with_still_biases(balance)}
    return values


def find(config: PretrainConfig) -> Start | None:
    """The start of the run, which fits its config; None for fresh weights.

    A run that goes on keeps its first start. Raises UsageError for another shape or tokenizer than the start's, and for
    moments that the start does not have.
    """
    if config.start_from is None:
        return None
    start = find_first_start(config.run_dir, config.start_from)
    shape = shape_of(start)
    check_shape(config.model.model_dump(), shape, config.start_from)
    _check_tokenizer(config, start)
    if config.start_with_optimizer and start.is_new:
        _check_moments(config, start)
    return start._replace(positions=shape.model_dump(mode="json", include={*positions_of(shape)}))


def shape_of(start: Start) -> ModelConfig:
    """The model as training began with it, before the run changed its positions."""
    return read_model_config(start.folder, **(start.positions or {}))


def positions_of(shape: ModelConfig) -> tuple[str, ...]:
    """The settings of positions, which no weight depends on."""
    rotary = ROTARY if shape.position_embedding == "rope" else ()
    return rotary if shape.position_embedding == "learned" else (*rotary, "max_position_embeddings")


def check_shape(given: Mapping[str, Any], shape: ModelConfig, start_from: object) -> None:
    """Raise UsageError for a setting of `given` that is not the start's, except for positions."""
    may_differ = positions_of(shape)
    for name, value in given.items():
        field = ModelConfig.model_fields.get(name)
        if field is None or name in may_differ:
            continue
        try:
            value = TypeAdapter[Any](field.annotation or Any).validate_python(value)
        except ValidationError:
            continue  # the check of the config says what is wrong
        if value != getattr(shape, name):
            raise UsageError(
                f"model.{name}={value} is not that of start_from={start_from}, {getattr(shape, name)}; take it away: "
                f"the model is the start's, and only {', '.join(may_differ) or 'nothing'} may differ"
            )


def check_lengths(data: object, shape: ModelConfig) -> None:
    """Raise UsageError for rows that are longer than the start's model knows, with what stretches its positions."""
    if not isinstance(data, dict):
        return  # the check of the config says what is wrong
    rows = [("data.sequence_length={}", data.get("sequence_length"))]
    phases = data.get("phases")
    for number, phase in enumerate(phases if isinstance(phases, list | tuple) else (), 1):
        if isinstance(phase, dict):
            rows.append((f"sequence_length={{}} of phase {number} of data.phases", phase.get("sequence_length")))
    most = shape.max_position_embeddings
    known = [(said, length) for said, length in rows if isinstance(length, int)]
    said, length = max(known, key=lambda row: row[1], default=("", 0))
    if length <= most:
        return
    advice = f"choose at most {most}"
    if shape.position_embedding == "rope":
        factor = length / trained_length(shape)
        advice += (
            f', or stretch the positions: model.max_position_embeddings={length} "model.rope_parameters='
            f'{{rope_type: yarn, factor: {factor:.4g}}}" (docs/continuing.md)'
        )
    raise UsageError(f"{said.format(length)} is longer than the {most} positions of the start's model; {advice}")


def notes_on(start: Start | None, config: PretrainConfig) -> list[str]:
    """What the log says of a start, after a warning if `moe-lm export` would refuse the trained model."""
    notes = notes_on_biases(config.train.balance, config.model)
    if start is not None:
        moments = ", with the moments of its optimizer" if config.start_with_optimizer else ""
        notes += notes_on_rates(config.train.optimizer)
        notes.append(f"starts from {start.origin} (fingerprint {start.fingerprint}){moments}")
    return notes


def notes_on_rates(optimizer: OptimizerConfig) -> list[str]:
    """A remark on Muon's default rate, which is one for fresh weights."""
    if optimizer.name != "muon" or optimizer.is_set("muon_lr"):
        return []
    return [
        f"train.optimizer.muon_lr={optimizer.muon_lr:g} is a rate for fresh weights, and the one of hidden matrices, "
        f"not lr={optimizer.lr:g}; a tenth to a third of what the start was trained at is usual"
    ]


def notes_on_biases(balance: BalanceConfig, model: ModelConfig) -> list[str]:
    """A warning of router biases that no family of Hugging Face has a place for."""
    if not balance.moves_biases or not model.moe_layers or model.scoring_func != "softmax":
        return []
    if balance.bias_update == "quantile":
        setting, instead = "bias_update=quantile", "take it away and set train.balance.bias_update_rate to 0"
    else:
        setting, instead = f"bias_update_rate={balance.bias_update_rate}", "set it to 0"
    return [
        f"train.balance.{setting} moves router biases, which no Hugging Face family with a softmax router has; "
        f"{instead} if the model is to be exported"
    ]


def load_moments(engine: Engine, start: Start) -> None:
    """Give the optimizer the moments and step counts of the start. Every rank calls this."""
    state = engine.state()
    own = ("model.", "random.", f"{EMA}.", f"{STEPS}.", LOAD)  # an average is of this run's weights
    moments = {name: t for name, t in state.items() if not name.startswith(own)}
    read.load(start.folder, moments)
    engine.load_state(state)


def _is_left_out(tokenizer: object) -> bool:
    """Whether the tokenizer is that of the start: none is given, or it was in a checkpoint that is deleted by now."""
    if not isinstance(tokenizer, str):
        return tokenizer is None
    folder = Path(tokenizer)
    return checkpoint.STEP_NAME.fullmatch(folder.parent.name) is not None and not folder.is_dir()


def _with_trained_length(given: Values, shape: ModelConfig) -> Values:
    """With the length that the start was trained for, where `rope_scaling` leaves it out."""
    scaling = given.get("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get("rope_type") not in ("yarn", "llama3"):
        return given
    return given | {"rope_scaling": {"original_max_position_embeddings": trained_length(shape), **scaling}}


def trained_length(shape: ModelConfig) -> int:
    """The positions of a model before they were stretched."""
    scaling = shape.rope_scaling
    stretched_from = None if scaling is None else scaling.original_max_position_embeddings
    return stretched_from or shape.max_position_embeddings


def _has_no_biases(start: Start, shape: ModelConfig) -> bool:
    """Whether the router is a softmax whose biases no training has moved, as public models have it."""
    if shape.scoring_func != "softmax" or not shape.moe_layers:
        return False
    balance = _settings(start).get("train", {}).get("balance", {})
    return not balance.get("bias_update_rate", 0) and balance.get("bias_update") != "quantile"


def _check_tokenizer(config: PretrainConfig, start: Start) -> None:
    path = config.data.tokenizer
    if path.parent in (start.folder, start.origin):
        return
    if not (path.is_dir() or hub.is_name(path)):
        if start.is_new and not path.exists():
            raise UsageError(
                f"data.tokenizer={path}: there is no such folder; leave it out: the tokenizer is that of "
                f"start_from={config.start_from}"
            )
        return  # a run that goes on has a copy
    given = Tokenizer.load(path)
    own = Tokenizer.load(checkpoint.verified_path(start.folder, TOKENIZER))
    if given.fingerprint != own.fingerprint:
        raise UsageError(
            f"data.tokenizer={path} (fingerprint {given.fingerprint[:12]}, {given.vocab_size} ids) is "
            f"another tokenizer than that of start_from={config.start_from} ({own.fingerprint[:12]}, {own.vocab_size} "
            "ids), whose model knows no other; leave data.tokenizer out"
        )


def _check_moments(config: PretrainConfig, start: Start) -> None:
    settings = _settings(start)
    train, name = settings.get("train", {}), config.train.optimizer.name
    had = train.get("optimizer", {}).get("name", "adamw")
    why = None
    if not train or not any(entry.startswith(f"{OPTIMIZER}/") for entry in checkpoint.entries(start.folder)):
        why = "has none, as it was not trained here"
    elif settings.get("lora") is not None:
        why = "has those of adapters alone"
    elif train.get("freeze_router") and not config.train.freeze_router:
        why = "has none of its router, which was frozen"
    elif had != name:
        why = f"has those of {had}, and train.optimizer.name={name}"
    if why is not None:
        raise UsageError(
            f"start_with_optimizer=true takes the optimizer's moments along, and start_from={config.start_from} {why}; "
            "take start_with_optimizer away"
        )


def _settings(start: Start) -> Values:
    """The config of the start's training; empty for a model that was imported, upcycled or merged."""
    if "config.yaml" not in checkpoint.entries(start.folder):
        return {}
    return checkpoint.read_section(start.folder, "config.yaml")
