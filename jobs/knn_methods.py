"""The methods that `bench_knn` compares, and its synthetic pool; each runs in its own process.

python -m jobs.knn_methods METHOD VALUE --data FILE.npy
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

K = 5
DIM = 512
CHECKED = 1000
# scatter with which IVF has a recall of about .94 with 4 probes and .97 with 8
SPREAD = 0.5
COPIES = 0.1

Row = dict[str, Any]


def draw(n: int, dim: int, seed: int = 0) -> Any:
    """(n, dim) float16 unit rows: clusters of heavy-tailed size and scatter, 10% near-copies."""
    rng = np.random.default_rng([seed, n, dim])
    base = n - int(COPIES * n)
    spectrum = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    clusters = max(16, n // 200)
    share = rng.pareto(1.2, clusters) + 0.2
    centers = rng.standard_normal((clusters, dim)).astype(np.float32) * spectrum
    scatter = (SPREAD * np.exp(0.3 * rng.standard_normal(clusters))).astype(np.float32)
    rows = np.empty((n, dim), np.float16)
    order = rng.permutation(n)
    block = 65536

    def put(start: int, wide: Any) -> None:
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
        rows[order[start : start + len(wide)]] = wide

    for start in range(0, base, block):
        of = rng.choice(clusters, min(block, base - start), p=share / share.sum())
        noise = rng.standard_normal((of.size, dim), dtype=np.float32) * spectrum
        put(start, centers[of] + noise * scatter[of][:, None])
    for start in range(base, n, block):
        source = rng.integers(0, base, min(block, n - start))
        noise = rng.standard_normal((source.size, dim), dtype=np.float32) * spectrum
        wide = rows[order[source]].astype(np.float32)
        put(start, wide + 0.1 * noise * np.linalg.norm(spectrum) ** -1)
    return rows


def main() -> None:
    """One measurement, printed as JSON."""
    parser = argparse.ArgumentParser(description="One measurement of bench_knn.")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("value")
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    print(json.dumps(METHODS[arguments.method](arguments.data, arguments.value)))


def prepare(folder: Path, n: int, dim: int) -> None:
    """Draw the rows of NxDIM.npy and the true neighbors of some of them, if not there yet."""
    path = folder / f"{n}x{dim}.npy"
    if path.exists():
        return
    rows = draw(n, dim)
    np.save(path, rows)
    import faiss

    queries = np.sort(np.random.default_rng(1).choice(n, CHECKED, replace=False))
    x = rows[queries].astype(np.float32)
    best_d = np.full((CHECKED, K + 1), np.inf, np.float32)
    best_i = np.full((CHECKED, K + 1), -1, np.int64)
    for start in range(0, n, 100_000):
        y = rows[start : start + 100_000].astype(np.float32)
        d, i = faiss.knn(x, y, K + 1)
        d, i = np.concatenate([best_d, d], 1), np.concatenate([best_i, i + start], 1)
        order = np.argsort(d, axis=1)[:, : K + 1]
        best_d, best_i = np.take_along_axis(d, order, 1), np.take_along_axis(i, order, 1)
    np.savez(folder / f"{n}x{dim}.npz", queries=queries, truth=_without(best_i, queries))


def _without(lists: Any, queries: Any) -> Any:
    """The first K of each list that are not the query itself."""
    return np.array([[j for j in r if j != q][:K] for r, q in zip(lists, queries, strict=True)])


def _load(path: Path) -> tuple[Any, Any, Any]:
    known = np.load(path.with_suffix(".npz"))
    return np.load(path), known["queries"], known["truth"]


def _finished(seconds: float, found: Any, truth: Any, **more: Any) -> Row:
    from d2filter.engine.task import peak_rss_bytes

    hit = (truth[:, :, None] == np.asarray(found)[:, None, :]).any(axis=2).mean()
    return {"seconds": seconds, "recall": float(hit), "peak": peak_rss_bytes(), **more}


def _sgemm_rate() -> float:
    """GFLOP/s of one 4096³ product on all cores; the best of four."""
    a = np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32)
    best = np.inf
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 4096**3 / best / 1e9


def _ours(path: Path, value: str) -> Row:
    # not at the top: the peers run without our settings for threads
    from d2filter.algorithm.knn import in_memory as knn
    from d2filter.algorithm.knn import search

    rows, queries, truth = _load(path)
    n = len(rows)
    hi, lo = np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)
    # compile: large enough for sketches, cells and refinement to be used
    few = min(n, 40_000)
    knn.build(knn.make_pool(rows[:few], hi[:few], lo[:few]), K, target_recall=0.97, exact_below=10)
    spent: dict[str, float] = {}
    original = search.search

    def timed(members: Any, asked: Any, *rest: Any, **more: Any) -> Any:
        started = time.perf_counter()
        found = original(members, asked, *rest, **more)
        if len(asked) == n and len(members.rows) == n:
            spent["search"] = time.perf_counter() - started
            sizes = np.diff(members.cell_start)  # groups; near enough to rows without copies
            probed = rest[1]
            evaluated = float(sizes[np.maximum(probed, 0)].sum())
            spent["flop"] = 2.0 * asked.shape[1] * evaluated
        return found

    search.search = timed  # type: ignore[assignment]  # watched, not changed
    started = time.perf_counter()
    graph, index = knn.build(knn.make_pool(rows, hi, lo), K, target_recall=float(value))
    seconds = time.perf_counter() - started
    rate = spent["flop"] / spent["search"] / 1e9
    return _finished(
        seconds,
        graph.neighbors[queries],
        truth,
        nlist=index.trained.cells.count,
        sketch=index.trained.cells.centroids.shape[1],
        probes=index.choice.probes,
        passes=index.choice.passes,
        evaluations=index.choice.evaluations,
        search=spent["search"],
        rate=rate,
        sgemm=_sgemm_rate(),
    )


def _ivf(path: Path, value: str) -> Row:
    index, wide, queries, truth, trained = _trained_ivf(path, value)
    started = time.perf_counter()
    _, found = index.search(wide, K + 1)
    seconds = trained + time.perf_counter() - started
    return _finished(seconds, _without(found[queries], queries), truth, nlist=index.nlist)


def _big_batch(path: Path, value: str) -> Row:
    from faiss.contrib import big_batch_search as contrib

    index, wide, queries, truth, trained = _trained_ivf(path, value)
    started = time.perf_counter()
    _, found = contrib.big_batch_search(  # type: ignore[no-untyped-call]
        index, wide, K + 1, method="knn_function", threaded=2, computation_threads=1
    )
    seconds = trained + time.perf_counter() - started
    return _finished(seconds, _without(found[queries], queries), truth, nlist=index.nlist)


def _trained_ivf(path: Path, value: str) -> tuple[Any, Any, Any, Any, float]:
    """A FAISS index with everything in it: index, rows, queries, truth, seconds that it took."""
    import faiss

    rows, queries, truth = _load(path)
    wide = rows.astype(np.float32)
    nlist = int(2 * np.sqrt(len(rows)))
    started = time.perf_counter()
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(wide.shape[1]), wide.shape[1], nlist)
    index.cp.max_points_per_centroid = 64
    index.train(wide)
    index.add(wide)
    index.nprobe = int(value)
    return index, wide, queries, truth, time.perf_counter() - started


def _pynndescent(path: Path, value: str) -> Row:
    import pynndescent

    rows, queries, truth = _load(path)
    wide = rows.astype(np.float32)
    pynndescent.NNDescent(wide[:5000], n_neighbors=int(value), n_jobs=2)
    started = time.perf_counter()
    lists = pynndescent.NNDescent(wide, n_neighbors=int(value), n_jobs=2).neighbor_graph[0]
    seconds = time.perf_counter() - started
    return _finished(seconds, _without(lists[queries], queries), truth)


def _hnswlib(path: Path, value: str) -> Row:
    import hnswlib

    rows, queries, truth = _load(path)
    wide = rows.astype(np.float32)
    started = time.perf_counter()
    index = hnswlib.Index("l2", wide.shape[1])
    index.init_index(len(wide), M=int(value), ef_construction=100)
    index.set_num_threads(2)
    index.add_items(wide)
    index.set_ef(48)
    found, _ = index.knn_query(wide, K + 1)
    seconds = time.perf_counter() - started
    return _finished(seconds, _without(found[queries].astype(np.int64), queries), truth)


def _partitions(path: Path, value: str) -> Row:
    from d2filter.algorithm.knn import in_memory as knn
    from d2filter.algorithm.knn import partition

    rows, _, _ = _load(path)
    n = len(rows)
    hi, lo = np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)
    pool = knn.make_pool(rows, hi, lo)
    graph, index = knn.build(pool, K, target_recall=0.95)
    held = knn.in_cells(pool, index.trained, probes=index.choice.probes)
    assigned = held.assigned
    out = []
    for count in (2, 4, 8, 16, 32, 64, 128):
        laid = partition.lay_out(index.trained.cells.centroids, held.sizes[None, :], count)
        home = laid.partition[0][assigned[:, 0]]
        row, _ = partition.destinations(assigned, home, *laid.owners_of(index.trained.cells.count))
        crossing = home[graph.neighbors] != home[:, None]
        out.append(
            {
                "partitions": count,
                "fan_out": row.size / n,
                "cross": float(crossing[graph.neighbors >= 0].mean()),
                "largest": float(laid.sizes().max() / laid.sizes().mean()),
            }
        )
    return {"rows": out}


METHODS = {
    "ours": _ours,
    "FAISS IVFFlat": _ivf,
    "big_batch_search": _big_batch,
    "pynndescent": _pynndescent,
    "hnswlib": _hnswlib,
    "partitions": _partitions,
}

if __name__ == "__main__":
    main()
