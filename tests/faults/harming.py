"""Damage to files."""

from __future__ import annotations

from pathlib import Path


def flip_a_bit(file: Path, at: float = 0.7) -> None:
    """Flip one bit of the byte at this share of a file."""
    with file.open("r+b") as stream:
        place = int(file.stat().st_size * at)
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 8]))
