"""Decoding beside the limit that the memory's bandwidth sets: every token reads the active weights, or all of them.

One row reads the weights that it passes through. Many rows together read every expert. The limit is those bytes over
the bandwidth that a copy reaches on this device.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from common import begin, median_seconds, synchronise

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.generate.decode import Settings, generate
from moe_lm.kernels import kernels
from moe_lm.model.size import count_parameters
from moe_lm.model.transformer import LanguageModel

HOUSE = Path(__file__).parents[3]

part = begin()


def main() -> None:
    config = load_config(ModelConfig, HOUSE / f"configs/model/{'anchor-20m' if part.tiny else 'deepseekmoe-2b'}.yaml")
    bandwidth = copy_bandwidth(16 if part.tiny else 1024)
    part.note(copy_gb_per_second=round(bandwidth / 1e9, 1))
    with part.device:
        model = LanguageModel(config)
    model.initialise(0)
    model.eval().to(torch.bfloat16)
    kernels.apply(model, kernels.choose(part.device, decoding=True))
    parameters, new = count_parameters(config), 8 if part.tiny else 128
    for rows in (1, 32):
        prompts = [[1 + row] * 16 for row in range(rows)]
        generate(model, prompts, Settings(4))
        synchronise(part.device)
        started = time.perf_counter()
        generate(model, prompts, Settings(new))
        synchronise(part.device)
        speed = rows * new / (time.perf_counter() - started)
        read = 2 * (parameters.active_non_embedding if rows == 1 else parameters.total_non_embedding)
        limit = rows * bandwidth / read
        part.note(
            **{
                f"{rows} rows": {
                    "tokens_per_second": round(speed),
                    "limit": round(limit),
                    "share": round(speed / limit, 4),
                }
            }
        )


def copy_bandwidth(mebibytes: int) -> float:
    """Bytes read and written in a second by a copy."""
    source = torch.empty(mebibytes << 20, dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), part.device, 1.0)


main()
