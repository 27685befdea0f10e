"""Exact k nearest neighbors within chosen cells, with one matrix product per cell.

Products propose neighbors and exact distances decide. If rounding could matter, all members of the
cells are compared in float64. The result therefore depends on members, queries, probed cells and k
alone, not on threads, block sizes, CPU or GPU. Members with the same bits are searched once and
listed in ring order. Lists over disjoint sets of members merge to the list over their union; this
makes the graph independent of partitions.

See docs/method.md#exact-search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features, threads
from d2filter.algorithm.knn import exact_lists, products
from d2filter.algorithm.knn.exact_lists import Lists

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Progress = Callable[[int], None]

OVER_FETCH = 16  # proposals beyond k (docs/method.md#exact-search)
EVERY_CELL = -2  # in the first column of `probed`: this query searches all members

QUERY_BLOCK = 65536  # distinct queries whose lists a thread holds at a time
_SMALLEST_BLOCK = 128  # below it a thread of its own does not pay
_WIDE_BLOCK = 256
_WIDE_PAIRS = 2_000_000
_WIDE_ROWS = 8192
_ROUNDED = 1.0 + 2.0**-22  # what a limit is widened by, as it was rounded to float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The samples that are searched: m samples in cells."""

    rows: F16
    """(m, d) fixed features, finite"""
    copies: features.Copies
    copy_rows: I64
    """(m,) catalog rows of group 0, of group 1, …; ascending inside a group"""
    cell_start: I64
    """(cells + 1,) offsets into `cell_groups`"""
    cell_groups: I64
    """groups of cell 0, of cell 1, …; a group may lie in several cells"""

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.cell_start.size - 1


def make_members(
    rows: F16, catalog_rows: I64, cell: npt.NDArray[np.integer], cells: int
) -> Members:
    """Samples with one cell each. catalog_rows: (m,) ascending; cell: (m,), equal for copies."""
    copies = features.group_copies(rows)
    start, groups = features.bucketed(cell[copies.first], cells)
    return Members(
        rows=rows,
        copies=copies,
        copy_rows=catalog_rows[copies.members],
        cell_start=start,
        cell_groups=groups,
    )


def search_all(
    rows: F16,
    catalog_rows: I64,
    queries: F16,
    query_catalog_rows: I64,
    k: int,
    total: int,
    *,
    over_fetch: int = OVER_FETCH,
) -> Lists:
    """The k nearest of all `rows` to each query: `search` with a single cell."""
    among = make_members(rows, catalog_rows, np.zeros(len(rows), np.int32), 1)
    probed = np.zeros((len(queries), 1), np.int32)
    return search(among, queries, query_catalog_rows, probed, k, total, over_fetch=over_fetch)


def search(
    members: Members,
    queries: F16,
    catalog_rows: I64,
    probed: I32,
    k: int,
    total: int,
    *,
    over_fetch: int = OVER_FETCH,
    progress: Progress = lambda done: None,
) -> Lists:
    """The k nearest members of each query among the cells that it probes, itself left out.

    queries: (q, d) float16; catalog_rows: (q,) int64; equal queries must probe equal cells. probed:
    (q, p) int32, −1 for none; EVERY_CELL in the first column for all members. total: n, for the
    ring order. over_fetch: proposals beyond k, which changes the cost alone. A list is short only
    when the cells hold fewer than k others.
    """
    out = Lists.empty(len(queries), k)
    if not len(queries) or not len(members.rows):
        return out
    everywhere = np.flatnonzero(probed[:, 0] == EVERY_CELL)
    if everywhere.size:
        all_cells = np.zeros((everywhere.size, 1), np.int32)
        found = search(
            _one_cell(members), queries[everywhere], catalog_rows[everywhere], all_cells, k, total,
            over_fetch=over_fetch,
        )  # fmt: skip
        out.catalog_rows[everywhere], out.sqdist[everywhere] = found.catalog_rows, found.sqdist
        progress(everywhere.size)
    groups = features.group_copies(queries)
    begins = probed[groups.first, 0]
    # queries that begin in one cell share most of the others, and the members that they measure
    order = np.argsort(begins, kind="stable")[np.count_nonzero(begins == EVERY_CELL) :]
    blocks = -(-order.size // QUERY_BLOCK)
    blocks = max(blocks, min(threads.count(), order.size // _SMALLEST_BLOCK))
    bounds = np.linspace(0, order.size, blocks + 1).astype(np.int64)

    def work(number: int) -> None:
        block = order[bounds[number] : bounds[number + 1]]
        _search_block(members, queries, catalog_rows, probed, groups, block, total, over_fetch, out)
        progress(int((groups.start[block + 1] - groups.start[block]).sum()))

    products.each(work, blocks)
    return out


def _search_block(
    members: Members, queries: F16, catalog_rows: I64, probed: I32, groups: features.Copies,
    block: I64, total: int, over_fetch: int, out: Lists,
) -> None:  # fmt: skip
    """Write the lists of the distinct queries `block` into `out`."""
    first = groups.first[block]
    rows_start, rows = _rows_of(groups, block)
    asked = probed[first]
    k = out.catalog_rows.shape[1]
    places = min(k + 1 + over_fetch, members.copies.first.size)
    held = _propose(members, queries, first, asked, places)
    common = (
        queries.view(np.uint16), first, rows_start, rows, catalog_rows, total, out.catalog_rows,
        out.sqdist,
    )  # fmt: skip
    copies = members.copies
    bits = members.rows.view(np.uint16)
    limit, unsure = exact_lists.fill_from_proposals(
        bits, copies.first, copies.start, members.copy_rows, held.near, held.ids, held.reach,
        products.relative_error(queries.shape[1]), *common,
    )  # fmt: skip
    positions = np.flatnonzero(unsure)
    step = _WIDE_BLOCK
    begin = 0
    while begin < positions.size:
        which = positions[begin : begin + step]
        start, candidates = within_limits(
            members, queries[first[which]], asked[which], limit[which].astype(np.float64) * _ROUNDED
        )
        begin += which.size
        # where many are equally near, few queries at a time bound the memory
        step = max(16, min(_WIDE_BLOCK, _WIDE_PAIRS * which.size // max(1, candidates.size)))
        exact_lists.fill_from_candidates(
            bits, copies.first, copies.start, members.copy_rows, which, start, candidates,
            *common,
        )  # fmt: skip


def _propose(
    members: Members, queries: F16, first: I64, asked: I32, places: int
) -> products.Nearest:
    """The nearest groups of each distinct query, cell by cell."""
    held = products.Nearest(first.size, places)
    # what is held is numbered like `first`; products need the rows themselves
    rows = np.ascontiguousarray(queries[first])
    # the nearest cells first: after them little is near enough to be taken
    nearest, others = asked[:, :1], asked[:, 1:]
    for cell, askers in _by_cell(nearest, members.cells) + _by_cell(others, members.cells):
        which = members.cell_groups[members.cell_start[cell] : members.cell_start[cell + 1]]
        if which.size:
            member_rows = members.copies.first[which]
            center = members.rows[member_rows[0]].astype(np.float32)
            products.improve_inplace(rows, askers, members.rows, member_rows, which, center, held)
    return held


def _by_cell(asked: I32, cells: int) -> list[tuple[int, I64]]:
    """(cell, queries that probe it) for every cell that is probed at all."""
    flat = asked.ravel()
    valid = np.flatnonzero(flat >= 0)
    start, order = features.bucketed(flat[valid], cells)
    who = valid[order] // asked.shape[1]
    return [(int(c), who[start[c] : start[c + 1]]) for c in np.flatnonzero(np.diff(start))]


def within_limits(
    members: Members, queries: F16, asked: I32, limit: npt.NDArray[np.float64]
) -> tuple[I64, I64]:
    """Groups of the probed cells that may lie within each query's limit: CSR (start, groups)."""
    hits, found = [], []
    x = queries.astype(np.float64)
    x_norm = (x * x).sum(axis=1)
    slack = (queries.shape[1] + 8) * 2.0**-52
    for cell, askers in _by_cell(asked, members.cells):
        which = members.cell_groups[members.cell_start[cell] : members.cell_start[cell + 1]]
        for begin in range(0, which.size, _WIDE_ROWS):
            some = which[begin : begin + _WIDE_ROWS]
            y = members.rows[members.copies.first[some]].astype(np.float64)
            y_norm = (y * y).sum(axis=1)
            distance = x[askers] @ y.T
            distance *= -2.0
            distance += x_norm[askers, None]
            distance += y_norm[None, :]
            error = slack * 2.0 * (x_norm[askers, None] + y_norm[None, :])
            hit, member = np.nonzero(distance - error <= limit[askers, None])
            hits.append(askers[hit])
            found.append(some[member])
    if not hits:
        return np.zeros(len(queries) + 1, np.int64), np.empty(0, np.int64)
    start, order = features.bucketed(np.concatenate(hits), len(queries))
    return start, np.concatenate(found)[order]


def _rows_of(groups: features.Copies, block: I64) -> tuple[I64, I64]:
    """The rows of some groups as CSR."""
    sizes = groups.start[block + 1] - groups.start[block]
    start = np.zeros(block.size + 1, np.int64)
    np.cumsum(sizes, out=start[1:])
    at = np.repeat(groups.start[block], sizes) + features.inside_runs(sizes)
    return start, groups.members[at]


def _one_cell(members: Members) -> Members:
    """The same members in one cell."""
    groups = members.copies.first.size
    return Members(
        rows=members.rows,
        copies=members.copies,
        copy_rows=members.copy_rows,
        cell_start=np.array([0, groups], np.int64),
        cell_groups=np.arange(groups, dtype=np.int64),
    )
