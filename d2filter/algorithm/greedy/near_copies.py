"""Computes the distance up to which two samples are near-copies.

`--collapse-copies auto` and the reports use this distance.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import quantile
from d2filter.algorithm.greedy import local_kernel

SHARE = 1 / 20
"""threshold as a share of the pool's median squared distance to the k-th neighbor"""


def threshold(median_reach: float) -> float:
    """The squared distance up to which neighbors are near-copies, a float32.

    As a distance it is less than a quarter of the distance to a typical k-th neighbor: people do
    not see a difference between such samples, and in a pool without copies only a few in a thousand
    are this close by chance. Real pools have no gap at which to cut: beyond exact copies, distances
    grow without a break.

    median_reach: median over the pool of the squared distance to the last neighbor of a list; 0
    gives 0, so that only exact copies count.
    """
    return float(np.float32(SHARE * median_reach))


def near(sqdist: npt.NDArray[np.float32]) -> float:
    """The threshold of a pool.

    sqdist: (n, k) float32 lists, ascending in each row, inf where a list is padded.
    """
    reach = local_kernel.reach(sqdist)
    return threshold(quantile.middle(reach))
