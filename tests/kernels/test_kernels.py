"""Kernels are chosen by name for a device, which need not be there, and applied to every layer of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.kernels import attention, cpu_decode, flash_attention, grouped_mm, kernels
from moe_lm.kernels.available import Inputs
from moe_lm.kernels.device import pick_dtype
from moe_lm.kernels.kernels import Kernels
from moe_lm.kernels.native import build
from moe_lm.model import moe, rotary
from moe_lm.model.attention import CachedAttention, segment_attention
from tests.tiny import LATENT, tiny_model


@pytest.mark.parametrize(
    ("device", "decoding", "expected"),
    [
        ("cuda", False, Kernels("torch_varlen", "fused")),
        ("cuda", True, Kernels("torch_varlen", "fused", "plain")),
        ("cpu", False, Kernels("cpp", "bucketed")),
        ("mps", True, Kernels("plain", "fused", "plain")),
    ],
)
def test_a_device_has_its_kernels_whether_or_not_it_is_there(device: str, decoding: bool, expected: Kernels) -> None:
    simulated = ["cpp", "torch_varlen"]
    assert kernels.choose(torch.device(device), decoding, simulated=simulated) == expected


def test_decoding_is_in_cpp_where_there_is_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, name in ((object(), "cpp"), (None, "plain")):
        monkeypatch.setattr(build, "library", lambda found=library: found)
        chosen = kernels.choose(torch.device("cpu"), decoding=True, simulated=["segments"])
        assert str(chosen) == f"attention segments, experts bucketed, decoding {name}"


@pytest.mark.parametrize("changes", [{}, LATENT], ids=["grouped", "latent"])
def test_every_layer_gets_what_is_named_and_a_model_starts_in_plain_torch(changes: dict[str, object]) -> None:
    model = tiny_model(**changes)
    plain = (segment_attention, moe.grouped_mm, rotary.rotate, moe.dispatch_locally, CachedAttention)
    native = (cpu_decode.rotate, cpu_decode.dispatch, cpu_decode.NativeCachedAttention)

    def found() -> set[object]:
        layers = [layer.self_attn for layer in model.model.layers]
        experts = model.moe_layers
        return {
            *(layer.segment_attention for layer in layers), *(layer.experts.grouped_mm for layer in experts),
            *(layer.rotate for layer in layers), *(layer.dispatcher for layer in experts), model.cached_attention,
        }  # fmt: skip

    assert found() == set(plain)
    kernels.apply(model, Kernels("torch_varlen", "bucketed"))
    assert found() == {flash_attention.torch_varlen, grouped_mm.bucketed, *plain[2:]}
    assert kernels.of(model) == Kernels("torch_varlen", "bucketed")
    kernels.apply(model, Kernels("segments", "fused", "cpp"))
    assert found() == {attention.segments, grouped_mm.fused, *native}
    assert kernels.of(model) == Kernels("segments", "fused", "cpp")


def test_the_log_of_a_run_names_them(pretrained: Path) -> None:
    config = load_config(PretrainConfig, pretrained / "config.yaml")
    sizes = config.model.head_size, config.model.value_size
    inputs = Inputs(pick_dtype(config.train.precision, torch.device("cpu")), sizes)
    chosen = kernels.choose(torch.device("cpu"), inputs=inputs)
    assert f"  kernels: {chosen}\n" in (pretrained / "train.log").read_text()


def test_a_dense_model_has_no_kernel_for_experts() -> None:
    model = tiny_model(n_routed_experts=0, first_k_dense_replace=0)
    kernels.apply(model, kernels.choose(model.device, attention="segments"))
    assert str(kernels.of(model)) == "attention segments"


@pytest.mark.parametrize("name", ["attention", "experts", "decoding"])
def test_a_name_that_no_table_has_is_an_error(name: str) -> None:
    with pytest.raises(KeyError, match="quantum"):
        kernels.apply(tiny_model(), Kernels()._replace(**{name: "quantum"}))
