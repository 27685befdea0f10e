"""The program of one partition of a ranking, from its rows of the graph to its final scores (§3).

    share = Share(rows, starts, number)
    share.cut().to(peer)                    cut edges, once, to the partitions of their targets
    share.hear_edges(...)                   those of the others
    share.describe(ids)                     uid and difficulty of own samples, for others' halos
    share.begin(...)                        forward pass
    share.states_for(peer) → hear_states    what changed since the last time …
    share.advance()                         … superstep by superstep, until live() is 0 everywhere

No method waits for anything: who calls them, over a network or in a loop, is somebody else's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import cut, messages, supersteps, uids
from d2filter.algorithm.schemes import Scheme

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The n rows of a graph that one partition holds, ascending by uid."""

    hi: uids.U64
    lo: uids.U64
    difficulty: F32
    neighbors: I64
    """(n, k) graph ids, −1 pads"""
    sqdist: F32
    """(n, k)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """What travels in a superstep: s samples."""

    ids: I64
    """(s,) graph ids"""
    x: I64
    final: Bool


def joined(states: list[States]) -> States:
    """States of several partitions for one other."""
    return States(
        ids=np.concatenate([s.ids for s in states]),
        x=np.concatenate([s.x for s in states]),
        final=np.concatenate([s.final for s in states]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a partition must know of its halo, by ascending graph id."""

    hi: uids.U64
    lo: uids.U64
    difficulty: F32


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a partition has found for its n rows, in their order."""

    forward: I64
    final: I64
    suppressed_by: I64
    """graph ids, −1 none"""


class Share:
    """One partition of a ranking."""

    def __init__(self, rows: Rows, starts: I64, number: int) -> None:
        """starts: (P + 1,) first graph id of each partition."""
        self.rows = rows
        self._starts = starts
        self._first = int(starts[number])
        self._number = number
        nothing = np.empty(0, np.int64)
        self._incoming: list[tuple[I64, I64, F32]] = [(nothing, nothing, np.empty(0, np.float32))]

    @property
    def size(self) -> int:
        """Rows of this partition."""
        return len(self.rows.hi)

    def range(self) -> tuple[float, float]:
        """Smallest and largest difficulty; (inf, −inf) where there is no row."""
        difficulty = self.rows.difficulty
        if not difficulty.size:
            return np.inf, -np.inf
        return float(difficulty.min()), float(difficulty.max())

    def cut(self) -> cut.CutEdges:
        """The edges that leave this partition."""
        return cut.cut_edges(self._starts, self._number, self.rows.neighbors, self.rows.sqdist)

    def hear_edges(self, source: I64, target: I64, sqdist: F32) -> None:
        """Cut edges of one other partition that lead here."""
        self._incoming.append((source, target, sqdist))

    def halo(self) -> I64:
        """Graph ids, ascending, of all samples elsewhere that this partition has edges with."""
        sources = np.concatenate([source for source, _, _ in self._incoming])
        return cut.halo(self._first, self.size, self.rows.neighbors, sources)

    def describe(self, ids: I64) -> Known:
        """Own samples by graph id."""
        at = ids - self._first
        rows = self.rows
        return Known(hi=rows.hi[at], lo=rows.lo[at], difficulty=rows.difficulty[at])

    def begin(
        self, scheme: Scheme, low: float, high: float, halo: Known, *, both_ways: bool = False
    ) -> None:
        """Forward pass and the first state. low, high: extremes of difficulty in the whole pool;
        halo: of `halo()`.
        """
        rows = self.rows
        incoming = tuple(np.concatenate(part) for part in zip(*self._incoming, strict=True))
        ids = self.halo()
        edges = cut.assemble(
            self._first, (rows.hi, rows.lo), rows.neighbors, rows.sqdist,
            (incoming[0], incoming[1], incoming[2]), ids, (halo.hi, halo.lo), both_ways=both_ways,
        )  # fmt: skip
        self._edges = edges
        scores = messages.normalized(edges.spread(rows.difficulty, halo.difficulty), low, high)
        gathered = messages.gather(
            scores, edges.start, edges.target, scheme.forward_weights(edges.sqdist)
        )
        x = scheme.forward_scores(scores, gathered)
        # of the halo only some of the edges are known here
        x[edges.halo_node] = supersteps.UNKNOWN
        self._forward = x[edges.own_node]
        graph = supersteps.make_graph(
            edges.own(), edges.start, edges.target, scheme.reverse_weights(edges.sqdist),
            both_ways=both_ways,
        )  # fmt: skip
        self._partition = supersteps.Partition(graph, x)
        self._ids = edges.ids(self._first)
        peers, nodes = cut.boundary(edges, self._starts)
        count = len(self._starts) - 1
        start = np.searchsorted(peers, np.arange(count + 1))
        self._boundary = [nodes[start[p] : start[p + 1]] for p in range(count)]
        self._news = [np.zeros(some.size, np.bool_) for some in self._boundary]
        self._moved = True
        # the lists are now edges: nobody needs them a second time
        none = np.empty((0, rows.neighbors.shape[1]))
        self.rows = replace(rows, neighbors=none.astype(np.int64), sqdist=none.astype(np.float32))
        self._edges = replace(edges, sqdist=none.astype(np.float32).ravel())
        self._incoming.clear()

    def live(self) -> int:
        """Own samples that are not final yet."""
        return self._partition.live()

    def advance(self) -> int:
        """Make final what can be; returns the rounds that took."""
        self._moved = True
        return self._partition.advance()

    def states_for(self, peer: int, *, everything: bool = False) -> States:
        """States of the samples that `peer` has edges with: those that changed since the last call
        for it, or all of them.
        """
        if self._moved:
            changed = np.zeros(self._edges.nodes, np.bool_)
            changed[self._partition.changed()] = True
            for news, some in zip(self._news, self._boundary, strict=True):
                news |= changed[some]
            self._moved = False
        nodes = self._boundary[peer]
        if not everything:
            nodes = nodes[self._news[peer]]
        self._news[peer][:] = False
        return States(
            ids=self._ids[nodes],
            x=self._partition.x[nodes],
            final=self._partition.final[nodes],
        )

    def hear_states(self, states: States) -> None:
        """States of samples of another partition: late, repeated or out of order."""
        if states.ids.size:
            at = np.searchsorted(self._edges.halo_ids, states.ids)
            nodes = self._edges.halo_node[at].astype(np.int64)
            self._partition.receive(nodes, states.x, states.final)
            self._moved = True

    def snapshot(self) -> supersteps.Snapshot:
        """What `restore` goes back to."""
        return self._partition.snapshot()

    def restore(self, snapshot: supersteps.Snapshot) -> None:
        """Go on from a snapshot; the other partitions must send everything once more."""
        self._partition.restore(snapshot)
        self._moved = True

    def outcome(self) -> Outcome:
        """What was found, for the rows in their order. All must be final."""
        nodes = self._edges.own_node
        by = self._partition.suppressed_by[nodes].astype(np.int64)
        return Outcome(
            forward=self._forward,
            final=self._partition.x[nodes],
            suppressed_by=np.where(by >= 0, self._ids[by], -1),
        )
