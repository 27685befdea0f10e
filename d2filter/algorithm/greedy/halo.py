"""Finds the edges between partitions and builds the graph that each partition works on.

Partition p holds the graph ids starts[p] to starts[p + 1] − 1, ascending by uid. An edge is *cut*
if its ends lie in two partitions. The partition of its source sends it to the partition of its
target, once. Each of the two then knows the other end as a halo sample.

A *vertex* is the index of a sample in such a graph (docs/glossary.md: vertex).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, features, threads, uids
from d2filter.algorithm.greedy import local_kernel

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Vertices = npt.NDArray[np.integer]
Array = npt.NDArray[Any]

_BLOCK = 1 << 16  # rows that a thread takes at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class CutEdges:
    """Edges that lead from one partition into others, by partition of the target."""

    start: I64
    """(P + 1,)"""
    source: I64
    """(c,) graph ids"""
    target: I64
    sqdist: F32

    def to(self, peer: int) -> tuple[I64, I64, F32]:
        """Those that lead to one partition: sources, targets, squared distances."""
        some = slice(int(self.start[peer]), int(self.start[peer + 1]))
        return self.source[some], self.target[some], self.sqdist[some]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """The edges with an end in one partition, as CSR over its m vertices, ascending by uid."""

    own_vertex: Vertices
    """(n,) vertex of each own row, ascending"""
    halo_ids: I64
    """(h,) graph ids, ascending, of the samples elsewhere"""
    halo_vertex: Vertices
    """(h,) their vertices"""
    start: Vertices
    """(m + 1,)"""
    target: Vertices
    """(e,) vertices; out-edges of own vertices, and those of halo vertices that lead to own ones"""
    sqdist: F32
    """(e,)"""

    @property
    def vertices(self) -> int:
        """m."""
        return self.start.size - 1

    def own(self) -> Bool:
        """(m,) whether a vertex is a sample of this partition."""
        out = np.ones(self.vertices, np.bool_)
        out[self.halo_vertex] = False
        return out

    def spread(self, own: Array, halo: Array) -> Array:
        """Values of the own rows and of the halo, by vertex."""
        out = np.empty(self.vertices, own.dtype)
        out[self.own_vertex] = own
        out[self.halo_vertex] = halo
        return out


def cut_edges(starts: I64, number: int, neighbors: I64, sqdist: F32) -> CutEdges:
    """The edges of partition `number` that leave it. neighbors, sqdist: (n, k) of its rows."""
    first, end = int(starts[number]), int(starts[number + 1])
    row, column = np.nonzero((neighbors >= 0) & ((neighbors < first) | (neighbors >= end)))
    target = neighbors[row, column]
    peer = np.searchsorted(starts, target, side="right") - 1
    start, order = features.bucketed(peer, len(starts) - 1)
    return CutEdges(
        start=start,
        source=first + row[order],
        target=target[order],
        sqdist=sqdist[row[order], column[order]],
    )


def halo(first: int, rows: int, neighbors: I64, sources: I64) -> I64:
    """Graph ids, ascending, of the samples elsewhere at the other end of an edge.

    neighbors: (n, k) of the own rows; sources: (c,) of the cut edges that came in.
    """
    outside = neighbors[(neighbors < first) | (neighbors >= first + rows)]
    return _distinct(np.concatenate([outside[outside >= 0], sources]))


def assemble(
    first: int,
    own_uids: tuple[uids.U64, uids.U64],
    neighbors: I64,
    sqdist: F32,
    incoming: tuple[I64, I64, F32],
    halo_ids: I64,
    halo_uids: tuple[uids.U64, uids.U64],
    *,
    both_ways: bool = False,
) -> Edges:
    """The edges that a partition works on.

    first: its first graph id; own_uids, neighbors, sqdist: of its n rows, ascending by uid.
    incoming: sources, targets and squared distances of the cut edges that lead here. halo_ids: as
    `halo` gives them, with their uids. both_ways: every edge in both directions, each pair once
    (the paper's graph).
    """
    m = len(neighbors) + halo_ids.size
    source, target, distance = incoming
    if both_ways:
        mine = _flat(first, neighbors, sqdist)
        source, target, distance = _both_ways(
            np.concatenate([mine[0], source]),
            np.concatenate([mine[1], target]),
            np.concatenate([mine[2], distance]),
        )
        neighbors, sqdist = neighbors[:, :0], sqdist[:, :0]
    if not halo_ids.size and not source.size:
        start, inside, distance = as_csr(neighbors, sqdist, first)
        rows = np.arange(m, dtype=start.dtype)
        return Edges(
            own_vertex=rows, halo_ids=halo_ids, halo_vertex=rows[:0], start=start, target=inside,
            sqdist=distance,
        )  # fmt: skip
    kind = np.int32 if max(m, neighbors.size + source.size) < 2**31 else np.int64
    own_vertex = np.empty(m - halo_ids.size, kind)
    halo_vertex = np.empty(halo_ids.size, kind)
    by_uid = uids.ascending(*halo_uids)
    halo_hi, halo_lo = halo_uids[0][by_uid], halo_uids[1][by_uid]
    _number(own_uids[0], own_uids[1], halo_hi, halo_lo, by_uid, own_vertex, halo_vertex)
    start = np.zeros(m + 1, kind)
    shape = (neighbors, sqdist, source, target, distance, first, own_vertex, halo_ids, halo_vertex)
    nothing = np.empty(0, np.float32)
    _fill(*shape, start, nothing.astype(kind), nothing)
    np.cumsum(start, out=start)
    out_target = np.empty(start[-1], kind)
    out_sqdist = np.empty(start[-1], np.float32)
    # the starts move while edges are filled in, and are moved back
    _fill(*shape, start, out_target, out_sqdist)
    start[1:] = start[:-1]
    start[0] = 0
    return Edges(
        own_vertex=own_vertex,
        halo_ids=halo_ids,
        halo_vertex=halo_vertex,
        start=start,
        target=out_target,
        sqdist=out_sqdist,
    )


def as_csr(neighbors: Vertices, values: F32, first: int = 0) -> tuple[Vertices, Vertices, F32]:
    """Lists as they stand as CSR: start (n + 1,), and neighbors, counted from `first`, and values
    without the padding.
    """
    kind = np.int32 if neighbors.size < 2**31 else np.int64
    start = np.zeros(len(neighbors) + 1, kind)

    def count(some: slice) -> None:
        (neighbors[some] >= 0).sum(axis=1, out=start[some.start + 1 : some.stop + 1])

    threads.in_blocks(count, len(neighbors), _BLOCK)
    np.cumsum(start, out=start)
    target, value = np.empty(start[-1], kind), np.empty(start[-1], np.float32)

    def fill(some: slice) -> None:
        there = neighbors[some] >= 0
        edges = slice(start[some.start], start[some.stop])
        target[edges] = neighbors[some][there] - first
        value[edges] = values[some][there]

    threads.in_blocks(fill, len(neighbors), _BLOCK)
    return start, target, value


def without(edges: Edges, is_demoted: Bool) -> Edges:
    """The same without the edges that have an end in `is_demoted`, (m,) by vertex."""
    start = np.zeros_like(edges.start)
    target, sqdist = np.empty_like(edges.target), np.empty_like(edges.sqdist)
    left = _keep_others(edges.start, edges.target, edges.sqdist, is_demoted, start, target, sqdist)
    # copies: views would hold the memory of those that are gone
    return replace(edges, start=start, target=target[:left].copy(), sqdist=sqdist[:left].copy())


def made_relative(edges: Edges, reach: F32, floor: float) -> Edges:
    """The same with `local_kernel.relative` in place of distances. reach: (m,) by vertex."""
    made = np.empty_like(edges.sqdist)

    def scale(some: slice) -> None:
        inside = slice(int(edges.start[some.start]), int(edges.start[some.stop]))
        degrees = np.diff(edges.start[some.start : some.stop + 1])
        source = np.repeat(reach[some], degrees)
        made[inside] = local_kernel.relative(
            edges.sqdist[inside], source, reach[edges.target[inside]], floor
        )

    threads.in_blocks(scale, edges.vertices, _BLOCK)
    return replace(edges, sqdist=made)


def whole(neighbors: I64, sqdist: F32, *, both_ways: bool) -> tuple[I64, I64, F32]:
    """All edges of a graph in one piece, sorted by source: sources, targets, squared distances."""
    edges = _flat(0, neighbors, sqdist)
    if not both_ways:
        return edges
    source, target, distance = _both_ways(*edges)
    order = np.argsort(source, kind="stable")
    return source[order], target[order], distance[order]


def boundary(edges: Edges, starts: I64) -> list[I64]:
    """Own vertices, ascending, whose states each partition needs: (P,) lists."""
    if not edges.halo_ids.size:
        return [np.empty(0, np.int64)] * (len(starts) - 1)
    own = edges.own()
    peer_of = np.zeros(edges.vertices, np.int32)
    peer_of[edges.halo_vertex] = np.searchsorted(starts, edges.halo_ids, side="right") - 1
    peer, inside = _crossing(own, edges.start, edges.target, peer_of)
    start, order = features.bucketed(peer, len(starts) - 1)
    return [_distinct(inside[order[a:b]]) for a, b in itertools.pairwise(start)]


def _distinct(values: I64) -> I64:
    """Each value once, ascending; np.unique hashes, which takes several times as long."""
    ordered = np.sort(values)
    new = np.ones(ordered.size, np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new]


def _flat(first: int, neighbors: I64, sqdist: F32) -> tuple[I64, I64, F32]:
    """Lists as edges, by row: sources, targets, squared distances."""
    row, column = np.nonzero(neighbors >= 0)
    return first + row, neighbors[row, column], sqdist[row, column]


def _both_ways(source: I64, target: I64, distance: F32) -> tuple[I64, I64, F32]:
    """All edges in both directions, each pair once."""
    low, high = np.minimum(source, target), np.maximum(source, target)
    # should two distances of a pair ever differ, every partition takes the smaller one
    order = np.lexsort((distance, high, low))
    low, high, distance = low[order], high[order], distance[order]
    new = np.ones(low.size, np.bool_)
    new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    low, high, distance = low[new], high[new], distance[new]
    return (
        np.concatenate([low, high]),
        np.concatenate([high, low]),
        np.concatenate([distance, distance]),
    )


@compiled.njit()
def _number(own_hi, own_lo, halo_hi, halo_lo, halo_row, own_vertex, halo_vertex):  # type: ignore[no-untyped-def]
    """Merge two lists of ascending uids: the vertex of each."""
    a, b = 0, 0
    for vertex in range(own_hi.size + halo_hi.size):
        take_own = b == halo_hi.size or (
            a < own_hi.size
            and (own_hi[a] < halo_hi[b] or (own_hi[a] == halo_hi[b] and own_lo[a] < halo_lo[b]))
        )
        if take_own:
            own_vertex[a] = vertex
            a += 1
        else:
            halo_vertex[halo_row[b]] = vertex
            b += 1


@compiled.njit(inline="always")
def _vertex(sample, first, own_vertex, halo_ids, halo_vertex):  # type: ignore[no-untyped-def]
    """Vertex of a graph id."""
    if first <= sample < first + own_vertex.size:
        return own_vertex[sample - first]
    return halo_vertex[np.searchsorted(halo_ids, sample)]


@compiled.njit()
def _fill(  # type: ignore[no-untyped-def]  # compiled by numba
    neighbors, sqdist, source, target, distance, first, own_vertex, halo_ids, halo_vertex, start,
    out_target, out_sqdist,
):  # fmt: skip
    """Count out-edges into start[1:], or write them from start[vertex] on, which moves it."""
    counting = out_target.size == 0
    for i in range(neighbors.shape[0]):
        vertex = own_vertex[i]
        at = np.int64(start[vertex])
        there = 0
        for c in range(neighbors.shape[1]):
            j = neighbors[i, c]
            if j < 0:
                continue
            if not counting:
                out_target[at + there] = _vertex(j, first, own_vertex, halo_ids, halo_vertex)
                out_sqdist[at + there] = sqdist[i, c]
            there += 1
        if counting:
            start[vertex + 1] += there
        else:
            start[vertex] = at + there
    for e in range(source.size):
        vertex = _vertex(source[e], first, own_vertex, halo_ids, halo_vertex)
        if counting:
            start[vertex + 1] += 1
            continue
        at = start[vertex]
        out_target[at] = _vertex(target[e], first, own_vertex, halo_ids, halo_vertex)
        out_sqdist[at] = distance[e]
        start[vertex] = at + 1


@compiled.njit()
def _keep_others(start, target, sqdist, is_demoted, out_start, out_target, out_sqdist):  # type: ignore[no-untyped-def]
    left = 0
    for vertex in range(is_demoted.size):
        if not is_demoted[vertex]:
            for e in range(start[vertex], start[vertex + 1]):
                if not is_demoted[target[e]]:
                    out_target[left] = target[e]
                    out_sqdist[left] = sqdist[e]
                    left += 1
        out_start[vertex + 1] = left
    return left


@compiled.njit()
def _crossing(own, start, target, peer_of):  # type: ignore[no-untyped-def]  # compiled by numba
    """(partition, own vertex) for each edge that crosses."""
    count = 0
    for vertex in range(own.size):
        for e in range(start[vertex], start[vertex + 1]):
            if own[vertex] != own[target[e]]:
                count += 1
    peer = np.empty(count, np.int32)
    inside = np.empty(count, np.int64)
    count = 0
    for vertex in range(own.size):
        for e in range(start[vertex], start[vertex + 1]):
            if own[vertex] != own[target[e]]:
                outside = target[e] if own[vertex] else vertex
                peer[count] = peer_of[outside]
                inside[count] = vertex if own[vertex] else target[e]
                count += 1
    return peer, inside
