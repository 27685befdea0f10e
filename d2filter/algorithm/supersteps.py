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

A round has two phases, so that threads can share it: nodes of the worklist are *decided* on states
that nobody changes meanwhile, and what was decided is *applied* by the thread whose nodes it
changes. Rounds may differ with the division among threads, states in the end do not.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

_BUFFER = 1 << 17  # messages that a thread decides on before they are applied
_ALONE = 1 << 14  # shorter worklists are not worth waking other threads for

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
    """(m + 1,) offsets into `source`; empty lists where all edges go both ways"""
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
    """(m,) messages of final halo nodes that a node could not take yet"""
    flags: U8
    head: Nodes
    """(m,) first of the nodes that wait for a node, −1 none"""
    after: Nodes
    """(m,) the next one that waits for the same"""


class _Buffers(NamedTuple):
    """One row for each of T threads: worklists, and what a thread has decided."""

    work: Nodes
    coming: Nodes
    """worklist of the next round"""
    lowered: Nodes
    """nodes that messages have lowered in this round"""
    final: Nodes
    blocked: Nodes
    blocker: Nodes
    """a node that beats `blocked`; itself: to be decided in the next round"""
    target: Nodes
    message: I64
    filled: I64
    """(T, 7) how full they are, see _AT and following"""


_AT, _WORK, _COMING, _LOWERS, _FINAL, _BLOCKED, _SENT = range(7)  # columns of `filled`


def make_graph(
    own: Bool, start: Nodes, target: Nodes, weight: F32, *, both_ways: bool = False
) -> LocalGraph:
    """A graph from its out-edges. both_ways: each edge is there in both directions, with one
    weight, so that out-edges are all there is to know.
    """
    if both_ways:
        in_start, source = np.zeros(own.size + 1, start.dtype), target[:0]
    else:
        in_start, source = _transpose(start, target, own)
    return LocalGraph(
        own=own, start=start, target=target, weight=weight, in_start=in_start, source=source
    )


class Partition:
    """The greedy in one partition, superstep by superstep."""

    def __init__(self, graph: LocalGraph, forward: I64, *, threads: int = 1) -> None:
        """forward: (m,) scores after the forward pass, in [−2⁶², 2⁶²); of halo nodes UNKNOWN."""
        self._graph = graph
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        edges = 0 if graph.own.all() else graph.target.size
        self._start_over(Snapshot(packed=2 * forward + 1, applied=np.zeros(edges, np.bool_)))

    def _start_over(self, known: Snapshot) -> None:
        g = self._graph
        m, kind = g.own.size, g.target.dtype
        flags = g.own.astype(np.uint8)
        flags *= _OWN | _CHANGED
        self._state = _State(
            packed=known.packed,
            applied=known.applied,
            held=_count_held(g, known.packed, known.applied),
            flags=flags,
            head=np.full(m, -1, kind),
            after=np.empty(m, kind),
        )
        self._longest = int(np.diff(g.start).max(initial=0))
        self._buffers: _Buffers | None = None
        _all_live(self._state, self._taken())

    def _taken(self) -> _Buffers:
        """The buffers, new where they were let go. What is never written to takes no memory: a long
        row costs what it once held.
        """
        if self._buffers is None:
            m, kind, rows = self._graph.own.size, self._graph.target.dtype, self._threads
            sent = max(_BUFFER, self._longest)
            self._buffers = _Buffers(
                **{name: np.empty((rows, m), kind) for name in ("work", "coming", "lowered")},
                **{
                    name: np.empty((rows, _BUFFER), kind)
                    for name in ("final", "blocked", "blocker")
                },
                target=np.empty((rows, sent), kind),
                message=np.empty((rows, sent), np.int64),
                filled=np.zeros((rows, 7), np.int64),
            )
        return self._buffers

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
        return int(_count_live(self._state))

    def states(self, nodes: Nodes) -> tuple[I64, Bool]:
        """x and final of some nodes, (s,) each."""
        packed = self._state.packed[nodes]
        return packed >> 1, (packed & 1) == 0

    def receive(self, nodes: Nodes, x: I64, final: Bool) -> None:
        """States of halo nodes: (s,) nodes, scores and whether final. Any number of times."""
        _receive(nodes, x, final, self._graph, self._state, self._taken())

    def advance(self) -> int:
        """Make everything final that can be. Returns the rounds that took."""
        rounds = 0
        while True:
            most = _ALONE if self._pool else self._graph.own.size
            b = self._taken()
            rounds += int(_advance_alone(self._graph, self._state, b, most))
            if self._pool is None or not b.filled[0, _WORK]:
                # who waits is known to whom it waits for: between supersteps nothing else is held
                self._buffers = None
                return rounds
            rounds += self._advance_together(self._pool)

    def _advance_together(self, pool: ThreadPoolExecutor) -> int:
        """Rounds in all threads, until few nodes are left to decide on."""
        g, state, b = self._graph, self._state, self._taken()
        shares = np.linspace(0, g.own.size, self._threads + 1).astype(np.int64)

        def all_do(phase: Callable[..., None]) -> None:
            for _ in pool.map(
                lambda t: phase(t, shares[t], shares[t + 1], g, state, b), range(self._threads)
            ):
                pass

        rounds = 0
        _spread(b)
        while b.filled[:, _WORK].sum() > _ALONE:
            rounds += 1
            while (b.filled[:, _AT] < b.filled[:, _WORK]).any():
                all_do(_decide)
                all_do(_apply)
            all_do(_end_round)
            b = _next_round(b)
        self._buffers = b
        _gather_up(b)
        return rounds

    def changed(self) -> I64:
        """Own nodes whose state changed since the last call; at first all."""
        nodes = np.flatnonzero(self._state.flags & _CHANGED)
        self._state.flags[nodes] &= ~np.uint8(_CHANGED)
        return nodes

    def suppressed_by(self) -> Nodes:
        """(m,) node that sent the largest message > 0 to each own node, ties to the smaller uid; −1
        none. All own nodes must be final.
        """
        by: Nodes = _strongest(self._graph, self._state.packed)
        return by

    def snapshot(self) -> Snapshot:
        """A copy of the state."""
        return Snapshot(packed=self._state.packed, applied=self._state.applied).copy()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot. What other partitions have sent since must be sent again."""
        self._start_over(snapshot.copy())


def _next_round(b: _Buffers) -> _Buffers:
    """What comes is the worklist now."""
    b.filled[:, _WORK] = b.filled[:, _COMING]
    b.filled[:, _AT] = b.filled[:, _COMING] = 0
    return b._replace(work=b.coming, coming=b.work)


def _spread(b: _Buffers) -> None:
    """The worklist of the first thread → all."""
    pieces = np.array_split(b.work[0, : b.filled[0, _WORK]].copy(), len(b.work))
    for t, piece in enumerate(pieces):
        b.work[t, : piece.size] = piece
        b.filled[t, _WORK] = piece.size


def _gather_up(b: _Buffers) -> None:
    """The worklists of all threads → the first."""
    for t in range(1, len(b.work)):
        begin, size = b.filled[0, _WORK], b.filled[t, _WORK]
        b.work[0, begin : begin + size] = b.work[t, :size]
        b.filled[0, _WORK] += size
    b.filled[1:] = 0


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
def _count_held(g, packed, applied):  # type: ignore[no-untyped-def]  # compiled by numba
    """Messages of final halo nodes that each own node has not taken yet."""
    held = np.zeros(packed.size if applied.size else 0, np.int32)
    if applied.size:
        for v in range(packed.size):
            if not g.own[v] and not packed[v] & 1:
                for e in range(g.start[v], g.start[v + 1]):
                    if not applied[e] and packed[g.target[e]] & 1:
                        held[g.target[e]] += 1
    return held


@numba.njit(cache=True, nogil=True)
def _all_live(state, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """All own nodes that are not final are to be decided."""
    n = 0
    for i in range(state.packed.size):
        if state.flags[i] & _OWN and state.packed[i] & 1:
            b.work[0, n] = i
            n += 1
    b.filled[0, _WORK] = n


@numba.njit(cache=True, nogil=True)
def _count_live(state):  # type: ignore[no-untyped-def]  # compiled by numba
    n = 0
    for i in range(state.packed.size):
        n += state.flags[i] & state.packed[i] & 1  # _OWN is the lowest bit, too
    return n


@numba.njit(cache=True, nogil=True, inline="always")
def _beats(a, i, b, j):  # type: ignore[no-untyped-def]  # compiled by numba
    """Whether key (a, i) comes before (b, j)."""
    return a > b or (a == b and i < j)


@numba.njit(cache=True, nogil=True, inline="always")
def _blocker(i, g, packed):  # type: ignore[no-untyped-def]  # compiled by numba
    """A live neighbor that beats i, over out- and in-edges; −1 when there is none."""
    mine = packed[i]
    for e in range(g.start[i], g.start[i + 1]):
        j = g.target[e]
        if packed[j] & 1 and _beats(packed[j], j, mine, i):
            return np.int64(j)
    for e in range(g.in_start[i], g.in_start[i + 1]):
        j = g.source[e]
        if packed[j] & 1 and _beats(packed[j], j, mine, i):
            return np.int64(j)
    return np.int64(-1)


@numba.njit(cache=True, nogil=True, inline="always")
def _message(weight, x):  # type: ignore[no-untyped-def]  # compiled by numba
    """rint(w·x), 0 for x ≤ 0."""
    return np.int64(np.rint(np.float64(weight) * np.float64(x))) if x > 0 else np.int64(0)


@numba.njit(cache=True, nogil=True, inline="always")
def _take(t, j, message, state, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """Lower a live node."""
    x = max((state.packed[j] >> 1) - message, np.int64(FLOOR))
    state.packed[j] = 2 * x + 1
    if not state.flags[j] & _LOWERED:
        b.lowered[t, b.filled[t, _LOWERS]] = j
        b.filled[t, _LOWERS] += 1
    state.flags[j] |= _CHANGED | _LOWERED


@numba.njit(cache=True, nogil=True)
def _take_held(t, j, g, state, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """Messages that j could not take while its key was better than their senders'."""
    found = True
    while found and state.held[j] > 0:
        found = False
        # in-edges, and out-edges where these are all there is: a halo neighbor is in one of them
        for side in range(2):
            first, end = g.in_start[j], g.in_start[j + 1]
            if side:
                first, end = g.start[j], g.start[j + 1]
            for at in range(first, end):
                v = g.target[at] if side else g.source[at]
                if state.flags[v] & _OWN or state.packed[v] & 1:
                    continue
                for e in range(g.start[v], g.start[v + 1]):
                    if g.target[e] != j or state.applied[e]:
                        continue
                    x = state.packed[v] >> 1
                    if _beats(x, v, state.packed[j] >> 1, j):
                        state.applied[e] = True
                        state.held[j] -= 1
                        found = True
                        message = _message(g.weight[e], x)
                        if message:
                            _take(t, j, message, state, b)


@numba.njit(cache=True, nogil=True, inline="always")
def _wake(t, j, everyone, state, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """Those that wait for j come back to the worklist: all, or those that j no longer beats."""
    w = state.head[j]
    state.head[j] = -1
    while w >= 0:
        following = state.after[w]
        # another thread may be lowering w: a better score than it has wakes it in vain at most
        if not everyone and _beats(state.packed[j], j, state.packed[w], w):
            state.after[w] = state.head[j]
            state.head[j] = w
        else:
            b.coming[t, b.filled[t, _COMING]] = w
            b.filled[t, _COMING] += 1
        w = following


@numba.njit(cache=True, nogil=True)
def _decide(t, first, end, g, state, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """Who of this thread's worklist is final and what it sends, until a buffer is full. The state
    is only read.
    """
    finals, waits, sent = 0, 0, 0
    at = b.filled[t, _AT]
    while at < b.filled[t, _WORK] and finals < b.final.shape[1] and waits < b.blocked.shape[1]:
        i = b.work[t, at]
        if sent + g.start[i + 1] - g.start[i] > b.target.shape[1]:
            break
        at += 1
        # lowered in this very round, it may owe a message that it could not take before
        owes = state.held.size > 0 and state.held[i] > 0 and state.flags[i] & _LOWERED
        blocker = np.int64(i) if owes else _blocker(i, g, state.packed)
        if blocker >= 0:
            b.blocked[t, waits] = i
            b.blocker[t, waits] = blocker
            waits += 1
            continue
        b.final[t, finals] = i
        finals += 1
        x = state.packed[i] >> 1
        if x > 0:
            for e in range(g.start[i], g.start[i + 1]):
                message = _message(g.weight[e], x)
                if message > 0 and state.packed[g.target[e]] & 1:
                    b.target[t, sent] = g.target[e]
                    b.message[t, sent] = message
                    sent += 1
    b.filled[t, _AT] = at
    b.filled[t, _FINAL], b.filled[t, _BLOCKED], b.filled[t, _SENT] = finals, waits, sent


@numba.njit(cache=True, nogil=True)
def _apply(t, first, end, g, state, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """What all threads have decided about the nodes first … end − 1."""
    threads = b.filled.shape[0]
    for s in range(threads):
        for at in range(b.filled[s, _FINAL]):
            i = b.final[s, at]
            if first <= i < end:
                state.packed[i] -= 1
                state.flags[i] |= _CHANGED
                _wake(t, i, True, state, b)
        for at in range(b.filled[s, _SENT]):
            j = b.target[s, at]
            if first <= j < end and state.flags[j] & _OWN:
                _take(t, j, b.message[s, at], state, b)
    for s in range(threads):
        for at in range(b.filled[s, _BLOCKED]):
            i, j = b.blocked[s, at], b.blocker[s, at]
            if first <= j < end:
                if i != j and state.packed[j] & 1:
                    state.after[i] = state.head[j]
                    state.head[j] = i
                else:
                    b.coming[t, b.filled[t, _COMING]] = i
                    b.filled[t, _COMING] += 1


@numba.njit(cache=True, nogil=True)
def _end_round(t, first, end, g, state, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """Once a round, not once a message: a hub is lowered as often as it has in-edges."""
    for at in range(b.filled[t, _LOWERS]):
        j = b.lowered[t, at]
        if state.held.size > 0 and state.held[j] > 0 and state.packed[j] & 1:
            _take_held(t, j, g, state, b)
    for at in range(b.filled[t, _LOWERS]):
        j = b.lowered[t, at]
        state.flags[j] &= ~_LOWERED
        _wake(t, j, False, state, b)
    b.filled[t, _LOWERS] = 0


@numba.njit(cache=True, nogil=True)
def _advance_alone(g, state, b, most):  # type: ignore[no-untyped-def]  # compiled by numba
    """Rounds in this thread, until nothing can become final without news, or until more than `most`
    nodes are to be decided. Every live own node is in exactly one place: the worklist of this
    round, that of the next, or the list of those that wait for one blocker.
    """
    rounds = 0
    work, coming, count = b.work[0], b.coming[0], b.filled[0]
    everyone = state.packed.size
    while 0 < count[_WORK] <= most:
        rounds += 1
        count[_AT] = 0
        while count[_AT] < count[_WORK]:
            _decide(0, 0, everyone, g, state, b)
            _apply(0, 0, everyone, g, state, b)
        _end_round(0, 0, everyone, g, state, b)
        for at in range(count[_COMING]):
            work[at] = coming[at]
        count[_WORK] = count[_COMING]
        count[_COMING] = 0
    count[_AT] = 0
    return rounds


@numba.njit(cache=True, nogil=True)
def _receive(nodes, x, final, g, state, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """Merge states of halo nodes; whoever may be decided anew comes to the worklist."""
    count = b.filled[0]
    count[_COMING] = 0
    for at in range(nodes.size):
        v = nodes[at]
        if state.flags[v] & _OWN or not state.packed[v] & 1:
            continue
        if x[at] < state.packed[v] >> 1:
            state.packed[v] = 2 * x[at] + 1
            if not state.flags[v] & _LOWERED:
                state.flags[v] |= _LOWERED
                b.lowered[0, count[_LOWERS]] = v
                count[_LOWERS] += 1
        if not final[at]:
            continue
        state.packed[v] -= 1
        _wake(0, v, True, state, b)
        for e in range(g.start[v], g.start[v + 1]):
            j = g.target[e]
            if not state.packed[j] & 1 or state.applied[e]:
                continue
            if _beats(x[at], v, state.packed[j] >> 1, j):
                state.applied[e] = True
                message = _message(g.weight[e], x[at])
                if message:
                    _take(0, j, message, state, b)
            else:
                state.held[j] += 1
    _end_round(0, 0, state.packed.size, g, state, b)
    work, coming = b.work[0], b.coming[0]
    for at in range(count[_COMING]):
        work[count[_WORK] + at] = coming[at]
    count[_WORK] += count[_COMING]
    count[_COMING] = 0


@numba.njit(cache=True, nogil=True)
def _strongest(g, packed):  # type: ignore[no-untyped-def]  # compiled by numba
    """Sender of the largest message to each own node, among those that were final before it."""
    largest = np.zeros(packed.size, np.int64)
    by = np.full(packed.size, -1, g.target.dtype)
    for i in range(packed.size):
        x = packed[i] >> 1
        if x <= 0 or packed[i] & 1:
            continue
        for e in range(g.start[i], g.start[i + 1]):
            j = g.target[e]
            if g.own[j] and _beats(x, i, packed[j] >> 1, j):
                message = _message(g.weight[e], x)
                # nodes come in ascending order of uid: the first of equals is the smallest
                if message > largest[j]:
                    largest[j] = message
                    by[j] = i
    return by
