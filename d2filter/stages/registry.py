"""Defines the stages of a run as objects: plan, check, build, one line for people.

`STAGES` lists them in order. `pipeline.py` runs them; `formats/runstate.py` lists their files.

Planning reads the run directory and lists the input files, and writes nothing, so that `--dry-run`
makes the same plans as a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from d2filter.algorithm.greedy import auto_settings
from d2filter.algorithm.methods import selectors
from d2filter.config import TUNED_FOR, RankConfig, RunConfig, options_of
from d2filter.engine.runner import Runner
from d2filter.engine.task import Task
from d2filter.errors import UsageError
from d2filter.formats import (
    content_hash,
    graph,
    ledger,
    metadata,
    shardlist,
    side_inputs,
    webdataset,
)
from d2filter.formats.paths import FileInfo, Folder, absolute, is_within
from d2filter.formats.reading import CATALOG_SOURCES, CatalogConfig
from d2filter.formats.runstate import Plan, RunState
from d2filter.text import redacted

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The plan of one stage of a command."""

    plan: Plan
    summary: str = ""
    """its input, for people"""
    shards: tuple[webdataset.Shard, ...] = ()
    """of embed"""
    left_out: dict[str, int] = field(default_factory=dict)
    """what lies beside the shards, by ending"""
    source: Folder | None = None
    """of a catalog: the folder of metadata, and its pairs"""
    pairs: tuple[metadata.Pair, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stages work on: a configuration and a run directory."""

    config: RunConfig
    state: RunState
    out: Folder
    runner: Runner


class Stage:
    """One stage. Objects hold no state; heavy packages are imported where a stage needs them."""

    name: str

    def plan(self, run: Run, upstream: str) -> Planned | None:
        """The plan after a stage with the fingerprint `upstream`, empty for none. None: the stage
        is done, and this command does not name its input.
        """
        raise NotImplementedError

    def check(self, run: Run) -> None:
        """Raise UsageError for options that do not fit the stages before, which are finished."""

    def build(self, run: Run, planned: Planned) -> Figures:
        """Write the outputs; returns the figures of the stage, with `checksums` of its files and
        `peak_rss` in bytes.
        """
        raise NotImplementedError

    def brief(self, figures: Figures) -> str:
        """The figures in one line, for people."""
        raise NotImplementedError

    def tidy(self, out: Folder) -> None:
        """Remove temporary files, after the stage is recorded as done."""


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
            summary=f"{len(shards):,} shards, {_size(inputs)}"
            + (
                f"; beside them {shardlist.counted_by_kind(found.left_out)}"
                if found.left_out
                else ""
            ),
            shards=tuple(shards),
            left_out=found.left_out,
        )

    def build(self, run: Run, planned: Planned) -> Figures:
        """Embed the shards that are not embedded yet."""
        from d2filter.stages import embed

        config = run.config.embed
        assert config is not None
        figures = embed.build(
            run.runner, run.out, planned.shards, config, planned.plan, planned.left_out
        )
        ledger.collect(run.out, [self.name])
        return figures

    def brief(self, figures: Figures) -> str:
        """Samples, and what is odd about pictures."""
        return _counted(figures)


class Catalog(Stage):
    """Metadata → valid, distinct samples."""

    name = "catalog"

    def plan(self, run: Run, upstream: str) -> Planned | None:
        """The plan for metadata of a folder, or for what `embed` writes. None: the catalog is done,
        and this command does not name its input.
        """
        own = run.out.sub("metadata")
        config = run.config.catalog
        given = run.config.metadata_dir
        source = Folder(absolute(given)) if given else own
        _check_apart(run, source, upstream)
        if source == own and not upstream and run.state.done("catalog") is not None:
            run.state.require_options("catalog", _catalog_options(config))
            run.state.require_inputs(
                "catalog",
                side_inputs.files(config),
                lambda name: side_inputs.content_of(config, name),
            )
            return None
        if source == own and not upstream:
            raise UsageError(
                f"no metadata: give --metadata-dir (parquet + npz) or --shards; "
                f"{own.url} was not written by `d2filter embed`"
            )
        beside = side_inputs.files(config)
        pairs: list[metadata.Pair] = []
        files: list[FileInfo] = []
        # what is still to be embedded cannot be listed
        if source != own or run.state.done("embed") is not None:
            pairs, files = metadata.list_pairs(source)
        metadata.check_score(source, pairs, config)
        before = upstream if source == own else ""
        known = {info.name for info in beside}

        def content_of(name: str) -> str:
            return (
                side_inputs.content_of(config, name)
                if name in known
                else content_hash.of(source, name)
            )

        return Planned(
            plan=Plan(
                stage=self.name,
                options=_catalog_options(config),
                upstream=before,
                inputs=[*(() if before else files), *beside],
                content_of=content_of,
                sources={
                    "metadata": redacted(source.url),
                    **{n: redacted(absolute(getattr(config, n))) for n in CATALOG_SOURCES},
                },
            ),
            summary=f"{len(pairs):,} pairs of metadata files, {_size(files)}" if files else "",
            source=source,
            pairs=tuple(pairs),
        )

    def build(self, run: Run, planned: Planned) -> Figures:
        """Read, sort and score; counts what `embed` dropped too, if it made this metadata."""
        from d2filter.stages.catalog import build as build_catalog

        assert planned.source is not None
        figures = build_catalog.build(
            run.runner,
            run.out,
            planned.source,
            planned.pairs,
            run.config.catalog,
            planned.plan.fingerprint,
            run.config.memory_per_worker,
        )
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
        _check_method(run)
        options = options_of(run.config.graph)
        return Planned(plan=Plan(stage=self.name, options=options, upstream=upstream))

    def build(self, run: Run, planned: Planned) -> Figures:
        """Search the neighbors, inside classes where there are any."""
        from d2filter.stages.graph import build as build_graph
        from d2filter.stages.graph import by_class

        catalog = run.state.require("catalog")
        build = by_class.build if catalog["options"]["group_column"] else build_graph.build
        # lists longer than there are others would be padding, of terabytes if k is a typing error
        k = min(run.config.graph.n_neighbors, max(1, catalog["stats"]["samples"]["ranked"] - 1))
        config = replace(run.config, graph=replace(run.config.graph, n_neighbors=k))
        return build(run.runner, run.out, config, planned.plan.fingerprint)

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
        _check_method(run)
        rank = run.config.rank
        options = options_of(rank)
        options["gamma_forward"] = rank.gamma if rank.gamma_forward is None else rank.gamma_forward
        # all neighbors that the graph has, and as many as it has, are one plan
        options["n_neighbors"] = _neighbors(run)
        if rank.method == "d2":
            options["seed"] = 0  # it needs none
        options["tuned_for"] = _tuned_for(run, options)
        return Planned(plan=Plan(stage=self.name, options=options, upstream=upstream))

    def build(self, run: Run, planned: Planned) -> Figures:
        """Rank by D2 or another method."""
        from d2filter.stages.rank import build as build_ranking

        plan = planned.plan
        facts = auto_settings.PoolFacts.from_catalog(run.state.require("catalog")["stats"])
        # the budget that it is for may be that of the selection, or of the ranking that is there
        config = replace(run.config, rank=RankConfig.from_options(plan.options))
        k = plan.options["n_neighbors"]
        return build_ranking.build(run.runner, run.out, config, plan.fingerprint, k, facts)

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

    def build(self, run: Run, planned: Planned) -> Figures:
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
        figures = run.runner.run_in_driver("select", task, fingerprint=planned.plan.fingerprint)
        return {
            "samples": {"kept": figures["kept"], "pruned": figures["pruned"]},
            "budget": figures["budget"],
            **({"total": figures["total"]} if run.config.select.soft is not None else {}),
            "checksums": figures["checksums"],
            "peak_rss": figures["peak_rss_bytes"],
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


def _check_apart(run: Run, source: Folder, upstream: str) -> None:
    """Raise UsageError for metadata in the run directory that `embed` did not write there."""
    own = run.out.sub("metadata")
    if not run.config.metadata_dir or not is_within(source, run.out):
        return
    if is_within(own, source) and is_within(source, own) and upstream:
        return
    raise UsageError(
        f"metadata-dir {source.url} lies in the run directory {run.out.url}, whose files are "
        "replaced and removed: give another --out-dir"
    )


def _tuned_for(run: Run, options: dict[str, Any]) -> str | None:
    """The kept share that automatic settings are for: the requested one; else that of an
    existing ranking that is otherwise the same, so that another budget does not need another
    ranking; else that of the selection.
    """
    rank, select = run.config.rank, run.config.select
    if not rank.is_tuned:
        return None
    if rank.tuned_for is not None:
        return str(rank.tuned_for)
    made = run.state.done("rank")
    if made is not None and "rank" not in run.config.overwrite:
        before = made["options"].get("tuned_for")
        if before and made["options"] == {**options, "tuned_for": before}:
            return str(before)
    if select.fraction is not None:
        return str(select.fraction)
    catalog = run.state.done("catalog")
    if select.budget is not None and catalog is not None:
        ranked = max(1, catalog["stats"]["samples"]["ranked"])
        return str(min(Decimal(1), Decimal(select.budget) / ranked))
    return str(TUNED_FOR)


def _neighbors(run: Run) -> int:
    """How many neighbors of each list count. Raises UsageError for more than there are."""
    made = run.state.done("graph")
    there = run.config.graph.n_neighbors
    if made is not None:
        there = graph.width(run.out.sub("graph"))
    wanted = run.config.rank.n_neighbors or there
    if made is not None and wanted == made["options"].get("n_neighbors"):
        return min(wanted, there)  # a small pool has fewer
    if wanted > there:
        raise UsageError(
            f"n-neighbors is {wanted}, the graph of {run.out.url} has {there}: rank with at "
            "most that many, or build the graph again"
        )
    return wanted


def _check_method(run: Run) -> None:
    """Raise UsageError for a method that the pool does not allow, before anything is removed
    for it.
    """
    record = run.state.done("catalog")
    if record is None:
        return  # a plan only: the catalog is not made yet
    catalog, rank = record["stats"], run.config.rank
    if rank.method != "d2":
        selectors.check_size(rank.method, catalog["samples"]["ranked"])
    score = catalog.get("score", {"high_is": "unknown"})
    if rank.cut_hardest and score["high_is"] != "unknown":
        hard_end = {"harder": "high", "easier": "low"}.get(score["high_is"])
        if score["kept_first"] != hard_end:
            raise UsageError(
                "cut-hardest drops the samples that would be ranked first, but with "
                f"{score['name']} ({score['kept_first']} goes first, high is {score['high_is']}) "
                "these are not the hardest: use a score that puts hard samples first"
            )


def _catalog_options(config: CatalogConfig) -> dict[str, Any]:
    """The options of a catalog. The location of files beside the metadata is not an option: the
    plan's inputs list them.
    """
    return {**options_of(config), **{n: bool(getattr(config, n)) for n in CATALOG_SOURCES}}


def _weights(pretrained: str) -> list[Any] | None:
    """Size and time of a weights file: other weights under the same name are another model."""
    path = Path(pretrained)
    if not pretrained or not path.is_file():
        return None
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _size(files: list[FileInfo]) -> str:
    """Bytes of some files, for people."""
    size = float(sum(file.size for file in files))
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
