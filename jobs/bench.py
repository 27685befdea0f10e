"""`make bench`: the two algorithms against plain baselines, in one run.

    python -m jobs.bench --results jobs/results/bench.md

Ranking: the exact greedy of one million samples against a sequential lazy heap in Python, on a
graph with locality. Graph: search by cell against FAISS's own per-query IVF search with the same
number of cells, at the recall that each reaches. Timings are ratios within this run.
"""

from __future__ import annotations

import argparse
import heapq
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from d2filter.algorithm import backend, features, greedy, knn, messages, schemes
from d2filter.formats.runstate import versions

SEED = 0
RANKED = 1_000_000
POOL, DIM, NEIGHBORS = 100_000, 128, 5


def main() -> None:
    """Run both and write the results file."""
    parser = argparse.ArgumentParser(description="Time ranking and graph against baselines.")
    parser.add_argument("--results", default="jobs/results/bench.md")
    path = Path(parser.parse_args().results)
    lines = [
        "# Algorithms against plain baselines",
        "",
        f"{made_by('jobs.bench')} The machine is shared: read the ratios.",
        "",
        *_ranking(),
        "",
        *_graph(),
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def _ranking() -> list[str]:
    lines = [
        f"## Ranking {RANKED:,} samples (kernel only)",
        "",
        "| k | ours, s | rounds | sequential heap in Python, s | ratio | same order and scores |",
        "|---|---|---|---|---|---|",
    ]
    for k in (1, 5):
        rng = np.random.default_rng([SEED, k])
        near = np.arange(RANKED)[:, None] + rng.integers(1, 60, (RANKED, k)).cumsum(axis=1)
        far = rng.integers(0, RANKED, (RANKED, k))
        neighbors = np.where(rng.random((RANKED, k)) < 0.1, far, near % RANKED).astype(np.int32)
        neighbors[neighbors == np.arange(RANKED)[:, None]] = -1
        weights = np.exp(-rng.random((RANKED, k))).astype(np.float32)
        scores, there = rng.random(RANKED), neighbors >= 0
        start = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
        gathered = messages.gather(scores, start, neighbors[there], weights[there])
        forward = schemes.Scheme().forward_scores(scores, gathered)
        greedy.select_all(forward[:1000], neighbors[:1000] % 1000, weights[:1000])  # compile
        ours, chosen = _time(
            lambda f, n, w: greedy.select_all(f, n, w), forward, neighbors, weights
        )
        theirs, (order, final) = _time(_heap, forward, neighbors, weights)
        same = bool((np.argsort(chosen.rank) == order).all() and (chosen.final == final).all())
        lines.append(
            f"| {k} | {ours:.2f} | {chosen.rounds} | {theirs:.1f} | {theirs / ours:.0f} × | "
            f"{'yes' if same else 'NO'} |"
        )
    return lines


def _heap(forward: Any, neighbors: Any, weights: Any) -> tuple[Any, Any]:
    """The sequential definition with a lazily updated heap; rows ascend by uid."""
    x = forward.tolist()
    lists, w = neighbors.tolist(), weights.tolist()
    heap = [(-value, row) for row, value in enumerate(x)]
    heapq.heapify(heap)
    live = [True] * len(x)
    order = []
    while heap:
        key, i = heapq.heappop(heap)
        if not live[i] or -key != x[i]:
            continue
        live[i] = False
        order.append(i)
        if x[i] <= 0:
            continue
        for j, weight in zip(lists[i], w[i], strict=True):
            if j >= 0 and live[j]:
                x[j] = max(x[j] - round(weight * float(x[i])), messages.FLOOR)
                heapq.heappush(heap, (-x[j], j))
    return np.array(order), np.array(x)


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
    faiss = backend.load_faiss()
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
