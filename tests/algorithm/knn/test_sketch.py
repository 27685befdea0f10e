"""Sketches, the shortlists that they give, and the calibration of both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2filter.algorithm import features
from d2filter.algorithm.knn import calibrate, exact_lists, products, search, shortlist, sketch
from d2filter.algorithm.knn import in_memory as knn


def drawn(n: int, dim: int, *, seed: int = 0, decay: float = 1.0) -> np.ndarray:
    """Unit rows in clusters, spread along few axes."""
    rng = np.random.default_rng(seed)
    wide = rng.normal(size=(40, dim))[rng.integers(0, 40, n)] + rng.normal(size=(n, dim))
    rotation, _ = np.linalg.qr(np.random.default_rng(7).normal(size=(dim, dim)))
    return features.fix([(wide * np.arange(1, dim + 1) ** -decay) @ rotation])


@pytest.fixture(scope="module")
def trained() -> sketch.Sketch:
    return sketch.train(drawn(2000, 128))


def by_definition(rows: np.ndarray, trained: sketch.Sketch) -> list[list[float]]:
    """In Python integers, one product after the other."""
    out = []
    axes = [[int(v) for v in column] for column in trained.axes.T]
    for row in rows:
        whole = [
            round(float(v) * trained.grid) - int(m) for v, m in zip(row, trained.mean, strict=True)
        ]
        sums = [sum(a * b for a, b in zip(whole, axis, strict=True)) for axis in axes]
        out.append([float(np.float16(np.clip(s * 2.0**-12, -60000, 60000))) + 0.0 for s in sums])
    return out


def test_a_sketch_is_its_definition_in_integers(trained: sketch.Sketch) -> None:
    rows = drawn(30, 128, seed=5)
    assert trained.apply(rows).tolist() == by_definition(rows, trained)
    # far longer than any row of the sample: float32 sums would round
    long = features.fix([rows.astype(np.float64) * 3000], normalize=False)
    assert trained.apply(long).tolist() == by_definition(long, trained)
    assert np.isfinite(trained.apply(long)).all()


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=6), threads=st.integers(1, 3))
def test_a_sketch_does_not_depend_on_the_rows_beside_it(cuts: list[int], threads: int) -> None:
    trained = sketch.train(drawn(1200, 64))
    rows = drawn(300, 64, seed=3)
    rows[7] *= 500
    whole = trained.apply(rows)
    try:
        products.use_threads(threads)
        parts = [trained.apply(part) for part in np.split(rows, sorted(cuts))]
    finally:
        products.use_threads(2)
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_training_gives_the_same_bits_on_any_number_of_threads() -> None:
    sample = drawn(3000, 96)
    found = []
    try:
        for threads in (1, 2, 3):
            products.use_threads(threads)
            found.append(sketch.train(sample))
    finally:
        products.use_threads(2)
    assert not found[0].identity
    for other in found[1:]:
        assert (other.axes == found[0].axes).all()
        assert (other.mean == found[0].mean).all()


def test_the_sketch_has_as_few_axes_as_the_pool_needs() -> None:
    numbers = [sketch.train(drawn(3000, 256, decay=d)).axes.shape[1] for d in (1.5, 0.3)]
    assert 0 < numbers[0] < numbers[1] <= 128
    # spread alike along all axes, too few rows, all rows equal
    assert sketch.train(drawn(3000, 256, decay=0)).identity
    assert sketch.train(drawn(500, 256)).identity
    assert sketch.train(np.repeat(drawn(1, 64), 3000, axis=0)).apply(drawn(5, 64)).shape[0] == 5
    assert sketch.train(drawn(3000, 40)).identity


def test_axes_are_only_dropped_when_neighbors_are_still_found() -> None:
    """Most of the variance lies between the clusters, what tells neighbors apart in the rest."""
    rng = np.random.default_rng(0)
    centers = np.zeros((30, 256))
    centers[:, :30] = 30 * np.eye(30)
    wide = centers[rng.integers(0, 30, 4000)] + rng.normal(size=(4000, 256))
    assert sketch.train(features.fix([wide])).identity


def naive_lists(rows: np.ndarray, sketches: np.ndarray, places: int, width: int) -> list[list[int]]:
    """The `places` nearest by sketch, of these the `width` nearest; equals round the ring."""
    n = len(rows)
    out = []
    for i in range(n):

        def order(table: np.ndarray, i: int = i) -> np.ndarray:
            wide = table.astype(np.float64)
            return np.square(wide - wide[i]).sum(axis=1).astype(np.float32)

        near, exact = order(sketches), order(rows)
        others = [j for j in range(n) if j != i]
        short = sorted(others, key=lambda j: (near[j], (j - i) % n))[:places]
        best = sorted(short, key=lambda j: (exact[j], (j - i) % n))[:width]
        out.append(best + [-1] * (width - len(best)))
    return out


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    levels=st.sampled_from([1, 2, 3, 40]),
    places=st.integers(1, 12),
    partitions=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_shortlists_of_any_split_settle_to_the_lists_of_the_oracle(
    n: int, levels: int, places: int, partitions: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = features.fix([rng.integers(0, levels, (n, 6)) + 0.25])
    # any function of a row will do: equal rows have equal sketches, and others may have too
    sketches = np.ascontiguousarray(rows[:, :2])
    width = min(3, places)
    home = rng.integers(0, partitions, n)
    everyone = np.arange(n)
    merged = shortlist.empty(n, places)
    probed = np.zeros((n, 1), np.int32)
    for part in range(partitions):
        some = np.flatnonzero(home == part)
        members = search.make_members(sketches[some], some, np.zeros(some.size, np.int32), 1)
        found = shortlist.find(
            members, rows[some], some, sketches, rows, everyone, probed, places, n
        )
        shortlist.merge_inplace(merged, everyone, found, everyone, n)
    settled = shortlist.settle(merged, everyone, width, n)
    assert settled.catalog_rows.tolist() == naive_lists(rows, sketches, places, width)
    measured = features.sqdist_pairs(rows, settled.catalog_rows)
    assert measured.tolist() == settled.sqdist.tolist()


def test_a_graph_from_sketches_reaches_the_target_recall() -> None:
    rows = drawn(20_000, 128, decay=0.8)
    hi = np.arange(20_000, dtype=np.uint64)
    pool = knn.make_pool(rows, hi, np.zeros_like(hi))
    graph, index = knn.build(pool, 5, target_recall=0.95, exact_below=10)
    assert not index.trained.sketch.identity
    assert index.choice.reached
    truth = knn.exact_neighbors(pool, np.arange(20_000), 5)
    real = truth.share_in(graph.neighbors).mean()
    assert real >= 0.95
    assert abs(index.choice.predicted - real) < 0.02
    assert (features.sqdist_pairs(rows, graph.neighbors) == graph.sqdist).all()


def test_calibration_counts_the_neighbors_that_shortlists_lose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shortlists no longer than the lists lose neighbors: predicted, not overlooked."""
    monkeypatch.setattr(sketch, "SHORTLIST", 6)
    monkeypatch.setattr(sketch, "ENOUGH", 0.0)
    rows = drawn(20_000, 128, decay=0.5)
    hi = np.arange(20_000, dtype=np.uint64)
    pool = knn.make_pool(rows, hi, np.zeros_like(hi))
    trained = knn.train(pool, 5, exact_below=10)
    assert trained.sketch.axes.shape[1] == 32
    held = knn.in_cells(pool, trained, probes=64)
    queries = np.arange(0, 20_000, 50)
    choice = knn.choose(held, trained, rows[queries], queries, 5, 0.99)
    graph = knn.build_graph(held, 5, choice)
    real = knn.exact_neighbors(pool, np.arange(20_000), 5).share_in(graph.neighbors).mean()
    assert abs(choice.predicted - real) < 0.03
    assert real < 0.97
    assert not choice.reached
    assert knn.choose(held, trained, rows[queries], queries, 5, 0.97).short_of == "axes"
    # so longer sketches are tried
    graph, index = knn.build(pool, 5, target_recall=0.99, exact_below=10)
    assert index.choice.reached
    assert index.trained.cells.count > 1
    assert knn.measure_recall(pool, graph).value >= 0.99


def groups_without_shape(groups: int, dim: int, *, scatter: float, seed: int) -> knn.Pool:
    """60,000 rows around centers, the same along all axes."""
    rng = np.random.default_rng(seed)
    n = 60_000
    centers = rng.normal(size=(groups, dim))
    rows = centers[rng.integers(0, groups, n)] + scatter * rng.normal(size=(n, dim))
    hi = np.arange(n, dtype=np.uint64)
    return knn.make_pool(features.fix([rows]), hi, np.zeros_like(hi))


def test_a_sample_that_is_thinner_than_its_pool_does_not_cost_the_recall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups without a shape of their own: of each the sample has so few that any axes find them.

    Thirty-two axes were taken here, and half the neighbors lost.
    """
    pool = groups_without_shape(300, 128, scatter=0.8, seed=0)
    monkeypatch.setattr(sketch, "LOOKED_AT", 4000)
    assert knn.train(pool, 5).sketch.axes.shape[1] == 32
    graph, index = knn.build(pool, 5, target_recall=0.95)
    assert index.choice.reached
    assert index.trained.cells.count > 1
    assert knn.measure_recall(pool, graph).value >= 0.94


def test_groups_that_parent_cells_split_are_searched_under_more_parents() -> None:
    """All groups lie as far from each other: no parent has those of a row, and eight not all."""
    pool = groups_without_shape(500, 96, scatter=1.1, seed=1)
    rows = pool.rows
    trained = knn.train(pool, 5)
    held = knn.in_cells(pool, trained)
    queries = np.arange(0, 60_000, 150)
    choice = knn.choose(held, trained, rows[queries], queries, 5, 0.97)
    assert (choice.reached, choice.short_of) == (False, "cells")
    graph, index = knn.build(pool, 5, target_recall=0.97)
    assert index.trained.cells.count > 1
    assert index.trained.cells.looked_under == 32
    assert knn.measure_recall(pool, graph).value >= 0.965


def test_the_efforts_after_a_missed_target_end() -> None:
    def miss(short_of: str) -> calibrate.Choice:
        return calibrate.Choice(
            probes=64, passes=0, predicted=0.5, evaluations=1.0, reached=False, short_of=short_of
        )

    first = calibrate.Effort()
    more = calibrate.harder(first, miss("cells"), 0.9, axes=64, parents=24)
    assert more == calibrate.Effort(looked_under=32)
    assert more is not None
    longer = calibrate.harder(more, miss("cells"), 0.9, axes=64, parents=24)
    assert longer == calibrate.Effort(looked_under=32, least_axes=256)
    assert calibrate.harder(first, miss("axes"), 0.9, axes=64, parents=24) == calibrate.Effort(
        least_axes=256
    )
    assert calibrate.harder(more, miss("cells"), 0.9, axes=0, parents=24) is None
    assert calibrate.harder(first, miss("axes"), 0.9, axes=0, parents=24) is None
    # near enough: a run goes on with it, as its own measure may reach what was asked for
    assert calibrate.harder(first, miss("axes"), 0.5, axes=64, parents=24) is None


def test_carried_values_move_with_their_places() -> None:
    one = exact_lists.Lists(
        catalog_rows=np.array([[3, 5]]), sqdist=np.array([[1.0, 4.0]], np.float32)
    )
    two = exact_lists.Lists(
        catalog_rows=np.array([[7, 9]]), sqdist=np.array([[2.0, 3.0]], np.float32)
    )
    mine, theirs = np.array([[10, 40]], np.float32), np.array([[20, 30]], np.float32)
    who = np.array([0])
    exact_lists.merge_inplace(one, who, two, who, 12, carried=(mine, theirs))
    assert one.catalog_rows.tolist() == [[3, 7]]
    assert mine.tolist() == [[10, 20]]
