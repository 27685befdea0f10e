"""Classes: edges inside of each, and budgets that every class gets its share of (paper §3.2)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features, uids
from d2filter.algorithm.knn import in_memory as knn

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BUDGETS = ("proportional", "uniform")

_COMPARED_TOGETHER = 128  # rows of a class, at most: larger ones are searched by a build each
_PAIRS = 1 << 22  # of rows that are compared at a time
_BEHIND = 2**62  # places are below: as integers, or as the bits of a number below 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """The graph of one class."""

    size: int
    recall: knn.Recall
    nlist: int
    nprobe: int


def phases(sizes: I64) -> F64:
    """Where in its share of a budget each class takes a sample, (classes,) float64 in (0, 1).

    sizes: (classes,) rows of each class of the whole pool. G classes of one size have the phases
    (i + ψ)/G, in the order of a hash of their numbers, so that as many of them have taken their
    next sample as the budget's fraction says. ψ of each size is spread over (0, 1), so that sizes
    do not round up together either.
    """
    count = sizes.size
    numbers = np.arange(count, dtype=np.uint64)
    hashed = uids.hashed(numbers, np.zeros(count, np.uint64), salt=uids.SALT_CLASS)
    order = np.lexsort((hashed, sizes))
    new = np.ones(count, np.bool_)
    new[1:] = sizes[order[1:]] != sizes[order[:-1]]
    alike = np.diff(np.append(np.flatnonzero(new), count))
    turn = np.repeat(np.arange(1, alike.size + 1, dtype=np.uint64), alike)
    # fractions of n(n + 1)/2 golden ratios: no multiple of them keeps step with the sizes
    golden = (turn * (turn + np.uint64(1)) // np.uint64(2)) * np.uint64(0x9E3779B97F4A7C15)
    spread = ((golden >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
    out = np.empty(count)
    out[order] = (features.inside_runs(alike) + spread) / np.repeat(alike, alike)
    return out


def turns(order: I64, group: I64, late: Bools, budgets: str, phase: F64) -> I64:
    """When each sample's turn comes, (n,) int64, the larger the sooner; equals by ascending uid.

    order: (n,) int64, rows of whole classes, best first. group: (n,) int64 class of each row. late:
    (n,) bool, rows that stay behind all others. budgets: `proportional` takes the r-th of n_g
    samples of a class when the share (r + φ_g)/n_g of all is taken, φ_g its phase: at every share t
    it has taken less than one sample more or less than t·n_g, and classes of one size, however
    small, have together less than one more or less than their share. `uniform` takes from each in
    turn, until it has no more. phase: (classes,) `phases`. Raises ValueError for other words.
    """
    if budgets not in BUDGETS:
        raise ValueError(f"budgets is {budgets!r}, allowed are {', '.join(BUDGETS)}")
    # stable: inside a class the order stays
    sorted_by = np.lexsort((group[order], late[order]))
    rows = order[sorted_by]
    new = np.ones(rows.size, np.bool_)
    new[1:] = (group[rows[1:]] != group[rows[:-1]]) | (late[rows[1:]] != late[rows[:-1]])
    begins = np.flatnonzero(new)
    sizes = np.diff(np.append(begins, rows.size))
    place = features.inside_runs(sizes)
    if budgets == "proportional":
        # positive floats and their bits have one order
        place = ((place + phase[group[rows]]) / np.repeat(sizes, sizes)).view(np.int64)
    out = np.empty(rows.size, np.int64)
    out[rows] = -place
    out[late] -= _BEHIND
    return out


def interleaved(rank: I64, group: I64, late: Bools, budgets: str) -> I64:
    """Ranks, (n,) int64, whose every prefix gives each class its share: `turns` of a ranking.

    rank: (n,) int64, a permutation, 0 = first, of rows in ascending order of uid. group: (n,) the
    number of each row's class.
    """
    order = np.argsort(rank)
    out = np.empty(rank.size, np.int64)
    sooner = turns(order, group, late, budgets, phases(np.bincount(group)))
    # ~x ascends as x descends
    out[np.argsort(~sooner, kind="stable")] = np.arange(rank.size)
    return out


def graph(
    rows: features.F16,
    hi: uids.U64,
    lo: uids.U64,
    group: I64,
    k: int,
    *,
    target_recall: float = 0.95,
    exact_below: int = 16384,
    seed: int = 0,
) -> tuple[knn.Graph, list[Searched]]:
    """The k nearest of the same class for every sample, and how each class was searched.

    rows: (n, d) features, ascending by uid. group: (n,) classes. Smaller classes have padded lists.
    """
    neighbors = np.full((len(hi), k), -1, np.int64)
    sqdist = np.full((len(hi), k), np.inf, np.float32)
    names, number = np.unique(group, return_inverse=True)
    start, by_class = features.bucketed(number, names.size)
    sizes = np.diff(start)
    # a build for each of thousands of small classes would take longer than their distances
    for some in _batches(np.flatnonzero(sizes <= _COMPARED_TOGETHER), sizes):
        mine = np.concatenate([by_class[start[c] : start[c + 1]] for c in some.tolist()])
        found = _in_small_classes(rows[mine], sizes[some], k)
        neighbors[mine] = np.where(found.neighbors >= 0, mine[found.neighbors], -1)
        sqdist[mine] = found.sqdist
    classes = []
    for c, size in enumerate(sizes.tolist()):
        if size <= _COMPARED_TOGETHER:
            recall = knn.Recall(value=1.0, low=1.0, high=1.0, queries=size)
            classes.append(Searched(size=size, recall=recall, nlist=1, nprobe=1))
            continue
        mine = by_class[start[c] : start[c + 1]]
        pool = knn.make_pool(rows[mine], hi[mine], lo[mine])
        found, index = knn.build(
            pool, k, target_recall=target_recall, exact_below=exact_below, seed=seed
        )
        neighbors[mine] = np.where(found.neighbors >= 0, mine[found.neighbors], -1)
        sqdist[mine] = found.sqdist
        classes.append(
            Searched(
                size=mine.size,
                recall=knn.measure_recall(pool, found, seed=seed),
                nlist=index.trained.cells.count,
                nprobe=index.choice.probes,
            )
        )
    return knn.Graph(neighbors=neighbors, sqdist=sqdist), classes


def _batches(small: I64, sizes: I64) -> Iterator[I64]:
    """Small classes, alike in size, so many at a time that their distances stay within memory."""
    small = small[np.argsort(sizes[small], kind="stable")]
    pairs = np.cumsum(sizes[small] ** 2)
    which = pairs // _PAIRS
    for begin, end in itertools.pairwise([0, *(np.flatnonzero(np.diff(which)) + 1), small.size]):
        if begin < end:
            yield small[begin:end]


def _in_small_classes(rows: features.F16, sizes: I64, k: int) -> knn.Graph:
    """Exact lists (n, k) within classes that lie one after the other, each ascending by uid."""
    size = np.repeat(sizes, sizes)
    begin = np.repeat(np.cumsum(sizes) - sizes, sizes)
    own = features.inside_runs(sizes)
    # others in the order of the ring, which is that of equal distances
    step = np.arange(1, int(sizes.max(initial=1)))
    others = begin[:, None] + (own[:, None] + step) % size[:, None]
    others[step >= size[:, None]] = -1
    far = features.sqdist_pairs(rows, others)
    nearest = np.argsort(far, axis=1, kind="stable")[:, :k]
    neighbors = np.full((len(rows), k), -1, np.int64)
    sqdist = np.full((len(rows), k), np.inf, np.float32)
    width = nearest.shape[1]
    neighbors[:, :width] = np.take_along_axis(others, nearest, axis=1)
    sqdist[:, :width] = np.take_along_axis(far, nearest, axis=1)
    return knn.Graph(neighbors=neighbors, sqdist=sqdist)
