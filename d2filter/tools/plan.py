"""`d2filter plan`: what a run would take, before it is started.

Rates come from a file written by `make bench`, or from two small runs on this machine
(`--calibrate`). The output lists what these do not determine.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter import config
from d2filter.algorithm.budget import parse_fraction
from d2filter.algorithm.greedy import in_memory
from d2filter.algorithm.greedy.schemes import Scheme
from d2filter.errors import InputError, UsageError
from d2filter.formats import metadata, tables
from d2filter.formats.paths import Folder, absolute, place_of
from d2filter.tools import cost_model, plan_steps
from d2filter.tools.cost_model import Cluster, Estimate, Rate, Rates
from d2filter.tools.plan_steps import Habits, Pool

Say = Callable[[str], None]
MetadataRows = tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]

BUNDLED = Path(__file__).parent / "rates.json"
GREEDY_ROWS = 500_000
# growth of what a row costs, from a sample to its pool: .2 to .4 from 48,000 rows to 300,000 and a
# million (jobs/bench_plan.py), where pools that grow by new groups have the root
THIN = 1 / 3
_LOWER_TARGETS = (0.8, 0.5)
PILOTS = (6_000, 48_000)  # rows of the two runs, as far as there are so many


def inputs(arguments: argparse.Namespace, say: Say) -> tuple[Pool, Cluster, Rates]:
    """Pool, cluster and rates from the command line; runs the requested measurements. Raises
    UsageError for what cannot be planned.
    """
    for name in ("dim", "n_neighbors", "nodes", "cpus"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise UsageError(
                f"{option} is {getattr(arguments, name)}, allowed is a whole number of at least 1"
            )
    config.check_memory(arguments.memory_per_worker)
    catalog = config.CatalogConfig(arch=arguments.arch, feature_type=arguments.feature_type)
    samples = arguments.samples
    dimension = arguments.dim * (2 if catalog.feature_type == "image|text" else 1)
    folder = Folder(absolute(arguments.metadata_dir))
    names: list[str] = []
    if arguments.metadata_dir:
        rows, dimension, names = look_at(folder, catalog)
        samples = samples or rows
        say(f"{folder.url}: {rows:,} rows of {dimension} dimensions in {len(names):,} pairs")
    if not samples:
        raise UsageError("nothing to plan: --samples 12.8e6, or --metadata-dir of a pool")
    if arguments.calibrate:
        most = PILOTS[1]
        rows_ = real_rows(folder, names, catalog, most) if names else drawn_rows(most, dimension)
        rates = calibrate(rows_, arguments.n_neighbors, say, growth=THIN if names else 0.5)
        if arguments.rates:
            write_rates(absolute(arguments.rates), rates)
    else:
        rates = read_rates(absolute(arguments.rates))
    pool = Pool(
        samples=samples,
        dimension=dimension,
        k=arguments.n_neighbors,
        fraction=float(parse_fraction(arguments.fraction)),
        images=arguments.shards,
    )
    cluster = Cluster(
        nodes=arguments.nodes,
        cpus=arguments.cpus,
        gpus=arguments.gpus,
        memory=arguments.memory,
        disk=arguments.disk,
        storage=arguments.storage_rate,
        memory_per_worker=arguments.memory_per_worker,
        partitions=arguments.partitions,
    )
    return pool, cluster, replace(rates, images=arguments.images_per_second)


def read_rates(url: str = "") -> Rates:
    """Rates from a file; without one those that d2filter brings. Raises InputError for none."""
    where = url or str(BUNDLED)
    folder, name = place_of(where)
    held = folder.read_json(name)
    if held is None:
        raise InputError(f"{where} does not exist: `d2filter plan --calibrate --rates {where}`")
    try:
        return Rates(
            **{
                **held,
                "steps": {n: Rate(**rate) for n, rate in held["steps"].items()},
                "habits": Habits(**held["habits"]),
            }
        )
    except (TypeError, KeyError) as error:
        raise InputError(
            f"{where} is not a file of rates ({error}): write it again with --calibrate"
        ) from error


def write_rates(url: str, rates: Rates) -> None:
    """Publish them."""
    folder, name = place_of(url)
    folder.publish_json(name, asdict(rates))


def look_at(folder: Folder, catalog: config.CatalogConfig) -> tuple[int, int, list[str]]:
    """Rows and width of the features of a metadata folder, and the names of its pairs. Reads all
    footers and one pair. Raises InputError if it is no metadata.
    """
    pairs, _ = metadata.list_pairs(folder)
    rows = sum(tables.count_rows(folder, f"{pair.name}.parquet") for pair in pairs)
    names = [pair.name for pair in pairs]
    return rows, int(_rows_of(folder, names[0], catalog)[0].shape[1]), names


def real_rows(
    folder: Folder, names: Sequence[str], catalog: config.CatalogConfig, most: int
) -> MetadataRows:
    """Features and difficulty of up to `most` valid rows of a metadata folder, from evenly spaced
    pairs.
    """
    found: list[MetadataRows] = []
    for step in np.linspace(0, len(names) - 1, min(len(names), 16)).astype(int):
        if sum(len(part[0]) for part in found) < most:
            found.append(_rows_of(folder, names[step], catalog))
    features, difficulty = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return features[:most], difficulty[:most]


def drawn_rows(count: int, dimension: int) -> MetadataRows:
    """Random rows in clusters whose spread falls from axis to axis, as in learned embeddings; a
    tenth are copies. They replace a pool that is not available.
    """
    rng = np.random.default_rng(0)
    axes = np.arange(1.0, dimension + 1) ** -0.5
    centers = rng.normal(size=(max(2, count // 60), dimension)) * axes
    rows = centers[rng.integers(0, len(centers), count)]
    rows += 0.5 * rng.normal(size=(count, dimension)) * axes
    copied = np.flatnonzero(rng.random(count) < 0.1)
    rows[copied] = rows[rng.integers(0, count, copied.size)]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16), rng.random(count).astype(np.float32)


def calibrate(
    rows: MetadataRows, k: int, say: Say, target_recall: float = 0.95, growth: float = 0.5
) -> Rates:
    """Rates of this machine: all stages on a few rows and on all of them, from files to files.

    Ray is started here unless it runs, and its start counts as part of the catalog. If the
    neighbors of the pool lie in small groups, a sample of it has so few that cells miss the target;
    then a lower target shows the cost of cells. growth: see `Habits`. Raises InputError if no
    target can be reached.
    """
    import ray

    started = time.monotonic()
    mine = not ray.is_initialized()
    if mine:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        ray.init(include_dashboard=False, object_store_memory=80_000_000, **options)
    start = time.monotonic() - started if mine else 0.0
    try:
        measured = []
        few = min(PILOTS[0], len(rows[0]) // 4)
        # the first one only warms up: what is compiled and imported once is no rate
        for size in (few, few, len(rows[0])):
            say(f"calibrating on {size:,} rows of {rows[0].shape[1]} dimensions")
            measured.append(_run((rows[0][:size], rows[1][:size]), k, target_recall))
        for lower in _LOWER_TARGETS:
            if measured[-1]["graph"]["nlist"] > 1:
                break
            say(
                f"the cell search misses recall {target_recall} on so few rows: measuring at "
                f"{lower}"
            )
            target_recall = lower
            measured[-1] = _run(rows, k, target_recall)
    finally:
        if mine:
            ray.shutdown()
    if measured[-1]["graph"]["nlist"] == 1:
        raise InputError(
            f"the cell search fails on {len(rows[0]):,} rows of this pool: plan without "
            "--calibrate, and expect a graph that compares all pairs"
        )
    found = _rates(rows, k, measured[1:], start)
    found = replace(found, recall=target_recall, habits=replace(found.habits, growth=growth))
    greedy = Rate(fixed=found.steps["supersteps"].fixed, unit=_greedy(k))
    return replace(found, steps={**found.steps, "supersteps": greedy})


def _greedy(k: int) -> float:
    """Seconds of a unit of the ranking, on a graph that no cache holds."""
    rng = np.random.default_rng(2)
    uid = np.arange(GREEDY_ROWS, dtype=np.uint64)
    score = rng.random(GREEDY_ROWS, np.float32)
    neighbors = rng.integers(0, GREEDY_ROWS, (GREEDY_ROWS, k))
    sqdist = np.sort(rng.random((GREEDY_ROWS, k), np.float32), axis=1)
    started = time.monotonic()
    in_memory.rank_graph(uid, uid, score, neighbors, sqdist, scheme=Scheme())
    return (time.monotonic() - started) / (GREEDY_ROWS * (k + 3))


def _rates(rows: MetadataRows, k: int, measured: Sequence[dict[str, Any]], start: float) -> Rates:
    cpus = os.cpu_count() or 1
    halves, dimension = [], int(rows[0].shape[1])
    for stats in measured:
        graph = stats["graph"]
        habits = Habits(
            samples=stats["samples"]["ranked"],
            cells=graph["nlist"],
            probes=graph["nprobe"],
            passes=graph["refinement_passes"],
            sketch_dim=graph["sketch_dim"],
            evaluations=graph["evaluations_per_sample"],
        )
        pool = Pool(samples=habits.samples, dimension=dimension, k=k, exact_below=0)
        steps = plan_steps.count(pool, habits, graph["partitions"])
        taken = {
            **stats["seconds_detail"],
            "catalog": stats["seconds"]["catalog"],
            "select": stats["seconds"]["select"],
        }
        halves.append([(step, taken[step.name]) for step in steps if step.name in taken])
    rates = cost_model.fit(halves[0], halves[1], cpus)
    rates["catalog_rest"] = Rate(fixed=start, unit=0.0)
    last = measured[-1]
    for stage in ("graph", "rank"):
        mine = sum(taken for step, taken in halves[1] if step.stage == stage)
        rest = max(0.0, last["seconds"][stage] - mine)
        rates[f"{stage}_rest"] = Rate(fixed=rest, unit=0.0)
    return Rates(
        machine=f"{cpus} CPUs, {platform.machine()}, Python {platform.python_version()}",
        dimension=dimension, steps=rates, habits=habits, k=k,
    )  # fmt: skip


def _run(rows: MetadataRows, k: int, target_recall: float) -> dict[str, Any]:
    """stats.json of a whole run on some rows."""
    from d2filter.stages.pipeline import Pipeline, default_selection

    with tempfile.TemporaryDirectory(prefix="d2filter-plan-") as scratch:
        source = Path(scratch) / "metadata"
        source.mkdir()
        rng = np.random.default_rng(1)
        uids = [rng.bytes(16).hex() for _ in range(len(rows[0]))]
        pq.write_table(pa.table({"uid": uids, "score": rows[1]}), source / "pool.parquet")
        np.savez(source / "pool.npz", f=rows[0])
        run = config.RunConfig(
            out_dir=str(Path(scratch) / "run"),
            metadata_dir=str(source),
            catalog=config.CatalogConfig(
                feature_keys=("f",), score_column="score", normalize=False
            ),
            graph=config.GraphConfig(n_neighbors=k, exact_below=0, target_recall=target_recall),
            select=default_selection(config.SelectConfig()),
            partitions=1,
            best_effort=True,
        )
        return Pipeline(run, show_progress=False).run("run")


def _rows_of(folder: Folder, name: str, catalog: config.CatalogConfig) -> MetadataRows:
    found = metadata.read_pair(folder, name, catalog)
    valid = found.reason == 0
    if not valid.any():
        raise InputError(f"{folder.where(name)}: none of its rows is a valid sample")
    return found.features[valid], found.difficulty[valid]


def lines(found: Estimate, pool: Pool, cluster: Cluster, rates: Rates) -> list[str]:
    """For people."""
    where = f"{cluster.nodes} × ({cluster.cpus} CPUs, {amount(cluster.memory)})"
    out = [
        f"{pool.samples:,} samples of {pool.dimension} dimensions, k={pool.k}, on {where}:",
        f"{found.parts:,} catalog parts, {found.cells:,} cells, {found.partitions:,} partitions "
        f"of {pool.samples / found.partitions:,.0f} samples",
        "",
        f"{'stage':<9}{'time':>10}{'read':>10}{'written':>10}{'a process':>11}{'products':>12}"
        "  slowest step",
    ]
    for stage in found.stages:
        taken = "unknown" if stage.seconds is None else duration(stage.seconds)
        products = f"{stage.flops / 1e12:,.0f} TFLOP" if stage.flops >= 1e12 else ""
        waits = f", {duration(stage.alone)} on one node" if stage.alone >= 60 else ""
        out.append(
            f"{stage.name:<9}{taken:>10}{amount(stage.read):>10}{amount(stage.written):>10}"
            f"{amount(stage.memory):>11}{products:>12}  {stage.slowest}{waits}"
        )
    out += [
        f"{'all':<9}{duration(found.seconds):>10}",
        "",
        f"run directory: up to {amount(found.disk)}; between partitions: {amount(found.routed)}",
    ]
    timed = [stage for stage in found.stages if stage.seconds is not None]
    longest = max(timed, key=lambda stage: stage.seconds or 0.0)
    out.append(f"bottleneck: {longest.slowest} of {longest.name}")
    out += [f"cannot work: {text}" for text in found.refusals]
    out.append(
        f"predicted from rates of {rates.machine}, rows of {rates.dimension}; taken for granted: "
        f"CPUs like these, {'' if cluster.storage else 'storage that keeps up (--storage-rate), '}"
        f"{rates.habits.probes} of {rates.habits.cells:,} "
        f"cells probed for {rates.habits.samples:,} samples"
    )
    if rates.k != pool.k:
        out.append(
            f"those were measured with {f'k={rates.k}' if rates.k else 'an unknown k'}: with "
            f"k={pool.k} the graph may need more or less; --calibrate measures with yours"
        )
    if rates.recall < config.GraphConfig().target_recall:
        out.append(
            f"those find a recall of {rates.recall} only, for the sample was thin: the graph may "
            "need more"
        )
    if any(stage.seconds is None for stage in found.stages):
        out.append("embedding is not timed: --images-per-second of one GPU, or of a node without")
    if cluster.gpus:
        out.append("products are planned on CPUs: no rate of a GPU is known")
    return out


def as_json(found: Estimate) -> dict[str, Any]:
    """For `--json`."""
    return {**asdict(found), "seconds": found.seconds}


def duration(seconds: float) -> str:
    """Seconds in the unit that suits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def amount(size: float) -> str:
    """Bytes in the unit that suits."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:,.0f} B"
