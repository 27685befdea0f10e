"""Would wrong pairs be kept? Captions of a few samples are swapped in a copy of the pool.

A hash of the uid chooses samples; each gets the text half of another chosen one, the score that its
new halves deserve, and its true nearest neighbors. Ranking the pool with these in the place of
their originals tells at what rate a setting keeps pairs that are wrong for certain: noise measured
on the pool itself. The pool and its ranking are not touched.

Needed are features of two halves, image and text, and a difficulty that is a linear function of
their cosine; whether it is one is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features, uids
from d2filter.algorithm.knn import exact_lists, search
from d2filter.algorithm.measures import intervals
from d2filter.algorithm.methods import baselines
from d2filter.algorithm.scores import registry as scores

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SHARE = 100  # one sample in so many is swapped
FEWEST, MOST = 300, 3000
LEAST = 20  # swapped pairs that can be measured
CORRELATION = 0.98  # of cosine and difficulty, either sign, at least
_BLOCK = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """difficulty ≈ slope · cosine + intercept."""

    slope: float
    intercept: float
    correlation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spliced:
    """A pool with some captions swapped, rows ascending by uid."""

    rows: features.F16
    """(n, d)"""
    difficulty: F32
    neighbors: I64
    """(n, k)"""
    sqdist: F32
    """(n, k)"""
    swapped: I64
    """(m,) rows whose caption is another's"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How many of some samples are kept, with its 95% interval (Wilson)."""

    kept: float
    low: float
    high: float


def cosines(rows: features.F16) -> F32:
    """Cosine of the two halves of each row, (n,) float32. rows: (n, d), d even."""
    half = rows.shape[1] // 2
    out = np.empty(len(rows), np.float32)
    for begin in range(0, len(rows), _BLOCK):
        some = rows[begin : begin + _BLOCK]
        out[begin : begin + _BLOCK] = scores.clip_score(some[:, :half], some[:, half:])
    return out


def fit(cosine: F32, difficulty: F32) -> Line:
    """The line of least squares, and how well it fits; a correlation of 0 where either is constant.

    cosine, difficulty: (n,), finite.
    """
    x, y = cosine.astype(np.float64), difficulty.astype(np.float64)
    dx, dy = x - x.mean(), y - y.mean()
    xx, yy, xy = float(dx @ dx), float(dy @ dy), float(dx @ dy)
    if xx == 0 or yy == 0:
        return Line(slope=0.0, intercept=float(y.mean()), correlation=0.0)
    slope = xy / xx
    return Line(
        slope=slope,
        intercept=float(y.mean() - slope * x.mean()),
        correlation=xy / math.sqrt(xx * yy),
    )


def choose(rows: features.F16, hi: uids.U64, lo: uids.U64, near: float) -> tuple[I64, I64]:
    """Rows to swap, and for each the row whose text it gets, (m,) both.

    One in SHARE, at least FEWEST, at most MOST and a tenth of the pool, which is to stay what it
    is. They form a ring in the order of a hash; those whose image or text is nearly that of the
    next one (squared distance of at most `near`) are left alone: their caption would still be
    right. rows: (n, d), ascending by uid.
    """
    n, half = len(hi), rows.shape[1] // 2
    size = min(MOST, max(FEWEST, n // SHARE), n // 10)
    chosen = uids.hash_sample(hi, lo, size, salt=uids.SALT_SELFCHECK)
    key = uids.hashed(hi[chosen], lo[chosen], salt=uids.SALT_SELFCHECK, seed=1)
    ring = chosen[np.argsort(key, kind="stable")]
    partner = np.roll(ring, -1)
    gap = np.square(rows[ring].astype(np.float64) - rows[partner].astype(np.float64))
    apart = np.minimum(gap[:, :half].sum(axis=1), gap[:, half:].sum(axis=1)) > near
    order = np.argsort(ring[apart], kind="stable")
    return ring[apart][order], partner[apart][order]


def splice(
    rows: features.F16, difficulty: F32, neighbors: I64, sqdist: F32, swapped: I64, partner: I64,
    line: Line,
) -> Spliced:  # fmt: skip
    """The pool with the text halves of `partner` in `swapped`. Nothing is modified.

    Their difficulty is what `line` makes of their cosine, within the range of the pool, so that
    other scores keep their scale. Their lists are exact. Lists of others lose the originals and get
    those of the swapped ones that are nearer than what they hold; a list that lost one may be one
    short. neighbors, sqdist: (n, k).
    """
    n, k = neighbors.shape
    half = rows.shape[1] // 2
    new = rows.copy()
    new[swapped, half:] = rows[partner, half:]
    scored = np.float64(line.slope) * cosines(new[swapped]) + line.intercept
    hard = difficulty.copy()
    hard[swapped] = np.clip(scored, difficulty.min(), difficulty.max()).astype(np.float32)
    moved = np.zeros(n, np.bool_)
    moved[swapped] = True
    gone = (neighbors < 0) | moved[neighbors]
    # what stays, in its order, and padding behind it
    order = np.argsort(gone, axis=1, kind="stable")
    held = exact_lists.Lists(
        numbers=np.take_along_axis(np.where(gone, -1, neighbors), order, axis=1),
        sqdist=np.take_along_axis(
            np.where(gone, np.float32(np.inf), sqdist), order, axis=1
        ),
    )  # fmt: skip
    everyone = np.arange(n, dtype=np.int64)
    near = search.search_all(new[swapped], swapped, new, everyone, k, n)
    exact_lists.merge_inplace(held, everyone, near, everyone, n)
    own = search.search_all(new, everyone, new[swapped], swapped, k, n)
    held.numbers[swapped], held.sqdist[swapped] = own.numbers, own.sqdist
    return Spliced(
        rows=new, difficulty=hard, neighbors=held.numbers, sqdist=held.sqdist, swapped=swapped
    )


def rate(rank: I64, swapped: I64, size: int) -> Rate:
    """How many of the swapped rows are among the first `size` of a ranking. rank: (n,)."""
    hits = int((rank[swapped] < size).sum())
    low, high = wilson(hits, swapped.size)
    return Rate(kept=hits / swapped.size, low=low, high=high)


def rank_by_score(difficulty: F32, hi: uids.U64, lo: uids.U64) -> I64:
    """Ranks by the difficulty alone, (n,) int64."""
    return np.argsort(baselines.by_score(difficulty, hi, lo), kind="stable").astype(np.int64)


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share; of ≥ 1."""
    return intervals.wilson(hits / of, of)
