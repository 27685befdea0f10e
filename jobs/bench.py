"""Benchmark: compares the graph build with a per-query IVF search of FAISS.

    python -m jobs.bench --results jobs/results/bench.md

Both use the same number of cells; the recall of each is given. Timings are ratios within this run.
`jobs.bench_knn` has more peers and larger pools, `jobs.bench_rank` measures the ranking.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from d2filter.algorithm import features
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.knn import products
from d2filter.formats.runstate import versions

SEED = 0
POOL, DIM, NEIGHBORS = 100_000, 128, 5


def main() -> None:
    """Run it and write the results file."""
    parser = argparse.ArgumentParser(description="Time the graph against FAISS.")
    parser.add_argument("--results", default="jobs/results/bench.md")
    path = Path(parser.parse_args().results)
    lines = [
        "# The graph against FAISS's own IVF search",
        "",
        f"{made_by('jobs.bench')} The machine is shared: read the ratios.",
        "",
        *_graph(),
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def _graph() -> list[str]:
    rng = np.random.default_rng([SEED, 9])
    centers = rng.normal(size=(POOL // 200, DIM))
    rows = features.fix(
        [centers[rng.integers(0, len(centers), POOL)] + rng.normal(size=(POOL, DIM))]
    )
    hi, lo = np.arange(POOL, dtype=np.uint64), np.zeros(POOL, np.uint64)
    few = knn.make_pool(rows[:3000], hi[:3000], lo[:3000])
    knn.build(few, NEIGHBORS, target_recall=0.9, exact_below=9)  # compile
    pool = knn.make_pool(rows, hi, lo)
    seconds, (graph, index) = _time(lambda: knn.build(pool, NEIGHBORS, target_recall=0.95))
    recall = knn.measure_recall(pool, graph)
    faiss = products.load_faiss()
    wide = features.to_float32(rows)
    nlist = int(2 * np.sqrt(POOL))
    plain = faiss.IndexIVFFlat(faiss.IndexFlatL2(DIM), DIM, nlist)

    def train() -> None:
        plain.train(wide)
        plain.add(wide)

    their_training, _ = _time(train)
    queries = np.random.default_rng(1).choice(POOL, 3000, replace=False)
    truth = knn.exact_neighbors(pool, queries, NEIGHBORS)
    lines = [
        f"## Graph of {POOL:,} × {DIM} clustered float16 rows, k={NEIGHBORS}",
        "",
        "Peers and more: [bench_knn.md](bench_knn.md).",
        "",
        "| | cells | probes | recall@5 | seconds |",
        "|---|---|---|---|---|",
        f"| ours, training and calibration included | {index.trained.cells.count} | "
        f"{index.choice.probes} | {recall.value:.3f} | {seconds:.1f} |",
    ]
    for probes in (1, 2, 4, 8):
        plain.nprobe = probes
        seconds, (_, found) = _time(lambda: plain.search(wide, NEIGHBORS + 1))
        hits = truth.share_in(found[queries]).mean()
        lines.append(
            f"| FAISS IndexIVFFlat | {nlist} | {probes} | {hits:.3f} | "
            f"{their_training + seconds:.1f} |"
        )
    return lines


def _time(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run(*arguments)
    return time.perf_counter() - started, result


def made_by(command: str) -> str:
    """The sentence that every results file has: command, commit, machine, versions."""
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"Made by `python -m {command}` at commit {commit()} on {os.cpu_count()} cores "
        f"({processor()}); {software}."
    )


def commit() -> str:
    """Short hash of the tree's commit."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    """Model name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


if __name__ == "__main__":
    main()
