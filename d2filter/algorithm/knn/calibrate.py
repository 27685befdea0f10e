"""Chooses how many cells to probe, and whether to refine, for a target recall.

Several choices are tried on a few hundred samples, chosen by a hash of the uid. Cost is the counted
number of distances, never time, so that a slow machine makes the same graph.

See docs/method.md#calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from d2filter.algorithm.knn import cells, refine
from d2filter.algorithm.knn.exact_lists import Lists
from d2filter.algorithm.knn.sketch import Sketch

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

QUERIES = 400
# what is tried, in multiples of the probes whose cells hold enough of the true neighbors
_PLAIN = (1.0, 1.3, 1.7)
_REFINED = (0.15, 0.3, 0.55)
REFINED_LISTS = 11  # places beyond k of the lists that are refined
EXACT_UP_TO = 200_000  # rows of a pool that is compared all with all when cells miss the target
_EXACT_SHARE = 0.5  # cells that cost more than this share of comparing all with all are not used

# measured costs: a distance by product has those of so many dimensions besides its own, and one to
# a row fetched from anywhere, with the search for it, costs about as much as so many of a product
_HARDER = 4  # times as much, at every further try
OVERHEAD = 256
_FETCHED = 4
_Z = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Lists to be searched."""

    queries: F16
    """(q, d)"""
    catalog_rows: I64
    probed: I32
    """(q, p) cells to search"""
    k: int


class Searcher(Protocol):
    """The whole pool, wherever it lies; samples are known by catalog row."""

    @property
    def sketch(self) -> Sketch:
        """What the cells are searched with."""

    @property
    def total(self) -> int:
        """n."""

    @property
    def sizes(self) -> I64:
        """(nlist,) rows of each cell."""

    def truth(self, queries: F16, catalog_rows: I64, k: int) -> Lists:
        """Exact lists over the whole pool."""

    def find(self, requests: Sequence[Request]) -> list[Lists]:
        """Lists as the search of these cells finds them; the pool is read once for all of them."""

    def rows(self, catalog_rows: I64) -> F16:
        """Their features, (n, d)."""

    def probed(self, catalog_rows: I64) -> I32:
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
    """expected cost per row, as a number of distances between whole rows by products"""
    reached: bool
    """whether the lower end of the sample's 95% interval is at the target"""
    short_of: str = ""
    """why it missed the target: "cells", if most probed cells do not contain the neighbors, or
    "axes", if shortlists by sketch lose them
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much work cells and sketches get. It is raised if the least effort misses the target."""

    looked_under: int = cells.PARENTS_LOOKED_UNDER
    """parents under which a row chooses among cells"""
    least_axes: int = 0
    """of a sketch"""


LEAST = Effort()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedSizes:
    """Sizes of trained cells and sketches."""

    cells: int
    axes: int
    """of a sketch, 0 where rows are their own sketches"""
    parents: int


class Trials(Protocol):
    """A pool, in memory or in files, whose cells `fit` trains and tries."""

    @property
    def total(self) -> int:
        """n."""

    def train(self, effort: Effort) -> TrainedSizes:
        """Train sketches and cells, and assign STORED_PROBES cells to each row. One cell means that
        the pool is small enough for an exact search.
        """

    def choose(self) -> Choice:
        """Calibrate the search of the trained cells."""

    def assign(self, probes: int) -> None:
        """Assign more cells to each row."""

    def use_one_cell(self) -> None:
        """Replace the trained cells by one that holds everything."""


def fit(trials: Trials, target: float) -> Choice:
    """Train cells with more and more effort until the search is expected to reach `target`; returns
    how to search. If cells do not pay, everything is in one cell afterwards.
    """
    effort: Effort | None = LEAST
    while effort is not None:
        trained = trials.train(effort)
        if trained.cells == 1:
            return exact_choice(trials.total)
        choice = trials.choose()
        effort = harder(effort, choice, target, axes=trained.axes, parents=trained.parents)
    if not pays(choice, trials.total, trained.cells):
        trials.use_one_cell()
        return exact_choice(trials.total)
    if choice.probes > cells.STORED_PROBES:
        trials.assign(choice.probes)
    return choice


def exact_choice(total: int) -> Choice:
    """All rows in one cell."""
    return Choice(probes=1, passes=0, predicted=1.0, evaluations=float(total), reached=True)


def pays(choice: Choice, total: int, nlist: int) -> bool:
    """Whether cells cost less than half of comparing all with all, and reach the target. In pools
    of more than EXACT_UP_TO rows they need not reach it.
    """
    dear = choice.evaluations + nlist > _EXACT_SHARE * total
    return not dear and (choice.reached or total > EXACT_UP_TO)


def harder(
    effort: Effort, choice: Choice, target: float, *, axes: int, parents: int
) -> Effort | None:
    """The effort to try next if `choice` is expected to miss the target; None if it is not, or if
    nothing is left to try.

    axes: of the sketches that it was made with, 0 for whole rows. parents: of the cells. If
    clusters are about equidistant, parent cells split them, so more parents must be searched. If
    neighbors differ along no particular axis, the sample that chooses the number of axes
    underestimates it, because its few near rows look like all of them.
    """
    if choice.predicted >= target:
        return None
    if choice.short_of == "cells" and effort.looked_under < parents:
        return replace(effort, looked_under=_HARDER * effort.looked_under)
    return replace(effort, least_axes=_HARDER * axes) if axes else None


def choose(
    pool: Searcher, queries: F16, catalog_rows: I64, probed: I32, k: int, target: float
) -> Choice:
    """The cheapest way to search whose recall on the sample reaches `target` with confidence.

    queries: (q, d) hash-chosen rows; catalog_rows: (q,); probed: (q, most probes). The queries are
    compared with the whole pool once. The cells of their true neighbors show how many probes
    contain enough of them. Around that number, shortlists and refinement are tried. The pool is
    read three times.
    """
    k = min(k, pool.total - 1)
    most = probed.shape[1]
    truth = pool.truth(queries, catalog_rows, k)
    where = _positions(pool, truth, probed)
    held = [(where < p).mean(axis=1) for p in range(1, most + 1)]
    dim = queries.shape[1]
    scanned = (pool.sketch.share * dim + OVERHEAD) / (dim + OVERHEAD)
    cost = scanned * (pool.sizes[probed] * (probed >= 0)).cumsum(axis=1).mean(axis=0)
    bound = next((p for p in range(1, most + 1) if _lower(held[p - 1]) >= target), most)
    reaches = _lower(held[bound - 1]) >= target
    tried = _steps(bound, _PLAIN, most) if not pool.sketch.identity else []
    fewer = _steps(bound, _REFINED if reaches else (*_REFINED, 1.0), most)

    def request(p: int, width: int) -> Request:
        searched = np.ascontiguousarray(probed[:, :p])
        return Request(queries=queries, catalog_rows=catalog_rows, probed=searched, k=width)

    asked = [request(p, k) for p in tried] + [request(p, k + REFINED_LISTS) for p in fewer]
    found = pool.find(asked)
    # neighbors that lie in probed cells, and are lost because no shortlist has them
    lost = [
        (p, float((held[p - 1] - truth.share_in(lists.catalog_rows)).mean()))
        for p, lists in zip(tried, found, strict=False)
    ] or [(most, 0.0)]
    best = _plain(held, lost, bound, target, cost)
    after = _refined(pool, [request(p, k) for p in fewer], found[len(tried) :], truth)
    for p, (hits, fetched) in zip(fewer, after, strict=True):
        evaluations = float(cost[p - 1]) + _FETCHED * fetched
        if _lower(hits) >= target and (evaluations < best.evaluations or not best.reached):
            best = Choice(
                probes=p,
                passes=1,
                predicted=float(hits.mean()),
                evaluations=evaluations,
                reached=True,
            )
    return best


def _plain(
    held: Sequence[npt.NDArray[np.float64]], lost: Sequence[tuple[int, float]], bound: int,
    target: float, cost: npt.NDArray[np.float64],
) -> Choice:  # fmt: skip
    """The fewest probes that are enough without refinement. lost: measured at some probes, it grows
    with them; between two of them the larger one is taken.
    """
    most = len(held)
    for p in range(bound, most + 1):
        loss = next((share for at, share in lost if at >= p), lost[-1][1])
        reached = _lower(held[p - 1]) - loss >= target
        if reached or p == most:
            break
    return Choice(
        probes=p,
        passes=0,
        predicted=float(held[p - 1].mean()) - loss,
        evaluations=float(cost[p - 1]),
        reached=reached,
        short_of="" if reached else "cells" if _lower(held[-1]) < target else "axes",
    )


def _steps(bound: int, factors: Sequence[float], most: int) -> list[int]:
    return sorted({min(most, max(1, round(bound * f))) for f in factors})


def _positions(pool: Searcher, truth: Lists, probed: I32) -> I64:
    """Which probe of a query finds each of its true neighbors, (q, k).

    −1 where the list is padded; the number of probes if no probe finds it.
    """
    there = truth.catalog_rows >= 0
    home = refine.home_cells(
        truth.catalog_rows, lambda catalog_rows: pool.probed(catalog_rows)[:, 0]
    )
    out = np.full(truth.catalog_rows.shape, -1, np.int64)
    for t in range(truth.catalog_rows.shape[1]):
        same = probed == home[:, t : t + 1]
        found = np.where(same.any(axis=1), same.argmax(axis=1), probed.shape[1])
        out[:, t] = np.where(there[:, t], found, -1)
    return out


def _refined(
    pool: Searcher, requests: Sequence[Request], wide: Sequence[Lists], truth: Lists
) -> list[tuple[npt.NDArray[np.float64], float]]:
    """For each request, whose lists before the pass are `wide`: share of the truth found by each
    query after it, and rows fetched a query.
    """
    lists_of_neighbors = [refine.distinct(own.catalog_rows) for own in wide]
    theirs = pool.find(
        [
            Request(
                queries=pool.rows(named),
                catalog_rows=named,
                probed=np.ascontiguousarray(pool.probed(named)[:, : asked.probed.shape[1]]),
                k=own.catalog_rows.shape[1],
            )
            for asked, own, (named, _) in zip(requests, wide, lists_of_neighbors, strict=True)
        ]
    )
    out = []
    for asked, own, (_, neighbor_row), lists in zip(
        requests, wide, lists_of_neighbors, theirs, strict=True
    ):
        homes = refine.home_cells(lists.catalog_rows, lambda named: pool.probed(named)[:, 0])
        start, found = refine.candidates(
            asked.catalog_rows,
            asked.probed,
            own.catalog_rows,
            lists.catalog_rows,
            homes,
            neighbor_row,
        )
        fetched, where = np.unique(found, return_inverse=True)
        after = refine.improved(
            asked.queries, asked.catalog_rows, own, asked.k, start, found, pool.rows(fetched),
            where, pool.total,
        )  # fmt: skip
        out.append(
            (truth.share_in(after.catalog_rows), float(start[-1] / max(1, len(asked.catalog_rows))))
        )
    return out


def _lower(hits: npt.NDArray[np.float64]) -> float:
    """Lower end of the 95% confidence interval of a mean."""
    return float(hits.mean() - _Z * hits.std() / np.sqrt(len(hits)))
