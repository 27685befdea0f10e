"""The exact parallel greedy (DESIGN §3): the sequential selection without its sequence.

Sequential definition: take the unselected sample with the best key (x descending, uid ascending);
for each out-neighbor j still unselected, x_j ← x_j − rint(w_ij·x_i); repeat.

Rule used here: an unselected sample whose key beats those of all its unselected neighbors, over
out- and in-edges both, is final. Scores only fall, so nothing can change its x any more, and the
sequential order is "final key, best first".

A sample that is beaten waits for one neighbor that beats it and is looked at again only when that
neighbor became final or fell below it; so the work follows the changes instead of rescanning every
live sample each round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from d2filter.algorithm.messages import FLOOR

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Result of `select_all` for n samples."""

    final: I64
    """(n,) score when selected, units of 2⁻⁴⁰"""
    rank: I64
    """(n,) position in the selection, 0 = first"""
    suppressed_by: I64
    """(n,) row that sent the largest message > 0, ties to the smaller row; −1 none"""
    rounds: int
    """passes over the worklist until all were final"""


def select_all(
    forward: I64, neighbors: npt.NDArray[np.integer], weights: npt.NDArray[np.float32]
) -> Selection:
    """Rank a whole pool. Rows must be in ascending order of uid: ties go to the smaller row.

    forward: (n,) int64 in [−2⁶², 2⁶²], the scores after the forward pass. neighbors: (n, k) int32
    or int64 row numbers, −1 pads, no row its own neighbor. weights: (n, k) float32 in [0, 1], of
    the reverse pass. Nothing is modified.

    A message is rint(float64(w)·float64(x_i)), and 0 when x_i ≤ 0: the formula as printed would
    *raise* the neighbors of a negative sample. Subtraction saturates at −2⁶².
    """
    x = forward.copy()
    in_start, in_source = _transpose(neighbors)
    suppressed_by, rounds = _fixpoint(x, neighbors, weights, in_start, in_source)
    # rows ascend by uid, so a stable sort is (x descending, uid ascending)
    order = np.argsort(-x, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return Selection(final=x, rank=rank, suppressed_by=suppressed_by, rounds=int(rounds))


@numba.njit(cache=True, nogil=True)
def _transpose(neighbors):  # type: ignore[no-untyped-def]  # compiled by numba
    """In-edges as CSR: sources of row j are in_source[in_start[j]:in_start[j+1]]."""
    n, k = neighbors.shape
    start = np.zeros(n + 1, np.int64)
    for i in range(n):
        for c in range(k):
            if neighbors[i, c] >= 0:
                start[neighbors[i, c] + 1] += 1
    for j in range(n):
        start[j + 1] += start[j]
    fill = start[:-1].copy()
    source = np.empty(start[n], neighbors.dtype)
    for i in range(n):
        for c in range(k):
            j = neighbors[i, c]
            if j >= 0:
                source[fill[j]] = i
                fill[j] += 1
    return start, source


@numba.njit(cache=True, nogil=True, inline="always")
def _beats(x, i, j):  # type: ignore[no-untyped-def]  # compiled by numba
    return x[i] > x[j] or (x[i] == x[j] and i < j)


@numba.njit(cache=True, nogil=True)
def _blocker(i, x, final, neighbors, in_start, in_source):  # type: ignore[no-untyped-def]
    """A live neighbor that beats i, over out- and in-edges; −1 when there is none."""
    for c in range(neighbors.shape[1]):
        j = neighbors[i, c]
        if j >= 0 and not final[j] and _beats(x, j, i):
            return np.int64(j)
    for e in range(in_start[i], in_start[i + 1]):
        j = in_source[e]
        if not final[j] and _beats(x, j, i):
            return np.int64(j)
    return np.int64(-1)


@numba.njit(cache=True, nogil=True)
def _fixpoint(x, neighbors, weights, in_start, in_source):  # type: ignore[no-untyped-def]
    """Lower x in place to the final scores; returns (suppressed_by, rounds).

    Every live sample is in exactly one place: the worklist of this round, that of the next, or the
    list of those waiting for one blocker (head/after are linked lists over rows).
    """
    n, k = neighbors.shape
    floor = np.int64(FLOOR)
    final = np.zeros(n, np.bool_)
    dirty = np.zeros(n, np.bool_)
    strongest = np.zeros(n, np.int64)
    suppressed_by = np.full(n, -1, np.int64)
    head = np.full(n, -1, neighbors.dtype)
    after = np.empty(n, neighbors.dtype)
    work = np.arange(n).astype(neighbors.dtype)
    coming = np.empty(n, neighbors.dtype)
    lowered = np.empty(n, neighbors.dtype)
    waiting = n
    rounds = 0
    while waiting > 0:
        rounds += 1
        n_coming = 0
        n_lowered = 0
        for t in range(waiting):
            i = work[t]
            b = _blocker(i, x, final, neighbors, in_start, in_source)
            if b >= 0:
                after[i] = head[b]
                head[b] = i
                continue
            final[i] = True
            w = head[i]
            while w >= 0:
                coming[n_coming] = w
                n_coming += 1
                w = after[w]
            head[i] = -1
            if x[i] <= 0:
                continue
            for c in range(k):
                j = neighbors[i, c]
                if j < 0 or final[j]:
                    continue
                message = np.int64(np.rint(np.float64(weights[i, c]) * np.float64(x[i])))
                if message <= 0:
                    continue
                x[j] = max(x[j] - message, floor)
                if message > strongest[j] or (message == strongest[j] and i < suppressed_by[j]):
                    strongest[j] = message
                    suppressed_by[j] = i
                if not dirty[j]:
                    dirty[j] = True
                    lowered[n_lowered] = j
                    n_lowered += 1
        # once a round, not once a message: a hub is lowered as often as it has in-edges
        for t in range(n_lowered):
            j = lowered[t]
            dirty[j] = False
            w = head[j]
            head[j] = -1
            while w >= 0:
                following = after[w]
                if _beats(x, j, w):
                    after[w] = head[j]
                    head[j] = w
                else:
                    coming[n_coming] = w
                    n_coming += 1
                w = following
        work, coming = coming, work
        waiting = n_coming
    return suppressed_by, rounds
