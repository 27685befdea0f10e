"""Benchmark: memory and time of `d2filter graph` on a pool larger than `--memory-per-worker`.

    python -m jobs.bench_memory --rows 2000000 --memory 1GB --results jobs/results/bench_memory.md

It draws the pool of `bench_knn` as DataComp metadata, builds the graph from files to files, and
writes the partitions, memory and time that stats.json contains.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench import made_by
from jobs.knn_methods import DIM, draw

ROWS_A_FILE = 20_000


def main() -> None:
    """Draw, run, report."""
    parser = argparse.ArgumentParser(description="The graph of a pool larger than a worker.")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--target-recall", default="0.9")
    parser.add_argument("--results", default="jobs/results/bench_memory.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        metadata, out = Path(folder) / "metadata", Path(folder) / "out"
        write(metadata, arguments.rows)
        words = ["graph", "--metadata-dir", str(metadata), "--out-dir", str(out)]
        words += ["--feature-type", "image", "--n-neighbors", "5"]
        words += ["--memory-per-worker", arguments.memory]
        words += ["--target-recall", arguments.target_recall]
        done = subprocess.run([sys.executable, "-m", "d2filter", *words], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        stats = json.loads((out / "stats.json").read_text())
    graph, peak = stats["graph"], stats["peak_rss_bytes"]
    low, high = graph["recall_ci"]
    lines = [
        f"# The graph of {arguments.rows:,} × {DIM} with {arguments.memory} workers",
        "",
        made_by(f"jobs.bench_memory --rows {arguments.rows} --memory {arguments.memory}")
        + f" Metadata in {arguments.rows // ROWS_A_FILE} files to graph/, k=5, one thread a task.",
        "",
        "| | |",
        "|---|---|",
        f"| features, float16 | {arguments.rows * DIM * 2 / 1e9:.1f} GB |",
        f"| partitions | {graph['partitions']} |",
        f"| rows of the largest partition | {max(graph['partition_rows']):,} |",
        f"| partitions a row goes to | {graph['fan_out']:.2f} |",
        f"| edges that cross | {100 * graph['cross_edges']:.1f}% |",
        f"| cells probed | {graph['nprobe']} of {graph['nlist']}, "
        f"{graph['refinement_passes']} passes |",
        f"| axes of the sketches | {graph['sketch_dim']} of {DIM} |",
        f"| recall@5 | {graph['recall']:.4f} [{low:.4f}, {high:.4f}] on "
        f"{graph['recall_queries']:,} queries, predicted {graph['predicted_recall']:.4f} |",
        f"| peak memory of a process, catalog | {peak['catalog'] / 1e9:.2f} GB |",
        f"| peak memory of a process, graph | {peak['graph'] / 1e9:.2f} GB |",
        f"| seconds, catalog | {stats['seconds']['catalog']:.0f} |",
        f"| seconds, graph | {stats['seconds']['graph']:.0f} |",
        "",
        "Seconds of the slowest task of each step: "
        + ", ".join(f"{name} {value:.1f}" for name, value in stats["seconds_detail"].items())
        + ".",
    ]
    Path(arguments.results).write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def write(folder: Path, rows: int) -> None:
    """Metadata of drawn images: `draw` of knn_methods.py, with scores."""
    folder.mkdir(parents=True)
    features = draw(rows, DIM)
    rng = np.random.default_rng(1)
    for number, start in enumerate(range(0, rows, ROWS_A_FILE)):
        some = features[start : start + ROWS_A_FILE]
        table = {
            "uid": [rng.bytes(16).hex() for _ in range(len(some))],
            "clip_l14_similarity_score": rng.random(len(some), dtype=np.float32),
        }
        pq.write_table(pa.table(table), folder / f"{number:05d}.parquet")
        np.savez(folder / f"{number:05d}.npz", l14_img=some)


if __name__ == "__main__":
    main()
