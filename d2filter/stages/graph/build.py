"""Stage graph: catalog → index/ and graph/. This module runs the steps in order.

train, then assign and choose (one task per catalog part), lay out, route (per catalog part), find,
merge, improve and finish (per partition), measure (per catalog part), judge. Every task publishes
its output, and a rerun skips it.

See docs/method.md#graph-partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from typing import Any

from d2filter.algorithm import sizes
from d2filter.algorithm.knn import calibrate, cells, products
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.knn.calibrate import Effort
from d2filter.config import RunConfig
from d2filter.engine import prometheus
from d2filter.engine.runner import Runner
from d2filter.engine.task import Task, checksums_of
from d2filter.errors import RecallError
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import digest
from d2filter.stages.graph import calibrate as calibrate_on_parts
from d2filter.stages.graph import route, train
from d2filter.stages.graph import search as search_parts
from d2filter.stages.graph.train import CENTROIDS

Figures = dict[str, Any]

_PRODUCTS = ("train", "assign", "choose", "find", "measure")  # steps that a GPU makes shorter
_CHOOSING = ("train", "assign", "choose")
_AFTER_LAYOUT = ("route-", "find-", "merge-", "refine-", "finish-", "judge")
_REMOVERS = 16
_CHOICE = tuple(field.name for field in fields(calibrate.Choice))
_KEPT = (CENTROIDS, "cells.parquet", "classes.json")


def build(runner: Runner, out: Folder, config: RunConfig, fingerprint: str) -> Figures:
    """Run all tasks; returns the stage's figures.

    Raises RecallError when the calibration finds the target out of reach and --best-effort is not
    given: before the long part, with nothing thrown away.
    """
    steps = Steps(runner, out, config, fingerprint)
    k = config.graph.n_neighbors
    trained, choice, more = steps.choose(knn.LEAST)
    while more is not None:
        trained, choice, more = steps.choose(more)
    if not choice["pays"]:
        trained, choice = steps.compare_all()
    probes, passes = choice["probes"], choice["passes"]
    target = config.graph.target_recall
    if choice["predicted"] < target and not config.best_effort:
        raise RecallError(
            f"recall@{k} of {target} is out of reach: {probes} of {trained['nlist']} cells find "
            f"{choice['predicted']:.4f} on the calibration sample; "
            "lower --target-recall, raise --exact-below above the size of the pool for an exact "
            "graph, or accept this recall with --best-effort"
        )
    width = knn.list_width(k, passes)
    laid, partitions = steps.lay_out(width, trained["sketch_dim"])
    routed = steps.route(probes, width, partitions)
    found, edges, judged = steps.search(laid["sizes"], width, passes, trained["nlist"], partitions)
    entries = sum(figures["entries"] for figures in routed)
    every = sum(figures["edges"] for figures in edges)
    prometheus.set_recall(k, judged["recall"])
    return {
        "k": k,
        "nlist": trained["nlist"],
        "nprobe": probes,
        "refinement_passes": passes,
        "sketch_dim": trained["sketch_dim"],
        "predicted_recall": choice["predicted"],
        "evaluations_per_sample": choice["evaluations"],
        **{name: judged[name] for name in ("recall", "recall_ci", "recall_queries")},
        "partitions": partitions,
        "partition_rows": [figures["rows"] for figures in found],
        "fan_out": entries / max(1, steps.total),
        "cross_edges": sum(figures["cross_edges"] for figures in edges) / max(1, every),
        "checksums": checksums_of(edges),
        "seconds_detail": steps.seconds,
        "peak_rss": steps.peak,
    }


def partition_plan(
    runner: Runner, rows: int, row_bytes: int, sketch_dim: int, width: int, *, memory: int,
    partitions: int,
) -> sizes.PartitionPlan:  # fmt: skip
    """Partitions of a graph on the runner's cluster, see `sizes.plan_partitions`."""
    cpus, nodes, node_bytes = runner.resources()
    return sizes.plan_partitions(
        rows, sizes.graph_row(row_bytes, sketch_dim, width), nodes=nodes, cpus=cpus,
        node_bytes=node_bytes, memory=memory, partitions=partitions,
    )  # fmt: skip


def tidy(out: Folder) -> None:
    """Remove files needed only while a graph is made. Call it after the stage is recorded."""
    index = out.sub("index")
    names = [name for name in index.names() if name not in _KEPT]
    with ThreadPoolExecutor(_REMOVERS) as pool:  # an object store takes its time for each
        list(pool.map(index.remove, names))


class Steps:
    """The fan-outs of one graph, with seconds and peak memory of their tasks."""

    def __init__(self, runner: Runner, out: Folder, config: RunConfig, fingerprint: str) -> None:
        self._runner = runner
        self._out = out
        self._config = config
        self._fingerprint = fingerprint
        layout = catalog.layout(out.sub("catalog"))
        self._parts = len(layout.starts) - 1
        self.total = layout.total
        self._row_bytes = 2 * layout.part(0).shape[1]
        self.seconds: dict[str, float] = {}
        self.peak = 0
        self._memory = config.memory_per_worker
        self._made = ""

    def choose(self, effort: Effort) -> tuple[Figures, Figures, Effort | None]:
        """Train, assign, calibrate; returns the effort to try next if the target was missed."""
        kind = f"cells-{effort.looked_under}-{effort.least_axes}"
        if effort == knn.LEAST:
            kind = "cells"
        trained = self._train(kind, exact=False, effort=effort)
        if trained["nlist"] == 1:
            return trained, {**asdict(knn.exact_choice(self.total)), "pays": True}, None
        figures = self._calibrate(kind)
        choice = calibrate.Choice(**{name: figures[name] for name in _CHOICE})
        target = self._config.graph.target_recall
        so_far = {name: trained[name] for name in ("axes", "parents")}
        more = calibrate.harder(effort, choice, target, **so_far)
        self._made = kind
        if choice.probes > cells.STORED_PROBES and figures["pays"] and more is None:
            self.assign(f"{kind}-{choice.probes}", choice.probes)
        return trained, figures, more

    def _calibrate(self, kind: str) -> Figures:
        """Figures of the choice. The driver decides; tasks of all catalog parts search."""

        def each(turn: str, run: Any, arguments: Figures) -> None:
            names = [f"choose-{turn}-{part:05d}" for part in range(self._parts)]
            own = [{**arguments, "part": part} for part in range(self._parts)]
            self._map("choose", run, names, own, None, variant=turn)

        asked = {
            "out": self._out, "config": self._config.graph, "parts": self._parts, "kind": kind,
            "each": each,
        }  # fmt: skip
        task = Task(name=f"choose-{kind}", run=calibrate_on_parts.choose, arguments=asked)
        made = self._step_fingerprint("choose", kind)
        before = self.seconds.get("choose", 0.0)
        figures = self._runner.run_in_driver("graph", task, fingerprint=made, skip=True)
        # with what the driver did, and on a rerun too
        self.seconds["choose"] = round(before + figures["seconds"], 3)
        self.peak = max(self.peak, figures["peak_rss_bytes"])
        return figures

    def compare_all(self) -> tuple[Figures, Figures]:
        """Use one cell, regardless of the calibration."""
        trained = self._train("exact", exact=True, effort=knn.LEAST)
        self._made = "exact"
        return trained, {**asdict(knn.exact_choice(self.total)), "pays": True}

    def _train(self, kind: str, *, exact: bool, effort: Effort) -> Figures:
        asked = {"config": self._config.graph, "exact": exact, "effort": effort}
        trained = self._alone("train", train.train, asked, kind)
        self.assign(kind, cells.STORED_PROBES)
        return trained

    def assign(self, kind: str, probes: int) -> None:
        """Find the nearest cells of all samples; kind: the cells that were trained."""
        names = [f"assign-{kind}-{part:05d}" for part in range(self._parts)]
        arguments = [{"part": part, "probes": probes} for part in range(self._parts)]
        self._map("assign", train.assign, names, arguments, self.total, variant=kind)

    def lay_out(self, width: int, sketch_dim: int) -> tuple[Figures, int]:
        """Assign cells to partitions. Their number is the requested one, that of an earlier
        attempt, or follows from memory.
        """
        marker = "completions/graph/layout.json"
        before = self._out.read_json(marker)
        partitions = self._config.partitions
        if before and not partitions and not self._config.memory_per_worker:
            # a rerun may find another amount of memory free: what was laid out stays
            same = before["fingerprint"] == self._step_fingerprint("layout", before["partitions"])
            partitions = before["partitions"] if same else 0
        partitions = self._cut(width, sketch_dim, partitions)
        fingerprint = self._step_fingerprint("layout", partitions)
        if before is None or before["fingerprint"] != fingerprint:
            # markers go before the files that they stand for
            self._out.remove(marker)
            for name in self._out.sub("completions/graph").names(".json"):
                if name.startswith(_AFTER_LAYOUT):
                    self._out.remove(f"completions/graph/{name}")
        laid = self._runner.run_in_driver(
            "graph",
            Task(
                name="layout",
                run=route.lay_out,
                arguments={"out": self._out, "parts": self._parts, "partitions": partitions},
            ),
            fingerprint=fingerprint,
            skip=True,
        )
        return laid, partitions

    def route(self, probes: int, k: int, partitions: int) -> list[Figures]:
        """Rows to the partitions where they must be compared."""
        names = [f"route-{part:05d}" for part in range(self._parts)]
        arguments = [
            {
                "part": part,
                "parts": self._parts,
                "probes": probes,
                "k": k,
                "partitions": partitions,
            }
            for part in range(self._parts)
        ]
        return self._map("route", route.route, names, arguments, self.total, variant=partitions)

    def search(
        self, rows: Sequence[int], width: int, passes: int, nlist: int, partitions: int
    ) -> tuple[list[Figures], list[Figures], Figures]:
        """Search, merge, refine, write, measure: figures of find, finish and judge."""
        k = self._config.graph.n_neighbors
        numbers = range(partitions)

        def each(label: str, run: Any, arguments: Callable[[int], Figures]) -> list[Figures]:
            return self._map(
                label,
                run,
                [f"{label}-{n:05d}" for n in numbers],
                [{"number": n, **arguments(n)} for n in numbers],
                self.total,
                variant=partitions,
            )

        every: Figures = {"parts": self._parts, "partitions": partitions, "width": width}
        found = each("find", search_parts.find, lambda n: {**every, "nlist": nlist})
        each("merge", search_parts.merge, lambda n: {"partitions": partitions, "width": width})
        stem = "merged"
        if passes:
            each(
                "refine",
                search_parts.improve,
                lambda n: {"parts": self._parts, "sizes": rows, "k": k},
            )
            stem = "refined"
        edges = each(
            "finish",
            search_parts.finish,
            lambda n: {"stem": stem, "k": k, "first": sum(rows[:n]), "rows": rows[n]},
        )
        self._map(
            "measure",
            search_parts.measure,
            [f"measure-{part:05d}" for part in range(self._parts)],
            [{"part": part, "k": k} for part in range(self._parts)],
            self.total,
        )
        judged = self._alone(
            "judge",
            search_parts.judge,
            {"parts": self._parts, "partitions": partitions, "k": k, "stem": stem},
            partitions,
        )
        return found, edges, judged

    def _cut(self, width: int, sketch_dim: int, partitions: int) -> int:
        """The number of partitions, as requested or as memory requires; sets the memory of their
        tasks.
        """
        found = partition_plan(
            self._runner, self.total, self._row_bytes, sketch_dim, width,
            memory=self._config.memory_per_worker, partitions=partitions,
        )  # fmt: skip
        self._memory = found.memory
        return found.partitions

    def _alone(self, label: str, run: Any, arguments: Figures, variant: Any = "") -> Figures:
        """One task, with the variant in its name, so that two variants keep both markers."""
        name = f"{label}-{variant}" if variant else label
        return self._map(label, run, [name], [arguments], None, variant=variant)[0]

    def _map(
        self,
        label: str,
        run: Any,
        names: list[str],
        arguments: list[Figures],
        total: int | None,
        variant: Any = "",
    ) -> list[Figures]:
        figures = self._runner.map(
            "graph",
            [
                Task(name=name, run=run, arguments={"out": self._out, **more})
                for name, more in zip(names, arguments, strict=True)
            ],
            fingerprint=self._step_fingerprint(label, variant),
            label=label,
            total=total,
            share_node=True,
            on_gpu=label in _PRODUCTS and products.may_use_gpus(),
            memory=self._memory,
        )
        longest = max(f["seconds"] for f in figures)
        self.seconds[label] = round(self.seconds.get(label, 0.0) + longest, 3)
        self.peak = max(self.peak, *(f["peak_rss_bytes"] for f in figures))
        return figures

    def _step_fingerprint(self, label: str, variant: Any) -> str:
        """Fingerprint of one step. It changes with the number of partitions and, after the choice,
        with the kind of cells.
        """
        made = "" if label in _CHOOSING else self._made
        return digest([self._fingerprint, made, label, variant])
