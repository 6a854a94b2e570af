"""What graphics cards usually are: a larger one has faster memory.

Taken where nothing was measured yet. About three quarters of the bandwidth that makers' data sheets
name are reached by decoding: RTX 3060 12 GB 360 GB/s, RTX 4080 16 GB 717 GB/s, RTX 4090 24 GB 1008
GB/s, RTX 6000 Ada 48 GB 960 GB/s, A100 80 GB 2039 GB/s.
"""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["GB", "GIB", "usual_bandwidth", "usual_size"]

GB = 10**9
GIB = 1 << 30

SIZES = (8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)
"""What cards that models are run on, and small groups of them, are sold as having."""

BANDWIDTHS = ((72, 1500e9), (20, 650e9), (14, 400e9), (10, 350e9), (0, 250e9))
"""Bytes per second as they are reached, by the GiB that such a card has at least."""

SIZES_BY_BANDWIDTH = ((1500e9, 80), (1100e9, 32), (550e9, 24), (330e9, 12), (200e9, 8))
"""What a card with as fast a memory is sold as having at least, mostly."""


def usual_bandwidth(size_bytes: int) -> float:
    """Bytes per second at which models are read from the memory of a card of that size."""
    return next(speed for gib, speed in BANDWIDTHS if size_bytes >= gib * GIB * 0.9)


def usual_size(least_bytes: int, bytes_per_second: float | None = None) -> int:
    """
    The least that a card has to give: of the usual sizes, and no less than what is given.

    A card sold as 24 has 24 GiB and counts with 24 GB: a driver and a desktop want some of it.

    Args:
        least_bytes: that it is known to have.
        bytes_per_second: at which models are read there, if that was measured.
    """
    least = float(least_bytes)
    if bytes_per_second is not None:
        fast = (size for speed, size in SIZES_BY_BANDWIDTH if bytes_per_second >= speed)
        least = max(least, next(fast, 0) * GB)
    place = bisect_left(SIZES, least / GIB)
    usual = SIZES[place] * GB if place < len(SIZES) else 0
    return max(usual, round(least))
