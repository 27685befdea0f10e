"""Runs the stages of a command: plans each one, skips it if it is finished, records its result.

A finished stage with the same plan is skipped (see `registry`). A finished stage with another plan
is an error that names the difference.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import d2filter
from d2filter.config import RunConfig, SelectConfig
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import peak_rss_bytes
from d2filter.errors import D2FilterError, RecallError, TooManyBadError, UsageError
from d2filter.formats import ledger, lock, logs
from d2filter.formats.paths import Folder, absolute, remove_leftovers
from d2filter.formats.runstate import Plan, RunState
from d2filter.stages.registry import STAGES, stages_of
from d2filter.stages.stage import Run, Stage

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
        self._runner = Runner(out, self.config.address, self._show_progress, self.config.device)
        self._run = Run(config=self.config, state=self.state, out=out)

    def run(self, command: str, then: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Run the stages of `command`, then call `then`, which may read the results; returns
        stats.json.

        Raises LockedError while another command writes to the run directory, and TooManyBadError or
        RecallError after everything else is finished.
        """
        stages = stages_of(command, self.config)
        # a mistyped input or run directory is refused before anything is created
        STAGES[stages[0]].plan(self._run, self._upstream_of(stages[0]))
        free = self.out
        with lock.hold(free, command, say=self._say) as owned:
            self._use(owned)
            try:
                self.state.log(
                    "run", command=command, d2filter=d2filter.__version__, **logs.where(),
                    stages=list(stages),
                )  # fmt: skip
                with contextlib.closing(self._runner):
                    for stage in stages:
                        self._run_stage(STAGES[stage])
                self.state.join()  # a run that died while it wrote them is healed here
                # of workers that were killed while they wrote
                remove_leftovers(self.out, "", own=True)
                stats: dict[str, Any] = self.out.read_json("stats.json")
                then()
            finally:
                self._use(free)
        self._judge(stats, stages)
        return stats

    def preview(self, command: str) -> list[str]:
        """What `run` would do, a line a stage; writes nothing. Raises what it would refuse."""
        if self.config.heal:
            raise UsageError("heal compares files while it runs: leave out --dry-run, or --heal")
        lines = []
        anew = False
        stages = stages_of(command, self.config)
        upstream = self._upstream_of(stages[0])
        for stage in stages:
            planned = STAGES[stage].plan(self._run, upstream)
            if planned is None:
                self._require_no_catalog_anew()
                lines.append(f"{stage:<9} done before")
                upstream = self.state.require(stage)["fingerprint"]
                continue
            plan = planned.plan
            asked = stage in self.config.overwrite
            if not anew and not asked and self.state.is_current(plan):
                lines.append(f"{stage:<9} done before")
                upstream = self.state.require(stage)["fingerprint"]
                continue
            goes_on = not (asked or anew or plan.is_replaced) and self.state.begun(plan)
            done = self.state.tasks_done(plan) if goes_on or plan.independent else 0
            anew |= not goes_on
            remarks = [planned.summary] if planned.summary else []
            remarks += [f"{done:,} tasks of it are done"] if done else []
            remarks += ["--overwrite"] if asked else []
            lines.append(f"{stage:<9} to do{': ' if remarks else ''}{', '.join(remarks)}")
            upstream = plan.fingerprint
        return lines

    def _upstream_of(self, stage: str) -> str:
        """The fingerprint of the finished stage that a stage follows; empty for none."""
        if stage == "catalog":  # its metadata may be somebody else's
            embedded = self.state.done("embed")
            return embedded["fingerprint"] if embedded else ""
        names = list(STAGES)
        before = names[: names.index(stage)][-1:]
        return str(self.state.require(before[0])["fingerprint"]) if before else ""

    def _run_stage(self, stage: Stage) -> None:
        """Run a stage, unless it is finished, and record its result."""
        planned = stage.plan(self._run, self._upstream_of(stage.name))
        if planned is None:
            self._require_no_catalog_anew()
            self._say(f"{stage.name:<9} done before")
            return
        plan = planned.plan
        stage.check(self._run)  # before anything is touched
        if not self._needs_work(plan):
            self._say(f"{stage.name:<9} done before")
            stage.tidy(self.out)
            return
        self._begin(plan)
        started = time.monotonic()
        memory = self.config.memory_per_worker
        steps = StageRun(self._runner, stage.name, plan.fingerprint, memory=memory)
        try:
            figures = stage.build(self._run, planned, steps)
        except D2FilterError as error:
            self.state.log("stage failed", stage=stage.name, error=str(error))
            raise
        seconds = time.monotonic() - started
        figures["checksums"] = steps.totals.checksums
        peak = max(steps.totals.peak_rss_bytes, peak_rss_bytes())
        self.state.finish(plan, seconds=seconds, peak_rss_bytes=peak, stats=figures)
        self.state.log(
            "stage finished", stage=stage.name, seconds=round(seconds, 3), **logs.plain(figures)
        )
        self._say(f"{stage.name:<9} {stage.brief(figures)} ({seconds:.1f} s)")
        stage.tidy(self.out)

    def _require_no_catalog_anew(self) -> None:
        """Raise UsageError if the catalog must be made again and its metadata is not given."""
        if self.config.heal or "catalog" in self.config.overwrite:
            option = "heal" if self.config.heal else "overwrite catalog"
            raise UsageError(f"{option} needs the metadata again: give --metadata-dir")

    def _needs_work(self, plan: Plan) -> bool:
        """Whether a stage is not finished as planned; removes what --overwrite and --heal name."""
        if plan.stage in self.config.overwrite:
            # only now, when its input was looked at: a mistyped folder must not cost a finished run
            if not plan.is_replaced:
                self.state.clear_from(plan.stage)
            return True
        if self.config.heal and self.state.heal(plan):
            self._say(f"{plan.stage:<9} is healed: files were damaged, or shards changed")
            return True
        return not self.state.is_current(plan)

    def _begin(self, plan: Plan) -> None:
        why = self.state.begin(plan)
        if why:
            self._say(f"{plan.stage:<9} begins again: {why}")
            self.state.log("stage begins again", stage=plan.stage, why=why)
        self.state.log("stage started", stage=plan.stage, options=plan.options)

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
