"""Runs the stages of a command: plans each one, skips it if it is finished, records its result.

A finished stage with the same plan is skipped (see `plans`). A finished stage with another plan is
an error that names the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import d2filter
from d2filter.algorithm.greedy import auto_settings
from d2filter.config import RankConfig, RunConfig, SelectConfig
from d2filter.engine.runner import Runner
from d2filter.engine.task import Task, peak_rss_bytes
from d2filter.errors import D2FilterError, RecallError, TooManyBadError, UsageError
from d2filter.formats import ledger, lock, logs
from d2filter.formats.paths import Folder, absolute, remove_leftovers
from d2filter.formats.runstate import STAGES, Plan, RunState
from d2filter.stages.plans import Planned, Plans

Say = Callable[[str], None]


class Pipeline:
    """Runs stages of one run directory. Construction reads and writes nothing."""

    def __init__(
        self, config: RunConfig, *, say: Say = lambda line: None, show_progress: bool | None = None
    ) -> None:
        self.config = config
        self._say = say
        self._show_progress = show_progress
        self._use(Folder(absolute(config.out_dir)))

    def _use(self, out: Folder) -> None:
        self.out = out
        self.state = RunState(out)
        self._plans = Plans(self.config, self.state)
        self._runner = Runner(out, self.config.address, self._show_progress, self.config.device)

    def run(self, command: str, then: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Run the stages of `command`, then call `then`, which may read the results; returns
        stats.json.

        Raises LockedError while another command writes to the run directory, and TooManyBadError or
        RecallError after everything else is finished.
        """
        stages = self._plans.stages(command)
        # a mistyped input or run directory is refused before anything is created
        self._plan(stages[0], self._upstream_of(stages[0]))
        free = self.out
        with lock.hold(free, command, say=self._say) as owned:
            self._use(owned)
            try:
                stats = self._run_stages(command, stages)
                then()
            finally:
                self._use(free)
        self._judge(stats, stages)
        return stats

    def _run_stages(self, command: str, stages: Sequence[str]) -> dict[str, Any]:
        self.state.log(
            "run", command=command, d2filter=d2filter.__version__, **logs.where(),
            stages=list(stages),
        )  # fmt: skip
        try:
            for stage in stages:
                getattr(self, f"_{stage}")()
        finally:
            self._runner.close()
        self.state.join()  # a run that died while it wrote them is healed here
        remove_leftovers(self.out, "", own=True)  # of workers that were killed while they wrote
        stats: dict[str, Any] = self.out.read_json("stats.json")
        return stats

    def _plan(self, stage: str, upstream: str) -> Planned | None:
        planned: Planned | None = getattr(self._plans, stage)(upstream)
        return planned

    def preview(self, command: str) -> list[str]:
        """What `run` would do, a line a stage; writes nothing. Raises what it would refuse."""
        if self.config.heal:
            raise UsageError("heal compares files while it runs: leave out --dry-run, or --heal")
        lines = []
        anew = False
        stages = self._plans.stages(command)
        upstream = self._upstream_of(stages[0])
        for stage in stages:
            planned = self._plan(stage, upstream)
            if planned is None:
                self._require_no_catalog_anew()
                lines.append(f"{stage:<9} done before")
                upstream = self.state.require(stage)["fingerprint"]
                continue
            plan = planned.plan
            asked = stage in self.config.overwrite
            if not anew and not asked and self._is_done(plan):
                lines.append(f"{stage:<9} done before")
                upstream = self.state.require(stage)["fingerprint"]
                continue
            goes_on = not (asked or anew or stage == "select") and self.state.begun(plan)
            done = self.state.tasks_done(plan) if goes_on or plan.independent else 0
            anew |= not goes_on
            remarks = [planned.summary] if planned.summary else []
            remarks += [f"{done:,} tasks of it are done"] if done else []
            remarks += ["--overwrite"] if asked else []
            lines.append(f"{stage:<9} to do{': ' if remarks else ''}{', '.join(remarks)}")
            upstream = plan.fingerprint
        return lines

    def _upstream_of(self, stage: str) -> str:
        """The fingerprint that the first stage of a command follows from; empty for none."""
        if stage in ("rank", "select"):
            return str(self.state.require(STAGES[STAGES.index(stage) - 1])["fingerprint"])
        embedded = self.state.done("embed") if stage == "catalog" else None
        return embedded["fingerprint"] if embedded else ""

    def _embed(self) -> None:
        from d2filter.stages import embed

        planned = self._plans.embed()
        assert self.config.embed is not None
        config = self.config.embed

        def build() -> dict[str, Any]:
            figures = embed.build(
                self._runner, self.out, planned.shards, config, planned.plan, planned.left_out
            )
            ledger.collect(self.out, ["embed"])
            return figures

        self._stage(planned.plan, build)

    def _catalog(self) -> None:
        from d2filter.stages.catalog import build as build_catalog
        from d2filter.stages.catalog import clip_scores

        embedded = self.state.done("embed")
        planned = self._plans.catalog(embedded["fingerprint"] if embedded else "")
        if planned is None:
            self._require_no_catalog_anew()
            self._say("catalog   done before")
            return
        plan, source = planned.plan, planned.source
        assert source is not None
        before = embedded if plan.upstream else None

        def build() -> dict[str, Any]:
            figures = build_catalog.build(
                self._runner,
                self.out,
                source,
                planned.pairs,
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
        clip_scores.tidy(self.out)

    def _require_no_catalog_anew(self) -> None:
        """Raise UsageError if the catalog must be made again and its metadata is not given."""
        if self.config.heal or "catalog" in self.config.overwrite:
            option = "heal" if self.config.heal else "overwrite catalog"
            raise UsageError(f"{option} needs the metadata again: give --metadata-dir")

    def _graph(self) -> None:
        from d2filter.stages.graph import build as build_graph
        from d2filter.stages.graph import by_class as graph_by_class

        before = self.state.require("catalog")
        plan = self._plans.graph(before["fingerprint"]).plan
        build = graph_by_class.build if before["options"]["group_column"] else build_graph.build
        # lists longer than there are others would be padding, of terabytes if k is a typing error
        k = min(self.config.graph.n_neighbors, max(1, before["stats"]["samples"]["ranked"] - 1))
        config = replace(self.config, graph=replace(self.config.graph, n_neighbors=k))
        self._stage(plan, lambda: build(self._runner, self.out, config, plan.fingerprint))
        build_graph.tidy(self.out)

    def _rank(self) -> None:
        from d2filter.stages.rank import build as build_ranking

        before = self.state.require("graph")
        plan = self._plans.rank(before["fingerprint"]).plan
        k = plan.options["n_neighbors"]
        facts = auto_settings.PoolFacts.from_catalog(self.state.require("catalog")["stats"])
        # the budget that it is for may be that of the selection, or of the ranking that is there
        config = replace(self.config, rank=RankConfig.from_options(plan.options))
        self._stage(
            plan,
            lambda: build_ranking.build(self._runner, self.out, config, plan.fingerprint, k, facts),
        )
        build_ranking.tidy(self.out)

    def _select(self) -> None:
        from d2filter.stages import select

        before = self.state.require("rank")
        catalog = self.state.require("catalog")
        ranked = catalog["stats"]["samples"]["ranked"]
        plan = self._plans.select(before["fingerprint"]).plan
        select.check(self.config.select, ranked)  # before anything is touched

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
                        "kept_first": catalog["stats"].get("score", {}).get("kept_first", "high"),
                        "method": before["options"]["method"],
                        "arch": catalog["options"]["arch"],
                    },
                ),
                fingerprint=plan.fingerprint,
            )
            return {
                "samples": {"kept": figures["kept"], "pruned": figures["pruned"]},
                "budget": figures["budget"],
                **({"total": figures["total"]} if self.config.select.soft is not None else {}),
                "checksums": figures["checksums"],
                "peak_rss": figures["peak_rss_bytes"],
            }

        self._stage(plan, build)

    def _is_done(self, plan: Plan) -> bool:
        """Whether a stage is done as planned. Raises RunStateError if it is done otherwise, except
        for a selection: another budget of the same ranking is allowed.
        """
        if plan.stage == "select":
            return self.state.is_selected(plan)
        return self.state.is_current(plan)

    def _stage(self, plan: Plan, build: Callable[[], dict[str, Any]]) -> None:
        # only now, when its input was looked at: a mistyped folder must not cost a finished run
        again = plan.stage in self.config.overwrite
        if again and plan.stage != "select":  # its files are replaced one by one
            self.state.clear_from(plan.stage)
        elif not again and self.config.heal:
            again = self.state.heal(plan)
            if again:
                self._say(f"{plan.stage:<9} is healed: files were damaged, or shards changed")
        if not again and self._is_done(plan):
            self._say(f"{plan.stage:<9} done before")
            return
        why = self.state.begin(plan)
        if why:
            self._say(f"{plan.stage:<9} begins again: {why}")
            self.state.log("stage begins again", stage=plan.stage, why=why)
        started = time.monotonic()
        self.state.log("stage started", stage=plan.stage, options=plan.options)
        try:
            figures = build()
        except D2FilterError as error:
            self.state.log("stage failed", stage=plan.stage, error=str(error))
            raise
        seconds = time.monotonic() - started
        peak = max(figures.pop("peak_rss", 0), peak_rss_bytes())
        self.state.finish(plan, seconds=seconds, peak_rss_bytes=peak, stats=figures)
        self.state.log(
            "stage finished", stage=plan.stage, seconds=round(seconds, 3), **logs.plain(figures)
        )
        self._say(f"{plan.stage:<9} {_brief(plan.stage, figures)} ({seconds:.1f} s)")

    def _judge(self, stats: dict[str, Any], stages: Sequence[str]) -> None:
        """Raise the error of a finished command: too many bad samples, or low recall."""
        samples = stats["samples"]
        if "catalog" in stages or "embed" in stages:
            lost = stats["lost_shards"]
            bad = samples.get("bad", 0)
            read = samples.get("read", 0) - samples.get("outside", 0)
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


def default_selection(config: SelectConfig) -> SelectConfig:
    """--fraction 0.3 when neither a fraction nor a budget was given."""
    from d2filter.algorithm.budget import parse_fraction

    if config.fraction is None and config.budget is None:
        return replace(config, fraction=parse_fraction("0.3"))
    return config


_OF_PICTURES = {
    "alpha": "with transparency",
    "one_color": "of one color",
    "uids_replaced": "with an id that is no uid",
}


def _brief(stage: str, figures: dict[str, Any]) -> str:
    """One line of a stage's figures for people."""
    if stage in ("embed", "catalog"):
        counted = [f"{count:,} {name}" for name, count in figures["samples"].items()]
        counted += [f"{figures[n]:,} {what}" for n, what in _OF_PICTURES.items() if figures.get(n)]
        return ", ".join(counted)
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
    repeats = f" ({figures['total']:,} with repeats)" if "total" in figures else ""
    return f"{samples['kept']:,} kept{repeats}, {samples['pruned']:,} pruned"
