"""Plans the stages of a command: their options, inputs and fingerprints, before anything runs.

`Plans` reads the run directory and lists the input files. It writes nothing, so that `--dry-run`
makes the same plans as a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from d2filter.algorithm.methods import selectors
from d2filter.config import TUNED_FOR, RunConfig, options_of
from d2filter.errors import UsageError
from d2filter.formats import content_hash, graph, metadata, shardlist, side_inputs, webdataset
from d2filter.formats.paths import FileInfo, Folder, absolute, is_within
from d2filter.formats.reading import CATALOG_SOURCES, CatalogConfig
from d2filter.formats.runstate import Plan, RunState
from d2filter.text import redacted

# commands that chain more than their own stage
CHAINS = {
    "embed": ("embed",),
    "graph": ("catalog", "graph"),
    "rank": ("rank",),
    "select": ("select",),
    "run": ("catalog", "graph", "rank", "select"),
}


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


class Plans:
    """Plans of one run directory and configuration."""

    def __init__(self, config: RunConfig, state: RunState) -> None:
        self._config = config
        self._state = state
        self._out = state.folder

    def stages(self, command: str) -> tuple[str, ...]:
        """The stages of a command. Raises UsageError when --overwrite names another."""
        stages = CHAINS[command]
        if command == "run" and self._config.embed is not None:
            stages = ("embed", *stages)
        unknown = set(self._config.overwrite) - set(stages)
        if unknown:
            raise UsageError(
                f"overwrite names {', '.join(sorted(unknown))}, "
                f"`d2filter {command}` makes {', '.join(stages)}"
            )
        return stages

    def embed(self, upstream: str = "") -> Planned:
        """Shards, one task each."""
        config = self._config.embed
        if config is None:
            raise UsageError("no shards: give --shards")
        found = webdataset.find_shards([absolute(pattern) for pattern in config.shards])
        shards = found.shards
        options = options_of(config)
        # where the shards lie is told by `inputs`, file by file
        options.update(shards=None, arch=config.resolved_arch)
        options["weights"] = _weights(config.pretrained)
        inputs = [FileInfo(s.name, s.info.size, s.info.version) for s in shards]
        return Planned(
            plan=Plan(stage="embed", options=options, upstream="", inputs=inputs, independent=True),
            summary=f"{len(shards):,} shards, {_size(inputs)}"
            + (
                f"; beside them {shardlist.counted_by_kind(found.left_out)}"
                if found.left_out
                else ""
            ),
            shards=tuple(shards),
            left_out=found.left_out,
        )

    def catalog(self, upstream: str = "") -> Planned | None:
        """The plan for metadata of a folder, or for what `embed` writes. None: the catalog is done,
        and this command does not name its input.
        """
        own = self._out.sub("metadata")
        config = self._config.catalog
        given = self._config.metadata_dir
        source = Folder(absolute(given)) if given else own
        self._check_apart(source, upstream)
        if source == own and not upstream and self._state.done("catalog") is not None:
            self._state.require_options("catalog", _catalog_options(config))
            self._state.require_inputs(
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
        if source != own or self._state.done("embed") is not None:
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
                stage="catalog",
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

    def _check_apart(self, source: Folder, upstream: str) -> None:
        """Raise UsageError for metadata in the run directory that `embed` did not write there."""
        own = self._out.sub("metadata")
        if not self._config.metadata_dir or not is_within(source, self._out):
            return
        if is_within(own, source) and is_within(source, own) and upstream:
            return
        raise UsageError(
            f"metadata-dir {source.url} lies in the run directory {self._out.url}, whose files are "
            "replaced and removed: give another --out-dir"
        )

    def graph(self, upstream: str) -> Planned:
        """Neighbors of every sample."""
        self._check_method()
        options = options_of(self._config.graph)
        return Planned(plan=Plan(stage="graph", options=options, upstream=upstream))

    def rank(self, upstream: str) -> Planned:
        """A ranking of all samples."""
        self._check_method()
        rank = self._config.rank
        options = options_of(rank)
        options["gamma_forward"] = rank.gamma if rank.gamma_forward is None else rank.gamma_forward
        # all neighbors that the graph has, and as many as it has, are one plan
        options["n_neighbors"] = self._neighbors()
        if rank.method == "d2":
            options["seed"] = 0  # it needs none
        options["tuned_for"] = self._tuned_for(options)
        return Planned(plan=Plan(stage="rank", options=options, upstream=upstream))

    def _tuned_for(self, options: dict[str, Any]) -> str | None:
        """The kept share that automatic settings are for: the requested one; else that of an
        existing ranking that is otherwise the same, so that another budget does not need another
        ranking; else that of the selection.
        """
        rank, select = self._config.rank, self._config.select
        if not rank.is_tuned:
            return None
        if rank.tuned_for is not None:
            return str(rank.tuned_for)
        made = self._state.done("rank")
        if made is not None and "rank" not in self._config.overwrite:
            before = made["options"].get("tuned_for")
            if before and made["options"] == {**options, "tuned_for": before}:
                return str(before)
        if select.fraction is not None:
            return str(select.fraction)
        catalog = self._state.done("catalog")
        if select.budget is not None and catalog is not None:
            ranked = max(1, catalog["stats"]["samples"]["ranked"])
            return str(min(Decimal(1), Decimal(select.budget) / ranked))
        return str(TUNED_FOR)

    def select(self, upstream: str) -> Planned:
        """One budget of it."""
        options = options_of(self._config.select)
        return Planned(plan=Plan(stage="select", options=options, upstream=upstream))

    def _neighbors(self) -> int:
        """How many neighbors of each list count. Raises UsageError for more than there are."""
        made = self._state.done("graph")
        there = self._config.graph.n_neighbors
        if made is not None:
            there = graph.width(self._out.sub("graph"))
        wanted = self._config.rank.n_neighbors or there
        if made is not None and wanted == made["options"].get("n_neighbors"):
            return min(wanted, there)  # a small pool has fewer
        if wanted > there:
            raise UsageError(
                f"n-neighbors is {wanted}, the graph of {self._out.url} has {there}: rank with at "
                "most that many, or make the graph anew"
            )
        return wanted

    def _check_method(self) -> None:
        """Raise UsageError for a method that the pool does not allow, before anything is removed
        for it.
        """
        record = self._state.done("catalog")
        if record is None:
            return  # a plan only: the catalog is not made yet
        catalog, rank = record["stats"], self._config.rank
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
