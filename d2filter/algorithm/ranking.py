"""The whole of D2 over a finished graph: scores → weights → forward pass → greedy → ranking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import greedy, messages, uids

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedGraph:
    """Result for n samples, in the order of the rows given."""

    forward: I64
    """(n,) score after the forward pass, units of 2⁻⁴⁰"""
    final: I64
    """(n,) score when selected"""
    rank: I64
    """(n,) 0 = first"""
    suppressed_by: I64
    """(n,) row of the strongest suppressor, −1 none"""
    rounds: int


def rank_graph(
    hi: uids.U64,
    lo: uids.U64,
    difficulty: F32,
    neighbors: I64,
    sqdist: F32,
    *,
    gamma_forward: float,
    gamma_reverse: float,
) -> RankedGraph:
    """Rank all samples of a graph (DESIGN §3). Nothing is modified.

    hi, lo: (n,) uint64, distinct uids in any order. difficulty: (n,) float32, finite. neighbors:
    (n, k) int64 rows, −1 pads. sqdist: (n, k) float32. The result does not depend on the order of
    the rows.
    """
    n = len(neighbors)
    order = uids.ascending(hi, lo)
    ascending = bool((order == np.arange(n)).all())
    # ties are decided by uid, which the greedy takes to be the row order
    if not ascending:
        position = np.empty_like(order)
        position[order] = np.arange(n)
        neighbors = np.where(neighbors >= 0, position[neighbors], -1)[order]
        sqdist = sqdist[order]
        difficulty = difficulty[order]
    lists = neighbors.astype(np.int32) if n < 2**31 else neighbors
    weights = messages.edge_weights(sqdist, gamma_forward)
    forward = messages.forward_pass(messages.normalized(difficulty), lists, weights)
    if gamma_reverse != gamma_forward:
        weights = messages.edge_weights(sqdist, gamma_reverse)
    chosen = greedy.select_all(forward, lists, weights)
    suppressed_by = chosen.suppressed_by
    if ascending:
        return RankedGraph(
            forward=forward,
            final=chosen.final,
            rank=chosen.rank,
            suppressed_by=suppressed_by,
            rounds=chosen.rounds,
        )
    suppressed_by = np.where(suppressed_by >= 0, order[suppressed_by], -1)
    return RankedGraph(
        forward=forward[position],
        final=chosen.final[position],
        rank=chosen.rank[position],
        suppressed_by=suppressed_by[position],
        rounds=chosen.rounds,
    )
