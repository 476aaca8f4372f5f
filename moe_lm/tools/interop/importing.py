"""`moe-lm import`: a Hugging Face folder becomes a run folder with a checkpoint of step 0, proven equal."""

from __future__ import annotations

from pathlib import Path

from moe_lm.common import hub
from moe_lm.common.files import check_regular, whole_folder
from moe_lm.kernels.device import DTYPES
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.carried import description, find_carried
from moe_lm.tools.interop.fp8 import FP8Folder, open_folder
from moe_lm.tools.interop.hf_config import read_config
from moe_lm.tools.interop.hf_folder import CONFIG
from moe_lm.tools.interop.hf_tensors import as_found, check_complete, check_counts, some, tensor_pairs
from moe_lm.tools.interop.proof import Case, Proof, prove, write_proof
from moe_lm.tools.interop.transfer import Meter, Tell, outputs_of_ours, write_run


def import_folder(
    source: Path,
    run_dir: Path,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    proof_bytes: int | None = None,
    tell: Tell | None = None,
) -> Proof:
    """Write `run_dir` with a checkpoint of the model in `source`, and return the proof that it is that model.

    `dtype` is the dtype of the written weights, "float32" or "bfloat16"; None keeps theirs. `tokenizer` is the folder
    of the tokenizer if it is not `source`. Comparing logits may take `proof_bytes` of memory, None half of what is
    free; everything else takes a few times one expert or PIECE_BYTES, whichever is more. `tell` is called with the
    bytes done and their total. Raises UsageError when the model cannot be expressed here, MoeLmError when its files are
    damaged or the proof fails; nothing is left at `run_dir` then.
    """
    folder = open_folder(source)
    family, config, unused = read_config(folder.config, str(source / CONFIG))
    check_regular(tokenizer or source)
    words = Tokenizer.load(tokenizer or source, config.vocab_size)
    check_counts(folder, config, str(source))
    pairs = as_found(tensor_pairs(config, family), folder.names())
    carried = find_carried(folder, pairs, config)
    notes = check_complete(folder, [*pairs, *carried], config, str(source))
    new = [pair.ours for pair in pairs if not pair.parts]
    if new:
        notes.append(
            f"added: a router bias of zeros in {len(new)} layers; {family.model_type} has none, so "
            "train.balance.bias_update_rate stays 0, as it is unless set, for what shall be exported again"
        )
    if carried:
        named = some([pair.parts[0].name for pair in carried])
        notes.append(
            f"carried along: {len(carried)} tensors for multi-token prediction ({named}); nothing here trains or uses "
            f"them, and an export as {family.model_type} writes them again"
        )
    if isinstance(folder, FP8Folder):
        notes.append("dequantised: matrices in 8 bits, with a scale for each block, are bfloat16 here")
    if unused:
        notes.append(f"not used: {', '.join(unused)} in {CONFIG}")
    rounded_to = DTYPES[dtype] if dtype else None
    outputs, beside = (outputs_of_ours(folder, some_pairs, rounded_to) for some_pairs in (pairs, carried))
    meter = Meter(tell, sum(output.size for output in (*outputs, *beside)))
    with whole_folder(run_dir) as unfinished:
        ours = write_run(
            unfinished,
            config,
            words,
            meter.watch(outputs),
            folder.generation_config(),
            meter.watch(beside),
            description(folder, family),
        )
        case = Case(
            what=f"import {hub.shown(source)}",
            config=config,
            family=family,
            pairs=[*pairs, *carried],
            ours=ours,
            theirs=folder,
            importing=True,
            rounded_to=rounded_to,
            tokenizer=words,
            tokenizer_of_theirs=tokenizer or source,
        )
        proof = prove(case, notes, proof_bytes, meter)
        write_proof(proof, unfinished)
    return proof
