"""Automatic gamma, the local kernel, the share of wrong pairs, and near-copies."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graph_strategies import Case, graphs

from d2filter.algorithm import quantile
from d2filter.algorithm.greedy import (
    auto_gamma,
    auto_settings,
    in_memory,
    local_kernel,
    messages,
    near_copies,
    schemes,
)
from d2filter.algorithm.scores import mismatched
from d2filter.config import RankConfig

shares = st.sampled_from([Fraction(1, 10), Fraction(3, 10), Fraction(1, 2), Fraction(1)])
wrongs = st.sampled_from([None, Fraction(0), Fraction(1, 5), Fraction(2, 5), Fraction(19, 20)])


def relative_lists(case: Case) -> np.ndarray:
    """The definition, edge by edge."""
    reach = [([0.0] + [d for d in row if math.isfinite(d)])[-1] for row in case.sqdist.tolist()]
    median = sorted(reach)[(len(reach) - 1) // 2]
    floor = np.float32(median / 2 if median > 0 else 1.0)
    sigma = [max(float(np.float32(r)), float(floor)) for r in reach]
    out = np.full(case.sqdist.shape, np.inf, np.float32)
    for i, row in enumerate(case.neighbors.tolist()):
        for c, j in enumerate(row):
            if j >= 0:
                squared = float(case.sqdist[i, c])
                out[i, c] = np.float32(squared * squared / (sigma[i] * sigma[j]))
    return out


@given(graphs())
def test_relative_distances_are_those_of_the_definition(case: Case) -> None:
    reach = local_kernel.reach(case.sqdist)
    floor = local_kernel.floor_of(quantile.middle(reach))
    there = case.neighbors >= 0
    of = reach[np.where(there, case.neighbors, 0)]
    found = auto_gamma.local_lists(case.sqdist, reach, of, there, floor)
    assert np.array_equal(found, relative_lists(case))


@given(graphs(), st.floats(0, 50))
def test_the_effective_share_is_that_of_the_definition(case: Case, gamma: float) -> None:
    lists = relative_lists(case)
    expected = 0.0
    for row in lists.tolist():
        expected += 1 / (1 + sum(math.exp(-gamma * x) for x in row if math.isfinite(x)))
    found = auto_gamma.share_of(lists, gamma) / messages.ONE
    assert found == pytest.approx(expected, rel=1e-6)
    # whatever the order of lists and neighbors
    rng = np.random.default_rng(0)
    mixed = rng.permuted(rng.permutation(lists), axis=1)
    assert auto_gamma.share_of(mixed, gamma) == auto_gamma.share_of(lists, gamma)


@given(graphs(), shares, wrongs)
def test_gamma_is_the_smallest_that_reaches_the_target(
    case: Case, kept: Fraction, wrong: Fraction | None
) -> None:
    lists = relative_lists(case)
    found = auto_gamma.tune(lists, lists, kept, wrong)
    whole = len(lists) * messages.ONE
    if found.gamma < auto_gamma.MOST:
        assert auto_gamma.share_of(lists, found.gamma) >= found.target * whole
    step = 1 / auto_gamma.STEP
    if found.gamma > step:
        assert auto_gamma.share_of(lists, found.gamma - step) < found.target * whole
    assert found.target == pytest.approx(float(kept) ** found.exponent, abs=2**-20)


def test_the_exponent_falls_with_the_share_of_wrong_pairs_and_is_zero_without_redundancy() -> None:
    redundant, half = 0.6, Fraction(1, 2)
    # a pool of nothing but right pairs is thinned most, and less with every wrong one
    exponents = [auto_gamma.exponent(half, Fraction(u, 10), redundant) for u in range(7)]
    assert exponents == sorted(exponents, reverse=True)
    assert exponents[0] > 0.8 > 0.2 > exponents[4] > exponents[5] == 0
    # where every right pair can be kept, nothing is thinned
    assert auto_gamma.exponent(Fraction(4, 5), Fraction(1, 5), redundant) == 0
    # nor where nothing is redundant
    assert auto_gamma.exponent(half, Fraction(0), 1.0) == 0
    lists = np.random.default_rng(0).random((50, 5), np.float32)
    blind = auto_gamma.tune(lists, lists, half, Fraction(9, 10))
    assert blind == auto_gamma.tune(lists, lists, half, None)


@given(graphs(), st.sampled_from(["local", "rbf", "exp"]), st.booleans(), wrongs)
@settings(max_examples=60)
def test_the_order_of_rows_does_not_change_a_tuned_ranking(
    case: Case, kernel: str, undirected: bool, wrong: Fraction | None
) -> None:
    n = len(case.uid)
    difficulty = np.random.default_rng(n).random(n).astype(np.float32)
    config = RankConfig(
        gamma="auto", kernel=kernel, undirected=undirected, tuned_for=Decimal("0.3"),
        collapse_copies="auto", cut_hardest="auto",
    )  # fmt: skip

    def ranked(order: np.ndarray) -> tuple[list[int], float]:
        place = np.empty(n, np.int64)
        place[order] = np.arange(n)
        neighbors = case.neighbors[order]
        neighbors = np.where(neighbors >= 0, place[neighbors], -1)
        arrays = (difficulty[order], case.hi[order], case.lo[order], neighbors, case.sqdist[order])
        resolved, last = config.resolve_on(*arrays, auto_settings.PoolFacts(wrong=wrong))
        found = in_memory.rank_graph(
            arrays[1], arrays[2], arrays[0], *arrays[3:], scheme=config.scheme(resolved),
            undirected=undirected, is_demoted=last,
        )  # fmt: skip
        return found.rank[place].tolist(), resolved.gamma

    rows = np.arange(n)
    assert ranked(rows) == ranked(np.random.default_rng(1).permutation(rows))


def test_a_local_kernel_suppresses_an_isolated_pair_like_a_close_one() -> None:
    """Two that lie apart from everything, but are each other's nearest, are thinned as a close pair
    is; with one width for all of them neither is touched.
    """
    sqdist = np.array([[0.01, 0.1], [0.01, 0.1], [1.0, 10.0], [1.0, 10.0]], np.float32)
    reach = local_kernel.reach(sqdist)
    weight = {
        kernel: schemes.Scheme(kernel=kernel, gamma_reverse=10.0).reverse_weights(lists)
        for kernel, lists in (
            ("rbf", sqdist[:, 0]),
            ("local", local_kernel.relative(sqdist[:, 0], reach, reach[[1, 0, 3, 2]], 0.001)),
        )
    }
    assert weight["rbf"][0] > 0.9 > 0.1 > weight["rbf"][2]
    assert weight["local"][0] > 0.9
    assert weight["local"][2] == pytest.approx(weight["local"][0])


def test_pairs_like_random_ones_are_counted() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(4000, 16))
    text = image + 0.3 * rng.normal(size=(4000, 16))
    assert mismatched.like_random(image, text) < 40
    wrong = rng.choice(4000, 1000, replace=False)
    text[wrong] = text[np.roll(wrong, 1)]
    assert mismatched.like_random(image, text) == pytest.approx(1000, abs=100)
    assert mismatched.like_random(image, rng.normal(size=(4000, 16))) > 3600
    assert mismatched.wrong_share({"pairs": {"looked_at": 40, "like_random": 10}}) == Fraction(1, 4)
    assert mismatched.wrong_share({}) is None


def test_copies_are_near_by_the_standard_of_the_pool() -> None:
    assert near_copies.threshold(0.0) == 0.0
    assert near_copies.threshold(2.0) == pytest.approx(0.1)
