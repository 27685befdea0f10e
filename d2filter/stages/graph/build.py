"""Stage graph: catalog → index/ and graph/. This module runs the steps in order.

train, then assign and choose (one task per catalog part), lay out, route (per catalog part), find,
merge, refine and finish (per partition), measure (per catalog part), judge. Every task publishes
its output, and a rerun skips it.

See docs/method.md#graph-partitions.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from d2filter.algorithm import sizes
from d2filter.algorithm.knn import calibrate, cells, products
from d2filter.algorithm.knn import in_memory as knn
from d2filter.config import GraphConfig, RunConfig
from d2filter.engine import prometheus
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Task, figures_as
from d2filter.errors import RecallError
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.formats.rows import PartedArray
from d2filter.formats.runstate import digest
from d2filter.stages.graph import calibrate as calibrate_on_parts
from d2filter.stages.graph import route, search, train
from d2filter.stages.graph.train import CENTROIDS

_FILES = "catalog_row"
_AFTER_LAYOUT = ("route-", "find-", "merge-", "refine-", "finish-", "judge")
_LAYOUT = "completions/graph/layout.json"
_REMOVERS = 16
_KEPT = (CENTROIDS, "cells.parquet", "classes.json")


def build(steps: StageRun, config: RunConfig) -> Figures:
    """Run all tasks; returns the stage's figures.

    Raises RecallError when the calibration finds the target out of reach and --best-effort is not
    given: before the long part, with nothing thrown away.
    """
    # tasks that a version with other names of files has finished are not taken for done
    steps.fingerprint = digest([steps.fingerprint, _FILES])
    k, target = config.graph.n_neighbors, config.graph.target_recall
    layout = catalog.layout(steps.out.sub("catalog"))
    parts, total = len(layout.starts) - 1, layout.total
    steps.share_node = True
    steps.chosen = ("",)  # the kind of cells, which the first steps do not depend on
    trials = PartedTrials(steps, config.graph, parts, total)
    choice = calibrate.fit(trials, target)
    nlist = trials.trained.nlist
    if choice.predicted < target and not config.best_effort:
        raise RecallError(
            f"recall@{k} of {target} is out of reach: {choice.probes} of {nlist} cells find "
            f"{choice.predicted:.4f} on the calibration sample; "
            "lower --target-recall, raise --exact-below above the size of the pool for an exact "
            "graph, or accept this recall with --best-effort"
        )
    steps.chosen = (trials.kind,)
    width = knn.list_width(k, choice.passes)
    laid = _lay_out(steps, config, layout, width, trials.trained.sketch_dim)
    partitions, rows = laid.partitions, laid.sizes
    every_part = [{"part": part} for part in range(parts)]
    every_partition = [{"partition": number} for number in range(partitions)]
    counts = {"parts": parts, "partitions": partitions}
    on_gpu = products.may_use_gpus()

    routed = steps.each(
        "route", route.route, every_part, {**counts, "probes": choice.probes, "k": width},
        total=total, variant=partitions,
    )  # fmt: skip
    found = steps.each(
        "find", search.find, every_partition, {**counts, "nlist": nlist, "width": width},
        total=total, variant=partitions, on_gpu=on_gpu,
    )  # fmt: skip
    steps.each(
        "merge", search.merge, every_partition, {"partitions": partitions, "width": width},
        total=total, variant=partitions,
    )  # fmt: skip
    if choice.passes:
        steps.each(
            "refine", search.refine_lists, every_partition, {"parts": parts, "sizes": rows, "k": k},
            total=total, variant=partitions,
        )  # fmt: skip
    lists = "refined" if choice.passes else "merged"
    edges = steps.each(
        "finish", search.finish,
        [{"partition": n, "first": sum(rows[:n]), "rows": rows[n]} for n in range(partitions)],
        {"stem": lists, "k": k}, total=total, variant=partitions,
    )  # fmt: skip
    steps.each(
        "measure", search.measure, every_part, {"k": k}, total=total, variant="", on_gpu=on_gpu
    )
    judged = steps.alone(
        "judge", search.judge, {**counts, "k": k, "stem": lists}, name=f"judge-{partitions}",
        variant=partitions,
    )  # fmt: skip
    prometheus.set_recall(k, judged["recall"])
    return {
        "k": k,
        "nlist": nlist,
        "nprobe": choice.probes,
        "refinement_passes": choice.passes,
        "sketch_dim": trials.trained.sketch_dim,
        "predicted_recall": choice.predicted,
        "evaluations_per_sample": choice.evaluations,
        **{name: judged[name] for name in ("recall", "recall_ci", "recall_queries")},
        "partitions": partitions,
        "partition_rows": [figures["rows"] for figures in found],
        "fan_out": sum(figures["entries"] for figures in routed) / max(1, total),
        "cross_edges": sum(figures["cross_edges"] for figures in edges)
        / max(1, sum(figures["edges"] for figures in edges)),
        "seconds_detail": steps.totals.seconds,
    }


def partition_plan(
    runner: Runner, rows: int, row_bytes: int, sketch_dim: int, width: int, *, memory: int,
    partitions: int,
) -> sizes.PartitionPlan:  # fmt: skip
    """Partitions of a graph on the runner's cluster, see `sizes.plan_partitions`."""
    cpus, nodes, node_bytes = runner.resources()
    return sizes.plan_partitions(
        rows, sizes.graph_row(row_bytes, sketch_dim, width), nodes=nodes, cpus=cpus,
        node_bytes=node_bytes, memory=memory, partitions=partitions, row_bytes=row_bytes,
    )  # fmt: skip


def tidy(out: Folder) -> None:
    """Remove files needed only while a graph is made. Call it after the stage is recorded."""
    index = out.sub("index")
    names = [name for name in index.names() if name not in _KEPT]
    with ThreadPoolExecutor(_REMOVERS) as pool:  # an object store takes its time for each
        list(pool.map(index.remove, names))


class PartedTrials:
    """Cells of a catalog, trained and tried by tasks (calibrate.Trials)."""

    def __init__(self, steps: StageRun, config: GraphConfig, parts: int, total: int) -> None:
        self.total = total
        self.trained: train.Trained
        self.kind = ""
        """name of the trained cells in task names"""
        self._steps = steps
        self._config = config
        self._parts = parts

    def train(self, effort: calibrate.Effort, *, exact: bool = False) -> calibrate.TrainedSizes:
        """Train, and assign all rows. exact: train one cell."""
        kind = "exact" if exact else "cells"
        if effort != calibrate.LEAST:
            kind = f"cells-{effort.looked_under}-{effort.least_axes}"
        arguments = {"config": self._config, "exact": exact, "effort": effort}
        figures = self._steps.alone(
            "train", train.train, arguments, name=f"train-{kind}", variant=kind,
            on_gpu=products.may_use_gpus(),
        )  # fmt: skip
        self.kind, self.trained = kind, figures_as(train.Trained, figures)
        self.assign_rows(kind, cells.STORED_PROBES)
        return calibrate.TrainedSizes(
            cells=self.trained.nlist, axes=self.trained.axes, parents=self.trained.parents
        )

    def choose(self) -> calibrate.Choice:
        """Calibrate. The driver decides; tasks of all catalog parts search."""
        task = Task(
            name=f"choose-{self.kind}",
            run=calibrate_on_parts.choose,
            arguments={
                "steps": self._steps, "config": self._config, "parts": self._parts,
                "kind": self.kind,
            },
        )  # fmt: skip
        figures = self._steps.in_driver(task, label="choose", variant=self.kind, skip=True)
        return figures_as(calibrate.Choice, figures)

    def assign(self, probes: int) -> None:
        """Assign more cells to each row."""
        self.assign_rows(f"{self.kind}-{probes}", probes)

    def use_one_cell(self) -> None:
        """Train one cell, regardless of the calibration."""
        self.train(calibrate.LEAST, exact=True)

    def assign_rows(self, kind: str, probes: int) -> None:
        """Find the nearest cells of all rows. kind: name in task names."""
        parts = [{"part": part} for part in range(self._parts)]
        self._steps.each(
            "assign", train.assign, parts, {"probes": probes}, name=f"assign-{kind}", variant=kind,
            total=self.total, on_gpu=products.may_use_gpus(),
        )  # fmt: skip


def _lay_out(
    steps: StageRun, config: RunConfig, layout: PartedArray, width: int, sketch_dim: int
) -> route.Laid:
    """Assign cells to partitions. Their number is the requested one, that of an earlier attempt, or
    follows from memory. The steps after it request the memory of a partition. width: places of the
    lists.
    """
    out, partitions, memory = steps.out, config.partitions, config.memory_per_worker
    before = out.read_json(_LAYOUT)
    row_bytes = 2 * layout.part(0).shape[1]
    if before and not partitions:
        # a rerun may find other memory free, or other nodes: what was laid out stays, if a task
        # can hold a partition of it
        rows = layout.total / before["partitions"]
        needed = sizes.task_memory(rows, sizes.graph_row(row_bytes, sketch_dim, width))
        same = before["fingerprint"] == steps.fingerprint_of("layout", before["partitions"])
        partitions = before["partitions"] if same and (not memory or needed <= memory) else 0
    planned = partition_plan(
        steps.runner, layout.total, row_bytes, sketch_dim, width, memory=memory,
        partitions=partitions,
    )  # fmt: skip
    steps.memory, partitions = planned.memory, planned.partitions
    if before is None or before["fingerprint"] != steps.fingerprint_of("layout", partitions):
        # markers go before the files that they stand for
        out.remove(_LAYOUT)
        for name in out.sub("completions/graph").names(".json"):
            if name.startswith(_AFTER_LAYOUT):
                out.remove(f"completions/graph/{name}")
    task = Task(
        name="layout",
        run=route.lay_out,
        arguments={"out": out, "parts": len(layout.starts) - 1, "partitions": partitions},
    )
    return figures_as(route.Laid, steps.in_driver(task, variant=partitions, skip=True))
