"""One optimizer step visits at most twelve files, and no call goes upwards in the import contract."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

from moe_lm.config.training import OptimizerConfig
from moe_lm.optim.groups import parameter_groups
from tests.processes import ENVIRONMENT

SCRIPT = Path(__file__).parents[2] / "docs" / "trace_step.py"


def test_a_step_is_read_in_twelve_files_from_the_engine_downwards() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:3] == ["1", "engine/engine.py", "Engine.train_step,"]
    tour = SCRIPT.with_name("tour.md").read_text(encoding="utf-8")
    assert done.stdout in tour, "docs/tour.md shows an older trace; put in what python docs/trace_step.py prints"


def test_a_call_upwards_is_found() -> None:
    """The optimizer's groups take their parameters from a generator of the engine's."""
    script = runpy.run_path(str(SCRIPT))
    parameters, trace = script["tiny_engine"]().trained(), script["Trace"]()
    sys.setprofile(trace)
    list(parameter_groups(parameters, OptimizerConfig()))
    sys.setprofile(None)
    assert trace.upwards[0] == "optim/groups.py calls Engine.trained of engine/engine.py"
