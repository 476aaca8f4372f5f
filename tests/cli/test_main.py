"""The command line: exit codes, one-line errors, and imports that stay lazy."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest

from moe_lm import __version__
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.tools import doctor
from tests.conftest import MoeLm
from tests.processes import ROOT

VERBS = "quickstart doctor tokenizer prepare pretrain finetune verify import upcycle sample chat eval export".split()


def failing_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)


def test_help_lists_the_verbs_in_the_order_of_the_walk(moe_lm: MoeLm) -> None:
    done = moe_lm("--help")
    assert done.code == 0
    first_words = [line.strip("│ ").split(" ")[0] for line in done.out.splitlines()]
    assert [word for word in first_words if word in VERBS] == VERBS


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS), ["tokenizer", "train"], ["tokenizer", "inspect"]])
def test_short_help_works_at_every_level(verb: list[str], moe_lm: MoeLm) -> None:
    done = moe_lm(*verb, "-h")
    assert done.code == 0
    assert " ".join(["moe-lm", *verb]) in done.out


@pytest.mark.parametrize("verb", [["sample"], ["tokenizer", "train"], ["checkpoint", "list"], ["config", "schema"], []])
def test_help_calls_values_plainly(verb: list[str], moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    done = moe_lm(*verb, "--help")
    assert done.code == 0
    assert not re.search(r"<\w+|[{}]\s|\[\[", done.out)
    if verb == ["sample"]:
        assert re.search(
            r"--top-k +N .*--stop +TEXT.*--dtype +auto\|float32\|bfloat16.*--base +PATH", done.out, re.DOTALL
        )


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("moe-lm pre", ["prepare", "pretrain"]),
        ("moe-lm pretrain x.yaml train.ste", ["train.steps="]),
        ("moe-lm sample runs/x --top", ["--top-k", "--top-p"]),
    ],
)
def test_the_shell_completes_verbs_settings_and_options(
    typed: str, offered: list[str], moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "_MOE_LM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert moe_lm().out.split() == offered


def test_version(moe_lm: MoeLm) -> None:
    assert moe_lm("--version") == (0, f"moe-lm {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["sampel"], ["sample"], ["sample", "run", "-p", "x", "--top-p", "2"], ["pretrain", "--nonsense"], []]
)
def test_wrong_use_exits_2(arguments: list[str], moe_lm: MoeLm) -> None:
    assert moe_lm(*arguments).code == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("bad value"), 2, "error: bad value\n"),
        (MoeLmError("bad luck"), 1, "error: bad luck\n"),
        (ZeroDivisionError("by zero"), 1,
         "internal error: ZeroDivisionError: by zero; run again with --debug for the traceback\n"),
    ],
)  # fmt: skip
def test_error_is_one_line_with_its_exit_code(
    error: Exception, code: int, said: str, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_with(error, monkeypatch)
    assert moe_lm("doctor") == (code, "", said)


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback_before_and_after_the_verb(
    arguments: list[str], moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_with(UsageError("bad value"), monkeypatch)
    done = moe_lm(*arguments)
    assert done.code == 2
    assert done.err.startswith("Traceback (most recent call last):")
    assert done.err.endswith("error: bad value\n")


def test_what_a_terminal_of_ascii_cannot_show_is_written_as_escapes(
    moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> int:
        print("caf\u00e9")
        return 0

    shown = io.BytesIO()
    monkeypatch.setattr(doctor, "run", run)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert moe_lm("doctor").code == 0
    assert shown.getvalue() == b"caf\\xe9\n"


def test_interrupt_is_one_line(moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_with(KeyboardInterrupt(), monkeypatch)
    done = moe_lm("doctor")
    assert (done.code, done.err.strip()) == (130, "interrupted")


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
        "import importlib, importlib.util, pkgutil, sys\n"
        "lacking = () if importlib.util.find_spec('lm_eval') else ('moe_lm.evaluate.harness',)\n"
        "for name in ('tokenizer', 'data', 'generate', 'evaluate', 'tools.interop'):\n"
        "    module = importlib.import_module('moe_lm.' + name)\n"
        "    for item in pkgutil.walk_packages(getattr(module, '__path__', []), module.__name__ + '.'):\n"
        "        item.name in lacking or importlib.import_module(item.name)\n"
        "assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
