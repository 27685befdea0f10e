"""Exact neighbor lists from proposals, with copies expanded in ring order (DESIGN §4.5).

Proposals are rows with float32 distances that are off by at most a known bound. Here they are
measured exactly; a list whose last place lies within the bound of what was not proposed is
searched again among all rows of its cells. Rows are in ascending order of uid, so the ring order
of equals is (row_j − row_i) mod n.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from d2filter.algorithm import backend, cells, features

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


def by_cell(assigned: npt.NDArray[np.integer], cell_total: int) -> tuple[I64, I64]:
    """Rows per cell as CSR (start (cells + 1,), rows ascending), of an (n, p) assignment."""
    flat = assigned.ravel()
    order = np.argsort(flat, kind="stable").astype(np.int64, copy=False)
    start = np.zeros(cell_total + 1, np.int64)
    np.cumsum(np.bincount(flat, minlength=cell_total), out=start[1:])
    return start, order // assigned.shape[1]


def fill_lists_inplace(
    rows: F16,
    distinct: F16,
    copies: features.Copies,
    probed: I32,
    ids: I32,
    near: F32,
    only: tuple[I64, I64] | None,
    neighbors: I64,
    sqdist: F32,
) -> None:
    """Fill `neighbors` (·, k) and `sqdist` (·, k) in place, for all rows or for some.

    rows: (n, d). distinct: (g, d), one row of each group of `copies`. probed: cells of each
    searched group. ids, near: its proposals (group numbers) and their approximate distances.
    only: (rows asked for, their groups ascending), or None for all.
    """
    norm = cells.largest_norm(distinct)
    bound = np.float32(backend.error_bound(distinct.shape[1], norm))
    if only is None:
        query_rows = np.arange(len(rows), dtype=np.int64)
        groups = np.arange(len(distinct), dtype=np.int64)
        home = probed[:, 0]
        cell_total = int(probed.max(initial=0)) + 1
    else:
        query_rows, groups = only
        home = np.zeros(len(distinct), np.int32)
        cell_total = 1
    row_start, row_list = by_cell(home[:, None], cell_total)
    # which output rows belong to each searched group
    slot = np.searchsorted(groups, copies.group[query_rows])
    order = np.argsort(slot, kind="stable").astype(np.int64, copy=False)
    out_start = np.zeros(groups.size + 1, np.int64)
    np.cumsum(np.bincount(slot, minlength=groups.size), out=out_start[1:])
    _expand(
        distinct.view(np.uint16), groups, copies.start, copies.members, len(rows),
        ids, near, bound, probed, row_start, row_list,
        order, out_start, query_rows, neighbors, sqdist,
    )  # fmt: skip


@numba.njit(cache=True, parallel=True)
def _expand(  # type: ignore[no-untyped-def]  # compiled by numba
    bits, groups, copy_start, copy_members, n,
    ids, near, bound, probed, row_start, row_list,
    order, out_start, query_rows, neighbors, sqdist,
):  # fmt: skip
    """Exact lists from proposals: recompute, widen where unsure, expand copies in ring order."""
    k = neighbors.shape[1]
    for g in numba.prange(groups.size):
        own = groups[g]
        own_size = copy_start[own + 1] - copy_start[own]
        need = k - (own_size - 1)
        candidates = np.empty(0, np.int64)
        distance = np.empty(0, np.float32)
        if need > 0:
            candidates, distance = _candidates(
                g, own, need, bits, copy_start, ids, near, bound, probed, row_start, row_list
            )
        for t in range(out_start[g], out_start[g + 1]):
            at = order[t]
            _fill(
                query_rows[at], own, candidates, distance, copy_start, copy_members, n,
                neighbors[at], sqdist[at],
            )  # fmt: skip


@numba.njit(cache=True)
def _candidates(  # type: ignore[no-untyped-def]  # compiled by numba
    g, own, need, bits, copy_start, ids, near, bound, probed, row_start, row_list
):
    """Groups that together hold the `need` nearest rows, all ties of the last included, sorted."""
    fetch = ids.shape[1]
    found = np.empty(fetch, np.int64)
    count = 0
    for t in range(fetch):
        if ids[g, t] >= 0 and ids[g, t] != own:
            found[count] = ids[g, t]
            count += 1
    chosen, distance, complete = _nearest_groups(found[:count], own, need, bits, copy_start)
    full = ids[g, fetch - 1] >= 0 and fetch < bits.shape[0]
    if complete and (not full or distance[-1] < near[g, fetch - 1] - bound):
        return chosen, distance
    # too close to what was not proposed, or too few: all rows of the probed cells, exactly
    total = 0
    for t in range(probed.shape[1]):
        total += row_start[probed[g, t] + 1] - row_start[probed[g, t]]
    wide = np.empty(total, np.int64)
    count = 0
    for t in range(probed.shape[1]):
        for e in range(row_start[probed[g, t]], row_start[probed[g, t] + 1]):
            if row_list[e] != own:
                wide[count] = row_list[e]
                count += 1
    chosen, distance, complete = _nearest_groups(wide[:count], own, need, bits, copy_start)
    if complete or count + 1 >= bits.shape[0]:
        return chosen, distance
    # the probed cells hold fewer than k others, and more exist: −1 must only mean "no more"
    everything = np.empty(bits.shape[0] - 1, np.int64)
    count = 0
    for row in range(bits.shape[0]):
        if row != own:
            everything[count] = row
            count += 1
    chosen, distance, complete = _nearest_groups(everything, own, need, bits, copy_start)
    return chosen, distance


@numba.njit(cache=True)
def _nearest_groups(found, own, need, bits, copy_start):  # type: ignore[no-untyped-def]
    """`found` cut to those up to the need-th nearest row, sorted by exact distance."""
    distance = np.empty(found.size, np.float32)
    for t in range(found.size):
        distance[t] = features.sqdist(bits[own], bits[found[t]])
    by = np.argsort(distance)  # equals need no order here: `_fill` takes a level as a whole
    held = 0
    last = 0
    while last < by.size and held < need:
        held += copy_start[found[by[last]] + 1] - copy_start[found[by[last]]]
        last += 1
    complete = held >= need
    while 0 < last < by.size and distance[by[last]] == distance[by[last - 1]]:
        last += 1
    return found[by[:last]], distance[by[:last]], complete


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
    at = np.searchsorted(members, row + 1)
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
