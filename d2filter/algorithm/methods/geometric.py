"""Ranking methods that use positions in feature space: near a center, or far from each other.

Each returns all rows of a pool in order, (n,) int64, best first; ties go to the smaller row.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, features, threads, uids
from d2filter.algorithm.knn import products
from d2filter.algorithm.methods import pool as pools
from d2filter.algorithm.methods.pool import Pool
from d2filter.errors import UsageError

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_TRAINING_ROWS_A_CLUSTER = 256
_ITERATIONS = 20
_BLOCK = 65536  # rows read at once: 270 MB of float64 at 512 columns
TILE = 4096  # rows of a cluster compared at once
_VALUES = 1 << 19  # that a thread takes at a time: about a millisecond
_RAISED = 64  # rows of a tile that a thread takes at a time


def moderate(pool: Pool) -> I64:
    """The band around the median distance to the center of the class (Xia et al. 2023).

    c_g = mean of the rows of class g; r_i = ‖v_i − c_g(i)‖₂; order by |r_i − median of r over the
    class| ascending. All in float64.
    """
    n = len(pool.hi)
    label = np.zeros(n, np.int64)
    if pool.group is not None:
        label = np.unique(pool.group, return_inverse=True)[1].reshape(n)
    start, members = features.bucketed(label, int(label.max()) + 1)
    off = np.empty(n, np.float64)
    for begin, end in itertools.pairwise(start):
        rows = members[begin:end]
        distance = _distances(pool.features, rows, _mean(pool.features, rows))
        off[rows] = np.abs(distance - np.median(distance))
    return pools.ascending(off)


def k_center(pool: Pool) -> I64:
    """Farthest-first traversal (Sener & Savarese 2018; the greedy 2-approximation of Gonzalez).

    First the row nearest to the mean of all, then always the row with the largest squared distance
    to the nearest one taken. Squared distances are float64 sums rounded to float32.
    """
    rows = _as_float32(pool.features)
    n = len(rows)
    nearest = np.full(n, np.inf, np.float32)
    _approach_inplace(rows, _mean(rows, np.arange(n)), nearest)
    chosen = int(np.argmin(nearest))
    nearest[:] = np.inf
    out = np.empty(n, np.int64)
    for step in range(n):
        out[step] = chosen
        nearest[chosen] = -1
        _approach_inplace(rows, rows[chosen].astype(np.float64), nearest)
        chosen = int(np.argmax(nearest))
    return out


def herding(pool: Pool) -> I64:
    """Kernel herding with the linear kernel (Welling 2009; Chen et al. 2010).

    φ_i = v_i/‖v_i‖ rounded to float32 (0 for a zero row), μ their mean, w = μ at first. Each step
    takes the x among those left that maximizes ⟨w, φ_x⟩, and w ← w + μ − φ_x. Sums in float64.
    """
    rows = _as_float32(pool.features)
    n = len(rows)
    norm = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1))
    unit = (rows / np.where(norm > 0, norm, 1.0)[:, None]).astype(np.float32)
    mean = _mean(unit, np.arange(n))
    wanted = mean.copy()
    live = np.ones(n, np.bool_)
    out = np.empty(n, np.int64)
    for step in range(n):
        out[step] = chosen = int(np.argmax(_products(unit, wanted, live)))
        live[chosen] = False
        wanted += mean - unit[chosen]
    return out


def semdedup(pool: Pool, *, rows_a_cluster: int = 1000) -> I64:
    """SemDeDup (Abbas et al. 2023) for every ε at once: `least_alike_first` within clusters of
    spherical k-means.

    About n/rows_a_cluster clusters, of rows that differ, are trained with FAISS on up to 256 rows
    each, chosen by a hash. Keeping what has a cosine of at most 1 − ε is a prefix of this order.
    Raises UsageError for less than one row a cluster.
    """
    if rows_a_cluster < 1:
        raise UsageError(f"rows_a_cluster is {rows_a_cluster}, allowed is 1 or more")
    # copies go where the first of them goes: a product may round equal rows differently
    copies = _copies(pool.features)
    count = max(1, copies.first.size // rows_a_cluster)
    chosen = copies.first[
        uids.hash_sample(
            pool.hi[copies.first], pool.lo[copies.first], _TRAINING_ROWS_A_CLUSTER * count,
            salt=uids.SALT_SEMDEDUP, seed=pool.seed,
        )
    ]  # fmt: skip
    trained = products.load_faiss().Kmeans(
        pool.features.shape[1], count, niter=_ITERATIONS, spherical=True, seed=pool.seed % 2**31,
        min_points_per_centroid=1, max_points_per_centroid=_TRAINING_ROWS_A_CLUSTER,
    )  # fmt: skip
    trained.train(_normalized(pool.features[chosen]))
    cell = np.empty(copies.first.size, np.int64)
    for begin in range(0, cell.size, _BLOCK):
        block = copies.first[begin : begin + _BLOCK]
        # rows of any norm have the same best cosine
        cell[begin : begin + _BLOCK] = trained.assign(_as_float32(pool.features[block]))[1]
    return least_alike_first(pool.features, cell[copies.group], trained.centroids)


def least_alike_first(rows: Array, cell: I64, centroids: F32) -> I64:
    """Rows in the order of their largest cosine to an earlier row of their cluster, ascending.

    rows: (n, d) float16 or float32. cell: (n,) cluster of each, equal for bit-identical rows.
    centroids: (c, d) float32. Returns (n,) int64. *Earlier* is by cosine to the centroid ascending:
    of two that are alike the less typical one stays, as published. The first of a cluster has −1.
    As published, an earlier row counts whether or not it would be kept itself. Cosines are float64
    sums rounded to float32, 0 for a zero row, 1 between bit-identical rows. Ties everywhere go to
    the smaller row.
    """
    copies = _copies(rows)
    largest = np.ones(len(rows), np.float32)
    start, members = features.bucketed(cell[copies.first], len(centroids))
    for c in range(len(centroids)):
        inside = copies.first[members[start[c] : start[c + 1]]]
        typical = np.empty(inside.size, np.float32)
        for begin in range(0, inside.size, TILE):
            tile = slice(begin, begin + TILE)
            typical[tile] = _cosines(_as_float32(rows[inside[tile]]), centroids[c])
        inside = inside[pools.ascending(typical)]
        found = np.full(inside.size, -1, np.float32)
        for begin in range(0, inside.size, TILE):
            tile = slice(begin, begin + TILE)
            later = _as_float32(rows[inside[tile]])
            for before in range(0, begin + 1, TILE):
                earlier = _as_float32(rows[inside[before : before + TILE]])
                _raise_inplace(later, earlier, before == begin, found[tile])
        largest[inside] = found
    return pools.ascending(largest)


def _as_float32(rows: Array) -> F32:
    if rows.dtype == np.float16:
        return features.to_float32(rows)
    return np.ascontiguousarray(rows, np.float32)


def _normalized(rows: Array) -> F32:
    wide = rows.astype(np.float64)
    norm = np.sqrt((wide * wide).sum(axis=1))
    return np.asarray(wide / np.where(norm > 0, norm, 1.0)[:, None], np.float32)


def _copies(rows: Array) -> features.Copies:
    """Groups of bit-identical rows; those of float32 are looked at as twice as many halves."""
    return features.group_copies(np.ascontiguousarray(rows).view(np.float16))


def _mean(rows: Array, which: I64) -> F64:
    total = np.zeros(rows.shape[1], np.float64)
    for begin in range(0, which.size, _BLOCK):
        total += rows[which[begin : begin + _BLOCK]].sum(axis=0, dtype=np.float64)
    return total / which.size


def _distances(rows: Array, which: I64, center: F64) -> F64:
    """Euclidean distance of rows[which] to a center, (w,) float64."""
    out = np.empty(which.size, np.float64)
    for begin in range(0, which.size, _BLOCK):
        difference = rows[which[begin : begin + _BLOCK]].astype(np.float64, order="C") - center
        out[begin : begin + _BLOCK] = np.sqrt((difference * difference).sum(axis=1))
    return out


def _approach_inplace(rows: F32, center: F64, nearest: F32) -> None:
    """Lower squared distances where `center` is nearer; −1 says that a row is taken."""
    threads.in_blocks(
        lambda some: _approach(rows[some], center, nearest[some]), len(rows), _block_of(rows)
    )


def _products(rows: F32, x: F64, live: npt.NDArray[np.bool_]) -> F64:
    """⟨row, x⟩ in float64, (n,); −inf for rows that are taken."""
    out = np.full(len(rows), -np.inf)
    threads.in_blocks(
        lambda some: _multiply(rows[some], x, live[some], out[some]), len(rows), _block_of(rows)
    )
    return out


def _cosines(rows: F32, center: F32) -> F32:
    """Cosine of each row to a center, (n,) float32."""
    out = np.empty(len(rows), np.float32)
    threads.in_blocks(
        lambda some: _compare(rows[some], center, out[some]), len(rows), _block_of(rows)
    )
    return out


def _raise_inplace(later: F32, earlier: F32, same: bool, largest: F32) -> None:
    """Largest cosine of each later row to an earlier one; `same`: they are the same rows."""
    norms = np.empty(len(earlier), np.float64)
    _norms(earlier, norms)
    threads.in_blocks(
        lambda some: _raise(later, earlier, norms, same, some.start, some.stop, largest),
        len(later), _RAISED,
    )  # fmt: skip


def _block_of(rows: Array) -> int:
    return max(1, _VALUES // int(rows.shape[1]))


@compiled.njit(fastmath={"reassoc"})
def _dot(x, y):  # type: ignore[no-untyped-def]  # compiled by numba
    total = np.float64(0.0)
    for c in range(x.size):
        total += np.float64(x[c]) * np.float64(y[c])
    return total


@compiled.njit(fastmath={"reassoc"})
def _approach(rows, center, nearest):  # type: ignore[no-untyped-def]  # compiled by numba
    for i in range(len(rows)):
        if nearest[i] > 0:
            total = np.float64(0.0)
            for c in range(center.size):
                difference = center[c] - np.float64(rows[i, c])
                total += difference * difference
            nearest[i] = min(nearest[i], np.float32(total))


@compiled.njit()
def _multiply(rows, x, live, out):  # type: ignore[no-untyped-def]  # compiled by numba
    for i in range(len(rows)):
        if live[i]:
            out[i] = _dot(rows[i], x)


@compiled.njit(inline="always")
def _cosine(product, xx, yy):  # type: ignore[no-untyped-def]  # compiled by numba
    scale = np.sqrt(xx * yy)
    return np.float32(product / scale) if scale > 0 else np.float32(0.0)


@compiled.njit()
def _compare(rows, center, out):  # type: ignore[no-untyped-def]  # compiled by numba
    norm = _dot(center, center)
    for i in range(len(rows)):
        out[i] = _cosine(_dot(rows[i], center), _dot(rows[i], rows[i]), norm)


@compiled.njit()
def _norms(rows, out):  # type: ignore[no-untyped-def]  # compiled by numba
    for i in range(len(rows)):
        out[i] = _dot(rows[i], rows[i])


@compiled.njit()
def _raise(later, earlier, norms, same, begin, end, largest):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        norm = _dot(later[i], later[i])
        high = largest[i]
        for j in range(i if same else len(earlier)):
            high = max(high, _cosine(_dot(later[i], earlier[j]), norm, norms[j]))
        largest[i] = high
