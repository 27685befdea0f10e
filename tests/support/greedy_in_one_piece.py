"""The exact parallel greedy on a graph in memory, for tests.

Sequential definition: take the unselected sample with the best key (x descending, uid ascending);
for each out-neighbor j still unselected, x_j ← x_j − rint(w_ij·x_i); repeat.

Rule used here: an unselected sample is final if its key beats the keys of all its unselected
neighbors, over both out-edges and in-edges. Scores only fall, so its x cannot change any more, and
sorting by final key gives the sequential order.

This module runs the rule on the whole pool in one partition; `supersteps` runs it in several.

See docs/method.md#parallel-rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm.greedy import halo, supersteps

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Result of `select_all` for n samples."""

    final: I64
    """(n,) score when selected, units of 2⁻⁴⁰"""
    rank: I64
    """(n,) position in the selection, 0 = first"""
    suppressed_by: I64
    """(n,) row that sent the largest message > 0, ties to the smaller row; −1 none"""


def select_all(
    forward: I64, neighbors: npt.NDArray[np.integer], weights: npt.NDArray[np.float32]
) -> Selection:
    """Rank a whole pool. Rows must be in ascending order of uid: ties go to the smaller row.

    forward: (n,) int64 in [−2⁶², 2⁶²), the scores after the forward pass. neighbors: (n, k) int32
    or int64 row numbers, −1 pads, no row its own neighbor. weights: (n, k) float32 in [0, 1], of
    the reverse pass. Nothing is modified.

    A message is rint(float64(w)·float64(x_i)), and 0 when x_i ≤ 0: the formula as printed would
    *raise* the neighbors of a negative sample. Subtraction saturates at −2⁶².
    """
    start, target, weight = halo.as_csr(neighbors, weights)
    graph = supersteps.make_graph(np.ones(len(forward), np.bool_), start, target, weight)
    partition = supersteps.Partition(graph, forward)
    partition.advance()
    # rows ascend by uid, so a stable sort is (x descending, uid ascending)
    order = np.argsort(-partition.x, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return Selection(
        final=partition.x,
        rank=rank,
        suppressed_by=partition.suppressed_by().astype(np.int64),
    )
