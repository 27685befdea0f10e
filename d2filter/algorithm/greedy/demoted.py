"""Finds demoted samples, which rank after all others: the hardest, and near-copies of a better one.

They stay in the files and in the counts, but send and receive no messages: their edges have weight
0, and their score is the lowest possible.

See docs/method.md#demoted-samples.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import budget, compiled, quantile, uids

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def cut_size(n: int, share: Decimal) -> int:
    """floor(share · n), exactly: the largest number of n samples that may be cut as hardest."""
    return 0 if share == 0 else budget.floor_of(share, n)


def hardest_above(difficulty: F32, share: Decimal) -> float:
    """The difficulty above which samples are cut (CCS's mislabel cut, Zheng et al. 2022).

    It is the highest difficulty that is left without the floor(share · n) highest ones. Samples
    with exactly this difficulty stay, so that no sample is cut for its uid.
    """
    n = difficulty.size
    return quantile.smallest(difficulty, n - 1 - cut_size(n, share))


def hardest(difficulty: F32, share: Decimal) -> Bools:
    """Which samples are cut as hardest, (n,) bool."""
    if not cut_size(difficulty.size, share):
        return np.zeros(difficulty.size, np.bool_)
    above: Bools = difficulty > np.float32(hardest_above(difficulty, share))
    return above


def components(source: I64, target: I64) -> tuple[I64, I64]:
    """Connected components of a graph given by its edges (e,), in either direction.

    Returns the distinct ids at the ends of edges, ascending (m,), and for each the position of the
    smallest id of its component (m,).
    """
    ids, ends = np.unique(np.concatenate([source, target]), return_inverse=True)
    parent = np.arange(ids.size)
    _unite(parent, ends[: source.size], ends[source.size :])
    return ids, parent


def copies(source: I64, target: I64, difficulty: F32, hi: uids.U64, lo: uids.U64) -> I64:
    """Ids, ascending, of the near-copies to demote: all samples of a component but the best.

    source, target: (e,) edges between near-copies, as ids. difficulty, hi, lo: of the m distinct
    ids at their ends, ascending by id. The best sample has the highest difficulty; ties go to the
    smaller uid.
    """
    ids, root = components(source, target)
    order = np.lexsort((lo, hi, -difficulty.astype(np.float64), root))
    first = np.ones(order.size, np.bool_)
    first[1:] = root[order[1:]] != root[order[:-1]]
    return ids[np.sort(order[~first])]


def mask(
    difficulty: F32,
    hi: uids.U64,
    lo: uids.U64,
    neighbors: I64,
    sqdist: F32,
    *,
    cut_hardest: Decimal = Decimal(0),
    collapse_copies: float | None = None,
) -> Bools:
    """Which samples of a pool in memory are demoted, (n,) bool.

    neighbors: (n, k) rows, −1 pads. sqdist: (n, k). cut_hardest: share in [0, 1) that is cut first,
    highest difficulty first. collapse_copies: neighbors up to this squared distance are
    near-copies; None: no near-copies are demoted.
    """
    is_demoted = hardest(difficulty, cut_hardest)
    if collapse_copies is not None:
        source, target = near(neighbors, sqdist, collapse_copies)
        both = ~is_demoted[source] & ~is_demoted[target]
        source, target = source[both], target[both]
        members = np.unique(np.concatenate([source, target]))
        is_demoted[copies(source, target, difficulty[members], hi[members], lo[members])] = True
    return is_demoted


def near(neighbors: I64, sqdist: F32, most: float) -> tuple[I64, I64]:
    """Row and neighbor of each list entry whose squared distance is at most `most`, (e,) each."""
    row, column = np.nonzero((neighbors >= 0) & (sqdist <= np.float32(most)))
    return row, neighbors[row, column]


def apart(sqdist: F32) -> F32:
    """The squared distances above 0, without padding, flat. Their median is the `unit`."""
    there: F32 = sqdist[(sqdist > 0) & np.isfinite(sqdist)]
    return there


def unit(sqdist: F32) -> float:
    """Median (the lower one) of the squared distances above 0; 1 if there are none.

    A gamma in this unit means the same for any encoder. sqdist: (n, k) float32.
    """
    values = apart(sqdist)
    return quantile.smallest(values, (values.size - 1) // 2) if values.size else 1.0


@compiled.njit()
def _unite(parent, a, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """Union–find with path halving; the smallest position is the root of its component."""
    for e in range(a.size):
        i, j = a[e], b[e]
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        while parent[j] != j:
            parent[j] = parent[parent[j]]
            j = parent[j]
        if i < j:
            parent[j] = i
        else:
            parent[i] = j
    for i in range(parent.size):
        parent[i] = parent[parent[i]]
