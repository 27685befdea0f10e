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
from d2filter.algorithm.sketch import Sketch

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

QUERIES = 400
REFINED_LISTS = 11  # places beyond k of the lists that are refined

# measured costs: a distance by product has those of so many dimensions besides its own, and one to
# a row fetched from anywhere, with the search for it, costs about as much as so many of a product
_OVERHEAD = 256
_FETCHED = 4
_Z = 1.96


class Searcher(Protocol):
    """The whole pool, wherever it lies; samples are known by number."""

    @property
    def sketch(self) -> Sketch:
        """What the cells are searched with."""

    @property
    def total(self) -> int:
        """n."""

    @property
    def sizes(self) -> I64:
        """(nlist,) rows of each cell."""

    def truth(self, queries: F16, numbers: I64, k: int) -> Lists:
        """Exact lists over the whole pool."""

    def find(self, queries: F16, numbers: I64, probed: I32, k: int) -> Lists:
        """Lists as the search of these cells finds them."""

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
    """expected cost a row: as many distances of whole rows by products"""
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
    truth = pool.truth(queries, numbers, k)
    held = pool.sizes[probed] * (probed >= 0)
    dim = queries.shape[1]
    scanned = (pool.sketch.share * dim + _OVERHEAD) / (dim + _OVERHEAD)
    cost = scanned * held.cumsum(axis=1).mean(axis=0)
    best = _without_refinement(pool, queries, numbers, probed, truth, target, cost)
    # fewest probes with which one pass is enough: recall rises with probes, so bisect
    low, high = 1, best.probes if best.reached else probed.shape[1] + 1
    while low < high:
        probes = (low + high) // 2
        hit, fetched = _refined(pool, queries, numbers, probed[:, :probes], truth, k)
        evaluations = float(cost[probes - 1]) + _FETCHED * fetched
        if _lower(hit) >= target:
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


def _without_refinement(
    pool: Searcher, queries: F16, numbers: I64, probed: I32, truth: Lists, target: float,
    cost: npt.NDArray[np.float64],
) -> Choice:  # fmt: skip
    """The fewest probes that are enough."""
    k = truth.numbers.shape[1]
    most = probed.shape[1]
    where = _positions(pool, truth, probed)
    # what lies in the probed cells: found, but for what shortlists lose, which is measured
    held = [(where < p).mean(axis=1) for p in range(1, most + 1)]
    lost = 0.0
    probes = 0
    while True:
        # what is lost grows with the probes: steps of a quarter at least
        least = min(most, probes + 1 + probes // 4)
        probes = next((p for p in range(least, most) if _lower(held[p - 1]) - lost >= target), most)
        hits = held[probes - 1]
        if not pool.sketch.identity:
            found = pool.find(queries, numbers, np.ascontiguousarray(probed[:, :probes]), k)
            hits = truth.share_in(found.numbers)
            lost = float(held[probes - 1].mean() - hits.mean())
        reached = _lower(hits) >= target
        if reached or probes == most:
            return Choice(
                probes=probes,
                passes=0,
                predicted=float(hits.mean()),
                evaluations=float(cost[probes - 1]),
                reached=reached,
            )


def _positions(pool: Searcher, truth: Lists, probed: I32) -> I64:
    """Which probe of its query finds each true neighbor, (q, k).

    −1 where the list is padded, the number of probes where none of them does.
    """
    there = truth.numbers >= 0
    home = refine.home_cells(truth.numbers, lambda numbers: pool.probed(numbers)[:, 0])
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
    friends, friend_of = refine.distinct(own.numbers)
    friend_cells = np.ascontiguousarray(pool.probed(friends)[:, : probed.shape[1]])
    theirs = pool.find(pool.rows(friends), friends, friend_cells, width)

    homes = refine.home_cells(theirs.numbers, lambda named: pool.probed(named)[:, 0])
    start, found = refine.candidates(numbers, probed, own.numbers, theirs.numbers, homes, friend_of)
    fetched, where = np.unique(found, return_inverse=True)
    after = refine.improved(
        queries, numbers, own, k, start, found, pool.rows(fetched), where, pool.total
    )
    return truth.share_in(after.numbers), float(start[-1] / max(1, len(numbers)))


def _lower(hits: npt.NDArray[np.float64]) -> float:
    """Lower end of the 95% confidence interval of a mean."""
    return float(hits.mean() - _Z * hits.std() / np.sqrt(len(hits)))
