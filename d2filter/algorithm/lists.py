"""Exact neighbor lists from proposals, with copies expanded in ring order (DESIGN §4.5).

Proposals are groups of copies with float32 distances that are off by at most a known bound. Here
they are measured exactly. A list whose last place lies within the bound of what was not proposed is
searched again among all rows of its cells, in float64, which leaves almost nothing but the true
neighbors to measure. Rows are in ascending order of uid, so the ring order of equals is
(row_j − row_i) mod n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from d2filter.algorithm import backend, features

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

ROUNDED = 1.0 + 2.0**-22  # what a limit is widened by, as it was rounded to float32

_UNSURE_BLOCK = 1024
_WIDE_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What was searched and what it proposed; q searched groups, g groups in all."""

    groups: I64
    """(q,) numbers of the searched groups, ascending"""
    probed: I32
    """(q, p) cells that each of them searched"""
    home: npt.NDArray[np.integer]
    """(g,) cell of each group"""
    near: F32
    """(q, f) approximate distances, ascending, inf where nothing was proposed"""
    ids: I32
    """(q, f) groups proposed, −1 where nothing"""


def by_cell(assigned: npt.NDArray[np.integer], cell_total: int) -> tuple[I64, I64]:
    """Rows per cell as CSR (start (cells + 1,), rows ascending), of an (n, p) assignment."""
    start, order = features.bucketed(assigned.ravel(), cell_total)
    return start, order // assigned.shape[1]


def fill_lists_inplace(
    rows: F16,
    copies: features.Copies,
    search: Search,
    query_rows: I64 | None,
    neighbors: I64,
    sqdist: F32,
) -> None:
    """Fill `neighbors` (·, k) and `sqdist` (·, k), for all rows or for `query_rows`.

    rows: (n, d). Every row asked for must lie in a searched group.
    """
    if query_rows is None:
        query_rows = np.arange(len(rows), dtype=np.int64)
    slot = np.searchsorted(search.groups, copies.group[query_rows])
    start, order = features.bucketed(slot, search.groups.size)
    bits = rows.view(np.uint16)
    k = neighbors.shape[1]
    limit, unsure = _limits(
        bits, copies.first, copies.start, search.groups, search.ids, search.near, k,
        np.float32(backend.relative_error(rows.shape[1])),
    )  # fmt: skip

    def expand(which: I64, candidate_start: I64, candidates: npt.NDArray[np.integer]) -> None:
        _expand(
            bits, copies.first, copies.start, copies.members, len(rows), search.groups, which,
            candidate_start, candidates, order, start, query_rows, neighbors, sqdist,
        )  # fmt: skip

    sure = np.flatnonzero(~unsure)
    width = search.ids.shape[1]
    expand(sure, np.arange(sure.size + 1) * width, search.ids[sure].ravel())
    for which, candidate_start, candidates in _wide(rows, copies, search, limit, unsure, k):
        expand(which, candidate_start, candidates)


def within(
    rows: F16, queries: I64, members: I64, limit: npt.NDArray[np.float64]
) -> tuple[I64, I64]:
    """Pairs whose exact distance may be at most the query's limit: (query, member) positions.

    rows: (n, d). queries, members: row numbers. limit: one squared distance a query. The products
    are float64, so hardly any pair is returned that a measurement then refuses.
    """
    found_query, found_member = [], []
    x = rows[queries].astype(np.float64)
    x_norm = (x * x).sum(axis=1)
    slack = (rows.shape[1] + 8) * 2.0**-52
    for start in range(0, members.size, _WIDE_ROWS):
        y = rows[members[start : start + _WIDE_ROWS]].astype(np.float64)
        y_norm = (y * y).sum(axis=1)
        distance = x @ y.T
        distance *= -2.0
        distance += x_norm[:, None]
        distance += y_norm[None, :]
        error = slack * 2.0 * (x_norm[:, None] + y_norm[None, :])
        hit_query, hit_member = np.nonzero(distance - error <= limit[:, None])
        found_query.append(hit_query)
        found_member.append(hit_member + start)
    if not found_query:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(found_query), np.concatenate(found_member)


def _wide(
    rows: F16, copies: features.Copies, search: Search, limit: F32, unsure: npt.NDArray[np.bool_],
    k: int,
) -> Iterator[tuple[I64, I64, I64]]:  # fmt: skip
    """Candidates of the unsure lists, in blocks: (positions, start (b + 1,), groups)."""
    positions = np.flatnonzero(unsure)
    if not positions.size:
        return
    cell_total = int(search.home.max()) + 1
    row_start, row_list = by_cell(search.home[:, None], cell_total)
    # lists that share their first cell share most of the others too
    positions = positions[np.argsort(search.probed[positions, 0], kind="stable")]
    for begin in range(0, positions.size, _UNSURE_BLOCK):
        which = positions[begin : begin + _UNSURE_BLOCK]
        bound = limit[which].astype(np.float64) * ROUNDED
        queries = copies.first[search.groups[which]]
        pair_query, pair_group = [], []
        known = np.isfinite(bound)
        asked_start, asked = by_cell(search.probed[which], cell_total)
        for cell in np.unique(search.probed[which[known]]):
            members = row_list[row_start[cell] : row_start[cell + 1]]
            askers = asked[asked_start[cell] : asked_start[cell + 1]]
            askers = askers[known[askers]]
            hit, member = within(rows, queries[askers], copies.first[members], bound[askers])
            pair_query.append(askers[hit])
            pair_group.append(members[member])
        for lone in np.flatnonzero(~known):
            # its cells hold fewer than k others and more exist: −1 must only mean "no more"
            everything = _nearest_of_all(rows, copies, int(queries[lone]), k)
            pair_query.append(np.full(everything.size, lone))
            pair_group.append(everything)
        hits, groups = np.concatenate(pair_query), np.concatenate(pair_group)
        start, order = features.bucketed(hits, which.size)
        yield which, start, groups[order]


def _nearest_of_all(rows: F16, copies: features.Copies, query: int, k: int) -> I64:
    """Groups that hold the k + 1 nearest of all rows to a row, ties included."""
    x = rows[query].astype(np.float64)
    distance = np.empty(copies.first.size)
    for start in range(0, copies.first.size, _WIDE_ROWS):
        y = rows[copies.first[start : start + _WIDE_ROWS]].astype(np.float64) - x
        distance[start : start + _WIDE_ROWS] = (y * y).sum(axis=1)
    last = min(k, distance.size - 1)
    bound = np.partition(distance, last)[last] * ROUNDED
    return np.flatnonzero(distance <= bound)


@numba.njit(cache=True)
def _measure(own, found, bits, first, out, out_distance):  # type: ignore[no-untyped-def]
    """Exact distances of the groups found, own and −1 left out, ascending; returns how many."""
    count = 0
    for t in range(found.size):
        if found[t] >= 0 and found[t] != own:
            out[count] = found[t]
            out_distance[count] = features.sqdist(bits[first[own]], bits[first[found[t]]])
            count += 1
    _sort(out, out_distance, count)
    return count


@numba.njit(cache=True)
def _sort(ids, distance, count):  # type: ignore[no-untyped-def]  # compiled by numba
    """Sort the first `count` by distance, in place; equals in any order: `_fill` takes levels.

    Shell's sort: lists are a handful of entries, thousands where ties are many; numba's own sorts
    take seconds to compile.
    """
    gap = 1
    while gap < count // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, count):
            d, j = distance[i], ids[i]
            at = i
            while at >= gap and distance[at - gap] > d:
                distance[at] = distance[at - gap]
                ids[at] = ids[at - gap]
                at -= gap
            distance[at] = d
            ids[at] = j
        gap //= 3


@numba.njit(cache=True)
def certain(x, bar, relative):  # type: ignore[no-untyped-def]  # compiled by numba
    """How far any row y is from x at least whose approximate distance is `bar` or more.

    With errors of at most relative·(‖x‖ + ‖y‖)²: if ‖y‖ ≤ 2‖x‖, y is at least
    bar − 9·relative·‖x‖² away, and if ‖y‖ > 2‖x‖ the error is at most 9·relative times the distance
    itself.
    """
    return bar - 9.1 * relative * max(features.squared_norm(x), np.float64(bar))


@numba.njit(cache=True, parallel=True)
def _limits(bits, first, copy_start, groups, ids, near, k, relative):  # type: ignore[no-untyped-def]
    """Distance of the last neighbor that each list needs, and whether more could be as near."""
    limit = np.zeros(groups.size, np.float32)
    unsure = np.zeros(groups.size, np.bool_)
    fetch = ids.shape[1]
    for g in numba.prange(groups.size):
        own = groups[g]
        need = k - (copy_start[own + 1] - copy_start[own] - 1)
        if need <= 0:
            continue
        found = np.empty(fetch, np.int64)
        distance = np.empty(fetch, np.float32)
        count = _measure(own, ids[g], bits, first, found, distance)
        held = 0
        last = 0
        while last < count and held < need:
            held += copy_start[found[last] + 1] - copy_start[found[last]]
            last += 1
        if count + 1 >= first.size:
            continue  # everything there is was proposed
        if held < need:
            limit[g] = np.inf
            unsure[g] = True
            continue
        limit[g] = distance[last - 1]
        if ids[g, fetch - 1] >= 0:
            unsure[g] = limit[g] >= certain(bits[first[own]], near[g, fetch - 1], relative)
    return limit, unsure


@numba.njit(cache=True, parallel=True)
def _expand(  # type: ignore[no-untyped-def]  # compiled by numba
    bits, first, copy_start, copy_members, n, groups, which,
    candidate_start, candidates, order, out_start, query_rows, neighbors, sqdist,
):  # fmt: skip
    """Write the lists of the searched groups at positions `which`."""
    for w in numba.prange(which.size):
        g = which[w]
        own = groups[g]
        found = candidates[candidate_start[w] : candidate_start[w + 1]]
        sorted_groups = np.empty(found.size, np.int64)
        distance = np.empty(found.size, np.float32)
        count = _measure(own, found, bits, first, sorted_groups, distance)
        for t in range(out_start[g], out_start[g + 1]):
            at = order[t]
            _fill(
                query_rows[at], own, sorted_groups[:count], distance[:count],
                copy_start, copy_members, n, neighbors[at], sqdist[at],
            )  # fmt: skip


@numba.njit(cache=True)
def _fill(row, own, candidates, distance, copy_start, copy_members, n, out, out_sqdist):  # type: ignore[no-untyped-def]
    """One list: copies of the row itself first, then level by level of equal distance."""
    k = out.size
    filled = _ring(row, copy_members[copy_start[own] : copy_start[own + 1]], n, out, 0, 0)
    for t in range(filled):
        out_sqdist[t] = 0.0
    level = 0
    while filled < k and level < candidates.size:
        begin = filled
        d = distance[level]
        while level < candidates.size and distance[level] == d:
            group = candidates[level]
            members = copy_members[copy_start[group] : copy_start[group + 1]]
            filled = _ring(row, members, n, out, begin, filled)
            level += 1
        for t in range(begin, filled):
            out_sqdist[t] = d


@numba.njit(cache=True)
def _ring(row, members, n, out, begin, filled):  # type: ignore[no-untyped-def]
    """Merge up to k of `members` (ascending rows) into out[begin:filled], next on the ring first.

    Returns the new end. The row itself is never a member of its own list.
    """
    k = out.size
    at, end = 0, members.size  # the first member behind the row
    while at < end:
        middle = (at + end) // 2
        if members[middle] > row:
            end = middle
        else:
            at = middle + 1
    for step in range(min(members.size, k - begin + 1)):
        j = members[(at + step) % members.size]
        if j == row:
            continue
        offset = (j - row) % n
        if filled == k and (out[k - 1] - row) % n <= offset:
            break
        t = min(filled, k - 1)
        while t > begin and (out[t - 1] - row) % n > offset:
            out[t] = out[t - 1]
            t -= 1
        out[t] = j
        filled = min(filled + 1, k)
    return filled
