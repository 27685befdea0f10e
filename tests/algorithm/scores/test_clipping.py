"""Detection of scores that scaling makes equal, compared with sorted lists, whole and in parts."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.algorithm import quantile
from d2filter.algorithm.scores import clipping

SHARES = [*clipping.TAILS, Decimal("0.49"), Decimal("0.3")]


def tails_of(scores: np.ndarray) -> dict[Decimal, clipping.Ends]:
    ordered = np.sort(scores)
    found = {}
    for tail in clipping.TAILS:
        first, last = clipping.places(scores.size, tail)
        found[tail] = (float(ordered[first]), float(ordered[last]))
    return found


def judged(scores: np.ndarray) -> clipping.Squeezed | None:
    scores = scores.astype(np.float32)
    low, high = float(scores.min()), float(scores.max())
    found = clipping.judge(scores.size, low, high, tails_of(scores))
    if clipping.surely_wide(quantile.upper_counts(scores), low, high):
        assert found is None
    return found


@given(st.integers(1, 10**7), st.sampled_from(SHARES))
def test_the_given_share_is_left_out(n: int, share: Decimal) -> None:
    first, last = clipping.places(n, share)
    assert 0 <= first <= last < n
    assert first == n - 1 - last
    assert first == min(math.ceil(Fraction(share) * n), (n - 1) // 2)


NORMAL = np.random.default_rng(0).normal(0.25, 0.05, 2000)


@pytest.mark.parametrize("extreme", [-9999.0, 1e20, 3e38, -3e38])
@pytest.mark.parametrize("many", [1, 15, 150])
def test_a_sentinel_is_found_at_any_frequency(extreme: float, many: int) -> None:
    found = judged(np.concatenate([NORMAL, np.full(many, extreme)]))
    assert found is not None
    assert found.at_low_end == (extreme < 0)
    clip = {1: "0.001", 15: "0.01", 150: "0.1"}[many]
    assert found.clip == Decimal(clip)
    # what it advises cures it
    ordered = np.sort(np.concatenate([NORMAL, np.full(many, extreme)]))
    first, last = clipping.places(ordered.size, found.clip)
    assert judged(np.clip(ordered, ordered[first], ordered[last])) is None


@pytest.mark.parametrize(
    "scores",
    [
        NORMAL,
        1000 + NORMAL,
        np.random.default_rng(0).random(5000),
        np.random.default_rng(0).integers(0, 10, 500),
        np.random.default_rng(0).exponential(1, 100_000),
        np.ones(100),
        np.array([0.0, 1e20]),
        np.arange(19),
    ],
)
def test_usual_score_distributions_give_no_alert(scores: np.ndarray) -> None:
    assert judged(scores) is None


def test_one_score_for_nearly_all_is_an_alert_without_a_cure_by_little() -> None:
    found = judged(np.array([0.0] * 300 + [1.0]))
    assert found is not None
    assert found.middle == (0.0, 0.0)
    assert not clipping.few_units(found.middle, 0.0, 1.0)


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.30000001192092896]), min_size=1, max_size=40),
    st.sampled_from([1e3, 1e12, 1e20, 3e38]),
    st.integers(1, 4),
)
def test_scores_that_share_a_unit_are_counted_over_any_parts(
    values: list[float], high: float, parts: int
) -> None:
    scores = np.array(values, np.float32)
    middle = (float(scores.min()), float(scores.max()))
    pieces = np.array_split(scores, parts)
    found = clipping.joined([clipping.shared_units(piece, middle, 0.0, high) for piece in pieces])
    shared, total, _ = clipping.collapsed(found)
    unit = [round(float(np.float32(v)) / high * 2**40) for v in values]
    expected = sum(
        any(u == w and np.float32(a) != np.float32(b) for b, w in zip(values, unit, strict=True))
        for a, u in zip(values, unit, strict=True)
    )
    assert (shared, total) == (expected, len(values))


def test_scores_collapse_only_where_too_few_units_are_left() -> None:
    for high, few in ((10.0, False), (9999.0, False), (1e12, True), (3e38, True)):
        assert clipping.few_units((0.1, 0.4), 0.0, high) == few
    exact = np.arange(10, dtype=np.float32)
    # integers that keep a unit each are told apart, whatever the range
    found = clipping.shared_units(exact, (0.0, 9.0), 0.0, 1e12)
    assert clipping.collapsed(found) == (0, 10, False)
