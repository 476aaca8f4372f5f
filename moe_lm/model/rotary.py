"""Rotary positions (RoPE, arXiv 2104.09864, equation 34): angles, the rotation, frequencies for long contexts.

Shapes: B rows, S positions, H heads, N head size, R the rotated entries, N or fewer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lm.config.model import ModelConfig, RopeScaling

Angles = tuple[Tensor, Tensor]


class Rotary:
    """The rotation that a config asks for."""

    def __init__(self, config: ModelConfig) -> None:
        self.size = config.rotary_size
        self.theta = config.rope_theta
        self.scaling = config.rope_scaling
        self.strength = attention_factor(config.rope_scaling)

    def angles(self, position_ids: Tensor) -> Angles:
        """Cosine and sine, `[B, S, 1, R/2]` float32, times YaRN's attention factor where there is one."""
        angles = (position_ids[..., None].float() * self.frequencies(position_ids.device))[..., None, :]
        return angles.cos() * self.strength, angles.sin() * self.strength

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position, `[R/2]` float32, computed in the same order as in Hugging Face, to round alike."""
        size, scaling = self.size, self.scaling
        exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
        # Times the inverse, as in Hugging Face: dividing rounds differently; at position 4096 a cosine moves by 2e-4.
        wavelengths = self.theta**exponents  # over 2 pi
        if scaling is None:
            return 1.0 / wavelengths
        if scaling.rope_type == "linear":
            return 1.0 / wavelengths / scaling.factor
        if scaling.rope_type == "llama3":
            return _llama3(1.0 / wavelengths, scaling)
        # Dimensions that turn often within the trained length stay, the others are divided (YaRN, section 3.2).
        kept = 1 - _yarn_ramp(size, self.theta, scaling, device)
        return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def rotate(x_BSHN: Tensor, cos: Tensor, sin: Tensor, interleave: bool = False) -> Tensor:
    """Rotate the first R entries of queries or keys.

    Entry i is paired with entry i + R/2, as in Hugging Face's Llama, or with `interleave` with its neighbour, as in
    DeepSeek. The result holds the first entries of all pairs and then the second ones. That changes no product of a
    query with a key, since both have the same order.
    """
    size = 2 * cos.shape[-1]
    turned, rest = x_BSHN[..., :size].float(), x_BSHN[..., size:]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleave else turned.chunk(2, dim=-1)
    out = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSHN.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def attention_factor(scaling: RopeScaling | None) -> float:
    """The factor on cosine and sine: the square root of YaRN's inverse temperature (arXiv 2309.00071, section 3.4)."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def yarn_mscale(factor: float, weight: float) -> float:
    """`0.1 * weight * ln(factor) + 1`, which grows with the length that is aimed at."""
    return 0.1 * weight * math.log(factor) + 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Wavelengths over `length / low_freq_factor` are stretched, those under `length / high_freq_factor` are not."""
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert length is not None
    wavelengths = 2 * math.pi / frequencies
    share = (length / wavelengths - low) / (high - low)  # 0 and less: stretched; 1 and more: as it is
    between = (1 - share) * frequencies / scaling.factor + share * frequencies
    slow, fast = wavelengths > length / low, wavelengths < length / high
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, between))


def _yarn_ramp(size: int, theta: float, scaling: RopeScaling, device: torch.device) -> Tensor:
    """0 for dimensions that keep their frequency, 1 for those that are divided by the factor, a line between."""
    length = scaling.original_max_position_embeddings
    assert length is not None

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns this many times within the trained length."""
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    places = torch.arange(size // 2, device=device, dtype=torch.float32)
    return ((places - low) / (high - low if high != low else 0.001)).clamp(0, 1)
