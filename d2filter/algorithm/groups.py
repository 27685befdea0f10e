"""Classes: edges inside of each, and budgets that every class gets its share of (paper §3.2)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features, knn, uids

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BUDGETS = ("proportional", "uniform")

_BEHIND = 2**62  # places are below: as integers, or as the bits of a number below 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """The graph of one class."""

    size: int
    recall: knn.Recall
    nlist: int
    nprobe: int


def turns(order: I64, group: I64, late: Bools, budgets: str) -> I64:
    """When each sample's turn comes, (n,) int64, the larger the sooner; equals by ascending uid.

    order: (n,) int64, rows of whole classes, best first. group: (n,) int64 class of each row. late:
    (n,) bool, rows that stay behind all others. budgets: `proportional` takes the r-th of n_g
    samples of a class when (r + ½)/n_g of all are taken, so that a budget of B samples holds
    B·n_g/n of each class, up to rounding; `uniform` takes from each in turn, until it has no more.
    Raises ValueError for other words.
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
        place = ((place + 0.5) / np.repeat(sizes, sizes)).view(np.int64)
    out = np.empty(rows.size, np.int64)
    out[rows] = -place
    out[late] -= _BEHIND
    return out


def interleaved(rank: I64, group: I64, late: Bools, budgets: str) -> I64:
    """Ranks, (n,) int64, whose every prefix gives each class its share: `turns` of a ranking.

    rank: (n,) int64, a permutation, 0 = first, of rows in ascending order of uid.
    """
    order = np.argsort(rank)
    out = np.empty(rank.size, np.int64)
    # ~x ascends as x descends
    out[np.argsort(~turns(order, group, late, budgets), kind="stable")] = np.arange(rank.size)
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
    classes = []
    names, number = np.unique(group, return_inverse=True)
    start, by_class = features.bucketed(number, names.size)
    for begin, end in itertools.pairwise(start):
        mine = by_class[begin:end]
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
