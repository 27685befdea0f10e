"""Reads inputs of a catalog beside the metadata: target sets, training logs, score files, subsets.

Score files and subsets may be as long as the pool, so they are joined in buckets (`joined`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from d2filter.algorithm.scores import registry as scores
from d2filter.algorithm.scores.terms import Term
from d2filter.errors import InputError, UsageError
from d2filter.formats import content_hash, join_table, npz, scorefile, subset, tables, traininglog
from d2filter.formats.addresses import file_name
from d2filter.formats.join_table import Block, Joined
from d2filter.formats.paths import FileInfo, Folder, absolute, place_of
from d2filter.formats.reading import CatalogConfig

SCORES = "scores"
WITHIN = "within"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """All of it, ready to be read."""

    target: npt.NDArray[Any] | None = None
    """(t, d) image embeddings of a target set"""
    logs: dict[str, traininglog.Scored] = field(default_factory=dict)
    """scores of a training log, by name"""
    scored: Joined | None = None
    """columns of a score file"""
    within: Joined | None = None
    """uids of a subset"""

    def terms(self, config: CatalogConfig) -> tuple[Term, ...]:
        """What the difficulty is the sum of; empty for the metadata's own score."""
        if not config.terms and self.scored is not None:
            return (Term(name=self.scored.columns[0]),)
        return config.terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that is to be joined."""

    name: str
    what: str
    """for messages"""
    columns: tuple[str, ...]
    rows: int
    """at most"""
    blocks: Callable[[], Iterator[Block]]


def tables_of(config: CatalogConfig) -> list[Table]:
    """The score file and the subset, those that are given. Raises InputError or UsageError for what
    cannot be used.
    """
    found = []
    if config.score_file:
        url, wanted = config.score_file, file_columns(config)
        found.append(
            Table(
                name=SCORES,
                what=f"score-file {url}",
                columns=wanted,
                rows=scorefile.count_rows(url),
                blocks=lambda: scorefile.blocks(url, wanted),
            )
        )
    if config.within:
        folder, name = _subset_place(config.within)
        found.append(
            Table(
                name=WITHIN,
                what=f"within {config.within}",
                columns=(),
                rows=subset.count_rows(folder, name),
                blocks=lambda: ((hi, lo, ()) for hi, lo in subset.blocks(folder, name)),
            )
        )
    return found


def file_columns(config: CatalogConfig) -> tuple[str, ...]:
    """Columns that are read of the score file. Raises UsageError where the score uses none."""
    if not config.terms:
        return (scorefile.only_column(config.score_file, config.score_column),)
    there = scorefile.column_names(config.score_file)
    names = dict.fromkeys(term.name for term in config.terms)
    used = tuple(name for name in names if name not in scores.SCORES and name in there)
    if not used:
        raise UsageError(
            f"score {config.score!r} is not a column of score-file {config.score_file}: it has "
            f"{tables.listed(there)}"
        )
    return used


def check_terms(config: CatalogConfig, where: str, there: list[str]) -> None:
    """Raise UsageError for a term of the score that is neither computed nor a column.

    where, there: a file of the metadata and its columns.
    """
    held = file_columns(config) if config.score_file else ()
    for term in config.terms:
        if term.name in scores.SCORES or term.name in held or term.name in there:
            continue
        known = [*scores.SCORES, *held, *there]
        beside = f", nor of {config.score_file}" if config.score_file else ""
        raise UsageError(
            f"score has the term {str(term)!r}: {term.name!r} is neither a computed score "
            f"({', '.join(scores.SCORES)}) nor a column of {where} ({tables.listed(there)})"
            f"{beside}{tables.nearest(term.name, known)}"
        )


def files(config: CatalogConfig) -> list[FileInfo]:
    """Files beside the metadata, by names that no file of that has. Raises InputError for one that
    is not there.
    """
    return [replace(info, name=name) for name, (_, info) in _places(config).items()]


def content_of(config: CatalogConfig, name: str) -> str:
    """What a file of `files` holds, in a few digits."""
    folder, info = _places(config)[name]
    return content_hash.of(folder, info.name)


def all_contents(config: CatalogConfig) -> dict[str, str]:
    """The same of all of them."""
    return {
        name: content_hash.of(folder, info.name) for name, (folder, info) in _places(config).items()
    }


def _places(config: CatalogConfig) -> dict[str, tuple[Folder, FileInfo]]:
    """Folder and file of each, by the name that the run knows it by."""
    found: dict[str, tuple[Folder, FileInfo]] = {}

    def add(kind: str, folder: Folder, infos: list[FileInfo]) -> None:
        for info in infos:
            found[f"{kind}/{file_name(folder.where(info.name))}"] = (folder, info)

    if config.training_log:
        add("training-log", *traininglog.files(config.training_log))
    if config.score_file:
        add("score-file", *scorefile.files(config.score_file))
    for kind, url, place, suffixes in (
        ("score-target", config.score_target, _target_place, (".npy", ".npz")),
        ("within", config.within, _subset_place, (".npy",)),
    ):
        if url:
            folder, name = place(url)
            info = folder.info(name)
            if info is None or not info.name.endswith(suffixes):
                raise InputError(f"{kind} {url} is not a {' or '.join(suffixes)} file")
            add(kind, folder, [replace(info, name=name)])
    return found


def _target_place(url: str) -> tuple[Folder, str]:
    return place_of(absolute(url))


def _subset_place(url: str) -> tuple[Folder, str]:
    """Folder and name of a subset, which may be given as a run directory."""
    if file_name(absolute(url)).endswith(".npy"):
        return place_of(absolute(url))
    return Folder(absolute(url)), subset.SUBSET


def read_target(url: str, arch: str) -> npt.NDArray[Any]:
    """A target set: .npy (t, d), or the ARCH_img of an .npz. Raises InputError."""
    folder, name = place_of(absolute(url))
    if file_name(url).endswith(".npz"):
        key = f"{arch}_img"
        return npz.read_arrays(folder, name, {key: npz.Need("the score target", "--arch")})[key]
    return npz.read_array(folder, name, f"score-target {url}")


def load(config: CatalogConfig, folder: Folder) -> Outside:
    """All of it, for one reader. folder: an empty one for tables that are joined."""
    for table in tables_of(config):
        buckets = 1 + table.rows // join_table.BUCKET_ROWS
        rows = join_table.gather(
            folder, table.name, table.blocks(), table.what, table.columns, buckets, 0, buckets
        )
        join_table.publish(folder, table.name, buckets=buckets, columns=table.columns, rows=rows)
    logs = {name: traininglog.score(config.training_log, name) for name in config.logged}
    return ready(config, folder, logs)


def ready(config: CatalogConfig, folder: Folder, logs: dict[str, traininglog.Scored]) -> Outside:
    """All of it, with tables that lie in a folder."""
    return Outside(
        target=read_target(config.score_target, config.arch) if config.score_target else None,
        logs=logs,
        scored=join_table.read(folder, SCORES) if config.score_file else None,
        within=join_table.read(folder, WITHIN) if config.within else None,
    )
