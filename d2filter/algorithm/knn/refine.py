"""Refinement: compares each sample with the neighbors of its neighbors.

This finds neighbors that lie in cells which were not probed. The pass reads the lists of the search
and writes new ones, so order and partitions cannot change it. A candidate is measured only if its
home cell was not probed; all others were compared before.

See docs/method.md#refinement.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, features, threads
from d2filter.algorithm.knn import exact_lists
from d2filter.algorithm.knn.exact_lists import Lists
from d2filter.algorithm.knn.search import EVERY_CELL

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

BLOCK = 65536  # samples whose candidates are held at a time
_LISTS = 512  # of them, that a thread takes at a time


def distinct(catalog_rows: I64) -> tuple[I64, I64]:
    """The samples named in lists, ascending, and where each place of the lists names: −1 pads."""
    there = catalog_rows >= 0
    named, back = np.unique(catalog_rows[there], return_inverse=True)
    where = np.full(catalog_rows.shape, -1, np.int64)
    where[there] = back
    return named, where


def home_cells(catalog_rows: I64, home_of: Callable[[I64], I32]) -> I32:
    """Home cell of each neighbor in lists, −1 where padded; home_of is called once with all of
    them.
    """
    named, where = distinct(catalog_rows)
    cells = np.full(catalog_rows.shape, -1, np.int32)
    cells[where >= 0] = home_of(named)[where[where >= 0]]
    return cells


def candidates(
    catalog_rows: I64,
    probed: I32,
    own: I64,
    others: I64,
    cells_of_others: I32,
    neighbor_row: I64,
) -> tuple[I64, I64]:
    """Neighbors of neighbors worth measuring, as CSR: start (q + 1,), catalog rows.

    catalog_rows: (q,) of the samples; probed: (q, p); own: (q, K) their lists. others: (f, K) lists
    of their neighbors with the home cells of what these name, cells_of_others; neighbor_row: (q, K)
    row of each neighbor in it, −1 for none. Each candidate is named once, is not in the list yet,
    and was never compared.
    """
    start = np.zeros(catalog_rows.size + 1, np.int64)
    found = np.empty(0, np.int64)

    def candidates(some: slice, counting: bool) -> None:
        _candidates(
            catalog_rows, probed, own, others, cells_of_others, neighbor_row, some.start, some.stop,
            start, found, counting,
        )  # fmt: skip

    threads.in_blocks(lambda some: candidates(some, True), catalog_rows.size, _LISTS)
    np.cumsum(start, out=start)
    found = np.empty(start[-1], np.int64)
    threads.in_blocks(lambda some: candidates(some, False), catalog_rows.size, _LISTS)
    return start, found


def improved(
    rows: F16, catalog_rows: I64, own: Lists, k: int, start: I64, found: I64, table: F16,
    where: I64, total: int,
) -> Lists:  # fmt: skip
    """The first k of the lists after the pass. rows: (q, d) features of the samples.

    start, found: the candidates (CSR); table[where]: their features. total: n. Nothing is modified.
    """
    after = Lists(catalog_rows=own.catalog_rows[:, :k].copy(), sqdist=own.sqdist[:, :k].copy())

    def improve(some: slice) -> None:
        _improve(
            rows.view(np.uint16), catalog_rows, start, found, table.view(np.uint16), where, total,
            some.start, some.stop, after.catalog_rows, after.sqdist,
        )  # fmt: skip

    threads.in_blocks(improve, catalog_rows.size, _LISTS)
    return after


@compiled.njit()
def _candidates(  # type: ignore[no-untyped-def]  # compiled by numba
    catalog_rows, probed, own, others, cells_of_others, neighbor_row, begin, end, start, found,
    counting,
):  # fmt: skip
    """Count the candidates of each sample into start[1:], or write them from start[i] on."""
    width = own.shape[1]
    size = 16
    while size < 2 * width * width:
        size *= 2
    seen = np.empty(size, np.int64)  # open addressing
    for i in range(begin, end):
        if probed[i, 0] == EVERY_CELL:
            continue
        seen[:] = -1
        for t in range(width):
            if own[i, t] >= 0:
                _add(seen, own[i, t])
        _add(seen, catalog_rows[i])
        count = 0
        for t in range(width):
            f = neighbor_row[i, t]
            if f < 0:
                continue
            for s in range(width):
                h = others[f, s]
                if h < 0:
                    break
                cell = cells_of_others[f, s]
                compared = False
                for c in range(probed.shape[1]):
                    if probed[i, c] == cell:
                        compared = True
                        break
                if compared or not _add(seen, h):
                    continue
                if not counting:
                    found[start[i] + count] = h
                count += 1
        if counting:
            start[i + 1] = count


@compiled.njit()
def _add(seen, catalog_row):  # type: ignore[no-untyped-def]  # compiled by numba
    """Add to the set; False when it is there already."""
    mask = seen.size - 1
    at = (catalog_row * 0x9E3779B1 >> 7) & mask
    while seen[at] >= 0:
        if seen[at] == catalog_row:
            return False
        at = (at + 1) & mask
    seen[at] = catalog_row
    return True


@compiled.njit()
def _improve(  # type: ignore[no-untyped-def]  # compiled by numba
    bits, catalog_rows, start, found, table, where, total, begin, end, out, out_sqdist
):
    last = out.shape[1] - 1
    surely = 1 - (bits.shape[1] + 16) * 2.0**-24  # of a distance in float32: it is as large as this
    x = np.empty(bits.shape[1], np.float64)
    for i in range(begin, end):
        if start[i] == start[i + 1]:
            continue
        features.widen(bits[i], x)
        narrow = x.astype(np.float32)
        for t in range(start[i], start[i + 1]):
            if features.about(narrow, table[where[t]]) * surely > out_sqdist[i, last]:
                continue
            d = features.sqdist_to(x, table[where[t]])
            exact_lists.insert(out[i], out_sqdist[i], found[t], d, catalog_rows[i], total)
