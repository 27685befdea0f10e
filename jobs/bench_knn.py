"""Benchmark: compares the graph build with its peers: seconds, recall, memory, and partitions.

    pip install -e '.[cpu,bench]'
    python -m jobs.bench_knn --results jobs/results/bench_knn.md

Each figure is measured in a process of its own, on the same synthetic data, after compilation.
Seconds are from arrays in memory to neighbor lists, with training and calibration. Timings are
ratios within this run. It takes about 40 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from jobs.bench import made_by
from jobs.bench_extra import pyplot
from jobs.knn_methods import CHECKED, DIM, K, Row, draw, prepare

_LIMIT = 420  # seconds that one measurement may take

_SECTIONS = ("peers", "growth", "both", "partitions", "agreement")


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description="Seconds for recall, next to the peers.")
    parser.add_argument("--results", default="jobs/results/bench_knn.md")
    parser.add_argument(
        "--work", default="", help="folder for data and finished measurements, to go on from"
    )
    parser.add_argument(
        "--sections", default=",".join(_SECTIONS), help="some of " + ", ".join(_SECTIONS)
    )
    parser.add_argument("--quick", action="store_true", help="20,000 rows: does it run at all")
    arguments = parser.parse_args()
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
        f"{made_by('jobs.bench_knn')} Each figure in a process of its own, arrays to lists, "
        "training and (ours) calibration included, "
        "measuring and file I/O not. The machine is shared: read the ratios.",
        "",
        f"Data: `draw` in knn_methods.py, {DIM}-d, clusters of heavy-tailed size, 10% near-copies. "
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
        "| rows | seconds | recall | peak, GB | cells | axes | probes | passes | cost a row |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['n']:,} | {r['seconds']:.1f} | {r['recall']:.3f} | {r['peak'] / 1e9:.2f} | "
            f"{r['nlist']} | {r['sketch']} | {r['probes']} | {r['passes']} | "
            f"{r['evaluations']:.0f} |"
            for r in grown
        ),
        "",
        f"seconds grow as n^{_exponent(grown, 'seconds'):.2f}, "
        f"memory as n^{_exponent(grown, 'peak'):.2f}, "
        f"cost a row (in distances of whole rows) as n^{_exponent(grown, 'evaluations'):.2f}.",
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


def _remove(folder: Path, n: int, dim: int) -> None:
    (folder / f"{n}x{dim}.npy").unlink(missing_ok=True)


def _child(folder: Path, n: int, dim: int, method: str, value: str) -> Row:
    """One measurement, or what an interrupted run has left of it."""
    path = folder / f"{n}x{dim}-{method}-{value}.json".replace(" ", "_")
    if not path.exists():
        prepare(folder, n, dim)
        path.write_text(json.dumps(_measured(folder, n, dim, method, value)))
    row: Row = json.loads(path.read_text())
    return row


def _measured(folder: Path, n: int, dim: int, method: str, value: str) -> Row:
    data = str(folder / f"{n}x{dim}.npy")
    words = [sys.executable, "-m", "jobs.knn_methods", method, value, "--data", data]
    try:
        done = subprocess.run(
            words,
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


def _agreement(n: int) -> str:
    from d2filter.algorithm.knn import in_memory as knn

    rows = draw(n, DIM)
    pool = knn.make_pool(rows, np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64))
    graph, _ = knn.build(pool, K, target_recall=0.95, exact_below=100)
    measured = knn.measure_recall(pool, graph)
    truth = knn.exact_neighbors(pool, np.arange(n), K)
    real = float(truth.share_in(graph.neighbors).mean())
    inside = measured.low <= real <= measured.high
    return (
        f"{n:,} rows: recall {measured.value:.4f} [{measured.low:.4f}, {measured.high:.4f}] "
        f"measured on {measured.queries:,} queries, {real:.4f} on all rows: "
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
            setting += (
                f": {r['probes']} of {r['nlist']} cells, {r['passes']} passes, {r['sketch']} axes"
            )
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
    plt = pyplot()
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


if __name__ == "__main__":
    main()
