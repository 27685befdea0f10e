"""D2 on a finished graph in memory: scores, weights, forward pass, greedy, ranking."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.algorithm.greedy import ranker
from d2filter.algorithm.greedy.schemes import Scheme
from d2filter.algorithm.methods import selectors

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedGraph:
    """The ranking of n samples, in the order of the given rows."""

    forward: I64
    """(n,) score after the forward pass, units of 2⁻⁴⁰"""
    final: I64
    """(n,) score when selected"""
    rank: I64
    """(n,) 0 = first"""
    suppressed_by: I64
    """(n,) row of the strongest suppressor, −1 none"""


def rank_graph(
    hi: uids.U64,
    lo: uids.U64,
    difficulty: F32,
    neighbors: I64,
    sqdist: F32,
    *,
    scheme: Scheme,
    undirected: bool = False,
    is_demoted: Bools | None = None,
) -> RankedGraph:
    """Rank all samples of a graph (docs/method.md#d2-pruning). Nothing is modified.

    hi, lo: (n,) uint64, distinct uids in any order. difficulty: (n,) float32, finite. neighbors:
    (n, k) int64 rows, −1 pads. sqdist: (n, k) float32. undirected: an edge counts in both
    directions, each pair once. is_demoted: (n,) bool, samples that rank after everything else. The
    result does not depend on the order of the rows.
    """
    n = len(neighbors)
    order = uids.ascending(hi, lo)
    position = np.empty_like(order)
    position[order] = np.arange(n)
    # graph ids ascend with uids in each partition, and this is one
    if not (order == np.arange(n)).all():
        neighbors = np.where(neighbors >= 0, position[neighbors], -1)[order]
        sqdist, difficulty, hi, lo = sqdist[order], difficulty[order], hi[order], lo[order]
        is_demoted = None if is_demoted is None else is_demoted[order]
    rows = ranker.PartitionRows(
        hi=hi, lo=lo, difficulty=difficulty, neighbors=neighbors, sqdist=sqdist
    )
    whole = ranker.RankingPartition(rows, np.array([0, n], np.int64), 0, is_demoted)
    whole.start_ranking(scheme, *whole.range(), whole.halo_data(whole.halo()), both_ways=undirected)
    whole.advance()
    found = whole.outcome()
    rank = np.empty(n, np.int64)
    # rows ascend by uid, so a stable sort is (x descending, uid ascending)
    rank[np.argsort(~found.final, kind="stable")] = np.arange(n)
    by = found.suppressed_by
    return RankedGraph(
        forward=found.forward[position],
        final=found.final[position],
        rank=rank[position],
        suppressed_by=np.where(by >= 0, order[by], -1)[position],
    )


def rank_by(
    method: str,
    pool: selectors.Pool,
    *,
    is_demoted: Bools | None = None,
) -> I64:
    """Ranks, (n,) int64, of another method than D2 (`selectors.SELECTORS`), 0 = first.

    is_demoted: (n,) bool, samples that the method does not see and that follow by uid. Raises
    UsageError for an unknown method, or a pool that is too large for it.
    """
    n = len(pool.hi)
    rank = np.empty(n, np.int64)
    if is_demoted is None or not is_demoted.any():
        rank[selectors.order(method, pool)] = np.arange(n)
        return rank
    seen = np.flatnonzero(~is_demoted)
    last = np.setdiff1d(np.arange(n), seen)
    place = np.full(n, -1, np.int64)
    place[seen] = np.arange(seen.size)
    neighbors = pool.neighbors[seen]
    some = replace(
        pool,
        hi=pool.hi[seen],
        lo=pool.lo[seen],
        difficulty=pool.difficulty[seen],
        features=pool.features[seen],
        neighbors=np.where(neighbors >= 0, place[neighbors], -1),
        sqdist=pool.sqdist[seen],
        group=None if pool.group is None else pool.group[seen],
    )
    rank[np.concatenate([seen[selectors.order(method, some)], last])] = np.arange(n)
    return rank
