"""Stage graph for samples with classes: catalog → graph/, with neighbors of the same class only.

A partition holds whole classes, so no edge is cut and nothing has to be merged. A task holds the
features of its partition, and a class cannot be divided.

index/classes.json     names of the classes, by number
index/cells.parquet    class, partition, rows
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2filter.algorithm import by_class
from d2filter.algorithm import sizes as memory_of
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.knn import products
from d2filter.config import GraphConfig, RunConfig
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Report, assigned_cpus
from d2filter.formats import catalog, graph, tables
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import RunState

CLASSES = "classes.json"


def build(steps: StageRun, config: RunConfig) -> Figures:
    """Run all tasks; returns the stage's figures."""
    out = steps.out
    layout = catalog.layout(out.sub("catalog"))
    parts = len(layout.starts) - 1
    steps.share_node = True
    counted = steps.each(
        "classes", count_classes, [{"number": part} for part in range(parts)], variant="",
        total=layout.total,
    )  # fmt: skip
    counts: Counter[str] = sum((Counter(f["counts"]) for f in counted), Counter())
    names = sorted(counts)
    sizes = np.array([counts[name] for name in names], np.int64)
    state = RunState(out)
    wanted = config.partitions or (
        # a rerun may find another amount of memory free: what was laid out stays
        0 if config.memory_per_worker else state.task_split("graph").get("partitions", 0)
    )
    row = memory_of.class_row(2 * layout.part(0).shape[1], config.graph.n_neighbors)
    cpus, nodes, node_bytes = steps.runner.resources()
    planned = memory_of.plan_partitions(
        layout.total, row, nodes=nodes, cpus=cpus, node_bytes=node_bytes,
        memory=config.memory_per_worker, partitions=min(wanted, len(names)),
    )  # fmt: skip
    home = bins(sizes, min(planned.partitions, len(names)))
    partitions = int(home.max()) + 1
    rows = np.bincount(home, weights=sizes).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(rows)])
    state.set_task_split("graph", {"partitions": partitions})
    out.publish_json(f"index/{CLASSES}", names)
    with out.publish("index/cells.parquet") as path:
        kinds = np.arange(len(names), dtype=np.int32)
        table = pa.table({"cell": kinds, "partition": home.astype(np.int32), "rows": sizes})
        pq.write_table(table, path)
    # a class is not divided: the largest part may hold more than was laid out
    largest = memory_of.task_memory(int(rows.max()), row)
    found = steps.each(
        "group", build_part,
        [{"number": number, "first": int(starts[number])} for number in range(partitions)],
        {"config": config.graph, "home": home, "parts": parts},
        variant=partitions, total=layout.total,
        memory=max(planned.memory, largest) if planned.memory else 0,
    )  # fmt: skip
    recall = knn.pooled([(f["recall"][0], knn.Recall(**f["recall"][1])) for f in found])
    return {
        "k": config.graph.n_neighbors,
        "groups": len(names),
        "nlist": max(f["nlist"] for f in found),
        "nprobe": max(f["nprobe"] for f in found),
        "refinement_passes": 0,
        "sketch_dim": 0,
        "recall": recall.value,
        "recall_ci": [recall.low, recall.high],
        "recall_queries": recall.queries,
        "worst_class_recall": min(f["worst"] for f in found),
        "partitions": partitions,
        "partition_rows": rows.tolist(),
        "cross_edges": 0.0,
    }


def bins(sizes: Any, count: int) -> Any:
    """Partition of each class, (classes,) int64: the largest class first, each to the emptiest."""
    home = np.empty(len(sizes), np.int64)
    room = [(0, p) for p in range(count)]
    for number in np.argsort(-sizes, kind="stable").tolist():
        held, p = heapq.heappop(room)
        home[number] = p
        heapq.heappush(room, (held + int(sizes[number]), p))
    return home


def class_sizes(out: Folder) -> by_class.I64:
    """Rows of each class of a finished graph, by number, (classes,) int64."""
    table = tables.read_table(out.sub("index"), "cells.parquet", ["rows"])
    sizes: by_class.I64 = table.column("rows").to_numpy()
    return sizes


def count_classes(*, report: Report, out: Folder, number: int) -> Figures:
    """Task: samples of each class in a part of the catalog."""
    found = pc.value_counts(catalog.read_groups(out.sub("catalog"), number)).to_pylist()
    counts = {entry["values"]: entry["counts"] for entry in found}
    report(sum(counts.values()))
    return {"counts": counts}


def build_part(
    *, report: Report, out: Folder, number: int, config: GraphConfig, home: Any, first: int,
    parts: int,
) -> Figures:  # fmt: skip
    """Task: the graph of some classes → one part. Figures: recall of the worst of them."""
    products.use_threads(assigned_cpus())
    folder = out.sub("catalog")
    names = out.read_json(f"index/{CLASSES}")
    mine: list[catalog.Samples] = []
    kinds = []
    for part in range(parts):
        group = pc.index_in(
            catalog.read_groups(folder, part), value_set=pa.array(names, pa.string())
        ).to_numpy()
        rows = np.flatnonzero(home[group] == number)
        if rows.size:
            # parts ascend by uid, so their rows one after the other do
            mine.append(catalog.read_part(folder, part).take(rows))
            kinds.append(group[rows].astype(np.int64))
    held, kind = catalog.concatenate(mine), np.concatenate(kinds)
    found, classes = by_class.graph(
        held.features, held.hi, held.lo, kind, config.n_neighbors,
        target_recall=config.target_recall, exact_below=config.exact_below, seed=config.seed,
    )  # fmt: skip
    made = graph.GraphPart(
        hi=held.hi,
        lo=held.lo,
        difficulty=held.difficulty,
        neighbors=np.where(found.neighbors >= 0, found.neighbors + first, -1),
        sqdist=found.sqdist,
        group=kind,
    )
    sums = graph.publish_part(out.sub("graph"), number, made)
    report(kind.size)
    recall = knn.pooled([(one.size, one.recall) for one in classes])
    return {
        "recall": [int(kind.size), asdict(recall)],
        "worst": min(one.recall.value for one in classes),
        "nlist": max(one.nlist for one in classes),
        "nprobe": max(one.nprobe for one in classes),
        "checksums": sums,
    }
