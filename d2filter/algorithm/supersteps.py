"""One partition of the exact greedy: states of other partitions in, changed states out (DESIGN §3).

A partition holds the edges that have an end in it. Its *nodes* are its own samples and the *halo*:
samples of other partitions at the other ends. Only states travel: (x, final) of a sample. x merges
by minimum and `final` is sticky, so states may come late, repeated or out of order; and because a
partition derives the message of a final halo node itself, once per edge, it may go back to an older
snapshot of its own alone and repeat what it forgot.

A halo node of which nothing is known yet counts as live with the best score there is: waiting on it
is conservative. That is true of every stale score, for scores only fall.

A score and whether it can still fall share one word, 2·x + 1 while live and 2·x when final: whoever
looks at a neighbor needs both, and the look is what the time goes into.

Samples are taken best first, from a queue of narrow buckets; one that a message has lowered is put
where it belongs when its turn comes. In a pool in one partition a sample then beats all neighbors
that are still in the queue, and is final without a look at any. Where there is a halo, some samples
wait for it and others for them, so there the rule has to be checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from d2filter.algorithm.messages import FLOOR

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Nodes = npt.NDArray[np.integer]

UNKNOWN = 2**62 - 1  # a score that none beats

_IN_A_BUCKET = 4  # nodes, about
_SAMPLED = 4096  # scores that choose the width of a bucket
_PAUSES = 64  # in which those that wait for fallen nodes are looked at, until the last bucket
_FALL = 4  # buckets reach so far down, in units of the range of scores at the beginning

_OWN, _CHANGED, _LOWERED = 1, 2, 4  # flags


class LocalGraph(NamedTuple):
    """The edges with an end in one partition; m nodes in ascending order of uid."""

    own: Bool
    """(m,) whether a node is at home here"""
    start: Nodes
    """(m + 1,) offsets into `target`"""
    target: Nodes
    """(e,) out-edges of own nodes, and those of halo nodes that lead to own ones"""
    weight: F32
    """(e,) of the reverse pass, in [0, 1]"""
    in_start: Nodes
    """(m + 1,) offsets into `source`; (0,) where out-edges are all there is to know"""
    source: Nodes
    """in-edges of own nodes"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a partition must remember to go on."""

    packed: I64
    """(m,) 2·x + 1 of live nodes, 2·x of final ones"""
    applied: Bool
    """(e,) edges of halo nodes whose message has been taken; empty where there is no halo"""

    def copy(self) -> Snapshot:
        """One that shares nothing with this."""
        return Snapshot(packed=self.packed.copy(), applied=self.applied.copy())


class _State(NamedTuple):
    """What a partition knows, and who waits for whom."""

    packed: I64
    applied: Bool
    held: npt.NDArray[np.int32]
    """(m,) messages of final halo nodes that a node could not take yet; empty: no halo"""
    flags: U8
    head: Nodes
    """(m,) first of the nodes that wait for a node, −1 none"""
    after: Nodes
    """(m,) the next one that waits for the same, or lies in the same bucket"""


class _Queue(NamedTuple):
    """Own nodes to be decided, best first: buckets, and a heap of the nodes of the best one."""

    first: Nodes
    """(B,) a node in each bucket, −1 none; the others follow in `after`"""
    high: int
    """score where the first bucket begins"""
    shift: int
    """log₂ of the width of a bucket"""
    key: I64
    """(m,) the heap: packed scores as they were when they came"""
    node: Nodes
    lowered: Nodes
    """(m,) nodes that others wait for and that have fallen"""


def make_graph(
    own: Bool, start: Nodes, target: Nodes, weight: F32, *, both_ways: bool = False
) -> LocalGraph:
    """A graph from its out-edges. both_ways: each edge is there in both directions, with one
    weight, so that out-edges are all there is to know.
    """
    in_start, source = start[:0], target[:0]
    # without a halo nobody ever waits, and in-edges are not looked at
    if not both_ways and not own.all():
        in_start, source = _transpose(start, target, own)
    return LocalGraph(
        own=own, start=start, target=target, weight=weight, in_start=in_start, source=source
    )


class Partition:
    """The greedy in one partition, superstep by superstep."""

    def __init__(self, graph: LocalGraph, forward: I64) -> None:
        """forward: (m,) scores after the forward pass, in [−2⁶², 2⁶²); of halo nodes UNKNOWN."""
        self._graph = graph
        edges = 0 if graph.own.all() else graph.target.size
        self._start_over(Snapshot(packed=2 * forward + 1, applied=np.zeros(edges, np.bool_)))

    def _start_over(self, known: Snapshot) -> None:
        g = self._graph
        m, kind = g.own.size, g.target.dtype
        self._state = _State(
            packed=known.packed,
            applied=known.applied,
            held=_count_held(g.own, g.start, g.target, known.packed, known.applied),
            flags=g.own * np.uint8(_OWN | _CHANGED),
            head=np.full(m if known.applied.size else 0, -1, kind),
            after=np.empty(m, kind),
        )
        self._work = [np.flatnonzero(g.own & ((known.packed & 1) == 1)).astype(kind)]

    @property
    def x(self) -> I64:
        """(m,) scores as they stand; final where `final` says so."""
        return self._state.packed >> 1

    @property
    def final(self) -> Bool:
        """(m,)"""
        final: Bool = (self._state.packed & 1) == 0
        return final

    def live(self) -> int:
        """Own samples that are not final yet."""
        return int(_count_live(self._state.packed, self._state.flags))

    def states(self, nodes: Nodes) -> tuple[I64, Bool]:
        """x and final of some nodes, (s,) each."""
        packed = self._state.packed[nodes]
        return packed >> 1, (packed & 1) == 0

    def receive(self, nodes: Nodes, x: I64, final: Bool) -> None:
        """States of halo nodes: (s,) nodes, scores and whether final. Any number of times."""
        g, state = self._graph, self._state
        self._work.append(
            _receive(
                nodes, x, final, g.start, g.target, g.weight, state.packed, state.flags, state.head,
                state.after, state.held, state.applied,
            )
        )  # fmt: skip

    def advance(self) -> int:
        """Make everything final that can be. Returns how many nodes were looked at."""
        work = np.concatenate(self._work)
        self._work = [work[:0]]
        if not work.size:
            return 0
        g, state, q = self._graph, self._state, _make_queue(self._state, work)
        _fill_buckets(work, state.packed, state.after, q.first, q.high, q.shift)
        looks = _advance(
            g.start, g.target, g.weight, g.in_start, g.source, state.packed, state.flags,
            state.head, state.after, state.held, state.applied, q.first, q.high, q.shift, q.key,
            q.node, q.lowered,
        )  # fmt: skip
        return int(looks)

    def changed(self) -> I64:
        """Own nodes whose state changed since the last call; at first all. Where there is no halo
        nobody wants to know, and it is not noted.
        """
        nodes = np.flatnonzero(self._state.flags & _CHANGED)
        self._state.flags[nodes] &= ~np.uint8(_CHANGED)
        return nodes

    def suppressed_by(self) -> Nodes:
        """(m,) node that sent the largest message > 0 to each own node, ties to the smaller uid; −1
        none. All own nodes must be final.
        """
        g = self._graph
        by: Nodes = _strongest(g.start, g.target, g.weight, g.own, self._state.packed)
        return by

    def snapshot(self) -> Snapshot:
        """A copy of the state."""
        return Snapshot(packed=self._state.packed, applied=self._state.applied).copy()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot. What other partitions have sent since must be sent again."""
        self._start_over(snapshot.copy())


def _make_queue(state: _State, work: Nodes) -> _Queue:
    """An empty queue whose buckets suit the scores of these nodes."""
    scores = np.sort(state.packed[work[:: max(1, work.size // _SAMPLED)]] >> 1)
    # a few outliers must not make all buckets wide
    few = scores.size // 1000
    low, high = int(scores[few]), int(scores[-1 - few])
    wanted = max(1, work.size // _IN_A_BUCKET)
    shift = max(0, ((high - low) // wanted).bit_length())
    m, kind = state.packed.size, work.dtype
    buckets = min(_FALL * wanted, (high - low >> shift) * _FALL) + 1
    # what is never written to takes no memory
    return _Queue(
        first=np.full(buckets, -1, kind),
        high=high,
        shift=shift,
        key=np.empty(m, np.int64),
        node=np.empty(m, kind),
        lowered=np.empty(state.head.size, kind),
    )


@numba.njit(cache=True, nogil=True)
def _transpose(start, target, own):  # type: ignore[no-untyped-def]  # compiled by numba
    """In-edges of own nodes as CSR."""
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


@numba.njit(cache=True, nogil=True)
def _count_held(own, start, target, packed, applied):  # type: ignore[no-untyped-def]  # compiled by numba
    """Messages of final halo nodes that each own node has not taken yet."""
    held = np.zeros(packed.size if applied.size else 0, np.int32)
    if applied.size:
        for v in range(packed.size):
            if not own[v] and not packed[v] & 1:
                for e in range(start[v], start[v + 1]):
                    if not applied[e] and packed[target[e]] & 1:
                        held[target[e]] += 1
    return held


@numba.njit(cache=True, nogil=True)
def _count_live(packed, flags):  # type: ignore[no-untyped-def]  # compiled by numba
    n = 0
    for i in range(packed.size):
        n += flags[i] & packed[i] & 1  # _OWN is the lowest bit, too
    return n


@numba.njit(cache=True, nogil=True, inline="always")
def _beats(a, i, b, j):  # type: ignore[no-untyped-def]  # compiled by numba
    """Whether key (a, i) comes before (b, j)."""
    return a > b or (a == b and i < j)


@numba.njit(cache=True, nogil=True, inline="always")
def _message(weight, x):  # type: ignore[no-untyped-def]  # compiled by numba
    """rint(w·x), 0 for x ≤ 0."""
    return np.int64(np.rint(np.float64(weight) * np.float64(x))) if x > 0 else np.int64(0)


@numba.njit(cache=True, nogil=True, inline="always")
def _lower(j, message, packed, flags):  # type: ignore[no-untyped-def]  # compiled by numba
    """Take a message."""
    packed[j] = 2 * max((packed[j] >> 1) - message, np.int64(FLOOR)) + 1
    flags[j] |= _CHANGED


@numba.njit(cache=True, nogil=True)
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
            if flags[v] & _OWN or packed[v] & 1:
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


@numba.njit(cache=True, nogil=True)
def _sift_down(key, node, size, k, i):  # type: ignore[no-untyped-def]  # compiled by numba
    """Put (k, i) in the place of the heap's root."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _beats(key[child + 1], node[child + 1], key[child], node[child]):
            child += 1
        if not _beats(key[child], node[child], k, i):
            break
        key[at], node[at] = key[child], node[child]
        at = child
    key[at], node[at] = k, i


@numba.njit(cache=True, nogil=True)
def _push(key, node, size, k, i):  # type: ignore[no-untyped-def]  # compiled by numba
    """Add (k, i) to a heap of `size`."""
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if not _beats(k, i, key[parent], node[parent]):
            break
        key[at], node[at] = key[parent], node[parent]
        at = parent
    key[at], node[at] = k, i


@numba.njit(cache=True, nogil=True)
def _fill_buckets(work, packed, after, first, high, shift):  # type: ignore[no-untyped-def]
    """Queue these nodes while no bucket has been opened."""
    last = first.size - 1
    for t in range(work.size):
        i = work[t]
        bucket = min(max((high - (packed[i] >> 1)) >> shift, 0), last)
        after[i] = first[bucket]
        first[bucket] = i


@numba.njit(cache=True, nogil=True)
def _advance(  # type: ignore[no-untyped-def]  # compiled by numba
    start, target, weight, in_start, source, packed, flags, head, after, held, applied, first, high,
    shift, key, node, lowered,
):  # fmt: skip
    """Until no own node can become final without news. Every live own node is in one place: a
    bucket, the heap, `coming` on its way to one of them, or the list of those that wait for one
    blocker. Returns the number of nodes that were looked at.

    In one piece, for a call with arrays takes longer than what a node needs.
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
                now = min(max((high - (packed[i] >> 1)) >> shift, 0), last)
                if now > bucket:
                    after[i] = first[now]
                    first[now] = i
                else:
                    _push(key, node, size, packed[i], i)
                    size += 1
            if size == 0 and (falls == 0 or (bucket < last and bucket % pause)):
                break
            if size == 0:
                # waiters of fallen nodes: once in a while and not once a message, for a hub falls
                # as often as it has in-edges
                for at in range(falls):
                    j = np.int64(lowered[at])
                    flags[j] &= ~_LOWERED
                    w = np.int64(head[j])
                    head[j] = -1
                    while w >= 0:
                        following = np.int64(after[w])
                        if _beats(packed[j], j, packed[w], w):
                            after[w] = head[j]
                            head[j] = w
                        else:
                            after[w] = coming
                            coming = w
                        w = following
                falls = 0
                continue
            looks += 1
            i, was = np.int64(node[0]), key[0]
            size -= 1
            if size > 0:
                _sift_down(key, node, size, key[size], node[size])
            if packed[i] != was:
                after[i] = -1
                coming = i
                continue
            if waits and held[i] > 0:
                _take_held(i, start, target, weight, in_start, source, packed, flags, held, applied)
                if packed[i] != was:
                    if head[i] >= 0 and not flags[i] & _LOWERED:
                        flags[i] |= _LOWERED
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
                flags[i] |= _CHANGED
                coming = np.int64(head[i])
                head[i] = -1
            score = np.float64(packed[i] >> 1)
            if score <= 0:
                continue
            for e in range(start[i], start[i + 1]):
                j = np.int64(target[e])
                if not packed[j] & 1 or (waits and not flags[j] & _OWN):
                    continue
                message = np.int64(np.rint(np.float64(weight[e]) * score))
                if message > 0:
                    packed[j] = 2 * max((packed[j] >> 1) - message, np.int64(FLOOR)) + 1
                    if waits:
                        flags[j] |= _CHANGED
                        if head[j] >= 0 and not flags[j] & _LOWERED:
                            flags[j] |= _LOWERED
                            lowered[falls] = j
                            falls += 1
    return looks


@numba.njit(cache=True, nogil=True)
def _receive(  # type: ignore[no-untyped-def]  # compiled by numba
    nodes, x, final, start, target, weight, packed, flags, head, after, held, applied
):
    """Merge states of halo nodes; returns the own nodes that have to be decided anew."""
    woken, count = np.int64(-1), 0  # a list that goes on in `after`
    fallen, falls = np.empty(packed.size, after.dtype), 0
    for at in range(nodes.size):
        v = nodes[at]
        if flags[v] & _OWN or not packed[v] & 1:
            continue
        if x[at] < packed[v] >> 1:
            packed[v] = 2 * x[at] + 1
            if head[v] >= 0 and not flags[v] & _LOWERED:
                flags[v] |= _LOWERED
                fallen[falls] = v
                falls += 1
        if not final[at]:
            continue
        packed[v] -= 1
        w = np.int64(head[v])
        head[v] = -1
        while w >= 0:
            following = np.int64(after[w])
            after[w] = woken
            woken = w
            count += 1
            w = following
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
                if head[j] >= 0 and not flags[j] & _LOWERED:
                    flags[j] |= _LOWERED
                    fallen[falls] = j
                    falls += 1
    for at in range(falls):
        j = fallen[at]
        flags[j] &= ~_LOWERED
        w = np.int64(head[j])
        head[j] = -1
        while w >= 0:
            following = np.int64(after[w])
            if _beats(packed[j], j, packed[w], w):
                after[w] = head[j]
                head[j] = w
            else:
                after[w] = woken
                woken = w
                count += 1
            w = following
    out = np.empty(count, after.dtype)
    for at in range(count):
        out[at] = woken
        woken = np.int64(after[woken])
    return out


@numba.njit(cache=True, nogil=True)
def _strongest(start, target, weight, own, packed):  # type: ignore[no-untyped-def]
    """Sender of the largest message to each own node, among those that were final before it."""
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
                # nodes come in ascending order of uid: the first of equals is the smallest
                if message > largest[j]:
                    largest[j] = message
                    by[j] = i
    return by
