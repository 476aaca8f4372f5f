"""An exponential moving average of the weights, kept beside an optimizer's moments."""

from __future__ import annotations

from typing import Any

import torch

EMA, STEPS = "ema", "ema_steps"  # among the states of a parameter


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Average each parameter over the steps that this optimizer takes; a step of age a weighs `decay**a`.

    The weights are those after a step, and their shares add up to 1 from the first step on:
    `ema_n = ema_(n-1) + (1 - decay) / (1 - decay**n) * (weights_n - ema_(n-1))`, which is Adam's correction of a moment
    that begins at 0 (arXiv 1412.6980, section 3).
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter][EMA] = torch.zeros_like(parameter)
            optimizer.state[parameter][STEPS] = torch.zeros((), dtype=torch.float32)  # on the host, which reads it

    @torch.no_grad()
    def add(*_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                state[STEPS] += 1
                share = (1 - decay) / (1 - decay ** float(state[STEPS]))
                state[EMA].lerp_(parameter, share)

    optimizer.register_step_post_hook(add)
