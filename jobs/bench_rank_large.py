"""Benchmark: `d2filter rank` on a graph larger than memory, of the size of DataComp's medium pool.

    python -m jobs.bench_rank_large --work /large/disk --results jobs/results/bench_rank_large.md

It draws the graph of `bench_rank` in parts, ranks it from files to files, checks the result as far
as one pass can, and writes the time, memory and exchanged bytes that stats.json contains.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from d2filter.formats import ranking
from d2filter.formats.paths import Folder
from jobs.bench import made_by
from jobs.bench_rank import rank_files, write_graph

SECONDS = 0.5  # between looks at the memory of the machine


def main() -> None:
    """Draw, rank, check, report."""
    parser = argparse.ArgumentParser(description="Rank a graph that is larger than memory.")
    parser.add_argument("--rows", type=int, default=128_000_000)
    parser.add_argument("--neighbors", type=int, default=5)
    parser.add_argument("--parts", type=int, default=32)
    parser.add_argument("--work", help="folder for about 200 bytes a row; a temporary one")
    parser.add_argument("--results", default="jobs/results/bench_rank_large.md")
    arguments = parser.parse_args()
    n, k, parts = arguments.rows, arguments.neighbors, arguments.parts
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        write_graph(folder, n, k, parts)
        graph_bytes = _size(folder / "graph")
        free = _Free()
        stats = rank_files(folder)
        least = free.stop()
        _check(folder, n)
        ranking_bytes = _size(folder / "ranking")
    command = f"jobs.bench_rank_large --rows {n} --neighbors {k} --parts {parts}"
    text = _report(command, n, parts, graph_bytes, ranking_bytes, least, free.total, stats)
    Path(arguments.results).write_text(text, "utf-8")
    print(text)


def _report(
    command: str,
    n: int,
    parts: int,
    graph_bytes: int,
    ranking_bytes: int,
    least: int,
    total: int,
    stats: dict[str, Any],
) -> str:
    rank = stats["rank"]
    detail = stats["seconds_detail"]
    steps = ", ".join(f"{name} {value:.1f}" for name, value in detail.items())
    lines = [
        f"# Ranking {n:,} samples on one machine",
        "",
        made_by(command)
        + f" {total / 1e9:.0f} GB of memory. Graph files to ranking files, in {parts} partitions; "
        "edges lie in files that the processes map, so the page cache holds what fits.",
        "",
        "| | |",
        "|---|---|",
        f"| seconds | {stats['seconds']['rank']:.0f} |",
        f"| samples a second | {n / stats['seconds']['rank']:,.0f} |",
        f"| edges that cross | {rank['cut_edges']:,} |",
        f"| supersteps, passes in the busiest process | {rank['supersteps']}, {rank['rounds']} |",
        f"| states exchanged between processes | {_gigabytes(rank['bytes_exchanged'], n)} |",
        f"| peak memory of a process, mapped files included "
        f"| {stats['peak_rss_bytes']['rank'] / 1e9:.2f} GB |",
        f"| least memory available on the machine | {least / 1e9:.2f} GB |",
        f"| graph/ on disk | {_gigabytes(graph_bytes, n)} |",
        f"| ranking/ on disk | {_gigabytes(ranking_bytes, n)} |",
        "",
        f"Seconds of the slowest task of each step: {steps}.",
        "",
        "Checked: every rank from 0 to n − 1 is given once, and scores fall with rank.",
    ]
    return "\n".join(lines) + "\n"


class _Free:
    """The least memory that the machine had available since this was made."""

    def __init__(self) -> None:
        self.total = _meminfo("MemTotal")
        self._least = _meminfo("MemAvailable")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS):
            self._least = min(self._least, _meminfo("MemAvailable"))

    def stop(self) -> int:
        """The least, in bytes."""
        self._ended.set()
        self._thread.join()
        return self._least


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/meminfo has no {name}")


def _check(folder: Path, n: int) -> None:
    """Ranks are a permutation along which scores fall. Memory: 8 bytes a sample."""
    final = np.full(n, np.iinfo(np.int64).min, np.int64)
    for part in ranking.iter_columns(Folder(str(folder)).sub("ranking"), ("rank", "final")):
        final[part["rank"].astype(np.int64)] = part["final"]
    if final.min() == np.iinfo(np.int64).min or (np.diff(final) > 0).any():
        raise SystemExit("the ranking is wrong")


def _gigabytes(size: int, n: int) -> str:
    return f"{size / 1e9:.2f} GB, {size / n:.1f} bytes a sample"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    main()
