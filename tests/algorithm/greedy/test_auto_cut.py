"""Properties of the automatic cut of the hardest samples, for any difficulties and budgets."""

from __future__ import annotations

import random
from decimal import Decimal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from d2filter.algorithm import quantile
from d2filter.algorithm.greedy import auto_cut, demoted

F32 = npt.NDArray[np.float32]

KEPT = st.decimals("0.001", "1", places=3)
DIFFICULTY = arrays.arrays(
    np.float32, st.integers(2, 60), elements=st.floats(-1, 1, width=32, allow_subnormal=False)
)


def cut(difficulty: F32, kept: Decimal, middle: float | None = 0.0) -> Decimal:
    return auto_cut.auto(quantile.upper_counts(difficulty), kept, middle=middle)


def by_hand(wrong: float, kept: float) -> float:
    """The docstring's equation in floats."""
    room = min(1.0, kept / (1 - wrong)) if wrong < 1 else 1.0
    return min(wrong + (1 - wrong) * (1 - room**0.5) ** 2 / 2, 1 - kept)


@given(DIFFICULTY, KEPT)
def test_the_automatic_cut_equals_its_equation(difficulty: F32, kept: Decimal) -> None:
    wrong = float(np.mean(difficulty >= 0))
    expected = by_hand(wrong, float(kept)) if quantile_bins(difficulty) > 1 else 0.0
    assert float(cut(difficulty, kept)) == pytest.approx(expected, abs=2e-6)


@given(DIFFICULTY, KEPT, KEPT)
def test_a_smaller_budget_never_has_the_smaller_cut(
    difficulty: F32, a: Decimal, b: Decimal
) -> None:
    small, large = sorted((a, b))
    assert cut(difficulty, small) >= cut(difficulty, large)


@given(DIFFICULTY, KEPT, st.randoms(use_true_random=False), st.integers(0, 60))
def test_order_and_partitions_cannot_change_it(
    difficulty: F32, kept: Decimal, shuffle: random.Random, at: int
) -> None:
    order = list(range(difficulty.size))
    shuffle.shuffle(order)
    shuffled = difficulty[order]
    counts = quantile.upper_counts(shuffled[:at]) + quantile.upper_counts(shuffled[at:])
    assert auto_cut.auto(counts, kept, middle=0.0) == cut(difficulty, kept)


@given(DIFFICULTY, KEPT)
def test_the_cut_leaves_enough_samples_for_the_budget(difficulty: F32, kept: Decimal) -> None:
    share = cut(difficulty, kept)
    assert 0 <= share <= 1 - kept
    assert share < 1
    taken = int(demoted.hardest(difficulty, share).sum())
    assert difficulty.size - taken >= int(kept * difficulty.size)


@given(st.integers(1, 400), st.integers(0, 400), KEPT)
def test_takes_away_all_that_was_not_learned_where_the_budget_has_no_need_of_it(
    right: int, wrong: int, kept: Decimal
) -> None:
    difficulty = np.r_[np.full(right, -0.5), np.full(wrong, 0.5)].astype(np.float32)
    share = cut(difficulty, kept)
    if wrong and kept <= Decimal(right) / (right + wrong):
        assert share >= Decimal(wrong) / (right + wrong) - Decimal("0.000001")
    if not wrong:
        assert share == 0  # all difficulties are equal


@given(DIFFICULTY, KEPT, st.sampled_from([2.0, 64.0, 1024.0]))
def test_without_a_middle_the_unit_of_the_difficulties_cannot_change_it(
    difficulty: F32, kept: Decimal, unit: float
) -> None:
    # powers of two move no value to another place inside its bin
    scaled = (difficulty * np.float32(unit)).astype(np.float32)
    assert cut(scaled, kept, None) == cut(difficulty, kept, None)


def test_the_figures_of_the_docstring_are_correct() -> None:
    # nothing above the middle, so the budget alone decides
    difficulty = np.linspace(-1, -0.5, 1000).astype(np.float32)
    shares = [float(cut(difficulty, Decimal(kept))) for kept in ("0.1", "0.2", "0.3", "0.5", "1")]
    assert shares == pytest.approx([0.23, 0.15, 0.10, 0.04, 0], abs=0.005)


def test_the_middle_of_el2n_is_where_two_classes_are_equal() -> None:
    # p = (½, ½) has an error of √½
    assert auto_cut.MIDDLE["el2n"] == pytest.approx(np.linalg.norm([0.5 - 1, 0.5]))


@pytest.mark.parametrize("kept", ["0", "-0.1", "1.01"])
def test_refuses_shares_that_are_none(kept: str) -> None:
    with pytest.raises(ValueError, match="kept is"):
        cut(np.array([0, 1], np.float32), Decimal(kept))


def test_refuses_counts_of_nothing() -> None:
    with pytest.raises(ValueError, match="no samples"):
        auto_cut.auto(np.zeros(65536, np.int64), Decimal("0.5"))


def quantile_bins(difficulty: F32) -> int:
    return int(np.count_nonzero(quantile.upper_counts(difficulty)))
