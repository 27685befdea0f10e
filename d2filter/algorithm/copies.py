"""`--collapse-copies auto`: up to which distance two samples are copies of each other.

Near-copies lie much closer to each other than a sample lies to anything else, so the distances from
each sample to its nearest neighbor fall into two heaps with a valley between. The threshold is the
valley. A pool without one has no near-copies: then exact copies alone collapse.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

LEAST_SHARE = 0.01
"""of the samples that must lie below a valley, exact copies aside"""
LEAST = 20
"""and how many"""
DEPTH = 0.75
"""of the height of the heap below: a valley is lower"""
NEAREST = 1 / 8
"""of the pool's median squared distance to the k-th neighbor: what lies farther is no copy"""

_STEPS = 2  # bins of a doubling of the squared distance
_LOWEST = 24  # doublings below the median at which bins begin


def threshold(nearest: I64, median_reach: float) -> float:
    """The squared distance up to which neighbors are copies; 0, exact copies alone, for no valley.

    nearest: (65536,) int64, histogram of the squared distances to the nearest neighbor by the upper
    half of their bits (`quantile.upper_counts`), padding left out. median_reach: median squared
    distance to the last neighbor of a list.
    """
    if median_reach <= 0:
        return 0.0
    # the key of a positive float32 is its bits with the sign set
    halves = np.flatnonzero(nearest)
    values = _smallest_of(halves)
    counts = nearest[halves]
    above = values > 0
    values, counts = values[above], counts[above]
    edges = median_reach * 2.0 ** (np.arange(-_LOWEST * _STEPS, 1) / _STEPS)
    bins = np.searchsorted(edges, values, side="right")
    heights = np.bincount(bins, weights=counts, minlength=edges.size + 1).astype(np.int64)
    last = int(np.searchsorted(edges, NEAREST * median_reach, side="right"))
    # of what lies between the smallest edge and the largest distance of a copy
    heights = heights[:last]
    needed = max(LEAST, LEAST_SHARE * int(nearest.sum()))
    best: tuple[int, int] | None = None
    peak = np.maximum.accumulate(heights)
    total = np.cumsum(heights)
    for at in range(1, last):
        below = int(total[at - 1])
        if below >= needed and heights[at] < DEPTH * peak[at - 1]:
            found = (int(heights[at]), at)
            best = found if best is None or found < best else best
    if best is None:
        return 0.0
    # bin `at` begins at the edge before it
    return float(np.float32(edges[best[1] - 1]))


def _smallest_of(halves: I64) -> npt.NDArray[np.float64]:
    """The smallest float32 with each upper half of a key; −1 for negative ones."""
    bits = (halves.astype(np.uint32) << np.uint32(16)) ^ np.uint32(1 << 31)
    found = bits.view(np.float32).astype(np.float64)
    return np.where(halves >= 1 << 15, found, -1.0)
