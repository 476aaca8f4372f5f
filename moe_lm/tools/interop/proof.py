"""The proof that an imported or exported model is the same model, printed and kept as proof.json.

Every value of every tensor is read back from the disk and compared (transfer.py). Then both models, one after the
other, read the same random and real tokens in float32: their logits must agree, and so must their choices of experts.
If a whole model is too large for that, its first layers are compared and the proof says how many.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_lm.checkpoint.read import TensorSource
from moe_lm.common.integrity import SHA256, checksum_of
from moe_lm.config.model import ModelConfig
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop import models
from moe_lm.tools.interop.families import Family
from moe_lm.tools.interop.fitting import known_limit
from moe_lm.tools.interop.hf_folder import HFFolder
from moe_lm.tools.interop.hf_tensors import TensorPair
from moe_lm.tools.interop.logits import Comparison, compare_all
from moe_lm.tools.interop.transfer import Meter, audit

PROOF = "proof.json"


@dataclass(frozen=True)
class Case:
    """A model in our format and in theirs, one of which was just written."""

    what: str
    config: ModelConfig
    family: Family
    pairs: Sequence[TensorPair]
    ours: TensorSource
    theirs: HFFolder
    importing: bool
    tokenizer: Tokenizer
    tokenizer_of_theirs: Path
    rounded_to: torch.dtype | None = None  # the dtype that an import wrote weights in, None if it is the one they had


@dataclass(frozen=True)
class Proof:
    """The statements that were proven, and those that were not."""

    what: str
    family: str
    our_tensors: int
    their_tensors: int
    values_equal: int
    sha256: dict[str, str]  # of the files with their tensors
    compared_with: str | None = None
    layers: str | None = None
    logits: tuple[Comparison, ...] = ()
    tokenizer: str | None = None
    notes: list[str] = field(default_factory=list)
    not_proven: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.what} ({self.family}): {self.our_tensors} tensors here, {self.their_tensors} there, all "
            f"{self.values_equal:,} values equal",
            *self.notes,
        ]
        if self.compared_with:
            lines.append(f"compared with {self.compared_with}, float32, {self.layers} layers")
            lines += [str(comparison) for comparison in self.logits]
        if self.tokenizer:
            lines.append(self.tokenizer)
        return "\n".join([*lines, *(f"not proven: {line}" for line in self.not_proven)])


def prove(case: Case, notes: Sequence[str], max_bytes: int | None, meter: Meter | None = None) -> Proof:
    """Audit the tensors, then compare logits and experts within `max_bytes` of memory (None: half of what is free).

    Raises MoeLmError saying what differs.
    """
    values = audit(case.ours, case.theirs, case.pairs, case.ours if case.importing else case.theirs, meter)
    known: dict[str, Any] = {
        "what": case.what,
        "family": case.family.model_type,
        "our_tensors": len(case.pairs),
        "their_tensors": len({part.name for pair in case.pairs for part in pair.parts}),
        "values_equal": values,
        "sha256": {path.name: checksum_of(path, SHA256) for path in case.theirs.files},
        "notes": list(notes),
    }
    library, missing = models.find_transformers(case.family.model_type)
    if library is None:
        return Proof(**known, not_proven=[f"logits and experts: {missing}"])
    layers, why = models.layers_that_fit(case.config, max_bytes)
    not_proven = [why] if why else []
    comparisons = _compare_models(case, layers, library) if layers else ()
    tokenizer, why = models.compare_tokenizers(case.tokenizer, case.tokenizer_of_theirs)
    if why:
        not_proven.append(why)
    return Proof(
        **known,
        compared_with=library,
        layers=f"{layers} of {case.config.num_hidden_layers}" if layers else "no",
        logits=comparisons,
        tokenizer=tokenizer or None,
        not_proven=not_proven,
    )


def write_proof(proof: Any, folder: Path) -> None:
    """Keep a proof, which is a dataclass, beside the model."""
    (folder / PROOF).write_text(json.dumps(asdict(proof), indent=2) + "\n", encoding="utf-8")


def _compare_models(case: Case, layers: int, library: str) -> tuple[Comparison, ...]:
    texts = models.token_batches(case.config, case.tokenizer)
    rounded = None
    if not case.importing:
        rounded = {pair.ours: case.theirs.dtype(pair.parts[0].name) for pair in case.pairs if pair.parts}
    ours = models.run_ours(models.our_model(case.config, layers, case.ours, rounded), texts)
    routers = sum(layer < layers for layer in case.config.moe_layers)
    with models.running(library, known_limit(case.config, case.family)):
        theirs = models.run_theirs(case.theirs, layers, routers, texts, case.rounded_to)
    return compare_all(ours, theirs)
