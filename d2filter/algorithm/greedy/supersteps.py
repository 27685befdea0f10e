"""The exact greedy in one partition of several: states of other partitions in, changed states out.

A partition holds the edges that have an end in it. Its *vertices* are its own samples and the
*halo*: the samples of other partitions at the other ends. Partitions exchange states only: (x,
final) of a sample. On receipt x becomes the minimum of old and new, and `final` never reverts, so
states may arrive late, repeatedly or out of order. A partition computes the message of a final halo
vertex itself, once per edge. It may therefore return to an older snapshot of its own and repeat the
rest.

Scores only fall, so an old score is an upper bound, and waiting because of one is safe. A halo
vertex of which nothing is known yet counts as live with the best possible score.

See docs/method.md#ranking-in-partitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from d2filter.algorithm.greedy import best_first
from d2filter.algorithm.greedy.messages import FLOOR

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Vertices = npt.NDArray[np.integer]

UNKNOWN = 2**62 - 1  # a score that none beats

IN_A_BUCKET = 4  # vertices, about
_SAMPLED = 4096  # scores that choose the width of a bucket
_FALL = 4  # buckets reach so far down, in units of the range of scores at the beginning


class LocalGraph(NamedTuple):
    """The edges with an end in one partition; m vertices in ascending order of uid."""

    own: Bool
    """(m,) whether a vertex is a sample of this partition"""
    start: Vertices
    """(m + 1,) offsets into `target`"""
    target: Vertices
    """(e,) out-edges of own vertices, and those of halo vertices that lead to own ones"""
    weight: F32
    """(e,) of the reverse pass, in [0, 1]"""
    in_start: Vertices
    """(m + 1,) offsets into `source`; (0,) if out-edges are enough"""
    source: Vertices
    """in-edges of own vertices"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a partition must remember to go on."""

    packed: I64
    """(m,) 2·x + 1 of live vertices, 2·x of final ones"""
    applied: Bool
    """(e,) edges of halo vertices whose message was applied; empty without a halo"""

    def copy(self) -> Snapshot:
        """One that shares nothing with this."""
        return Snapshot(packed=self.packed.copy(), applied=self.applied.copy())


class _State(NamedTuple):
    """Scores, and which vertex waits for which."""

    packed: I64
    applied: Bool
    held: npt.NDArray[np.int32]
    """(m,) messages of final halo vertices that a vertex could not take yet; empty: no halo"""
    flags: U8
    head: Vertices
    """(m,) first of the vertices that wait for a vertex, −1 none"""
    after: Vertices
    """(m,) the next one that waits for the same, or lies in the same bucket"""


class _Queue(NamedTuple):
    """Own vertices to be decided, best first: buckets, and a heap of those of the best one."""

    first: Vertices
    """(B,) a vertex in each bucket, −1 none; the others follow in `after`"""
    high: int
    """score where the first bucket begins"""
    shift: int
    """log₂ of the width of a bucket"""
    key: I64
    """(m,) the heap: packed scores as they were when they came"""
    vertex: Vertices
    lowered: Vertices
    """(m,) vertices that others wait for and that have fallen"""


def make_graph(
    own: Bool, start: Vertices, target: Vertices, weight: F32, *, both_ways: bool = False
) -> LocalGraph:
    """A graph from its out-edges. both_ways: each edge exists in both directions with one weight,
    so that out-edges are enough.
    """
    in_start, source = start[:0], target[:0]
    # without a halo nobody ever waits, and in-edges are not looked at
    if not both_ways and not own.all():
        in_start, source = best_first.transpose(start, target, own)
    return LocalGraph(
        own=own, start=start, target=target, weight=weight, in_start=in_start, source=source
    )


class Partition:
    """The greedy in one partition, superstep by superstep."""

    def __init__(self, graph: LocalGraph, forward: I64) -> None:
        """forward: (m,) scores after the forward pass, in [−2⁶², 2⁶²); UNKNOWN for halo vertices. A
        vertex at −2⁶² cannot change and is final from the start.
        """
        self._graph = graph
        edges = 0 if graph.own.all() else graph.target.size
        packed = 2 * forward + (forward > FLOOR)
        self._start_over(Snapshot(packed=packed, applied=np.zeros(edges, np.bool_)))

    def _start_over(self, known: Snapshot) -> None:
        g = self._graph
        m, kind = g.own.size, g.target.dtype
        self._state = _State(
            packed=known.packed,
            applied=known.applied,
            held=best_first.count_held(g.own, g.start, g.target, known.packed, known.applied),
            flags=g.own * np.uint8(best_first.OWN | best_first.CHANGED),
            head=np.full(m if known.applied.size else 0, -1, kind),
            after=np.empty(m, kind),
        )
        self._work = [np.flatnonzero(g.own & ((known.packed & 1) == 1)).astype(kind)]

    @property
    def x(self) -> I64:
        """(m,) scores as they stand."""
        return self._state.packed >> 1

    def live(self) -> int:
        """Own samples that are not final yet."""
        return int(best_first.count_live(self._state.packed, self._state.flags))

    def states(self, vertices: Vertices) -> tuple[I64, Bool]:
        """x and final of some vertices, (s,) each."""
        packed = self._state.packed[vertices]
        return packed >> 1, (packed & 1) == 0

    def receive(self, vertices: Vertices, x: I64, final: Bool) -> None:
        """States of halo vertices: (s,) vertices, scores and whether final. Any number of times."""
        g, state = self._graph, self._state
        self._work.append(
            best_first.receive(
                vertices, x, final, g.start, g.target, g.weight, state.packed, state.flags,
                state.head, state.after, state.held, state.applied,
            )
        )  # fmt: skip

    def advance(self) -> int:
        """Make everything final that can be. Returns how many vertices were checked."""
        work = np.concatenate(self._work)
        self._work = [work[:0]]
        if not work.size:
            return 0
        g, state, q = self._graph, self._state, _make_queue(self._state, work)
        best_first.fill_buckets(work, state.packed, state.after, q.first, q.high, q.shift)
        looks = best_first.advance(
            g.start, g.target, g.weight, g.in_start, g.source, state.packed, state.flags,
            state.head, state.after, state.held, state.applied, q.first, q.high, q.shift, q.key,
            q.vertex, q.lowered,
        )  # fmt: skip
        return int(looks)

    def changed(self) -> I64:
        """Own vertices whose state changed since the last call; at first all. Without a halo no
        other partition needs them, and changes are not recorded.
        """
        vertices = np.flatnonzero(self._state.flags & best_first.CHANGED)
        self._state.flags[vertices] &= ~np.uint8(best_first.CHANGED)
        return vertices

    def suppressed_by(self) -> Vertices:
        """(m,) vertex that sent the largest message > 0 to each own vertex, ties to the smaller
        uid; −1 none. All own vertices must be final.
        """
        g = self._graph
        by: Vertices = best_first.strongest(g.start, g.target, g.weight, g.own, self._state.packed)
        return by

    def snapshot(self) -> Snapshot:
        """A copy of the state."""
        return Snapshot(packed=self._state.packed, applied=self._state.applied).copy()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot. What other partitions have sent since must be sent again."""
        self._start_over(snapshot.copy())


def _make_queue(state: _State, work: Vertices) -> _Queue:
    """An empty queue whose buckets suit the scores of these vertices."""
    scores = np.sort(state.packed[work[:: max(1, work.size // _SAMPLED)]] >> 1)
    # a few outliers must not make all buckets wide
    few = scores.size // 1000
    low, high = int(scores[few]), int(scores[-1 - few])
    wanted = max(1, work.size // IN_A_BUCKET)
    shift = max(0, ((high - low) // wanted).bit_length())
    m, kind = state.packed.size, work.dtype
    buckets = min(_FALL * wanted, (high - low >> shift) * _FALL) + 1
    # what is never written to takes no memory
    return _Queue(
        first=np.full(buckets, -1, kind),
        high=high,
        shift=shift,
        key=np.empty(m, np.int64),
        vertex=np.empty(m, kind),
        lowered=np.empty(state.head.size, kind),
    )
