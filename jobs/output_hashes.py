"""Hashes the outputs of ten runs, to prove that a change of the code does not change any result.

    python -m jobs.output_hashes --out /tmp/hashes --results before.json
    python -m jobs.output_hashes --out /tmp/hashes --compare before.json

Use the same --out, because some files contain paths of shards and metadata. The runs use synthetic
pools and pictures and the command line, with classes, undirected graphs, schemes, other methods,
partitions, cells, soft selection and shards. Hashed are graph, index, ranking, subset, kept lists,
ledger and, for shards, the embeddings. Runs that differ only in the layout must agree, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.cli import main as cli
from d2filter.tools import scenes
from jobs.bench_run import PoolConfig, make

SAMPLES, DIM = 3000, 24
HASHED = ("subset.npy", "subsets", "kept", "ranking", "graph", "index", "bad_samples.parquet")
RUNS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "published": ("--recipe", "datacomp"),
    "partitions": ("--partitions", "3"),
    "cells": ("--exact-below", "100", "--n-neighbors", "5", "--best-effort", "--partitions", "2"),
    "undirected": ("--undirected", "--n-neighbors", "5", "--kernel", "rbf", "--gamma", "0.7"),
    "schemes": ("--kernel", "exp", "--gamma", "1", "--forward", "product", "--reverse", "absolute"),
    "classes": (
        *("--group-column", "label", "--recipe", "labels", "--score-column", "hardness"),
        *("--fraction", "0.2,0.5"),
    ),
    "soft": ("--soft", "0.05", "--score-column", "hardness", "--clip-scores", "0.001"),
    "facility_location": ("--method", "facility_location"),
    "semdedup": ("--method", "semdedup", "--collapse-copies", "0"),
}
ALIKE = (("defaults", "partitions"),)
"""runs that give the same subset"""


def main() -> None:
    """Run everything; write the hashes, or compare them with those of another commit."""
    parser = argparse.ArgumentParser(description="Hash what ten runs and a demo write.")
    parser.add_argument("--out", required=True, type=Path)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--results", type=Path, help="write the hashes to this file")
    group.add_argument("--compare", type=Path, help="compare with the hashes of this file")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    found = hashes(arguments.out)
    for one, other in ALIKE:
        if found[f"{one}/subset.npy"] != found[f"{other}/subset.npy"]:
            sys.exit(f"{one} and {other} differ in subset.npy")
    if arguments.results:
        arguments.results.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(f"{len(found)} files hashed: {arguments.results}")
        return
    before = json.loads(arguments.compare.read_text("utf-8"))
    differ = sorted(k for k in found.keys() | before.keys() if found.get(k) != before.get(k))
    print(f"{len(before)} files before, {len(found)} now, {len(differ)} differ")
    if differ:
        sys.exit("\n".join(differ))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that counts, by run and name."""
    metadata = folder / "metadata"
    _draw(metadata)
    found = {}
    for name, words in RUNS.items():
        out = folder / name
        given = ["run", "--metadata-dir", str(metadata), "--out-dir", str(out), "--no-report"]
        if code := cli.main([*given, "--max-bad", "1", *words]):
            sys.exit(f"{name} ended with {code}")
        found.update(_hashed(name, out, HASHED))
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(60):
        rng = np.random.default_rng([5, number])
        scene = scenes.random_scene(rng)
        scenes.draw(scene).save(pictures / f"{number:03d}.png")
        (pictures / f"{number:03d}.txt").write_text(scenes.caption(scene, rng), "utf-8")
    shards, out = str(folder / "shards"), folder / "shards-run"
    for given in (
        ["pack", str(pictures), "--shards", shards],
        ["run", "--shards", shards, "--out-dir", str(out), "--no-report"],
    ):
        if code := cli.main(given):
            sys.exit(f"{given[0]} of shards ended with {code}")
    return {**found, **_hashed("shards", out, (*HASHED, "metadata"))}


def _hashed(name: str, out: Path, places: tuple[str, ...]) -> dict[str, str]:
    files = [
        file
        for place in places
        for file in sorted((out / place).rglob("*") if (out / place).is_dir() else [out / place])
        if file.is_file()
    ]
    return {
        f"{name}/{file.relative_to(out)}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def _draw(folder: Path) -> None:
    """The dirty pool of `jobs.bench_run` in two files, with classes and a score."""
    make(folder, PoolConfig(samples=SAMPLES, dimension=DIM, files=2))
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        rng = np.random.default_rng([11, table.num_rows])
        label = [f"class {row % 7}" for row in range(table.num_rows)]
        hardness = rng.random(table.num_rows).astype(np.float32)
        table = table.append_column("label", pa.array(label))
        pq.write_table(table.append_column("hardness", pa.array(hardness)), path)


if __name__ == "__main__":
    main()
