"""The kNN graph: search by cell, exact lists in ring order, measured recall (DESIGN §4).

Rows are in ascending order of uid everywhere in this module, so row numbers stand for uids: among
neighbors at equal distance the order is (row_j − row_i) mod n, which is the order of
(uid_j − uid_i) mod 2¹²⁸. Copies of one vector then point at different copies, round the ring.

The graph is a function of (rows, centroids, probes, k) alone: float32 products propose, exact
distances decide, and a list whose last place lies within rounding of what was not proposed is
searched again exactly. Copies are searched once.
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
TRAINING_ROWS_A_CELL = 32
CALIBRATION_QUERIES = 1000
MEASURE_QUERIES = 3000

_QUERY_BLOCK = 8192
_MEMBER_BLOCK = 65536  # rows of one matrix product: bounds the float32 copy of a cell
_EXACT_SHARE = 0.5  # cells that cost more than this share of comparing all with all are not used


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """n distinct samples in ascending order of uid."""

    rows: F16
    """(n, d) fixed features"""
    hi: uids.U64
    lo: uids.U64
    copies: features.Copies


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


def make_pool(rows: F16, hi: uids.U64, lo: uids.U64) -> Pool:
    """Group the copies of a pool. rows: (n, d) float16, finite; uids ascending and distinct."""
    return Pool(rows=rows, hi=hi, lo=lo, copies=features.group_copies(rows))


def train_index(
    pool: Pool, k: int, *, target_recall: float, exact_below: int = 16384, seed: int = 0
) -> Index:
    """Centroids and the number of probes that reach `target_recall` on a hash-chosen sample.

    With at most `exact_below` distinct rows there is one cell, and the search is exact; so it is
    when cells would not save half the distances. The samples are chosen by uid hash, so the result
    depends on the set of samples alone.
    """
    rows, hi, lo, distinct = pool.rows, pool.hi, pool.lo, pool.copies.first
    exact = Index(centroids=_single_centroid(rows), probes=1)
    if distinct.size <= max(1, exact_below):
        return exact
    count = cells.cell_count(distinct.size)
    chosen = uids.hash_sample(
        hi[distinct], lo[distinct], TRAINING_ROWS_A_CELL * count, salt=uids.SALT_TRAIN, seed=seed
    )
    centroids = cells.train_centroids(rows[distinct[chosen]], count)
    queries = uids.hash_sample(hi, lo, CALIBRATION_QUERIES, salt=uids.SALT_CALIBRATE, seed=seed)
    truth, _ = exact_neighbors(pool, queries, k)
    found = truth >= 0
    wanted = np.unique(truth[found])
    cell_of = np.full(len(rows), -1, np.int64)
    cell_of[wanted] = cells.assign(rows, centroids, 1, which=wanted)[0][:, 0]
    true_cells = np.where(found, cell_of[np.maximum(truth, 0)], -1)
    # a copy of the query is found whatever is probed
    group = pool.copies.group
    true_cells[group[np.maximum(truth, 0)] == group[queries][:, None]] = -1
    probes = cells.calibrate(rows[queries], true_cells, centroids, target_recall)
    if probes / len(centroids) + len(centroids) / distinct.size > _EXACT_SHARE:
        return exact
    return Index(centroids=centroids, probes=probes)


def build_graph(
    pool: Pool, k: int, index: Index, *, progress: Progress = lambda done: None
) -> Graph:
    """k nearest neighbors of every row among the cells that it probes.

    Work: n·probes·(n/nlist)·d multiply-adds. Memory beside the rows: about 20·k + 400 bytes a row.
    """
    n = len(pool.rows)
    nlist = len(index.centroids)
    first = pool.copies.first
    if nlist == 1:
        probed = np.zeros((first.size, 1), np.int32)
    else:
        probed, _ = cells.assign(pool.rows, index.centroids, index.probes, which=first)
    everything = np.arange(first.size, dtype=np.int64)
    search = _search(pool, everything, probed, probed[:, 0], k, nlist, progress)
    neighbors = np.full((n, k), -1, np.int64)
    sqdist = np.full((n, k), np.inf, np.float32)
    lists.fill_lists_inplace(pool.rows, pool.copies, search, None, neighbors, sqdist)
    cell_rows = np.bincount(probed[:, 0], weights=np.diff(pool.copies.start), minlength=nlist)
    return Graph(neighbors=neighbors, sqdist=sqdist, cell_rows=cell_rows.astype(np.int64))


def exact_neighbors(pool: Pool, queries: I64, k: int) -> tuple[I64, F32]:
    """Exact lists of some rows, by comparison with all: neighbors (q, k) int64, sqdist (q, k)."""
    groups = np.unique(pool.copies.group[queries])
    home = np.zeros(pool.copies.first.size, np.int32)
    probed = np.zeros((groups.size, 1), np.int32)
    search = _search(pool, groups, probed, home, k, 1, lambda done: None)
    neighbors = np.full((len(queries), k), -1, np.int64)
    sqdist = np.full((len(queries), k), np.inf, np.float32)
    lists.fill_lists_inplace(pool.rows, pool.copies, search, queries, neighbors, sqdist)
    return neighbors, sqdist


def measure_recall(pool: Pool, graph: Graph, *, seed: int = 0) -> Recall:
    """recall@k of `graph` against exact lists of 3,000 hash-chosen rows (all, in small pools).

    The interval is mean ± 1.96 standard errors over queries, with the correction for a finite pool.
    """
    queries = uids.hash_sample(pool.hi, pool.lo, MEASURE_QUERIES, salt=uids.SALT_MEASURE, seed=seed)
    truth, _ = exact_neighbors(pool, queries, graph.neighbors.shape[1])
    found = (truth[:, :, None] == graph.neighbors[queries][:, None, :]).any(axis=2)
    # a sample without any neighbor has nothing to miss
    share = np.where(truth >= 0, found, True).mean(axis=1)
    value = float(share.mean())
    left = np.sqrt((len(pool.rows) - share.size) / max(1, len(pool.rows) - 1))
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
    pool: Pool,
    groups: I64,
    probed: I32,
    home: npt.NDArray[np.integer],
    k: int,
    cell_total: int,
    progress: Progress,
) -> lists.Search:
    """Propose k + 17 groups for each of `groups`, one matrix product per cell.

    A group is proposed to itself too (at distance ~0) and dropped later, by its number.
    """
    rows, first = pool.rows, pool.copies.first
    fetch = min(k + 1 + OVER_FETCH, first.size)
    near = np.full((groups.size, fetch), np.inf, np.float32)
    ids = np.full((groups.size, fetch), -1, np.int32)
    member_start, member_list = lists.by_cell(home[:, None], cell_total)
    asker_start, asker_list = lists.by_cell(probed, cell_total)
    share = 0.0
    reported = 0
    for cell in range(cell_total):
        all_members = member_list[member_start[cell] : member_start[cell + 1]]
        askers = asker_list[asker_start[cell] : asker_start[cell + 1]]
        if not all_members.size or not askers.size:
            continue
        for member_begin in range(0, all_members.size, _MEMBER_BLOCK):
            members = all_members[member_begin : member_begin + _MEMBER_BLOCK]
            x = features.to_float32(rows, first[members])
            for begin in range(0, askers.size, _QUERY_BLOCK):
                block = askers[begin : begin + _QUERY_BLOCK]
                queries = features.to_float32(rows, first[groups[block]])
                distance, index = backend.nearest(queries, x, min(fetch, members.size))
                _merge(near, ids, block, distance, index, members)
                share += block.size / probed.shape[1] * (members.size / all_members.size)
                progress(int(share) - reported)
                reported = int(share)
    return lists.Search(groups=groups, probed=probed, home=home, near=near, ids=ids)


@numba.njit(cache=True, parallel=True)
def _merge(near, ids, block, distance, index, members):  # type: ignore[no-untyped-def]
    """Merge a cell's ascending proposals into the ascending lists of its queries, in place."""
    last = near.shape[1] - 1
    for b in numba.prange(block.size):
        q = block[b]
        for t in range(index.shape[1]):
            d = distance[b, t]
            if index[b, t] < 0 or not d < near[q, last]:
                break
            at = last
            while at > 0 and near[q, at - 1] > d:
                near[q, at] = near[q, at - 1]
                ids[q, at] = ids[q, at - 1]
                at -= 1
            near[q, at] = d
            ids[q, at] = members[index[b, t]]
