"""Detects scores that min–max scaling makes (nearly) equal, and finds where to clip them.

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
"""the values with a share of all samples below the one and above the other"""

MIDDLE_98, MIDDLE_80 = Decimal("0.01"), Decimal("0.1")
TAILS = (Decimal("0.001"), MIDDLE_98, MIDDLE_80)
"""shares that are left out at each end"""

_LEAST_SAMPLES = 20  # fewer have no middle
_LEAST_SPAN = 0.01  # of the range: a narrower middle is worth an alert
_ENOUGH_UNITS = 1 << 16  # of the middle: with as many, scores that share one differ by nothing
_MOST_SHARED = 0.01  # of the samples of the middle may share a unit with another score


@dataclass(frozen=True, slots=True, kw_only=True)
class Squeezed:
    """A pool whose scores lie in a small part of their range."""

    share: Decimal
    """of the samples, at each end, that the middle leaves out"""
    middle: Ends
    at_low_end: bool
    """whether the smallest score stretches the range more than the largest"""
    clip: Decimal
    """smallest of TAILS that cures it"""


def left_out(n: int, share: Decimal) -> int:
    """ceil(share · n) of n samples: how many lie outside at each end, short of the median."""
    return min(-budget.floor_of(-share, n), (n - 1) // 2)


def places(n: int, share: Decimal) -> tuple[int, int]:
    """Places, 0 = smallest, of the values that bound all but a share of n samples at each end."""
    outside = left_out(n, share)
    return outside, n - 1 - outside


def surely_wide(counts: I64, low: float, high: float) -> bool:
    """Whether the upper halves of the keys alone, (65536,) counts, show that the scores are apart.

    low, high: the extremes.
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
    """Whether n scores from `low` to `high` lie in less than 1% of that range, but for 1% of them
    at each end, or 10% if those in between differ at all. tails: `Ends` of each of TAILS.
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
    """Scaled scores in units of 2⁻⁴⁰, as the ranking sees them, (n,) int64."""
    whole: I64 = np.rint(messages.normalized(scores, low, high) * messages.ONE).astype(np.int64)
    return whole


def few_units(middle: Ends, low: float, high: float) -> bool:
    """Whether distinct scores of the middle must share units: it differs, and has few of them."""
    first, last = units(np.array(middle, np.float32), low, high).tolist()
    return middle[0] < middle[1] and last - first < _ENOUGH_UNITS


def shared_units(scores: F32, middle: Ends, low: float, high: float) -> tuple[I64, I64, F32, F32]:
    """Units of the scores of the middle: which, (u,) ascending; samples, and the smallest and the
    largest score of each. Parts join by `joined`.
    """
    inside = scores[(scores >= np.float32(middle[0])) & (scores <= np.float32(middle[1]))]
    return joined([(units(inside, low, high), np.ones(inside.size, np.int64), inside, inside)])


def joined(parts: Sequence[tuple[I64, I64, F32, F32]]) -> tuple[I64, I64, F32, F32]:
    """Of several parts what `shared_units` finds of all in one piece."""
    unit, samples, least, most = (np.concatenate(column) for column in zip(*parts, strict=True))
    which, at = np.unique(unit, return_inverse=True)
    counts = np.zeros(which.size, np.int64)
    np.add.at(counts, at, samples)
    low, high = np.full(which.size, np.inf, np.float32), np.full(which.size, -np.inf, np.float32)
    np.minimum.at(low, at, least)
    np.maximum.at(high, at, most)
    return which, counts, low, high


def collapsed(found: tuple[I64, I64, F32, F32]) -> tuple[int, int, bool]:
    """Of the samples of the middle those that share a unit with another score, all of them, and
    whether those are too many to rank by.
    """
    _, samples, least, most = found
    shared, total = int(samples[least < most].sum()), int(samples.sum())
    return shared, total, shared > _MOST_SHARED * total
