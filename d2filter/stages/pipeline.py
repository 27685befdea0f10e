"""Which stages a command runs, which are there already, and what is recorded of them.

Every stage is planned first (its options and the fingerprint of its input). A finished stage of the
same plan is skipped; one of another plan is an error that names what differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from d2filter.algorithm import selectors
from d2filter.config import CatalogConfig, RunConfig, SelectConfig, options_of
from d2filter.errors import D2FilterError, RecallError, TooManyBadError, UsageError
from d2filter.formats import ledger
from d2filter.formats.paths import FileInfo, Folder, absolute
from d2filter.formats.runstate import Plan, RunState
from d2filter.stages.runner import Runner, Task, peak_rss_bytes

Say = Callable[[str], None]

# commands that chain more than their own stage
CHAINS = {
    "embed": ("embed",),
    "graph": ("catalog", "graph"),
    "rank": ("rank",),
    "select": ("select",),
    "run": ("catalog", "graph", "rank", "select"),
}


class Pipeline:
    """Runs stages of one run directory. Construction reads and writes nothing."""

    def __init__(
        self, config: RunConfig, *, say: Say = lambda line: None, show_progress: bool | None = None
    ) -> None:
        self.config = config
        self.out = Folder(absolute(config.out_dir))
        self.state = RunState(self.out)
        self._say = say
        self._runner = Runner(self.out, config.address, show_progress)

    def run(self, command: str) -> dict[str, Any]:
        """Run the stages of `command`; returns stats.json.

        Raises TooManyBadError or RecallError after everything else is finished.
        """
        stages = CHAINS[command]
        if command == "run" and self.config.embed is not None:
            stages = ("embed", *stages)
        unknown = set(self.config.overwrite) - set(stages)
        if unknown:
            raise UsageError(
                f"overwrite names {', '.join(sorted(unknown))}, "
                f"`d2filter {command}` makes {', '.join(stages)}"
            )
        try:
            for stage in stages:
                getattr(self, f"_{stage}")()
        finally:
            self._runner.close()
        self.state.join()  # a run that died while it wrote them is healed here
        stats: dict[str, Any] = self.out.read_json("stats.json")
        self._judge(stats, stages)
        return stats

    def _embed(self) -> None:
        from d2filter.formats import webdataset
        from d2filter.stages import embed

        config = self.config.embed
        if config is None:
            raise UsageError("no shards: give --shards")
        shards = webdataset.list_shards([absolute(pattern) for pattern in config.shards])
        options = options_of(config)
        # where the shards lie is told by `inputs`, file by file
        options.update(shards=None, arch=config.resolved_arch)
        options["weights"] = _weights(config.pretrained)
        plan = Plan(
            stage="embed",
            options=options,
            upstream="",
            inputs=[FileInfo(s.name, s.info.size, s.info.version) for s in shards],
            independent=True,
        )

        def build() -> dict[str, Any]:
            figures = embed.build(self._runner, self.out, shards, config, plan)
            ledger.collect(self.out, ["embed"])
            return figures

        self._stage(plan, build)

    def _catalog(self) -> None:
        from d2filter.formats import metadata
        from d2filter.stages import catalog

        embedded = self.state.done("embed")
        own = self.out.sub("metadata")
        source = Folder(absolute(self.config.metadata_dir)) if self.config.metadata_dir else own
        # what `embed` of this run wrote, if that is the source
        before = embedded if source == own else None
        if source == own and embedded is None and self.state.done("catalog") is not None:
            # made from a folder that this command was not told again
            self.state.require_options("catalog", _catalog_options(self.config.catalog))
            self.state.require_inputs("catalog", metadata.outside_files(self.config.catalog))
            self._say("catalog   done before")
            return
        if source == own and embedded is None:
            raise UsageError(
                f"no metadata: give --metadata-dir (parquet + npz) or --shards; "
                f"{own.url} was not written by `d2filter embed`"
            )
        pairs, files = metadata.list_pairs(source)
        beside = metadata.outside_files(self.config.catalog)
        plan = Plan(
            stage="catalog",
            options=_catalog_options(self.config.catalog),
            upstream=before["fingerprint"] if before else "",
            inputs=[*(() if before else files), *beside],
        )

        def build() -> dict[str, Any]:
            figures = catalog.build(
                self._runner,
                self.out,
                source,
                pairs,
                self.config.catalog,
                plan.fingerprint,
                self.config.memory_per_worker,
            )
            bad_before = before["stats"]["samples"]["bad"] if before else 0
            figures["samples"]["read"] += bad_before
            figures["samples"]["bad"] += bad_before
            ledger.collect(self.out, ["embed", "catalog"] if before else ["catalog"])
            return figures

        self._stage(plan, build)

    def _graph(self) -> None:
        from d2filter.stages import graph, grouped

        before = self.state.require("catalog")
        self._check_method()
        config = self.config.graph
        plan = Plan(stage="graph", options=options_of(config), upstream=before["fingerprint"])
        build = grouped.build if before["options"]["group_column"] else graph.build
        self._stage(plan, lambda: build(self._runner, self.out, self.config, plan.fingerprint))
        graph.tidy(self.out)

    def _rank(self) -> None:
        from d2filter.stages import rank

        before = self.state.require("graph")
        self._check_method()
        options = options_of(self.config.rank)
        options["gamma_forward"] = self.config.rank.scheme.gamma_forward
        # all neighbors that the graph has, and as many as it has, are one plan
        options["n_neighbors"] = rank.neighbors_of(self.out, self.config)
        if self.config.rank.method == "d2":
            options["seed"] = 0  # it needs none
        plan = Plan(stage="rank", options=options, upstream=before["fingerprint"])
        self._stage(plan, lambda: rank.build(self._runner, self.out, self.config, plan.fingerprint))
        rank.tidy(self.out)

    def _check_method(self) -> None:
        """Refuse what cannot be, before anything is thrown away for it."""
        catalog = self.state.require("catalog")["stats"]
        rank = self.config.rank
        if rank.method != "d2":
            selectors.check_size(rank.method, catalog["samples"]["ranked"])
        score = catalog.get("score", {"high_is": "unknown"})
        if rank.cut_hardest and score["high_is"] != "unknown":
            hard_end = {"harder": "high", "easier": "low"}.get(score["high_is"])
            if score["kept_first"] != hard_end:
                raise UsageError(
                    f"cut-hardest takes away what would go first, and by {score['name']} "
                    f"({score['kept_first']} goes first, high is {score['high_is']}) that is not "
                    "the hardest: use it with a score that puts hard samples first"
                )

    def _select(self) -> None:
        from d2filter.stages import select

        before = self.state.require("rank")
        catalog = self.state.require("catalog")["stats"]
        ranked = catalog["samples"]["ranked"]
        kept_first = catalog.get("score", {}).get("kept_first", "high")
        options = options_of(self.config.select)
        plan = Plan(stage="select", options=options, upstream=before["fingerprint"])
        # another budget of the same ranking is no contradiction: the outputs are replaced
        self.state.clear_from("select")

        def build() -> dict[str, Any]:
            figures = self._runner.here(
                "select",
                Task(
                    name="select",
                    run=select.select,
                    arguments={
                        "out": self.out,
                        "config": self.config.select,
                        "ranked": ranked,
                        "kept_first": kept_first,
                    },
                ),
                fingerprint=plan.fingerprint,
            )
            return {
                "samples": {"kept": figures["kept"], "pruned": figures["pruned"]},
                "budget": figures["budget"],
                "peak_rss": figures["peak_rss_bytes"],
            }

        self._stage(plan, build)

    def _stage(self, plan: Plan, build: Callable[[], dict[str, Any]]) -> None:
        # only now, when its input was looked at: a mistyped folder must not cost a finished run
        if plan.stage in self.config.overwrite:
            self.state.make_room(plan)
        elif self.state.is_current(plan):
            self._say(f"{plan.stage:<9} done before")
            return
        self.state.begin(plan)
        started = time.monotonic()
        self.state.log(stage=plan.stage, event="started", options=plan.options)
        try:
            figures = build()
        except D2FilterError as error:
            self.state.log(stage=plan.stage, event="failed", error=str(error))
            raise
        seconds = time.monotonic() - started
        peak = max(figures.pop("peak_rss", 0), peak_rss_bytes())
        self.state.finish(plan, seconds=seconds, peak_rss_bytes=peak, stats=figures)
        self.state.log(stage=plan.stage, event="finished", seconds=round(seconds, 3), **figures)
        self._say(f"{plan.stage:<9} {_brief(plan.stage, figures)} ({seconds:.1f} s)")

    def _judge(self, stats: dict[str, Any], stages: tuple[str, ...]) -> None:
        """Raise what a finished command still has to say through its exit code."""
        samples = stats["samples"]
        if "catalog" in stages or "embed" in stages:
            lost = stats["lost_shards"]
            bad, read = samples.get("bad", 0), samples.get("read", 0)
            if lost or bad > Decimal(str(self.config.max_bad)) * read:
                counts = ledger.count_reasons(self.out).get("bad", {})
                top = ", ".join(f"{count} {reason}" for reason, count in list(counts.items())[:3])
                parts = []
                if bad > Decimal(str(self.config.max_bad)) * read:
                    parts.append(
                        f"{bad} of {read} samples are bad ({top}): see "
                        f"{self.out.where(ledger.BAD_SAMPLES)}, or raise --max-bad from "
                        f"{self.config.max_bad}"
                    )
                if lost:
                    parts.append(
                        f"{len(lost)} shards could not be read whole ({lost[0]}): see lost_shards "
                        f"in {self.out.where('stats.json')} and fetch them again"
                    )
                raise TooManyBadError(f"finished, but {'; and '.join(parts)}")
        if "graph" in stages:
            target = self.config.graph.target_recall
            if stats["graph"]["recall"] < target and not self.config.best_effort:
                raise RecallError(
                    f"finished, but recall@{stats['graph']['k']} is {stats['graph']['recall']:.4f} "
                    f"and --target-recall {target}: raise --exact-below for an exact graph, "
                    "lower the target or accept it with --best-effort"
                )


def _catalog_options(config: CatalogConfig) -> dict[str, Any]:
    """Where a target set and a training log lie is told by the plan's inputs."""
    beside = {"score_target": bool(config.score_target), "training_log": bool(config.training_log)}
    return {**options_of(config), **beside}


def _weights(pretrained: str) -> list[Any] | None:
    """Size and time of a weights file: other weights under the same name are another model."""
    path = Path(pretrained)
    if not pretrained or not path.is_file():
        return None
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def default_selection(config: SelectConfig) -> SelectConfig:
    """--fraction 0.3 when neither a fraction nor a budget was given."""
    from d2filter.algorithm.budget import parse_fraction

    if config.fraction is None and config.budget is None:
        return replace(config, fraction=parse_fraction("0.3"))
    return config


def _brief(stage: str, figures: dict[str, Any]) -> str:
    """One line of a stage's figures for people."""
    if stage in ("embed", "catalog"):
        return ", ".join(f"{count:,} {name}" for name, count in figures["samples"].items())
    if stage == "graph":
        low, high = figures["recall_ci"]
        how = "exact" if figures["nlist"] == 1 else f"{figures['nprobe']}/{figures['nlist']} cells"
        if figures["refinement_passes"]:
            how += " and their friends"
        if figures.get("groups"):
            how = f"in {figures['groups']} classes"
        if figures["partitions"] > 1:
            how += f" in {figures['partitions']} partitions"
        return (
            f"k={figures['k']}, {how}, recall {figures['recall']:.4f} "
            f"[{low:.4f}, {high:.4f}] on {figures['recall_queries']:,} queries"
        )
    if stage == "rank":
        if figures["method"] != "d2":
            return f"by {figures['method']}"
        where = f" in {figures['partitions']} partitions" if figures["partitions"] > 1 else ""
        return f"{figures['supersteps']} supersteps{where}"
    samples = figures["samples"]
    return f"{samples['kept']:,} kept, {samples['pruned']:,} pruned"
