"""Random numbers by position: element `i` of what `key` names is a function of `(key, i)` alone.

So any range can be drawn by whoever keeps it, on whatever device, and the numbers are the same. They are the same to
the last bit, for any number of threads, vector instructions or kind of device: beside integers, only operations that
IEEE 754 rounds exactly are used.

A pair of elements is one output of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, with the finalizer "variant 13" of
Stafford), 32 bits for each, as low and high half.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Pairs drawn at once. On a CPU their intermediate results stay in a core's cache; to share so few among threads is not
# worth it, and torch does not.
PAIRS, PAIRS_OF_DEVICE = 1 << 14, 1 << 23
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # shift and factor of the finalizer

# The inverse of the normal distribution is taken from a table: quantiles at knots, and straight lines between them. The
# top bit of a draw is the sign; the others, m, say how far out: the number with the tail probability
# (m + 1/2) / 2^32 behind it. So it is symmetric, and at most 6.34. The knots are float32 numbers with this many bits
# of mantissa, from m + 1/2 = 2^-1 to 2^31: the lines are within 1e-6 of the quantiles, far out too.
KNOT_BITS = 8
FIRST_KNOT, LAST_KNOT = 126, 158  # exponents of float32, biased


def fill_normal(tensor: Tensor, std: float, key: str, first: int = 0) -> None:
    """Fill a tensor with normal numbers of mean 0: the elements of `key` from number `first` on, in row-major order.

    The tensor may be any with rows of one stride, such as half the columns of a matrix; every data type starts from the
    same float32 numbers.
    """
    lines = lines_of(tensor.device)
    for part, bits in _by_parts(tensor, key, first):
        part.copy_(normal_of(bits, lines).mul_(std).view_as(part))


def fill_uniform(tensor: Tensor, bound: float, key: str, first: int = 0) -> None:
    """Fill a tensor with numbers that are uniform from `-bound` to `bound`, otherwise as `fill_normal` does."""
    for part, bits in _by_parts(tensor, key, first):
        part.copy_(bits.to(torch.float32).mul_(bound / 2**31).view_as(part))


def _by_parts(tensor: Tensor, key: str, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time with the bits of their elements."""
    width = 1 if tensor.is_contiguous() else tensor.shape[-1]
    rows, source = tensor.detach().view(-1, width), Source.of(key)
    step = max(1, 2 * (PAIRS if tensor.is_cpu else PAIRS_OF_DEVICE) // width)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        yield part, source.bits(first + start * width, part.numel(), tensor.device)


class Source(NamedTuple):
    """The bits that a key names: SplitMix64 with a seed and a stride of its own."""

    seed: int
    stride: int

    @classmethod
    def of(cls, key: str) -> Source:
        digest = hashlib.sha256(key.encode()).digest()
        seed, stride = (int.from_bytes(word, "little", signed=True) for word in (digest[:8], digest[8:16]))
        return cls(seed, stride | 1)

    def bits(self, first: int, count: int, device: torch.device) -> Tensor:
        """32 random bits for each of the elements from `first` on, `[count]` int32."""
        pair, end = first // 2, (first + count + 1) // 2
        z = torch.arange(pair, end, device=device).mul_(self.stride).add_(self.seed)
        shifted = torch.empty_like(z)
        for shift, factor in ROUNDS:
            torch.bitwise_right_shift(z, shift, out=shifted)
            z.bitwise_xor_(shifted.bitwise_and_((1 << 64 - shift) - 1))  # as unsigned numbers are shifted
            if factor != 1:
                z.mul_(factor - (1 << 64))
        return z.view(torch.int32)[first - 2 * pair :][:count]


class Lines(NamedTuple):
    """A straight line `base + slope * x` from each knot to the next."""

    base: Tensor
    slope: Tensor


@functools.cache
def lines_of(device: torch.device) -> Lines:
    shift = 23 - KNOT_BITS
    bits = torch.arange(FIRST_KNOT << KNOT_BITS, (LAST_KNOT << KNOT_BITS) + 1, dtype=torch.int32) << shift
    knots = bits.view(torch.float32).double()
    quantiles = -torch.special.ndtri(knots / 2**32)
    slope = quantiles.diff() / knots.diff()
    base = quantiles[:-1] - slope * knots[:-1]
    # Of the last knot, the median: m + 1/2 is rounded to it.
    return Lines(*(torch.cat((column, column.new_zeros(1))).float().to(device) for column in (base, slope)))


def normal_of(bits: Tensor, lines: Lines) -> Tensor:
    x = (bits & 0x7FFFFFFF).to(torch.float32).add_(0.5)
    knot = (x.view(torch.int32) >> 23 - KNOT_BITS).sub_(FIRST_KNOT << KNOT_BITS)
    # Not `addcmul`: some devices round it once, and others twice.
    size = lines.slope.index_select(0, knot).mul_(x).add_(lines.base.index_select(0, knot))
    sign = bits.bitwise_and(-(1 << 31))
    return size.view(torch.int32).bitwise_xor_(sign).view(torch.float32)
