"""Benchmark: compares the exact greedy with a sequential heap, compiled and in Python.

    python -m jobs.bench_rank --results jobs/results/bench_rank.md

It measures seconds, memory and exchanged bytes. In the synthetic graph, neighbors are close in the
order of rows, and 10% of the edges go anywhere; a second graph has uids in no order, like a real
pool. Each figure is measured in a process of its own, after compilation. Seconds are from neighbor
lists and difficulties in memory to the final scores and the order of all samples.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from d2filter.algorithm.greedy import messages, ranker, schemes
from d2filter.algorithm.knn import products
from d2filter.engine.task import peak_rss_bytes, reset_peak_rss
from d2filter.formats import graph
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import Plan, RunState
from jobs.bench import made_by

SEED = 0
FAR = 0.1
NEAR = 60  # steps between neighbors that lie close by
FRACTION = 0.3
BLOCK = 1_000_000  # rows drawn at a time

Row = dict[str, Any]


def rows_of(n: int, k: int, begin: int, end: int) -> ranker.PartitionRows:
    """Rows begin … end − 1 of a graph of n rows with k neighbors each, a growing distance; ids and
    uids ascend with rows. begin is a multiple of BLOCK.
    """
    neighbors = np.empty((end - begin, k), np.int64)
    sqdist = np.empty((end - begin, k), np.float32)
    difficulty = np.empty(end - begin, np.float32)
    for start in range(begin, end, BLOCK):
        rng = np.random.default_rng([SEED, n, k, start])
        some = slice(start - begin, min(start + BLOCK, end) - begin)
        size = some.stop - some.start
        row = start + np.arange(size)[:, None]
        near = (row + rng.integers(1, NEAR, (size, k)).cumsum(axis=1)) % n
        far = rng.random((size, k)) < FAR
        # far ones distinct from the near ones and from the row itself
        away = (row + k * NEAR + rng.integers(0, n // (2 * k), (size, k)) * k + np.arange(k)) % n
        neighbors[some] = np.where(far, away, near)
        sqdist[some] = np.sort(rng.random((size, k), dtype=np.float32), axis=1)
        difficulty[some] = rng.random(size, dtype=np.float32)
    return ranker.PartitionRows(
        hi=np.zeros(end - begin, np.uint64),
        lo=np.arange(begin, end, dtype=np.uint64),
        difficulty=difficulty,
        neighbors=neighbors,
        sqdist=sqdist,
    )


def draw(n: int, k: int, *, ordered: bool = True) -> ranker.PartitionRows:
    """The whole graph; ordered: uids ascend with rows, or else neighbors lie anywhere."""
    rows = rows_of(n, k, 0, n)
    if ordered:
        return rows
    order = np.random.default_rng(SEED).permutation(n)
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    return ranker.PartitionRows(
        hi=rows.hi,
        lo=rows.lo,
        difficulty=rows.difficulty[order],
        neighbors=place[rows.neighbors[order]],
        sqdist=rows.sqdist[order],
    )


def main() -> None:
    """Run everything, or one measurement in this process."""
    parser = argparse.ArgumentParser(description="The exact greedy next to sequential ones.")
    parser.add_argument("--results", default="jobs/results/bench_rank.md")
    parser.add_argument("--one", nargs=4, metavar=("METHOD", "ROWS", "K", "ORDER"))
    parser.add_argument("--sizes", default="1000000,12800000")
    arguments = parser.parse_args()
    if arguments.one:
        method, n, k, order = arguments.one
        print(json.dumps(_measure(method, int(n), int(k), ordered=order == "ordered")))
        return
    lines = [
        "# The exact greedy: seconds, memory, exchange",
        "",
        f"{made_by('jobs.bench_rank')} Each figure in a process of its own, from lists in memory "
        "to the order of all samples; ours on two threads, if not said otherwise, the others on "
        "one. `greedy` is the part after the forward pass; bytes a sample "
        "are what the process took beyond the lists, which are let go when they have become edges. "
        f"The loops in Python select {FRACTION} of the samples, the others rank all. "
        "The machine is shared: read the ratios.",
    ]
    for n in (int(size) for size in arguments.sizes.split(",")):
        small = n <= 1_000_000
        for k in (1, 5):
            methods = [m for m in _METHODS if small or not m.startswith("python")]
            if k > 1:
                methods = [m for m in methods if m != "python sorted list"]  # takes too long
            lines += _table(n, k, {name: _child(name, n, k) for name in methods})
            # uids in no order: the same work, but every look at a neighbor misses the cache
            methods = ["ours", "ours, one thread", "compiled heap"]
            lines += _table(n, k, {m: _child(m, n, k, "unordered") for m in methods}, "unordered")
            if small:
                lines += ["", _files_to_files(n, k)]
            Path(arguments.results).write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def _table(n: int, k: int, rows: dict[str, Row], order: str = "ordered") -> list[str]:
    first = next(iter(rows.values()))
    lines = [
        "",
        f"## {n:,} samples, k={k}" + (", uids in no order" if order == "unordered" else ""),
        "",
        "| | seconds | of which greedy | × the first | peak, GB | bytes a sample | looks "
        "| supersteps | exchanged, MB | of it the largest superstep |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        same = "" if r["digest"] == first["digest"] or name.startswith("python") else " (DIFFERS)"
        sent = r.get("sent") or [0]
        lines.append(
            f"| {name}{same} | {r['seconds']:.2f} | {r['greedy']:.2f} | "
            f"{r['seconds'] / first['seconds']:.2f} | {r['peak'] / 1e9:.2f} | "
            f"{r['per_sample']:.0f} | {r.get('looks', '')} | {r.get('supersteps', '')} | "
            f"{sum(sent) / 1e6:.1f} | {max(sent) / 1e6:.1f} |"
        )
    return lines


def _child(method: str, n: int, k: int, order: str = "ordered") -> Row:
    words = [sys.executable, "-m", "jobs.bench_rank", "--one", method, str(n), str(k), order]
    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=errors, check=False)
        if done.returncode:
            errors.seek(0)
            raise SystemExit(f"{method} on {n} rows failed:\n{errors.read().decode()[-2000:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"method": method, "n": n, "k": k, "order": order, **row}), flush=True)
    return row


def _measure(method: str, n: int, k: int, *, ordered: bool) -> Row:
    _METHODS[method]([draw(2000, k)])  # compile
    given = [draw(n, k, ordered=ordered)]
    held = sum(getattr(given[0], field.name).nbytes for field in fields(ranker.PartitionRows))
    reset_peak_rss()
    empty = peak_rss_bytes() - held
    products.use_threads(1)  # ours set their own
    started = time.perf_counter()
    found = _METHODS[method](given)
    found["seconds"] = time.perf_counter() - started
    peak = peak_rss_bytes()
    order = found.pop("order")
    found["digest"] = int((order * (1 + np.arange(order.size))).sum() % 2**61)
    return {**found, "peak": peak, "per_sample": (peak - empty) / n}


def _in_partitions(given: list[ranker.PartitionRows], *, parts: int, threads: int) -> Row:
    """Runs of rows as partitions, as many at a time as there are threads. Takes the rows out of the
    list, for they are let go on the way.
    """
    workers = min(parts, threads)
    products.use_threads(threads // workers)
    rows = given.pop()
    hi, lo, difficulty = rows.hi, rows.lo, rows.difficulty
    n = len(hi)
    starts = np.linspace(0, n, parts + 1).astype(np.int64)
    partitions = []
    for p in range(parts):
        some = slice(starts[p], starts[p + 1])
        part = {field.name: getattr(rows, field.name)[some] for field in fields(rows)}
        partitions.append(ranker.RankingPartition(ranker.PartitionRows(**part), starts, p))
    del rows, part
    low, high = float(difficulty.min()), float(difficulty.max())

    def start(one: ranker.RankingPartition) -> None:
        ids = one.halo()
        known = ranker.HaloSamples(
            ids=ids, hi=hi[ids], lo=lo[ids], difficulty=difficulty[ids],
            is_demoted=np.zeros(ids.size, np.bool_), reach=np.zeros(ids.size, np.float32),
        )  # fmt: skip
        one.start_ranking(schemes.Scheme(), low, high, known)

    with ThreadPoolExecutor(workers) as pool:
        for p, cut in enumerate(pool.map(lambda one: one.leaving_edges(), partitions)):
            for q in range(parts):
                if q != p:
                    partitions[q].add_edges(*cut.to(q))
        list(pool.map(start, partitions))
        started = time.perf_counter()
        looks = 0
        sent: list[int] = []

        def send(one: ranker.RankingPartition) -> list[ranker.States]:
            return [one.states_for(q) for q in range(parts)]

        def hear(q: int, states: list[list[ranker.States]]) -> None:
            for p in range(parts):
                partitions[q].receive_states(states[p][q])

        while any(one.live() for one in partitions):
            states = list(pool.map(send, partitions))
            list(pool.map(partial(hear, states=states), range(parts)))
            sent.append(sum(one.nbytes for some in states for one in some))
            looks += sum(pool.map(lambda one: one.advance(), partitions))
        greedy = time.perf_counter() - started
        final = np.concatenate([out.final for out in pool.map(lambda s: s.outcome(), partitions)])
    # rows ascend by uid
    order = np.argsort(~final, kind="stable")
    return {
        "order": order,
        "greedy": greedy,
        "supersteps": len(sent),
        "looks": round(looks / n, 2),
        "sent": sent,
    }


def _files_to_files(n: int, k: int) -> str:
    """`d2filter rank` on this graph, in one part and in eight."""
    took = []
    for parts in (1, 8):
        with tempfile.TemporaryDirectory() as folder:
            write_graph(Path(folder), n, k, parts)
            took.append(rank_files(Path(folder))["seconds"]["rank"])
    return (
        f"`d2filter rank`, graph files to ranking files, Ray started by it: {took[0]:.1f} s in one "
        f"partition, {took[1]:.1f} s in eight."
    )


def write_graph(folder: Path, n: int, k: int, parts: int) -> None:
    """A run directory whose graph this is: parts of consecutive rows, none of them held longer."""
    out = Folder(str(folder))
    blocks = -(-n // BLOCK)
    bounds = [
        n * p // parts if blocks < parts else min(n, BLOCK * (blocks * p // parts))
        for p in range(parts + 1)
    ]
    bounds[-1] = n
    whole = rows_of(n, k, 0, n) if blocks < parts else None
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if whole is None:
            rows = rows_of(n, k, begin, end)
            part = {field.name: getattr(rows, field.name) for field in fields(rows)}
        else:
            part = {field.name: getattr(whole, field.name)[begin:end] for field in fields(whole)}
        graph.publish_part(out.sub("graph"), number, graph.GraphPart(**part))
    state = RunState(out)
    samples = {"read": n, "ranked": n, "bad": 0, "duplicate": 0}
    for stage, stats in (("catalog", {"samples": samples}), ("graph", {"k": k})):
        plan = Plan(stage=stage, options={}, upstream="", inputs=())
        state.finish(plan, seconds=0.0, peak_rss_bytes=0, stats=stats)


def rank_files(folder: Path) -> Row:
    """`d2filter rank` in a process of its own; its stats.json."""
    words = [sys.executable, "-m", "d2filter", "rank", "--out-dir", str(folder)]
    subprocess.run(words, check=True)
    stats: Row = json.loads((folder / "stats.json").read_text())
    return stats


def _forward(rows: ranker.PartitionRows) -> tuple[Any, Any]:
    """Forward scores and weights, as the heaps need them."""
    n, k = rows.neighbors.shape
    scheme = schemes.Scheme()
    weights = scheme.reverse_weights(rows.sqdist)
    scores = messages.normalized(rows.difficulty)
    start = np.arange(0, n * k + 1, k)
    gathered = messages.gather(scores, start, rows.neighbors.ravel(), weights.ravel())
    return scheme.forward_scores(scores, gathered), weights


def _compiled_heap(given: list[ranker.PartitionRows]) -> Row:
    rows = given.pop()
    x, weights = _forward(rows)
    started = time.perf_counter()
    order = _lazy_heap(x, rows.neighbors, weights)
    return {"order": order, "greedy": time.perf_counter() - started}


@numba.njit(cache=True)
def _lazy_heap(x, neighbors, weights):  # type: ignore[no-untyped-def]  # compiled by numba
    """The sequential definition: an entry that a message made stale goes back in with its score."""
    n, k = neighbors.shape
    heap = [(-x[i], i) for i in range(n)]
    heapq.heapify(heap)
    done = np.zeros(n, np.bool_)
    order = np.empty(n, np.int64)
    count = 0
    while count < n:
        key, i = heapq.heappop(heap)
        if done[i]:
            continue
        if -key != x[i]:
            heapq.heappush(heap, (-x[i], i))
            continue
        done[i] = True
        order[count] = i
        count += 1
        if x[i] <= 0:
            continue
        for c in range(k):
            j = neighbors[i, c]
            if not done[j]:
                x[j] -= np.int64(np.rint(np.float64(weights[i, c]) * np.float64(x[i])))
    return order


def _as_lists(
    given: list[ranker.PartitionRows],
) -> tuple[float, list[int], list[list[int]], list[list[float]]]:
    """When the forward pass was done, its scores, neighbors and weights, as Python has them."""
    rows = given.pop()
    forward, weights = _forward(rows)
    started = time.perf_counter()
    return started, forward.tolist(), rows.neighbors.tolist(), weights.tolist()


def _python_heap(given: list[ranker.PartitionRows]) -> Row:
    """The same in Python, until FRACTION of the samples is selected."""
    started, x, lists, w = _as_lists(given)
    heap = [(-value, row) for row, value in enumerate(x)]
    heapq.heapify(heap)
    done = bytearray(len(x))
    order: list[int] = []
    size = int(FRACTION * len(x))
    while len(order) < size:
        key, i = heapq.heappop(heap)
        if done[i]:
            continue
        if -key != x[i]:
            heapq.heappush(heap, (-x[i], i))
            continue
        done[i] = 1
        order.append(i)
        if x[i] > 0:
            for j, weight in zip(lists[i], w[i], strict=True):
                if not done[j]:
                    x[j] -= round(weight * x[i])
    return {"order": np.array(order), "greedy": time.perf_counter() - started}


def _python_sorted(given: list[ranker.PartitionRows]) -> Row:
    """A plain loop over a list that stays sorted, until FRACTION of the samples is selected."""
    started, x, lists, w = _as_lists(given)
    keys = sorted((value, -row) for row, value in enumerate(x))  # the best one last
    done = bytearray(len(x))
    order: list[int] = []
    size = int(FRACTION * len(x))
    while len(order) < size:
        i = -keys.pop()[1]
        done[i] = 1
        order.append(i)
        if x[i] > 0:
            for j, weight in zip(lists[i], w[i], strict=True):
                if not done[j]:
                    del keys[bisect.bisect_left(keys, (x[j], -j))]
                    x[j] -= round(weight * x[i])
                    bisect.insort(keys, (x[j], -j))
    return {"order": np.array(order), "greedy": time.perf_counter() - started}


_METHODS: dict[str, Callable[[list[ranker.PartitionRows]], Row]] = {
    "ours": partial(_in_partitions, parts=1, threads=2),
    "ours, one thread": partial(_in_partitions, parts=1, threads=1),
    "ours, 2 partitions": partial(_in_partitions, parts=2, threads=2),
    "ours, 8 partitions": partial(_in_partitions, parts=8, threads=2),
    "ours, 8 partitions, one thread": partial(_in_partitions, parts=8, threads=1),
    "compiled heap": _compiled_heap,
    "python heap": _python_heap,
    "python sorted list": _python_sorted,
}

if __name__ == "__main__":
    main()
