"""Benchmark: seconds and memory of each stage on a dirty synthetic pool, from files to files.

    python -m jobs.bench_run --out /tmp/bench-run --results jobs/results/bench_run.md

The pool has clustered embeddings in 40 files, 10% exact copies, and in each file malformed and
repeated uids, NaN and zero embeddings.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter import config
from d2filter.formats.paths import Folder
from d2filter.stages.pipeline import Pipeline
from d2filter.tools.verify import verify
from jobs.bench import made_by


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """What is made."""

    samples: int = 400_000
    dimension: int = 256
    """of each of the two embeddings"""
    files: int = 40
    seed: int = 7


def main() -> None:
    """Make the pool, run, verify, write the results file."""
    parser = argparse.ArgumentParser(description="Time the whole line on a dirty pool.")
    parser.add_argument("--out", required=True)
    parser.add_argument("--results", default="jobs/results/bench_run.md")
    arguments = parser.parse_args()
    pool = PoolConfig()
    root = Path(arguments.out)
    shutil.rmtree(root, ignore_errors=True)
    make(root / "metadata", pool)
    run = config.RunConfig(
        out_dir=str(root / "run"),
        metadata_dir=str(root / "metadata"),
        graph=config.GraphConfig(n_neighbors=5),
        select=config.SelectConfig(fraction=Decimal("0.3")),
    )
    stats = Pipeline(run, say=print).run("run")
    started = time.monotonic()
    verify(Folder(run.out_dir), print)
    text = _report(pool, stats, time.monotonic() - started)
    Path(arguments.results).write_text(text, "utf-8")
    print(text)


def make(folder: Path, pool: PoolConfig) -> None:
    """Write the metadata."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(pool.seed)
    centers = rng.normal(size=(pool.samples // 150, pool.dimension)).astype(np.float32)
    rows = pool.samples // pool.files
    before: list[str] = []
    for number in range(pool.files):
        noise = rng.normal(size=(2, rows, pool.dimension)).astype(np.float32)
        image = centers[rng.integers(0, len(centers), rows)] + 0.8 * noise[0]
        text = image + 0.9 * noise[1]
        copied, source = rng.random(rows) < 0.1, rng.integers(0, rows, rows)
        image[copied], text[copied] = image[source[copied]], text[source[copied]]
        uid = [rng.bytes(16).hex() for _ in range(rows)]
        for row in rng.choice(rows, 20, replace=False):
            uid[row] = "no uid"
        for row, repeated in zip(rng.choice(rows, 30, replace=False), before, strict=False):
            uid[row] = repeated
        before = uid[:30]
        image[rng.choice(rows, 15, replace=False)] = np.nan
        text[rng.choice(rows, 10, replace=False)] = 0
        keys = [f"{row:09d}" for row in range(rows)]
        table = {"uid": uid, "shard": [f"s3://crawl/{number:08d}.tar"] * rows, "key": keys}
        pq.write_table(pa.table(table), folder / f"{number:05d}.parquet")
        arrays = {"l14_img": image, "l14_txt": text}
        halves: dict[str, Any] = {n: array.astype(np.float16) for n, array in arrays.items()}
        np.savez(folder / f"{number:05d}.npz", **halves)


def _report(pool: PoolConfig, stats: dict[str, Any], verified: float) -> str:
    graph, samples = stats["graph"], stats["samples"]
    low, high = graph["recall_ci"]
    lines = [
        "# The whole line on a dirty pool, files to files",
        "",
        f"{pool.samples:,} rows of 2 × {pool.dimension} float16 in {pool.files} files. "
        f"{made_by('jobs.bench_run')} The machine is shared and Ray's start is included in the "
        "first stage.",
        "",
        f"{samples['read']:,} read, {samples['ranked']:,} ranked, {samples['bad']:,} bad, "
        f"{samples['duplicate']:,} duplicate; k={graph['k']}, {graph['nprobe']} of "
        f"{graph['nlist']} cells probed, recall {graph['recall']:.4f} [{low:.4f}, {high:.4f}]; "
        f"`verify` finds no breach in {verified:.1f} s.",
        "",
        "| stage | seconds | peak memory of one process, MB |",
        "|---|---|---|",
    ]
    for stage, seconds in stats["seconds"].items():
        lines.append(f"| {stage} | {seconds:.1f} | {stats['peak_rss_bytes'][stage] / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
