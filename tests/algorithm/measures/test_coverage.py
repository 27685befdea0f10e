"""Measures of a subset, each compared with its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2filter.algorithm.measures import coverage


def pool(seed: int, n: int, d: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features on a coarse grid, so that distances tie, and uids."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 4, (n, d)).astype(np.float16)
    return rows, np.zeros(n, np.uint64), np.sort(rng.choice(10**6, n, False)).astype(np.uint64)


@settings(max_examples=60)
@given(
    st.integers(2, 60), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32),
    st.sampled_from([1, 3, 256]),
)  # fmt: skip
def test_aucpr_is_the_mean_distance_to_the_nearest_kept(
    n: int, size: int, share: float, seed: int, looked_through: int
) -> None:
    rows, hi, lo = pool(seed, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "LOOKED_THROUGH", looked_through)
        patch.setattr(coverage, "BLOCK", 7)
        held = coverage.hold_out(rows, hi, lo, size)
        kept = np.random.default_rng(seed).random(n) < share
        found = coverage.aucpr(rows, held, kept)
    assert len(held.rows) == min(size, n // 2)
    others = [i for i in range(n) if kept[i] and i not in held.rows]
    if not others:
        assert found == np.inf
        return
    wide = rows.astype(np.float64)
    nearest = [min(np.linalg.norm(wide[q] - wide[o]) for o in others) for q in held.rows]
    assert found == pytest.approx(np.mean(nearest), abs=1e-6)


def test_the_held_out_samples_do_not_depend_on_the_order_of_rows() -> None:
    rows, hi, lo = pool(0, 50)
    held = coverage.hold_out(rows, hi, lo, 10)
    turn = np.random.default_rng(1).permutation(50)
    turned = coverage.hold_out(rows[turn], hi[turn], lo[turn], 10)
    assert lo[held.rows].tolist() == lo[turn][turned.rows].tolist()
    kept = lo % 3 == 0
    assert coverage.aucpr(rows, held, kept) == coverage.aucpr(rows[turn], turned, kept[turn])
    with pytest.raises(ValueError, match="two samples"):
        coverage.hold_out(rows[:1], hi[:1], lo[:1], 10)


@given(st.integers(1, 50), st.integers(0, 2**32))
def test_deciles_hold_a_tenth_of_the_pool_each(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, kept = rng.integers(0, 5, n).astype(np.float32), rng.random(n) < 0.5
    found = coverage.kept_by_decile(values, kept)
    order = sorted(range(n), key=lambda i: values[i])
    # equal values count with what is kept of all of them
    share = [np.mean(kept[values == values[i]]) for i in range(n)]
    at = 0
    for d in range(10):
        size = n // 10 + (d < n % 10)
        part = order[at : at + size]
        at += size
        if part:
            assert found[d] == pytest.approx(np.mean([share[i] for i in part]))
        else:
            assert np.isnan(found[d])


@given(st.integers(1, 50), st.integers(0, 2**32))
def test_cells_spacing_and_overlap(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, hi, lo = pool(seed, n)
    kept, other = rng.random(n) < 0.5, rng.random(n) < 0.5
    cell = coverage.cells(rows, hi, lo, 5)
    centers = {c: rows[cell == c].astype(float) for c in np.unique(cell)}
    assert len(centers) <= 5
    k = 2
    neighbors = rng.integers(-1, n, (n, k))
    sqdist = np.where(neighbors >= 0, rng.integers(0, 3, (n, k)), np.inf).astype(np.float32)
    a, b = set(np.flatnonzero(kept)), set(np.flatnonzero(other))
    expected = len(a & b) / len(a | b) if a | b else 1.0
    assert coverage.jaccard(kept, other) == expected
    farthest = [max([s for s in row if np.isfinite(s)], default=np.inf) for row in sqdist]
    assert coverage.spacing(sqdist).tolist() == np.sqrt(np.float32(farthest)).tolist()


def test_a_cell_is_the_nearest_landmark() -> None:
    rows = np.array([[0], [0.25], [9], [9.25], [100]], np.float16)
    hi, lo = np.zeros(5, np.uint64), np.arange(5, dtype=np.uint64)
    cell = coverage.cells(rows, hi, lo, 5)
    assert len(set(cell.tolist())) == 5
