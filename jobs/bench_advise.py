"""Benchmark: time of the report with its self-check, of advise and of a sweep on finished runs.

    python -m jobs.bench_advise --out /tmp/bench-advise --results jobs/results/bench_advise.md

It runs dirty synthetic pools (`jobs.bench_run`) with the default settings, then times each command
as a process of its own. Pools of up to 200,000 samples are measured whole, larger ones on a sample.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from jobs.bench import made_by
from jobs.bench_run import PoolConfig, make

POOLS = (20_000, 100_000, 200_000, 400_000)
WATCHED = (
    ("run", ()),
    ("report", ()),
    ("sweep", ("--method", "d2,score,random", "--gamma", "auto,1", "--fraction", "0.1,0.3,0.5")),
    ("advise", ()),
)


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description="Time the commands that look at a finished run.")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--results", type=Path, default=Path("jobs/results/bench_advise.md"))
    parser.add_argument("--samples", type=int, nargs="+", default=POOLS)
    arguments = parser.parse_args()
    lines = [
        "# Seconds and memory of report, sweep and advise",
        "",
        f"{made_by('jobs.bench_advise')} Pools of 2 × 256 float16 with 10% exact copies, default "
        "settings (k=10). Each command is a process of its own, seconds from its start to its end, "
        "in brackets the largest resident set of its main process in GB. `sweep` ranks four "
        "settings at three budgets, `advise` tries up to 24 at five. The machine is shared: "
        "compare with the column `run`, which is metadata to report.html.",
        "",
        "| samples | " + " | ".join(name for name, _ in WATCHED) + " |",
        "|---" * (1 + len(WATCHED)) + "|",
    ]
    for samples in arguments.samples:
        shutil.rmtree(arguments.out, ignore_errors=True)
        make(arguments.out / "metadata", PoolConfig(samples=samples))
        cells = [
            _timed(name, words, arguments.out, str(arguments.out / "run"))
            for name, words in WATCHED
        ]
        lines.append(f"| {samples:,} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.results.write_text("\n".join(lines) + "\n", "utf-8")


def _timed(name: str, words: tuple[str, ...], root: Path, run: str) -> str:
    given = [run]
    if name == "run":
        given = ["--metadata-dir", str(root / "metadata"), "--out-dir", run, "--max-bad", "1"]
    command = [str(Path(sys.executable).with_name("d2filter")), name, *given, *words]
    started = time.monotonic()
    with (root / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit((root / f"{name}.log").read_text("utf-8"))
    return f"{seconds:.0f} ({used.ru_maxrss / 1e6:.1f})"


if __name__ == "__main__":
    main()
