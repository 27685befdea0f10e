"""Demoted samples, the unit of distances, and budgets of classes."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.graph_strategies import Case, graphs

from d2filter.algorithm import by_class, quantile
from d2filter.algorithm.greedy import demoted, schemes

floats = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45]),
)


@given(arrays.arrays(np.float32, st.integers(1, 60), elements=floats), st.data())
def test_the_kth_smallest_is_that_of_a_sorted_list(values: np.ndarray, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, values.size - 1))
    parts = np.array_split(values, data.draw(st.integers(1, 4)))
    upper, rest = quantile.locate(sum(quantile.upper_counts(p) for p in parts), place)
    lower, _ = quantile.locate(sum(quantile.lower_counts(p, upper) for p in parts), rest)
    expected = np.sort(values)[place]
    assert quantile.value_of(upper, lower) == expected
    assert quantile.smallest(values, place) == expected


def test_a_place_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="place 2 of 2"):
        quantile.smallest(np.array([1, 2], np.float32), 2)


@settings(max_examples=200)
@given(
    case=graphs(),
    cut=st.sampled_from(["0", "0.1", "0.4", "0.99"]),
    copies=st.sampled_from([None, 0.0, 0.5, 4.0]),
    levels=st.sampled_from([2, 1000]),
    seed=st.integers(0, 2**32),
)
def test_the_mask_is_that_of_the_definition(
    case: Case, cut: str, copies: float | None, levels: int, seed: int
) -> None:
    n = len(case.uid)
    difficulty = np.random.default_rng(seed).integers(0, levels, n).astype(np.float32)
    found = demoted.mask(
        difficulty, case.hi, case.lo, case.neighbors, case.sqdist, cut_hardest=Decimal(cut),
        collapse_copies=copies,
    )  # fmt: skip
    many = int(Decimal(cut) * n)
    stays_best = sorted(difficulty.tolist(), reverse=True)[many]
    expected = [many > 0 and d > stays_best for d in difficulty]
    if copies is not None:
        group = list(range(n))
        for _ in range(n):  # the smallest member's row spreads to all
            for i in range(n):
                for j, d in zip(case.neighbors[i].tolist(), case.sqdist[i].tolist(), strict=True):
                    if j >= 0 and d <= np.float32(copies) and not expected[i] and not expected[j]:
                        group[i] = group[j] = min(group[i], group[j])
        best = {}
        for i in sorted(range(n), key=lambda r: (-difficulty[r], case.uid[r])):
            best.setdefault(group[i], i)
        expected = [e or best[group[i]] != i for i, e in enumerate(expected)]
    assert found.tolist() == expected


@given(graphs(), st.sampled_from(list(schemes.KERNELS)), st.floats(0.1, 20))
def test_gamma_in_units_of_the_median_does_not_depend_on_the_scale(
    case: Case, kernel: str, factor: float
) -> None:
    # powers of two scale exactly
    power = np.float32(4.0 ** round(np.log2(factor)))
    plain = schemes.Scheme(kernel=kernel, gamma_reverse=3.0)
    weights = [
        plain.per(demoted.unit(sqdist)).reverse_weights(sqdist)
        for sqdist in (case.sqdist, case.sqdist * power)
    ]
    distances = case.sqdist[(case.sqdist > 0) & np.isfinite(case.sqdist)]
    if distances.size:
        assert (weights[0] == weights[1]).all()
        assert demoted.unit(case.sqdist) == np.sort(distances)[(distances.size - 1) // 2]
    else:
        assert demoted.unit(case.sqdist) == 1.0


@given(
    st.integers(1, 60), st.integers(1, 5), st.sampled_from(by_class.BUDGETS), st.integers(0, 2**32)
)
def test_every_budget_gives_each_class_its_share(
    n: int, classes: int, budgets: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rank, group, last = rng.permutation(n), rng.integers(0, classes, n), rng.random(n) < 0.2
    found = by_class.interleaved(rank, group, last, budgets)
    order = np.argsort(found)
    assert sorted(found.tolist()) == list(range(n))
    assert (np.diff(last[order].astype(int)) >= 0).all()
    early = order[~last[order]]
    there = np.bincount(group[early], minlength=classes)
    for size in range(early.size + 1):
        taken = np.bincount(group[early[:size]], minlength=classes)
        if budgets == "uniform":
            # nobody is two behind another who still has some
            assert all(taken[g] >= min(there[g], taken.max() - 1) for g in range(classes))
        else:
            share = there / max(1, early.size)
            # less than one sample for the class's own rounding, and its part of everybody's
            assert (np.abs(taken - size * share) < 1 + (classes - 1) * share + 1e-9).all()
    for g in range(classes):
        mine = [r for r in order.tolist() if group[r] == g and not last[r]]
        assert mine == sorted(mine, key=lambda r: rank[r])
    with pytest.raises(ValueError, match="proportional, uniform"):
        by_class.interleaved(rank, group, last, "even")


def counts_of(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """How many of each class every budget holds, (n + 1, classes), and their shares of it."""
    n = sum(sizes)
    group = np.random.default_rng(5).permutation(np.repeat(np.arange(len(sizes)), sizes))
    rank = np.random.default_rng(6).permutation(n)
    found = by_class.interleaved(rank, group, np.zeros(n, np.bool_), "proportional")
    taken = np.zeros((n + 1, len(sizes)))
    order = np.argsort(found)
    taken[np.arange(1, n + 1), group[order]] = 1
    taken = np.cumsum(taken, axis=0)
    return taken, np.arange(n + 1)[:, None] * np.array(sizes) / n


@pytest.mark.parametrize(
    "sizes",
    [
        [1000] + [1] * 1000,
        [20] * 50 + [1000],
        [2] * 300 + [1] * 600,
        [300, 200, 97, 3],
        [7] * 100,
        [500] + [3] * 100 + [2] * 100 + [1] * 100,
    ],
)
def test_large_classes_and_many_tiny_ones_get_their_share_of_every_budget(sizes: list[int]) -> None:
    taken, share = counts_of(sizes)
    assert np.abs(taken - share).max() < 1.5
    # those of one size together, however small they are
    for size in set(sizes):
        alike = np.array(sizes) == size
        off = np.abs(taken[:, alike].sum(axis=1) - share[:, alike].sum(axis=1))
        assert off.max() < len(set(sizes))


def test_one_large_class_among_singletons_gets_its_share_of_the_budget() -> None:
    taken, share = counts_of([1000] + [1] * 1000)
    assert np.abs(taken - share).max() <= 1
    assert taken[200, 0] in (99, 100, 101)
    assert taken[200, 1:].sum() in (99, 100, 101)


def test_classes_of_many_sizes_do_not_round_together() -> None:
    sizes = np.maximum(1, 3000 // np.arange(1, 1500)).tolist()
    taken, share = counts_of(sizes)
    tiny = np.array(sizes) <= 5
    assert np.abs(taken - share).max() < 3
    assert np.abs(taken[:, tiny].sum(axis=1) - share[:, tiny].sum(axis=1)).max() < 8


def test_phases_are_of_the_class_and_no_two_of_one_size_are_near() -> None:
    sizes = np.array([4, 1, 4, 1, 1, 9])
    found = by_class.phases(sizes)
    assert ((found > 0) & (found < 1)).all()
    for size, count in ((4, 2), (1, 3)):
        alike = np.sort(found[sizes == size])
        assert np.diff(alike) == pytest.approx([1 / count] * (count - 1))


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 6),
    st.sampled_from([1, 3, 128]),
    st.integers(0, 2**32),
)
def test_small_classes_compared_together_give_the_results_of_each_alone(
    sizes: list[int], k: int, together: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    rows = rng.integers(-1, 2, (n, 3)).astype(np.float16)  # ties and copies
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    uid = np.sort(rng.choice(10 * n, n, replace=False)).astype(np.uint64)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for limit in (0, together):
            patch.setattr(by_class, "COMPARED_TOGETHER", limit)
            patch.setattr(by_class, "PAIRS", 20)
            results.append(by_class.graph(rows, np.zeros(n, np.uint64), uid, group, k))
    (alone, classes), (found, _) = results
    assert found.neighbors.tolist() == alone.neighbors.tolist()
    assert found.sqdist.tobytes() == alone.sqdist.tobytes()
    assert [one.size for one in classes] == np.bincount(group).tolist()
