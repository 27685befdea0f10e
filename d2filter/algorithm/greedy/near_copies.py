"""Up to which distance two samples are copies of each other.

`--collapse-copies auto` collapses these, and reports count the same ones as near-copies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import quantile
from d2filter.algorithm.greedy import local_kernel

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


def near(sqdist: npt.NDArray[np.float32]) -> float:
    """The threshold of a pool. sqdist: (n, k) float32 lists, ascending in each row, inf where a
    list is padded.
    """
    reach = local_kernel.reach(sqdist)
    return threshold(quantile.middle(reach))
