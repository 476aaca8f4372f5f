"""`moe-lm upcycle`: a dense checkpoint becomes a Mixture of Experts that computes the same, with a new router.

1. Every feed-forward layer is cut along its width into `split` pieces, whose outputs add up to the layer's.
2. The first `shared` pieces become the shared experts. The other P are one copy of the layer, and the routed experts
   are such copies side by side: with P = 2 and 4 experts a0 a1 | b0 b1, where b0 = a0 and b1 = a1.
3. The router has a random row for each copy, which all pieces of the copy repeat. So a token chooses whole copies, and
   the weights of its experts, which add up to 1, are equal within a copy: 1/2 for a0 and a1 with 2 experts a token.
4. A factor of P makes up for that division. It is `routed_scaling_factor` beside shared experts; without them no family
   knows that setting, and the last matrices of the pieces are multiplied by P.

Sparse upcycling: arXiv 2212.05055; fine-grained, with routers alike within a copy: arXiv 2410.07524.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import GENERATION, MODEL_PREFIX
from moe_lm.checkpoint.read import TensorSource, open_tensors, pieces, read_model_config
from moe_lm.checkpoint.safetensors_file import Output
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import whole_folder
from moe_lm.config.generation import UpcycleConfig
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import build_config
from moe_lm.model.size import on_meta
from moe_lm.model.transformer import initialise_tensor
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop import models
from moe_lm.tools.interop.logits import Comparison, ForwardPass, compare_all
from moe_lm.tools.interop.proof import write_proof
from moe_lm.tools.interop.transfer import write_run


@dataclass(frozen=True)
class UpcyclingProof:
    """The comparison of the dense model with the upcycled one."""

    what: str
    layers: str
    loss_before: float  # nats a token, on a real text
    loss_after: float
    logits: tuple[Comparison, ...]
    not_proven: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.what}, compared over {self.layers} layers",
            f"loss {self.loss_before:.6f} before, {self.loss_after:.6f} after",
            *map(str, self.logits),
        ]
        return "\n".join([*lines, *(f"not proven: {line}" for line in self.not_proven)])


def upcycle(
    run: Path, run_dir: Path, cut: UpcycleConfig, base: Path | None = None, proof_bytes: int | None = None
) -> UpcyclingProof:
    """Write `run_dir` with a checkpoint of step 0 of the new model, and return the proof that it computes the same.

    Raises UsageError when the model is not dense or cannot be cut so, MoeLmError when the proof fails; nothing is left
    at `run_dir` then.
    """
    folder = checkpoint.resolve(run)
    dense = read_model_config(folder)
    config = upcycled_config(dense, cut)
    tokenizer = Tokenizer.load(checkpoint.verified_path(folder, "tokenizer"))
    before = open_tensors(folder, base)
    generation = checkpoint.read_text(folder, GENERATION) if (folder / GENERATION).is_file() else None
    with whole_folder(run_dir) as unfinished:
        after = write_run(unfinished, config, tokenizer, _outputs(before, config, cut), generation)
        proof = _prove(f"upcycle {run.name}", dense, before, config, after, tokenizer, proof_bytes)
        write_proof(proof, unfinished)
    return proof


def upcycled_config(dense: ModelConfig, cut: UpcycleConfig) -> ModelConfig:
    """The shape of the new model. Raises UsageError naming what does not fit."""
    if dense.moe_layers:
        raise UsageError(f"the model has experts already (n_routed_experts={dense.n_routed_experts}); give a dense one")
    if dense.mlp_bias:
        raise UsageError("mlp_bias=True cannot be upcycled: experts have no bias")
    if not 0 <= cut.shared < cut.split:
        raise UsageError(f"--shared {cut.shared} leaves none of --split {cut.split} pieces to be routed; choose fewer")
    if dense.intermediate_size % cut.split:
        raise UsageError(
            f"--split {cut.split} does not divide intermediate_size={dense.intermediate_size}; choose a divisor"
        )
    for name, value in (("experts", cut.experts), ("per-token", cut.per_token)):
        if value % cut.pieces:
            raise UsageError(
                f"--{name} {value} is not a multiple of {cut.pieces}, the routed pieces of a copy "
                "(--split less --shared)"
            )
    values = dense.model_dump() | {
        "n_routed_experts": cut.experts,
        "num_experts_per_tok": cut.per_token,
        "moe_intermediate_size": dense.intermediate_size // cut.split,
        "n_shared_experts": cut.shared,
        "first_k_dense_replace": cut.first_dense,
        # As the families have it that can hold the result: with shared experts Dots1 and GLM, without Qwen3-MoE.
        "scoring_func": "sigmoid" if cut.shared else "softmax",
        "norm_topk_prob": True,
        "routed_scaling_factor": float(cut.pieces) if cut.shared else 1.0,
    }
    return build_config(ModelConfig, values, "upcycle")


def _outputs(before: TensorSource, config: ModelConfig, cut: UpcycleConfig) -> list[Output]:
    scaled = ".experts.down_proj" if cut.factor != 1 else "none"
    outputs = []
    for name, tensor in on_meta(config).state_dict().items():
        shape, ours = tuple(tensor.shape), MODEL_PREFIX + name
        new = ".mlp.gate." in name or scaled in name
        dtype = torch.float32 if new else before.dtype(_dense_name(ours))
        outputs.append(Output(ours, shape, dtype, _pieces(before, ours, shape, config, cut)))
    return outputs


def _pieces(
    before: TensorSource, name: str, shape: tuple[int, ...], config: ModelConfig, cut: UpcycleConfig
) -> Callable[[], Iterator[Tensor]]:
    width = config.expert_size

    def router() -> Iterator[Tensor]:
        rows = torch.empty(cut.experts // cut.pieces, *shape[1:])
        initialise_tensor(name, rows, config, cut.seed)
        yield rows.repeat_interleave(cut.pieces, dim=0)

    def shared() -> Iterator[Tensor]:
        dense = _dense_name(name)
        if name.endswith("down_proj.weight"):
            yield before.rows(dense, 0, shape[0], slice(0, cut.shared * width))
        else:
            yield before.rows(dense, 0, cut.shared * width)

    def routed() -> Iterator[Tensor]:
        dense = _dense_name(name)
        whole = before.rows(dense, 0, before.shape(dense)[0])
        whole = whole if name.endswith("down_proj") else whole.mT  # the width is last
        for expert in range(cut.experts):
            start = (cut.shared + expert % cut.pieces) * width
            piece = whole[:, start : start + width]
            yield piece.mT.float() * cut.factor if name.endswith("down_proj") else piece

    if ".mlp.gate." in name:
        return router
    if ".shared_experts." in name:
        return shared
    return routed if ".experts." in name else lambda: pieces(before, name)


def _dense_name(name: str) -> str:
    """The tensor of the dense model from which a tensor of the new model is made."""
    name = name.replace(".shared_experts.", ".")
    return f"{name.replace('.experts.', '.')}.weight" if ".experts." in name else name


def _prove(
    what: str,
    dense: ModelConfig,
    before: TensorSource,
    config: ModelConfig,
    after: TensorSource,
    tokenizer: Tokenizer,
    max_bytes: int | None,
) -> UpcyclingProof:
    layers, missing = models.layers_that_fit(config, max_bytes)
    if not layers:
        raise MoeLmError(f"nothing could be proven: {missing}; give --proof-memory more")
    texts = models.token_batches(config, tokenizer)
    old = models.run_ours(models.our_model(dense, layers, before), texts)
    new = models.run_ours(models.our_model(config, layers, after), texts)
    # The dense model chooses no experts.
    alike = (
        {name: ForwardPass(one.logits, [], [], one.noise) for name, one in passes.items()} for passes in (old, new)
    )
    return UpcyclingProof(
        what=what,
        layers=f"{layers} of {config.num_hidden_layers}",
        loss_before=_loss(old["real"].logits, texts["real"]),
        loss_after=_loss(new["real"].logits, texts["real"]),
        logits=compare_all(*alike),
        not_proven=(missing,) if missing else (),
    )


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
