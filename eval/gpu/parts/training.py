"""A training run on real text: Python's standard library, or the files of MOE_LM_GPU_TEXT.

It trains for as long as this part may take; `share_of_3e17_flops` says how much of a small reference run that is. The
figure is the held-out text in bits per byte, with the speed and the MFU of the steps.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

from common import begin

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.model.size import flops_per_token
from moe_lm.tools.quickstart.results import metrics

FLOPS = 3e17

part = begin()


def main() -> None:
    run_dir = part.out.with_name("run")
    minutes = 0.1 if part.tiny else part.seconds / 60
    text = os.environ.get("MOE_LM_GPU_TEXT")
    corpus = ["--corpus", text] if text else []
    command = [sys.executable, "-m", "moe_lm", "quickstart", "--minutes", f"{minutes:.2f}", "--run-dir", str(run_dir)]
    done = subprocess.run([*command, *corpus], timeout=max(300.0, 2 * part.seconds), check=False)
    if done.returncode:
        sys.exit(f"the quickstart ended with exit code {done.returncode}")
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    steps = [record for record in metrics(run_dir / "pretrain") if "tokens_per_second" in record]
    config = load_config(PretrainConfig, run_dir / "pretrain/config.yaml")
    flops = summary["pretrain_tokens"] * flops_per_token(config.model, config.data.sequence_length, causal_half=True)
    names = (
        "pretrain_tokens",
        "tokens_per_second",
        "val_bits_per_byte",
        "xz_bits_per_byte",
        "params_total",
        "params_active",
    )
    mfu = [record["mfu"] for record in steps if "mfu" in record]
    part.note(
        **{name: summary[name] for name in names},
        share_of_3e17_flops=round(flops / FLOPS, 6),
        mfu=round(statistics.median(mfu), 4) if mfu else None,
    )


main()
