"""Self-check: swaps captions in a copy of the pool and measures how many of these pairs are kept.

A hash of the uid chooses samples. Each gets the text half of another chosen sample, the score that
follows from its new halves, and its exact nearest neighbors. These samples replace their originals
and the copy is ranked. The share of them that a budget keeps is the rate at which a setting keeps
pairs that are certainly wrong. The pool and its ranking do not change.

The self-check needs features with an image and a text half, and a difficulty that is a linear
function of their cosine. `fit` measures whether it is.
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

SHARE = 100  # one of this many samples is swapped
FEWEST, MOST = 300, 3000  # swapped samples
LEAST = 20  # fewest swapped pairs on which a rate is measured
CORRELATION = 0.98  # least correlation of cosine and difficulty, of either sign
_BLOCK = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """difficulty ≈ slope · cosine + intercept."""

    slope: float
    intercept: float
    correlation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spliced:
    """A copy of a pool with some captions swapped; rows ascend by uid."""

    rows: features.F16
    """(n, d)"""
    difficulty: F32
    neighbors: I64
    """(n, k)"""
    sqdist: F32
    """(n, k)"""
    swapped: I64
    """(m,) rows that have the caption of another sample"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The share of some samples that is kept, with its 95% interval (Wilson)."""

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
    """The least-squares line and its correlation, which is 0 if either array is constant.

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

    One sample in SHARE is swapped, at least FEWEST and at most MOST; never more than a tenth of the
    pool, so that the copy stays similar to the pool. The chosen samples form a ring in the order of
    a hash, and each gets the text of the next one. A sample is left out if its image or its text is
    nearly that of the next one (squared distance of at most `near`), because its new caption would
    be right. rows: (n, d), ascending by uid.
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
    """A copy of the pool in which rows `swapped` have the text halves of rows `partner`. The
    arguments are not modified.

    `line` maps the cosine of a swapped row to its difficulty, which is clipped to the range of the
    pool so that other scores keep their scale. Lists of swapped rows are exact. From the lists of
    other rows the originals are removed, and swapped rows that are near enough are added; a list
    that lost an entry may stay shorter. neighbors, sqdist: (n, k).
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
    # entries that stay keep their order, padding follows
    order = np.argsort(gone, axis=1, kind="stable")
    held = exact_lists.Lists(
        catalog_rows=np.take_along_axis(np.where(gone, -1, neighbors), order, axis=1),
        sqdist=np.take_along_axis(
            np.where(gone, np.float32(np.inf), sqdist), order, axis=1
        ),
    )  # fmt: skip
    everyone = np.arange(n, dtype=np.int64)
    near = search.search_all(new[swapped], swapped, new, everyone, k, n)
    exact_lists.merge_inplace(held, everyone, near, everyone, n)
    own = search.search_all(new, everyone, new[swapped], swapped, k, n)
    held.catalog_rows[swapped], held.sqdist[swapped] = own.catalog_rows, own.sqdist
    return Spliced(
        rows=new, difficulty=hard, neighbors=held.catalog_rows, sqdist=held.sqdist, swapped=swapped
    )


def rate(rank: I64, swapped: I64, size: int) -> Rate:
    """The share of the swapped rows among the first `size` ranks. rank: (n,)."""
    hits = int((rank[swapped] < size).sum())
    low, high = wilson(hits, swapped.size)
    return Rate(kept=hits / swapped.size, low=low, high=high)


def rank_by_score(difficulty: F32, hi: uids.U64, lo: uids.U64) -> I64:
    """Ranks by the difficulty alone, (n,) int64."""
    return np.argsort(baselines.by_score(difficulty, hi, lo), kind="stable").astype(np.int64)


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The 95% interval of the share hits/of; of ≥ 1."""
    return intervals.wilson(hits / of, of)
