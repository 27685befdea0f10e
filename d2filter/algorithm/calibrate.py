"""How many cells to probe, and whether to refine, for a recall the user asks for (DESIGN §4.7).

Everything is tried on hash-chosen samples first, and costs are counted distance evaluations, never
seconds: the clock cannot change the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import refine
from d2filter.algorithm.lists import Lists
from d2filter.algorithm.search import EVERY_CELL

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

QUERIES = 600
REFINED_LISTS = 11  # places beyond k of the lists that are refined

# one distance to a row fetched from anywhere, with the search for it, costs about as much as this
# many of a product
_FETCHED = 16
_Z = 1.96


class Searcher(Protocol):
    """The whole pool, wherever it lies; samples are known by number."""

    @property
    def total(self) -> int:
        """n."""

    @property
    def sizes(self) -> I64:
        """(nlist,) rows of each cell."""

    def find(self, queries: F16, numbers: I64, probed: I32, k: int) -> Lists:
        """Exact lists within the probed cells."""

    def rows(self, numbers: I64) -> F16:
        """Their features, (n, d)."""

    def probed(self, numbers: I64) -> I32:
        """The cells that they probe, nearest first; the first is their home."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How to search."""

    probes: int
    """cells searched for each row"""
    passes: int
    """refinement passes afterwards, 0 or 1"""
    predicted: float
    """recall@k on the calibration sample"""
    evaluations: float
    """expected distance evaluations a row"""
    reached: bool
    """whether the lower end of the sample's 95% interval is at the target"""


def choose(
    pool: Searcher, queries: F16, numbers: I64, probed: I32, k: int, target: float
) -> Choice:
    """The cheapest way to search whose recall on the sample reaches `target` with confidence.

    queries: (q, d) hash-chosen rows; numbers: (q,); probed: (q, most probes). They are compared
    with the whole pool once, so that their true neighbors are known.
    """
    k = min(k, pool.total - 1)
    most = probed.shape[1]
    everywhere = np.full((len(queries), 1), EVERY_CELL, np.int32)
    truth = pool.find(queries, numbers, everywhere, k)
    where = _positions(pool, truth, probed)
    held = pool.sizes[probed] * (probed >= 0)
    cost = held.cumsum(axis=1).mean(axis=0)
    hits = [(where < p).mean(axis=1) for p in range(1, most + 1)]
    lower = [_lower(h) for h in hits]
    enough = next((p for p in range(1, most + 1) if lower[p - 1] >= target), most)
    best = Choice(
        probes=enough,
        passes=0,
        predicted=float(hits[enough - 1].mean()),
        evaluations=float(cost[enough - 1]),
        reached=lower[enough - 1] >= target,
    )
    # fewest probes with which one pass is enough: recall rises with probes, so bisect
    low, high = 1, enough if best.reached else most + 1
    while low < high:
        probes = (low + high) // 2
        hit, fetched = _refined(pool, queries, numbers, probed[:, :probes], truth, k)
        evaluations = float(cost[probes - 1]) + _FETCHED * fetched
        reached = _lower(hit) >= target
        if reached:
            high = probes
            if evaluations < best.evaluations or not best.reached:
                best = Choice(
                    probes=probes,
                    passes=1,
                    predicted=float(hit.mean()),
                    evaluations=evaluations,
                    reached=True,
                )
        else:
            low = probes + 1
    return best


def _positions(pool: Searcher, truth: Lists, probed: I32) -> I64:
    """Which probe of its query finds each true neighbor, (q, k).

    −1 where the list is padded, the number of probes where none of them does.
    """
    there = truth.numbers >= 0
    distinct, back = np.unique(truth.numbers[there], return_inverse=True)
    home = np.full(truth.numbers.shape, -1, np.int32)
    home[there] = pool.probed(distinct)[back, 0]
    out = np.full(truth.numbers.shape, -1, np.int64)
    for t in range(truth.numbers.shape[1]):
        same = probed == home[:, t : t + 1]
        found = np.where(same.any(axis=1), same.argmax(axis=1), probed.shape[1])
        out[:, t] = np.where(there[:, t], found, -1)
    return out


def _refined(
    pool: Searcher, queries: F16, numbers: I64, probed: I32, truth: Lists, k: int
) -> tuple[npt.NDArray[np.float64], float]:
    """Share of the truth found by each query after one pass, and rows fetched a query."""
    probed = np.ascontiguousarray(probed)
    width = k + REFINED_LISTS
    own = pool.find(queries, numbers, probed, width)
    friends = np.unique(own.numbers[own.numbers >= 0])
    friend_cells = np.ascontiguousarray(pool.probed(friends)[:, : probed.shape[1]])
    theirs = pool.find(pool.rows(friends), friends, friend_cells, width)
    listed = np.unique(np.concatenate([own.numbers.ravel(), theirs.numbers.ravel()]))
    listed = listed[listed >= 0]
    home = pool.probed(listed)[:, 0]

    def started(lists: Lists) -> refine.Round:
        at = np.searchsorted(listed, np.maximum(lists.numbers, 0)) % max(1, listed.size)
        return refine.first_round(lists, np.where(lists.numbers >= 0, home[at], -1))

    friend_of = np.where(own.numbers >= 0, np.searchsorted(friends, own.numbers), -1)
    mine = started(own)
    start, found, cells = refine.candidates(numbers, probed, mine, started(theirs), friend_of)
    fetched, where = np.unique(found, return_inverse=True)
    after = refine.improved(
        queries, numbers, mine, start, found, cells, pool.rows(fetched), where, pool.total
    )
    wanted = truth.numbers[: len(numbers)]
    hit = (wanted[:, :, None] == after.lists.numbers[:, None, :k]).any(axis=2)
    return np.where(wanted >= 0, hit, True).mean(axis=1), float(start[-1] / max(1, len(numbers)))


def _lower(hits: npt.NDArray[np.float64]) -> float:
    """Lower end of the 95% confidence interval of a mean."""
    return float(hits.mean() - _Z * hits.std() / np.sqrt(len(hits)))
