"""`moe-lm import`: a folder of Hugging Face's becomes a run folder with a checkpoint of step 0, proven equal."""

from __future__ import annotations

from pathlib import Path

from moe_lm.checkpoint import checkpoint, write
from moe_lm.checkpoint.read import open_tensors
from moe_lm.checkpoint.safetensors_file import write_files
from moe_lm.common.errors import UsageError
from moe_lm.common.files import whole_folder
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import dump_config
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.hf_config import read_config
from moe_lm.tools.interop.hf_folder import CONFIG, GENERATION, HFFolder
from moe_lm.tools.interop.hf_tensors import check_complete, tensor_pairs
from moe_lm.tools.interop.proof import Case, Proof, prove
from moe_lm.tools.interop.transfer import DTYPES, Meter, Tell, no_one, outputs_of_ours

FILE_BYTES = 4 << 30  # tensors go into files of about this size


def import_folder(
    source: Path,
    run_dir: Path,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    proof_bytes: int | None = None,
    tell: Tell | None = None,
) -> Proof:
    """Write `run_dir` with a checkpoint of the model in `source`, and return the proof that it is that model.

    `dtype` float32 or bfloat16 is what weights are kept in, None what they are in now. `tokenizer` is the folder of the
    tokenizer where it is another one. `proof_bytes` is the memory that comparing logits may take, None half of what is
    free; memory otherwise is that of one expert or PIECE_BYTES, whichever is more, a few times. `tell` hears of the
    bytes done and in all.
    Raises UsageError when the model is none that can be expressed here, MoeLmError when its files are damaged or the
    proof fails; nothing is left at `run_dir` then.
    """
    folder = HFFolder(source)
    family, config, unused = read_config(folder.config, str(source / CONFIG))
    words = Tokenizer.load(tokenizer or source)
    _check_ids(words, config, tokenizer or source)
    pairs = tensor_pairs(config, family)
    notes = check_complete(folder, pairs, config, str(source))
    new = [pair.ours for pair in pairs if not pair.parts]
    if new:
        notes.append(
            f"added: a router bias of zeros in {len(new)} layers; {family.model_type} has none, so leave "
            "train.balance.bias_update_rate at 0 for what shall be exported again"
        )
    if unused:
        notes.append(f"not used: {', '.join(unused)} in {CONFIG}")
    rounded_to = DTYPES[dtype] if dtype else None
    outputs = outputs_of_ours(folder, pairs, rounded_to)
    meter = Meter(tell or no_one, sum(output.size for output in outputs))

    def write_tensors(path: Path) -> None:
        path.mkdir()
        write_files(path, meter.watch(outputs), {"format": "pt"}, FILE_BYTES)

    files: dict[str, write.Content] = {
        "model.yaml": dump_config(config),
        "tokenizer": words.save,
        checkpoint.MODEL: write_tensors,
    }
    generation = folder.generation_config()
    if generation is not None:
        files[GENERATION] = generation
    with whole_folder(run_dir) as unfinished:
        saved = write.save(unfinished / "checkpoints", 0, {}, files)
        case = Case(
            what=f"import {source.name}",
            config=config,
            family=family,
            pairs=pairs,
            ours=open_tensors(saved),
            theirs=folder,
            importing=True,
            rounded_to=rounded_to,
            tokenizer=words,
            tokenizer_of_theirs=tokenizer or source,
        )
        proof = prove(case, notes, proof_bytes, meter)
        proof.write(unfinished)
    return proof


def _check_ids(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, but the model embeddings for "
            f"{config.vocab_size} alone; give the tokenizer that it was trained with (--tokenizer)"
        )
