"""Soft selection: computes how often each sample is repeated, from its score.

Soft cap sampling (M-FLYT, Shechter & Carmon 2025, arXiv 2503.08805) repeatedly draws samples, with
the softmax of their logits as probabilities, and lowers the logit of each drawn sample. In the
limit of small steps the number of copies e of a sample with score s obeys de/dt = softmax(s/τ − e).
The solution is

    e = log(1 + u·exp(s/τ)),   u such that Σ e is the budget.

A score that is higher by τ is worth about one more copy; low scores get a fraction of a copy.
Systematic resampling in the order of a hash of the uid turns e into whole numbers: each sample gets
e rounded down or up, and the sum is the budget.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features, uids
from d2filter.errors import UsageError

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

ONE = 2**20
"""1 expected copy; expected copies are integers, so that the order of a sum does not matter"""
MOST = 2**31 - 1  # largest budget: its square fits into int64
_BLOCK = 1 << 20


def scaled(scores: npt.NDArray[np.generic]) -> F64:
    """Scores of n ≥ 1 samples, scaled to [0, 1], (n,) float64; all 1 if they are equal."""
    wide = scores.astype(np.float64)
    low, high = wide.min(), wide.max()
    return np.ones_like(wide) if high == low else (wide - low) / (high - low)


def expected(scores: F64, size: int, temperature: float) -> I64:
    """Expected copies of each sample in units of 2⁻²⁰, (n,) int64: e for the smallest u with a sum
    of at least `size`.

    scores: (n,) in [0, 1], n ≥ 1. Raises UsageError for a temperature outside 0.001 to 1000, and a
    size outside 1 to 2³¹ − 1.
    """
    if not 0.001 <= temperature <= 1000:
        raise UsageError(
            f"soft is {temperature}, allowed is a temperature of 0.001 to 1000: how much of the "
            "range of scores is worth one more copy"
        )
    if not 1 <= size <= MOST:
        raise UsageError(f"a soft selection keeps 1 to {MOST:,} samples, the budget is {size:,}")
    odds = np.exp((scores - 1) / temperature)

    def copies(u: float, some: slice) -> I64:
        with np.errstate(over="ignore"):
            units: I64 = np.rint(np.log1p(u * odds[some]) * ONE).astype(np.int64)
        return units

    blocks = [slice(begin, begin + _BLOCK) for begin in range(0, odds.size, _BLOCK)]
    # bisect the bits of u: positive doubles have the order of their bits, and the sum grows with u
    low, high = 0, int(np.float64(1e300).view(np.int64))
    while low + 1 < high:
        middle = (low + high) // 2
        u = float(np.int64(middle).view(np.float64))
        if sum(int(copies(u, some).sum()) for some in blocks) >= size * ONE:
            high = middle
        else:
            low = middle
    u = float(np.int64(high).view(np.float64))
    return np.concatenate([copies(u, some) for some in blocks])


def resampled(wanted: I64, hi: uids.U64, lo: uids.U64, size: int) -> I64:
    """Copies of each sample, (n,) int64, `size` in all (systematic resampling).

    The samples are in the order of a hash of the uid, and e is summed in this order. Each time the
    sum reaches a multiple of Σ e/size, the sample gets a copy.

    wanted: (n,) e in any unit, at least one above 0. hi, lo: (n,) uint64.
    """
    order = np.lexsort((lo, hi, uids.hashed(hi, lo, salt=uids.SALT_SOFT)))
    running = np.cumsum(wanted[order])
    whole, rest = divmod(int(running[-1]), size)
    turn = np.arange(1, size + 1, dtype=np.int64)
    # the multiples, rounded up; the last one is the sum itself
    marks = turn * whole - (-(turn * rest) // size)
    reached = np.searchsorted(marks, running, side="right")
    out = np.empty(wanted.size, np.int64)
    out[order] = np.diff(reached, prepend=0)
    return out


def copies(
    scores: npt.NDArray[np.generic], hi: uids.U64, lo: uids.U64, size: int, temperature: float
) -> I64:
    """Copies of each of n ≥ 1 samples, (n,) int64, `size` in all, in any order of samples.

    scores: (n,) finite, higher is better. Raises UsageError like `expected`.
    """
    return resampled(expected(scaled(scores), size, temperature), hi, lo, size)


def copies_by_class(
    scores: npt.NDArray[np.generic],
    hi: uids.U64,
    lo: uids.U64,
    group: I64,
    quota: I64,
    temperature: float,
) -> I64:
    """Copies of each of n samples, (n,) int64: `copies` for each class separately.

    group: (n,) classes from 0. quota: (classes,) number of copies for each class; a class without
    samples gets none. Scores are scaled within a class.
    """
    out = np.zeros(group.size, np.int64)
    start, by_class = features.bucketed(group, quota.size)
    for number in np.flatnonzero((quota > 0) & (np.diff(start) > 0)).tolist():
        rows = by_class[start[number] : start[number + 1]]
        out[rows] = copies(scores[rows], hi[rows], lo[rows], int(quota[number]), temperature)
    return out
