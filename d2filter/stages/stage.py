"""What a stage of a run is: the base class, and what its methods get and return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from d2filter.config import RunConfig
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures
from d2filter.formats import metadata, webdataset
from d2filter.formats.paths import FileInfo, Folder
from d2filter.formats.runstate import Plan, RunState


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

    def build(self, run: Run, planned: Planned, steps: StageRun) -> Figures:
        """Write the outputs with tasks of `steps`; returns the figures of the stage. Checksums and
        memory are in the totals of `steps`.
        """
        raise NotImplementedError

    def brief(self, figures: Figures) -> str:
        """The figures in one line, for people."""
        raise NotImplementedError

    def tidy(self, out: Folder) -> None:
        """Remove temporary files, after the stage is recorded as done."""


def size_of(files: Sequence[FileInfo]) -> str:
    """Bytes of some files, for people."""
    size = float(sum(file.size for file in files))
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
