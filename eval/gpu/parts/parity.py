"""`moe-lm verify` on the device: every layout that its number of devices allows, in float32."""

from __future__ import annotations

import json
import subprocess
import sys

from common import begin

part = begin()
world = [] if part.device.type == "cuda" else ["--world-sizes", "1"]
done = subprocess.run(
    [
        *(sys.executable, "-m", "moe_lm", "verify", "configs/pretrain/deepseekmoe-2b.yaml", "--quick", "--json", "-"),
        *(f"parallel.device={part.device.type}", *world),
    ],
    stdout=subprocess.PIPE,
    text=True,
    timeout=2 * part.seconds,
    check=False,
)
if not done.stdout.startswith("{"):
    sys.exit(f"moe-lm verify ended with exit code {done.returncode}")
report = json.loads(done.stdout)
part.note(ok=report["ok"], tolerance=report["tolerance"], seconds=report["seconds"], layouts=report["layouts"])
if not report["ok"]:
    sys.exit("a layout is not like one process: see the log")
