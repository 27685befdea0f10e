"""The compiled inner loop of `supersteps`: the greedy in one partition, best sample first.

Samples wait in a queue of narrow score buckets. The best one is taken; if a message has lowered its
score since it was queued, it is queued again. A partition without a halo needs no further check:
the best sample beats all its neighbors. With a halo, the parallel rule is checked, and a sample
that a neighbor still beats waits for that neighbor.

A score and its finality share one int64, `packed`: 2·x + 1 while the score can fall, 2·x when it is
final. Most of the time goes into reading both of a neighbor, and this makes it one read.

The arrays are those of `supersteps.LocalGraph`, `_State` and `_Queue`.

See docs/method.md#parallel-rule.
"""

from __future__ import annotations

import numpy as np

from d2filter.algorithm import compiled
from d2filter.algorithm.greedy.messages import FLOOR

OWN, CHANGED, LOWERED = 1, 2, 4  # flags of a vertex

_PAUSES = 64  # in which those that wait for fallen vertices are looked at, until the last bucket


@compiled.njit()
def transpose(start, target, own):  # type: ignore[no-untyped-def]  # compiled by numba
    """In-edges of own vertices as CSR."""
    m = own.size
    in_start = np.zeros(m + 1, start.dtype)
    for e in range(target.size):
        if own[target[e]]:
            in_start[target[e] + 1] += 1
    for j in range(m):
        in_start[j + 1] += in_start[j]
    source = np.empty(in_start[m], target.dtype)
    # the starts move while edges are filled in, and are moved back
    for i in range(m):
        for e in range(start[i], start[i + 1]):
            j = target[e]
            if own[j]:
                source[in_start[j]] = i
                in_start[j] += 1
    for j in range(m, 0, -1):
        in_start[j] = in_start[j - 1]
    in_start[0] = 0
    return in_start, source


@compiled.njit()
def count_held(own, start, target, packed, applied):  # type: ignore[no-untyped-def]  # compiled by numba
    """Messages of final halo vertices that each own vertex has not taken yet."""
    held = np.zeros(packed.size if applied.size else 0, np.int32)
    if applied.size:
        for v in range(packed.size):
            if not own[v] and not packed[v] & 1:
                for e in range(start[v], start[v + 1]):
                    if not applied[e] and packed[target[e]] & 1:
                        held[target[e]] += 1
    return held


@compiled.njit()
def count_live(packed, flags):  # type: ignore[no-untyped-def]  # compiled by numba
    n = 0
    for i in range(packed.size):
        n += flags[i] & packed[i] & 1  # OWN is the lowest bit, too
    return n


@compiled.njit(inline="always")
def _beats(a, i, b, j):  # type: ignore[no-untyped-def]  # compiled by numba
    """Whether key (a, i) comes before (b, j)."""
    return a > b or (a == b and i < j)


@compiled.njit(inline="always")
def _message(weight, x):  # type: ignore[no-untyped-def]  # compiled by numba
    """rint(w·x), 0 for x ≤ 0."""
    return np.int64(np.rint(np.float64(weight) * np.float64(x))) if x > 0 else np.int64(0)


@compiled.njit(inline="always")
def _lower(j, message, packed, flags):  # type: ignore[no-untyped-def]  # compiled by numba
    """Take a message."""
    packed[j] = 2 * max((packed[j] >> 1) - message, np.int64(FLOOR)) + 1
    flags[j] |= CHANGED


@compiled.njit()
def _take_held(  # type: ignore[no-untyped-def]  # compiled by numba
    j, start, target, weight, in_start, source, packed, flags, held, applied
):
    """Messages that j could not take while its key was better than their senders'."""
    # a halo neighbor is in the in-edges, or in the out-edges where these are all there is
    both = in_start.size == 0
    first = start[j] if both else in_start[j]
    end = start[j + 1] if both else in_start[j + 1]
    found = True
    while found and held[j] > 0:
        found = False
        for at in range(first, end):
            v = target[at] if both else source[at]
            if flags[v] & OWN or packed[v] & 1:
                continue
            for e in range(start[v], start[v + 1]):
                if target[e] != j or applied[e]:
                    continue
                x = packed[v] >> 1
                if _beats(x, v, packed[j] >> 1, j):
                    applied[e] = True
                    held[j] -= 1
                    found = True
                    message = _message(weight[e], x)
                    if message:
                        _lower(j, message, packed, flags)


@compiled.njit()
def _sift_down(key, vertex, size, k, i):  # type: ignore[no-untyped-def]  # compiled by numba
    """Put (k, i) in the place of the heap's root."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _beats(
            key[child + 1], vertex[child + 1], key[child], vertex[child]
        ):
            child += 1
        if not _beats(key[child], vertex[child], k, i):
            break
        key[at], vertex[at] = key[child], vertex[child]
        at = child
    key[at], vertex[at] = k, i


@compiled.njit()
def _push(key, vertex, size, k, i):  # type: ignore[no-untyped-def]  # compiled by numba
    """Add (k, i) to a heap of `size`."""
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if not _beats(k, i, key[parent], vertex[parent]):
            break
        key[at], vertex[at] = key[parent], vertex[parent]
        at = parent
    key[at], vertex[at] = k, i


@compiled.njit(inline="always")
def _bucket(packed, high, shift, last):  # type: ignore[no-untyped-def]  # compiled by numba
    """Where a score belongs; the first and the last bucket take what lies beyond."""
    return min(max((high - (packed >> 1)) >> shift, 0), last)


@compiled.njit()
def _release(j, released, packed, head, after):  # type: ignore[no-untyped-def]
    """Move the vertices that wait for j, and that it does not beat any more (all, if j is final),
    to the list that starts with `released`; returns the new start.
    """
    w = np.int64(head[j])
    head[j] = -1
    while w >= 0:
        following = np.int64(after[w])
        if packed[j] & 1 and _beats(packed[j], j, packed[w], w):
            after[w] = head[j]
            head[j] = w
        else:
            after[w] = released
            released = w
        w = following
    return released


@compiled.njit()
def fill_buckets(work, packed, after, first, high, shift):  # type: ignore[no-untyped-def]
    """Queue these vertices while no bucket has been opened."""
    last = first.size - 1
    for t in range(work.size):
        i = work[t]
        bucket = _bucket(packed[i], high, shift, last)
        after[i] = first[bucket]
        first[bucket] = i


@compiled.njit()
def advance(  # type: ignore[no-untyped-def]  # compiled by numba
    start, target, weight, in_start, source, packed, flags, head, after, held, applied, first, high,
    shift, key, vertex, lowered,
):  # fmt: skip
    """Make own vertices final until none can become final without new states. Returns how many
    vertices were checked.

    Every live own vertex is in exactly one place: a bucket, the heap, the list `coming` on its way
    to one of them, or the list of vertices that wait for one blocker. This is a single function
    because a call with arrays takes longer than one vertex.
    """
    waits = head.size > 0
    last = first.size - 1
    pause = max(1, first.size // _PAUSES)
    looks, falls, size = 0, 0, 0
    for bucket in range(first.size):
        coming = np.int64(first[bucket])
        while True:
            while coming >= 0:
                i = coming
                coming = np.int64(after[i])
                now = _bucket(packed[i], high, shift, last)
                if now > bucket:
                    after[i] = first[now]
                    first[now] = i
                else:
                    _push(key, vertex, size, packed[i], i)
                    size += 1
            if size == 0 and (falls == 0 or (bucket < last and bucket % pause)):
                break
            if size == 0:
                # waiters of fallen vertices: once in a while and not once a message, for a hub
                # falls as often as it has in-edges
                for at in range(falls):
                    j = np.int64(lowered[at])
                    flags[j] &= ~LOWERED
                    coming = _release(j, coming, packed, head, after)
                falls = 0
                continue
            looks += 1
            i, was = np.int64(vertex[0]), key[0]
            size -= 1
            if size > 0:
                _sift_down(key, vertex, size, key[size], vertex[size])
            if packed[i] != was:
                after[i] = -1
                coming = i
                continue
            if waits and held[i] > 0:
                _take_held(i, start, target, weight, in_start, source, packed, flags, held, applied)
                if packed[i] != was:
                    if head[i] >= 0 and not flags[i] & LOWERED:
                        flags[i] |= LOWERED
                        lowered[falls] = i
                        falls += 1
                    after[i] = -1
                    coming = i
                    continue
            if waits:
                blocker = np.int64(-1)
                for e in range(start[i], start[i + 1]):
                    j = np.int64(target[e])
                    if packed[j] & 1 and _beats(packed[j], j, was, i):
                        blocker = j
                        break
                if blocker < 0 and in_start.size > 0:
                    for e in range(in_start[i], in_start[i + 1]):
                        j = np.int64(source[e])
                        if packed[j] & 1 and _beats(packed[j], j, was, i):
                            blocker = j
                            break
                if blocker >= 0:
                    after[i] = head[blocker]
                    head[blocker] = i
                    continue
            packed[i] -= 1
            if waits:
                flags[i] |= CHANGED
                coming = np.int64(head[i])
                head[i] = -1
            score = np.float64(packed[i] >> 1)
            if score <= 0:
                continue
            for e in range(start[i], start[i + 1]):
                j = np.int64(target[e])
                if not packed[j] & 1 or (waits and not flags[j] & OWN):
                    continue
                message = np.int64(np.rint(np.float64(weight[e]) * score))
                if message > 0:
                    packed[j] = 2 * max((packed[j] >> 1) - message, np.int64(FLOOR)) + 1
                    if waits:
                        flags[j] |= CHANGED
                        if head[j] >= 0 and not flags[j] & LOWERED:
                            flags[j] |= LOWERED
                            lowered[falls] = j
                            falls += 1
    return looks


@compiled.njit()
def receive(  # type: ignore[no-untyped-def]  # compiled by numba
    vertices, x, final, start, target, weight, packed, flags, head, after, held, applied
):
    """Merge states of halo vertices; returns the own vertices that must be checked again."""
    woken = np.int64(-1)  # a list that goes on in `after`
    fallen, falls = np.empty(packed.size, after.dtype), 0
    for at in range(vertices.size):
        v = np.int64(vertices[at])
        if flags[v] & OWN or not packed[v] & 1:
            continue
        if x[at] < packed[v] >> 1:
            packed[v] = 2 * x[at] + 1
            if head[v] >= 0 and not flags[v] & LOWERED:
                flags[v] |= LOWERED
                fallen[falls] = v
                falls += 1
        if not final[at]:
            continue
        packed[v] -= 1
        woken = _release(v, woken, packed, head, after)
        for e in range(start[v], start[v + 1]):
            j = target[e]
            if not packed[j] & 1 or applied[e]:
                continue
            if not _beats(packed[v] >> 1, v, packed[j] >> 1, j):
                held[j] += 1
                continue
            applied[e] = True
            message = _message(weight[e], packed[v] >> 1)
            if message > 0:
                _lower(j, message, packed, flags)
                if head[j] >= 0 and not flags[j] & LOWERED:
                    flags[j] |= LOWERED
                    fallen[falls] = j
                    falls += 1
    for at in range(falls):
        j = np.int64(fallen[at])
        flags[j] &= ~LOWERED
        woken = _release(j, woken, packed, head, after)
    count, w = 0, woken
    while w >= 0:
        count += 1
        w = np.int64(after[w])
    out = np.empty(count, after.dtype)
    for at in range(count):
        out[at] = woken
        woken = np.int64(after[woken])
    return out


@compiled.njit()
def strongest(start, target, weight, own, packed):  # type: ignore[no-untyped-def]
    """Sender of the largest message to each own vertex, among those that were final before it."""
    largest = np.zeros(packed.size, np.int64)
    by = np.full(packed.size, -1, target.dtype)
    for i in range(packed.size):
        x = packed[i] >> 1
        if x <= 0 or packed[i] & 1:
            continue
        for e in range(start[i], start[i + 1]):
            j = target[e]
            if own[j] and _beats(x, i, packed[j] >> 1, j):
                message = _message(weight[e], x)
                # vertices come in ascending order of uid: the first of equals is the smallest
                if message > largest[j]:
                    largest[j] = message
                    by[j] = i
    return by
