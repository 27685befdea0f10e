"""The self-check: which captions are swapped, and how the graph changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2filter.algorithm import features
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.measures import selfcheck
from d2filter.algorithm.scores import registry as scores


def pool(seed: int, n: int, k: int, copies: float = 0.0) -> dict[str, np.ndarray]:
    """Pairs of one model with their exact graph, ascending by uid."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, 4))
    text = image + 0.5 * rng.normal(size=(n, 4))
    same = rng.random(n) < copies
    source = rng.integers(0, n, n)
    image[same], text[same] = image[source[same]], text[source[same]]
    rows = features.fix([image.astype(np.float32), text.astype(np.float32)])
    hi = np.zeros(n, np.uint64)
    lo = np.sort(rng.choice(10**6, n, False)).astype(np.uint64)
    found, _ = knn.build(knn.make_pool(rows, hi, lo), k)
    return {
        "rows": rows, "hi": hi, "lo": lo, "neighbors": found.neighbors, "sqdist": found.sqdist,
        "difficulty": scores.clip_score(image, text),
    }  # fmt: skip


def splice(
    p: dict[str, np.ndarray], swapped: np.ndarray, partner: np.ndarray, line: selfcheck.Line
):
    return selfcheck.splice(
        p["rows"], p["difficulty"], p["neighbors"], p["sqdist"], swapped, partner, line
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(20, 120), k=st.integers(1, 5))
def test_the_graph_is_that_of_the_spliced_pool(seed: int, n: int, k: int) -> None:
    """Against an exact search of it, but for what a list that lost one cannot know."""
    k = min(k, n - 1)
    p = pool(seed, n, k, copies=0.3)
    before = {name: values.copy() for name, values in p.items()}
    swapped, partner = selfcheck.choose(p["rows"], p["hi"], p["lo"], 0.0)
    if not swapped.size:
        return
    line = selfcheck.fit(selfcheck.cosines(p["rows"]), p["difficulty"])
    found = splice(p, swapped, partner, line)
    for name, values in before.items():
        np.testing.assert_array_equal(p[name], values)
    half = p["rows"].shape[1] // 2
    np.testing.assert_array_equal(found.rows[swapped, :half], p["rows"][swapped, :half])
    np.testing.assert_array_equal(found.rows[swapped, half:], p["rows"][partner, half:])
    others = np.setdiff1d(np.arange(n), swapped)
    np.testing.assert_array_equal(found.rows[others], p["rows"][others])
    np.testing.assert_array_equal(found.difficulty[others], p["difficulty"][others])
    truth, _ = knn.build(knn.make_pool(found.rows, p["hi"], p["lo"]), k)
    np.testing.assert_array_equal(found.neighbors[swapped], truth.neighbors[swapped])
    np.testing.assert_array_equal(found.sqdist[swapped], truth.sqdist[swapped])
    for row in others.tolist():
        mine = found.neighbors[row][found.neighbors[row] >= 0].tolist()
        known = set(p["neighbors"][row].tolist()) | set(swapped.tolist())
        # in the true order of nearness, what its old list and the swapped ones tell
        expected = [j for j in truth.neighbors[row].tolist() if j in known and j >= 0]
        assert mine[: len(expected)] == expected
        assert np.isinf(found.sqdist[row][len(mine) :]).all()
        lost = np.isin(p["neighbors"][row], swapped).sum()
        assert len(mine) >= min(k, n - 1) - lost


@given(seed=st.integers(0, 2**32), n=st.integers(2, 200))
def test_who_is_swapped_depends_on_uids_alone_and_gets_another_text(seed: int, n: int) -> None:
    p = pool(seed, n, 1, copies=0.5)
    swapped, partner = selfcheck.choose(p["rows"], p["hi"], p["lo"], 0.01)
    assert (np.diff(swapped) > 0).all()
    assert np.unique(partner).size == partner.size <= n // 10
    wide = p["rows"].astype(np.float64)
    for a, b in zip(swapped.tolist(), partner.tolist(), strict=True):
        assert np.square(wide[a, 4:] - wide[b, 4:]).sum() > 0.01
        assert np.square(wide[a, :4] - wide[b, :4]).sum() > 0.01


def test_the_size_of_a_sample_is_one_percent_within_bounds() -> None:
    def count(n: int) -> int:
        lo = np.arange(n, dtype=np.uint64)
        rows = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float16)
        return int(selfcheck.choose(rows, np.zeros(n, np.uint64), lo, 0.0)[0].size)

    assert count(100) == 10
    assert count(2_000) == 200
    assert count(10_000) == 300
    assert count(50_000) == 500
    assert count(400_000) == 3_000


def test_scores_of_the_swapped_follow_the_line_within_the_pools_range() -> None:
    p = pool(1, 500, 3)
    p["difficulty"] = (7 - 2 * selfcheck.cosines(p["rows"])).astype(np.float32)  # low is kept first
    line = selfcheck.fit(selfcheck.cosines(p["rows"]), p["difficulty"])
    assert (line.slope, line.intercept) == pytest.approx((-2, 7), abs=1e-5)
    assert line.correlation == pytest.approx(-1)
    swapped, partner = selfcheck.choose(p["rows"], p["hi"], p["lo"], 0.0)
    found = splice(p, swapped, partner, line)
    wide = found.rows[swapped].astype(np.float64)
    cosine = (wide[:, :4] * wide[:, 4:]).sum(axis=1)
    expected = np.clip(7 - 2 * cosine, p["difficulty"].min(), p["difficulty"].max())
    np.testing.assert_allclose(found.difficulty[swapped], expected, atol=2e-3)


def test_a_score_that_is_no_cosine_has_no_line() -> None:
    p = pool(2, 300, 1)
    cosine = selfcheck.cosines(p["rows"])
    noise = np.random.default_rng(0).normal(size=300).astype(np.float32)
    assert abs(selfcheck.fit(cosine, noise).correlation) < 0.3
    assert selfcheck.fit(cosine, np.ones(300, np.float32)).correlation == 0


def test_the_score_drops_swapped_captions_and_random_does_not() -> None:
    p = pool(3, 1000, 5)
    line = selfcheck.fit(selfcheck.cosines(p["rows"]), p["difficulty"])
    swapped, partner = selfcheck.choose(p["rows"], p["hi"], p["lo"], 0.0)
    found = splice(p, swapped, partner, line)
    by_score = selfcheck.rank_by_score(found.difficulty, p["hi"], p["lo"])
    at_random = np.random.default_rng(0).permutation(1000)
    best, usual = (selfcheck.rate(rank, swapped, 300) for rank in (by_score, at_random))
    assert best.kept < 0.1
    assert usual.low < 0.3 < usual.high


@given(st.integers(1, 5000), st.data())
def test_the_interval_holds_the_shares_that_are_not_refuted(of: int, data: st.DataObject) -> None:
    """Wilson's ends are where the share is 1.96 standard deviations away."""
    hits = data.draw(st.integers(0, of))
    low, high = selfcheck.wilson(hits, of)
    assert 0 <= low <= hits / of <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            away = abs(hits / of - end) / (end * (1 - end) / of) ** 0.5
            assert away == pytest.approx(1.959964, rel=1e-5)
