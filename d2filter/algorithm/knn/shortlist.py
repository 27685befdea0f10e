"""Shortlists: the nearest samples by sketch, from which exact distances choose the neighbors.

A shortlist is an exact list in the space of sketches. Shortlists over disjoint members therefore
merge to the shortlist over all of them. The neighbor lists are made after merging, so partitions
cannot change them.

See docs/method.md#shortlists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, features, threads
from d2filter.algorithm.knn import exact_lists, search
from d2filter.algorithm.knn.exact_lists import Lists

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_MEASURED = 256  # shortlists that a thread measures at a time
_SETTLED = 4096
_OVER_FETCH = 4  # a list that misses the edge of a long shortlist loses next to nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortlists:
    """Shortlists of q samples."""

    lists: Lists
    """(q, T) by squared distance of sketches"""
    exact: F32
    """(q, T) squared distances of the rows, in the order of the lists; inf where padded"""

    def put(self, rows: I64, other: Shortlists, order: I64) -> None:
        """Overwrite some rows with rows `order` of others."""
        self.lists.catalog_rows[rows] = other.lists.catalog_rows[order]
        self.lists.sqdist[rows] = other.lists.sqdist[order]
        self.exact[rows] = other.exact[order]


def find(
    members: search.Members, rows: F16, catalog_rows: I64, sketches: F16, queries: F16,
    query_catalog_rows: I64, probed: I32, places: int, total: int,
    *, progress: search.Progress = lambda done: None,
) -> Shortlists:  # fmt: skip
    """Shortlists of `places` among the members of the probed cells.

    members: of sketches; rows, catalog_rows: (m, d) and (m,) ascending, the same members. sketches,
    queries: (q, d') and (q, d); where rows are their own sketches both are the same array.
    """
    same = sketches is queries
    found = search.search(
        members, sketches, query_catalog_rows, probed, places, total,
        over_fetch=search.OVER_FETCH if same else _OVER_FETCH, progress=progress,
    )  # fmt: skip
    if same:
        return Shortlists(lists=found, exact=found.sqdist)
    exact = np.full(found.catalog_rows.shape, np.inf, np.float32)
    # queries of one cell are near the same members
    order = np.argsort(probed[:, 0], kind="stable")

    def measure(some: slice) -> None:
        _measure(
            rows.view(np.uint16), catalog_rows, queries.view(np.uint16), order[some],
            found.catalog_rows, exact,
        )  # fmt: skip

    threads.in_blocks(measure, order.size, _MEASURED)
    return Shortlists(lists=found, exact=exact)


def empty(queries: int, places: int) -> Shortlists:
    """Shortlists that hold nothing yet."""
    return Shortlists(
        lists=Lists.empty(queries, places),
        exact=np.full((queries, places), np.inf, np.float32),
    )


def merge_inplace(into: Shortlists, rows: I64, other: Shortlists, queries: I64, total: int) -> None:
    """Merge shortlists over other members, as `exact_lists.merge_inplace` does."""
    exact_lists.merge_inplace(
        into.lists, rows, other.lists, queries, total, carried=(into.exact, other.exact)
    )


def settle(short: Shortlists, queries: I64, width: int, total: int) -> Lists:
    """The lists: the `width` nearest of each shortlist, equals in ring order."""
    if short.exact is short.lists.sqdist:
        return Lists(
            catalog_rows=np.ascontiguousarray(short.lists.catalog_rows[:, :width]),
            sqdist=np.ascontiguousarray(short.exact[:, :width]),
        )
    out = Lists.empty(len(queries), width)

    def fill(some: slice) -> None:
        _settle(
            short.lists.catalog_rows[some], short.exact[some], queries[some], total,
            out.catalog_rows[some], out.sqdist[some],
        )  # fmt: skip

    threads.in_blocks(fill, len(queries), _SETTLED)
    return out


@compiled.njit()
def _measure(bits, catalog_rows, query_bits, order, found, exact):  # type: ignore[no-untyped-def]
    """Exact distances of the queries `order` to the members that their shortlists name."""
    first = catalog_rows[0] if catalog_rows.size else 0
    gapless = catalog_rows.size > 0 and catalog_rows[-1] - first + 1 == catalog_rows.size
    x = np.empty(query_bits.shape[1], np.float64)
    for q in order:
        features.widen(query_bits[q], x)
        for t in range(found.shape[1]):
            catalog_row = found[q, t]
            if catalog_row < 0:
                break
            row = catalog_row - first if gapless else np.searchsorted(catalog_rows, catalog_row)
            exact[q, t] = features.sqdist_to(x, bits[row])


@compiled.njit()
def _settle(found, exact, queries, total, out, out_sqdist):  # type: ignore[no-untyped-def]
    for q in range(queries.size):
        for t in range(found.shape[1]):
            if found[q, t] < 0:
                break
            exact_lists.insert(out[q], out_sqdist[q], found[q, t], exact[q, t], queries[q], total)
