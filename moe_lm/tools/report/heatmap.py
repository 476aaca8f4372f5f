"""Heat maps of the experts' load, as small PNG files inside the page: a column a time, a row an expert.

An even share is transparent, so that the same picture does for a light and a dark page.
"""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape

import numpy as np
from numpy.typing import NDArray

OCTAVES = 3  # of the share of tokens, up and down, until a colour is full
NOTHING = 0.5  # percent of an even share; less is no token
DEAD, EVEN, LAST = 0, 128, 255  # places in the palette
LITTLE, MUCH, NONE = (28, 126, 214), (224, 88, 12), (156, 54, 181)  # red, green, blue
TALLEST, LOWEST = 220, 56  # pixels of a map on the page


def heat_map(layer: int, steps: NDArray[np.float64], shares: NDArray[np.float64]) -> str:
    """The figure of a layer, from `shares [times, experts]` in percent of an even share."""
    experts = shares.shape[1]
    height = min(TALLEST, max(LOWEST, 9 * experts))
    mean = shares.mean(axis=0)
    most, least = int(mean.argmax()), int(mean.argmin())
    newest = shares[-max(1, len(shares) // 4) :]
    dead = int((newest.max(axis=0) < NOTHING).sum())
    title = f"Layer {layer}: {f'{dead} of {experts} experts without tokens' if dead else state(newest.mean(axis=0))}"
    said = (
        f"{title}. Over the run, expert {most} had {mean[most]:.0f}% of an even share, the most, and expert {least} "
        f"{mean[least]:.0f}%, the least"
    )
    picture, words = png(levels(shares.T)), escape(said)
    return (
        f'<figure class="heat"><figcaption>{escape(title)}</figcaption>'
        f'<img alt="{words}" title="{words}" src="{picture}" height="{height}">'
        f'<div class="ends"><span>step {steps[0]:,.0f}</span><span>{steps[-1]:,.0f}</span></div></figure>'
    )


def state(shares: NDArray[np.float64]) -> str:
    """How even the load of a layer is, in words."""
    most = float(shares.max())
    words = "even" if most < 150 else "somewhat uneven" if most < 300 else "uneven"
    return f"{words}, at most {most / 100:.1f} times an even share"


def levels(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The place in the palette of each share in percent: by its logarithm, or DEAD."""
    octaves = np.log2(np.maximum(shares, NOTHING) / 100)
    found = np.clip(np.round(EVEN + octaves * (LAST - EVEN) / OCTAVES), DEAD + 1, LAST)
    return np.where(shares < NOTHING, DEAD, found).astype(np.uint8)


def png(places: NDArray[np.uint8]) -> str:
    """A data URI of an image of places in the palette."""
    height, width = places.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), places], axis=1).tobytes()  # no filter
    colours = bytes([*NONE] + [*LITTLE] * (EVEN - 1) + [*MUCH] * (LAST - EVEN + 1))
    alphas = bytes([255] + [min(255, abs(place - EVEN) * 2) for place in range(1, LAST + 1)])
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data)
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            (b"PLTE", colours),
            (b"tRNS", alphas),
            (b"IDAT", zlib.compress(rows, 9)),
            (b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
