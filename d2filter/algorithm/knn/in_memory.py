"""Builds the kNN graph of a pool in memory, and measures its recall.

The steps are those that `stages/` runs on files: train, assign, calibrate, search, refine, measure.
Rows ascend by uid, so a row number is the catalog row of the sample.
The graph depends on the rows and the options alone.

See docs/method.md#exact-search and the sections around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.algorithm.knn import calibrate, cells, refine, search, shortlist, sketch
from d2filter.algorithm.knn.calibrate import Effort
from d2filter.algorithm.knn.exact_lists import Lists
from d2filter.algorithm.knn.sketch import Sketch
from d2filter.algorithm.measures import intervals

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Progress = Callable[[int], None]

MEASURE_QUERIES = 3000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """n distinct samples in ascending order of uid."""

    rows: F16
    """(n, d) fixed features"""
    hi: uids.U64
    lo: uids.U64


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What the cells of rows are found by."""

    sketch: Sketch
    cells: cells.Cells
    """of sketches"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What a search needs besides the rows. It is fixed before the search starts."""

    trained: Trained
    choice: calibrate.Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Directed k-nearest-neighbor lists of n rows."""

    neighbors: I64
    """(n, k) rows, nearest first, equals in ring order; −1 only where fewer than k others exist"""
    sqdist: F32
    """(n, k) squared distances, ascending, inf where padded"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Measured recall@k with its 95% confidence interval."""

    value: float
    low: float
    high: float
    queries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InMemory:
    """A pool of which all rows are at hand (calibrate.Searcher)."""

    features: F16
    """(n, d)"""
    sketch: Sketch
    members: search.Members
    """of sketches"""
    assigned: I32
    sizes: I64

    @property
    def total(self) -> int:
        """n."""
        return len(self.features)

    def truth(self, queries: F16, catalog_rows: I64, k: int) -> Lists:
        """Exact lists over the whole pool."""
        everyone = np.arange(self.total, dtype=np.int64)
        return search.search_all(self.features, everyone, queries, catalog_rows, k, self.total)

    def find(self, requests: Sequence[calibrate.Request]) -> list[Lists]:
        """Lists as the search of these cells finds them."""
        return [self._find(r.queries, r.catalog_rows, r.probed, r.k) for r in requests]

    def find_all(self, probed: I32, k: int, progress: Progress) -> Lists:
        """The same for every row of the pool. probed: (n, p)."""
        everyone = np.arange(self.total, dtype=np.int64)
        return self._find(self.features, everyone, probed, k, progress)

    def _find(
        self, queries: F16, catalog_rows: I64, probed: I32, k: int,
        progress: Progress = lambda done: None,
    ) -> Lists:  # fmt: skip
        whole = queries is self.features
        sketches = self.members.rows if whole else self.sketch.apply(queries)
        everyone = np.arange(self.total, dtype=np.int64)
        short = shortlist.find(
            self.members, self.features, everyone, sketches, queries, catalog_rows, probed,
            self.sketch.places(k), self.total, progress=progress,
        )  # fmt: skip
        return shortlist.settle(short, catalog_rows, k, self.total)

    def rows(self, catalog_rows: I64) -> F16:
        """Their features."""
        return self.features[catalog_rows]

    def probed(self, catalog_rows: I64) -> I32:
        """The cells that they probe."""
        return self.assigned[catalog_rows]


def make_pool(rows: F16, hi: uids.U64, lo: uids.U64) -> Pool:
    """rows: (n, d) float16, finite; uids ascending and distinct."""
    return Pool(rows=rows, hi=hi, lo=lo)


def train(
    pool: Pool, k: int, *, exact_below: int = 16384, seed: int = 0, effort: Effort = calibrate.LEAST
) -> Trained:
    """Sketches and cells from rows chosen by uid hash; one cell for at most `exact_below` rows."""
    count = count_to_train(len(pool.rows), k, exact_below)
    size = cells.TRAINING_ROWS_A_CELL * count if count > 1 else 1
    chosen = uids.hash_sample(pool.hi, pool.lo, size, salt=uids.SALT_TRAIN, seed=seed)
    return train_on(pool.rows[chosen], count, effort)


def train_on(sample: F16, count: int, effort: Effort = calibrate.LEAST) -> Trained:
    """Sketches and `count` cells from chosen rows (m, d); one cell holds everything."""
    if count == 1:
        trained = sketch.none(sample.shape[1])
        return Trained(sketch=trained, cells=cells.from_centroids(sample[:1]))
    trained = sketch.train(sample, effort.least_axes)
    return Trained(
        sketch=trained, cells=cells.train(trained.apply(sample), count, effort.looked_under)
    )


def count_to_train(total: int, k: int, exact_below: int) -> int:
    """Cells of a pool; 1, an exact search, for at most `exact_below` rows."""
    return 1 if total <= max(1, exact_below) else cells.cell_count(total, k)


def in_cells(pool: Pool, trained: Trained, *, probes: int = cells.STORED_PROBES) -> InMemory:
    """Assign all rows and gather them by cell."""
    sketches = trained.sketch.apply(pool.rows)
    assigned = cells.assign(sketches, trained.cells, probes)
    catalog_rows = np.arange(len(pool.rows), dtype=np.int64)
    return InMemory(
        features=pool.rows,
        sketch=trained.sketch,
        members=search.make_members(sketches, catalog_rows, assigned[:, 0], trained.cells.count),
        assigned=assigned,
        sizes=np.bincount(assigned[:, 0], minlength=trained.cells.count),
    )


def width(k: int, total: int) -> int:
    """Places of the lists of a pool: no sample has more than n − 1 neighbors."""
    return min(k, max(1, total - 1))


def choose(
    held: calibrate.Searcher, trained: Trained, rows: F16, queries: I64, k: int, target: float
) -> calibrate.Choice:
    """How to search a pool in cells. rows: (q, d) of the calibration sample; queries: (q,) catalog
    rows of it.
    """
    probed = cells.assign(trained.sketch.apply(rows), trained.cells, cells.MOST_PROBES)
    return calibrate.choose(held, rows, queries, probed, k, target)


def build(
    pool: Pool,
    k: int,
    *,
    target_recall: float = 0.95,
    exact_below: int = 16384,
    seed: int = 0,
    progress: Progress = lambda done: None,
) -> tuple[Graph, Index]:
    """Build a graph with the target recall; returns it, and how it was searched."""
    trials = InMemoryTrials(pool, k, target_recall, exact_below, seed)
    choice = calibrate.fit(trials, target_recall)
    graph = build_graph(trials.held, k, choice, progress=progress)
    return graph, Index(trained=trials.trained, choice=choice)


class InMemoryTrials:
    """Cells of a pool in memory (calibrate.Trials)."""

    def __init__(self, pool: Pool, k: int, target: float, exact_below: int, seed: int) -> None:
        self.total = len(pool.rows)
        self.trained: Trained
        self.held: InMemory
        self._pool = pool
        self._k = k
        self._target = target
        self._exact_below = exact_below
        self._seed = seed

    def train(self, effort: Effort) -> calibrate.TrainedSizes:
        """Train on rows chosen by uid hash."""
        self.trained = train(
            self._pool, self._k, exact_below=self._exact_below, seed=self._seed, effort=effort
        )
        self.assign(cells.STORED_PROBES)
        return calibrate.TrainedSizes(
            cells=self.trained.cells.count,
            axes=self.trained.sketch.axes.shape[1],
            parents=len(self.trained.cells.parents),
        )

    def choose(self) -> calibrate.Choice:
        """Calibrate on rows chosen by uid hash."""
        pool = self._pool
        queries = uids.hash_sample(
            pool.hi, pool.lo, calibrate.QUERIES, salt=uids.SALT_CALIBRATE, seed=self._seed
        )
        rows = pool.rows[queries]
        return choose(self.held, self.trained, rows, queries, self._k, self._target)

    def assign(self, probes: int) -> None:
        """Assign all rows and gather them by cell."""
        self.held = in_cells(self._pool, self.trained, probes=probes)

    def use_one_cell(self) -> None:
        """Put all rows in one cell."""
        self.trained = train_on(self._pool.rows[:1], 1)
        self.assign(cells.STORED_PROBES)


def build_graph(
    held: InMemory, k: int, choice: calibrate.Choice, *, progress: Progress = lambda done: None
) -> Graph:
    """k nearest neighbors of every row among the cells that it probes, refined if so chosen.

    Raises ValueError when fewer cells were assigned than are to be probed.
    """
    total = held.total
    if held.assigned.shape[1] < min(choice.probes, held.members.cells):
        raise ValueError(
            f"{choice.probes} cells are to be probed, {held.assigned.shape[1]} were assigned"
        )
    width = list_width(k, choice.passes)
    probed = np.ascontiguousarray(held.assigned[:, : choice.probes])
    probed = cells.every_cell_where_short(probed, held.sizes, min(width, total - 1))
    lists = held.find_all(probed, width, progress)
    if choice.passes:
        before = lists
        homes = held.assigned[before.catalog_rows, 0]  # of padding too: it is not looked at
        lists = Lists.empty(total, k)
        # by cell: rows of one cell measure the same others
        order = np.argsort(probed[:, 0], kind="stable")
        for begin in range(0, total, refine.BLOCK):
            part = order[begin : begin + refine.BLOCK]
            own = before.take(part)
            start, found = refine.candidates(
                part, probed[part], own.catalog_rows, before.catalog_rows, homes, own.catalog_rows
            )
            better = refine.improved(
                held.features[part], part, own, k, start, found, held.features, found, total
            )
            lists.catalog_rows[part], lists.sqdist[part] = better.catalog_rows, better.sqdist
    return Graph(neighbors=lists.catalog_rows, sqdist=lists.sqdist)


def list_width(k: int, passes: int) -> int:
    """Places of the lists that are searched: refinement works on longer ones."""
    return k + calibrate.REFINED_LISTS if passes else k


def exact_neighbors(pool: Pool, queries: I64, k: int) -> Lists:
    """Exact lists of some rows, by comparison with all."""
    catalog_rows = np.arange(len(pool.rows), dtype=np.int64)
    return search.search_all(
        pool.rows, catalog_rows, pool.rows[queries], queries, k, catalog_rows.size
    )


def measure_recall(pool: Pool, graph: Graph, *, seed: int = 0) -> Recall:
    """recall@k of `graph` against exact lists of 3,000 hash-chosen rows (all, in small pools)."""
    queries = uids.hash_sample(pool.hi, pool.lo, MEASURE_QUERIES, salt=uids.SALT_MEASURE, seed=seed)
    truth = exact_neighbors(pool, queries, graph.neighbors.shape[1])
    return recall_of(truth, graph.neighbors[queries], len(pool.rows))


def pooled(recalls: list[tuple[int, Recall]]) -> Recall:
    """Recall of a pool in pieces: (samples, recall) of each, measured on its own queries.

    Mean by size; errors of independent pieces add in squares.
    """
    total = sum(size for size, _ in recalls)
    value = sum(size * r.value for size, r in recalls) / total
    above = [(size * (r.high - r.value)) ** 2 for size, r in recalls]
    below = [(size * (r.value - r.low)) ** 2 for size, r in recalls]
    return Recall(
        value=value,
        low=value - sum(below) ** 0.5 / total,
        high=value + sum(above) ** 0.5 / total,
        queries=sum(r.queries for _, r in recalls),
    )


def recall_of(truth: Lists, found: I64, total: int) -> Recall:
    """recall@k of lists `found` (q, k) against exact ones, for q samples out of `total`.

    The interval is Wilson's at 95%; it has a width even if every neighbor was found. The k hits of
    a query are not independent, so the effective number of draws follows from the spread over
    queries. If the queries are the whole pool, the interval is a point.
    """
    share = truth.share_in(found)
    value = float(share.mean())
    low, high = _wilson(value, float(share.var()), share.size, total)
    return Recall(value=value, low=low, high=high, queries=int(share.size))


def _wilson(mean: float, variance: float, size: int, total: int) -> tuple[float, float]:
    """Interval of a share that `size` draws out of `total` gave, each in [0, 1]."""
    open_ = (total - size) / max(1, total - 1)  # correction for a finite pool
    if open_ <= 0:
        return mean, mean
    most = mean * (1 - mean)  # the variance where each draw is 0 or 1
    # one draw more of that kind: few misses, or none, tell nothing of their spread
    spread = (size * variance + 1) / (size * most + 1)
    return intervals.wilson(mean, size / (spread * open_))
