"""A dense model becomes a Mixture of Experts that computes the same before any step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.config.generation import UpcycleConfig
from moe_lm.generate.session import Session
from moe_lm.tools.interop.exporting import export_run
from moe_lm.tools.interop.upcycle import upcycle
from tests.conftest import MoeLm

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS = {
    "copies": UpcycleConfig(experts=4, per_token=2),
    "one copy a token": UpcycleConfig(experts=4, per_token=1),
    "every copy": UpcycleConfig(experts=4, per_token=4),
    "fine-grained": UpcycleConfig(experts=9, per_token=3, split=3),
    "several fine-grained copies": UpcycleConfig(experts=12, per_token=6, split=3),
    "shared piece": UpcycleConfig(experts=8, per_token=2, split=3, shared=1),
    "shared pieces, first layer dense": UpcycleConfig(experts=4, per_token=2, split=6, shared=4, first_dense=1),
}


@pytest.mark.parametrize("variant", ["llama", "qwen3 tied"])
@pytest.mark.parametrize("way", WAYS)
def test_same_loss_before_any_step(variant: str, way: str, imported_run: Any, tmp_path: Path) -> None:
    how = WAYS[way]
    proof = upcycle(imported_run(variant), tmp_path / "moe", how)
    assert proof.layers == "3 of 3"
    assert abs(proof.loss_after - proof.loss_before) < 2e-6
    assert all(comparison.largest_difference <= 1e-5 for comparison in proof.logits)
    session = Session.load(tmp_path / "moe", device="cpu")
    config = session.model.config
    assert config.moe_layers == list(range(how.first_dense, 3))
    experts = session.model.moe_layers[0].experts
    assert tuple(experts.down_proj.shape) == (how.experts, 48 // how.split, 32)
    router = session.model.moe_layers[0].gate.weight.detach()
    assert torch.equal(router[: how.pieces], router[:1].expand(how.pieces, -1))
    assert len(router.unique(dim=0)) == how.experts // how.pieces
    assert float(router.std()) == pytest.approx(0.02, rel=0.5)
    assert json.loads((tmp_path / "moe" / "proof.json").read_text())["loss_after"] == proof.loss_after


def test_what_upcycling_makes_can_be_exported(imported_run: Any, tmp_path: Path) -> None:
    for variant, way, family in (
        ("qwen3", "copies", "qwen3_moe"),
        ("qwen3", "fine-grained", "qwen3_moe"),
        ("qwen3", "shared piece", "dots1"),
        ("llama", "copies", "mixtral"),
        ("llama", "shared piece", "glm4_moe"),
    ):
        moe = tmp_path / f"{variant} {way}"
        upcycle(imported_run(variant), moe, WAYS[way])
        assert export_run(moe, tmp_path / f"{variant} {way} out").family == family


@pytest.mark.parametrize(
    ("variant", "options", "said"),
    [
        ("llama tied", [], "mlp_bias=True cannot be upcycled"),
        ("dots1", [], "has experts already (n_routed_experts=8)"),
        ("qwen3", ["--split", 5], "--split 5 does not divide intermediate_size=48"),
        ("qwen3", ["--split", 2, "--experts", 7], "--experts 7 is not a multiple of 2"),
        ("qwen3", ["--split", 2, "--per-token", 3], "--per-token 3 is not a multiple of 2"),
        ("qwen3", ["--split", 2, "--shared", 2], "--shared 2 leaves none of --split 2 pieces"),
        ("qwen3", ["--split", 4, "--per-token", 4], "moe_intermediate_size=12 is not divisible by 8"),
        ("qwen3", ["--experts", 2, "--per-token", 3], "num_experts_per_tok=3 is more than n_routed_experts=2"),
        ("qwen3", ["--first-dense", 4], "first_k_dense_replace=4"),
        ("qwen3", ["--proof-memory", 0], "nothing could be proven"),
    ],
)
def test_wrong_use(
    variant: str, options: list[Any], said: str, imported_run: Any, tmp_path: Path, moe_lm: MoeLm
) -> None:
    done = moe_lm("upcycle", imported_run(variant), "--run-dir", tmp_path / "moe", *options)
    assert done.code == (1 if "proven" in said else 2)
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


def test_command(imported_run: Any, tmp_path: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("upcycle", imported_run("qwen3"), "--run-dir", tmp_path / "moe")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == "upcycle qwen3, compared over 3 of 3 layers"
    assert done.out.splitlines()[-1] == f"wrote {tmp_path / 'moe'}"
