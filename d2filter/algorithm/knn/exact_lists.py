"""Exact neighbor lists: made from approximate proposals, in ring order, and merged.

Proposals have float32 distances with a known maximal error. They are measured exactly, nearest
first, until nothing else can be as near as the last place of the list. If the error bound cannot
show this, the list is *unsure*, and `search` compares all members of its cells in float64.

Samples are identified by their *catalog row*: their position in the ascending order of all n uids
(docs/glossary.md). Neighbors at equal distance are sorted by (row_j − row_i) mod n, which is the
order of (uid_j − uid_i) mod 2¹²⁸.

See docs/method.md#ring-order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, features, threads

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

BLOCK = 4096  # lists that a thread merges at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """Exact lists of q samples."""

    catalog_rows: I64
    """(q, k) nearest first, equals in ring order; −1 where fewer than k were searched"""
    sqdist: F32
    """(q, k) ascending, inf where padded"""

    @staticmethod
    def empty(queries: int, k: int) -> Lists:
        """Lists that hold nothing yet."""
        return Lists(
            catalog_rows=np.full((queries, k), -1, np.int64),
            sqdist=np.full((queries, k), np.inf, np.float32),
        )

    def share_in(self, found: I64) -> npt.NDArray[np.float64]:
        """Share of each of these lists that `found` (q, ·) names too, (q,): recall by query.

        A sample without any neighbor has nothing to miss.
        """
        hit = (self.catalog_rows[:, :, None] == found[:, None, :]).any(axis=2)
        share: npt.NDArray[np.float64] = np.where(self.catalog_rows >= 0, hit, True).mean(axis=1)
        return share

    def take(self, rows: I64) -> Lists:
        """The given rows, in that order."""
        return Lists(catalog_rows=self.catalog_rows[rows], sqdist=self.sqdist[rows])


def merge_inplace(
    into: Lists, rows: I64, other: Lists, queries: I64, total: int,
    *, carried: tuple[F32, F32] | None = None,
) -> None:  # fmt: skip
    """Merge the lists `other` (r, k) of some samples into those at positions `rows`.

    queries: (r,) catalog rows of these samples; total: n. Both hold different neighbors, so exact
    lists of two sets of samples become the exact list of both. carried: a value beside each place
    of `into` and of `other`, which moves along.
    """
    mine, theirs = carried or (into.sqdist, other.sqdist)

    def merge(some: slice) -> None:
        _merge(
            into.catalog_rows, into.sqdist, mine, rows, other.catalog_rows, other.sqdist, theirs,
            queries, total, some.start, some.stop,
        )  # fmt: skip

    threads.in_blocks(merge, rows.size, BLOCK)


@compiled.njit()
def _merge(  # type: ignore[no-untyped-def]  # compiled by numba
    catalog_rows, sqdist, carried, rows, more, more_sqdist, more_carried, queries, total, begin, end
):
    k = catalog_rows.shape[1]
    for r in range(begin, end):
        i = rows[r]
        held = catalog_rows[i].copy()
        distance = sqdist[i].copy()
        value = carried[i].copy()
        a, b = 0, 0
        for t in range(k):
            left = a < k and held[a] >= 0
            right = b < more.shape[1] and more[r, b] >= 0
            if left and right:
                if distance[a] != more_sqdist[r, b]:
                    left = distance[a] < more_sqdist[r, b]
                else:
                    offset = (held[a] - queries[r]) % total
                    left = offset < (more[r, b] - queries[r]) % total
            elif not left and not right:
                break
            if left:
                catalog_rows[i, t], sqdist[i, t], carried[i, t] = held[a], distance[a], value[a]
                a += 1
            else:
                catalog_rows[i, t], sqdist[i, t] = more[r, b], more_sqdist[r, b]
                carried[i, t] = more_carried[r, b]
                b += 1


@compiled.njit()
def insert(catalog_rows, sqdist, catalog_row, distance, query, total):  # type: ignore[no-untyped-def]
    """Put one more neighbor into a list that may have free places (−1), in place.

    Returns the place that it got, the length of the list when it got none.
    """
    k = catalog_rows.size
    offset = (catalog_row - query) % total
    at = k
    while at > 0 and (
        catalog_rows[at - 1] < 0
        or sqdist[at - 1] > distance
        or (sqdist[at - 1] == distance and (catalog_rows[at - 1] - query) % total > offset)
    ):
        at -= 1
    if at < k:
        for s in range(k - 1, at, -1):
            catalog_rows[s] = catalog_rows[s - 1]
            sqdist[s] = sqdist[s - 1]
        catalog_rows[at] = catalog_row
        sqdist[at] = distance
    return at


@compiled.njit()
def certain(reach, bar, relative):  # type: ignore[no-untyped-def]  # compiled by numba
    """A lower bound of the exact distance of every member whose approximate distance is `bar` or
    more.

    reach: largest squared norm of the query x in its products; errors are at most relative·(‖x‖ +
    ‖y‖)². If ‖y‖ ≤ 2‖x‖, y is at least bar − 9·relative·‖x‖² away, and if ‖y‖ > 2‖x‖ the error is
    at most 9·relative times the distance itself.
    """
    return bar - 9.1 * relative * max(np.float64(reach), np.float64(bar))


@compiled.njit()
def fill_from_proposals(  # type: ignore[no-untyped-def]  # compiled by numba
    bits, first, copy_start, copy_rows, near, ids, reach, relative,
    query_bits, query_first, rows_start, rows, queries, total, catalog_rows, sqdist,
):  # fmt: skip
    """Write the lists of all queries whose proposals settle them, in place.

    bits (m, d), first (g,), copy_start, copy_rows: the members and their groups of copies. near,
    ids (w, f): the nearest groups of w distinct queries, ascending; reach (w,).
    query_bits[query_first[w]]: the features; rows[rows_start[w]:rows_start[w + 1]]: the positions
    in `queries` (their catalog rows) and in the lists. Returns limit (w,) float32 and unsure (w,)
    bool: the lists not written, and the distance within which their neighbors lie.
    """
    w_count, f = ids.shape
    k = catalog_rows.shape[1]
    limit = np.zeros(w_count, np.float32)
    unsure = np.zeros(w_count, np.bool_)
    x = np.empty(bits.shape[1], np.float64)
    for w in range(w_count):
        features.widen(query_bits[query_first[w]], x)
        proposed = ids[w]
        approximate = near[w]
        count = 0
        while count < f and proposed[count] >= 0:
            count += 1
        measured = np.empty(count, np.float32)
        groups = np.empty(count, np.int64)
        sure = False
        among = 0  # samples in the groups measured
        for t in range(count):
            d = features.sqdist_to(x, bits[first[proposed[t]]])
            at = t
            while at > 0 and measured[at - 1] > d:
                measured[at] = measured[at - 1]
                groups[at] = groups[at - 1]
                at -= 1
            measured[at] = d
            groups[at] = proposed[t]
            # a copy of the query among the members may be the query itself, which is not listed
            need = k + 1 if measured[0] == 0 else k
            among += copy_start[proposed[t] + 1] - copy_start[proposed[t]]
            if among < need:
                continue
            held = 0
            last = 0
            while last <= t and held < need:
                held += copy_start[groups[last] + 1] - copy_start[groups[last]]
                last += 1
            limit[w] = measured[last - 1]
            bar = approximate[t + 1] if t + 1 < count else approximate[t]
            # nothing but copies of one another lies at distance 0
            if limit[w] == 0 or limit[w] < certain(reach[w], bar, relative):
                sure = True
                count = t + 1
                break
        # proposals with free places, or with a place for every group, were offered nothing else
        if not sure and count == f and f < first.size:
            unsure[w] = True
            continue
        for t in range(rows_start[w], rows_start[w + 1]):
            at = rows[t]
            write(
                queries[at], groups[:count], measured[:count], copy_start, copy_rows, total,
                catalog_rows[at], sqdist[at],
            )  # fmt: skip
    return limit, unsure


@compiled.njit()
def fill_from_candidates(  # type: ignore[no-untyped-def]  # compiled by numba
    bits, first, copy_start, copy_rows, which, start, candidates,
    query_bits, query_first, rows_start, rows, queries, total, catalog_rows, sqdist,
):  # fmt: skip
    """Write the lists of the distinct queries `which` from all groups that may be in them (CSR)."""
    x = np.empty(bits.shape[1], np.float64)
    for v in range(which.size):
        w = which[v]
        features.widen(query_bits[query_first[w]], x)
        groups = candidates[start[v] : start[v + 1]].copy()
        measured = np.empty(groups.size, np.float32)
        for t in range(groups.size):
            measured[t] = features.sqdist_to(x, bits[first[groups[t]]])
        sort(groups, measured, groups.size)
        for t in range(rows_start[w], rows_start[w + 1]):
            at = rows[t]
            write(
                queries[at], groups, measured, copy_start, copy_rows, total,
                catalog_rows[at], sqdist[at],
            )  # fmt: skip


@compiled.njit()
def sort(ids, distance, count):  # type: ignore[no-untyped-def]  # compiled by numba
    """Sort the first `count` by distance, in place; equals in any order: `write` takes levels.

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


@compiled.njit()
def write(  # type: ignore[no-untyped-def]  # compiled by numba
    query, groups, measured, copy_start, copy_rows, total, out, out_sqdist
):
    """One list, level by level of equal distance, from groups in ascending order of distance."""
    k = out.size
    filled = 0
    level = 0
    while filled < k and level < groups.size:
        begin = filled
        d = measured[level]
        while level < groups.size and measured[level] == d:
            members = copy_rows[copy_start[groups[level]] : copy_start[groups[level] + 1]]
            filled = _ring(query, members, total, out, begin, filled)
            level += 1
        for t in range(begin, filled):
            out_sqdist[t] = d


@compiled.njit()
def _ring(query, members, total, out, begin, filled):  # type: ignore[no-untyped-def]
    """Merge up to k of `members` (ascending) into out[begin:filled], nearest behind first.

    Returns the new end. The query itself is never a member of its own list.
    """
    k = out.size
    at, end = 0, members.size  # the first member behind the query
    while at < end:
        middle = (at + end) // 2
        if members[middle] > query:
            end = middle
        else:
            at = middle + 1
    for step in range(min(members.size, k - begin + 1)):
        j = members[(at + step) % members.size]
        if j == query:
            continue
        offset = (j - query) % total
        if filled == k and (out[k - 1] - query) % total <= offset:
            break
        t = min(filled, k - 1)
        while t > begin and (out[t - 1] - query) % total > offset:
            out[t] = out[t - 1]
            t -= 1
        out[t] = j
        filled = min(filled + 1, k)
    return filled
