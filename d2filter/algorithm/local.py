"""Distances in units of how far apart the neighbors of both ends lie: the kernel `local`.

    d²_ij  →  (d²_ij / (σ_i·σ_j))²,    σ_i² = max(d² from i to its k-th neighbor, floor)

Self-tuning clustering (Zelnik-Manor & Perona 2004) divides by the same product. Squared once more,
the weight falls from 1 to 0 within a narrow band, so that a list may be longer than a group of
near-copies is large. A sample that lies alone, a picture with a wrong caption for example, has a
large σ: its few neighbors count as near, and it is thinned like everything else. With one width for
the whole pool nobody would suppress it.

The floor keeps σ from 0 where a list holds copies only. It is half the pool's median.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

FLOOR = 0.5
"""of the median of all reaches"""


def reach(sqdist: F32) -> F32:
    """Squared distance to the last neighbor of each list, (n,) float32; 0 for an empty list.

    sqdist: (n, k) float32, ascending in each row, inf where a list is padded.
    """
    if sqdist.shape[1] == 0:
        return np.zeros(len(sqdist), np.float32)
    last = np.maximum(np.isfinite(sqdist).sum(axis=1) - 1, 0)
    found: F32 = sqdist[np.arange(len(sqdist)), last]
    return np.where(np.isfinite(found), found, np.float32(0))


def floor_of(median_reach: float) -> float:
    """The smallest σ² of a pool whose median reach is this; 1 where all reaches are 0."""
    return FLOOR * median_reach if median_reach > 0 else 1.0


def relative(sqdist: F32, reach_a: F32, reach_b: F32, floor: float) -> F32:
    """(d²/(σ_a·σ_b))² for edges (e,) float32 and the reaches of both ends (e,); same shape. It is
    the same in both directions. inf, a padding, stays.
    """
    least = np.float32(floor)
    sigma = np.maximum(reach_a, least).astype(np.float64) * np.maximum(reach_b, least)
    squared = sqdist.astype(np.float64)
    with np.errstate(over="ignore"):
        found: F32 = (squared * squared / sigma).astype(np.float32)
    return found
