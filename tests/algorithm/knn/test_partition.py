"""The layout of cells in partitions: balanced, and few neighbors lie in different ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.algorithm.knn import partition


def centroids(n: int, d: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float16)


@given(
    nlist=st.integers(1, 40),
    parts=st.integers(1, 5),
    partitions=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_every_row_has_one_home(nlist: int, parts: int, partitions: int, seed: int) -> None:
    """Empty cells, giant cells, more partitions than cells: units and rows add up."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 50, (parts, nlist)) * (rng.random((parts, nlist)) < 0.7)
    counts[:, 0] *= rng.integers(1, 200)
    laid = partition.lay_out(centroids(nlist), counts, partitions)
    assert laid.partition.shape == counts.shape
    assert laid.owner.min() >= 0
    assert laid.owner.max() < partitions
    assert laid.sizes().sum() == counts.sum()
    by_home = np.zeros(partitions, np.int64)
    np.add.at(by_home, laid.partition, counts)
    assert by_home.tolist() == laid.sizes().tolist()
    start, owners = laid.owners_of(nlist)
    for cell in range(nlist):
        assert owners[start[cell] : start[cell + 1]].tolist() == sorted(
            set(laid.owner[laid.cell == cell].tolist())
        )


def test_partitions_are_balanced_and_keep_neighbors_together() -> None:
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(8, 12)) * 5
    near = (groups[np.arange(400) % 8] + rng.normal(size=(400, 12))).astype(np.float16)
    counts = rng.integers(50, 150, (3, 400))
    laid = partition.lay_out(near, counts, 8)
    sizes = laid.sizes()
    assert sizes.max() < 1.3 * sizes.mean()
    together = np.mean(
        [np.bincount(laid.owner[np.arange(400) % 8 == g], minlength=8).max() / 50 for g in range(8)]
    )
    assert together > 0.6  # one of eight by chance


def test_a_cell_far_above_the_average_is_cut() -> None:
    counts = np.full((10, 30), 10)
    counts[:, 4] = 3000
    laid = partition.lay_out(centroids(30), counts, 4)
    assert (laid.cell == 4).sum() > 4
    assert laid.sizes().max() < 0.45 * counts.sum()


@pytest.mark.parametrize("seed", range(5))
def test_rows_go_where_their_cells_are_and_home(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 30, (2, 12))
    counts[:, 3] *= 60
    laid = partition.lay_out(centroids(12), counts, 3)
    start, owners = laid.owners_of(12)
    assigned = np.stack([rng.permutation(12)[:4] for _ in range(50)]).astype(np.int32)
    assigned[:, 3] = -1
    home = laid.partition[0][assigned[:, 0]]
    assigned[7, 0] = -2
    row, goal = partition.destinations(assigned, home, start, owners)
    assert (np.diff(goal) >= 0).all()
    for i in range(50):
        wanted = {int(home[i])}
        for cell in assigned[i][assigned[i] >= 0]:
            wanted |= set(owners[start[cell] : start[cell + 1]].tolist())
        if i == 7:
            wanted = set(laid.owner.tolist())
        assert goal[row == i].tolist() == sorted(wanted)
