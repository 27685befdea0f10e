"""Assigns cells to partitions: neighboring cells together, partitions of about equal size.

The assignment decides where work is done and how many edges are cut, never the result. A *unit* is
a cell, or a slice of a cell that is too large for one partition.

See docs/method.md#graph-partitions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_ITERATIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which partition is the home of each row of a catalog."""

    partition: I32
    """(parts, nlist) home partition of the rows of a cell that lie in a catalog part"""
    cell: I32
    """(units,) ascending"""
    owner: I32
    """(units,) partition that holds the unit"""
    rows: I64
    """(units,)"""
    partitions: int

    def sizes(self) -> I64:
        """Rows of each partition."""
        return np.bincount(self.owner, weights=self.rows, minlength=self.partitions).astype(
            np.int64
        )

    def owners_of(self, cells: int) -> tuple[I64, I32]:
        """The partitions that hold some of each cell, as CSR (start (cells + 1,), partitions)."""
        pairs = np.unique(np.stack([self.cell, self.owner], axis=1), axis=0)
        start, _ = features.bucketed(pairs[:, 0], cells)
        return start, np.ascontiguousarray(pairs[:, 1]).astype(np.int32)


def lay_out(centroids: F16, counts: I64, partitions: int) -> Layout:
    """Spread cells over partitions. counts: (parts, nlist) rows of each cell in each catalog part.

    A cell that holds more than half of a partition's fair share is cut where catalog parts end.
    """
    parts, nlist = counts.shape
    fair = counts.sum() / partitions
    cell: list[int] = []
    rows: list[int] = []
    unit_of = np.zeros((parts, nlist), np.int64)
    for c in range(nlist):
        column = counts[:, c]
        whole = partitions == 1 or column.sum() <= fair / 2
        pieces = np.zeros(parts, np.int64) if whole else _pieces(column, fair / 2)
        for piece in range(int(pieces[-1]) + 1):
            unit_of[pieces == piece, c] = len(cell)
            cell.append(c)
            rows.append(int(column[pieces == piece].sum()))
    units = np.array(cell, np.int32)
    weight = np.array(rows, np.int64)
    owner = np.zeros(units.size, np.int32)
    _bisect(
        centroids.astype(np.float64)[units], weight, np.arange(units.size), 0, partitions, owner
    )
    return Layout(
        partition=owner[unit_of], cell=units, owner=owner, rows=weight, partitions=partitions
    )


def destinations(assigned: I32, home: I32, start: I64, owners: I32) -> tuple[I64, I32]:
    """(row, partition) pairs, each once: where the rows of a part must be compared.

    assigned: (n, p) probed cells, −1 pads; a row with EVERY_CELL first goes to all partitions.
    home: (n,) own partition. start, owners: `Layout.owners_of`. Sorted by (partition, row).
    """
    n, probes = assigned.shape
    rows = [np.arange(n, dtype=np.int64)]
    goals = [home]
    for p in range(probes):
        cell = assigned[:, p]
        there = np.flatnonzero(cell >= 0)
        count = start[cell[there] + 1] - start[cell[there]]
        rows.append(np.repeat(there, count))
        goals.append(owners[np.repeat(start[cell[there]], count) + features.inside_runs(count)])
    everywhere = np.flatnonzero(assigned[:, 0] < -1)
    all_of_them = np.unique(owners)
    rows.append(np.repeat(everywhere, all_of_them.size))
    goals.append(np.tile(all_of_them, everywhere.size).astype(np.int32))
    key = np.unique(np.concatenate(goals).astype(np.int64) * n + np.concatenate(rows))
    return key % n, (key // n).astype(np.int32)


def _pieces(column: I64, most: float) -> I64:
    """Piece of each catalog part: consecutive parts together hold about `most` rows."""
    before = np.cumsum(column) - column
    return np.unique(np.floor(before / max(most, 1.0)), return_inverse=True)[1].astype(np.int64)


def _bisect(
    points: npt.NDArray[np.float64], weight: I64, units: I64, first: int, count: int, owner: I32
) -> None:
    """Cut `units` in two at the share of the partitions that each half gets, and go on."""
    if count == 1 or units.size == 0:
        owner[units] = first
        return
    left = count // 2
    x = points[units]
    direction = _direction(x, weight[units].astype(np.float64) + 1e-9)
    order = np.lexsort((units, x @ direction))
    total = np.cumsum(weight[units][order])
    cut = int(np.searchsorted(total - weight[units][order] / 2, total[-1] * left / count))
    # every partition gets a unit while there are enough
    cut = min(max(cut, min(left, units.size)), max(units.size - (count - left), 0))
    _bisect(points, weight, np.sort(units[order[:cut]]), first, left, owner)
    _bisect(points, weight, np.sort(units[order[cut:]]), first + left, count - left, owner)


def _direction(
    x: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Direction between the centers of a weighted 2-means: along it the cut is short."""
    middle = (x * weight[:, None]).sum(axis=0) / weight.sum()
    a = int(np.argmax(((x - middle) ** 2).sum(axis=1)))
    b = int(np.argmax(((x - x[a]) ** 2).sum(axis=1)))
    centers = np.stack([x[a], x[b]])
    for _ in range(_ITERATIONS):
        direction = centers[1] - centers[0]
        side = x @ direction > centers.mean(axis=0) @ direction
        for s in (0, 1):
            some = side == bool(s)
            if some.any():
                centers[s] = (x[some] * weight[some, None]).sum(axis=0) / weight[some].sum()
    out: npt.NDArray[np.float64] = centers[1] - centers[0]
    return out
