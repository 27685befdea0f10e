"""Ranks samples by greedy maximization of submodular functions on the neighbor graph.

Similarities are fixed-point numbers, int64 in units of 2⁻³² (`ONE` is 1.0), so that sums do not
depend on the order of their terms, and ties are exact. Pairs in no neighbor list have similarity 0.

The greedy is lazy (Minoux 1978): gains only fall as the selection grows, so an old gain is an upper
bound, and only the largest bound must be updated. The result is that of the plain greedy; ties go
to the smaller row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled
from d2filter.algorithm.greedy import messages
from d2filter.checks import finite
from d2filter.errors import UsageError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

ONE = 2**32
MOST_RELEVANCE = 16  # this factor times a sum of 2²⁶ similarities fits into int64


def facility_location(difficulty: F32, neighbors: npt.NDArray[np.integer], sqdist: F32) -> I64:
    """Greedy order for f(S) = Σ_i max_{j∈S} w_ij, shape (n,) int64 (Iyer et al. 2021).

    difficulty: (n,) float32, finite. neighbors: (n, k) int32 or int64 rows, −1 pads, no row twice
    in a list or in its own; n up to 2²⁶. sqdist: (n, k) float32. w_ij = rint(2³²·exp(−d_ij²)) for
    pairs where i or j lists the other (the larger w should the two differ), and w_ii = 2³².

    Samples that add nothing to f once the others are selected (copies) come last, by descending
    difficulty. Ties go to the smaller row.
    """
    taken: I64 = _cover(*_edges(neighbors, sqdist))
    left = np.ones(len(neighbors), np.bool_)
    left[taken] = False
    rest = np.flatnonzero(left)
    rest = rest[np.argsort(-difficulty[rest].astype(np.float64), kind="stable")]
    return np.concatenate([taken, rest])


def graph_cut(neighbors: npt.NDArray[np.integer], sqdist: F32, *, relevance: int = 2) -> I64:
    """Greedy order for f(S) = λ·Σ_{i∈V, j∈S} w_ij − Σ_{i,j∈S} w_ij, shape (n,) int64 (Iyer et al.
    2021; their λ is the inverse of this one).

    Arrays and w as in `facility_location`; λ is `relevance`. The gain of j is
    λ·Σ_{i∈V} w_ij − 2·Σ_{i∈S} w_ij − w_jj: it is high in dense regions from which nothing is
    selected yet. Below λ = 2 gains may be negative; all samples are ranked nevertheless. Ties go to
    the smaller row. Raises UsageError for a relevance outside 1 … 16.
    """
    if not 1 <= relevance <= MOST_RELEVANCE:
        raise UsageError(
            f"relevance is {relevance}, allowed is 1 to {MOST_RELEVANCE}: "
            "2 is the smallest with which no sample lowers the function"
        )
    order: I64 = _cut(*_edges(neighbors, sqdist), relevance)
    return order


def infomax(
    difficulty: F32,
    neighbors: npt.NDArray[np.integer],
    sqdist: F32,
    *,
    redundancy: float = 1.0,
) -> I64:
    """Greedy order for f(S) = Σ_{i∈S} s'_i − λ·Σ_{{i,j}⊂S} w_ij, shape (n,) int64 (InfoMax, Tan et
    al. 2025, who count each pair twice and solve a relaxation; this is the greedy).

    s' is the difficulty scaled to 0 … 1 (`messages.normalized`), in units of 2⁻³²; arrays and w as
    in `facility_location`; λ is `redundancy`. The gain of j is s'_j − λ·Σ_{i∈S} w_ij. It may be
    negative; all samples are ranked nevertheless. Ties go to the smaller row. Unlike in D2, a
    selected sample lowers its neighbors by their similarity alone, not by its own score. Raises
    UsageError for a redundancy outside 0 … 16.
    """
    check_redundancy(redundancy)
    gain = np.rint(messages.normalized(difficulty) * ONE).astype(np.int64)
    start, target, weight = _edges(neighbors, sqdist)
    taken = np.rint(redundancy * weight.astype(np.float64) * ONE).astype(np.int64)
    order: I64 = _fall(start, target, taken, gain)
    return order


def check_redundancy(value: Any) -> None:
    """Raise UsageError for a redundancy that `infomax` cannot use, of any type."""
    if not (finite(value) and 0 <= value <= MOST_RELEVANCE):
        raise UsageError(
            f"redundancy is {value}, allowed is 0 (score alone) to {MOST_RELEVANCE}, such as 1"
        )


def _edges(
    neighbors: npt.NDArray[np.integer], sqdist: F32
) -> tuple[I64, npt.NDArray[np.int32], F32]:
    """Both directions of all pairs as CSR: start (n + 1,), target and weight (e,)."""
    edges: tuple[I64, npt.NDArray[np.int32], F32] = _union(
        neighbors, messages.edge_weights(sqdist, 1.0)
    )
    return edges


@compiled.njit()
def _place(row, j):  # type: ignore[no-untyped-def]  # compiled by numba
    """The position of j in a list; −1 if it is not in the list."""
    for c in range(row.size):
        if row[c] == j:
            return c
    return -1


@compiled.njit()
def _union(neighbors, weights):  # type: ignore[no-untyped-def]  # compiled by numba
    n, k = neighbors.shape
    start = np.zeros(n + 1, np.int64)
    for i in range(n):
        for c in range(k):
            j = neighbors[i, c]
            if j >= 0:
                start[i + 1] += 1
                if _place(neighbors[j], i) < 0:
                    start[j + 1] += 1
    for i in range(n):
        start[i + 1] += start[i]
    free = start[:-1].copy()
    target = np.empty(start[n], np.int32)
    weight = np.empty(start[n], np.float32)
    for i in range(n):
        for c in range(k):
            j = neighbors[i, c]
            if j < 0:
                continue
            w = weights[i, c]
            back = _place(neighbors[j], i)
            if back >= 0:
                # the loop adds i to the list of j when it reaches j
                w = max(w, weights[j, back])
            else:
                target[free[j]] = i
                weight[free[j]] = w
                free[j] += 1
            target[free[i]] = j
            weight[free[i]] = w
            free[i] += 1
    return start, target, weight


@compiled.njit(inline="always")
def _fixed(weight):  # type: ignore[no-untyped-def]  # compiled by numba
    """A similarity in units of 2⁻³²."""
    return np.int64(np.rint(np.float64(weight) * np.float64(ONE)))


@compiled.njit()
def _sink(key, vertex, size, at):  # type: ignore[no-untyped-def]  # compiled by numba
    """Move the entry at `at` down to its place in a heap of (key, vertex), best first."""
    k, i = key[at], vertex[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (
            key[right] > key[child] or (key[right] == key[child] and vertex[right] < vertex[child])
        ):
            child = right
        if key[child] < k or (key[child] == k and vertex[child] > i):
            break
        key[at], vertex[at] = key[child], vertex[child]
        at = child
    key[at], vertex[at] = k, i


@compiled.njit()
def _heap(key):  # type: ignore[no-untyped-def]  # compiled by numba
    """Turn the keys of vertices 0 … n − 1 into a heap, in place; returns them in heap order."""
    vertex = np.arange(key.size).astype(np.int32)
    for at in range(key.size // 2 - 1, -1, -1):
        _sink(key, vertex, key.size, at)
    return vertex


@compiled.njit()
def _drop_root(key, vertex, size):  # type: ignore[no-untyped-def]  # compiled by numba
    """Remove the root of a heap; returns the new size."""
    size -= 1
    if size > 0:
        key[0], vertex[0] = key[size], vertex[size]
        _sink(key, vertex, size, 0)
    return size


@compiled.njit()
def _covers(j, start, target, weight, best):  # type: ignore[no-untyped-def]  # compiled by numba
    """The gain of j: how much it would add to Σ_i best_i."""
    gain = np.int64(ONE) - best[j]
    for e in range(start[j], start[j + 1]):
        gain += max(np.int64(0), _fixed(weight[e]) - best[target[e]])
    return gain


@compiled.njit()
def _cover(start, target, weight):  # type: ignore[no-untyped-def]  # compiled by numba
    """Facility location: samples in greedy order, until no gain is left."""
    n = start.size - 1
    best = np.zeros(n, np.int64)
    key = np.empty(n, np.int64)
    for j in range(n):
        key[j] = _covers(j, start, target, weight, best)
    vertex = _heap(key)
    order = np.empty(n, np.int64)
    taken, size = 0, n
    while size > 0:
        j = np.int64(vertex[0])
        gain = _covers(j, start, target, weight, best)
        if gain < key[0]:
            key[0] = gain
            _sink(key, vertex, size, 0)
            continue
        if gain == 0:
            break
        order[taken] = j
        taken += 1
        best[j] = ONE
        for e in range(start[j], start[j + 1]):
            i = target[e]
            best[i] = max(best[i], _fixed(weight[e]))
        size = _drop_root(key, vertex, size)
    return order[:taken].copy()


@compiled.njit()
def _cut(start, target, weight, relevance):  # type: ignore[no-untyped-def]  # compiled by numba
    """Graph cut: all samples in greedy order."""
    n = start.size - 1
    gain = np.empty(n, np.int64)
    taken = np.empty(weight.size, np.int64)
    for j in range(n):
        total = np.int64(ONE)
        for e in range(start[j], start[j + 1]):
            total += _fixed(weight[e])
            taken[e] = 2 * _fixed(weight[e])
        # w_jj is left out: it is the same for all j
        gain[j] = relevance * total
    return _fall(start, target, taken, gain)


@compiled.njit()
def _fall(start, target, taken, gain):  # type: ignore[no-untyped-def]  # compiled by numba
    """All vertices, largest gain first.

    A selected vertex lowers the gains of its neighbors by `taken` of its edges. Gains are always up
    to date; only the heap is lazy.
    """
    n = gain.size
    key = gain.copy()
    vertex = _heap(key)
    order = np.empty(n, np.int64)
    size = n
    while size > 0:
        j = np.int64(vertex[0])
        if gain[j] < key[0]:
            key[0] = gain[j]
            _sink(key, vertex, size, 0)
            continue
        order[n - size] = j
        for e in range(start[j], start[j + 1]):
            gain[target[e]] -= taken[e]
        size = _drop_root(key, vertex, size)
    return order
