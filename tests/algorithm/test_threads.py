"""Loops in blocks: the same bits from any number of threads and callers, and after a fork."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import d2filter
from d2filter.algorithm import features, threads
from d2filter.algorithm.knn import exact_lists, products, refine, shortlist
from d2filter.algorithm.methods import density, geometric, selectors
from d2filter.algorithm.scores import registry as scores


@pytest.fixture(autouse=True)
def two_threads_afterwards() -> Iterator[None]:
    yield
    products.use_threads(2)


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
def test_every_block_is_worked_on_once(size: int, block: int, count: int, callers: int) -> None:
    threads.use(count)

    def call(_: int) -> list[int]:
        seen = np.zeros(size, np.int64)

        def work(some: slice) -> None:
            assert 0 < some.stop - some.start <= block
            seen[some] += 1

        threads.in_blocks(work, size, block)
        return seen.tolist()

    with ThreadPoolExecutor(callers) as pool:
        for seen in pool.map(call, range(callers)):
            assert seen == [1] * size


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_in_a_block_reaches_the_caller_and_ends_the_others(count: int) -> None:
    threads.use(count)
    begun = []

    def work(some: slice) -> None:
        begun.append(some.start)
        raise RuntimeError("row 0")

    with pytest.raises(RuntimeError, match="row 0"):
        threads.in_blocks(work, 1000, 1)
    assert len(begun) <= count
    with pytest.raises(RuntimeError, match="row 0"):
        threads.each(lambda number: work(slice(number, number + 1)), 2)


def test_a_nested_call_starts_no_more_threads() -> None:
    threads.use(3)
    counts = []
    threads.each(lambda _: counts.append(threads.count()), 4)
    assert counts == [1] * 4
    assert threads.count() == 3


def test_products_take_one_thread_until_the_last_caller_is_done() -> None:
    import threadpoolctl

    def blas() -> set[int]:
        found = threadpoolctl.threadpool_info()
        # faiss's, where it is loaded, counts its threads by the calling one
        return {one["num_threads"] for one in found if one.get("threading_layer") == "pthreads"}

    _ = np.ones((2, 2)) @ np.ones((2, 2))
    before = blas()
    with threads.one_blas_thread():
        with threads.one_blas_thread():
            assert blas() == {1}
        assert blas() == {1}
    assert blas() == before
    assert not threads._blas_users


def results() -> list[np.ndarray]:
    """What every loop in blocks makes."""
    rng = np.random.default_rng(0)
    n, d, k = 203, 24, 6
    raw = rng.normal(size=(n, d)).astype(np.float32)
    raw[50:60] = raw[:10]
    rows = features.fix([raw])
    neighbors = rng.integers(-1, n, (n, k))
    own = -np.sort(-neighbors, axis=1)
    everyone = np.arange(n)
    copies = features.group_copies(rows)
    probed = rng.integers(0, 5, (n, 2)).astype(np.int32)
    homes = rng.integers(0, 5, n).astype(np.int32)
    start, found = refine.candidates(everyone, probed, own, own, homes[own], own)
    distance = np.sort(features.sqdist_pairs(rows, own), axis=1)
    held = exact_lists.Lists(catalog_rows=own, sqdist=distance)
    better = refine.improved(rows, everyone, held, 3, start, found, rows, found, n)
    merged = exact_lists.Lists(catalog_rows=own * 2, sqdist=distance.copy())
    exact_lists.merge_inplace(merged, everyone[:150], held.take(everyone[:150]), everyone[:150], n)
    short = shortlist.Shortlists(lists=held, exact=distance[:, ::-1].copy())
    settled = shortlist.settle(short, everyone, 2, n)
    pool = selectors.Pool(
        hi=np.zeros(n, np.uint64), lo=everyone.astype(np.uint64), difficulty=raw[:, 0],
        features=raw, neighbors=neighbors, sqdist=np.ones((n, k), np.float32),
    )  # fmt: skip
    cell = rng.integers(0, 3, n)
    cell[50:60] = cell[:10]
    ranked = d2filter.rank(raw, raw[:, 0], n_neighbors=3, exact_below=50)
    return [
        features.to_float32(rows), features.squared_norms(rows),
        # fewer lists than rows
        features.sqdist_pairs(rows, neighbors[:71]),
        copies.group, copies.first, copies.start, copies.members, start, found, better.catalog_rows,
        better.sqdist, merged.catalog_rows, merged.sqdist, settled.catalog_rows, settled.sqdist,
        density.density(pool, rows_a_cluster=20), geometric.k_center(pool), geometric.herding(pool),
        geometric.least_alike_first(raw, cell, raw[:3]), scores.negclip_loss(raw, raw[::-1]),
        scores.norm_sim(raw, raw[:70]), scores.prototypicality(raw, raw[:70]), ranked.rank,
        ranked.final, ranked.neighbors, ranked.sqdist,
    ]  # fmt: skip


def test_threads_and_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    products.use_threads(1)
    expected = [one.tobytes() for one in results()]
    for module, name in (
        (features, "BLOCK"), (exact_lists, "BLOCK"), (refine, "_LISTS"), (shortlist, "_MEASURED"),
        (shortlist, "_SETTLED"), (geometric, "_VALUES"), (geometric, "_RAISED"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 7)
    for count in (1, 2, 5):
        products.use_threads(count)
        assert [one.tobytes() for one in results()] == expected


def test_no_loop_is_parallel_of_its_own() -> None:
    """Such loops need OpenMP, and end the process where two threads call them, or a fork did."""
    for path in Path(d2filter.__file__).parent.rglob("*.py"):
        code = path.read_text()
        assert not re.search(r"parallel=True|prange\(|numba\.(njit|jit)\(", code) or (
            path.name == "compiled.py" and "parallel=True" not in code
        ), path


ANYWHERE = """
import os, sys, numpy as np
from concurrent.futures import ThreadPoolExecutor
import d2filter
rng = np.random.default_rng(0)
rows, scores = rng.normal(size=(4000, 16)).astype(np.float32), rng.random(4000)

def rank(_=0):
    r = d2filter.rank(rows, scores, n_neighbors=3, exact_below=500)
    return r.final.tobytes() + r.neighbors.tobytes()

first = rank()
with ThreadPoolExecutor(4) as pool:
    assert set(pool.map(rank, range(4))) == {first}
child = os.fork()
if child == 0:
    with ThreadPoolExecutor(2) as pool:
        os._exit(0 if set(pool.map(rank, range(2))) == {first} and rank() == first else 7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
import numba
try:
    numba.threading_layer()
except ValueError as error:
    print(error)
"""


def test_a_pool_is_ranked_without_openmp_from_threads_and_after_a_fork() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ANYWHERE],
        env={**_environment(), "NUMBA_THREADING_LAYER": "workqueue"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not initialized" in done.stdout


FAISS = """
import os, numpy as np
from d2filter.algorithm.knn import products
from d2filter.algorithm.methods import geometric, selectors
products.use_threads(2)
n = 3000
rows = np.random.default_rng(0).normal(size=(n, 16)).astype(np.float32)
pool = selectors.Pool(
    hi=np.zeros(n, np.uint64), lo=np.arange(n, dtype=np.uint64), difficulty=rows[:, 0],
    features=rows, neighbors=np.full((n, 1), -1), sqdist=np.full((n, 1), np.inf, np.float32),
)
first = geometric.semdedup(pool)
child = os.fork()
if child == 0:
    products.use_threads(2)
    os._exit(0 if (geometric.semdedup(pool) == first).all() else 7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_faiss_works_in_the_child_of_a_process_that_used_its_threads() -> None:
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAISS], env=_environment(), check=True, timeout=120
    )


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(d2filter.__file__).parents[1])}
