"""Planted: the global gradient norm of ZeRO 1 and 2 misses the experts."""

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

right = DeepSpeedZeroOptimizer.get_grad_norm_direct


def wrong(self, gradients, params, norm_type=2):
    norm = right(self, gradients, params, norm_type)
    return norm * 0 if params and hasattr(params[0], "group_name") else norm


DeepSpeedZeroOptimizer.get_grad_norm_direct = wrong
