"""The table of ranking methods with which D2 is compared.

A method is a function of a `Pool` that returns all its rows in order, (n,) int64, best first: every
budget is a prefix. Ties go to the smaller row, which has the smaller uid; random choices are hashes
of the uid. `SELECTORS` lists the methods; `order` runs one by name.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import budget, features, uids
from d2filter.algorithm.methods import baselines, density, geometric, submodular
from d2filter.algorithm.methods.pool import Pool, Selector, ascending
from d2filter.errors import UsageError

I64 = npt.NDArray[np.int64]

__all__ = ["OPTIONS", "SELECTORS", "Pool", "Selector", "ccs", "check_size", "options", "order"]


def order(name: str, pool: Pool) -> I64:
    """Rank a pool by a method: row numbers, shape (n,) int64, best first.

    Raises UsageError for a name that is not in `SELECTORS`, for a pool larger than the method's
    `most`, and for a pool without features if the method needs them.
    """
    if name not in SELECTORS:
        raise UsageError(f"selector is {name!r}, allowed are {', '.join(SELECTORS)}")
    chosen = SELECTORS[name]
    check_size(name, len(pool.hi))
    if "features" in chosen.wants and pool.features.shape[1] == 0:
        raise UsageError(f"selector {name} needs features and the pool has none: pass them")
    return chosen.rank(pool)


def check_size(name: str, n: int) -> None:
    """Raise UsageError, which names an alternative, if a pool is too large for a method."""
    chosen = SELECTORS[name]
    if n > chosen.most:
        raise UsageError(
            f"selector {name} is practical up to {chosen.most:,} samples and the pool has {n:,}: "
            f"use {chosen.instead}"
        )


def ccs(pool: Pool, *, cut: float = 0.0, strata: int = 50) -> I64:
    """Coverage-centric selection (Zheng et al. 2022) as one nested ranking.

    The floor(cut·n) samples of highest difficulty are set aside. The others are divided into
    `strata` intervals of difficulty of equal width. A sample's place is its position in its
    stratum, in the order of a hash. The ranking is by (place, hash); the samples set aside follow,
    least difficult first.

    The published allocation of a budget B goes through the strata from the smallest to the largest;
    each takes min(size, ⌊left / strata left⌋) samples at random. In the prefix of length B of this
    ranking each stratum has min(size, q) or min(size, q + 1) samples, with the same integer q, so
    its count differs from the published one by at most 1.

    Raises UsageError for a cut outside [0, 1) and for less than one stratum.
    """
    if not 0 <= cut < 1:
        raise UsageError(f"cut is {cut}, allowed is 0 up to but not 1: 0.3 cuts the hardest 30%")
    if strata < 1:
        raise UsageError(f"strata is {strata}, allowed is 1 or more: the published number is 50")
    hardest_first = baselines.by_score(pool.difficulty, pool.hi, pool.lo)
    aside = hardest_first[: budget.floor_of(Decimal(str(cut)), len(hardest_first))]
    rows = np.sort(hardest_first[aside.size :])
    s = pool.difficulty[rows].astype(np.float64)
    low, width = s.min(), s.max() - s.min()
    stratum = np.zeros(rows.size, np.int64)
    if width > 0:
        stratum = np.minimum((s - low) / width * strata, strata - 1).astype(np.int64)
    key = uids.hashed(pool.hi, pool.lo, salt=uids.SALT_STRATUM, seed=pool.seed)[rows]
    inside = np.lexsort((key, stratum))
    place = np.empty(rows.size, np.int64)
    place[inside] = features.inside_runs(np.bincount(stratum))
    return np.concatenate(
        [rows[np.lexsort((key, place))], aside[ascending(pool.difficulty[aside])]]
    )


# The comments count multiplications and additions for n samples, k neighbors and features of d
# columns. `most` is the pool that one machine ranks at d = 1,536 and k = 5, with two cores in about
# an hour, or in 40 GB.
_LISTED = (
    Selector(
        name="random",
        summary="a hash of the uid: what every other method has to beat",
        rank=lambda pool: baselines.at_random(pool.hi, pool.lo, seed=pool.seed),
        most=500_000_000,  # one sort of n keys, in memory
        instead="a threshold on a hash of the uid, sample by sample",
        wants=frozenset(),
    ),
    Selector(
        name="score",
        summary="highest difficulty first; of CLIP scores: DataComp's filter (Gadre et al. 2023)",
        rank=lambda pool: baselines.by_score(pool.difficulty, pool.hi, pool.lo),
        most=500_000_000,  # one sort of n keys, in memory
        instead="a threshold on the score, sample by sample",
        wants=frozenset(),
    ),
    Selector(
        name="moderate",
        summary="distance to the class center nearest to the median (Xia et al. 2023)",
        rank=geometric.moderate,
        most=100_000_000,  # 6·n·d: two passes over mapped features of 300 GB
        instead="ccs, which needs no features",
        wants=frozenset({"features"}),
    ),
    Selector(
        name="ccs",
        summary="the same number from each stratum of difficulty (Zheng et al. 2022)",
        rank=ccs,
        most=500_000_000,  # five sorts of n keys, 75 bytes a sample
        instead="random, and ccs on a part of the pool",
        wants=frozenset(),
    ),
    Selector(
        name="k_center",
        summary="farthest-first traversal: k-center greedy (Sener & Savarese 2018)",
        rank=geometric.k_center,
        most=50_000,  # 3/2·n²·d, and as many bytes: 6·10¹² at d = 1,536
        instead="facility_location, which works on the neighbor graph",
        wants=frozenset({"features"}),
    ),
    Selector(
        name="herding",
        summary="follow the mean of all features (Welling 2009, Chen et al. 2010)",
        rank=geometric.herding,
        most=20_000,  # n²·d: 6·10¹¹ at d = 1,536
        instead="moderate, which stays near the center too and is linear in n",
        wants=frozenset({"features"}),
    ),
    Selector(
        name="facility_location",
        summary="every sample has a kept one near it, lazy greedy on the graph (Iyer et al. 2021)",
        rank=lambda pool: submodular.facility_location(
            pool.difficulty, pool.neighbors, pool.sqdist
        ),
        most=50_000_000,  # some k·n·log n in one thread, 150 bytes a sample
        instead="d2, which runs on partitions",
        wants=frozenset({"neighbors"}),
    ),
    Selector(
        name="graph_cut",
        summary="near to many, far from what is kept, greedy on the graph (Iyer et al. 2021)",
        rank=lambda pool: submodular.graph_cut(pool.neighbors, pool.sqdist),
        most=50_000_000,  # k·n + n·log n, 150 bytes a sample
        instead="d2, which runs on partitions",
        wants=frozenset({"neighbors"}),
    ),
    Selector(
        name="infomax",
        summary="score less likeness to what is kept, lazy greedy on the graph (Tan et al. 2025)",
        rank=lambda pool: submodular.infomax(
            pool.difficulty, pool.neighbors, pool.sqdist, redundancy=pool.redundancy
        ),
        most=50_000_000,  # k·n + n·log n, 150 bytes a sample
        instead="d2, which runs on partitions",
        wants=frozenset({"neighbors"}),
        options=frozenset({"redundancy"}),
    ),
    Selector(
        name="density",
        summary="a quota for each cluster by its spread, best score first (Abbas et al. 2024)",
        rank=lambda pool: density.density(pool, temperature=pool.temperature),
        most=10_000_000,  # 500·n·d: the distance of each sample to each center
        instead="d2, which thins dense regions on partitions",
        wants=frozenset({"features"}),
        options=frozenset({"temperature"}),
    ),
    Selector(
        name="semdedup",
        summary="drop what is most like an earlier one of its cluster (Abbas et al. 2023)",
        rank=geometric.semdedup,
        # training 256·20·(n/1000)²·d, choice of clusters n²/1000·d, pairs 1000·n·d/2: mostly
        # products of 2·10¹⁴ at d = 1,536
        most=5_000_000,
        instead="d2, whose graph of partitions finds near-copies too",
        wants=frozenset({"features"}),
    ),
)

SELECTORS: dict[str, Selector] = {selector.name: selector for selector in _LISTED}

OPTIONS: frozenset[str] = frozenset().union(*(selector.options for selector in _LISTED))
"""fields of `Pool` that only some methods use"""


def options(method: str) -> frozenset[str]:
    """Those of `OPTIONS` that a method uses; D2 uses none."""
    return SELECTORS[method].options if method in SELECTORS else frozenset()
