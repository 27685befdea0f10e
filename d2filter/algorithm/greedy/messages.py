"""Fixed-point scores, edge weights, and the sum of the forward pass.

Scores are int64 in units of 2⁻⁴⁰ (`ONE` is 1.0). Integer sums do not depend on the order of their
terms, so partitions, threads and the order of neighbors cannot change a result.

See docs/method.md#fixed-point-arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, threads

ONE = 2**40
CEILING = 2**61  # of a sum over neighbors
FLOOR = -(2**62)  # scores saturate here; a hub of millions of copies would overflow otherwise

_BLOCK = 1 << 18  # values that a thread takes at a time, with their float64

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


def edge_weights(
    sqdist: F32, gamma: float, kernel: Callable[[F64], F64] = lambda squared: squared
) -> F32:
    """w = float32(exp(−gamma·kernel(float64(d²)))), same shape as `sqdist`, float32 in [0, 1].

    sqdist: float32 ≥ 0, inf where a list is padded (the weight is then 0). The exponential is
    taken in float64: float32 versions differ between libraries in 40% of all values.
    """
    flat = np.ravel(sqdist)
    weights = np.empty(flat.size, np.float32)

    def weigh(some: slice) -> None:
        exponent = flat[some].astype(np.float64)
        padding = np.isinf(exponent)
        exponent[padding] = 0.0
        with np.errstate(over="ignore", under="ignore"):  # a huge gamma: the weight is 0
            weights[some] = np.exp(-gamma * kernel(exponent))
        weights[some][padding] = 0.0

    threads.in_blocks(weigh, flat.size, _BLOCK)
    return weights.reshape(sqdist.shape)


def gather(
    scores: F64, start: npt.NDArray[np.integer], target: npt.NDArray[np.integer], weights: F32
) -> I64:
    """Σ_j rint(w_ij·s'_j·2⁴⁰) over i's out-neighbors, shape (n,) int64, 2⁶¹ at most.

    scores: (n,) float64 in [0, 1]. Edges as CSR: start (n + 1,), target and weights (e,).
    """
    out = np.empty(scores.size, np.int64)

    def gather(some: slice) -> None:
        _gather(scores, start, target, weights, some.start, some.stop, out)

    threads.in_blocks(gather, scores.size, _BLOCK)
    return out


@compiled.njit()
def _gather(scores, start, target, weights, begin, end, out):  # type: ignore[no-untyped-def]
    one = np.float64(ONE)
    for i in range(begin, end):
        total = np.int64(0)
        for e in range(start[i], start[i + 1]):
            term = np.int64(np.rint(np.float64(weights[e]) * scores[target[e]] * one))
            # terms are not negative, so where a hub of millions saturates their order is free, too
            total = min(total + term, np.int64(CEILING))
        out[i] = total
