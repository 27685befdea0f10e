"""Refinement over neighbors of neighbors (DESIGN §4): what few probes missed, friends know.

A pass reads the lists of the pass before and nothing else (double-buffered), so neither order nor
partition can change it. A neighbor of a neighbor is measured only when its home cell was not
probed: all others were compared already. From the second pass on only what is new counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features
from d2filter.algorithm.lists import Lists
from d2filter.algorithm.search import EVERY_CELL

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
BLOCK = 65536  # samples whose candidates are held at a time

Fresh = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Lists between two passes, with what the next pass needs of each neighbor."""

    lists: Lists
    cells: I32
    """(q, K) home cell of each neighbor"""
    fresh: Fresh
    """(q, K) whether it came with the last pass"""

    def take(self, rows: I64) -> Round:
        """The given rows, in that order."""
        return Round(lists=self.lists.take(rows), cells=self.cells[rows], fresh=self.fresh[rows])


def first_round(lists: Lists, cells: I32) -> Round:
    """The lists of the search. cells: (q, K) home cell of each neighbor."""
    return Round(lists=lists, cells=cells, fresh=np.ones(cells.shape, np.bool_))


def candidates(
    numbers: I64, probed: I32, own: Round, friends: Round, friend_of: I64
) -> tuple[I64, I64, I32]:
    """Neighbors of neighbors worth measuring: CSR (start (q + 1,), numbers, home cells).

    numbers: (q,) of the samples; probed: (q, p); own: their lists. friends: lists of their
    neighbors, friend_of: (q, K) row of each neighbor in it, −1 for none. Each candidate is named
    once, is not in the list yet, and was never compared.
    """
    start = np.zeros(numbers.size + 1, np.int64)
    arguments = (
        numbers, probed, own.lists.numbers, own.fresh, friends.lists.numbers, friends.cells,
        friends.fresh, friend_of, start,
    )  # fmt: skip
    nothing = np.empty(0, np.int64)
    _candidates(*arguments, nothing, nothing.astype(np.int32), True)
    np.cumsum(start, out=start)
    found = np.empty(start[-1], np.int64)
    cells = np.empty(start[-1], np.int32)
    _candidates(*arguments, found, cells, False)
    return start, found, cells


def improved(
    rows: F16, numbers: I64, own: Round, start: I64, found: I64, cells: I32,
    table: F16, where: I64, total: int,
) -> Round:  # fmt: skip
    """The lists after a pass. rows: (q, d) features of the samples. Nothing is modified.

    start, found, cells: the candidates (CSR); table[where]: their features. total: n.
    """
    after = Round(
        lists=Lists(numbers=own.lists.numbers.copy(), sqdist=own.lists.sqdist.copy()),
        cells=own.cells.copy(),
        fresh=np.zeros_like(own.fresh),
    )
    _improve(
        rows.view(np.uint16), numbers, start, found, cells, table.view(np.uint16), where, total,
        after.lists.numbers, after.lists.sqdist, after.cells, after.fresh,
    )  # fmt: skip
    return after


@numba.njit(cache=True, parallel=True)
def _candidates(  # type: ignore[no-untyped-def]  # compiled by numba
    numbers, probed, own, own_fresh, friends, friend_cells, friend_fresh, friend_of, start,
    found, cells, counting,
):  # fmt: skip
    """Count the candidates of each sample into start[1:], or write them from start[i] on."""
    q, width = own.shape
    size = 16
    while size < 2 * width * width:
        size *= 2
    for i in numba.prange(q):
        if probed[i, 0] == EVERY_CELL:
            continue
        seen = np.full(size, -1, np.int64)  # open addressing
        for t in range(width):
            if own[i, t] >= 0:
                _add(seen, own[i, t])
        _add(seen, numbers[i])
        count = 0
        for t in range(width):
            f = friend_of[i, t]
            if f < 0:
                continue
            for s in range(width):
                h = friends[f, s]
                if h < 0:
                    break
                if not (own_fresh[i, t] or friend_fresh[f, s]):
                    continue
                cell = friend_cells[f, s]
                compared = False
                for c in range(probed.shape[1]):
                    if probed[i, c] == cell:
                        compared = True
                        break
                if compared or not _add(seen, h):
                    continue
                if not counting:
                    found[start[i] + count] = h
                    cells[start[i] + count] = cell
                count += 1
        if counting:
            start[i + 1] = count


@numba.njit(cache=True)
def _add(seen, number):  # type: ignore[no-untyped-def]  # compiled by numba
    """Add to the set; False when it is there already."""
    mask = seen.size - 1
    at = (number * 0x9E3779B1 >> 7) & mask
    while seen[at] >= 0:
        if seen[at] == number:
            return False
        at = (at + 1) & mask
    seen[at] = number
    return True


@numba.njit(cache=True, parallel=True)
def _improve(  # type: ignore[no-untyped-def]  # compiled by numba
    bits, numbers, start, found, cells, table, where, total, out, out_sqdist, out_cells, out_fresh
):
    k = out.shape[1]
    for i in numba.prange(numbers.size):
        if start[i] == start[i + 1]:
            continue
        x = np.empty(bits.shape[1], np.float64)
        features.widen(bits[i], x)
        for t in range(start[i], start[i + 1]):
            d = features.sqdist_to(x, table[where[t]])
            h = found[t]
            offset = (h - numbers[i]) % total
            at = k
            while at > 0 and (
                out[i, at - 1] < 0
                or out_sqdist[i, at - 1] > d
                or (out_sqdist[i, at - 1] == d and (out[i, at - 1] - numbers[i]) % total > offset)
            ):
                at -= 1
            if at == k:
                continue
            for s in range(k - 1, at, -1):
                out[i, s] = out[i, s - 1]
                out_sqdist[i, s] = out_sqdist[i, s - 1]
                out_cells[i, s] = out_cells[i, s - 1]
                out_fresh[i, s] = out_fresh[i, s - 1]
            out[i, at] = h
            out_sqdist[i, at] = d
            out_cells[i, at] = cells[t]
            out_fresh[i, at] = True
