"""`--collapse-copies auto`: up to which distance two samples are copies of each other."""

from __future__ import annotations

import numpy as np

SHARE = 1 / 20
"""of the pool's median squared distance to the k-th neighbor"""


def threshold(median_reach: float) -> float:
    """The squared distance up to which neighbors are copies, a float32.

    It is less than a quarter of the distance to a typical k-th neighbor: nobody would tell the two
    apart, and what a pool of no copies has within it by chance is a few in a thousand. Real pools
    show no gap to cut at: from exact copies on, distances grow without a break.

    median_reach: median over the pool of the squared distance to the last neighbor of a list; 0
    gives 0, exact copies alone.
    """
    return float(np.float32(SHARE * median_reach))
