"""The exact greedy next to a sequential heap, compiled and in Python: seconds, memory, exchange.

    python -m jobs.bench_rank --results jobs/results/bench_rank.md

The graph is drawn: neighbors close by in the order of rows, 10% of the edges to anywhere. Every
figure is made in a process of its own, compiled beforehand; seconds go from lists of neighbors and
difficulty in memory to the final scores and the order of all samples.
"""

from __future__ import annotations

import argparse
import heapq
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np

from d2filter.algorithm import merge, messages, schemes, share
from d2filter.stages.runner import peak_rss_bytes
from jobs.bench import made_by

SEED = 0
FAR = 0.1
NEAR = 60  # steps between neighbors that lie close by
FRACTION = 0.3

Row = dict[str, Any]


def draw(n: int, k: int) -> share.Rows:
    """n rows with k neighbors each: a growing distance, ids ascending with rows."""
    rng = np.random.default_rng([SEED, n, k])
    neighbors = np.empty((n, k), np.int64)
    sqdist = np.empty((n, k), np.float32)
    for begin in range(0, n, 1_000_000):
        size = min(1_000_000, n - begin)
        row = begin + np.arange(size)[:, None]
        near = (row + rng.integers(1, NEAR, (size, k)).cumsum(axis=1)) % n
        far = rng.random((size, k)) < FAR
        # far ones distinct from the near ones and from the row itself
        away = (row + k * NEAR + rng.integers(0, n // (2 * k), (size, k)) * k + np.arange(k)) % n
        neighbors[begin : begin + size] = np.where(far, away, near)
        sqdist[begin : begin + size] = np.sort(rng.random((size, k)), axis=1)
    return share.Rows(
        hi=np.zeros(n, np.uint64),
        lo=np.arange(n, dtype=np.uint64),
        difficulty=rng.random(n, dtype=np.float32),
        neighbors=neighbors,
        sqdist=sqdist,
    )


def main() -> None:
    """Run everything, or one measurement in this process."""
    parser = argparse.ArgumentParser(description="The exact greedy next to sequential ones.")
    parser.add_argument("--results", default="jobs/results/bench_rank.md")
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "ROWS", "K"))
    parser.add_argument("--sizes", default="1000000,12800000")
    arguments = parser.parse_args()
    if arguments.one:
        method, n, k = arguments.one
        print(json.dumps(_measure(method, int(n), int(k))))
        return
    lines = [
        "# The exact greedy: seconds, memory, exchange",
        "",
        f"{made_by('jobs.bench_rank')} Each figure in a process of its own, from lists in memory "
        "to the order of all samples; one thread a partition. The machine is shared: read the "
        "ratios.",
    ]
    for n in (int(size) for size in arguments.sizes.split(",")):
        for k in (1, 5):
            methods = ["ours", "ours P=8", "compiled heap"]
            methods += ["python heap"] if n <= 1_000_000 else []
            lines += _table(n, k, {name: _child(name, n, k) for name in methods})
    Path(arguments.results).write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def _table(n: int, k: int, rows: dict[str, Row]) -> list[str]:
    ours = rows["ours"]
    lines = [
        "",
        f"## {n:,} samples, k={k}",
        "",
        "| | seconds | of which greedy | × ours | peak, GB | bytes a sample | rounds | supersteps "
        "| exchanged, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        same = "" if r["digest"] == ours["digest"] or name == "python heap" else " (DIFFERS)"
        lines.append(
            f"| {name}{same} | {r['seconds']:.2f} | {r.get('greedy', r['seconds']):.2f} | "
            f"{r['seconds'] / ours['seconds']:.2f} | {r['peak'] / 1e9:.2f} | "
            f"{r.get('per_sample', 0):.0f} | {r.get('rounds', '')} | {r.get('supersteps', '')} | "
            f"{r.get('bytes', 0) / 1e6:.1f} |"
        )
    return lines


def _child(method: str, n: int, k: int) -> Row:
    words = [sys.executable, "-m", "jobs.bench_rank", "--one", method, str(n), str(k)]
    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=errors, check=False)
        if done.returncode:
            errors.seek(0)
            raise SystemExit(f"{method} on {n} rows failed:\n{errors.read().decode()[-2000:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"method": method, "n": n, "k": k, **row}), flush=True)
    return row


def _measure(method: str, n: int, k: int) -> Row:
    _METHODS[method](draw(2000, k))  # compile
    rows = draw(n, k)
    before = peak_rss_bytes()
    started = time.perf_counter()
    found = _METHODS[method](rows)
    found["seconds"] = time.perf_counter() - started
    order = found.pop("order")
    found["digest"] = int((order * (1 + np.arange(order.size))).sum() % 2**61)
    peak = peak_rss_bytes()
    return {**found, "peak": peak, "per_sample": (peak - before) / n}


def _ours(rows: share.Rows) -> Row:
    return _in_partitions(rows, 1)


def _ours_in_eight(rows: share.Rows) -> Row:
    return _in_partitions(rows, 8)


def _in_partitions(rows: share.Rows, parts: int) -> Row:
    """Runs of rows as partitions, in threads of this process."""
    n = len(rows.hi)
    starts = np.linspace(0, n, parts + 1).astype(np.int64)
    shares = []
    for p in range(parts):
        some = slice(starts[p], starts[p + 1])
        part = share.Rows(
            hi=rows.hi[some], lo=rows.lo[some], difficulty=rows.difficulty[some],
            neighbors=rows.neighbors[some], sqdist=rows.sqdist[some],
        )  # fmt: skip
        shares.append(share.Share(part, starts, p))
    low, high = float(rows.difficulty.min()), float(rows.difficulty.max())
    with ThreadPoolExecutor(2) as pool:
        for p, cut in enumerate(pool.map(lambda one: one.cut(), shares)):
            for q in range(parts):
                if q != p:
                    shares[q].hear_edges(*cut.to(q))

        def begin(one: share.Share) -> None:
            ids = one.halo()
            known = share.Known(
                ids=ids, hi=rows.hi[ids], lo=rows.lo[ids], difficulty=rows.difficulty[ids]
            )
            one.begin(schemes.Scheme(), low, high, known)

        list(pool.map(begin, shares))
        started = time.perf_counter()
        supersteps, rounds, size = 0, 0, 0
        while True:
            supersteps += 1
            rounds = max(rounds, *pool.map(lambda one: one.advance(), shares), 0)
            if not any(one.live() for one in shares):
                break
            for p, one in enumerate(shares):
                for q, other in enumerate(shares):
                    if p != q:
                        states = one.states_for(q)
                        size += states.nbytes
                        other.hear_states(states)
        greedy = time.perf_counter() - started
        final = np.concatenate([out.final for out in pool.map(lambda s: s.outcome(), shares)])
    order = merge.Keys(x=final, hi=rows.hi, lo=rows.lo).best_first()
    return {
        "order": order, "greedy": greedy, "supersteps": supersteps, "rounds": rounds, "bytes": size,
    }  # fmt: skip


def _forward(rows: share.Rows) -> tuple[Any, Any]:
    """Forward scores and weights, as the heaps need them."""
    n, k = rows.neighbors.shape
    scheme = schemes.Scheme()
    weights = scheme.reverse_weights(rows.sqdist)
    scores = messages.normalized(rows.difficulty)
    start = np.arange(0, n * k + 1, k)
    gathered = messages.gather(scores, start, rows.neighbors.ravel(), weights.ravel())
    return scheme.forward_scores(scores, gathered), weights


def _compiled_heap(rows: share.Rows) -> Row:
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


def _python_heap(rows: share.Rows) -> Row:
    """The same in Python, until FRACTION of the samples is selected."""
    forward, weights = _forward(rows)
    started = time.perf_counter()
    x, lists, w = forward.tolist(), rows.neighbors.tolist(), weights.tolist()
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


_METHODS = {
    "ours": _ours,
    "ours P=8": _ours_in_eight,
    "compiled heap": _compiled_heap,
    "python heap": _python_heap,
}

if __name__ == "__main__":
    main()
