"""Soft selection: how often each sample of a subset is repeated."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2filter.algorithm import soft, uids
from d2filter.errors import UsageError


def uids_of(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    lo = rng.choice(10 * n, n, replace=False).astype(np.uint64)
    return rng.integers(0, 3, n).astype(np.uint64), lo


def naive_expected(scores: list[float], size: int, temperature: float) -> list[float]:
    """e = log(1 + u·exp(s/τ)) by bisection on log u."""
    low, high = -2000.0, 2000.0

    def total(t: float) -> float:
        return sum(
            x if (x := t + (s - 1) / temperature) > 700 else math.log1p(math.exp(x)) for s in scores
        )

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if total(middle) >= size else (middle, high)
    return [
        x if (x := high + (s - 1) / temperature) > 700 else math.log1p(math.exp(x)) for s in scores
    ]


@settings(max_examples=60)
@given(
    n=st.integers(1, 40), seed=st.integers(0, 2**32), levels=st.sampled_from([1, 2, 50]),
    share=st.sampled_from([0.02, 0.3, 1.0, 4.0]), temperature=st.sampled_from([0.03, 0.1, 1.0]),
)  # fmt: skip
def test_expected_copies_are_those_of_the_limit(
    n: int, seed: int, levels: int, share: float, temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    scores = soft.scaled(rng.integers(0, levels, n).astype(np.float32))
    size = max(1, round(share * n))
    found = soft.expected(scores, size, temperature)
    expected = naive_expected(scores.tolist(), size, temperature)
    assert found / soft.ONE == pytest.approx(expected, abs=2e-6, rel=1e-5)
    assert found.sum() >= size * soft.ONE


@settings(max_examples=100)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**32), size=st.integers(1, 200))
def test_resampling_is_counting_marks(n: int, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    hi, lo = uids_of(n, rng)
    wanted = rng.integers(0, 5, n) * rng.integers(1, 2**40)
    wanted[rng.integers(0, n)] += 1
    found = soft.resampled(wanted, hi, lo, size)
    key = uids.hashed(hi, lo, salt=uids.SALT_SOFT)
    order = sorted(range(n), key=lambda row: (int(key[row]), int(hi[row]), int(lo[row])))
    total, before = int(wanted.sum()), 0
    for row in order:
        after = before + int(wanted[row])
        marks = [k for k in range(1, size + 1) if before < Fraction(k * total, size) <= after]
        assert found[row] == len(marks)
        before = after
    assert found.sum() == size


@settings(max_examples=60)
@given(n=st.integers(1, 60), seed=st.integers(0, 2**32), size=st.integers(1, 100))
def test_copies_follow_the_score_and_no_order(n: int, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    hi, lo = uids_of(n, rng)
    scores = rng.integers(0, 9, n).astype(np.float32)
    found = soft.copies(scores, hi, lo, size, 0.2)
    assert found.sum() == size
    wanted = soft.expected(soft.scaled(scores), size, 0.2)
    share = wanted * size / wanted.sum()
    # whole copies are what is expected, rounded down or up
    assert (found >= np.floor(share - 1e-9)).all()
    assert (found <= np.ceil(share + 1e-9)).all()
    shuffled = rng.permutation(n)
    again = soft.copies(scores[shuffled], hi[shuffled], lo[shuffled], size, 0.2)
    assert again.tolist() == found[shuffled].tolist()


def test_a_score_that_is_higher_by_the_temperature_is_worth_about_one_copy() -> None:
    scores = np.repeat(np.array([0.0, 0.5, 0.6, 1.0]), 100)
    wanted = soft.expected(scores, 2000, 0.1) / soft.ONE
    copies = wanted.reshape(4, 100).mean(axis=1)
    assert copies[3] - copies[2] == pytest.approx(4, abs=0.05)
    assert copies[2] - copies[1] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("size", "temperature", "said"),
    [(1, 0.0, "soft is 0.0"), (1, math.nan, "soft is nan"), (0, 0.1, "keeps 1 to")],
)
def test_soft_selection_refuses_impossible_options(
    size: int, temperature: float, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        soft.expected(np.zeros(2), size, temperature)
