"""Benchmark: compares the predictions of `d2filter plan` with real runs.

    python -m jobs.bench_plan --out /tmp/bench-plan --results jobs/results/bench_plan.md

It first measures the rates on a pool, like `d2filter plan --metadata-dir … --calibrate`, then runs
all stages on this pool from files to files, in a process of its own. `--rates FILE` stores the
rates of the last pool; d2filter contains such a file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2filter import config
from d2filter.formats.paths import Folder
from d2filter.tools import cost_model, plan, plan_steps
from jobs import bench_memory
from jobs.bench import made_by
from jobs.knn_methods import DIM

SIZES = (300_000, 1_000_000)
K = 5
LONG = 10.0  # seconds from which on a stage is judged
WITHIN = 1.5


def main() -> None:
    """Make each pool, predict, run, compare; write the results file."""
    parser = argparse.ArgumentParser(description="Compare predictions with runs.")
    parser.add_argument("--out", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--memory", default="16GB", help="of the machine, as Ray may use it")
    parser.add_argument("--rates", default="", help="keep the rates of the last pool in this file")
    parser.add_argument("--results", default="jobs/results/bench_plan.md")
    arguments = parser.parse_args()
    rows: list[str] = []
    for size in arguments.sizes:
        root = Path(arguments.out) / str(size)
        shutil.rmtree(root, ignore_errors=True)
        bench_memory.write(root / "metadata", size)
        found, rates = _predict(root / "metadata", arguments.memory)
        stats = _run(root)
        rows += _compare(size, found, stats)
        if arguments.rates:
            plan.write_rates(arguments.rates, rates)
        shutil.rmtree(root)
    text = _report(rows, arguments)
    Path(arguments.results).write_text(text, "utf-8")
    print(text)


def _predict(folder: Path, memory: str) -> tuple[cost_model.Estimate, cost_model.Rates]:
    source = Folder(str(folder))
    catalog = config.CatalogConfig(feature_type="image")
    samples, dimension, names = plan.look_at(source, catalog)
    rows = plan.real_rows(source, names, catalog, plan.PILOTS[1])
    rates = plan.calibrate(rows, K, print, growth=plan.THIN)
    pool = plan_steps.Pool(samples=samples, dimension=dimension, k=K)
    cluster = cost_model.Cluster(
        nodes=1, cpus=os.cpu_count() or 1, memory=config.parse_bytes(memory)
    )
    found = cost_model.estimate(pool, cluster, rates)
    print("\n".join(plan.lines(found, pool, cluster, rates)))
    return found, rates


def _run(root: Path) -> dict[str, Any]:
    """stats.json of the whole line, as a command of its own."""
    subprocess.run(
        [
            sys.executable, "-m", "d2filter", "run", "--metadata-dir", str(root / "metadata"),
            "--out-dir", str(root / "run"), "--n-neighbors", str(K), "--feature-type",
            "image", "--no-report",
        ],
        check=False,  # a dirty pool may exit with 3; without stats.json the next line fails
    )  # fmt: skip
    stats: dict[str, Any] = json.loads((root / "run/stats.json").read_text())
    return stats


def _compare(size: int, found: cost_model.Estimate, stats: dict[str, Any]) -> list[str]:
    lines = []
    for stage in found.stages:
        taken, peak = stats["seconds"][stage.name], stats["peak_rss_bytes"][stage.name]
        seconds = stage.seconds or 0.0
        judged = taken >= LONG
        lines.append(
            f"| {size:,} | {stage.name} | {seconds:.1f} | {taken:.1f} | "
            f"{_ratio(seconds, taken) if judged else ''} | {stage.memory / 1e9:.2f} | "
            f"{peak / 1e9:.2f} | {_ratio(stage.memory, peak) if judged else ''} |"
        )
    return lines


def _ratio(predicted: float, measured: float) -> str:
    ratio = predicted / measured
    return f"{ratio:.2f}" + ("" if 1 / WITHIN <= ratio <= WITHIN else " **outside**")


def _report(rows: Sequence[str], arguments: argparse.Namespace) -> str:
    sizes = " ".join(str(size) for size in arguments.sizes)
    return "\n".join(
        [
            "# What `plan` predicts, beside what runs take",
            "",
            f"{made_by(f'jobs.bench_plan --sizes {sizes}')} Pools as in bench_memory.md: "
            f"{DIM} float16 in clusters of heavy-tailed size, 10% near-copies; k={K}. "
            f"Rates from {plan.PILOTS[0]:,} and {plan.PILOTS[1]:,} rows of the same pool. Ratios, "
            f"predicted to measured, for stages of {LONG:.0f} s and more; asked for are "
            f"{1 / WITHIN:.2f} to {WITHIN}.",
            "",
            "| samples | stage | predicted, s | measured, s | ratio | predicted, GB | measured, GB "
            "| ratio |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
