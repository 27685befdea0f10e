from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2filter.algorithm import backend, cells, features, knn, lists


def pool(n: int, d: int, seed: int = 0, clusters: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(clusters, d))
    return features.fix([(centers[rng.integers(0, clusters, n)] + 0.5 * rng.normal(size=(n, d)))])


def pooled(rows: np.ndarray) -> knn.Pool:
    return knn.make_pool(rows, *ids(len(rows)))


def ids(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(99)
    return np.sort(rng.integers(0, 2**63, n).astype(np.uint64)), np.zeros(n, np.uint64)


def numbers(hi: np.ndarray, lo: np.ndarray) -> list[int]:
    return [int(a) * 2**64 + int(b) for a, b in zip(hi, lo, strict=True)]


@settings(max_examples=120)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 5),
    k=st.integers(1, 9),
    levels=st.sampled_from([1, 2, 3, 50]),
    nlist=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_exact_lists_equal_the_oracle(
    n: int, d: int, k: int, levels: int, nlist: int, seed: int
) -> None:
    """Few distinct values: copies, ties of distance, k ≥ n; all cells probed, so exact."""
    rng = np.random.default_rng(seed)
    rows = features.fix([rng.integers(0, levels, (n, d)) + 0.25])
    hi, lo = ids(n)
    centroids = np.unique(rows[rng.integers(0, n, nlist)], axis=0)
    graph = knn.build_graph(pooled(rows), k, knn.Index(centroids=centroids, probes=len(centroids)))
    neighbors, sqdist = oracle.knn(rows, numbers(hi, lo), k)
    assert graph.neighbors.tolist() == neighbors
    assert graph.sqdist.tolist() == sqdist
    assert graph.cell_rows.sum() == n


def test_a_probed_search_is_exact_within_its_cells() -> None:
    rows = pool(900, 6)
    index = knn.train_index(pooled(rows), 3, target_recall=0.9, exact_below=10)
    graph = knn.build_graph(pooled(rows), 3, index)
    probed, _ = cells.assign(rows, index.centroids, index.probes)
    wide = rows.astype(np.float64)
    for i in range(0, 900, 37):
        d = np.square(wide - wide[i]).sum(axis=1).astype(np.float32)
        reachable = np.isin(probed[:, 0], probed[i])
        reachable[i] = False
        best = sorted(np.flatnonzero(reachable), key=lambda j: (d[j], (j - i) % 900))[:3]
        assert graph.neighbors[i].tolist() == [int(b) for b in best]


def test_thousands_of_copies_point_round_the_ring() -> None:
    n, k = 5000, 4
    rows = features.fix([np.ones((n, 8), np.float32)])
    graph = knn.build_graph(pooled(rows), k, knn.Index(centroids=rows[:1], probes=1))
    expected = (np.arange(n)[:, None] + np.arange(1, k + 1)) % n
    assert (graph.neighbors == expected).all()
    assert (graph.sqdist == 0).all()


def test_few_rows_in_the_probed_cells_are_no_reason_to_pad() -> None:
    rows = features.fix([np.eye(6, dtype=np.float32)])
    graph = knn.build_graph(pooled(rows), 4, knn.Index(centroids=rows, probes=1))
    assert (graph.neighbors >= 0).all()


@pytest.mark.parametrize("shift", [0, 1, 7])
def test_block_boundaries_do_not_matter(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pool(700, 24)
    index = knn.train_index(pooled(rows), 5, target_recall=0.9, exact_below=10)
    whole = knn.build_graph(pooled(rows), 5, index)
    monkeypatch.setattr(knn, "_QUERY_BLOCK", 50 + shift)
    monkeypatch.setattr(knn, "_MEMBER_BLOCK", 90 + shift)
    monkeypatch.setattr(cells, "_BLOCK", 64 + shift)
    again = knn.train_index(pooled(rows), 5, target_recall=0.9, exact_below=10)
    assert (again.centroids == index.centroids).all()
    assert again.probes == index.probes
    parts = knn.build_graph(pooled(rows), 5, index)
    assert (whole.neighbors == parts.neighbors).all()
    assert (whole.sqdist == parts.sqdist).all()


def test_the_number_of_threads_does_not_matter() -> None:
    rows = pool(3000, 40, clusters=30)
    results = []
    try:
        for threads in (1, 2):
            backend.use_threads(threads)
            index = knn.train_index(pooled(rows), 2, target_recall=0.9, exact_below=10)
            results.append((index, knn.build_graph(pooled(rows), 2, index)))
    finally:
        backend.use_threads(2)
    (one, graph_one), (two, graph_two) = results
    assert (one.centroids == two.centroids).all()
    assert one.probes == two.probes
    assert (graph_one.neighbors == graph_two.neighbors).all()


def test_proposals_off_by_the_whole_bound_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worse matrix product, wrong by up to the bound in either direction: the same lists."""
    rows = pool(600, 16)
    index = knn.train_index(pooled(rows), 4, target_recall=0.9, exact_below=10)
    graph = knn.build_graph(pooled(rows), 4, index)
    exact = backend.nearest
    noise = np.random.default_rng(1)
    bound = 0.02
    monkeypatch.setattr(backend, "relative_error", lambda dim: bound / 4)

    def noisy(queries: np.ndarray, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distance, index = exact(queries, x, len(x))
        distance = distance + noise.uniform(-bound, bound, distance.shape).astype(np.float32) * 0.9
        order = np.argsort(distance, axis=1)[:, :k]
        return np.take_along_axis(distance, order, 1), np.take_along_axis(index, order, 1)

    monkeypatch.setattr(backend, "nearest", noisy)
    again = knn.build_graph(pooled(rows), 4, index)
    assert (again.neighbors == graph.neighbors).all()
    assert (again.sqdist == graph.sqdist).all()


def test_calibration_keeps_its_promise_and_recall_is_measured_right() -> None:
    n, k = 4000, 5
    rows = pool(n, 16, clusters=60)
    index = knn.train_index(pooled(rows), k, target_recall=0.95, exact_below=100)
    assert 1 <= index.probes < len(index.centroids)
    graph = knn.build_graph(pooled(rows), k, index)
    measured = knn.measure_recall(pooled(rows), graph)
    truth, _ = knn.exact_neighbors(pooled(rows), np.arange(n), k)
    real = (truth[:, :, None] == graph.neighbors[:, None, :]).any(axis=2).mean()
    assert measured.value >= 0.95
    assert measured.queries == 3000
    assert measured.low - 0.003 <= real <= measured.high + 0.003
    # one probe fewer would not have been enough for the calibration's confidence
    if index.probes > 1:
        fewer = knn.build_graph(pooled(rows), k, knn.Index(centroids=index.centroids, probes=1))
        assert knn.measure_recall(pooled(rows), fewer).value < measured.value


def test_unnormalized_features() -> None:
    rng = np.random.default_rng(0)
    rows = features.fix([rng.normal(size=(200, 5)) * 300], normalize=False)
    hi, lo = ids(200)
    graph = knn.build_graph(pooled(rows), 3, knn.Index(centroids=rows[:1], probes=1))
    neighbors, _ = oracle.knn(rows, numbers(hi, lo), 3)
    assert graph.neighbors.tolist() == neighbors


def test_by_cell_is_a_transposition() -> None:
    assigned = np.array([[2, 0], [0, 1], [2, 1]], np.int32)
    start, rows = lists.by_cell(assigned, 4)
    got = [rows[start[c] : start[c + 1]].tolist() for c in range(4)]
    assert got == [[0, 1], [1, 2], [0, 2], []]


def test_one_huge_row_does_not_make_every_list_unsure() -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(3000, 32))
    wide[7] *= 1000
    rows = features.fix([wide], normalize=False)
    search = knn._search(
        pooled(rows), np.arange(3000), np.zeros((3000, 1), np.int32), np.zeros(3000, np.int32),
        3, 1, lambda done: None,
    )  # fmt: skip
    copies = features.group_copies(rows)
    relative = np.float32(backend.relative_error(32))
    _, unsure = lists._limits(
        rows.view(np.uint16), copies.first, copies.start, search.groups, search.ids, search.near,
        3, relative,
    )  # fmt: skip
    assert unsure.sum() < 30


def test_near_copies_beyond_the_proposals_are_found() -> None:
    """500 rows within the rounding of a float32 product: only the second look can order them."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 64))
    rows = features.fix([np.concatenate([base + 3e-3 * rng.normal(size=(500, 64)), -base])])
    graph = knn.build_graph(pooled(rows), 4, knn.Index(centroids=rows[:1], probes=1))
    neighbors, _ = oracle.knn(rows, numbers(*ids(501)), 4)
    assert graph.neighbors.tolist() == neighbors


def test_an_unclustered_pool_is_searched_exactly_when_cells_would_not_help() -> None:
    rows = features.fix([np.random.default_rng(0).normal(size=(2000, 64))])
    index = knn.train_index(pooled(rows), 5, target_recall=0.99, exact_below=100)
    assert (len(index.centroids), index.probes) == (1, 1)
