"""Detects scores that are (nearly) equal after min–max scaling, and finds where to clip them.

One extreme value (−9999 for "unknown") can make the range so wide that all other scores are equal
after scaling. Everything here is computed from order statistics of the whole pool, through
histograms that add up over parts (`quantile`), so files and partitions cannot change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import budget, quantile
from d2filter.algorithm.greedy import messages

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Ends = tuple[float, float]
"""the two scores that bound all but a share of the samples at each end"""

MIDDLE_98, MIDDLE_80 = Decimal("0.01"), Decimal("0.1")
TAILS = (Decimal("0.001"), MIDDLE_98, MIDDLE_80)
"""shares of the samples that are left out at each end"""

_LEAST_SAMPLES = 20  # smaller pools are not judged
_LEAST_SPAN = 0.01  # share of the range: a narrower middle causes an alert
_ENOUGH_UNITS = 1 << 16  # in a middle with so many units, scores that share a unit hardly differ
_MOST_SHARED = 0.01  # largest share of the middle's samples that may share a unit with other scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Squeezed:
    """A pool whose scores lie in a small part of their range."""

    share: Decimal
    """share of the samples at each end that are outside of the middle"""
    middle: Ends
    at_low_end: bool
    """whether the smallest score widens the range more than the largest"""
    clip: Decimal
    """smallest of TAILS that solves the problem as `--clip-scores`"""


def left_out(n: int, share: Decimal) -> int:
    """ceil(share · n): how many of n samples are left out at each end; never the median."""
    return min(-budget.floor_of(-share, n), (n - 1) // 2)


def places(n: int, share: Decimal) -> tuple[int, int]:
    """Positions, 0 = smallest, of the two scores that bound all but a share of n at each end."""
    outside = left_out(n, share)
    return outside, n - 1 - outside


def surely_wide(counts: I64, low: float, high: float) -> bool:
    """Whether a coarse histogram is enough to show that the scores are far enough apart.

    counts: (65536,), `quantile.upper_counts` of the scores. low, high: the extremes.
    """
    n = int(counts.sum())
    if n < _LEAST_SAMPLES or low == high:
        return True
    spans = []
    for share in (MIDDLE_98, MIDDLE_80):
        first, last = (quantile.locate(counts, place)[0] for place in places(n, share))
        spans.append(quantile.value_of(last, 0) - quantile.value_of(first, 0xFFFF))
    return all(span >= _LEAST_SPAN * (high - low) for span in spans)


def judge(n: int, low: float, high: float, tails: dict[Decimal, Ends]) -> Squeezed | None:
    """Judge n scores from `low` to `high`; None if they are far enough apart.

    They are not if all but 1% of them at each end are in less than 1% of the range, or all but 10%
    at each end, provided that those differ at all. tails: `Ends` for each of TAILS.
    """
    if n < _LEAST_SAMPLES or low == high:
        return None

    def narrow(middle: Ends, whole: Ends) -> bool:
        return middle[1] - middle[0] < _LEAST_SPAN * (whole[1] - whole[0])

    inner = tails[MIDDLE_80]
    share = MIDDLE_80 if inner[0] < inner[1] else MIDDLE_98
    middle = tails[share]
    if not narrow(middle, (low, high)) and not narrow(tails[MIDDLE_98], (low, high)):
        return None
    cures = [tail for tail in TAILS if not narrow(middle, tails[tail])]
    shown = MIDDLE_98 if narrow(tails[MIDDLE_98], (low, high)) else share
    return Squeezed(
        share=shown,
        middle=tails[shown],
        at_low_end=middle[0] - low > high - middle[1],
        clip=cures[0] if cures else MIDDLE_80,
    )


def units(scores: F32, low: float, high: float) -> I64:
    """Normalized scores in units of 2⁻⁴⁰, as the ranking uses them, (n,) int64."""
    whole: I64 = np.rint(messages.normalized(scores, low, high) * messages.ONE).astype(np.int64)
    return whole


def few_units(middle: Ends, low: float, high: float) -> bool:
    """Whether distinct scores of the middle may share a unit: they differ, in few units."""
    first, last = units(np.array(middle, np.float32), low, high).tolist()
    return middle[0] < middle[1] and last - first < _ENOUGH_UNITS


def shared_units(scores: F32, middle: Ends, low: float, high: float) -> tuple[I64, I64, F32, F32]:
    """The units that scores of the middle have, (u,) ascending, and for each unit the number of
    samples, the smallest and the largest score. `joined` combines the results of parts.
    """
    inside = scores[(scores >= np.float32(middle[0])) & (scores <= np.float32(middle[1]))]
    return joined([(units(inside, low, high), np.ones(inside.size, np.int64), inside, inside)])


def joined(parts: Sequence[tuple[I64, I64, F32, F32]]) -> tuple[I64, I64, F32, F32]:
    """Combine the results of `shared_units` for parts of a pool into that for the whole pool."""
    unit, samples, least, most = (np.concatenate(column) for column in zip(*parts, strict=True))
    which, at = np.unique(unit, return_inverse=True)
    counts = np.zeros(which.size, np.int64)
    np.add.at(counts, at, samples)
    low, high = np.full(which.size, np.inf, np.float32), np.full(which.size, -np.inf, np.float32)
    np.minimum.at(low, at, least)
    np.maximum.at(high, at, most)
    return which, counts, low, high


def collapsed(found: tuple[I64, I64, F32, F32]) -> tuple[int, int, bool]:
    """Number of samples in the middle that share a unit with another score, number of all samples
    in the middle, and whether the former is too large for a ranking. found: see `shared_units`.
    """
    _, samples, least, most = found
    shared, total = int(samples[least < most].sum()), int(samples.sum())
    return shared, total, shared > _MOST_SHARED * total
