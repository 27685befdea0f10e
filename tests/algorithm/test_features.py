from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d2filter.algorithm import cells, features


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
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, 2, (n, 3)).astype(np.float16)
    centroids = rng.integers(-1, 2, (nlist, 3)).astype(np.float16)
    chosen, distance = cells.assign(rows, centroids, probes)
    for i in range(n):
        d = np.square(rows[i].astype(float) - centroids.astype(float)).sum(axis=1)
        order = sorted(range(nlist), key=lambda c: (d[c], c))[:probes]
        assert chosen[i].tolist() == order
        assert distance[i].tolist() == [np.float32(d[c]) for c in order]


def test_training_gives_distinct_centroids_and_no_empty_start() -> None:
    rng = np.random.default_rng(0)
    sample = features.fix([rng.normal(size=(500, 8))])
    centroids = cells.train_centroids(sample, 20)
    assert len(np.unique(centroids, axis=0)) == len(centroids)
    assert 15 <= len(centroids) <= 20
    assert np.isfinite(centroids).all()
    assert len(cells.train_centroids(sample[:3], 20)) == 3


def test_training_reduces_the_distance() -> None:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(10, 16))
    sample = features.fix([centers[rng.integers(0, 10, 800)] + 0.1 * rng.normal(size=(800, 16))])
    start = sample[np.linspace(0, 799, 10).astype(int)]
    trained = cells.train_centroids(sample, 10)
    before = cells.assign(sample, start, 1)[1].mean()
    after = cells.assign(sample, trained, 1)[1].mean()
    assert after < before


def test_extreme_magnitudes_normalize_to_the_same_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 7))
    plain = features.fix([rows])
    for scale in (1e-200, 1e-30, 1e30, 1e200):
        assert (features.fix([rows * scale]) == plain).mean() > 0.99
        assert np.isfinite(features.fix([rows * scale])).all()
    exact = features.fix([rows * 2.0**300])
    assert exact.tobytes() == plain.tobytes()
