"""Samples that rank after everything else: the hardest ones, and copies of a better one.

They keep their place in the files and in the counts, but no message passes through them: their
edges weigh nothing, and their score is the lowest there is.
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
    """floor(share · n), exactly: of n samples, as many may be cut."""
    return 0 if share == 0 else budget.floor_of(share, n)


def hardest_above(difficulty: F32, share: Decimal) -> float:
    """The difficulty above which samples are cut: that of the best one that stays when
    floor(share · n) are taken away, highest first (CCS's mislabel cut, Zheng et al. 2022). Those
    that tie with it stay, so that no sample is cut for its uid.
    """
    n = difficulty.size
    return quantile.smallest(difficulty, n - 1 - cut_size(n, share))


def hardest(difficulty: F32, share: Decimal) -> Bools:
    """Which samples are cut, (n,) bool."""
    if not cut_size(difficulty.size, share):
        return np.zeros(difficulty.size, np.bool_)
    above: Bools = difficulty > np.float32(hardest_above(difficulty, share))
    return above


def components(source: I64, target: I64) -> tuple[I64, I64]:
    """Connected components of a graph given by its edges (e,), in either direction.

    Returns the distinct ids at their ends, ascending (m,), and for each the position of the
    smallest id of its component (m,).
    """
    ids, ends = np.unique(np.concatenate([source, target]), return_inverse=True)
    parent = np.arange(ids.size)
    _unite(parent, ends[: source.size], ends[source.size :])
    return ids, parent


def copies(source: I64, target: I64, difficulty: F32, hi: uids.U64, lo: uids.U64) -> I64:
    """Ids, ascending, of the samples that a better copy stands for.

    source, target: (e,) edges between near-identical samples, as ids. difficulty, hi, lo: of the m
    distinct ids at their ends, ascending by id. In each component the highest difficulty stays,
    ties to the smaller uid.
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
    """Which samples of a pool in one piece rank last, (n,) bool.

    neighbors: (n, k) rows, −1 pads. sqdist: (n, k). cut_hardest: share in [0, 1) that is taken away
    first, highest difficulty first. collapse_copies: edges of at most this squared distance make
    copies; None: there are none.
    """
    late = hardest(difficulty, cut_hardest)
    if collapse_copies is not None:
        source, target = near(neighbors, sqdist, collapse_copies)
        both = ~late[source] & ~late[target]
        source, target = source[both], target[both]
        members = np.unique(np.concatenate([source, target]))
        late[copies(source, target, difficulty[members], hi[members], lo[members])] = True
    return late


def near(neighbors: I64, sqdist: F32, most: float) -> tuple[I64, I64]:
    """Row and neighbor of each entry of the lists whose squared distance is at most `most`."""
    row, column = np.nonzero((neighbors >= 0) & (sqdist <= np.float32(most)))
    return row, neighbors[row, column]


def apart(sqdist: F32) -> F32:
    """The squared distances that `unit` is the median of: those above 0, without padding, flat."""
    there: F32 = sqdist[(sqdist > 0) & np.isfinite(sqdist)]
    return there


def unit(sqdist: F32) -> float:
    """Median (the lower one) of the squared distances between distinct neighbors, (n, k) float32;
    1 where there are none. A gamma in this unit means the same for any encoder.
    """
    values = apart(sqdist)
    return quantile.smallest(values, (values.size - 1) // 2) if values.size else 1.0


@compiled.njit()
def _unite(parent, a, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """Union–find with halved paths; the smaller position is the root of its component."""
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
