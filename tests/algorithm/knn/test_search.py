"""The exact search in probed cells, compared with the oracle, on CPUs and GPUs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle

from d2filter.algorithm import features
from d2filter.algorithm.knn import exact_lists, products, search


def pool(n: int, d: int, seed: int = 0, clusters: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(clusters, d))
    return features.fix([(centers[rng.integers(0, clusters, n)] + 0.5 * rng.normal(size=(n, d)))])


def in_one_cell(rows: np.ndarray) -> search.Members:
    return search.make_members(rows, np.arange(len(rows)), np.zeros(len(rows), np.int32), 1)


def exact(rows: np.ndarray, k: int) -> exact_lists.Lists:
    n = len(rows)
    everything = np.zeros((n, 1), np.int32)
    return search.search(in_one_cell(rows), rows, np.arange(n), everything, k, n)


def few_values(n: int, d: int, levels: int, seed: int) -> tuple[np.ndarray, np.random.Generator]:
    """Few distinct values: copies and ties of distance."""
    rng = np.random.default_rng(seed)
    return features.fix([rng.integers(0, levels, (n, d)) + 0.25]), rng


def cells_of(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A random cell for each distinct row."""
    copies = features.group_copies(rows)
    return rng.integers(0, count, copies.first.size).astype(np.int32)[copies.group]


@settings(max_examples=150)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 5),
    k=st.integers(1, 9),
    levels=st.sampled_from([1, 2, 3, 50]),
    cells=st.integers(1, 5),
    partitions=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_lists_of_any_split_merge_to_those_of_the_oracle(
    n: int, d: int, k: int, levels: int, cells: int, partitions: int, seed: int
) -> None:
    """Members split at random, copies and cells torn apart too: the merged lists are the same."""
    rows, rng = few_values(n, d, levels, seed)
    cell = cells_of(rows, cells, rng)
    home = rng.integers(0, partitions, n)
    probed = np.tile(np.arange(cells, dtype=np.int32), (n, 1))
    merged = exact_lists.Lists.empty(n, k)
    everyone = np.arange(n)
    for part in range(partitions):
        some = np.flatnonzero(home == part)
        members = search.make_members(rows[some], some, cell[some], cells)
        found = search.search(members, rows, everyone, probed, k, n)
        exact_lists.merge_inplace(merged, everyone, found, everyone, n)
    neighbors, sqdist = oracle.knn(rows, list(range(n)), k)
    assert merged.catalog_rows.tolist() == neighbors
    assert merged.sqdist.tolist() == sqdist


@settings(max_examples=60)
@given(n=st.integers(2, 60), levels=st.sampled_from([2, 40]), seed=st.integers(0, 2**32))
def test_a_search_is_exact_within_the_probed_cells(n: int, levels: int, seed: int) -> None:
    rows, rng = few_values(n, 4, levels, seed)
    cells, k = 6, 3
    cell = cells_of(rows, cells, rng)
    copies = features.group_copies(rows)
    by_group = np.stack([rng.permutation(cells)[:3] for _ in copies.first]).astype(np.int32)
    by_group[rng.random(by_group.shape) < 0.2] = -1
    by_group[rng.random(len(by_group)) < 0.1, 0] = search.EVERY_CELL
    probed = by_group[copies.group]
    members = search.make_members(rows, np.arange(n), cell, cells)
    found = search.search(members, rows, np.arange(n), probed, k, n)
    wide = rows.astype(np.float64)
    for i in range(n):
        reachable = np.isin(cell, probed[i]) | (probed[i, 0] == search.EVERY_CELL)
        reachable[i] = False
        d = np.square(wide - wide[i]).sum(axis=1).astype(np.float32)
        best = sorted(np.flatnonzero(reachable), key=lambda j: (d[j], (j - i) % n))[:k]
        assert found.catalog_rows[i].tolist() == [int(b) for b in best] + [-1] * (k - len(best))


def test_thousands_of_copies_point_round_the_ring() -> None:
    n, k = 5000, 4
    found = exact(features.fix([np.ones((n, 8), np.float32)]), k)
    assert (found.catalog_rows == (np.arange(n)[:, None] + np.arange(1, k + 1)) % n).all()
    assert (found.sqdist == 0).all()


@pytest.mark.parametrize("shift", [0, 1, 7])
def test_block_boundaries_do_not_change_the_result(
    shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pool(700, 24)
    whole = exact(rows, 5)
    monkeypatch.setattr(search, "QUERY_BLOCK", 50 + shift)
    monkeypatch.setattr(products, "QUERIES", 30 + shift)
    monkeypatch.setattr(products, "MEMBERS", 90 + shift)
    again = exact(rows, 5)
    assert (whole.catalog_rows == again.catalog_rows).all()
    assert (whole.sqdist == again.sqdist).all()


def test_the_number_of_threads_does_not_matter() -> None:
    rows = pool(3000, 40, clusters=30)
    found = []
    try:
        for threads in (1, 2, 3):
            products.use_threads(threads)
            found.append(exact(rows, 4))
    finally:
        products.use_threads(2)
    for other in found[1:]:
        assert (other.catalog_rows == found[0].catalog_rows).all()
        assert (other.sqdist == found[0].sqdist).all()


def offer(held: products.Nearest, q: int, distance: np.ndarray, names: np.ndarray) -> None:
    """Keep the nearest of what is held and what is offered."""
    places = held.ids.shape[1]
    near = np.concatenate([held.near[q], distance.astype(np.float32)])
    ids = np.concatenate([held.ids[q], names])
    best = np.argsort(near, kind="stable")[:places]
    held.near[q], held.ids[q] = near[best], ids[best]


def test_proposals_with_the_largest_allowed_error_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worse matrix product, wrong by up to the bound in either direction: the same lists."""
    rows = pool(600, 16)
    right = exact(rows, 4)
    noise = np.random.default_rng(1)
    bound = 0.02
    monkeypatch.setattr(products, "relative_error", lambda dim: bound / 4)

    def noisy(queries, askers, members, which, names, center, held) -> None:  # type: ignore[no-untyped-def]
        y = members[which].astype(np.float64) - center
        for q in askers.tolist():
            x = queries[q].astype(np.float64) - center
            d = np.square(x - y).sum(axis=1)
            # what the bound allows: relative·(‖x‖ + ‖y‖)²
            size = bound / 4 * (np.linalg.norm(x) + np.linalg.norm(y, axis=1)) ** 2
            held.reach[q] = max(held.reach[q], float(x @ x))
            offer(held, q, d + noise.uniform(-1, 1, d.size) * size, names)

    monkeypatch.setattr(products, "improve_inplace", noisy)
    again = exact(rows, 4)
    assert (again.catalog_rows == right.catalog_rows).all()
    assert (again.sqdist == right.sqdist).all()


class FakeGpu:
    """faiss with one GPU, in numpy: float32 rows and products."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def get_num_gpus(self) -> int:
        return 1

    def StandardGpuResources(self) -> object:  # faiss's own name
        return object()

    def omp_set_num_threads(self, count: int) -> None:
        return None

    def knn_gpu(self, resources, x, y, k):  # type: ignore[no-untyped-def]
        assert x.dtype == y.dtype == np.float32
        self.calls.append((len(x), len(y)))
        a, b = x.astype(np.float32), y.astype(np.float32)
        d = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
        order = np.argsort(d, axis=1)[:, :k]
        return np.take_along_axis(d, order, 1), order


def test_the_gpu_path_gives_the_same_lists_in_blocks_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = pool(900, 12)
    right = exact(rows, 5)
    fake = FakeGpu()
    monkeypatch.setattr(products, "load_faiss", lambda: fake)
    monkeypatch.setattr(products, "GPU_BYTES", 60_000)
    products._gpu_resources.cache_clear()
    again = exact(rows, 5)
    products._gpu_resources.cache_clear()
    assert (again.catalog_rows == right.catalog_rows).all()
    assert (again.sqdist == right.sqdist).all()
    assert len(fake.calls) > 1
    assert all(q * 48 <= 60_000 or q == 256 for q, _ in fake.calls)


@pytest.mark.gpu
def test_a_real_gpu_gives_the_same_lists() -> None:
    if not products.gpus():
        pytest.skip("no GPU that faiss can use")
    rows = pool(20_000, 64)
    on_gpu = exact(rows, 5)
    original = products.gpus
    try:
        products.gpus = lambda: 0  # type: ignore[assignment]
        on_cpu = exact(rows, 5)
    finally:
        products.gpus = original
    assert (on_gpu.catalog_rows == on_cpu.catalog_rows).all()
    assert (on_gpu.sqdist == on_cpu.sqdist).all()


def test_unnormalized_features_are_searched_exactly() -> None:
    rng = np.random.default_rng(0)
    rows = features.fix([rng.normal(size=(200, 5)) * 300], normalize=False)
    neighbors, _ = oracle.knn(rows, list(range(200)), 3)
    assert exact(rows, 3).catalog_rows.tolist() == neighbors


def count_second_looks(monkeypatch: pytest.MonkeyPatch, rows: np.ndarray, k: int) -> int:
    looked = []
    original = search.within_limits

    def counted(members, queries, asked, limit):  # type: ignore[no-untyped-def]
        looked.append(len(queries))
        return original(members, queries, asked, limit)

    monkeypatch.setattr(search, "within_limits", counted)
    exact(rows, k)
    return sum(looked)


def test_one_huge_row_does_not_make_every_list_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(3000, 32))
    wide[7] *= 1000
    rows = features.fix([wide], normalize=False)
    assert count_second_looks(monkeypatch, rows, 3) < 30


def test_near_copies_beyond_the_proposals_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 rows within the rounding of a float32 product of whole rows."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 64))
    rows = features.fix([np.concatenate([base + 3e-3 * rng.normal(size=(500, 64)), -base])])
    neighbors, _ = oracle.knn(rows, list(range(501)), 4)
    assert exact(rows, 4).catalog_rows.tolist() == neighbors
    # products of differences to a row beside them tell them apart
    assert count_second_looks(monkeypatch, rows, 4) < 50


def test_a_second_look_finds_what_products_cannot_tell_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two tight groups in one cell: whichever is the center, the other group is far from it."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(2, 256))
    rows = features.fix([np.repeat(base, 200, axis=0) + 2e-4 * rng.normal(size=(400, 256))])
    assert count_second_looks(monkeypatch, rows, 4) > 50
    neighbors, _ = oracle.knn(rows, list(range(400)), 4)
    assert exact(rows, 4).catalog_rows.tolist() == neighbors
