"""The kernel `local`: scales distances by the distances around both ends of an edge.

    d²_ij  →  (d²_ij / (σ_i·σ_j))²,    σ_i² = max(d² from i to its k-th neighbor, floor)

With one width for the whole pool, no neighbor would lower a sample that is far from everything,
such as an image with a wrong caption. Here such a sample has a large σ, so its neighbors count as
near. Dividing by σ_i·σ_j follows self-tuning clustering (Zelnik-Manor & Perona 2004). The extra
square makes the weight fall from 1 to 0 within a narrow band, so that neighbor lists may be longer
than the groups of near-copies.

The floor, half of the pool's median, keeps σ above 0 if a list contains copies only. `reach` is the
squared distance to the k-th neighbor.

See docs/method.md#local-kernel.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

FLOOR = 0.5
"""smallest σ² as a share of the median reach"""


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
    """The smallest σ² of a pool with this median reach; 1 if the median is 0."""
    return FLOOR * median_reach if median_reach > 0 else 1.0


def relative(sqdist: F32, reach_a: F32, reach_b: F32, floor: float) -> F32:
    """(d²/(σ_a·σ_b))², (e,) float32; equal in both directions of an edge.

    sqdist: (e,) float32, squared distances; inf, which pads, stays inf. reach_a, reach_b: (e,),
    reaches of both ends.
    """
    least = np.float32(floor)
    sigma = np.maximum(reach_a, least).astype(np.float64) * np.maximum(reach_b, least)
    squared = sqdist.astype(np.float64)
    with np.errstate(over="ignore"):
        found: F32 = (squared * squared / sigma).astype(np.float32)
    return found
