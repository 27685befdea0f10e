"""Fixed-point scores, edge weights and the forward pass (DESIGN §3, paper §3.2).

Scores are int64 in units of 2⁻⁴⁰ (`ONE` is 1.0). Sums of integers do not depend on the order of
their terms, so neither do the results on partitions, threads or the order of neighbors.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

ONE = 2**40
FLOOR = -(2**62)  # scores saturate here; a hub of millions of copies would overflow otherwise

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def normalized(difficulty: F32, low: float | None = None, high: float | None = None) -> F64:
    """s' = (s − min)/(max − min) in [0, 1], shape (n,) float64; all 1 when max = min.

    difficulty: (n,) float32, finite. `low` and `high` are the extremes of the whole pool where
    `difficulty` is only a part of it.
    """
    s = difficulty.astype(np.float64)
    if s.size == 0:
        return s
    low = float(s.min()) if low is None else low
    high = float(s.max()) if high is None else high
    if high == low:
        return np.ones_like(s)
    return (s - low) / (high - low)


def edge_weights(sqdist: F32, gamma: float) -> F32:
    """w = float32(exp(−gamma·float64(d²))), same shape as `sqdist`, float32 in [0, 1].

    sqdist: float32 ≥ 0, inf where a list is padded (the weight is then 0). The exponential is
    taken in float64: float32 versions differ between libraries in 40% of all values.
    """
    exponent = sqdist.astype(np.float64)
    padding = np.isinf(exponent)
    exponent[padding] = 0.0
    with np.errstate(over="ignore", under="ignore"):  # a huge gamma: the weight is 0
        exponent *= -gamma
        weights = np.exp(exponent, out=exponent).astype(np.float32)
    weights[padding] = 0.0
    return weights


def forward_pass(scores: F64, neighbors: npt.NDArray[np.integer], weights: F32) -> I64:
    """x_i = rint(s'_i·2⁴⁰) + Σ_j rint(w_ij·s'_j·2⁴⁰) over i's out-neighbors, shape (n,) int64.

    scores: (n,) float64 in [0, 1]. neighbors: (n, k) int, −1 pads. weights: (n, k) float32.
    """
    out: I64 = _forward(scores, neighbors, weights)
    return out


@numba.njit(cache=True, nogil=True)
def _forward(scores, neighbors, weights):  # type: ignore[no-untyped-def]  # compiled by numba
    n, k = neighbors.shape
    x = np.empty(n, np.int64)
    one = np.float64(ONE)
    for i in range(n):
        total = np.int64(np.rint(scores[i] * one))
        for c in range(k):
            j = neighbors[i, c]
            if j >= 0:
                total += np.int64(np.rint(np.float64(weights[i, c]) * scores[j] * one))
        x[i] = total
    return x
