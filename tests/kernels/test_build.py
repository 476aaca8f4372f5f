"""The library is built once, even beside other builds and after killed ones, and its absence is not a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_lm.kernels.native import build
from moe_lm.tools import doctor

FAST = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)  # what is built is not used
BUILD = f"from moe_lm.kernels.native import build; build.FLAGS = {FAST}; print(build.build())"
COMPILER = build.compiler_path()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/moe-lm"


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.slow
def test_several_processes_build_at_once(cache: Path) -> None:
    (cache / "build-killed").mkdir(parents=True)  # as a killed build leaves it
    processes = [subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    [path] = paths
    assert [str(file) for file in cache.glob("*.so")] == [path]
    assert {folder.name for folder in cache.iterdir() if folder.is_dir()} == {"build-killed"}


def test_a_library_gets_its_name_when_it_is_whole(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a rename of the file that the compiler wrote: who looks for it meanwhile never loads half of one."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\nfor out; do :; done\n'
        f'echo code > "$out"\nls -i "$out" > {tmp_path}/written\nls {cache} > {tmp_path}/seen\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    path = build.build()
    assert path.read_text() == "code\n"
    inode, written = (tmp_path / "written").read_text().split()
    assert Path(written).name != path.name
    assert path.stat().st_ino == int(inode)
    assert path.name not in (tmp_path / "seen").read_text().split()


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_what_is_built_is_not_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", FAST)
    path = build.build()
    written = path.stat().st_mtime_ns
    assert build.build() == path
    assert path.stat().st_mtime_ns == written
    monkeypatch.setattr(build, "FLAGS", (*FAST, "-DOTHER"))
    assert build.build() != path


def test_a_compiler_that_fails_says_why(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.UnavailableError, match="out of luck"):
        build.build()
    assert list(cache.iterdir()) == []


def test_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.UnavailableError, match=r"no C\+\+ compiler"):
        build.build()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build, "compiler_path", lambda: "true")
    with pytest.raises(build.UnavailableError, match="file"):
        build.build()


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.OFF, "0")
    with pytest.raises(build.UnavailableError, match="turns it off"):
        build.build()


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is in no passwd."""

    def unknown(user: object) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    homeless(monkeypatch)
    monkeypatch.setattr(build, "compiler_path", lambda: "true")
    with pytest.raises(build.UnavailableError, match="no home folder; XDG_CACHE_HOME"):
        build.build()


def test_what_cannot_be_loaded_says_why(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\n[ "$1" = --version ] || echo junk > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.build().is_file()
    with pytest.raises(build.UnavailableError, match=r"cannot be loaded: .*kernels-.*\.so"):
        build.load()
    found = doctor._native()
    assert found.status == "optional"
    assert "cannot be loaded" in found.found
