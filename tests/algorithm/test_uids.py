"""The order and search of uids, exact budgets, and that algorithm/ imports no Ray and no files."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.algorithm import budget, uids
from d2filter.algorithm.methods import baselines
from d2filter.algorithm.scores import registry as scores
from d2filter.errors import UsageError

HALF = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([p[0] for p in pairs], np.uint64),
        np.array([p[1] for p in pairs], np.uint64),
    )


@given(st.lists(st.tuples(HALF, HALF), min_size=1, max_size=40, unique=True), st.integers(0, 50))
def test_a_hash_sample_depends_on_the_set_alone(pairs: list[tuple[int, int]], size: int) -> None:
    hi, lo = arrays(pairs)
    chosen = uids.hash_sample(hi, lo, size, salt=uids.SALT_MEASURE, seed=5)
    picked = [pairs[i] for i in chosen]
    assert picked == sorted(picked)
    assert len(picked) == min(size, len(pairs))
    turned = list(reversed(pairs))
    hi, lo = arrays(turned)
    again = uids.hash_sample(hi, lo, size, salt=uids.SALT_MEASURE, seed=5)
    assert [turned[i] for i in again] == picked


@given(
    st.lists(st.tuples(HALF, HALF), max_size=40, unique=True),
    st.lists(st.tuples(HALF, HALF), max_size=20),
)
def test_positions_finds_existing_uids(
    pairs: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    pairs = sorted(pairs)
    wanted = wanted + pairs[::2]
    got = uids.positions(*arrays(pairs), *arrays(wanted))
    assert got.tolist() == [pairs.index(w) if w in pairs else -1 for w in wanted]


def test_salts_and_seeds_are_independent() -> None:
    hi, lo = arrays([(0, i) for i in range(2000)])
    picks = [
        set(uids.hash_sample(hi, lo, 500, salt=salt, seed=seed).tolist())
        for salt, seed in ((1, 0), (2, 0), (1, 1))
    ]
    for a in range(3):
        for b in range(a):
            assert 70 < len(picks[a] & picks[b]) < 180  # 125 expected


@pytest.mark.parametrize("value", ["0", "-0.1", "1.0001", "nan", "inf", "a third", ""])
def test_fractions_outside_the_range_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match="fraction is"):
        budget.parse_fraction(value)


@given(st.integers(1000, 10**12), st.integers(1, 1000))
def test_budgets_are_exact_decimals(ranked: int, thousandths: int) -> None:
    fraction = budget.parse_fraction(f"{thousandths / 1000}")
    assert budget.budget_of(ranked, fraction=fraction) == ranked * thousandths // 1000


def test_long_fractions_are_not_rounded() -> None:
    nines = budget.parse_fraction("0." + "9" * 40)
    assert budget.budget_of(10**12, fraction=nines) == 10**12 - 1


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fraction 0.001 of 600 ranked samples is less than one"):
        budget.budget_of(600, fraction=budget.parse_fraction("0.001"))


def test_a_float_means_its_printed_decimal() -> None:
    # 0.29 · 100 is 28.999999999999996 in floating point
    assert budget.budget_of(100, fraction=budget.parse_fraction(0.29)) == 29
    assert budget.parse_fraction(0.1) == Decimal("0.1")


def test_min_score_works_within_the_budget() -> None:
    rank = np.array([0, 1, 2, 3])
    difficulty = np.array([0.5, 0.1, 0.9, 0.9], np.float32)
    assert budget.kept_mask(rank, difficulty, 3, 0.2).tolist() == [True, False, True, False]
    # 0.9 has no float32: the score that was stored for it is still not below it
    assert budget.kept_mask(rank, difficulty, 3, 0.9).tolist() == [False, False, True, False]


def test_baselines_are_permutations_with_ties_by_uid() -> None:
    hi, lo = arrays([(1, 5), (0, 9), (1, 4)])
    difficulty = np.array([2, 2, 2], np.float32)
    assert baselines.by_score(difficulty, hi, lo).tolist() == [1, 2, 0]
    shuffled = baselines.at_random(hi, lo, seed=3).tolist()
    assert sorted(shuffled) == [0, 1, 2]


def test_clip_score_is_the_cosine() -> None:
    a = np.array([[1, 0], [1, 1], [0, 0]], np.float16)
    b = np.array([[2, 0], [1, 0], [1, 0]], np.float16)
    got = scores.clip_score(a, b)
    assert got[:2].tolist() == [1.0, np.float32(0.5**0.5)]
    assert np.isnan(got[2])


def test_the_algorithms_know_no_ray_no_files_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'torch', 'fsspec', 'pyarrow', 'open_clip'): sys.modules[name] = None\n"
        "import pkgutil, importlib, d2filter.algorithm as a\n"
        "names = [m.name for m in pkgutil.walk_packages(a.__path__, 'd2filter.algorithm.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 40
