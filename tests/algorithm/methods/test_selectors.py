"""Each selection method, compared with a naive implementation in Python."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.graph_strategies import Case, graphs

from d2filter.algorithm import uids
from d2filter.algorithm.methods import baselines, geometric, selectors, submodular
from d2filter.algorithm.methods.pool import Pool
from d2filter.algorithm.methods.selectors import SELECTORS
from d2filter.errors import InputError, UsageError

ONE = 2**32
POWERS = [1, 2, 4, 8, 16, 32]


def make_pool(
    rows: np.ndarray,
    *,
    difficulty: np.ndarray | None = None,
    neighbors: np.ndarray | None = None,
    sqdist: np.ndarray | None = None,
    group: np.ndarray | None = None,
    seed: int = 0,
) -> Pool:
    n = len(rows)
    return Pool(
        hi=np.arange(n, dtype=np.uint64) // np.uint64(3),
        lo=np.arange(n, dtype=np.uint64),
        difficulty=np.zeros(n, np.float32) if difficulty is None else difficulty,
        features=rows,
        neighbors=np.empty((n, 0), np.int64) if neighbors is None else neighbors,
        sqdist=np.empty((n, 0), np.float32) if sqdist is None else sqdist,
        group=group,
        seed=seed,
    )


@st.composite
def pools(draw: st.DrawFn, sizes: list[int] | None = None) -> Pool:
    """Small pools: coarse grids, so that rows repeat and distances tie, or continuous rows."""
    n = draw(st.sampled_from(sizes) if sizes else st.integers(1, 40))
    d = draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["grid", "axes", "same", "continuous"]))
    grid = rng.integers(-2, 3, (n, d)) / 4
    rows = {
        "grid": grid,
        "axes": np.eye(d)[rng.integers(0, d, n)] * rng.choice([-1, 1], (n, 1)),
        "same": np.repeat(grid[:1], n, axis=0),
        "continuous": rng.standard_normal((n, d)),
    }[kind].astype(draw(st.sampled_from([np.float16, np.float32])))
    levels = draw(st.sampled_from([1, 3, 1000]))
    k = draw(st.integers(0, 4))
    neighbors = np.full((n, k), -1, np.int64)
    for i in range(n):
        others = np.delete(np.arange(n), i)
        size = int(rng.integers(0, min(k, n - 1) + 1))
        neighbors[i, :size] = rng.choice(others, size, replace=False)
    sqdist = rng.integers(0, 3, (n, k)).astype(np.float32)
    sqdist[neighbors < 0] = np.inf
    return make_pool(
        rows + rows.dtype.type(0),
        difficulty=(rng.integers(0, levels, n) / levels).astype(np.float32),
        neighbors=neighbors,
        sqdist=sqdist,
        group=draw(st.sampled_from([None, rng.integers(0, 3, n) * 5])),
        seed=draw(st.integers(0, 5)),
    )


def exact(pool: Pool) -> bool:
    """Whether sums of few features and their products are exact in float64."""
    return bool((pool.features * 4 == np.rint(pool.features * 4)).all())


def same_rows(pool: Pool) -> list[bytes]:
    return [row.tobytes() for row in pool.features]


@settings(max_examples=60)
@given(pools())
def test_every_selector_ranks_all_rows_and_changes_nothing(pool: Pool) -> None:
    before = [getattr(pool, f.name).copy() for f in dataclasses.fields(pool)[:6]]
    for name in SELECTORS:
        found = selectors.order(name, pool)
        assert found.dtype == np.int64
        assert sorted(found.tolist()) == list(range(len(pool.hi))), name
        assert found.tolist() == selectors.order(name, pool).tolist(), name
    for field, was in zip(dataclasses.fields(pool)[:6], before, strict=True):
        assert np.array_equal(getattr(pool, field.name), was), field.name


@settings(max_examples=40)
@given(pools(), st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_nothing(pool: Pool, random: Random) -> None:
    n = len(pool.hi)
    shuffle = list(range(n))
    random.shuffle(shuffle)
    place = np.argsort(shuffle)
    hi, lo = pool.hi[shuffle], pool.lo[shuffle]
    lists = np.where(pool.neighbors >= 0, place[pool.neighbors], -1)[shuffle]
    sort = uids.ascending(hi, lo)
    back = np.argsort(sort)
    again = Pool(
        hi=hi[sort],
        lo=lo[sort],
        difficulty=pool.difficulty[shuffle][sort],
        features=np.asfortranarray(pool.features[shuffle][sort]),
        neighbors=np.where(lists >= 0, back[lists], -1)[sort],
        sqdist=pool.sqdist[shuffle][sort],
        group=None if pool.group is None else pool.group[shuffle][sort],
        seed=pool.seed,
    )
    for name in SELECTORS:
        assert selectors.order(name, again).tolist() == selectors.order(name, pool).tolist(), name


# on a graph two samples that only list each other always tie
@pytest.mark.parametrize("name", ["score", "moderate", "k_center", "herding", "semdedup"])
def test_without_ties_uids_decide_nothing(name: str) -> None:
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((60, 12)).astype(np.float32)
    difficulty, group = rng.random(60, np.float32), rng.integers(0, 4, 60)
    shuffle = rng.permutation(60)
    first = selectors.order(name, make_pool(rows, difficulty=difficulty, group=group)).tolist()
    moved = make_pool(rows[shuffle], difficulty=difficulty[shuffle], group=group[shuffle])
    assert shuffle[selectors.order(name, moved)].tolist() == first
    assert first != list(range(60))


def test_random_and_score_are_the_baselines() -> None:
    rng = np.random.default_rng(1)
    pool = make_pool(np.ones((50, 1), np.float16), difficulty=rng.random(50, np.float32), seed=4)
    by_hash = baselines.at_random(pool.hi, pool.lo, seed=4)
    by_score = baselines.by_score(pool.difficulty, pool.hi, pool.lo)
    assert selectors.order("random", pool).tolist() == by_hash.tolist()
    assert selectors.order("score", pool).tolist() == by_score.tolist()


def off_median(pool: Pool) -> list[float]:
    """|r_i − median r| with Python's floats."""
    n = len(pool.hi)
    label = [0] * n if pool.group is None else pool.group.tolist()
    out = [0.0] * n
    for g in set(label):
        rows = [i for i in range(n) if label[i] == g]
        values = [[float(v) for v in pool.features[i]] for i in rows]
        center = [math.fsum(column) / len(rows) for column in zip(*values, strict=True)]
        r = [math.sqrt(math.fsum((v - c) ** 2 for v, c in zip(x, center, strict=True)))
             for x in values]  # fmt: skip
        ranked = sorted(r)
        median = (ranked[(len(r) - 1) // 2] + ranked[len(r) // 2]) / 2
        for i, distance in zip(rows, r, strict=True):
            out[i] = abs(distance - median)
    return out


@settings(max_examples=150)
@given(pools())
def test_moderate_is_the_band_around_the_median(pool: Pool) -> None:
    off = off_median(pool)
    found = geometric.moderate(pool).tolist()
    bits = same_rows(pool)
    for a, b in itertools.pairwise(found):
        assert off[a] <= off[b] + 1e-9
        alike = bits[a] == bits[b] and (pool.group is None or pool.group[a] == pool.group[b])
        assert a < b or not alike, "copies are not in the order of uids"


@settings(max_examples=150)
@given(pools(sizes=POWERS))
def test_moderate_exactly_where_sums_are_exact(pool: Pool) -> None:
    pool = dataclasses.replace(pool, group=None)
    if exact(pool):
        off = off_median(pool)
        expected = sorted(range(len(off)), key=lambda i: (off[i], i))
        assert geometric.moderate(pool).tolist() == expected


def test_moderate_takes_the_median_and_neither_the_nearest_nor_the_extremes() -> None:
    # center 0, distances 1, 2, 2, 3, 3, 5, 5, 1: median 2.5
    rows = np.array([[1], [-2], [2], [3], [-3], [5], [-5], [-1]], np.float32)
    assert geometric.moderate(make_pool(rows)).tolist() == [1, 2, 3, 4, 0, 7, 5, 6]


def allocation(sizes: list[int], budget: int) -> list[int]:
    """The published water filling: smallest stratum first, whole samples."""
    taken, left = [0] * len(sizes), budget
    for done, s in enumerate(sorted(range(len(sizes)), key=lambda s: sizes[s])):
        taken[s] = min(sizes[s], left // (len(sizes) - done))
        left -= taken[s]
    return taken


@settings(max_examples=150)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=120),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.1, 0.3, 0.29, 0.99]),
    st.integers(0, 3),
)
def test_every_prefix_of_ccs_is_the_published_allocation_within_one(
    scores: list[int], strata: int, cut: float, seed: int
) -> None:
    n = len(scores)
    s = np.array(scores, np.float32) / np.float32(7)
    pool = make_pool(np.zeros((n, 1), np.float16), difficulty=s, seed=seed)
    found = selectors.ccs(pool, cut=cut, strata=strata).tolist()
    hard_first = sorted(range(n), key=lambda i: (-s[i], i))
    aside = hard_first[: n * round(cut * 100) // 100]
    left = sorted(set(range(n)) - set(aside))
    assert found[len(left) :] == sorted(aside, key=lambda i: (s[i], i))
    low, high = float(min(s[left])), float(max(s[left]))

    def stratum(i: int) -> int:
        return (
            0 if low == high else min(int((float(s[i]) - low) / (high - low) * strata), strata - 1)
        )

    sizes = [0] * strata
    for i in left:
        sizes[stratum(i)] += 1
    counts = [0] * strata
    for budget in range(1, len(left) + 1):
        counts[stratum(found[budget - 1])] += 1
        published = allocation(sizes, budget)
        assert sum(published) == budget
        assert max(abs(a - b) for a, b in zip(counts, published, strict=True)) <= 1


def test_ccs_draws_inside_a_stratum_by_the_seed() -> None:
    rows = np.zeros((200, 1), np.float16)
    difficulty = (np.arange(200) % 2).astype(np.float32)
    first, second = (
        selectors.ccs(make_pool(rows, difficulty=difficulty, seed=seed)).tolist() for seed in (0, 1)
    )
    assert first != second
    odd = [i for i in first if i % 2]
    assert odd != sorted(odd)
    # half of it from each of the two strata that are not empty
    assert sum(i % 2 for i in first[:100]) == 50


@pytest.mark.parametrize(("cut", "strata"), [(1.0, 50), (-0.1, 50), (float("nan"), 50), (0.5, 0)])
def test_ccs_refuses_impossible_options(cut: float, strata: int) -> None:
    with pytest.raises(UsageError, match="allowed is"):
        selectors.ccs(make_pool(np.zeros((3, 1), np.float16)), cut=cut, strata=strata)


@settings(max_examples=150)
@given(pools())
def test_k_center_is_the_farthest_first_traversal(pool: Pool) -> None:
    rows = [[float(v) for v in row] for row in pool.features]
    n = len(rows)

    def sqdist(x: list[float], y: list[float]) -> np.float32:
        return np.float32(math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)))

    mean = [math.fsum(column) / n for column in zip(*rows, strict=True)]
    expected = [min(range(n), key=lambda i: (sqdist(rows[i], mean), i))]
    while len(expected) < n:
        left = [i for i in range(n) if i not in expected]
        expected.append(
            min(left, key=lambda i: (-min(sqdist(rows[i], rows[j]) for j in expected), i))
        )
    assert geometric.k_center(pool).tolist() == expected


def unit(pool: Pool) -> list[list[float]]:
    out = []
    for row in pool.features:
        norm = math.sqrt(math.fsum(float(v) ** 2 for v in row)) or 1.0
        out.append([float(np.float32(float(v) / norm)) for v in row])
    return out


def herd(phi: list[list[float]], choose: Callable[[list[float], list[int]], int]) -> list[int]:
    """w ← w + μ − φ, with whatever `choose` takes from the products of the rows left."""
    n = len(phi)
    mean = [math.fsum(column) / n for column in zip(*phi, strict=True)]
    w, left, out = list(mean), list(range(n)), []
    while left:
        chosen = choose(
            [math.fsum(a * b for a, b in zip(w, phi[i], strict=True)) for i in left], left
        )
        out.append(chosen)
        left.remove(chosen)
        w = [a + m - v for a, m, v in zip(w, mean, phi[chosen], strict=True)]
    return out


@settings(max_examples=150)
@given(pools())
def test_herding_always_takes_a_best_product(pool: Pool) -> None:
    found = geometric.herding(pool).tolist()
    bits = same_rows(pool)
    steps = iter(found)

    def follow(products: list[float], left: list[int]) -> int:
        chosen = next(steps)
        assert products[left.index(chosen)] >= max(products) - 1e-9
        assert chosen == min(i for i in left if bits[i] == bits[chosen])
        return chosen

    assert herd(unit(pool), follow) == found


@settings(max_examples=100)
@given(pools(sizes=POWERS))
def test_herding_exactly_where_sums_are_exact(pool: Pool) -> None:
    phi = unit(pool)
    if all(v in (-1.0, 0.0, 1.0) for row in phi for v in row):
        best = herd(phi, lambda products, left: left[products.index(max(products))])
        assert geometric.herding(pool).tolist() == best


def similarities(neighbors: np.ndarray, sqdist: np.ndarray) -> list[dict[int, int]]:
    w: list[dict[int, int]] = [{i: ONE} for i in range(len(neighbors))]
    for i, row in enumerate(neighbors.tolist()):
        for c, j in enumerate(row):
            if j >= 0:
                value = round(oracle.weight(sqdist[i, c], 1.0) * ONE)
                w[i][j] = w[j][i] = max(value, w[i].get(j, 0))
    return w


def greedy(n: int, gain: Callable[[list[int], int], int], *, stop: bool) -> list[int]:
    out: list[int] = []
    while len(out) < n:
        gains = {j: gain(out, j) for j in range(n) if j not in out}
        best = min(gains, key=lambda j: (-gains[j], j))
        if stop and gains[best] == 0:
            break
        out.append(best)
    return out


def facility(w: list[dict[int, int]], chosen: list[int]) -> int:
    return sum(max((row.get(j, 0) for j in chosen), default=0) for row in w)


@settings(max_examples=100)
@given(graphs(largest=20))
def test_facility_location_is_the_plain_greedy(case: Case) -> None:
    n = len(case.uid)
    w = similarities(case.neighbors, case.sqdist)
    difficulty = (case.x % 5).astype(np.float32)
    expected = greedy(n, lambda s, j: facility(w, [*s, j]) - facility(w, s), stop=True)
    rest = [i for i in range(n) if i not in expected]
    expected += sorted(rest, key=lambda i: (-difficulty[i], i))
    found = submodular.facility_location(difficulty, case.neighbors, case.sqdist)
    assert found.tolist() == expected


def cut_value(w: list[dict[int, int]], chosen: list[int], relevance: int) -> int:
    near = sum(w[j][i] for j in chosen for i in w[j])
    return relevance * near - sum(w[j].get(i, 0) for j in chosen for i in chosen)


@settings(max_examples=100)
@given(graphs(largest=20), st.sampled_from([1, 2, 3, 16]))
def test_graph_cut_is_the_plain_greedy(case: Case, relevance: int) -> None:
    w = similarities(case.neighbors, case.sqdist)
    expected = greedy(
        len(case.uid),
        lambda s, j: cut_value(w, [*s, j], relevance) - cut_value(w, s, relevance),
        stop=False,
    )
    found = submodular.graph_cut(case.neighbors, case.sqdist, relevance=relevance)
    assert found.tolist() == expected
    if relevance == 2:
        assert submodular.graph_cut(case.neighbors, case.sqdist).tolist() == expected


@settings(max_examples=50)
@given(graphs())
def test_row_numbers_may_be_narrow_and_arrays_read_only(case: Case) -> None:
    narrow, frozen = case.neighbors.astype(np.int32), case.sqdist.copy()
    frozen.flags.writeable = False
    difficulty = (case.x % 5).astype(np.float32)
    wide = submodular.facility_location(difficulty, case.neighbors, case.sqdist)
    assert submodular.facility_location(difficulty, narrow, frozen).tolist() == wide.tolist()


@pytest.mark.parametrize("relevance", [0, 17])
def test_graph_cut_refuses_impossible_options(relevance: int) -> None:
    with pytest.raises(UsageError, match=f"relevance is {relevance}, allowed is 1 to 16"):
        submodular.graph_cut(
            np.empty((2, 0), np.int64), np.empty((2, 0), np.float32), relevance=relevance
        )


def test_copies_come_last_in_facility_location_best_first() -> None:
    # two pairs of copies and one alone; row 4 is a more difficult copy than row 2
    neighbors = np.array([[2], [4], [0], [-1], [1]], np.int64)
    sqdist = np.array([[0], [0], [0], [np.inf], [0]], np.float32)
    difficulty = np.array([0, 0, 1, 0, 2], np.float32)
    found = submodular.facility_location(difficulty, neighbors, sqdist)
    assert found.tolist() == [0, 1, 3, 4, 2]


def cosine(x: list[float], y: list[float]) -> np.float32:
    product = math.fsum(a * b for a, b in zip(x, y, strict=True))
    norms = math.fsum(a * a for a in x) * math.fsum(b * b for b in y)
    return np.float32(product / math.sqrt(norms) if norms > 0 else 0.0)


def least_alike_first(rows: np.ndarray, cell: list[int], centroids: np.ndarray) -> list[int]:
    values = [[float(v) for v in row] for row in rows]
    centers = [[float(v) for v in row] for row in centroids]
    bits = [row.tobytes() for row in rows]
    n = len(rows)
    key = [(cosine(values[i], centers[cell[i]]), i) for i in range(n)]
    largest = []
    for i in range(n):
        earlier = [j for j in range(n) if cell[j] == cell[i] and key[j] < key[i]]
        alike = [1.0 if bits[i] == bits[j] else cosine(values[i], values[j]) for j in earlier]
        largest.append(max(alike, default=np.float32(-1)))
    return sorted(range(n), key=lambda i: (largest[i], i))


@settings(max_examples=150)
@given(pools(), st.integers(1, 4), st.sampled_from([2, 3, 4096]), st.integers(0, 99))
def test_least_alike_first_in_tiles_of_any_size(pool: Pool, c: int, tile: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers: dict[bytes, int] = {}
    cell = [numbers.setdefault(bits, int(rng.integers(0, c))) for bits in same_rows(pool)]
    centroids = (rng.integers(-2, 3, (c, pool.features.shape[1])) / 2).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometric, "TILE", tile)
        found = geometric.least_alike_first(pool.features, np.array(cell), centroids)
    assert found.tolist() == least_alike_first(pool.features, cell, centroids)


def test_semdedup_of_one_cluster_is_around_the_normalized_mean() -> None:
    for seed in range(5):
        rows = np.random.default_rng(seed).standard_normal((40, 8)).astype(np.float32) + 0.5
        center = np.mean(unit(make_pool(rows)), axis=0)[None].astype(np.float32)
        found = selectors.order("semdedup", make_pool(rows, seed=seed)).tolist()
        assert found == least_alike_first(rows, [0] * 40, center)


def test_semdedup_trains_on_256_rows_a_cluster_by_a_hash() -> None:
    rows = np.random.default_rng(2).standard_normal((300, 3)).astype(np.float32)
    for seed in (0, 1):
        pool = make_pool(rows, seed=seed)
        key = uids.hashed(pool.hi, pool.lo, salt=7, seed=seed)
        center = np.mean(np.array(unit(pool))[np.argsort(key)[:256]], axis=0)
        expected = least_alike_first(rows, [0] * 300, center[None].astype(np.float32))
        assert geometric.semdedup(pool).tolist() == expected


def test_semdedup_keeps_one_of_each_group_of_copies_in_many_clusters() -> None:
    rng = np.random.default_rng(3)
    distinct = rng.standard_normal((300, 16)).astype(np.float16)
    source = np.concatenate([np.arange(300), rng.integers(0, 300, 400)])
    rng.shuffle(source)
    pool = make_pool(distinct[source])
    found = geometric.semdedup(pool, rows_a_cluster=30)
    # the first of every group, wherever its cluster is; then copies by uid
    assert sorted(source[found[:300]].tolist()) == list(range(300))
    assert found[300:].tolist() == sorted(found[300:].tolist())
    kept = set(found[:300].tolist())
    assert all(min(np.flatnonzero(source == source[i])) in kept for i in range(700))
    # rows are compared within clusters only
    assert found.tolist() != geometric.semdedup(pool).tolist()
    assert found.tolist() != geometric.semdedup(
        dataclasses.replace(pool, seed=1), rows_a_cluster=30
    ).tolist()  # fmt: skip


def test_semdedup_compares_within_the_cluster_that_k_means_finds() -> None:
    rng = np.random.default_rng(5)
    axes = np.eye(12)[rng.integers(0, 3, 90)]
    rows = (axes + 0.02 * rng.standard_normal((90, 12))).astype(np.float32)
    # cosines know no length, distances do
    rows *= rng.choice([1e-4, 1.0], (90, 1)).astype(np.float32)
    cell = rows.argmax(axis=1).tolist()
    phi = np.array(unit(make_pool(rows)))
    centers = np.array([phi[np.array(cell) == c].mean(axis=0) for c in range(3)], np.float32)
    # with a seed that starts in all three groups k-means ends at their means
    expected = least_alike_first(rows, cell, centers)
    found = [
        geometric.semdedup(make_pool(rows, seed=seed), rows_a_cluster=30).tolist()
        for seed in range(8)
    ]
    assert expected in found


def test_semdedup_refuses_empty_clusters() -> None:
    with pytest.raises(UsageError, match="rows_a_cluster is 0"):
        geometric.semdedup(make_pool(np.ones((2, 1), np.float16)), rows_a_cluster=0)


@pytest.mark.parametrize("name", SELECTORS)
def test_one_sample_and_identical_samples_are_ranked(name: str) -> None:
    assert selectors.order(name, make_pool(np.ones((1, 3), np.float16))).tolist() == [0]
    found = selectors.order(name, make_pool(np.ones((9, 3), np.float32))).tolist()
    assert sorted(found) == list(range(9))
    if name not in ("random", "ccs"):
        assert found == list(range(9))


@pytest.mark.parametrize("name", SELECTORS)
def test_a_pool_beyond_the_limit_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = SELECTORS[name]
    assert chosen.name == name
    assert chosen.wants <= {"features", "neighbors"}
    monkeypatch.setitem(SELECTORS, name, dataclasses.replace(chosen, most=3))
    selectors.order(name, make_pool(np.ones((3, 1), np.float16)))
    with pytest.raises(UsageError) as caught:
        selectors.order(name, make_pool(np.ones((4, 1), np.float16)))
    message = str(caught.value)
    assert "up to 3 samples and the pool has 4: use " + chosen.instead in message
    assert name in message
    assert "\n" not in message


def test_the_limits_of_quadratic_methods_are_real() -> None:
    for name, most in (("k_center", 50_000), ("herding", 20_000)):
        with pytest.raises(UsageError, match=f"selector {name} is practical up to {most:,}"):
            selectors.order(name, make_pool(np.ones((most + 1, 1), np.float16)))


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(UsageError) as caught:
        selectors.order("best", make_pool(np.ones((1, 1), np.float16)))
    assert "'best'" in str(caught.value)
    assert all(name in str(caught.value) for name in SELECTORS)


@pytest.mark.parametrize("name", SELECTORS)
def test_features_are_read_only_for_methods_that_use_them(name: str) -> None:
    pool = make_pool(np.empty((5, 0), np.float16))
    if "features" in SELECTORS[name].wants:
        with pytest.raises(UsageError, match=f"selector {name} needs features"):
            selectors.order(name, pool)
    else:
        assert len(selectors.order(name, pool)) == 5


def test_a_pool_ascends_by_uid_and_has_arrays_of_one_length() -> None:
    pool = make_pool(np.ones((6, 2), np.float16))
    lo = pool.lo.copy()
    lo[4] = lo[3]
    with pytest.raises(InputError, match="uid of row 4 "):
        dataclasses.replace(pool, lo=lo)
    with pytest.raises(InputError, match="uid of row 3 "):
        dataclasses.replace(pool, hi=pool.hi[::-1].copy())
    with pytest.raises(InputError, match="one length"):
        dataclasses.replace(pool, sqdist=pool.sqdist[:5])
    with pytest.raises(InputError, match="one length"):
        dataclasses.replace(pool, group=np.zeros(7, np.int64))
    with pytest.raises(InputError, match="one length"):
        make_pool(np.ones((0, 2), np.float16))
