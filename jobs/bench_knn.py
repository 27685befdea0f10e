"""The graph against its peers: seconds for recall, growth, memory, and what partitions cost.

    pip install -e '.[cpu,bench]'
    python -m jobs.bench_knn --results jobs/results/bench_knn.md

Every figure is made in a process of its own, on the same drawn data, compiled beforehand; seconds
go from arrays in memory to neighbor lists, training and calibration included. Timings are ratios
within this run. About 40 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from d2filter.formats.runstate import versions
from jobs.bench import commit, processor

K = 5
DIM = 512
CHECKED = 1000
# scatter that gives IVF about the recall by probes of DESIGN §4: 4 → .94, 8 → .97
SPREAD = 0.5
COPIES = 0.1
_LIMIT = 420  # seconds that one measurement may take

_SECTIONS = ("peers", "growth", "both", "partitions", "agreement")

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
    """Run everything, or one measurement in this process (used by the first)."""
    parser = argparse.ArgumentParser(description="Seconds for recall, next to the peers.")
    parser.add_argument("--results", default="jobs/results/bench_knn.md")
    parser.add_argument("--data", default="")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "VALUE"))
    parser.add_argument(
        "--work", default="", help="folder for data and finished measurements, to go on from"
    )
    parser.add_argument(
        "--sections", default=",".join(_SECTIONS), help="some of " + ", ".join(_SECTIONS)
    )
    parser.add_argument("--quick", action="store_true", help="20,000 rows: does it run at all")
    arguments = parser.parse_args()
    if arguments.one:
        method, value = arguments.one
        print(json.dumps(_METHODS[method](Path(arguments.data), value)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.work or temporary)
        folder.mkdir(exist_ok=True)
        _all(folder, Path(arguments.results), arguments.sections.split(","), quick=arguments.quick)


def _all(folder: Path, results: Path, sections: list[str], *, quick: bool) -> None:
    small, large = (20_000, 30_000) if quick else (200_000, 500_000)
    growth = (10_000, 20_000) if quick else (250_000, 500_000, 1_000_000, 2_000_000)
    plan = {
        small: [
            *(("ours", v) for v in ("0.85", "0.93", "0.97")),
            ("FAISS IVFFlat", "4"),
            *(("big_batch_search", v) for v in ("4", "12", "24")),
            *(("pynndescent", v) for v in ("10", "15", "20")),
            ("hnswlib", "16"),
        ],
        large: [
            *(("ours", v) for v in ("0.85", "0.93", "0.97")),
            ("FAISS IVFFlat", "4"),
            *(("big_batch_search", v) for v in ("4", "12")),
            *(("pynndescent", v) for v in ("10", "15", "20")),
        ],
    }
    lines = [
        "# The kNN graph: seconds for recall, growth, partitions",
        "",
        f"Made by `python -m jobs.bench_knn` at commit {commit()} on {os.cpu_count()} cores "
        f"({processor()}); "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
        + ". Each figure in a process of its own, arrays to lists, training and (ours) calibration "
        "included, measuring and file I/O not. The machine is shared: read the ratios.",
        "",
        f"Data: `draw` in the file, {DIM}-d, clusters of heavy-tailed size, 10% near-copies. "
        f"recall@{K} on {CHECKED} samples against all rows.",
    ]
    if "peers" in sections:
        measured = {n: [_child(folder, n, DIM, *run) for run in runs] for n, runs in plan.items()}
        for n, rows in measured.items():
            lines += ["", f"## {n:,} rows", "", *_table(rows), "", _verdict(rows)]
        lines += ["", f"![seconds against recall]({results.stem}.png)"]
        _plot(measured, results.with_suffix(".png"))
    if "growth" in sections:
        grown = []
        for n in growth:
            grown.append(_child(folder, n, DIM, "ours", "0.9"))
            if n not in plan:
                _remove(folder, n, DIM)
        lines += _growth(grown)
    if "both" in sections:
        both = _child(folder, large, 2 * DIM, "ours", "0.9")
        lines += ["", f"## `image|text`: {large:,} × {2 * DIM}", "", *_table([both])]
    if "partitions" in sections:
        lines += _spread(large, _child(folder, large, DIM, "partitions", "")["rows"])
    if "agreement" in sections:
        lines += ["", "## Measured recall against an exact check of all rows", ""]
        lines.append(_agreement(5_000 if quick else 50_000))
    results.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def _growth(grown: list[Row]) -> list[str]:
    return [
        "",
        "## Growth (target 0.9)",
        "",
        "| rows | seconds | recall | peak memory, GB | cells | probes | passes | distances a row |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['n']:,} | {r['seconds']:.1f} | {r['recall']:.3f} | {r['peak'] / 1e9:.2f} | "
            f"{r['nlist']} | {r['probes']} | {r['passes']} | {r['evaluations']:.0f} |"
            for r in grown
        ),
        "",
        f"seconds grow as n^{_exponent(grown, 'seconds'):.2f}, "
        f"memory as n^{_exponent(grown, 'peak'):.2f}, "
        f"distances a row as n^{_exponent(grown, 'evaluations'):.2f}.",
    ]


def _spread(rows: int, measured: list[Row]) -> list[str]:
    return [
        "",
        f"## Partitions of {rows:,} rows",
        "",
        "| partitions | partitions a row goes to | edges that cross | largest / mean |",
        "|---|---|---|---|",
        *(
            f"| {r['partitions']} | {r['fan_out']:.2f} | {100 * r['cross']:.1f}% | "
            f"{r['largest']:.2f} |"
            for r in measured
        ),
    ]


def _prepare(folder: Path, n: int, dim: int) -> None:
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


def _remove(folder: Path, n: int, dim: int) -> None:
    (folder / f"{n}x{dim}.npy").unlink(missing_ok=True)


def _without(lists: Any, queries: Any) -> Any:
    """The first K of each list that are not the query itself."""
    return np.array([[j for j in r if j != q][:K] for r, q in zip(lists, queries, strict=True)])


def _child(folder: Path, n: int, dim: int, method: str, value: str) -> Row:
    """One measurement, or what an interrupted run has left of it."""
    path = folder / f"{n}x{dim}-{method}-{value}.json".replace(" ", "_")
    if not path.exists():
        _prepare(folder, n, dim)
        path.write_text(json.dumps(_measured(folder, n, dim, method, value)))
    row: Row = json.loads(path.read_text())
    return row


def _measured(folder: Path, n: int, dim: int, method: str, value: str) -> Row:
    words = [sys.executable, "-m", "jobs.bench_knn", "--data", str(folder / f"{n}x{dim}.npy")]
    try:
        done = subprocess.run(
            [*words, "--one", method, value],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT,
        )
    except subprocess.TimeoutExpired:
        print(f"{method} {value} on {n} rows: more than {_LIMIT} s", flush=True)
        return {"method": method, "value": value, "n": n, "seconds": None}
    if done.returncode:
        raise SystemExit(f"{method} {value} on {n} rows failed:\n{done.stderr[-2000:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    row.update(method=method, value=value, n=n)
    print(json.dumps(row), flush=True)
    return row


def _load(path: Path) -> tuple[Any, Any, Any]:
    known = np.load(path.with_suffix(".npz"))
    return np.load(path), known["queries"], known["truth"]


def _finished(seconds: float, found: Any, truth: Any, **more: Any) -> Row:
    from d2filter.stages.runner import peak_rss_bytes

    hit = (truth[:, :, None] == np.asarray(found)[:, None, :]).any(axis=2).mean()
    return {"seconds": seconds, "recall": float(hit), "peak": peak_rss_bytes(), **more}


def _sgemm_rate() -> float:
    """GFLOP/s of one 4096³ product, both cores; the best of three."""
    a = np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32)
    best = np.inf
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 4096**3 / best / 1e9


def _ours(path: Path, value: str) -> Row:
    from d2filter.algorithm import knn, search

    rows, queries, truth = _load(path)
    n, dim = rows.shape
    hi, lo = np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)
    warm = draw(3000, dim, seed=9)
    few = knn.make_pool(warm, hi[:3000], lo[:3000])
    knn.build(few, K, exact_below=10)
    spent: dict[str, float] = {}
    original = search.search

    def timed(members: Any, asked: Any, *rest: Any, **more: Any) -> Any:
        started = time.perf_counter()
        found = original(members, asked, *rest, **more)
        if len(asked) == n and len(members.rows) == n:
            spent["search"] = time.perf_counter() - started
            sizes = np.diff(members.cell_start)  # groups; near enough to rows without copies
            probed = rest[1]
            spent["evaluated"] = float(sizes[np.maximum(probed, 0)].sum())
        return found

    search.search = timed  # type: ignore[assignment]  # watched, not changed
    started = time.perf_counter()
    graph, index = knn.build(knn.make_pool(rows, hi, lo), K, target_recall=float(value))
    seconds = time.perf_counter() - started
    rate = 2 * dim * spent["evaluated"] / spent["search"] / 1e9
    return _finished(
        seconds,
        graph.neighbors[queries],
        truth,
        nlist=index.cells.count,
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
    from d2filter.algorithm import knn, partition

    rows, _, _ = _load(path)
    n = len(rows)
    hi, lo = np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)
    pool = knn.make_pool(rows, hi, lo)
    graph, index = knn.build(pool, K, target_recall=0.95)
    held = knn.in_cells(pool, index.cells)
    assigned = np.ascontiguousarray(held.assigned[:, : index.choice.probes])
    out = []
    for count in (2, 4, 8, 16, 32, 64, 128):
        laid = partition.lay_out(index.cells.centroids, held.sizes[None, :], count)
        home = laid.partition[0][assigned[:, 0]]
        row, _ = partition.destinations(assigned, home, *laid.owners_of(index.cells.count))
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


def _agreement(n: int) -> str:
    from d2filter.algorithm import knn

    rows = draw(n, DIM)
    pool = knn.make_pool(rows, np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64))
    graph, _ = knn.build(pool, K, target_recall=0.95, exact_below=100)
    told = knn.measure_recall(pool, graph)
    truth, _ = knn.exact_neighbors(pool, np.arange(n), K)
    real = float((truth[:, :, None] == graph.neighbors[:, None, :]).any(axis=2).mean())
    inside = told.low <= real <= told.high
    return (
        f"{n:,} rows: recall {told.value:.4f} [{told.low:.4f}, {told.high:.4f}] measured on "
        f"{told.queries:,} queries, {real:.4f} on all rows: "
        f"{'inside' if inside else 'OUTSIDE'} the interval."
    )


def _table(rows: list[Row]) -> list[str]:
    lines = [
        "| | setting | recall@5 | seconds | peak, GB | of which search | search, % of sgemm |",
        "|---|---|---|---|---|---|---|",
    ]
    what = {
        "ours": "target {}",
        "FAISS IVFFlat": "nprobe {}",
        "big_batch_search": "nprobe {}",
        "pynndescent": "n_neighbors {}",
        "hnswlib": "M {}, ef 100/48",
    }
    for r in rows:
        if r["seconds"] is None:
            lines.append(
                f"| {r['method']} | {what[r['method']].format(r['value'])} | "
                f"more than {_LIMIT} s | | | | |"
            )
            continue
        setting = what[r["method"]].format(r["value"])
        more = "| |"
        if r["method"] == "ours":
            setting += f": {r['probes']} of {r['nlist']} cells, {r['passes']} passes"
            more = f"{r['search']:.1f} s | {100 * r['rate'] / r['sgemm']:.0f}% |"
        lines.append(
            f"| {r['method']} | {setting} | {r['recall']:.3f} | {r['seconds']:.1f} | "
            f"{r['peak'] / 1e9:.1f} | {more}"
        )
    return lines


def _verdict(rows: list[Row]) -> str:
    """Ours at recall ≥ 0.97 against the fastest peer that has it."""
    good = [r for r in rows if r["seconds"] and r["recall"] >= 0.97]
    ours = min((r["seconds"] for r in good if r["method"] == "ours"), default=None)
    peers = [r for r in good if r["method"] != "ours"]
    if ours is None or not peers:
        return "At recall ≥ 0.97 there is nothing to compare."
    best = min(peers, key=lambda r: float(r["seconds"]))
    return (
        f"At recall ≥ 0.97: ours {ours:.1f} s, the fastest peer ({best['method']} {best['value']}) "
        f"{best['seconds']:.1f} s, ratio {ours / best['seconds']:.2f}."
    )


def _exponent(rows: list[Row], name: str) -> float:
    x = np.log([r["n"] for r in rows])
    return float(np.polyfit(x, np.log([r[name] for r in rows]), 1)[0])


def _plot(measured: dict[int, list[Row]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(measured), figsize=(11, 4.2), sharey=True)
    for axis, (n, rows) in zip(axes, measured.items(), strict=True):
        for method in dict.fromkeys(r["method"] for r in rows):
            some = sorted(
                (r for r in rows if r["method"] == method and r["seconds"]),
                key=lambda r: r["recall"],
            )
            axis.plot(
                [r["recall"] for r in some],
                [r["seconds"] for r in some],
                marker="o",
                linewidth=2.4 if method == "ours" else 1.2,
                label=method,
            )
        axis.set_title(f"{n:,} × {DIM}")
        axis.set_xlabel(f"recall@{K}")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds, arrays to lists")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


_METHODS = {
    "ours": _ours,
    "FAISS IVFFlat": _ivf,
    "big_batch_search": _big_batch,
    "pynndescent": _pynndescent,
    "hnswlib": _hnswlib,
    "partitions": _partitions,
}

if __name__ == "__main__":
    main()
