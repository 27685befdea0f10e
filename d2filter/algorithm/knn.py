"""The kNN graph: search by cell, exact lists in ring order, measured recall (DESIGN §4).

Rows are in ascending order of uid everywhere in this module, so row numbers stand for uids: among
neighbors at equal distance the order is (row_j − row_i) mod n, which is the order of
(uid_j − uid_i) mod 2¹²⁸. Copies of one vector then point at different copies, round the ring.

The graph is a function of (rows, centroids, probes, k) alone: float32 products propose, exact
distances decide, and a list whose last place lies within rounding of what was not proposed is
searched again exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from d2filter.algorithm import backend, cells, features, lists, uids

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Progress = Callable[[int], None]

OVER_FETCH = 16  # proposals beyond k (DESIGN §4.5)
_BLOCK = 8192
TRAINING_ROWS_A_CELL = 32
CALIBRATION_QUERIES = 1000
MEASURE_QUERIES = 3000


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What a search needs besides the rows; fixed before the search begins."""

    centroids: F16
    """(nlist, d)"""
    probes: int
    """cells searched for each row"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Directed k-nearest-neighbor lists of n rows."""

    neighbors: I64
    """(n, k) rows, nearest first, equals in ring order; −1 only where fewer than k others exist"""
    sqdist: F32
    """(n, k) squared distances, ascending, inf where padded"""
    cell_rows: I64
    """(nlist,) rows in each cell, copies included"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Measured recall@k with its 95% confidence interval."""

    value: float
    low: float
    high: float
    queries: int


def train_index(
    rows: F16,
    hi: uids.U64,
    lo: uids.U64,
    k: int,
    *,
    target_recall: float,
    exact_below: int = 16384,
    seed: int = 0,
) -> Index:
    """Centroids and the number of probes that reach `target_recall` on a hash-chosen sample.

    rows: (n, d) float16 in ascending order of uid; hi, lo: (n,) uint64. With at most `exact_below`
    distinct rows there is one cell, and the search is exact. The sample is chosen by uid hash, so
    the result depends on the set of samples alone.
    """
    copies = features.group_copies(rows)
    distinct = copies.first
    if distinct.size <= max(1, exact_below):
        return Index(centroids=_single_centroid(rows), probes=1)
    count = cells.cell_count(distinct.size)
    chosen = uids.hash_sample(
        hi[distinct], lo[distinct], TRAINING_ROWS_A_CELL * count, salt=uids.SALT_TRAIN, seed=seed
    )
    centroids = cells.train_centroids(rows[distinct[chosen]], count)
    queries = uids.hash_sample(hi, lo, CALIBRATION_QUERIES, salt=uids.SALT_CALIBRATE, seed=seed)
    truth, _ = exact_neighbors(rows, queries, k)
    found = truth >= 0
    wanted = np.unique(truth[found])
    cell_of = np.full(len(rows), -1, np.int64)
    cell_of[wanted] = cells.assign(rows[wanted], centroids, 1)[0][:, 0]
    true_cells = np.where(found, cell_of[np.maximum(truth, 0)], -1)
    # a copy of the query is found whatever is probed
    true_cells[copies.group[np.maximum(truth, 0)] == copies.group[queries][:, None]] = -1
    probes = cells.calibrate(rows[queries], true_cells, centroids, target_recall)
    return Index(centroids=centroids, probes=probes)


def build_graph(
    rows: F16, k: int, index: Index, *, progress: Progress = lambda done: None
) -> Graph:
    """k nearest neighbors of every row among the cells that it probes.

    rows: (n, d) float16, finite, in ascending order of uid. Work: n·probes·(n/nlist)·d
    multiply-adds; memory beside the rows: about (12·(k + 17) + 40) bytes a row.
    """
    n = len(rows)
    copies = features.group_copies(rows)
    distinct = rows if copies.first.size == n else rows[copies.first]
    probed, _ = cells.assign(distinct, index.centroids, index.probes)
    near, ids = _search(distinct, distinct, probed, probed[:, 0], k, len(index.centroids), progress)
    neighbors = np.full((n, k), -1, np.int64)
    sqdist = np.full((n, k), np.inf, np.float32)
    lists.fill_lists_inplace(rows, distinct, copies, probed, ids, near, None, neighbors, sqdist)
    cell_rows = np.bincount(
        probed[:, 0], weights=np.diff(copies.start), minlength=len(index.centroids)
    ).astype(np.int64)
    return Graph(neighbors=neighbors, sqdist=sqdist, cell_rows=cell_rows)


def exact_neighbors(rows: F16, queries: I64, k: int) -> tuple[I64, F32]:
    """Exact lists of some rows, by comparison with all: neighbors (q, k) int64, sqdist (q, k)."""
    copies = features.group_copies(rows)
    distinct = rows if copies.first.size == len(rows) else rows[copies.first]
    groups = np.unique(copies.group[queries])
    home = np.zeros(len(distinct), np.int32)
    probed = np.zeros((groups.size, 1), np.int32)
    near, ids = _search(distinct[groups], distinct, probed, home, k, 1, lambda done: None)
    neighbors = np.full((len(queries), k), -1, np.int64)
    sqdist = np.full((len(queries), k), np.inf, np.float32)
    lists.fill_lists_inplace(
        rows, distinct, copies, probed, ids, near, (queries, groups), neighbors, sqdist
    )
    return neighbors, sqdist


def measure_recall(rows: F16, hi: uids.U64, lo: uids.U64, graph: Graph, *, seed: int = 0) -> Recall:
    """recall@k of `graph` against exact lists of ≥ 3,000 hash-chosen rows (all, in small pools).

    The interval is mean ± 1.96 standard errors over queries, with the correction for a finite pool.
    """
    queries = uids.hash_sample(hi, lo, MEASURE_QUERIES, salt=uids.SALT_MEASURE, seed=seed)
    truth, _ = exact_neighbors(rows, queries, graph.neighbors.shape[1])
    found = (truth[:, :, None] == graph.neighbors[queries][:, None, :]).any(axis=2)
    exists = truth >= 0
    # a sample without any neighbor has nothing to miss
    share = np.where(exists, found, True).mean(axis=1)
    value = float(share.mean())
    pool = len(rows)
    left = np.sqrt((pool - share.size) / max(1, pool - 1))
    error = float(1.96 * share.std() / np.sqrt(share.size) * left)
    return Recall(
        value=value,
        low=max(0.0, value - error),
        high=min(1.0, value + error),
        queries=int(share.size),
    )


def _single_centroid(rows: F16) -> F16:
    """The mean row, (1, d) float16; sums of float16 values in float64 are exact."""
    mean: F16 = np.asarray(rows.mean(axis=0, dtype=np.float64)).astype(np.float16)
    return mean[None, :]


def _search(
    queries: F16,
    rows: F16,
    probed: I32,
    home: npt.NDArray[np.integer],
    k: int,
    cell_total: int,
    progress: Progress,
) -> tuple[F32, I32]:
    """Proposals: approximate distances and row numbers, (q, k + 17), one matrix product per cell.

    A query that is itself a row is proposed too (at distance ~0) and dropped later, by its number.
    """
    fetch = min(k + 1 + OVER_FETCH, len(rows))
    near = np.full((len(queries), fetch), np.inf, np.float32)
    ids = np.full((len(queries), fetch), -1, np.int32)
    row_start, row_list = lists.by_cell(home[:, None], cell_total)
    query_start, query_list = lists.by_cell(probed, cell_total)
    share = 0.0
    reported = 0
    for cell in range(cell_total):
        members = row_list[row_start[cell] : row_start[cell + 1]]
        askers = query_list[query_start[cell] : query_start[cell + 1]]
        if members.size == 0 or askers.size == 0:
            continue
        x = features.to_float32(rows[members])
        for start in range(0, askers.size, _BLOCK):
            block = askers[start : start + _BLOCK]
            distance, index = backend.nearest(
                features.to_float32(queries[block]), x, min(fetch, members.size)
            )
            _merge(near, ids, block, distance, index, members)
            share += block.size / probed.shape[1]
            progress(int(share) - reported)
            reported = int(share)
    return near, ids


@numba.njit(cache=True, parallel=True)
def _merge(near, ids, block, distance, index, members):  # type: ignore[no-untyped-def]
    """Merge a cell's ascending proposals into the ascending lists of its queries, in place."""
    fetch = near.shape[1]
    for b in numba.prange(block.size):
        q = block[b]
        merged_near = np.empty(fetch, np.float32)
        merged_ids = np.empty(fetch, np.int32)
        old = 0
        new = 0
        for t in range(fetch):
            take_new = (
                new < index.shape[1] and index[b, new] >= 0 and distance[b, new] < near[q, old]
            )
            if take_new:
                merged_near[t] = distance[b, new]
                merged_ids[t] = members[index[b, new]]
                new += 1
            else:
                merged_near[t] = near[q, old]
                merged_ids[t] = ids[q, old]
                old += 1
        near[q] = merged_near
        ids[q] = merged_ids
