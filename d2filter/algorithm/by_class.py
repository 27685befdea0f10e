"""Classes: builds a graph inside each class, and ranks so that budgets have a share of each class.

See paper §3.2 and docs/method.md#classes.
"""

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

COMPARED_TOGETHER = 128  # classes of up to so many rows are compared together, others one by one
PAIRS = 1 << 22  # pairs of rows that are compared at a time
_BEHIND = 2**62  # larger than all places: integers, or the bits of a float below 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """How the graph of one class was searched."""

    size: int
    recall: knn.Recall
    nlist: int
    nprobe: int


def phases(sizes: I64) -> F64:
    """The phase of each class, (classes,) float64 in (0, 1): the offset at which it takes samples,
    see `turns`.

    sizes: (classes,) rows of each class in the whole pool. G classes of equal size have the phases
    (i + ψ)/G, in the order of a hash of their numbers. So the number of them that have taken their
    next sample is in proportion to the budget. ψ differs between sizes and is spread over (0, 1),
    so that classes of different sizes do not round up together either.
    """
    count = sizes.size
    numbers = np.arange(count, dtype=np.uint64)
    hashed = uids.hashed(numbers, np.zeros(count, np.uint64), salt=uids.SALT_CLASS)
    order = np.lexsort((hashed, sizes))
    new = np.ones(count, np.bool_)
    new[1:] = sizes[order[1:]] != sizes[order[:-1]]
    alike = np.diff(np.append(np.flatnonzero(new), count))
    turn = np.repeat(np.arange(1, alike.size + 1, dtype=np.uint64), alike)
    # fractional parts of n(n + 1)/2 golden ratios: they never align with the sizes
    golden = (turn * (turn + np.uint64(1)) // np.uint64(2)) * np.uint64(0x9E3779B97F4A7C15)
    spread = ((golden >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
    out = np.empty(count)
    out[order] = (features.inside_runs(alike) + spread) / np.repeat(alike, alike)
    return out


def turns(order: I64, group: I64, is_demoted: Bools, budgets: str, phase: F64) -> I64:
    """Sort keys that mix the classes, (n,) int64: larger goes sooner, equal keys by ascending uid.

    order: (n,) int64, rows of whole classes, best first. group: (n,) int64 class of each row.
    is_demoted: (n,) bool, rows that go after all others. phase: (classes,), see `phases`.

    budgets: `proportional` takes the r-th of n_g samples of a class when the share (r + φ_g)/n_g of
    the pool is taken; φ_g is the phase of the class. At every share t, the number taken from a
    class differs from t·n_g by less than one, and so does the number taken from all classes of one
    size together, however small they are. `uniform` takes one sample from each class in turn, until
    the class is exhausted. Raises ValueError for other values.
    """
    if budgets not in BUDGETS:
        raise ValueError(f"budgets is {budgets!r}, allowed are {', '.join(BUDGETS)}")
    # stable: the order inside a class stays
    sorted_by = np.lexsort((group[order], is_demoted[order]))
    rows = order[sorted_by]
    new = np.ones(rows.size, np.bool_)
    new[1:] = (group[rows[1:]] != group[rows[:-1]]) | (
        is_demoted[rows[1:]] != is_demoted[rows[:-1]]
    )
    begins = np.flatnonzero(new)
    sizes = np.diff(np.append(begins, rows.size))
    place = features.inside_runs(sizes)
    if budgets == "proportional":
        # positive floats have the order of their bits
        place = ((place + phase[group[rows]]) / np.repeat(sizes, sizes)).view(np.int64)
    out = np.empty(rows.size, np.int64)
    out[rows] = -place
    out[is_demoted] -= _BEHIND
    return out


def interleaved(rank: I64, group: I64, is_demoted: Bools, budgets: str) -> I64:
    """Ranks, (n,) int64, in which every prefix contains the share of each class, see `turns`.

    rank: (n,) int64, a permutation, 0 = first, of rows in ascending order of uid. group: (n,) class
    number of each row.
    """
    order = np.argsort(rank)
    out = np.empty(rank.size, np.int64)
    sooner = turns(order, group, is_demoted, budgets, phases(np.bincount(group)))
    # ~x is in the reverse order of x, without overflow
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
    """The k nearest neighbors in the same class for every sample, and how each class was searched.

    rows: (n, d) features, ascending by uid. group: (n,) classes. Lists of classes with k or fewer
    samples are padded.
    """
    neighbors = np.full((len(hi), k), -1, np.int64)
    sqdist = np.full((len(hi), k), np.inf, np.float32)
    names, number = np.unique(group, return_inverse=True)
    start, by_class = features.bucketed(number, names.size)
    sizes = np.diff(start)
    # thousands of builds of small classes would take longer than computing all their distances
    for some in _batches(np.flatnonzero(sizes <= COMPARED_TOGETHER), sizes):
        mine = np.concatenate([by_class[start[c] : start[c + 1]] for c in some.tolist()])
        found = _in_small_classes(rows[mine], sizes[some], k)
        neighbors[mine] = np.where(found.neighbors >= 0, mine[found.neighbors], -1)
        sqdist[mine] = found.sqdist
    classes = []
    for c, size in enumerate(sizes.tolist()):
        if size <= COMPARED_TOGETHER:
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
    """Batches of small classes of similar size; the distances of a batch fit into memory."""
    small = small[np.argsort(sizes[small], kind="stable")]
    pairs = np.cumsum(sizes[small] ** 2)
    which = pairs // PAIRS
    for begin, end in itertools.pairwise([0, *(np.flatnonzero(np.diff(which)) + 1), small.size]):
        if begin < end:
            yield small[begin:end]


def _in_small_classes(rows: features.F16, sizes: I64, k: int) -> knn.Graph:
    """Exact lists (n, k) within classes. The rows of a class are adjacent and ascend by uid."""
    size = np.repeat(sizes, sizes)
    begin = np.repeat(np.cumsum(sizes) - sizes, sizes)
    own = features.inside_runs(sizes)
    # others in ring order, because the stable sort keeps it at equal distances
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
