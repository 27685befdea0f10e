"""Benchmark: the time that a run spends on being resumable, and the time to rerun a finished run.

    python -m jobs.bench_resume --out /tmp/bench-resume --results jobs/results/bench_resume.md

It runs the dirty pool of `bench_run`, then repeats the bookkeeping of the run alone: it publishes
and reads each marker, note and record, appends each log line, and computes each checksum. A run
does most of this in parallel, so the reported share is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from d2filter import config
from d2filter.formats.paths import Folder, checksum
from d2filter.formats.runstate import RunState
from d2filter.stages.pipeline import Pipeline
from d2filter.tools import provenance
from jobs import bench_run
from jobs.bench import made_by


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one run."""

    partitions: int
    seconds: float
    """of the whole run, from the command to its end"""
    again: float
    """of the same command after it"""
    parts: dict[str, tuple[int, float]]
    """how many there were of each kind of bookkeeping, and the seconds that they take alone"""

    @property
    def share(self) -> float:
        """Bookkeeping by all seconds."""
        return sum(seconds for _, seconds in self.parts.values()) / self.seconds


def main() -> None:
    """Make the pool, run it in one partition and in several, write the results file."""
    parser = argparse.ArgumentParser(description="Time the bookkeeping of a run.")
    parser.add_argument("--out", required=True)
    parser.add_argument("--results", default="jobs/results/bench_resume.md")
    parser.add_argument("--samples", type=int, default=400_000)
    arguments = parser.parse_args()
    pool = bench_run.PoolConfig(samples=arguments.samples)
    root = Path(arguments.out)
    shutil.rmtree(root, ignore_errors=True)
    bench_run.make(root / "metadata", pool)
    costs = [measure(root, partitions) for partitions in (1, 8)]
    text = _report(pool, costs)
    Path(arguments.results).write_text(text, "utf-8")
    print(text)


def measure(root: Path, partitions: int) -> Cost:
    """Run, run again, and do the bookkeeping alone."""
    out = root / f"run-{partitions}"
    chosen = config.RunConfig(
        out_dir=str(out),
        metadata_dir=str(root / "metadata"),
        graph=config.GraphConfig(n_neighbors=5),
        select=config.SelectConfig(fraction=Decimal("0.3")),
        partitions=partitions,
        max_bad=1,
        best_effort=True,
    )
    times = []
    for _ in range(2):
        started = time.monotonic()
        Pipeline(chosen, say=print).run("run")
        times.append(time.monotonic() - started)
    return Cost(
        partitions=partitions, seconds=times[0], again=times[1], parts=bookkeeping(Folder(str(out)))
    )


def bookkeeping(folder: Folder) -> dict[str, tuple[int, float]]:
    """How many of each kind a run has, and the seconds to do them again in a folder beside it."""
    assert folder.local is not None
    beside = Folder(f"{folder.url}-again")
    notes = {
        str(path.relative_to(folder.local)): json.loads(path.read_text())
        for path in [*folder.local.rglob("completions/**/*.json"), folder.local / "config.json"]
    }
    logged = {
        str(path.relative_to(folder.local)): path.read_text().splitlines(keepends=True)
        for path in folder.local.rglob("logs/**/*.jsonl")
    }
    lines = [(name, line) for name, some in logged.items() for line in some]
    found: dict[str, tuple[int, float]] = {}

    def clocked(what: str, work: Callable[..., Any], many: Sequence[tuple[Any, ...]]) -> None:
        started = time.monotonic()
        for arguments in many:
            work(*arguments)
        found[what] = (len(many), time.monotonic() - started)

    clocked("markers and records published", beside.publish_json, list(notes.items()))
    clocked("looked for before", beside.read_json, [(name,) for name in notes])
    clocked("log lines", beside.append, lines)
    clocked("stats.json and config.json joined", RunState(beside).join, [()] * 4)
    records = provenance.records(folder)
    files = [
        (provenance.home(folder, stage), name)
        for stage, record in records.items()
        for name in record["checksums"]
    ]
    clocked("checksums of files", checksum, files)
    shutil.rmtree(beside.url)
    return found


def _report(pool: bench_run.PoolConfig, costs: list[Cost]) -> str:
    lines = [
        "# What resuming costs",
        "",
        f"{pool.samples:,} rows of 2 × {pool.dimension} float16 in {pool.files} files, k=5, all "
        f"stages, Ray's start included. {made_by('jobs.bench_resume')}",
        "",
        "The bookkeeping of the run was done again afterwards, in one process, with the same "
        "content: an upper bound, for a run does most of it in parallel.",
        "",
        "| partitions | whole run, s | bookkeeping alone, s | share | the same command again, s |",
        "|---|---|---|---|---|",
    ]
    for cost in costs:
        alone = sum(seconds for _, seconds in cost.parts.values())
        lines.append(
            f"| {cost.partitions} | {cost.seconds:.1f} | {alone:.2f} | {cost.share:.1%} | "
            f"{cost.again:.1f} |"
        )
    lines += ["", "| of which | " + " | ".join(f"{c.partitions} partitions" for c in costs) + " |"]
    lines.append("|---|" + "---|" * len(costs))
    for what in costs[0].parts:
        costs_of = (f"{c.parts[what][0]:,} in {c.parts[what][1]:.2f} s" for c in costs)
        lines.append(f"| {what} | {' | '.join(costs_of)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
