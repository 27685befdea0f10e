"""The methods infomax and density, compared with naive transcriptions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.graph_strategies import Case, graphs

from d2filter.algorithm.methods import density, selectors, submodular
from d2filter.algorithm.methods.pool import Pool
from d2filter.errors import UsageError

ONE = 2**32


def infomax(case: Case, difficulty: np.ndarray, redundancy: float) -> list[int]:
    n = len(difficulty)
    low, high = float(difficulty.min()), float(difficulty.max())
    score = [
        round((1.0 if high == low else (float(s) - low) / (high - low)) * ONE) for s in difficulty
    ]
    likeness: dict[tuple[int, int], float] = {}
    for i, row in enumerate(case.neighbors.tolist()):
        for c, j in enumerate(row):
            if j >= 0:
                w = oracle.weight(case.sqdist[i, c], 1.0)
                likeness[i, j] = likeness[j, i] = max(w, likeness.get((i, j), 0.0))
    out: list[int] = []
    while len(out) < n:
        gain = {
            j: score[j]
            - sum(round(redundancy * w * ONE) for i in out if (w := likeness.get((i, j), 0.0)))
            for j in range(n)
            if j not in out
        }
        out.append(min(gain, key=lambda j: (-gain[j], j)))
    return out


@settings(max_examples=100)
@given(graphs(largest=20), st.sampled_from([0.0, 0.25, 1.0, 3.0]), st.integers(1, 9))
def test_infomax_is_the_plain_greedy(case: Case, redundancy: float, levels: int) -> None:
    difficulty = (case.x % levels).astype(np.float32)
    found = submodular.infomax(
        difficulty, case.neighbors, case.sqdist, redundancy=redundancy
    ).tolist()
    assert found == infomax(case, difficulty, redundancy)
    if redundancy == 0:
        assert found == sorted(range(len(found)), key=lambda i: (-difficulty[i], i))


def test_infomax_takes_one_of_each_pair_of_copies_first() -> None:
    neighbors = np.array([[1], [0], [3], [2]], np.int64)
    difficulty = np.array([1.0, 0.9, 0.5, 0.4], np.float32)
    found = submodular.infomax(difficulty, neighbors, np.zeros((4, 1), np.float32))
    assert found.tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("redundancy", [-0.1, 17.0, math.nan])
def test_infomax_refuses_impossible_options(redundancy: float) -> None:
    with pytest.raises(UsageError, match="redundancy is"):
        submodular.infomax(
            np.zeros(2, np.float32), np.empty((2, 0), np.int64), np.empty((2, 0), np.float32),
            redundancy=redundancy,
        )  # fmt: skip


def pool_of(rows: np.ndarray, difficulty: np.ndarray, seed: int = 0) -> Pool:
    n = len(rows)
    return Pool(
        hi=np.arange(n, dtype=np.uint64) // np.uint64(3),
        lo=np.arange(n, dtype=np.uint64),
        difficulty=difficulty,
        features=rows,
        neighbors=np.empty((n, 0), np.int64),
        sqdist=np.empty((n, 0), np.float32),
        seed=seed,
    )


def naive_shares(
    rows: np.ndarray, centers: np.ndarray, temperature: float
) -> tuple[list[int], list[float]]:
    cell, distance = [], []
    for row in rows.tolist():
        lengths = [math.dist(row, center) for center in centers.tolist()]
        cell.append(lengths.index(min(lengths)))
        distance.append(min(lengths))
    complexity = []
    for c, center in enumerate(centers.tolist()):
        own = [d for at, d in zip(cell, distance, strict=True) if at == c]
        others = sorted(math.dist(center, o) for k, o in enumerate(centers.tolist()) if k != c)[:20]
        intra = sum(own) / len(own) if own else 0.0
        inter = sum(others) / len(others) if others else 0.0
        complexity.append(intra * inter / temperature)
    top = max(complexity)
    raised = [math.exp(value - top) for value in complexity]
    return cell, [value / sum(raised) for value in raised]


@settings(max_examples=60)
@given(
    n=st.integers(1, 60), seed=st.integers(0, 2**32), levels=st.sampled_from([1, 3, 1000]),
    rows_a_cluster=st.sampled_from([1, 5, 20, 100]), temperature=st.sampled_from([0.1, 1.0]),
)  # fmt: skip
def test_density_gives_each_cluster_its_quota(
    n: int, seed: int, levels: int, rows_a_cluster: int, temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.integers(-8, 9, (n, 3)) / 8 + rng.integers(0, 2, (n, 1)) * 2).astype(np.float16)
    difficulty = (rng.integers(0, levels, n) / levels).astype(np.float32)
    pool = pool_of(rows, difficulty, seed % 7)
    found = density.density(pool, temperature=temperature, rows_a_cluster=rows_a_cluster).tolist()
    assert sorted(found) == list(range(n))
    centers = density._centers(pool, rows, rows_a_cluster)
    cell, distance = density.nearest(rows, centers)
    expected_cell, expected_share = naive_shares(rows, centers, temperature)
    assert cell.tolist() == expected_cell
    share = density.shares(cell, distance, centers, temperature)
    assert share == pytest.approx(expected_share, rel=1e-9)
    assert len(centers) <= max(1, n // rows_a_cluster)
    # within a cluster the best first, ties to the smaller row
    members = [[row for row in found if cell[row] == c] for c in range(len(centers))]
    for own in members:
        assert own == sorted(own, key=lambda row: (-difficulty[row], row))
    # as in weighted fair queuing: whoever has waited longest for its share goes next
    taken = [0] * len(centers)
    for row in found:
        times = {
            c: Fraction(2 * taken[c] + 1, 2) / Fraction(float(share[c]))
            for c in range(len(centers))
            if taken[c] < len(members[c])
        }
        assert float(times[int(cell[row])]) <= float(min(times.values())) * (1 + 1e-12)
        taken[int(cell[row])] += 1


def test_density_thins_the_dense_cluster() -> None:
    rng = np.random.default_rng(2)
    near = np.array([0, 0]) + 0.05 * rng.standard_normal((300, 2))
    wide = np.array([6, 0]) + 1.0 * rng.standard_normal((100, 2))
    rows = np.concatenate([near, wide]).astype(np.float16)
    pool = pool_of(rows, rng.random(400).astype(np.float32))
    first = density.density(pool, temperature=5.0, rows_a_cluster=200)[:100]
    assert (first >= 300).mean() > 0.6  # a quarter of the pool


def test_one_cluster_is_a_ranking_by_score() -> None:
    difficulty = np.random.default_rng(1).random(30).astype(np.float32)
    pool = pool_of(np.zeros((30, 2), np.float16), difficulty)
    by_score = np.argsort(-difficulty, kind="stable").tolist()
    assert selectors.order("density", pool).tolist() == by_score


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"rows_a_cluster": 0}])
def test_density_refuses_impossible_options(options: dict[str, float]) -> None:
    pool = pool_of(np.zeros((3, 2), np.float16), np.zeros(3, np.float32))
    with pytest.raises(UsageError, match=f"{next(iter(options))} is 0"):
        density.density(pool, **options)  # type: ignore[arg-type]  # one or the other
