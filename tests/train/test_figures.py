"""Figures of a step: the load of the experts, utilisation, memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_lm.train.figures import host_bytes, load_statistics, memory_bytes, model_flops_utilisation, peak_flops

# Load of the experts


def test_load_statistics_of_counted_tokens() -> None:
    even, skewed, collapsed = load_statistics(torch.tensor([[4, 4, 4, 4], [2, 6, 8, 0], [0, 16, 0, 0]]))
    assert even == {"max_over_mean": 1.0, "max_violation": 0.0, "entropy": pytest.approx(1.0), "dead_share": 0.0}
    shares = [2 / 16, 6 / 16, 8 / 16]
    assert skewed == {
        "max_over_mean": pytest.approx(8 / 4),
        "max_violation": pytest.approx(8 / 4 - 1),
        "entropy": pytest.approx(-sum(share * math.log(share, 4) for share in shares)),
        "dead_share": 0.25,
        "dead_experts": "0x8",
    }
    one = {"max_over_mean": 4.0, "max_violation": 3.0, "entropy": 0.0, "dead_share": 0.75, "dead_experts": "0xd"}
    assert collapsed == one


def test_load_statistics_without_tokens_experts_or_layers() -> None:
    nothing = {"max_over_mean": 1.0, "max_violation": 0.0, "entropy": 0.0, "dead_share": 1.0, "dead_experts": "0xf"}
    assert load_statistics(torch.zeros(2, 4, dtype=torch.int64)) == [nothing, nothing]
    assert load_statistics(torch.tensor([[7]]))[0]["entropy"] == 1.0
    assert load_statistics(torch.zeros(0, 0, dtype=torch.int64)) == []


def test_load_statistics_are_exact_for_counts_beyond_float32() -> None:
    (layer,) = load_statistics(torch.tensor([[2**40 + 1, 2**40 - 1]]))
    assert layer["max_violation"] == pytest.approx(2**-40)


# Utilisation


def test_model_flops_utilisation() -> None:
    assert model_flops_utilisation(tokens_per_second=1e5, flops_per_token=2e9, peak=1e15) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A1000", None),
        ("a device of next year", None),
    ],
)
def test_peak_flops_goes_by_the_name(monkeypatch: pytest.MonkeyPatch, name: str, expected: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == expected


def test_peak_flops_is_unknown_on_a_cpu_and_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_memory_counts_this_process_in_bytes() -> None:
    before = memory_bytes(torch.device("cpu"))
    kept = torch.ones(before // 4)  # as much again: 4 bytes an element
    assert memory_bytes(torch.device("cpu")) > before + kept.nbytes // 2


def test_memory_now_falls_again_and_counts_no_mapped_file(tmp_path: Path) -> None:
    if host_bytes() is None:
        pytest.skip("this system does not tell how much memory a process has now")
    size = 256 * 2**20
    np.lib.format.open_memmap(tmp_path / "shard", "w+", np.uint8, (size,))[:] = 1
    before = host_bytes()
    mapped = np.load(tmp_path / "shard", mmap_mode="r")
    assert int(mapped.sum(dtype=np.int64)) == size
    assert host_bytes() < before + size // 2
    kept = np.ones(size, np.uint8)
    assert host_bytes() > before + size // 2
    del kept
    assert host_bytes() < before + size // 2
