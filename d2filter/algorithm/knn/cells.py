"""Trains centroids on two levels and finds the cells that a sample probes.

There are many small cells, because small cells make the search cheap. Comparing a sample with all
their centroids would be expensive, so it considers only the cells under its nearest *parents*,
which are the centroids of the upper level.

All choices use exact distances, ties go to the smaller cell, and sums are exact. The number of
threads and the size of blocks cannot change a centroid or a choice.

See docs/method.md#cells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, features
from d2filter.algorithm.knn import products
from d2filter.algorithm.knn.search import EVERY_CELL, Progress, make_members, search, search_all

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

MOST_PROBES = 64
STORED_PROBES = 16  # assigned at first; more only when the calibration asks for more
TRAINING_ROWS_A_CELL = 16

PARENTS_LOOKED_UNDER = 8
_MOST_CELLS = 131072
_FLAT_BELOW = 256  # so few cells are trained on one level
_TRAINING_ROWS_A_PARENT = 256
_ITERATIONS = 5
_OVER_FETCH = 4  # centroids are not as alike as samples
_COMMON_ITERATIONS = 1
BLOCK = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """nlist centroids, numbered parent by parent."""

    centroids: F16
    """(nlist, d), no two equal"""
    parents: F16
    """(parents, d)"""
    parent: I32
    """(nlist,) parent of each cell"""
    looked_under: int = PARENTS_LOOKED_UNDER
    """parents under which a row chooses among cells: its nearest"""

    @property
    def count(self) -> int:
        """nlist."""
        return len(self.centroids)


def cell_count(rows: int, k: int) -> int:
    """nlist = ⌈4·√n⌉ for n rows, but cells of at least 32 rows and of 4·(k + 1)."""
    return int(max(1, min(np.ceil(4.0 * np.sqrt(rows)), rows // max(32, 4 * (k + 1)), _MOST_CELLS)))


def train(sample: F16, count: int, looked_under: int = PARENTS_LOOKED_UNDER) -> Cells:
    """k-means on two levels over (m, d) float16 rows, in an order independent of files.

    √count / 2 parents first; then the rows of each parent make its share of the cells. Copies in
    the sample count once. Fewer cells come out where rows or distinct centroids are few.
    """
    sample = _distinct(sample)
    count = min(count, len(sample))
    if count < _FLAT_BELOW:
        return from_centroids(_kmeans(sample, count))
    number = int(np.ceil(np.sqrt(count) / 2))
    parents = _kmeans(_spaced(sample, _TRAINING_ROWS_A_PARENT * number), number)
    of_row = _nearest(sample, parents, 1)[:, 0]
    start, order = features.bucketed(of_row, len(parents))
    children: list[F16] = [sample[:0]] * len(parents)

    def split(p: int) -> None:
        rows = sample[order[start[p] : start[p + 1]]]
        if len(rows):
            children[p] = _kmeans(rows, max(1, round(count * len(rows) / len(sample))))

    products.each(split, len(parents))
    cells = from_centroids(np.concatenate(children), parents)
    # children of one parent know nothing of their neighbors under another
    for _ in range(_COMMON_ITERATIONS):
        home = assign(sample, cells, 1)[:, 0]
        cells = from_centroids(_update(sample, home, cells.centroids, _level(sample)), parents)
    return replace(cells, looked_under=looked_under)


def from_centroids(centroids: F16, parents: F16 | None = None) -> Cells:
    """The two levels around given centroids (·, d) float16; without parents, one that has all."""
    centroids = _distinct(centroids)
    if parents is None:
        parents = centroids[:1]
    parent = _nearest(centroids, parents, 1)[:, 0]
    order = np.argsort(parent, kind="stable")
    centroids, parent = np.ascontiguousarray(centroids[order]), parent[order]
    return Cells(centroids=centroids, parents=parents, parent=parent)


def assign(rows: F16, cells: Cells, probes: int, *, progress: Progress = lambda done: None) -> I32:
    """The cells that each row probes, nearest first, (n, min(probes, nlist, MOST_PROBES)) int32.

    rows: (n, d) float16. The first one is the row's home. −1 pads where the parents looked
    under have fewer. Order: (exact squared distance, cell).
    """
    probes = min(probes, cells.count, MOST_PROBES)
    out = np.zeros((len(rows), probes), np.int32)
    if cells.count == 1:
        return out
    every_cell = np.arange(cells.count, dtype=np.int64)
    under = make_members(cells.centroids, every_cell, cells.parent, len(cells.parents))
    for begin in range(0, len(rows), BLOCK):
        # a copy, of a memory map too: compiled code is made anew for read-only arrays
        block = np.array(rows[begin : begin + BLOCK])
        looked = _nearest(block, cells.parents, cells.looked_under)
        found = search(
            under, block, _before_all(block), looked, probes, cells.count + 1,
            over_fetch=_OVER_FETCH,
        )  # fmt: skip
        out[begin : begin + len(block)] = found.catalog_rows
        progress(len(block))
    return out


def every_cell_where_short(probed: I32, sizes: I64, k: int) -> I32:
    """`probed` with EVERY_CELL for the rows whose cells hold fewer than k others.

    sizes: (nlist,) rows of each cell in the whole pool. −1 in a list then means that no more exist.
    """
    held = np.where(probed >= 0, sizes[probed], 0).sum(axis=1)
    if (held > k).all():
        return probed
    out: I32 = probed.copy()
    out[held <= k, 0] = EVERY_CELL
    return out


def _nearest(rows: F16, centroids: F16, count: int) -> I32:
    """The nearest of a few centroids, compared with all: (n, min(count, centroids)) int32."""
    found = search_all(
        centroids, np.arange(len(centroids)), rows, _before_all(rows), min(count, len(centroids)),
        len(centroids) + 1, over_fetch=_OVER_FETCH,
    )  # fmt: skip
    nearest: I32 = found.catalog_rows.astype(np.int32)
    return nearest


def _before_all(rows: F16) -> I64:
    """Every query numbered −1: on the ring behind −1 come the cells in ascending order."""
    return np.full(len(rows), -1, np.int64)


def _kmeans(sample: F16, count: int) -> F16:
    """Lloyd's k-means over distinct rows, (≤ count, d) float16, no two equal.

    Evenly spaced rows are the start. Where all rows have one norm (within 1%, as normalized ones
    do) the centroids are scaled to it, so that large cells do not shrink towards the origin. A cell
    that ends up empty moves to the row that lies farthest from its centroid.
    """
    count = min(count, len(sample))
    centroids = _spaced(sample, count)
    if count == len(sample):
        return centroids
    level = _level(sample)
    for _ in range(_ITERATIONS):
        centroids = _distinct(centroids)
        cell = _nearest(sample, centroids, 1)[:, 0]
        centroids = _update(sample, cell, centroids, level)
    return _distinct(centroids)


def _level(sample: F16) -> float | None:
    """The norm that all rows have within 1%, None where they have not."""
    norm = np.sqrt(features.squared_norms(sample))
    # in 2⁻¹⁰ steps: far coarser than the rounding of the norms
    level = float(np.round(np.median(norm) * 1024) / 1024)
    return level if level > 0 and bool((np.abs(norm / level - 1) < 0.01).all()) else None


def _update(sample: F16, cell: I32, centroids: F16, level: float | None) -> F16:
    """New centroids from one assignment, as many; scaled to norm `level` if given."""
    sums = _sum_cells(sample.view(np.uint16), cell, len(centroids))
    count = np.bincount(cell, minlength=len(centroids))
    filled = count > 0
    means = np.zeros_like(sums)
    means[filled] = sums[filled] / count[filled, None]
    if level is not None:
        length = np.sqrt((means * means).sum(axis=1))
        scalable = filled & (length > 0)
        means[scalable] *= (level / length[scalable])[:, None]
    fixed: F16 = (means + 0.0).astype(np.float16)
    empty = np.flatnonzero(~filled)
    if empty.size:
        own = (len(sample) + cell.astype(np.int64))[:, None]
        distance = features.sqdist_pairs(np.concatenate([sample, centroids]), own)[:, 0]
        fixed[empty] = sample[np.argsort(-distance, kind="stable")[: empty.size]]
    fixed += np.float16(0)
    return fixed


def _distinct(rows: F16) -> F16:
    """The first of each group of equal rows, in order."""
    return rows[features.group_copies(rows).first]


def _spaced(sample: F16, count: int) -> F16:
    """Up to `count` evenly spaced rows."""
    count = min(count, len(sample))
    return sample[np.linspace(0, len(sample) - 1, count).astype(np.int64)]


@compiled.njit()
def _sum_cells(bits, cell, cells):  # type: ignore[no-untyped-def]  # compiled by numba
    n, d = bits.shape
    sums = np.zeros((cells, d), np.float64)
    for i in range(n):
        for c in range(d):
            sums[cell[i], c] += np.float64(features.half(bits[i, c]))
    return sums
