"""Defines the stages of a run as objects: plan, check, build, one line for people.

`STAGES` lists them in order. `pipeline.py` runs them; `formats/runstate.py` lists their files.

Planning reads the run directory and lists the input files, and writes nothing, so that `--dry-run`
makes the same plans as a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2filter.algorithm.greedy import auto_settings
from d2filter.config import RankConfig, RunConfig, options_of
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Task
from d2filter.errors import UsageError
from d2filter.formats import ledger, shardlist, webdataset
from d2filter.formats.paths import FileInfo, Folder, absolute
from d2filter.formats.runstate import Plan
from d2filter.stages.catalog import plan as plan_catalog
from d2filter.stages.rank import plan as plan_rank
from d2filter.stages.stage import Planned, Run, Stage, size_of


class Embed(Stage):
    """Shards → metadata."""

    name = "embed"

    def plan(self, run: Run, upstream: str) -> Planned | None:
        """Shards, one task each."""
        config = run.config.embed
        if config is None:
            raise UsageError("no shards: give --shards")
        found = webdataset.find_shards([absolute(pattern) for pattern in config.shards])
        shards = found.shards
        options = options_of(config)
        # `inputs` lists the shards one by one
        options.update(shards=None, arch=config.resolved_arch)
        options["weights"] = _weights(config.pretrained)
        inputs = [FileInfo(s.name, s.info.size, s.info.version) for s in shards]
        return Planned(
            plan=Plan(
                stage=self.name, options=options, upstream="", inputs=inputs, independent=True
            ),
            summary=f"{len(shards):,} shards, {size_of(inputs)}"
            + (
                f"; beside them {shardlist.counted_by_kind(found.left_out)}"
                if found.left_out
                else ""
            ),
            shards=tuple(shards),
            left_out=found.left_out,
        )

    def build(self, run: Run, planned: Planned, steps: StageRun) -> Figures:
        """Embed the shards that are not embedded yet."""
        from d2filter.stages import embed

        config = run.config.embed
        assert config is not None
        figures = embed.build(steps, planned.shards, config, planned.plan, planned.left_out)
        ledger.collect(run.out, [self.name])
        return figures

    def brief(self, figures: Figures) -> str:
        """Samples, and what is odd about pictures."""
        return _counted(figures)


class Catalog(Stage):
    """Metadata → valid, distinct samples."""

    name = "catalog"

    def plan(self, run: Run, upstream: str) -> Planned | None:
        """Metadata of a folder, or what `embed` writes."""
        return plan_catalog.plan(run, upstream)

    def build(self, run: Run, planned: Planned, steps: StageRun) -> Figures:
        """Read, sort and score; counts what `embed` dropped too, if it made this metadata."""
        from d2filter.stages.catalog import build as build_catalog

        assert planned.source is not None
        figures = build_catalog.build(steps, planned.source, planned.pairs, run.config.catalog)
        before = run.state.done("embed") if planned.plan.upstream else None
        bad_before = before["stats"]["samples"]["bad"] if before else 0
        figures["samples"]["read"] += bad_before
        figures["samples"]["bad"] += bad_before
        ledger.collect(run.out, ["embed", self.name] if before else [self.name])
        return figures

    def brief(self, figures: Figures) -> str:
        """Samples by what became of them."""
        return _counted(figures)

    def tidy(self, out: Folder) -> None:
        """Remove the files that scores were clipped with."""
        from d2filter.stages.catalog import clip_scores

        clip_scores.tidy(out)


class Graph(Stage):
    """Catalog → the neighbors of every sample."""

    name = "graph"

    def plan(self, run: Run, upstream: str) -> Planned | None:
        """Neighbors of every sample."""
        plan_rank.require_method(run)  # before the long part
        options = options_of(run.config.graph)
        return Planned(plan=Plan(stage=self.name, options=options, upstream=upstream))

    def build(self, run: Run, planned: Planned, steps: StageRun) -> Figures:
        """Search the neighbors, inside classes where there are any."""
        from d2filter.stages.graph import build as build_graph
        from d2filter.stages.graph import by_class

        catalog = run.state.require("catalog")
        build = by_class.build if catalog["options"]["group_column"] else build_graph.build
        # lists longer than there are others would be padding, of terabytes if k is a typing error
        k = min(run.config.graph.n_neighbors, max(1, catalog["stats"]["samples"]["ranked"] - 1))
        config = replace(run.config, graph=replace(run.config.graph, n_neighbors=k))
        return build(steps, config)

    def brief(self, figures: Figures) -> str:
        """k, how it was searched, and the recall."""
        low, high = figures["recall_ci"]
        how = "exact" if figures["nlist"] == 1 else f"{figures['nprobe']}/{figures['nlist']} cells"
        if figures["refinement_passes"]:
            how += " and neighbors of neighbors"
        if figures.get("groups"):
            how = f"in {figures['groups']} classes"
        if figures["partitions"] > 1:
            how += f" in {figures['partitions']} partitions"
        return (
            f"k={figures['k']}, {how}, recall {figures['recall']:.4f} "
            f"[{low:.4f}, {high:.4f}] on {figures['recall_queries']:,} queries"
        )

    def tidy(self, out: Folder) -> None:
        """Remove routes and shortlists."""
        from d2filter.stages.graph import build as build_graph

        build_graph.tidy(out)


class Rank(Stage):
    """Graph → the order in which samples are kept."""

    name = "rank"

    def plan(self, run: Run, upstream: str) -> Planned | None:
        """A ranking of all samples."""
        return plan_rank.plan(run, upstream)

    def build(self, run: Run, planned: Planned, steps: StageRun) -> Figures:
        """Rank by D2 or another method."""
        from d2filter.stages.rank import build as build_ranking

        options = planned.plan.options
        facts = auto_settings.PoolFacts.from_catalog(run.state.require("catalog")["stats"])
        # the budget that it is for may be that of the selection, or of the ranking that is there
        config = replace(run.config, rank=RankConfig.from_options(options))
        return build_ranking.build(steps, config, options["n_neighbors"], facts)

    def brief(self, figures: Figures) -> str:
        """How it was ranked."""
        if figures["method"] != "d2":
            return f"by {figures['method']}"
        where = f" in {figures['partitions']} partitions" if figures["partitions"] > 1 else ""
        count = figures["supersteps"]
        return f"{count} superstep{'' if count == 1 else 's'}{where}"

    def tidy(self, out: Folder) -> None:
        """Remove states and snapshots."""
        from d2filter.stages.rank import build as build_ranking

        build_ranking.tidy(out)


class Select(Stage):
    """Ranking → one budget of it."""

    name = "select"

    def plan(self, run: Run, upstream: str) -> Planned | None:
        """One budget of it."""
        options = options_of(run.config.select)
        return Planned(plan=Plan(stage=self.name, options=options, upstream=upstream))

    def check(self, run: Run) -> None:
        """Raise UsageError for a budget that keeps nothing, or more than there is."""
        from d2filter.stages import select

        select.check(run.config.select, _ranked(run))

    def build(self, run: Run, planned: Planned, steps: StageRun) -> Figures:
        """Keep the first of the ranking."""
        from d2filter.stages import select

        catalog = run.state.require("catalog")
        task = Task(
            name="select",
            run=select.select,
            arguments={
                "out": run.out,
                "config": run.config.select,
                "ranked": _ranked(run),
                "kept_first": catalog["stats"].get("score", {}).get("kept_first", "high"),
                "method": run.state.require("rank")["options"]["method"],
                "arch": catalog["options"]["arch"],
            },
        )
        figures = steps.in_driver(task, skip=False)
        return {
            "samples": {"kept": figures["kept"], "pruned": figures["pruned"]},
            "budget": figures["budget"],
            **({"total": figures["total"]} if run.config.select.soft is not None else {}),
        }

    def brief(self, figures: Figures) -> str:
        """How many are kept."""
        samples = figures["samples"]
        repeats = f" ({figures['total']:,} with repeats)" if "total" in figures else ""
        return f"{samples['kept']:,} kept{repeats}, {samples['pruned']:,} pruned"


STAGES: Mapping[str, Stage] = {
    stage.name: stage for stage in (Embed(), Catalog(), Graph(), Rank(), Select())
}

# commands that chain more than their own stage
_CHAINS = {
    "embed": ("embed",),
    "graph": ("catalog", "graph"),
    "rank": ("rank",),
    "select": ("select",),
    "run": ("catalog", "graph", "rank", "select"),
}


def stages_of(command: str, config: RunConfig) -> tuple[str, ...]:
    """The stages of a command, in order. Raises UsageError when --overwrite names another."""
    stages = _CHAINS[command]
    if command == "run" and config.embed is not None:
        stages = ("embed", *stages)
    unknown = set(config.overwrite) - set(stages)
    if unknown:
        raise UsageError(
            f"overwrite names {', '.join(sorted(unknown))}, "
            f"`d2filter {command}` makes {', '.join(stages)}"
        )
    return stages


_OF_PICTURES = {
    "alpha": "with transparency",
    "one_color": "of one color",
    "uids_replaced": "with an id that is not a uid",
}


def _counted(figures: Figures) -> str:
    counted = [f"{count:,} {name}" for name, count in figures["samples"].items()]
    counted += [f"{figures[n]:,} {what}" for n, what in _OF_PICTURES.items() if figures.get(n)]
    return ", ".join(counted)


def _ranked(run: Run) -> int:
    """Samples that the catalog holds."""
    return int(run.state.require("catalog")["stats"]["samples"]["ranked"])


def _weights(pretrained: str) -> list[Any] | None:
    """Size and time of a weights file: other weights under the same name are another model."""
    path = Path(pretrained)
    if not pretrained or not path.is_file():
        return None
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
