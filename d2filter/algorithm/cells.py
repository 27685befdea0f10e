"""Centroids, the exact choice of cells, and the number of cells to probe (DESIGN §4.1, 4.3, 4.7).

Float32 products only propose; every decision is taken on exact distances of float16 rows to
float16 centroids, ties to the smaller cell. Sums of float16 values in float64 are exact as well, so
neither the number of threads nor the layout of blocks can change a centroid or a cell.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from d2filter.algorithm import backend, features, lists

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_BLOCK = 16384
_UNSURE_BLOCK = 4096
_MARGIN = 4  # proposals beyond those wanted; near ties decide among them


def cell_count(rows: int) -> int:
    """nlist = ⌈2·√n⌉ cells for n distinct rows: cells of about √n/2 rows."""
    return max(1, int(np.ceil(2.0 * np.sqrt(rows))))


def train_centroids(sample: F16, cells: int, *, iterations: int = 8) -> F16:
    """k-means (Lloyd) over distinct rows, shape (≤ cells, d) float16, no two equal.

    sample: (m, d) float16, in an order that does not depend on the layout of files; evenly spaced
    rows of it are the start. Where all rows have one norm (within 1%, as normalized ones do) the
    centroids are scaled to it, so that large cells do not shrink towards the origin. A cell that
    ends up empty moves to the row that lies farthest from its centroid.
    """
    cells = min(cells, len(sample))
    centroids = sample[np.linspace(0, len(sample) - 1, cells).astype(np.int64)]
    norm = np.sqrt(_squared_norms(sample.view(np.uint16)))
    # in 2⁻¹⁰ steps: far coarser than the rounding of the norms
    level = float(np.round(np.median(norm) * 1024) / 1024)
    spherical = level > 0 and bool((np.abs(norm / level - 1) < 0.01).all())
    for _ in range(iterations):
        cell, distance = assign(sample, centroids, 1)
        centroids = _update(sample, cell[:, 0], distance[:, 0], cells, level if spherical else None)
    return np.unique(centroids, axis=0)


def assign(
    rows: F16,
    centroids: F16,
    probes: int,
    *,
    which: I64 | None = None,
) -> tuple[I32, F32]:
    """The `probes` nearest cells of each row, best first: cells (n, p) int32, sqdist (n, p) f32.

    rows: (m, d) float16; `which` picks n of them, None all. Order: (exact squared distance, cell
    number). p = min(probes, number of cells).
    """
    cells = len(centroids)
    count = len(rows) if which is None else len(which)
    probes = min(probes, cells)
    fetch = min(cells, probes + _MARGIN)
    out = np.zeros((count, probes), np.int32)
    distance = np.zeros((count, probes), np.float32)
    wide = features.to_float32(centroids)
    bits = centroids.view(np.uint16)
    relative = np.float32(backend.relative_error(rows.shape[1]))
    for start in range(0, count, _BLOCK):
        part = slice(start, start + _BLOCK)
        block = np.ascontiguousarray(rows[part] if which is None else rows[which[part]])
        near, proposed = backend.nearest(features.to_float32(block), wide, fetch)
        unsure = _decide(
            block.view(np.uint16), bits, proposed, near, relative, out[part], distance[part]
        )
        _decide_unsure(block, centroids, np.flatnonzero(unsure), out[part], distance[part])
    return out, distance


def calibrate(
    queries: F16, true_cells: I64, centroids: F16, target: float, *, z: float = 1.96
) -> int:
    """Fewest probes whose recall is at least `target` with the confidence that z stands for.

    queries: (q, d) float16. true_cells: (q, k) int64, the cell of each exact neighbor, −1 where the
    neighbor is found without probing (a copy) or the list is padded. A neighbor is found iff its
    cell is among those probed, so recall is known for every number of probes at once.
    """
    where = _positions(queries.view(np.uint16), centroids.view(np.uint16), true_cells)
    # the home cell of a copy costs nothing, but a search probes at least one
    low, high = 1, len(centroids)
    while low < high:  # recall cannot fall with more probes: bisect
        middle = (low + high) // 2
        hit = (where < middle).mean(axis=1)
        error = z * float(hit.std()) / np.sqrt(len(hit))
        if float(hit.mean()) - error >= target:
            high = middle
        else:
            low = middle + 1
    return low


def _update(sample: F16, cell: I32, distance: F32, cells: int, level: float | None) -> F16:
    """New centroids, (cells, d) float16, from one assignment; scaled to norm `level` if given."""
    sums = _sum_cells(sample.view(np.uint16), cell, cells)
    count = np.bincount(cell, minlength=cells)
    filled = count > 0
    means = np.zeros_like(sums)
    means[filled] = sums[filled] / count[filled, None]
    if level is not None:
        length = np.sqrt((means * means).sum(axis=1))
        scalable = filled & (length > 0)
        means[scalable] *= (level / length[scalable])[:, None]
    empty = np.flatnonzero(~filled)
    farthest = np.argsort(-distance, kind="stable")[: empty.size]
    fixed: F16 = (means + 0.0).astype(np.float16)
    fixed[empty] = sample[farthest]
    fixed += np.float16(0)
    return fixed


def _decide_unsure(block: F16, centroids: F16, rows: I64, out: I32, distance: F32) -> None:
    """Look at all cells that may be among the nearest of the rows whose proposals leave doubt."""
    for start in range(0, rows.size, _UNSURE_BLOCK):
        part = rows[start : start + _UNSURE_BLOCK]
        limit = distance[part, -1].astype(np.float64) * lists.ROUNDED
        everything = np.concatenate([block[part], centroids])
        queries = np.arange(part.size, dtype=np.int64)
        members = np.arange(part.size, len(everything), dtype=np.int64)
        query, cell = lists.within(everything, queries, members, limit)
        bounds, order = features.bucketed(query, part.size)
        _insert_cells(
            block.view(np.uint16), centroids.view(np.uint16), part, bounds, cell[order],
            out, distance,
        )  # fmt: skip


@numba.njit(cache=True, parallel=True)
def _squared_norms(bits):  # type: ignore[no-untyped-def]  # compiled by numba
    n = bits.shape[0]
    out = np.empty(n, np.float64)
    for i in numba.prange(n):
        out[i] = features.squared_norm(bits[i])
    return out


@numba.njit(cache=True)
def _sum_cells(bits, cell, cells):  # type: ignore[no-untyped-def]  # compiled by numba
    n, d = bits.shape
    sums = np.zeros((cells, d), np.float64)
    for i in range(n):
        for c in range(d):
            sums[cell[i], c] += np.float64(features.half(bits[i, c]))
    return sums


@numba.njit(cache=True, parallel=True)
def _positions(queries, centroids, true_cells):  # type: ignore[no-untyped-def]
    """How many cells come before each true cell in its query's order; −1 stays −1."""
    q, k = true_cells.shape
    cells = centroids.shape[0]
    out = np.full((q, k), -1, np.int64)
    for i in numba.prange(q):
        distance = np.empty(cells, np.float32)
        for c in range(cells):
            distance[c] = features.sqdist(queries[i], centroids[c])
        for t in range(k):
            true = true_cells[i, t]
            if true >= 0:
                before = 0
                for c in range(cells):
                    if distance[c] < distance[true] or (distance[c] == distance[true] and c < true):
                        before += 1
                out[i, t] = before
    return out


@numba.njit(cache=True, parallel=True)
def _decide(rows, centroids, proposed, near, relative, out, out_distance):  # type: ignore[no-untyped-def]
    """Order proposed cells by exact distance; returns the rows where another may be as near."""
    n = rows.shape[0]
    fetch = proposed.shape[1]
    probes = out.shape[1]
    unsure = np.zeros(n, np.bool_)
    for i in numba.prange(n):
        count = 0
        for t in range(fetch):
            c = proposed[i, t]
            _insert(out[i], out_distance[i], count, c, features.sqdist(rows[i], centroids[c]))
            count = min(count + 1, probes)
        if fetch < centroids.shape[0]:
            bound = lists.certain(rows[i], near[i, fetch - 1], relative)
            unsure[i] = out_distance[i, probes - 1] >= bound
    return unsure


@numba.njit(cache=True)
def _insert_cells(rows, centroids, which, bounds, cells, out, out_distance):  # type: ignore[no-untyped-def]
    """Fill the lists of some rows from candidates given as CSR."""
    for w in range(which.size):
        i = which[w]
        count = 0
        for t in range(bounds[w], bounds[w + 1]):
            c = cells[t]
            _insert(out[i], out_distance[i], count, c, features.sqdist(rows[i], centroids[c]))
            count = min(count + 1, out.shape[1])


@numba.njit(cache=True, inline="always")
def _insert(ids, distance, count, c, d):  # type: ignore[no-untyped-def]  # compiled by numba
    """Insert (d, c) into the ascending list of the best; the worst falls off the end."""
    at = count
    while at > 0 and (d < distance[at - 1] or (d == distance[at - 1] and c < ids[at - 1])):
        if at < ids.size:
            ids[at] = ids[at - 1]
            distance[at] = distance[at - 1]
        at -= 1
    if at < ids.size:
        ids[at] = c
        distance[at] = d
