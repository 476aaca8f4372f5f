"""The attention kernel is decided by importing: what serves, what is passed over with a sentence, what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch.nn.attention import _fa4, current_flash_attention_impl, restore_flash_attention_impl

from moe_lm.common.errors import UsageError
from moe_lm.config.run import AttentionKernel, ParallelConfig
from moe_lm.engine.build import build_model
from moe_lm.kernels import available, kernels
from moe_lm.kernels.available import Inputs
from moe_lm.parallel.topology import Topology
from tests.tiny import tiny

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _as_at_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test tries the packages anew, and leaves PyTorch's switch as it was."""
    before = dict(sys.modules)
    available.lack.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    available.lack.cache_clear()
    _fa4._fa4_import_module.cache_clear()
    restore_flash_attention_impl(_raise_warn=False)
    for name in set(sys.modules) - set(before):
        if name.startswith("flash_attn"):
            del sys.modules[name]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(folder: Path, module: str, source: str) -> None:
    file = folder / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")


def install_version_2(folder: Path) -> None:
    install(folder, "flash_attn.__init__", "def flash_attn_varlen_func(): ...\n")


def install_version_3(folder: Path) -> None:
    operators = "import torch\nlibrary = torch.library.Library('flash_attn_3', 'FRAGMENT')\n"
    define = "".join(f"library.define('{name}(Tensor q) -> Tensor')\n" for name in ("fwd", "bwd"))
    install(folder, "flash_attn_interface", operators + define)


def install_version_4(folder: Path) -> None:
    """It ships no `flash_attn/__init__.py`: a namespace."""
    install(folder, "flash_attn.cute.interface", "def _flash_attn_fwd(): ...\ndef _flash_attn_bwd(): ...\n")


def gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))


def test_pytorch_serves_where_no_package_is_and_nothing_is_said() -> None:
    assert kernels.choose(CUDA).attention == "torch_varlen"
    assert available.passed_over("cuda", "torch_varlen") == []


def test_version_2_serves_where_it_is(packages: Path) -> None:
    install_version_2(packages)
    assert kernels.choose(CUDA).attention == "flash_attn_2"


def test_a_name_without_the_functions_falls_back_with_a_sentence(packages: Path) -> None:
    """As flash-attn-4 leaves it: a package `flash_attn` that has nothing of version 2."""
    install(packages, "flash_attn.cute.other", "")
    assert kernels.choose(CUDA).attention == "torch_varlen"
    (note,) = available.passed_over("cuda", "torch_varlen")
    assert note.startswith("attention kernel flash_attn_2 is installed and does not serve: ImportError: cannot import")
    assert note.endswith("; torch_varlen serves instead")


def test_a_package_that_does_not_load_falls_back_with_its_reason(packages: Path) -> None:
    install(packages, "flash_attn.__init__", "raise ImportError('undefined symbol: _ZN3c104cuda\\nmore')\n")
    assert kernels.choose(CUDA).attention == "torch_varlen"
    for note in available.passed_over("cuda", "torch_varlen"):  # version 4 lies in the same package
        assert "ImportError: undefined symbol: _ZN3c104cuda; torch_varlen serves" in note


def test_a_package_without_its_own_requirement_is_installed_all_the_same(packages: Path) -> None:
    install(packages, "flash_attn.__init__", "import einops_of_another_day\n")
    lack = available.lack("flash_attn_2")
    assert lack == available.Lack("No module named 'einops_of_another_day'", installed=True)


@pytest.mark.parametrize(
    ("major", "expected"), [(8, "flash_attn_2"), (9, "flash_attn_3"), (10, "flash_attn_4"), (7, "plain")]
)
def test_the_newest_that_is_made_for_the_gpu_serves(
    packages: Path, monkeypatch: pytest.MonkeyPatch, major: int, expected: str
) -> None:
    install_version_3(packages)
    install_version_4(packages)
    install_version_2(packages)
    gpu(monkeypatch, major)
    assert kernels.choose(CUDA).attention == expected
    assert current_flash_attention_impl() == {"flash_attn_3": "FA3", "flash_attn_4": "FA4"}.get(expected)


def test_trying_a_kernel_does_not_put_it_in_place(packages: Path) -> None:
    install_version_4(packages)
    assert available.lack("flash_attn_4") is None
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("flash_attn_2", "attention_kernel=flash_attn_2 does not serve here: it is not installed; pip install"),
        ("flash_attn_3", "attention_kernel=flash_attn_3 does not serve here: it is not installed; build it"),
        ("flash_attn_4", "attention_kernel=flash_attn_4 does not serve here: it is not installed; pip install"),
        ("segments", "attention_kernel=segments does not run on cuda; choose one of auto, flash_attn_3"),
    ],
)
def test_a_kernel_by_name_that_is_not_there_is_refused_with_what_to_do(wanted: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        kernels.choose(CUDA, attention=wanted)


@pytest.mark.parametrize(
    ("device", "wanted", "inputs", "says"),
    [
        ("cpu", "cpp", Inputs(torch.float32, (64, 64)), "takes bfloat16 and head sizes that are multiples of 16, and"),
        ("cpu", "cpp", Inputs(torch.bfloat16, (32, 24)), "this run has bfloat16 and head sizes of 32 and 24; set"),
        ("cuda", "torch_varlen", Inputs(torch.float32, (64, 64)), "takes bfloat16 or float16, and this run has fl"),
        ("cuda", "flash_attn_2", Inputs(torch.float32, (64, 64)), "takes bfloat16 or float16, and this run has fl"),
    ],
)
def test_a_kernel_by_name_is_no_other_one_in_silence(
    packages: Path, device: str, wanted: str, inputs: Inputs, says: str
) -> None:
    """Nor is one passed over in favour of another that is named where plain torch computes."""
    install_version_2(packages)
    with pytest.raises(UsageError, match=says):
        kernels.choose(torch.device(device), attention=wanted, inputs=inputs)
    expected = "segments" if device == "cpu" else "plain"
    assert kernels.choose(torch.device(device), inputs=inputs).attention == expected
    narrow = Inputs(torch.bfloat16, (64, 64))
    both = ["cpp", "flash_attn_2"]
    assert kernels.choose(torch.device(device), simulated=both, inputs=narrow).attention in both


def test_a_kernel_by_name_is_taken_before_a_faster_one(packages: Path) -> None:
    install_version_2(packages)
    assert kernels.choose(CUDA, attention="torch_varlen").attention == "torch_varlen"
    assert kernels.choose(torch.device("cpu"), attention="plain").attention == "plain"


def test_a_run_computes_in_the_kernel_of_its_config() -> None:
    built = build_model(tiny(), ParallelConfig(device="cpu", attention_kernel="plain"), Topology())
    assert kernels.of(built.model).attention == "plain"
    with pytest.raises(UsageError, match="attention_kernel=flash_attn_2 does not run on cpu"):
        build_model(tiny(), ParallelConfig(device="cpu", attention_kernel="flash_attn_2"), Topology())
    with pytest.raises(UsageError, match="attention_kernel=cpp takes bfloat16"):
        build_model(tiny(), ParallelConfig(device="cpu", attention_kernel="cpp"), Topology(), precision="float32")


def test_a_simulated_device_has_the_kernels_that_are_given() -> None:
    assert kernels.choose(CUDA, simulated=["flash_attn_3", "torch_varlen"]).attention == "flash_attn_3"
    assert kernels.choose(CUDA, simulated=[]).attention == "plain"
    assert kernels.choose(CUDA, attention="flash_attn_4", simulated=[]).attention == "flash_attn_4"
    assert current_flash_attention_impl() is None


def test_each_setting_is_a_kernel_and_each_kernel_a_setting() -> None:
    assert set(get_args(AttentionKernel)) == {"auto", *kernels.ATTENTION}
    assert {name for names in available.BY_SPEED.values() for name in names} == set(kernels.ATTENTION)


def test_one_try_serves_every_layer_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    package = SimpleNamespace(load=lambda: tries.append("flash_attn_2"), module="flash_attn", majors=(9,), install="")
    monkeypatch.setitem(available.PACKAGES, "flash_attn_2", package)  # type: ignore[arg-type]
    for _ in range(3):
        assert kernels.choose(CUDA).attention == "flash_attn_2"
    assert tries == ["flash_attn_2"]
