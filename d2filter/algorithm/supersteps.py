"""One partition of the exact greedy: states of other partitions in, changed states out (DESIGN §3).

A partition holds the edges that have an end in it. Its *nodes* are its own samples and the *halo*:
samples of other partitions at the other ends. Only states travel: (x, final) of a sample. x merges
by minimum and `final` is sticky, so states may come late, repeated or out of order; and because a
partition derives the message of a final halo node itself, once per edge, it may go back to an older
snapshot of its own alone and repeat what it forgot.

A halo node of which nothing is known yet counts as live with the best score there is: waiting on it
is conservative. That is true of every stale score, for scores only fall.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from d2filter.algorithm.messages import FLOOR

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Nodes = npt.NDArray[np.integer]

UNKNOWN = np.int64(2**63 - 1)  # a score better than any


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGraph:
    """The edges with an end in one partition; m nodes in ascending order of uid."""

    own: Bool
    """(m,) whether a node is at home here"""
    start: I64
    """(m + 1,) offsets into `target`"""
    target: Nodes
    """(e,) out-edges of own nodes, and those of halo nodes that lead to own ones"""
    weight: F32
    """(e,) of the reverse pass, in [0, 1]"""
    in_start: I64
    """(m + 1,) offsets into `source`; empty lists where all edges go both ways"""
    source: Nodes
    """in-edges of own nodes"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a partition must remember to go on."""

    x: I64
    final: Bool
    strongest: I64
    suppressed_by: Nodes
    applied: Bool


def make_graph(
    own: Bool, start: I64, target: Nodes, weight: F32, *, both_ways: bool = False
) -> LocalGraph:
    """A graph from its out-edges. both_ways: each edge is there in both directions, with one
    weight, so that out-edges are all there is to know.
    """
    if both_ways:
        nothing = np.zeros(own.size + 1, np.int64)
        return LocalGraph(
            own=own, start=start, target=target, weight=weight, in_start=nothing,
            source=target[:0],
        )  # fmt: skip
    in_start, source = _transpose(start, target, own)
    return LocalGraph(
        own=own, start=start, target=target, weight=weight, in_start=in_start, source=source
    )


class Partition:
    """The greedy in one partition, superstep by superstep."""

    def __init__(self, graph: LocalGraph, forward: I64) -> None:
        """forward: (m,) scores after the forward pass; of halo nodes UNKNOWN will do."""
        m = graph.own.size
        self._graph = graph
        self._start_over(
            Snapshot(
                x=forward.astype(np.int64, copy=True),
                final=np.zeros(m, np.bool_),
                strongest=np.zeros(m, np.int64),
                suppressed_by=np.full(m, -1, graph.target.dtype),
                applied=np.zeros(0 if graph.own.all() else graph.target.size, np.bool_),
            )
        )

    def _start_over(self, state: Snapshot) -> None:
        m = self._graph.own.size
        self._state = state
        self._head = np.full(m, -1, self._graph.target.dtype)
        self._after = np.empty(m, self._graph.target.dtype)
        self._dirty = np.zeros(m, np.bool_)
        self._held = _count_held(
            self._graph.own, self._graph.start, self._graph.target, state.final, state.applied
        )
        self._changed = self._graph.own.copy()
        live = self._graph.own & ~state.final
        self._work = np.empty(m, self._graph.target.dtype)
        self._coming = np.empty(m, self._graph.target.dtype)
        self._lowered = np.empty(m, self._graph.target.dtype)
        self._waiting = int(live.sum())
        self._work[: self._waiting] = np.flatnonzero(live)

    @property
    def x(self) -> I64:
        """(m,) scores as they stand; final where `final` says so."""
        return self._state.x

    @property
    def final(self) -> Bool:
        """(m,)"""
        return self._state.final

    @property
    def suppressed_by(self) -> Nodes:
        """(m,) node that sent the largest message > 0, ties to the smaller uid; −1 none."""
        return self._state.suppressed_by

    def live(self) -> int:
        """Own samples that are not final yet."""
        return int((self._graph.own & ~self._state.final).sum())

    def receive(self, nodes: I64, x: I64, final: Bool) -> None:
        """States of halo nodes: (s,) nodes, scores and whether final. Any number of times."""
        g, s = self._graph, self._state
        self._waiting = _receive(
            nodes, x, final, g.own, g.start, g.target, g.weight, g.in_start, g.source, s.x, s.final,
            s.strongest, s.suppressed_by, s.applied, self._held, self._head, self._after,
            self._dirty, self._changed, self._work, self._waiting, self._lowered,
        )  # fmt: skip

    def advance(self) -> int:
        """Make everything final that can be. Returns the passes over the worklist."""
        g, s = self._graph, self._state
        rounds = _advance(
            g.own, g.start, g.target, g.weight, g.in_start, g.source, s.x, s.final, s.strongest,
            s.suppressed_by, s.applied, self._held, self._head, self._after, self._dirty,
            self._changed, self._work, self._waiting, self._coming, self._lowered,
        )  # fmt: skip
        self._waiting = 0
        return int(rounds)

    def changed(self) -> I64:
        """Own nodes whose state changed since the last call; at first all."""
        nodes = np.flatnonzero(self._changed)
        self._changed[nodes] = False
        return nodes

    def snapshot(self) -> Snapshot:
        """A copy of the state."""
        s = self._state
        return Snapshot(
            x=s.x.copy(), final=s.final.copy(), strongest=s.strongest.copy(),
            suppressed_by=s.suppressed_by.copy(), applied=s.applied.copy(),
        )  # fmt: skip

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot. What other partitions have sent since must be sent again."""
        self._start_over(
            Snapshot(
                x=snapshot.x.copy(), final=snapshot.final.copy(),
                strongest=snapshot.strongest.copy(), suppressed_by=snapshot.suppressed_by.copy(),
                applied=snapshot.applied.copy(),
            )
        )  # fmt: skip


@numba.njit(cache=True, nogil=True)
def _transpose(start, target, own):  # type: ignore[no-untyped-def]  # compiled by numba
    """In-edges of own nodes as CSR."""
    m = own.size
    in_start = np.zeros(m + 1, np.int64)
    for e in range(target.size):
        if own[target[e]]:
            in_start[target[e] + 1] += 1
    for j in range(m):
        in_start[j + 1] += in_start[j]
    fill = in_start[:-1].copy()
    source = np.empty(in_start[m], target.dtype)
    for i in range(m):
        for e in range(start[i], start[i + 1]):
            j = target[e]
            if own[j]:
                source[fill[j]] = i
                fill[j] += 1
    return in_start, source


@numba.njit(cache=True, nogil=True)
def _count_held(own, start, target, final, applied):  # type: ignore[no-untyped-def]
    """Messages of final halo nodes that each own node has not taken yet."""
    held = np.zeros(own.size if applied.size else 0, np.int32)
    if applied.size:
        for v in range(own.size):
            if not own[v] and final[v]:
                for e in range(start[v], start[v + 1]):
                    if not applied[e] and not final[target[e]]:
                        held[target[e]] += 1
    return held


@numba.njit(cache=True, nogil=True, inline="always")
def _beats(x, i, j):  # type: ignore[no-untyped-def]  # compiled by numba
    return x[i] > x[j] or (x[i] == x[j] and i < j)


@numba.njit(cache=True, nogil=True)
def _blocker(i, x, final, start, target, in_start, source):  # type: ignore[no-untyped-def]
    """A live neighbor that beats i, over out- and in-edges; −1 when there is none."""
    for e in range(start[i], start[i + 1]):
        j = target[e]
        if not final[j] and _beats(x, j, i):
            return np.int64(j)
    for e in range(in_start[i], in_start[i + 1]):
        j = source[e]
        if not final[j] and _beats(x, j, i):
            return np.int64(j)
    return np.int64(-1)


@numba.njit(cache=True, nogil=True)
def _take(j, sender, weight, x, strongest, by, dirty, changed, lowered, n_lowered):  # type: ignore[no-untyped-def]
    """Apply the message of a final sender to j. Returns the new number of lowered nodes."""
    if x[sender] <= 0:
        return n_lowered
    message = np.int64(np.rint(np.float64(weight) * np.float64(x[sender])))
    if message <= 0:
        return n_lowered
    x[j] = max(x[j] - message, np.int64(FLOOR))
    if message > strongest[j] or (message == strongest[j] and sender < by[j]):
        strongest[j] = message
        by[j] = sender
    changed[j] = True
    if not dirty[j]:
        dirty[j] = True
        lowered[n_lowered] = j
        n_lowered += 1
    return n_lowered


@numba.njit(cache=True, nogil=True)
def _take_held(  # type: ignore[no-untyped-def]  # compiled by numba
    j, own, start, target, weight, in_start, source, x, final, strongest, by, applied, held,
    dirty, changed, lowered, n_lowered,
):  # fmt: skip
    """Messages that j could not take while its key was better than their senders'."""
    found = True
    while found and held[j] > 0:
        found = False
        # in-edges, and out-edges where these are all there is: a halo neighbor is in one of them
        for side in range(2):
            first, end = (in_start[j], in_start[j + 1]) if side == 0 else (start[j], start[j + 1])
            for at in range(first, end):
                v = source[at] if side == 0 else target[at]
                if own[v] or not final[v]:
                    continue
                for e in range(start[v], start[v + 1]):
                    if target[e] == j and not applied[e] and _beats(x, v, j):
                        applied[e] = True
                        held[j] -= 1
                        found = True
                        n_lowered = _take(
                            j, v, weight[e], x, strongest, by, dirty, changed, lowered, n_lowered
                        )
    return n_lowered


@numba.njit(cache=True, nogil=True)
def _wake(j, x, everyone, head, after, coming, n_coming):  # type: ignore[no-untyped-def]
    """Those that wait for j come back to the worklist: all, or those that j no longer beats."""
    w = head[j]
    head[j] = -1
    while w >= 0:
        following = after[w]
        if not everyone and _beats(x, j, w):
            after[w] = head[j]
            head[j] = w
        else:
            coming[n_coming] = w
            n_coming += 1
        w = following
    return n_coming


@numba.njit(cache=True, nogil=True)
def _receive(  # type: ignore[no-untyped-def]  # compiled by numba
    nodes, new_x, new_final, own, start, target, weight, in_start, source, x, final, strongest, by,
    applied, held, head, after, dirty, changed, work, n_work, lowered,
):  # fmt: skip
    """Merge states; returns the new length of the worklist."""
    n_lowered = 0
    for t in range(nodes.size):
        v = nodes[t]
        if own[v]:
            continue
        if new_x[t] < x[v]:
            x[v] = new_x[t]
            if not dirty[v]:
                dirty[v] = True
                lowered[n_lowered] = v
                n_lowered += 1
        if not new_final[t] or final[v]:
            continue
        final[v] = True
        n_work = _wake(v, x, True, head, after, work, n_work)
        for e in range(start[v], start[v + 1]):
            j = target[e]
            if final[j] or applied[e]:
                continue
            if _beats(x, v, j):
                applied[e] = True
                n_lowered = _take(
                    j, v, weight[e], x, strongest, by, dirty, changed, lowered, n_lowered
                )
            else:
                held[j] += 1
    t = 0
    while t < n_lowered:
        j = lowered[t]
        t += 1
        dirty[j] = False
        if own[j] and held[j] > 0 and not final[j]:
            dirty[j] = True  # taking more must not list it again
            n_lowered = _take_held(
                j, own, start, target, weight, in_start, source, x, final, strongest, by, applied,
                held, dirty, changed, lowered, n_lowered,
            )  # fmt: skip
            dirty[j] = False
        n_work = _wake(j, x, False, head, after, work, n_work)
    return n_work


@numba.njit(cache=True, nogil=True)
def _advance(  # type: ignore[no-untyped-def]  # compiled by numba
    own, start, target, weight, in_start, source, x, final, strongest, by, applied, held, head,
    after, dirty, changed, work, n_work, coming, lowered,
):  # fmt: skip
    """Until no own node can become final without news; returns the rounds.

    Every live own node is in exactly one place: the worklist of this round, that of the next, or
    the list of those that wait for one blocker (head and after are linked lists over nodes).
    """
    rounds = 0
    while n_work > 0:
        rounds += 1
        n_coming = 0
        n_lowered = 0
        for t in range(n_work):
            i = work[t]
            # lowered in this very round, it may owe a message that it could not take before
            if held.size and held[i] > 0:
                n_lowered = _take_held(
                    i, own, start, target, weight, in_start, source, x, final, strongest, by,
                    applied, held, dirty, changed, lowered, n_lowered,
                )  # fmt: skip
            b = _blocker(i, x, final, start, target, in_start, source)
            if b >= 0:
                after[i] = head[b]
                head[b] = i
                continue
            final[i] = True
            changed[i] = True
            n_coming = _wake(i, x, True, head, after, coming, n_coming)
            for e in range(start[i], start[i + 1]):
                j = target[e]
                if own[j] and not final[j]:
                    n_lowered = _take(
                        j, i, weight[e], x, strongest, by, dirty, changed, lowered, n_lowered
                    )
        # once a round, not once a message: a hub is lowered as often as it has in-edges
        for t in range(n_lowered):
            j = lowered[t]
            if held.size and held[j] > 0 and not final[j]:
                _take_held(
                    j, own, start, target, weight, in_start, source, x, final, strongest, by,
                    applied, held, dirty, changed, lowered, n_lowered,
                )  # fmt: skip
            dirty[j] = False
            n_coming = _wake(j, x, False, head, after, coming, n_coming)
        for t in range(n_coming):
            work[t] = coming[t]
        n_work = n_coming
    return rounds
