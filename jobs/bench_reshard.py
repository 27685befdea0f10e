"""Benchmark: compares `reshard` with `cp`, and streaming of kept samples with unfiltered streaming.

    python -m jobs.bench_reshard --out /tmp/bench-reshard --results jobs/results/bench_reshard.md

The shards contain random bytes: pictures of 20 to 80 kB, each with a caption and a json with a uid.
`reshard` and `cp` take turns, because other programs use the machine too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import webdataset as wds

import d2filter
from d2filter.engine.runner import Runner
from d2filter.formats import subset, webdataset
from d2filter.formats.paths import Folder
from d2filter.formats.subset import DTYPE
from d2filter.formats.uid import to_hex
from d2filter.stages.reshard import build as build_shards
from jobs.bench import made_by

_SAMPLES = 500  # a shard
_TURNS = 20  # of each loop that streams
_MILLIONS = 30_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Some reshardings of the same shards, each followed by a `cp`."""

    shards: int
    read: int
    """bytes of the input"""
    written: int
    seconds: list[float]
    """of each turn, with Ray started before"""
    cp: list[float]
    """of `cp` for the bytes written"""
    peak: int
    """resident bytes of the largest task"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A loop that reads shards."""

    name: str
    seconds: list[float]
    """of each shard, turn by turn; in the same order for all loops"""


def main() -> None:
    """Make the shards, copy, stream, write the results file."""
    parser = argparse.ArgumentParser(description="Time reshard and keep.")
    parser.add_argument("--out", required=True)
    parser.add_argument("--results", default="jobs/results/bench_reshard.md")
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    # Ray's workers give way to all other programs, which `cp` does not
    os.environ.update(RAY_worker_niceness="0")
    root = Path(arguments.out)
    shutil.rmtree(root, ignore_errors=True)
    uids = make(root / "in", max(arguments.shards))
    copies = [copy(root, uids, count, arguments.turns) for count in arguments.shards]
    lines = _report(copies, stream(root, uids))
    shutil.rmtree(root)
    Path(arguments.results).write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def make(folder: Path, shards: int) -> np.ndarray[Any, Any]:
    """Write the shards; returns the uids in their order."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    uids = np.empty(shards * _SAMPLES, DTYPE)
    for number in range(shards):
        with tarfile.open(folder / f"{number:08d}.tar", "w") as archive:
            for i in range(_SAMPLES):
                hi, lo = (int(v) for v in rng.integers(0, 2**63, 2))
                uids[number * _SAMPLES + i] = (hi, lo)
                meta = {"uid": f"{hi:016x}{lo:016x}", "url": "https://example.com/" + "x" * 60}
                for extension, content in (
                    ("jpg", rng.bytes(int(rng.integers(20_000, 80_000)))),
                    ("json", json.dumps(meta).encode()),
                    ("txt", b"a caption of some words, as they are found on the web"),
                ):
                    info = tarfile.TarInfo(f"{number:04d}{i:06d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return uids


def copy(root: Path, uids: np.ndarray[Any, Any], count: int, turns: int) -> Copy:
    """Keep every second sample of the first `count` shards; then `cp` what was written; again."""
    names = [str(root / f"in/{n:08d}.tar") for n in range(count)]
    half = np.sort(uids[: count * _SAMPLES : 2])
    out = Folder(str(root / f"out-{count}"))
    config = build_shards.ReshardConfig(shard_size=1000)
    seconds, cp, peak, written = [], [], 0, 0
    for _ in range(turns):
        runner = Runner(out.sub(build_shards.STATE))
        runner.ray()
        os.sync()
        started = time.monotonic()
        build_shards.reshard(runner, out, webdataset.list_shards(names), half, config)
        os.sync()
        seconds.append(time.monotonic() - started)
        runner.close()
        for path in Path(out.url, build_shards.STATE, "completions/reshard").glob("*.json"):
            if not path.name.startswith(("order", "finish")):  # of this process
                peak = max(peak, json.loads(path.read_text())["peak_rss_bytes"])
        shutil.rmtree(Path(out.url, build_shards.STATE))
        started = time.monotonic()
        subprocess.run(["cp", "-r", out.url, str(root / "cp")], check=True)
        os.sync()
        cp.append(time.monotonic() - started)
        written = sum(path.stat().st_size for path in Path(out.url).glob("*.tar"))
        shutil.rmtree(root / "cp")
        shutil.rmtree(out.url)
    read = sum(os.stat(name).st_size for name in names)
    return Copy(shards=count, read=read, written=written, seconds=seconds, cp=cp, peak=peak)


def stream(root: Path, uids: np.ndarray[Any, Any]) -> list[Loop]:
    """A webdataset loop without the stage and with it. Shard by shard in turns, in an order that
    changes: other programs use the machine for longer than a shard takes.
    """
    urls = [str(root / f"in/{n:08d}.tar") for n in range(10)]
    every = np.sort(uids[: len(urls) * _SAMPLES])
    loops: list[tuple[str, Any]] = [
        ("no stage", None),
        ("no stage, once more", None),
        ("keep by uid, subset of all samples", d2filter.keep(every)),
        ("keep by uid, half of the samples among 30 million",
         d2filter.keep(_among_millions(every[::2]))),
        ("keep by shard and key, run of all samples", d2filter.keep(_run(root, urls, uids, 1))),
        ("keep by shard and key, run of half of them", d2filter.keep(_run(root, urls, uids, 2))),
    ]  # fmt: skip

    def once(url: str, stage: Any) -> float:
        dataset = wds.WebDataset([url], shardshuffle=False)
        dataset = dataset if stage is None else dataset.compose(stage)
        started = time.monotonic()
        for _sample in dataset:
            pass
        return time.monotonic() - started

    seconds: list[list[float]] = [[] for _ in loops]
    rng = np.random.default_rng(0)
    for turn in range(1 + _TURNS):
        for url in urls:
            for number in rng.permutation(len(loops)).tolist():
                taken = once(url, loops[number][1])
                if turn:  # what is compiled is compiled in the first one
                    seconds[number].append(taken)
    return [Loop(name=name, seconds=own) for (name, _), own in zip(loops, seconds, strict=True)]


def _run(root: Path, urls: list[str], uids: np.ndarray[Any, Any], step: int) -> Path:
    """What a run directory says of every sample, or of every second one."""
    out = Folder(str(root / f"run-{step}"))
    numbers = np.arange(0, len(urls) * _SAMPLES, step)
    hi, lo = uids["f0"][numbers].copy(), uids["f1"][numbers].copy()
    subset.publish(out, hi, lo)
    columns = {
        "shard": [urls[n // _SAMPLES] for n in numbers.tolist()],
        "key": [f"{n // _SAMPLES:04d}{n % _SAMPLES:06d}" for n in numbers.tolist()],
        "uid": to_hex(hi, lo),
        "rank": np.arange(numbers.size),
    }
    order = [(name, "ascending") for name in ("shard", "key", "uid")]
    subset.publish_kept(out, pa.table(columns).sort_by(order))
    return Path(out.url)


def _among_millions(some: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A large subset, ascending, that holds some uids."""
    others = np.random.default_rng(1).integers(0, 2**63, (_MILLIONS, 2), np.uint64)
    pairs = np.concatenate([others, np.ascontiguousarray(some).view(np.uint64).reshape(-1, 2)])
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].view(DTYPE).reshape(-1)


def _report(copies: list[Copy], loops: list[Loop]) -> list[str]:
    lines = [
        "# Copying kept samples, and streaming them without a copy",
        "",
        f"{made_by('jobs.bench_reshard')} {_SAMPLES} samples a shard of some 50 kB; every other "
        "one is kept. `cp -r` of the bytes written, on the same disk right afterwards, in turns; "
        "both end with a sync. Medians of the turns, and the least and largest ratio. Ray was "
        "started before, but not its workers, which have the priority of `cp`; the input is in the "
        "page cache.",
        "",
        "| input shards | read, MB | written, MB | reshard, s | cp, s | throughput by cp's | "
        "peak of a task, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in copies:
        ratios = [theirs / ours for theirs, ours in zip(c.cp, c.seconds, strict=True)]
        lines.append(
            f"| {c.shards} | {c.read / 1e6:,.0f} | {c.written / 1e6:,.0f} | "
            f"{statistics.median(c.seconds):.1f} | {statistics.median(c.cp):.1f} | "
            f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{c.peak / 1e6:.0f} |"
        )
    lines += ["", "| webdataset loop over 10 shards | samples a second | of the loop without |"]
    lines.append("|---|---|---|")
    for loop in loops:
        rate = _SAMPLES / statistics.median(loop.seconds)
        pairs = zip(loops[0].seconds, loop.seconds, strict=True)
        share = statistics.median(plain / own for plain, own in pairs)
        lines.append(f"| {loop.name} | {rate:,.0f} | {share:.1%} |")
    lines += ["", f"Medians over {_TURNS} turns of each shard; shares are taken shard by shard."]
    return lines


if __name__ == "__main__":
    main()
