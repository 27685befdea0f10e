"""Measures of distinct groups, each compared with its definition."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2filter.algorithm.greedy import demoted
from d2filter.algorithm.measures import coverage, distinct


def pool(seed: int, n: int, k: int) -> dict[str, np.ndarray]:
    """Rows on a coarse grid, so that many are equal, with their true lists; difficulties tie."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 3, (n, 2)).astype(np.float16)
    wide = rows.astype(np.float64)
    far = np.square(wide[:, None] - wide[None]).sum(axis=2)
    np.fill_diagonal(far, np.inf)
    lists = np.argsort(far, axis=1, kind="stable")[:, :k]
    sqdist = np.take_along_axis(far, lists, axis=1).astype(np.float32)
    dropped = rng.random(lists.shape) < 0.2
    return {
        "rows": rows,
        "hi": np.zeros(n, np.uint64),
        "lo": rng.permutation(n).astype(np.uint64),
        "difficulty": rng.integers(0, 3, n).astype(np.float32),
        "neighbors": np.where(dropped | ~np.isfinite(sqdist), -1, lists),
        "sqdist": np.where(dropped, np.inf, sqdist).astype(np.float32),
    }


def spread_groups(p: dict[str, np.ndarray], near: float) -> list[int]:
    """The smallest row of each sample's group, by passing it on until nothing changes."""
    group = list(range(len(p["lo"])))
    changed = True
    while changed:
        changed = False
        for i, (row, far) in enumerate(zip(p["neighbors"], p["sqdist"], strict=True)):
            for j, d in zip(row.tolist(), far.tolist(), strict=True):
                if j >= 0 and d <= near and group[i] != group[j]:
                    group[i] = group[j] = min(group[i], group[j])
                    changed = True
    return group


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32), n=st.integers(2, 40), k=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.3, 1.0]), watched=st.sampled_from([3, 100]),
    through=st.sampled_from([1, 256]),
)  # fmt: skip
def test_the_measures_are_those_of_their_definitions(
    seed: int, n: int, k: int, share: float, watched: int, through: int
) -> None:
    k = min(k, n - 1)
    p = pool(seed, n, k)
    kept = np.random.default_rng(seed + 1).random(n) < share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "LOOKED_THROUGH", through)
        patch.setattr(coverage, "BLOCK", 7)
        stick = distinct.Yardstick(**p, watched=watched)
        found = stick.measure(kept)
        distances = stick.distances(kept)
    above = sorted(p["sqdist"][(p["sqdist"] > 0) & np.isfinite(p["sqdist"])].tolist())
    unit = above[(len(above) - 1) // 2] if above else 1.0
    assert stick.unit == unit == demoted.unit(p["sqdist"])
    near = float(np.float32(0.1 * unit))
    group = spread_groups(p, near)
    leads = {}
    for i in sorted(range(n), key=lambda i: (-p["difficulty"][i], p["lo"][i])):
        leads.setdefault(group[i], i)
    assert sorted(stick.groups.representative.tolist()) == sorted(leads.values())
    covered = {g for g, one in zip(group, kept, strict=True) if one}
    assert found.groups == pytest.approx(len(covered) / len(leads))
    wide = p["rows"].astype(np.float64)
    expected = {}
    for g, lead in leads.items():
        ways = [float(np.linalg.norm(wide[lead] - wide[j])) for j in np.flatnonzero(kept)]
        expected[lead] = 0.0 if g in covered else min(ways, default=math.inf)
    assert distances.size == min(watched, len(leads))
    if watched >= len(leads):
        assert sorted(distances.tolist()) == pytest.approx(sorted(expected.values()), abs=1e-6)
        close = [math.exp(-d * d / unit) for d in expected.values()]
        assert found.coverage == pytest.approx(np.mean(close), abs=1e-6)
    copies, effective = [], []
    for i in np.flatnonzero(kept):
        mine = [
            d for j, d in zip(p["neighbors"][i], p["sqdist"][i], strict=True) if j >= 0 and kept[j]
        ]
        copies.append(any(d <= near for d in mine))
        effective.append(1 / (1 + sum(math.exp(-d / unit) for d in mine)))
    assert found.copies == (np.mean(copies) if copies else 0.0)
    if effective:
        assert found.effective == pytest.approx(np.mean(effective), rel=1e-6)
    else:
        assert math.isnan(found.effective)


@given(st.integers(0, 2**32))
def test_the_order_of_rows_changes_nothing(seed: int) -> None:
    p = pool(seed, 30, 3)
    turn = np.random.default_rng(seed).permutation(30)
    place = np.argsort(turn)
    turned = {name: values[turn] for name, values in p.items()}
    turned["neighbors"] = np.where(turned["neighbors"] >= 0, place[turned["neighbors"]], -1)
    kept = p["lo"] % 3 == 0
    one = distinct.Yardstick(**p, watched=8).measure(kept)
    other = distinct.Yardstick(**turned, watched=8).measure(kept[turn])
    assert asdict(one) == pytest.approx(asdict(other), rel=1e-12)


def test_copies_buy_no_coverage() -> None:
    """A third of the pool is one picture: a random choice, or all of them, covers less than one of
    each kind, whatever AUCpr makes of it.
    """
    rng = np.random.default_rng(0)
    single = rng.normal(size=(200, 8))
    rows = np.concatenate([single, np.repeat(single[:1], 99, axis=0)])
    rows[200:] += 1e-3 * rng.normal(size=(99, 8))
    rows = rows.astype(np.float16)
    n, k = len(rows), 5
    wide = rows.astype(np.float64)
    far = np.square(wide[:, None] - wide[None]).sum(axis=2)
    np.fill_diagonal(far, np.inf)
    lists = np.argsort(far, axis=1)[:, :k]
    hi, lo = np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64)
    stick = distinct.Yardstick(
        rows, hi, lo, np.zeros(n, np.float32), lists,
        np.take_along_axis(far, lists, axis=1).astype(np.float32), watched=1000,
    )  # fmt: skip
    one_of_each, at_random, only_copies = (np.zeros(n, np.bool_) for _ in range(3))
    one_of_each[:100] = True
    at_random[rng.permutation(n)[:100]] = True
    only_copies[200:] = True
    best, usual, worst = (stick.measure(m) for m in (one_of_each, at_random, only_copies))
    assert best.coverage > usual.coverage > worst.coverage
    assert best.groups > usual.groups > worst.groups
    assert best.copies == 0 < usual.copies < worst.copies == 1
    assert min(best.effective, usual.effective) > 2 * worst.effective
