"""Ranks samples by density-based pruning (Abbas et al. 2024, arXiv 2401.04578).

Clusters that are wide and far from others contain diverse samples and get a large share of every
budget; dense clusters are thinned. One ranking serves all budgets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features, uids
from d2filter.algorithm.knn import cells
from d2filter.algorithm.methods.pool import Pool
from d2filter.algorithm.scores import registry as scores
from d2filter.checks import finite
from d2filter.errors import UsageError

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Rows = npt.NDArray[Any]

_MOST_CLUSTERS = 500  # as published
_ROWS_A_CLUSTER = 64  # rows of the pool for each cluster, at least
_NEAREST = 20  # number of nearest centers over which a center's distance is averaged
_BLOCK = 8192


def check_temperature(value: Any) -> None:
    """Raise UsageError for a temperature that `density` cannot use, of any type."""
    if not (finite(value) and value > 0):
        raise UsageError(f"temperature is {value}, allowed is a finite number above 0, such as 0.1")


def density(pool: Pool, *, temperature: float = 0.1, rows_a_cluster: int = _ROWS_A_CLUSTER) -> I64:
    """Rows of a pool in order, (n,) int64, best first. In every prefix, each cluster has its share
    until it is exhausted.

    k-means finds about n/rows_a_cluster clusters, 500 at most. The complexity of cluster j is
    C_j = d_inter·d_intra: the mean distance of its center to the 20 nearest other centers, times
    the mean distance of its samples to its center. Its share of a budget is P_j =
    softmax(C_j/temperature). Within a cluster the highest difficulty goes first.

    The m-th sample of a cluster (from 0) comes at the time (m + ½)/P_j, so the others take over the
    share of an exhausted cluster in proportion. The published method distributes it with a
    quadratic program, for one budget. Ties go to the smaller row. Raises UsageError for a
    temperature that is not positive and for less than one row per cluster.
    """
    check_temperature(temperature)
    if rows_a_cluster < 1:
        raise UsageError(f"rows_a_cluster is {rows_a_cluster}, allowed is 1 or more")
    rows = np.asarray(pool.features, np.float16)
    centers = _centers(pool, rows, rows_a_cluster)
    cell, distance = nearest(rows, centers)
    share = shares(cell, distance, centers, temperature)
    # best first within a cluster: rows ascend by uid, and the sort is stable
    best = np.lexsort((-pool.difficulty.astype(np.float64), cell))
    place = np.empty(cell.size, np.int64)
    place[best] = features.inside_runs(np.bincount(cell, minlength=len(centers)))
    time = (place + 0.5) / share[cell]
    return np.argsort(time, kind="stable").astype(np.int64, copy=False)


def _centers(pool: Pool, rows: Rows, rows_a_cluster: int) -> Rows:
    """Cluster centers, trained in exact steps (`cells`) on 256 rows per cluster, chosen by hash."""
    count = max(1, min(_MOST_CLUSTERS, len(rows) // rows_a_cluster))
    chosen = uids.hash_sample(pool.hi, pool.lo, 256 * count, salt=uids.SALT_DENSITY, seed=pool.seed)
    return cells.train(np.ascontiguousarray(rows[chosen]), count).centroids


def nearest(rows: Rows, centers: Rows) -> tuple[I64, F64]:
    """The nearest center of each row, (n,) int64, ties to the smaller one, and the distance to it,
    (n,) float64. rows: (n, d), centers: (c, d), floats.
    """
    cell = np.empty(len(rows), np.int64)
    distance = np.empty(len(rows), np.float64)
    wide = np.asarray(centers, np.float64, order="C")
    for begin in range(0, len(rows), _BLOCK):
        some = slice(begin, begin + _BLOCK)
        squared = scores.pairwise(np.asarray(rows[some], np.float64, order="C"), wide, True)
        cell[some] = squared.argmin(axis=1)
        distance[some] = np.sqrt(squared.min(axis=1))
    return cell, distance


def shares(cell: I64, distance: F64, centers: Rows, temperature: float) -> F64:
    """Share of each cluster in a budget, (c,) float64 above 0, in sum 1: softmax of its complexity.

    cell, distance: (n,) of `nearest`. A cluster without samples has spread 0. A single cluster has
    distance 0 to others.
    """
    wide = np.asarray(centers, np.float64, order="C")
    count = len(wide)
    sizes = np.bincount(cell, minlength=count)
    # summed in the order of rows, which is that of uids: the same sum for any layout
    spread = np.bincount(cell, weights=distance, minlength=count) / np.maximum(1, sizes)
    apart = np.sort(np.sqrt(scores.pairwise(wide, wide, True)), axis=1)[:, 1 : 1 + _NEAREST]
    between = apart.mean(axis=1) if count > 1 else np.zeros(1)
    complexity = spread * between / temperature
    # no share may be 0: the time of a sample would be infinite
    raised = np.exp(np.maximum(complexity - complexity.max(), -700.0))
    share: F64 = raised / raised.sum()
    return share
