"""Features: normalization, rounding to float16, exact copies; cells and their training."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.algorithm import features
from d2filter.algorithm.knn import cells


def test_every_finite_half_decodes_exactly() -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    every = bits.view(np.float16)
    finite = every[np.isfinite(every)][None, :]
    assert (features.to_float32(finite) == finite.astype(np.float32)).all()


def test_modalities_are_normalized_apart_and_minus_zero_is_gone() -> None:
    image = np.array([[3.0, -0.0], [0.0, -2.0]], np.float32)
    text = np.array([[1.0, -1e-30], [5.0, 0.0]], np.float32)
    fixed = features.fix([image, text])
    assert fixed.tolist() == [[1, 0, 1, 0], [0, -1, 1, 0]]
    assert not np.signbit(fixed[fixed == 0]).any()


def test_zero_rows_cannot_be_fixed() -> None:
    assert np.isnan(features.fix([np.zeros((1, 3), np.float32)])).all()


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32))
def test_copies_are_grouped_by_their_smallest_row(n: int, d: int, seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, 2, (n, d)).astype(np.float16)
    copies = features.group_copies(rows)
    for i in range(n):
        same = [j for j in range(n) if (rows[j] == rows[i]).all()]
        group = copies.group[i]
        assert copies.first[group] == same[0]
        assert copies.members[copies.start[group] : copies.start[group + 1]].tolist() == same


def test_equal_hashes_of_different_rows_stay_apart() -> None:
    bits = np.array([[1, 2], [3, 4], [1, 2], [3, 4], [5, 6]], np.uint16)
    collided = np.zeros(5, np.uint64)
    leader = features._leaders(bits, collided, np.arange(5))
    assert leader.tolist() == [0, 1, 0, 1, 4]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**32))
def test_cells_are_chosen_by_exact_distance_then_number(
    n: int, nlist: int, probes: int, seed: int
) -> None:
    """Under all parents: the nearest of all cells, ties to the smaller; copies choose alike."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, 2, (n, 3)).astype(np.float16) + np.float16(0)
    raw = rng.integers(-1, 2, (nlist, 3)).astype(np.float16) + np.float16(0)
    built = cells.from_centroids(raw, raw[: max(1, nlist // 2)][features_first(raw, nlist)])
    chosen = cells.assign(rows, built, probes)
    centroids = built.centroids.astype(float)
    assert len(centroids) == len(np.unique(raw, axis=0))
    for i in range(n):
        d = np.square(rows[i].astype(float) - centroids).sum(axis=1)
        order = sorted(range(len(centroids)), key=lambda c: (d[c], c))[:probes]
        assert chosen[i].tolist() == order


def features_first(raw: np.ndarray, nlist: int) -> np.ndarray:
    """Distinct parents among the first half."""
    return features.group_copies(raw[: max(1, nlist // 2)]).first


@pytest.mark.parametrize(("rows", "count"), [(500, 20), (6000, 400)])
def test_training_gives_distinct_centroids_and_no_empty_start(rows: int, count: int) -> None:
    rng = np.random.default_rng(0)
    sample = features.fix([rng.normal(size=(rows, 8))])
    trained = cells.train(sample, count)
    assert len(np.unique(trained.centroids, axis=0)) == trained.count
    assert 0.75 * count <= trained.count <= 1.1 * count
    assert np.isfinite(trained.centroids).all()
    assert (np.diff(trained.parent) >= 0).all()
    assert cells.train(sample[:3], count).count == 3


def test_training_reduces_the_distance() -> None:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(10, 16))
    sample = features.fix([centers[rng.integers(0, 10, 800)] + 0.1 * rng.normal(size=(800, 16))])
    start = cells.from_centroids(sample[np.linspace(0, 799, 10).astype(int)])
    trained = cells.train(sample, 10)

    def spread(built: cells.Cells) -> float:
        home = built.centroids[cells.assign(sample, built, 1)[:, 0]]
        return float(np.square(sample.astype(float) - home).sum(axis=1).mean())

    assert spread(trained) < 0.5 * spread(start)


def test_small_and_large_pools_get_cells_that_fit() -> None:
    assert cells.cell_count(10, 5) == 1
    assert cells.cell_count(20_000, 999) == 5
    assert cells.cell_count(1_000_000, 5) == 4000
    assert cells.cell_count(10**12, 5) == 131_072


def test_extreme_magnitudes_normalize_to_the_same_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 7))
    plain = features.fix([rows])
    for scale in (1e-200, 1e-30, 1e30, 1e200):
        assert (features.fix([rows * scale]) == plain).mean() > 0.99
        assert np.isfinite(features.fix([rows * scale])).all()
    exact = features.fix([rows * 2.0**300])
    assert exact.tobytes() == plain.tobytes()
