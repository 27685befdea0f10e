"""Plans the stage catalog: its options, and the metadata and other files that it reads."""

from __future__ import annotations

from typing import Any

from d2filter.config import options_of
from d2filter.errors import UsageError
from d2filter.formats import content_hash, metadata, side_inputs
from d2filter.formats.paths import FileInfo, Folder, absolute, is_within
from d2filter.formats.reading import CATALOG_SOURCES, CatalogConfig
from d2filter.formats.runstate import Plan
from d2filter.stages.stage import Planned, Run, size_of
from d2filter.text import redacted


def plan(run: Run, upstream: str) -> Planned | None:
    """The plan for metadata of a folder, or for what `embed` writes. None: the catalog is done, and
    this command does not name its input.
    """
    own = run.out.sub("metadata")
    config = run.config.catalog
    given = run.config.metadata_dir
    source = Folder(absolute(given)) if given else own
    _require_apart(run, source, upstream)
    if source == own and not upstream and run.state.done("catalog") is not None:
        run.state.require_options("catalog", _options(config))
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
            side_inputs.content_of(config, name) if name in known else content_hash.of(source, name)
        )

    return Planned(
        plan=Plan(
            stage="catalog",
            options=_options(config),
            upstream=before,
            inputs=[*(() if before else files), *beside],
            content_of=content_of,
            sources={
                "metadata": redacted(source.url),
                **{n: redacted(absolute(getattr(config, n))) for n in CATALOG_SOURCES},
            },
        ),
        summary=f"{len(pairs):,} pairs of metadata files, {size_of(files)}" if files else "",
        source=source,
        pairs=tuple(pairs),
    )


def _require_apart(run: Run, source: Folder, upstream: str) -> None:
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


def _options(config: CatalogConfig) -> dict[str, Any]:
    """The options of a catalog. The location of files beside the metadata is not an option: the
    plan's inputs list them.
    """
    return {**options_of(config), **{n: bool(getattr(config, n)) for n in CATALOG_SOURCES}}
