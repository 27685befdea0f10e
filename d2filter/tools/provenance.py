"""Checks that the files of a run are those its stages wrote, and that the input is the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from d2filter.errors import D2FilterError, StorageError
from d2filter.formats import content_hash, metadata
from d2filter.formats.addresses import is_web, parted
from d2filter.formats.paths import FileInfo, Folder, checksum, read_jsons
from d2filter.formats.runstate import STAGES, RunState, differing_input

Breaches = list[str]
Records = dict[str, dict[str, Any]]

_SHOWN = 3


def records(folder: Folder) -> Records:
    """Those of the finished stages, in their order."""
    state = RunState(folder)
    found = {stage: state.done(stage) for stage in STAGES}
    return {stage: record for stage, record in found.items() if record is not None}


def home(folder: Folder, stage: str) -> Folder:
    """Where the files lie that the record of a stage lists."""
    return RunState(folder).home(stage)


def follow(folder: Folder) -> Breaches:
    """Stages that were not made from what the stage before them has left."""
    found = records(folder)
    stage_of = {record["fingerprint"]: stage for stage, record in found.items()}
    out = []
    for stage, record in found.items():
        before = record["upstream"]
        expected = STAGES[max(0, STAGES.index(stage) - 1)]
        if before and stage_of.get(before) != expected:
            out.append(f"{stage} was made from another {expected} than the one that is there")
    config = folder.read_json("config.json") or {"stages": {}}
    recorded = {stage: one["fingerprint"] for stage, one in config["stages"].items()}
    if recorded != {stage: record["fingerprint"] for stage, record in found.items()}:
        out.append("config.json has other fingerprints than the records of the stages")
    return out


def sums(folder: Folder) -> Breaches:
    """Files that are gone or hold other bytes than were published."""
    out = []
    for stage, record in records(folder).items():
        place = home(folder, stage)
        for name, recorded in record.get("checksums", {}).items():
            try:
                there = checksum(place, name)
            except D2FilterError as error:
                out.append(str(error))
                continue
            if there != recorded:
                out.append(
                    f"{place.where(name)} is not what {stage} wrote: {there[0]} bytes with "
                    f"checksum {there[1]}, it wrote {recorded[0]} with {recorded[1]}"
                )
    return _few(out)


def inputs(folder: Folder) -> Breaches:
    """Input files that changed since they were read, as far as they can be seen from here."""
    found = records(folder)
    out = []
    catalog = found.get("catalog")
    if catalog is not None and "sources" in catalog and not catalog["upstream"]:
        source = Folder(catalog["sources"]["metadata"])
        if _seen(source):
            try:
                _, files = metadata.list_pairs(source)
            except D2FilterError as error:
                return [str(error)]
            # target sets, logs and the like, with a folder in their names, lie elsewhere
            here = {n: v for n, v in catalog["inputs"].items() if "/" not in n}
            record = {**catalog, "inputs": here}
            difference = differing_input(record, files, lambda name: content_hash.of(source, name))
            out += [f"{difference} since the catalog was made"] if difference else []
    embed = found.get("embed")
    if embed is not None:
        urls = shards(folder)
        there = _there(list(urls.values()))
        for name, url in urls.items():
            if url not in there:
                continue
            now = there[url]
            if now is None:
                out.append(f"{url} was removed after it was embedded")
            elif [now.size, now.version] != embed["inputs"][name]:
                out.append(f"{url} has changed since it was embedded")
    return _few(out)


def _seen(source: Folder) -> bool:
    """Whether a folder is there, and may be looked into."""
    try:
        return source.exists()
    except StorageError:
        if is_web(source.url):
            return False  # logins are not recorded
        raise


def _there(urls: Sequence[str]) -> dict[str, FileInfo | None]:
    """Files as they are now, None for a missing one; files of missing or unreadable folders are
    left out.
    """
    inside: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        parent, name = parted(url)
        inside[parent].append(name)
    found: dict[str, FileInfo | None] = {}
    for parent, names in inside.items():
        place = Folder(parent)
        now: dict[str, FileInfo | None]
        if is_web(parent):
            try:
                now = dict(zip(names, place.infos(names), strict=True))
            except StorageError:
                continue  # logins and signatures are not recorded
        else:
            now = {info.name: info for info in place.files()}
        if now:
            found.update((f"{parent.rstrip('/')}/{name}", now.get(name)) for name in names)
    return found


def shards(folder: Folder) -> dict[str, str]:
    """The URL of each shard that was embedded, by the name of its pair."""
    marks = folder.sub("completions/embed")
    return {
        name.removesuffix(".json"): record["url"]
        for name, record in read_jsons(marks, marks.names(".json")).items()
        if "url" in record
    }


def _few(breaches: Breaches) -> Breaches:
    more = len(breaches) - _SHOWN
    return [*breaches[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
