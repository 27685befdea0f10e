"""The kNN graph of a pool in memory, and its measured recall (DESIGN §4).

The same steps that `stages/` runs over files for a pool of any size: train, assign, calibrate,
search, refine, measure. Rows are in ascending order of uid, so that a row number is the sample's
number. The graph is a function of the rows and the options alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import calibrate, cells, refine, search, uids
from d2filter.algorithm.lists import Lists

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Progress = Callable[[int], None]

MEASURE_QUERIES = 3000
EXACT_UP_TO = 200_000  # rows of a pool that is compared all with all when cells miss the target

_EXACT_SHARE = 0.5  # cells that cost more than this share of comparing all with all are not used


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """n distinct samples in ascending order of uid."""

    rows: F16
    """(n, d) fixed features"""
    hi: uids.U64
    lo: uids.U64


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What a search needs besides the rows; fixed before the search begins."""

    cells: cells.Cells
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

    members: search.Members
    assigned: I32
    sizes: I64

    @property
    def total(self) -> int:
        """n."""
        return len(self.members.rows)

    def find(self, queries: F16, numbers: I64, probed: I32, k: int) -> Lists:
        """Exact lists within the probed cells."""
        return search.search(self.members, queries, numbers, probed, k, self.total)

    def rows(self, numbers: I64) -> F16:
        """Their features."""
        return self.members.rows[numbers]

    def probed(self, numbers: I64) -> I32:
        """The cells that they probe."""
        return self.assigned[numbers]


def make_pool(rows: F16, hi: uids.U64, lo: uids.U64) -> Pool:
    """rows: (n, d) float16, finite; uids ascending and distinct."""
    return Pool(rows=rows, hi=hi, lo=lo)


def train_cells(pool: Pool, k: int, *, exact_below: int = 16384, seed: int = 0) -> cells.Cells:
    """Cells from rows chosen by uid hash; a single one for at most `exact_below` rows."""
    count = cells.cell_count(len(pool.rows), k)
    if len(pool.rows) <= max(1, exact_below) or count == 1:
        return single_cell(pool.rows[:1])
    size = cells.TRAINING_ROWS_A_CELL * count
    chosen = uids.hash_sample(pool.hi, pool.lo, size, salt=uids.SALT_TRAIN, seed=seed)
    return cells.train(pool.rows[chosen], count)


def single_cell(rows: F16) -> cells.Cells:
    """One cell that holds everything."""
    return cells.from_centroids(rows[:1])


def in_cells(pool: Pool, index: cells.Cells, *, probes: int = cells.STORED_PROBES) -> InMemory:
    """Assign all rows and gather them by cell."""
    assigned = cells.assign(pool.rows, index, probes)
    numbers = np.arange(len(pool.rows), dtype=np.int64)
    return InMemory(
        members=search.make_members(pool.rows, numbers, assigned[:, 0], index.count),
        assigned=assigned,
        sizes=np.bincount(assigned[:, 0], minlength=index.count),
    )


def exact_choice(total: int) -> calibrate.Choice:
    """All rows in one cell."""
    return calibrate.Choice(
        probes=1, passes=0, predicted=1.0, evaluations=float(total), reached=True
    )


def pays(choice: calibrate.Choice, total: int, nlist: int) -> bool:
    """Whether cells cost less than half of comparing all with all, and reach the target.

    Where they cost more, all is compared with all; where they miss the target, so it is for pools
    of up to EXACT_UP_TO rows.
    """
    dear = choice.evaluations + nlist > _EXACT_SHARE * total
    return not dear and (choice.reached or total > EXACT_UP_TO)


def build(
    pool: Pool,
    k: int,
    *,
    target_recall: float = 0.95,
    exact_below: int = 16384,
    seed: int = 0,
    progress: Progress = lambda done: None,
) -> tuple[Graph, Index]:
    """The graph with the recall that is asked for, and how it was searched."""
    total = len(pool.rows)
    index = train_cells(pool, k, exact_below=exact_below, seed=seed)
    if index.count == 1:
        held = in_cells(pool, index)
        choice = exact_choice(total)
    else:
        held = in_cells(pool, index)
        queries = uids.hash_sample(
            pool.hi, pool.lo, calibrate.QUERIES, salt=uids.SALT_CALIBRATE, seed=seed
        )
        most = cells.assign(pool.rows[queries], index, cells.MOST_PROBES)
        choice = calibrate.choose(held, pool.rows[queries], queries, most, k, target_recall)
        if not pays(choice, total, index.count):
            index = single_cell(pool.rows)
            held = in_cells(pool, index)
            choice = exact_choice(total)
        elif choice.probes > cells.STORED_PROBES:
            held = in_cells(pool, index, probes=choice.probes)
    graph = build_graph(held, k, choice, progress=progress)
    return graph, Index(cells=index, choice=choice)


def build_graph(
    held: InMemory, k: int, choice: calibrate.Choice, *, progress: Progress = lambda done: None
) -> Graph:
    """k nearest neighbors of every row among the cells that it probes, refined if so chosen."""
    total = held.total
    numbers = np.arange(total, dtype=np.int64)
    width = list_width(k, choice.passes)
    probed = np.ascontiguousarray(held.assigned[:, : choice.probes])
    probed = cells.every_cell_where_short(probed, held.sizes, min(width, total - 1))
    lists = search.search(
        held.members,
        held.members.rows,
        numbers,
        probed,
        width,
        total,
        over_fetch=k + search.OVER_FETCH - width,
        progress=progress,
    )
    if choice.passes:
        home = np.where(lists.numbers >= 0, held.assigned[lists.numbers, 0], -1)
        before = refine.first_round(lists, home)
        rows = held.members.rows
        lists = Lists.empty(total, k)
        # by cell: rows of one cell measure the same others
        order = np.argsort(probed[:, 0], kind="stable")
        for begin in range(0, total, refine.BLOCK):
            part = order[begin : begin + refine.BLOCK]
            own = before.take(part)
            start, found, its_cells = refine.candidates(
                part, probed[part], own, before, own.lists.numbers
            )
            better = refine.improved(
                rows[part], part, own, start, found, its_cells, rows, found, total
            ).lists
            lists.numbers[part] = better.numbers[:, :k]
            lists.sqdist[part] = better.sqdist[:, :k]
    return Graph(neighbors=lists.numbers, sqdist=lists.sqdist)


def list_width(k: int, passes: int) -> int:
    """Places of the lists that are searched: refinement works on longer ones."""
    return k + calibrate.REFINED_LISTS if passes else k


def exact_neighbors(pool: Pool, queries: I64, k: int) -> tuple[I64, F32]:
    """Exact lists of some rows, by comparison with all: neighbors (q, k) int64, sqdist (q, k)."""
    numbers = np.arange(len(pool.rows), dtype=np.int64)
    members = search.make_members(pool.rows, numbers, np.zeros(numbers.size, np.int32), 1)
    probed = np.zeros((len(queries), 1), np.int32)
    lists = search.search(members, pool.rows[queries], queries, probed, k, numbers.size)
    return lists.numbers, lists.sqdist


def measure_recall(pool: Pool, graph: Graph, *, seed: int = 0) -> Recall:
    """recall@k of `graph` against exact lists of 3,000 hash-chosen rows (all, in small pools)."""
    queries = uids.hash_sample(pool.hi, pool.lo, MEASURE_QUERIES, salt=uids.SALT_MEASURE, seed=seed)
    truth, _ = exact_neighbors(pool, queries, graph.neighbors.shape[1])
    return recall_of(truth, graph.neighbors[queries], len(pool.rows))


def recall_of(truth: I64, found: I64, total: int) -> Recall:
    """recall@k of lists `found` (q, k) against exact ones, of q samples among `total`.

    The interval is mean ± 1.96 standard errors over queries, with the correction for a finite pool.
    """
    hit = (truth[:, :, None] == found[:, None, :]).any(axis=2)
    # a sample without any neighbor has nothing to miss
    share = np.where(truth >= 0, hit, True).mean(axis=1)
    value = float(share.mean())
    left = np.sqrt((total - share.size) / max(1, total - 1))
    error = float(1.96 * share.std() / np.sqrt(share.size) * left)
    return Recall(
        value=value,
        low=max(0.0, value - error),
        high=min(1.0, value + error),
        queries=int(share.size),
    )
