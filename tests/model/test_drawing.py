"""Numbers by position: any range alone, the same bits everywhere, and distributed as they should be."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from moe_lm.model.drawing import fill_normal, fill_uniform, lines_of, normal_of

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 1 << 20
NEVER = 4.9  # standard deviations of an estimate; beyond them once in a million times
PROGRAM = """
import sys, torch
from moe_lm.model.drawing import fill_normal
out = torch.empty(100_000)
fill_normal(out, 0.02, "7/known", 12_345)
sys.stdout.buffer.write(out.numpy().tobytes())
"""


def normal(key: str, count: int = COUNT, first: int = 0) -> Tensor:
    out = torch.empty(count)
    fill_normal(out, 1.0, key, first)
    return out


def uniform(key: str, count: int = COUNT, first: int = 0) -> Tensor:
    out = torch.empty(count)
    fill_uniform(out, 1.0, key, first)
    return out


def by_hand(key: str, index: int) -> int:
    """The signed 32 bits of one element, in integers of Python alone."""
    digest = hashlib.sha256(key.encode()).digest()
    seed, stride = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little") | 1
    z = (seed + stride * (index // 2)) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    half = z >> 32 if index % 2 else z % 2**32
    return half - 2**32 if half >= 2**31 else half


def test_an_element_is_splitmix64_of_key_and_index_through_the_inverse_of_the_normal_distribution() -> None:
    for first in (0, 2**31 - 3, 2**33 + 4):
        numbers, shares = normal("3/a", 6, first).tolist(), uniform("3/a", 6, first).tolist()
        for place, (number, share) in enumerate(zip(numbers, shares, strict=True)):
            bits = by_hand("3/a", first + place)
            tail = ((bits & 0x7FFFFFFF) + 0.5) / 2**32
            assert number == pytest.approx(math.copysign(NormalDist().inv_cdf(tail), bits), abs=2e-6)
            assert share == pytest.approx(bits / 2**31, abs=1e-7)


@pytest.mark.parametrize("draw", [normal, uniform])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (7, 100_000), (32_767, 3), (65_536, 70_000), (5, 0)])
def test_a_range_drawn_alone_has_the_numbers_of_the_whole(
    draw: Callable[[str, int, int], Tensor], first: int, count: int
) -> None:
    assert torch.equal(draw("k", count, first), draw("k", 150_000, 0)[first : first + count])


def test_shape_stride_and_data_type_do_not_change_the_numbers() -> None:
    expected = normal("k", 3 * 40_000 * 2).view(3, 40_000, 2)
    stack = torch.full((3, 40_000, 5), math.nan)
    fill_normal(stack[..., :2], 1.0, "k")
    assert torch.equal(stack[..., :2], expected)
    assert bool(stack[..., 2:].isnan().all())
    rounded = torch.empty(3, 40_000, 2, dtype=torch.bfloat16)
    fill_normal(rounded, 1.0, "k")
    assert torch.equal(rounded, expected.bfloat16())
    fill_normal(one := torch.empty(()), 1.0, "k")
    assert one == expected[0, 0, 0]


def test_the_bits_do_not_depend_on_threads_and_vector_instructions() -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
    other = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, check=True).stdout
    expected = torch.empty(100_000)
    fill_normal(expected, 0.02, "7/known", 12_345)
    assert other == expected.numpy().tobytes()


def test_normal_numbers_have_the_moments_tails_and_distribution_of_the_normal_distribution() -> None:
    x = normal("moments").double()
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}.items():
        assert abs((x**power).mean() - moment) < NEVER * math.sqrt(variance / COUNT), power
    for far in (1, 2, 3, 4):
        share = math.erfc(far / math.sqrt(2))
        assert abs((x.abs() > far).double().mean() - share) < NEVER * math.sqrt(share / COUNT)
    steps = torch.arange(1, COUNT + 1) / COUNT
    assert (torch.special.ndtr(x.sort().values) - steps).abs().max() < 2.7 / math.sqrt(COUNT)  # Kolmogorov and Smirnov


def test_the_farthest_numbers_are_finite_and_symmetric() -> None:
    bits = torch.tensor([0, 1, 2**31 - 1, -(2**31), -(2**31) + 1, -1], dtype=torch.int32)
    numbers = normal_of(bits, lines_of(bits.device))
    assert torch.equal(numbers[:3], -numbers[3:])
    assert numbers[:3].tolist() == pytest.approx([6.338, 6.166, 0], abs=1e-3)


def test_uniform_numbers_are_uniform() -> None:
    x = uniform("u").double()
    assert x.abs().max() <= 1
    assert abs(x.mean()) < NEVER * math.sqrt(1 / 3 / COUNT)
    steps = torch.arange(1, COUNT + 1) / COUNT
    assert ((x.sort().values + 1) / 2 - steps).abs().max() < 2.7 / math.sqrt(COUNT)


@pytest.mark.parametrize(("key", "other", "shift"), [
    ("1/a", "1/a", 1), ("1/a", "1/a", 2), ("1/a", "1/a", 64), ("1/a", "1/a", 4096),
    ("1/a", "2/a", 0), ("1/a", "1/b", 0), ("1/layers.1.q", "1/layers.2.q", 0),
])  # fmt: skip
def test_neighbours_names_and_seeds_are_uncorrelated(key: str, other: str, shift: int) -> None:
    """Neither the numbers nor their squares are."""
    x, y = normal(key), normal(other, first=shift)
    for a, b in ((x, y), (x**2 - 1, y**2 - 1), (x, y**2 - 1)):
        assert abs((a * b).mean() / (a.std() * b.std())) < NEVER / math.sqrt(COUNT)
