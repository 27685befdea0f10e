"""The records of a run directory: config.json, stats.json, completions/.

completions/<stage>/<task>.json   written last by each task; a rerun then skips the task
completions/<stage>.started.json  written first: fingerprint and options of the stage
completions/<stage>.tasks.json    how the stage is divided into tasks, if that can change
completions/<stage>.json          written when the stage is done: fingerprint, options, figures
config.json, stats.json           joined from these, for people and other tools

See docs/files.md#records-and-fingerprints.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import d2filter
from d2filter.errors import InputError, RunStateError
from d2filter.formats import logs
from d2filter.formats.paths import FileInfo, Folder, checksum, read_jsons, remove_leftovers

STAGES = ("embed", "catalog", "graph", "rank", "select")
REPORT = "report.html"
REPORT_DATA = "report.json"
_REPORTED = "completions/report.json"
# what each stage writes, first the folder whose files its record lists; ledger and completions go
# with it
_OUTPUTS = {
    "embed": ("metadata", "completions/embed-model"),
    "catalog": ("catalog",),
    "graph": ("graph", "index"),
    "rank": ("ranking", "ranking-work"),
}
_PACKAGES = (
    "numpy",
    "numba",
    "pyarrow",
    "ray",
    "torch",
    "open_clip_torch",
    "faiss-cpu",
    "faiss-gpu",
)


def _outputs(stage: str) -> tuple[str, ...]:
    """Files and folders of the run directory that a stage writes."""
    if stage == "select":
        from d2filter.formats import subset  # pyarrow, which `status` can do without

        return (*subset.OUTPUTS, subset.FURTHER)
    return _OUTPUTS[stage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The planned options and input of a stage: compared with its record, and recorded when it is
    done.
    """

    stage: str
    options: dict[str, Any]
    upstream: str
    """fingerprint of the stage before, empty for the first"""
    inputs: Sequence[FileInfo] = ()
    """input files from outside the run directory"""
    independent: bool = False
    """whether each input file makes a part of its own, named like it, that no other file changes"""
    content_of: Callable[[str], str] | None = field(default=None, compare=False)
    """sums up what an input file holds; files of the same size and sum are the same"""
    sources: dict[str, str] = field(default_factory=dict, compare=False)
    """where the input lies, for `verify`; no part of the fingerprint"""

    @property
    def is_replaced(self) -> bool:
        """Whether the outputs stay in place while others are made; see `is_replaced`."""
        return is_replaced(self.stage)

    @property
    def fingerprint(self) -> str:
        """blake2b-128 over stage, version, options, input files and the fingerprint upstream."""
        return self._digest(self.inputs)

    def fingerprint_of(self, part: FileInfo) -> str:
        """The same for the part that one input file makes."""
        return self._digest([part])

    def _digest(self, inputs: Sequence[FileInfo]) -> str:
        files = [[f.name, f.size, f.version] for f in inputs]
        return digest([self.stage, d2filter.__version__, self.options, self.upstream, files])


def is_replaced(stage: str) -> bool:
    """Whether the outputs of a stage stay in place while others are made, and are replaced file by
    file. Such a stage may be repeated with other options: another budget of the same ranking.
    """
    return stage == "select"


def _is_as_recorded(home: Folder, name: str, recorded: list[int | str]) -> bool:
    """Whether a file is there with the size and sum that were recorded."""
    try:
        return checksum(home, name) == recorded
    except InputError:
        return False


def _split_record(stage: str) -> str:
    return f"completions/{stage}.tasks.json"


def digest(values: object) -> str:
    """Hash of anything that JSON can hold: what fingerprints are made of."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class RunState:
    """Reads and writes the records of one run directory."""

    folder: Folder

    def done(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None: of none, or of one that is being replaced."""
        record: dict[str, Any] | None = self.folder.read_json(f"completions/{stage}.json")
        if record is not None and is_replaced(stage):
            begun = self.folder.read_json(f"completions/{stage}.started.json")
            if begun is not None and begun["fingerprint"] != record["fingerprint"]:
                return None
        return record

    def require(self, stage: str) -> dict[str, Any]:
        """The record of a finished stage. Raises RunStateError, naming the command to run first."""
        record = self.done(stage)
        if record is None:
            command = "graph" if stage == "catalog" else stage
            raise RunStateError(
                f"{self.folder.url} holds no finished {stage}: run `d2filter {command}` first"
            )
        return record

    def is_current(self, plan: Plan) -> bool:
        """Whether the stage is done as planned; False when it is not done at all, or is to be
        replaced.

        Raises RunStateError, naming what differs, when it is done otherwise.
        """
        record = self.done(plan.stage)
        if record is None:
            return False
        same = record["fingerprint"] == plan.fingerprint
        if plan.is_replaced:
            return same and all(self.folder.exists(name) for name in record["checksums"])
        if same:
            return True
        difference = self._difference(record, plan)
        if difference:
            raise self._other_making(plan.stage, difference)
        return True

    def begun(self, plan: Plan) -> bool:
        """Whether an attempt of this plan was begun and not finished, so that it would be
        continued.
        """
        note = self.folder.read_json(f"completions/{plan.stage}.started.json")
        return note is not None and note["fingerprint"] == plan.fingerprint

    def tasks_done(self, plan: Plan) -> int:
        """How many tasks of a stage would not be run again."""
        folder = self.folder.sub(f"completions/{plan.stage}")
        names = folder.names(".json")
        if not plan.independent:
            return len(names)
        wanted = {f"{part.name}.json": plan.fingerprint_of(part) for part in plan.inputs}
        records = read_jsons(folder, [name for name in names if name in wanted])
        return sum(record["fingerprint"] == wanted[name] for name, record in records.items())

    def require_options(self, stage: str, options: dict[str, Any]) -> None:
        """Raise RunStateError when a finished stage has other options, whatever its input was."""
        record = self.require(stage)
        changed = _changed(record["options"], options)
        if changed:
            raise self._other_making(stage, changed)

    def require_inputs(
        self, stage: str, files: Sequence[FileInfo], content_of: Callable[[str], str]
    ) -> None:
        """Raise RunStateError when a finished stage has not read these files, among others."""
        record = self.require(stage)
        names = {file.name for file in files}
        inputs = {name: found for name, found in record["inputs"].items() if name in names}
        difference = differing_input({**record, "inputs": inputs}, files, content_of)
        if difference:
            raise self._other_making(stage, difference)

    def begin(self, plan: Plan) -> str:
        """Record that a stage begins; outputs of an attempt with another plan are removed first.

        Returns why an earlier attempt is not continued; empty if it is, or if there was none.
        """
        why = ""
        place = f"completions/{plan.stage}.started.json"
        before = self.folder.read_json(place)
        if before is None or before["fingerprint"] != plan.fingerprint:
            if before is not None and not plan.independent and not plan.is_replaced:
                changed = _changed(before.get("options", plan.options), plan.options)
                why = changed or "its input is another"
            if not plan.is_replaced:
                self.make_room(plan)
            note = {"fingerprint": plan.fingerprint, "options": plan.options}
            self.folder.publish_json(place, note)
        for output in ("completions", "ledger", *_outputs(plan.stage)):
            remove_leftovers(self.folder, output)
        return why

    def heal(self, plan: Plan) -> bool:
        """Remove the damaged files of a finished stage and all later stages; returns whether
        anything was damaged.

        Of independent parts, those are removed that are damaged or whose input changed. A damaged
        selection stays until its successor is written. Nothing is removed if the stage was made
        with other options or by another version; that is refused as usual.
        """
        record = self.done(plan.stage)
        if record is None or record["d2filter"] != d2filter.__version__:
            return False
        if not plan.is_replaced and _changed(record["options"], plan.options):
            return False
        home = self.home(plan.stage)
        damaged = any(
            not _is_as_recorded(home, n, found) for n, found in record["checksums"].items()
        )
        changed = plan.independent and record["fingerprint"] != plan.fingerprint
        if not (damaged or changed):
            return False
        if not plan.is_replaced:
            self.make_room(plan, by_content=True)
        return True

    def home(self, stage: str) -> Folder:
        """Where the files lie that the record of a stage lists."""
        return self.folder if is_replaced(stage) else self.folder.sub(_outputs(stage)[0])

    def make_room(self, plan: Plan, *, by_content: bool = False) -> None:
        """Remove the outputs of a stage and of later stages, except for independent parts that are
        still planned and whose files exist. by_content: a file must also have its published
        content.

        Whether such a part is made again is decided by its own fingerprint.
        """
        stage = plan.stage
        if not plan.independent:
            self.clear_from(stage)
            return
        # while the record stands: a healing that dies before is begun again by what it tells
        self._forget_parts(stage, by_content)
        self.folder.remove(f"completions/{stage}.json")
        self.clear_from(STAGES[STAGES.index(stage) + 1])
        planned = {info.name for info in plan.inputs}
        for place in (f"completions/{stage}", f"ledger/{stage}", *_outputs(stage)):
            folder = self.folder.sub(place)
            for name in folder.names():
                if name.rpartition(".")[0] not in planned:
                    folder.remove(name)

    def _forget_parts(self, stage: str, by_content: bool) -> None:
        """Remove the markers of independent parts whose files are missing or have another size;
        with by_content, or another content.
        """
        home = self.home(stage)
        there = {info.name: info.size for info in home.files()}
        marks = self.folder.sub(f"completions/{stage}")
        for name, record in read_jsons(marks, marks.names(".json")).items():
            files = record.get("checksums", {})
            whole = all(there.get(file) == size for file, (size, _) in files.items())
            if not whole or (
                by_content and not all(_is_as_recorded(home, file, t) for file, t in files.items())
            ):
                marks.remove(name)

    def set_task_split(self, stage: str, split: dict[str, Any]) -> None:
        """Record how a stage is split into tasks, as JSON. If the split changed, delete the old
        outputs: task names would refer to other inputs.

        The record changes last: a crash before leaves the old one, so that the same is done again.
        """
        before = self.folder.read_json(_split_record(stage))
        if before is not None and before != split:
            self._remove_work(stage)
        self.folder.publish_json(_split_record(stage), split)

    def task_split(self, stage: str) -> dict[str, Any]:
        """What `set_task_split` recorded; empty before."""
        return self.folder.read_json(_split_record(stage)) or {}

    def _remove_work(self, stage: str) -> None:
        """Remove what the tasks of a stage published, markers first: what a marker stands for must
        be there while it is.
        """
        for output in (f"completions/{stage}", f"ledger/{stage}", *_outputs(stage)):
            self.folder.remove(output)

    def clear_from(self, stage: str) -> None:
        """Remove a stage and all that follow from it; the records go first."""
        following = STAGES[STAGES.index(stage) :]
        self.drop_report()
        for name in reversed(following):
            # a stage that is neither done nor begun starts from nothing, one that was begun goes on
            # with what is there; the record of what is being replaced counts without `started`
            kinds = (".json", ".started.json") if is_replaced(name) else (".started.json", ".json")
            for kind in kinds:
                self.folder.remove(f"completions/{name}{kind}")
        for name in following:
            self._remove_work(name)
            self.folder.remove(_split_record(name))

    def has_report(self, fingerprint: str) -> bool:
        """Whether there is a report of this selection."""
        note = self.folder.read_json(_REPORTED)
        return note is not None and note["select"] == fingerprint and self.reported()

    def reported(self) -> bool:
        """Whether there is a report of any selection."""
        return self.folder.exists(REPORT)

    def note_report(self, fingerprint: str) -> None:
        """Note of which selection the report is."""
        self.folder.publish_json(_REPORTED, {"select": fingerprint})

    def drop_report(self) -> None:
        """Remove the report, because the selection that it shows is gone."""
        self.folder.remove(_REPORTED)
        self.folder.remove(REPORT)
        self.folder.remove(REPORT_DATA)

    def finish(
        self, plan: Plan, *, seconds: float, peak_rss_bytes: int, stats: dict[str, Any]
    ) -> None:
        """Record a finished stage, and join config.json and stats.json again."""
        self.folder.publish_json(
            f"completions/{plan.stage}.json",
            {
                "fingerprint": plan.fingerprint,
                "d2filter": d2filter.__version__,
                "upstream": plan.upstream,
                "options": plan.options,
                "inputs": {f.name: [f.size, f.version] for f in plan.inputs},
                "contents": stats.pop("contents", {}),
                "checksums": stats.pop("checksums", {}),
                "sources": plan.sources,
                "seconds": round(seconds, 3),
                "peak_rss_bytes": peak_rss_bytes,
                "stats": stats,
            },
        )
        self.join()

    def log(self, event: str, **more: Any) -> None:
        """Add one line to logs/driver.jsonl."""
        logs.append(self.folder, logs.DRIVER, event, **more)

    def join(self) -> None:
        """Write config.json and stats.json from the records of the finished stages."""
        records = {stage: self.done(stage) for stage in STAGES}
        known = {stage: record for stage, record in records.items() if record is not None}
        self.folder.publish_json(
            "config.json",
            {
                "d2filter": d2filter.__version__,
                "versions": versions(),
                "stages": {
                    stage: {key: r[key] for key in ("fingerprint", "upstream", "options")}
                    for stage, r in known.items()
                },
            },
        )
        samples: dict[str, int] = dict.fromkeys(
            ("read", "ranked", "bad", "duplicate", "kept", "pruned"), 0
        )
        stats: dict[str, Any] = {"samples": samples, "lost_shards": []}
        detail: dict[str, Any] = {}
        for stage, record in known.items():
            figures = dict(record["stats"])
            samples.update(figures.pop("samples", {}))
            stats["lost_shards"] = stats["lost_shards"] + figures.pop("lost_shards", [])
            detail.update(figures.pop("seconds_detail", {}))
            if figures:
                stats[stage] = figures
        stats["seconds"] = {stage: r["seconds"] for stage, r in known.items()}
        stats["seconds_detail"] = detail
        stats["peak_rss_bytes"] = {stage: r["peak_rss_bytes"] for stage, r in known.items()}
        self.folder.publish_json("stats.json", stats)

    def _other_making(self, stage: str, difference: str) -> RunStateError:
        return RunStateError(
            f"{self.folder.url} holds a finished {stage} with other settings: {difference}; "
            f"use another --out-dir, restore those settings, or --overwrite {stage}"
            + (" (--heal embeds only what changed)" if stage == "embed" else "")
        )

    def _difference(self, record: dict[str, Any], plan: Plan) -> str:
        """What differs between a finished stage and a plan; "" when only times of files do."""
        if record["d2filter"] != d2filter.__version__:
            return f"it was made by d2filter {record['d2filter']}, this is {d2filter.__version__}"
        changed = _changed(record["options"], plan.options)
        if changed:
            return changed
        if record["upstream"] != plan.upstream:
            return "the stage before it was run again"
        return differing_input(record, plan.inputs, plan.content_of)


def differing_input(
    record: dict[str, Any],
    files: Sequence[FileInfo],
    content_of: Callable[[str], str] | None,
) -> str:
    """The first input file of a finished stage that has changed; "" if there is none."""
    old = record.get("inputs", {})
    new = {f.name: [f.size, f.version] for f in files}
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        if name not in old or name not in new:
            return f"input file {name} is {'new' if name not in old else 'gone'}"
        # copied, or touched: another time says little when the size and the content are the same
        known = record.get("contents", {}).get(name)
        same = old[name][0] == new[name][0] and known is not None and content_of is not None
        if not same or content_of is None or content_of(name) != known:
            return f"input file {name} has changed"
    return ""


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


@functools.cache
def versions() -> dict[str, str]:
    """Versions of packages that can change results. They are looked up once."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
