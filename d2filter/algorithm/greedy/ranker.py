"""The ranking of one partition, from its rows of the graph to its final scores.

    one = RankingPartition(rows, starts, number)
    one.leaving_edges().to(peer)               edges to other partitions, sent once
    one.add_edges(…)                           edges that come from other partitions
    one.halo_data(ids)                         uid and difficulty of own samples, for others' halos
    one.start_ranking(…)                       forward pass
    one.states_for(peer) → receive_states      what changed since the last time …
    one.advance()                              … by superstep, until live() is 0 in all partitions

No method waits or communicates; the caller carries the data between partitions, in a loop or over a
network.

See docs/method.md#ranking-in-partitions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.algorithm.greedy import halo, local_kernel, messages, supersteps
from d2filter.algorithm.greedy.schemes import Scheme

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionRows:
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
    """The states that one partition sends to another in a superstep: s samples."""

    ids: I64
    """(s,) graph ids"""
    x: I64
    final: Bool

    @property
    def nbytes(self) -> int:
        """Bytes on the way: 17 a sample."""
        return self.ids.nbytes + self.x.nbytes + self.final.nbytes


def joined(states: list[States]) -> States:
    """States of several partitions for one other."""
    return States(
        ids=np.concatenate([s.ids for s in states]),
        x=np.concatenate([s.x for s in states]),
        final=np.concatenate([s.final for s in states]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HaloSamples:
    """What a partition must know about its halo, by ascending graph id."""

    ids: I64
    hi: uids.U64
    lo: uids.U64
    difficulty: F32
    is_demoted: Bool
    """which are demoted"""
    reach: F32
    """squared distances to their last neighbors"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The scores of the n rows of a partition, in their order."""

    forward: I64
    """−2⁶² for demoted samples"""
    final: I64
    suppressed_by: I64
    """graph ids, −1 none"""


class RankingPartition:
    """One partition of a ranking."""

    def __init__(
        self,
        rows: PartitionRows,
        starts: I64,
        number: int,
        is_demoted: Bool | None = None,
        reach: F32 | None = None,
    ) -> None:
        """starts: (P + 1,) first graph id of each partition. is_demoted: (n,) which of the rows are
        demoted, see `demoted.py`. reach: (n,) squared distances to the last neighbors, needed if
        `rows` have no lists. `start_ranking` frees the rows.
        """
        self.size = len(rows.hi)
        self.reach = local_kernel.reach(rows.sqdist) if reach is None else reach
        self._is_demoted = np.zeros(self.size, np.bool_) if is_demoted is None else is_demoted
        self._rows: PartitionRows | None = rows
        self._starts = starts
        self._first = int(starts[number])
        self._number = number
        nothing = np.empty(0, np.int64)
        self._incoming: list[tuple[I64, I64, F32]] = [(nothing, nothing, np.empty(0, np.float32))]
        self._halo: I64 | None = None

    def range(self) -> tuple[float, float]:
        """Smallest and largest difficulty of the rows that are not demoted; (inf, −inf) if there
        are none.
        """
        difficulty = self._held().difficulty[~self._is_demoted]
        if not difficulty.size:
            return np.inf, -np.inf
        return float(difficulty.min()), float(difficulty.max())

    def demoted_count(self) -> int:
        """How many of the rows are demoted."""
        return int(self._is_demoted.sum())

    def leaving_edges(self) -> halo.CutEdges:
        """The edges that leave this partition."""
        rows = self._held()
        return halo.cut_edges(self._starts, self._number, rows.neighbors, rows.sqdist)

    def add_edges(self, source: I64, target: I64, sqdist: F32) -> None:
        """Add the cut edges of one other partition that lead here."""
        self._incoming.append((source, target, sqdist))
        self._halo = None

    def halo(self) -> I64:
        """Graph ids, ascending, of all samples elsewhere that this partition has edges with."""
        if self._halo is None:
            sources = np.concatenate([source for source, _, _ in self._incoming])
            self._halo = halo.halo(self._first, self.size, self._held().neighbors, sources)
        return self._halo

    def halo_data(self, ids: I64) -> HaloSamples:
        """Own samples by graph id."""
        at = ids - self._first
        rows = self._held()
        return HaloSamples(
            ids=ids, hi=rows.hi[at], lo=rows.lo[at], difficulty=rows.difficulty[at],
            is_demoted=self._is_demoted[at], reach=self.reach[at],
        )  # fmt: skip

    def start_ranking(
        self,
        scheme: Scheme,
        low: float,
        high: float,
        known: HaloSamples,
        *,
        both_ways: bool = False,
        keep: Callable[[Array], Array] = lambda array: array,
    ) -> None:
        """Forward pass and the first state. low, high: extremes of difficulty in the whole pool;
        known: of `halo()`, raises ValueError for others. keep: returns an equal array for each of
        the large ones that are only read from now on, a map of a file for example.
        """
        rows = self._held()
        if not np.array_equal(known.ids, self.halo()):
            raise ValueError(
                f"partition {self._number} received states of samples that it does not have"
            )
        source, target, sqdist = (np.concatenate(s) for s in zip(*self._incoming, strict=True))
        edges = halo.assemble(
            self._first, (rows.hi, rows.lo), rows.neighbors, rows.sqdist, (source, target, sqdist),
            known.ids, (known.hi, known.lo), both_ways=both_ways,
        )  # fmt: skip
        difficulty = edges.spread(rows.difficulty, known.difficulty)
        is_demoted = edges.spread(self._is_demoted, known.is_demoted)
        if is_demoted.any():
            edges = halo.without(edges, is_demoted)
        if scheme.is_local:
            reach = edges.spread(self.reach, known.reach)
            edges = halo.made_relative(edges, reach, scheme.floor)
            del reach
        # the lists are edges now: what follows needs their memory
        del rows, source, target, sqdist
        self._rows = self._halo = None
        self._incoming.clear()
        scores = messages.normalized(difficulty, low, high)
        weights = scheme.forward_weights(edges.sqdist)
        x = scheme.forward_scores(
            scores, messages.gather(scores, edges.start, edges.target, weights)
        )
        x[is_demoted] = messages.FLOOR
        # of the halo only some of the edges are known here
        x[edges.halo_vertex] = supersteps.UNKNOWN
        if not scheme.one_weight:
            weights = scheme.reverse_weights(edges.sqdist)
        self._forward = keep(x[edges.own_vertex])
        self._own_vertex, self._halo_vertex = keep(edges.own_vertex), keep(edges.halo_vertex)
        self._halo_ids = keep(edges.halo_ids)
        self._boundary = [
            np.searchsorted(edges.own_vertex, vertices).astype(edges.own_vertex.dtype)
            for vertices in halo.boundary(edges, self._starts)
        ]
        own, start, targets = edges.own(), edges.start, edges.target
        del edges, scores, difficulty
        graph = supersteps.make_graph(own, start, targets, weights, both_ways=both_ways)
        del start, targets, weights
        graph = graph._replace(
            **{
                name: keep(getattr(graph, name))
                for name in ("start", "target", "weight", "in_start", "source")
            }
        )
        self._partition = supersteps.Partition(graph, x)
        self._news = [np.zeros(rows.size, np.bool_) for rows in self._boundary]
        self._moved = True

    def live(self) -> int:
        """Own samples that are not final yet."""
        return self._partition.live()

    def advance(self) -> int:
        """Make final what can be; returns how many samples were checked."""
        self._moved = True
        return self._partition.advance()

    def states_for(self, peer: int, *, everything: bool = False) -> States:
        """States of the samples that `peer` has edges with: those that changed since the last call
        for it, or all of them.
        """
        if self._moved:
            changed = np.zeros(self._own_vertex.size + self._halo_vertex.size, np.bool_)
            changed[self._partition.changed()] = True
            for news, rows in zip(self._news, self._boundary, strict=True):
                news |= changed[self._own_vertex[rows]]
            self._moved = False
        rows = self._boundary[peer]
        if not everything:
            rows = rows[self._news[peer]]
        self._news[peer][:] = False
        x, final = self._partition.states(self._own_vertex[rows])
        return States(ids=self._first + rows.astype(np.int64), x=x, final=final)

    def receive_states(self, states: States) -> None:
        """Merge states of another partition. They may be late, repeated or out of order."""
        if states.ids.size:
            vertices = self._halo_vertex[np.searchsorted(self._halo_ids, states.ids)]
            self._partition.receive(vertices, states.x, states.final)
            self._moved = True

    def snapshot(self) -> supersteps.Snapshot:
        """What `restore` goes back to."""
        return self._partition.snapshot()

    def restore(self, snapshot: supersteps.Snapshot) -> None:
        """Go on from a snapshot; the other partitions must send everything once more."""
        self._partition.restore(snapshot)
        self._moved = True

    def outcome(self) -> Outcome:
        """The scores of the rows, in their order. All must be final."""
        final, _ = self._partition.states(self._own_vertex)
        by = self._partition.suppressed_by()[self._own_vertex]
        ids = np.empty(self._own_vertex.size + self._halo_vertex.size, np.int64)
        ids[self._own_vertex] = self._first + np.arange(self.size)
        ids[self._halo_vertex] = self._halo_ids
        return Outcome(
            forward=self._forward, final=final, suppressed_by=np.where(by >= 0, ids[by], -1)
        )

    def _held(self) -> PartitionRows:
        if self._rows is None:
            raise ValueError("the rows were let go when the supersteps began")
        return self._rows
