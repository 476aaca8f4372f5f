"""The command line: exit codes, one-line errors, and imports that stay lazy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_lm import __version__
from moe_lm.cli.main import main
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.tools import doctor

VERBS = "quickstart doctor tokenizer prepare pretrain finetune verify import upcycle sample chat eval export".split()


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `moe-lm` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["moe-lm", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def failing_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)


def test_help_lists_the_verbs_in_the_order_of_the_walk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--help", monkeypatch=monkeypatch) == 0
    first_words = [line.strip("│ ").split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [word for word in first_words if word in VERBS] == VERBS


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS), ["tokenizer", "train"], ["tokenizer", "inspect"]])
def test_short_help_works_at_every_level(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*verb, "-h", monkeypatch=monkeypatch) == 0
    assert " ".join(["moe-lm", *verb]) in capsys.readouterr().out


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == f"moe-lm {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["sampel"], ["sample"], ["sample", "run", "-p", "x", "--top-p", "2"], ["pretrain", "--nonsense"], []]
)
def test_wrong_use_exits_2(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*arguments, monkeypatch=monkeypatch) == 2


@pytest.mark.parametrize(("error", "code"), [(UsageError("bad value"), 2), (MoeLmError("bad luck"), 1)])
def test_error_is_one_line_with_its_exit_code(
    error: MoeLmError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_with(error, monkeypatch)
    assert run("doctor", monkeypatch=monkeypatch) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {error}\n")


def test_unforeseen_error_is_one_line_that_names_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_with(ZeroDivisionError("by zero"), monkeypatch)
    assert run("doctor", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err == (
        "internal error: ZeroDivisionError: by zero; run again with --debug for the traceback\n"
    )


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback_before_and_after_the_verb(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_with(UsageError("bad value"), monkeypatch)
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):")
    assert error.endswith("error: bad value\n")


def test_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing_with(KeyboardInterrupt(), monkeypatch)
    assert run("doctor", monkeypatch=monkeypatch) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_closed_pipe_is_quiet() -> None:
    command = f'"{sys.executable}" -m moe_lm --help | true'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "moe_lm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"moe-lm {__version__}\n"


@pytest.mark.parametrize(("arguments", "config"), [(["--help"], "pydantic"), (["sample", "--help"], "yaml")])
def test_help_imports_no_stage(arguments: list[str], config: str) -> None:
    """And no config, but for the one whose fields are a verb's options."""
    heavy = ("torch", "numpy", config, "tokenizers", "datasets", "deepspeed")
    program = (
        "import sys; from moe_lm.cli.main import main\n"
        f"sys.argv = ['moe-lm', *{arguments}]\n"
        "try: main()\n"
        f"except SystemExit: sys.exit(str(found) if (found := sys.modules.keys() & set({heavy})) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr == ""


def test_using_a_model_never_imports_deepspeed() -> None:
    """Whatever third-party packages do: no module for reading, sampling or evaluating brings deepspeed in."""
    program = (
        "import importlib, pkgutil, sys\n"
        "for name in ('tokenizer', 'data', 'generate', 'evaluate', 'tools.interop'):\n"
        "    module = importlib.import_module('moe_lm.' + name)\n"
        "    for item in pkgutil.walk_packages(getattr(module, '__path__', []), module.__name__ + '.'):\n"
        "        importlib.import_module(item.name)\n"
        "assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
