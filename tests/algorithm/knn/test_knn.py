"""The neighbor search in memory: exact pools, cells, calibration, refinement, measured recall."""

from __future__ import annotations

import numpy as np
import pytest
from support import oracle

from d2filter.algorithm import features
from d2filter.algorithm.knn import calibrate, cells, products, refine, sketch
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.knn.exact_lists import Lists


def pool(n: int, d: int, seed: int = 0, clusters: int = 12, noise: float = 0.5) -> knn.Pool:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(clusters, d))
    rows = features.fix([centers[rng.integers(0, clusters, n)] + noise * rng.normal(size=(n, d))])
    return pooled(rows)


def pooled(rows: np.ndarray) -> knn.Pool:
    rng = np.random.default_rng(99)
    hi = np.sort(rng.integers(0, 2**63, len(rows)).astype(np.uint64))
    return knn.make_pool(rows, hi, np.zeros(len(rows), np.uint64))


def same(a: knn.Graph, b: knn.Graph) -> bool:
    return bool((a.neighbors == b.neighbors).all() and (a.sqdist == b.sqdist).all())


def test_a_small_pool_is_compared_all_with_all() -> None:
    p = pool(300, 6)
    graph, index = knn.build(p, 4)
    assert index.trained.cells.count == 1
    neighbors, sqdist = oracle.knn(p.rows, list(range(300)), 4)
    assert graph.neighbors.tolist() == neighbors
    assert graph.sqdist.tolist() == sqdist


@pytest.mark.parametrize("target", [0.8, 0.95])
def test_calibration_reaches_its_prediction_and_the_recall_is_measured_correctly(
    target: float,
) -> None:
    n, k = 12_000, 5
    p = pool(n, 16, clusters=200)
    graph, index = knn.build(p, k, target_recall=target, exact_below=100)
    assert index.trained.cells.count > 100
    assert index.choice.reached
    measured = knn.measure_recall(p, graph)
    real = knn.exact_neighbors(p, np.arange(n), k).share_in(graph.neighbors).mean()
    assert measured.value >= target
    assert measured.queries == 3000
    assert measured.low <= real <= measured.high
    # what was predicted on 1,000 samples is what came out
    assert abs(index.choice.predicted - real) < 0.02


def test_threads_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p = pool(9000, 24, clusters=150)
    whole, index = knn.build(p, 3, target_recall=0.9, exact_below=10)
    try:
        products.use_threads(1)
        monkeypatch.setattr(cells, "BLOCK", 777)
        monkeypatch.setattr(refine, "BLOCK", 555)
        monkeypatch.setattr(products, "QUERIES", 99)
        again, its_index = knn.build(p, 3, target_recall=0.9, exact_below=10)
    finally:
        products.use_threads(2)
    assert (index.trained.cells.centroids == its_index.trained.cells.centroids).all()
    assert index.choice == its_index.choice
    assert same(whole, again)


def test_an_unclustered_pool_is_searched_exactly_when_cells_would_not_help() -> None:
    p = pooled(features.fix([np.random.default_rng(0).normal(size=(2000, 64))]))
    _, index = knn.build(p, 5, target_recall=0.99, exact_below=100)
    assert index.trained.cells.count == 1


def test_a_large_pool_is_never_compared_all_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond EXACT_UP_TO the best that cells can do is kept, and said to fall short."""
    monkeypatch.setattr(calibrate, "EXACT_UP_TO", 1000)
    p = pooled(features.fix([np.random.default_rng(0).normal(size=(6000, 64))]))
    _, index = knn.build(p, 5, target_recall=1.0, exact_below=100)
    assert index.trained.cells.count > 1
    assert not index.choice.reached


@pytest.mark.parametrize("equal", [1.0, 0.9, 0.5])
def test_thousands_of_copies_are_searched_in_time(equal: float) -> None:
    """Each copy gets k other copies, round the ring; all rows equal is one cell."""
    n, k = 6000, 3
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(n, 12)) + 5 * rng.normal(size=(40, 12))[rng.integers(0, 40, n)]
    wide[rng.random(n) < equal] = wide[0]
    p = pooled(features.fix([wide]))
    graph, _ = knn.build(p, k, exact_below=100, target_recall=0.9)
    copies = features.group_copies(p.rows)
    members = np.flatnonzero(copies.group == np.argmax(np.bincount(copies.group)))
    at = np.arange(members.size)[:, None] + np.arange(1, k + 1)
    assert members.size > n * equal * 0.9
    assert (graph.neighbors[members] == members[at % members.size]).all()
    assert (graph.sqdist[members] == 0).all()


def test_more_neighbors_than_rows_give_shorter_lists() -> None:
    p = pool(40, 5)
    graph, _ = knn.build(p, 60, exact_below=0)
    assert ((graph.neighbors >= 0).sum(axis=1) == 39).all()


def test_rows_whose_cells_hold_too_few_are_compared_with_all() -> None:
    """A far group of three rows in cells of its own: with k=5 they need rows from elsewhere."""
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(5000, 8)) + 6 * rng.normal(size=(60, 8))[rng.integers(0, 60, 5000)]
    wide[:3] = -300 + rng.normal(size=(3, 8))
    p = pooled(features.fix([wide], normalize=False))
    found = cells.from_centroids(np.concatenate([p.rows[:1], p.rows[100:160]]))
    held = knn.in_cells(p, knn.Trained(sketch=sketch.none(8), cells=found))
    one = calibrate.Choice(probes=1, passes=0, predicted=0, evaluations=0, reached=True)
    graph = knn.build_graph(held, 5, one)
    assert (graph.neighbors[:3] == knn.exact_neighbors(p, np.arange(3), 5).catalog_rows).all()
    assert (graph.neighbors >= 0).all()


def test_refinement_finds_more_for_fewer_distances() -> None:
    p = pool(20_000, 24, clusters=400, noise=0.9)
    trained = knn.train(p, 5, exact_below=10)
    held = knn.in_cells(p, trained, probes=cells.MOST_PROBES)
    queries = np.sort(np.random.default_rng(0).choice(20_000, 1000, replace=False))
    most = cells.assign(p.rows[queries], trained.cells, cells.MOST_PROBES)
    truth = knn.exact_neighbors(p, queries, 5)

    def recall(choice: calibrate.Choice) -> float:
        graph = knn.build_graph(held, 5, choice)
        return knn.recall_of(truth, graph.neighbors[queries], 20_000).value

    plain = calibrate.Choice(probes=2, passes=0, predicted=0, evaluations=0, reached=True)
    refined = calibrate.Choice(probes=2, passes=1, predicted=0, evaluations=0, reached=True)
    assert recall(refined) > recall(plain) + 0.03
    chosen = calibrate.choose(held, p.rows[queries], queries, most, 5, 0.85)
    assert chosen.reached
    assert recall(chosen) > 0.84
    held_rows = held.sizes[most] * (most >= 0)
    if chosen.passes:
        enough = next(
            q
            for q in range(1, cells.MOST_PROBES + 1)
            if recall(
                calibrate.Choice(probes=q, passes=0, predicted=0, evaluations=0, reached=True)
            )
            >= 0.85
        )
        assert chosen.evaluations < held_rows[:, :enough].sum(axis=1).mean() * 1.2


def naive_refinement(
    rows: np.ndarray, probed: np.ndarray, home: np.ndarray, before: Lists, k: int
) -> list[list[int]]:
    """Every neighbor of a neighbor whose cell was not probed is offered to the list."""
    n = len(rows)
    wide = rows.astype(np.float64)
    out = []
    for i in range(n):
        own = {int(j) for j in before.catalog_rows[i] if j >= 0}
        offered = {int(h) for j in own for h in before.catalog_rows[j] if h >= 0 and h != i}
        offered = {h for h in offered if home[h] not in probed[i].tolist()} | own
        d = np.square(wide - wide[i]).sum(axis=1).astype(np.float32)
        best = sorted(offered, key=lambda j: (d[j], (j - i) % n))[:k]
        out.append(best + [-1] * (k - len(best)))
    return out


@pytest.mark.parametrize("seed", range(4))
def test_a_refinement_pass_equals_its_definition(seed: int) -> None:
    p = pool(400, 6, seed=seed, clusters=30)
    held = knn.in_cells(p, knn.train(p, 3, exact_below=10))
    probed = np.ascontiguousarray(held.assigned[:, :2])
    everyone = np.arange(400)
    before = held.find_all(probed, 6, lambda done: None)
    home = held.assigned[:, 0]
    start, found = refine.candidates(
        everyone,
        probed,
        before.catalog_rows,
        before.catalog_rows,
        home[before.catalog_rows],
        before.catalog_rows,
    )
    after = refine.improved(p.rows, everyone, before, 4, start, found, p.rows, found, 400)
    assert after.catalog_rows.tolist() == naive_refinement(p.rows, probed, home, before, 4)
    measured = features.sqdist_pairs(p.rows, after.catalog_rows)
    assert (measured == after.sqdist).all()


def test_more_probes_than_were_assigned_are_refused() -> None:
    p = pool(2000, 8)
    held = knn.in_cells(p, knn.train(p, 3, exact_below=10), probes=2)
    three = calibrate.Choice(probes=3, passes=0, predicted=0, evaluations=0, reached=True)
    with pytest.raises(ValueError, match="3 cells are to be probed, 2 were assigned"):
        knn.build_graph(held, 3, three)


@pytest.mark.parametrize(
    ("mean", "size", "total", "low", "high"),
    [
        # the textbook's figures of an infinite pool
        (1.0, 3000, 10**12, 0.998721, 1.0),
        (0.0, 3000, 10**12, 0.0, 0.001279),
        (0.9, 100, 10**12, 0.825633, 0.944770),
        (0.5, 10, 10**12, 0.236593, 0.763407),
    ],
)
def test_the_interval_of_recall_is_wilsons(
    mean: float, size: int, total: int, low: float, high: float
) -> None:
    found = knn._wilson(mean, mean * (1 - mean), size, total)
    assert found == pytest.approx((low, high), abs=2e-6)


def test_the_interval_of_a_full_recall_has_a_width_unless_all_samples_were_queried() -> None:
    assert knn._wilson(1.0, 0.0, 3000, 3000) == (1.0, 1.0)
    assert knn._wilson(1.0, 0.0, 3000, 6000)[0] == pytest.approx(0.99936, abs=1e-4)
    lows = [knn._wilson(1.0, 0.0, 3000, n)[0] for n in (3001, 4000, 10**4, 10**6)]
    assert lows == sorted(lows, reverse=True)
    # one of 30,000 missed at k=10 is hardly better than none, whose spread nothing tells
    one = 1 - 1 / 30_000
    variance = (0.1**2) / 3000 * (1 - 1 / 3000)
    none = knn._wilson(1.0, 0.0, 3000, 10**9)[0]
    assert knn._wilson(one, variance, 3000, 10**9)[0] < none + 1e-4


def test_independent_hits_of_ten_neighbors_give_a_narrower_interval_than_one() -> None:
    rng = np.random.default_rng(0)
    hits = rng.random((3000, 10)) < 0.9
    alone, together = hits.mean(axis=1), np.repeat(hits[:, :1], 10, axis=1).mean(axis=1)
    widths = []
    for share in (alone, together):
        low, high = knn._wilson(float(share.mean()), float(share.var()), 3000, 10**9)
        assert low < share.mean() < high
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1] / 10**0.5, rel=0.05)
