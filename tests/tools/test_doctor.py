"""The report of `moe-lm doctor` on machines that lack something."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from moe_lm.kernels import available, kernels
from moe_lm.kernels.device import pick_device
from moe_lm.tools import doctor


def finding(name: str) -> doctor.Finding:
    return next(item for item in doctor.examine() if item.name == name)


@pytest.fixture(autouse=True)
def _no_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


def lacking(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)


def test_whole_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run() == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("Python", "torch", "deepspeed", "bfloat16", "cores", "GiB"))


def test_missing_requirement_fails_and_says_how_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking("accelerate", monkeypatch)
    assert doctor.run() == 1
    assert finding("accelerate") == doctor.Finding("accelerate", "missing", "not installed", doctor.INSTALL)
    assert "pip install" in capsys.readouterr().out


def test_a_path_and_a_command_stay_in_one_line_of_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path, command = "/" + "folder/" * 12 + "library.so", "pip install " + "package " * 12 + "last"
    finding = doctor.Finding("decoding in C++", "optional", path, command)
    doctor._show([finding])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"-        decoding in C++  {path}", "", "What to do:", f"  decoding in C++  {command}"]


def test_what_is_optional_is_listed_with_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    lacking("wandb", monkeypatch)
    found = {item.name: item for item in doctor.examine()}
    assert set(found) >= {"matplotlib", "tensorboard", "wandb", "trackio", "peft", "lm_eval", "pdsh", "Slurm"}
    assert found["wandb"].remedy == 'pip install -e ".[track]" (for log.trackers: [wandb])'
    assert (found["pdsh"].status, found["Slurm"].status) == ("optional", "optional")
    assert found["can train"].found.startswith("1.1 to 10 million parameters in minutes")


def test_a_terminal_breaks_between_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    doctor._show([doctor.Finding("Python", "ok", "3.11.2 (/a/path/of-several/words/bin/python)")])
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("Python  3.11.2")
    assert second.strip() == "(/a/path/of-several/words/bin/python)"


def test_missing_extra_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking("fastapi", monkeypatch)
    assert finding("fastapi").status == "optional"
    assert doctor.run() == 0


def test_attention_kernels_are_served_missing_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = {
        "flash_attn_3": available.Lack("it is not installed", installed=False),
        "flash_attn_2": available.Lack("ImportError: undefined symbol", installed=True),
    }
    monkeypatch.setattr(available, "lack", lacks.get)
    found = {item.name: item for item in doctor.examine() if item.name.startswith("attention ")}
    assert {name.removeprefix("attention "): item.status for name, item in found.items()} == {
        "flash_attn_3": "optional", "flash_attn_4": "ok", "flash_attn_2": "warning", "torch_varlen": "ok",
        "cpp": "ok",
    }  # fmt: skip
    assert "setup.py install" in found["attention flash_attn_3"].remedy
    assert found["attention flash_attn_2"].found == "ImportError: undefined symbol"
    assert "pip install" in found["attention flash_attn_2"].remedy


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert finding("C++ compiler").status == "optional"
    assert "g++" in finding("C++ compiler").remedy


def test_lock_of_a_killed_build_is_reported(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    found = finding("build lock")
    assert found.status == "warning"
    assert found.remedy.endswith(f"rm {lock}")


def test_no_home_folder_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: object) -> None:
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert doctor.run() == 0
    assert finding("decoding in C++").status == "optional"


def test_kernels_are_named() -> None:
    assert finding("kernels").found == str(kernels.choose(pick_device("auto"), decoding=True))
