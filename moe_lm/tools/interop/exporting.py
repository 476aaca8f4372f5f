"""`moe-lm export`: a checkpoint becomes a Hugging Face folder, proven equal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import GENERATION
from moe_lm.checkpoint.read import TensorSource, open_tensors, read_model_config
from moe_lm.checkpoint.safetensors_file import Output, write_files
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import whole_folder
from moe_lm.config.model import ModelConfig
from moe_lm.kernels.device import DTYPES
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.carried import Carried, WithCarried, read_carried
from moe_lm.tools.interop.families import Family, family_of, known_families
from moe_lm.tools.interop.fitting import nearest_family, obstacles
from moe_lm.tools.interop.hf_config import write_config
from moe_lm.tools.interop.hf_folder import CONFIG, INDEX, HFFolder, read_json
from moe_lm.tools.interop.hf_tensors import TensorPair, tensor_pairs
from moe_lm.tools.interop.proof import Case, Proof, prove, write_proof
from moe_lm.tools.interop.transfer import FILE_BYTES, Meter, Tell, outputs_of_theirs


def export_run(
    run: Path,
    out: Path,
    family_name: str | None = None,
    dtype: str | None = None,
    base: Path | None = None,
    proof_bytes: int | None = None,
    shard_bytes: int = FILE_BYTES,
    tell: Tell | None = None,
) -> Proof:
    """Write `out` with the newest checkpoint of a run, or one checkpoint, and return the proof that it is that model.

    `family_name` None takes that of tensors that the checkpoint carries, else the first family that holds the model
    exactly; `dtype`, `proof_bytes` and `tell` are as in `import_folder`. Adapters are merged into their base, which is
    at `base` if it has moved. Raises UsageError when the family cannot hold the model, MoeLmError when the checkpoint
    is damaged or the proof fails; nothing is left at `out` then.
    """
    folder = checkpoint.resolve(run)
    tokenizer = Tokenizer.load(checkpoint.verified_path(folder, "tokenizer"))
    config = read_model_config(folder)
    carried = read_carried(folder, base)
    family = _family(family_name, config, carried)
    hf_config = write_config(config, family)
    ours = open_tensors(folder, base)
    pairs = tensor_pairs(config, family)
    notes = []
    if carried is not None and carried.family == family.model_type:
        ours, pairs = WithCarried(ours, carried.source), [*pairs, *carried.pairs]
        hf_config |= carried.keys
        notes.append(f"carried along: {carried}, as they were imported; they were not trained here")
    elif carried is not None:
        notes.append(f"left out: {carried}, which came with a {carried.family}; --format {carried.family} writes them")
    _check_holds(ours, pairs, family)
    outputs = outputs_of_theirs(ours, pairs, DTYPES[dtype] if dtype else None)
    meter = Meter(tell, sum(output.size for output in outputs))
    weights = {str(output.dtype).removeprefix("torch.") for output in outputs if "bias" not in output.name}
    hf_config |= _ids(tokenizer) | {"dtype": max(weights), "torch_dtype": max(weights), "use_cache": True}
    if config.capacity_factor is not None:
        notes.append(f"left out: capacity_factor={config.capacity_factor}; no expert drops tokens, as when sampling")
    with whole_folder(out) as unfinished:
        _write_tensors(unfinished, meter.watch(outputs), shard_bytes)
        _write_json(unfinished / CONFIG, hf_config)
        (unfinished / GENERATION).write_text(_generation_config(folder, tokenizer), encoding="utf-8")
        _write_tokenizer(unfinished, tokenizer)
        case = Case(
            what=f"export {folder.name}",
            config=config,
            family=family,
            pairs=pairs,
            ours=ours,
            theirs=HFFolder(unfinished),
            importing=False,
            tokenizer=tokenizer,
            tokenizer_of_theirs=unfinished,
        )
        proof = prove(case, notes, proof_bytes, meter)
        write_proof(proof, unfinished)
    return proof


def _family(name: str | None, config: ModelConfig, carried: Carried | None) -> Family:
    family = family_of(name or (carried and carried.family))
    if name is None:
        return family if family is not None and not obstacles(config, family) else nearest_family(config)
    if family is None:
        raise UsageError(f"--format {name} is unknown; choose one of {known_families()}")
    return family


def _check_holds(ours: TensorSource, pairs: Sequence[TensorPair], family: Family) -> None:
    unknown = sorted(set(ours.names()) - {pair.ours for pair in pairs})
    if unknown:
        raise MoeLmError(
            f"{ours.where(unknown[0])} holds the tensor {unknown[0]}, which its model.yaml does not explain"
        )
    for pair in pairs:
        if ours.shape(pair.ours) != pair.shape:
            raise MoeLmError(
                f"tensor {pair.ours} in {ours.where(pair.ours)} is {list(ours.shape(pair.ours))}, expected "
                f"{list(pair.shape)} by its model.yaml"
            )
        if not pair.parts and ours.rows(pair.ours, 0, pair.shape[0]).any():
            raise UsageError(
                f"the family {family.model_type} has no router bias, but {pair.ours} is not zero; choose another "
                "--format, or train with train.balance.bias_update_rate=0"
            )


def _write_tensors(folder: Path, outputs: Sequence[Output], shard_bytes: int) -> None:
    placed = write_files(folder, outputs, {"format": "pt"}, shard_bytes)
    if len(set(placed.values())) > 1:
        total = sum(output.size for output in outputs)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer as it came, but with the class for any tokenizer.json if its own class is code."""
    tokenizer.save(folder)
    config = read_json(folder / "tokenizer_config.json")
    if config.pop("auto_map", None) is not None:
        _write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _generation_config(folder: Path, tokenizer: Tokenizer) -> str:
    """The text of generation_config.json that came with an imported model; else the ids that end a text."""
    if (folder / GENERATION).is_file():
        return checkpoint.read_text(folder, GENERATION)
    return json.dumps(_ids(tokenizer), indent=2) + "\n"


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = list(dict.fromkeys([tokenizer.eos_id, tokenizer.end_id]))
    end = ends if len(ends) > 1 else ends[0]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": end, "pad_token_id": tokenizer.pad_id}


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
