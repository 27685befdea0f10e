"""Writes one new shard of `reshard` from the input shards.

All sizes are known from the indexes, so the new shard is laid out first. Then it is filled from one
input shard after the other; each is opened once and read from start to end, for any order of the
samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from d2filter.engine.task import Report
from d2filter.errors import InputError
from d2filter.formats import tables, tarwriter, webdataset
from d2filter.formats.paths import Folder
from d2filter.stages.reshard.layout import PlacedSamples

I32 = npt.NDArray[np.int32]

_REQUESTS = 8  # at once, where input shards do not lie on a disk

INDEX = pa.schema(
    [
        ("shard", pa.int64()),
        ("uid_hi", pa.uint64()),
        ("uid_lo", pa.uint64()),
        ("extensions", pa.list_(pa.binary())),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int64())),
    ]
)
"""a kept sample of some input shards: number of the shard, uid, where its members lie; the names of
members may be any bytes
"""


def index_name(number: int) -> str:
    """File of one index."""
    return f"index-{number:06d}.parquet"


def fill(
    out: Folder,
    number: int,
    work: Folder,
    shards: Sequence[webdataset.Shard],
    rows: PlacedSamples,
    report: Report,
) -> int:
    """Write shard `number` of a folder; returns the bytes of its members.

    work: folder of the indexes. shards: all input shards. rows: its samples. Memory: some 4 kB a
    sample, and a few pieces of input of 2 or 8 MB.
    Raises InputError when an input shard is not what it was when its index was made.
    """
    with ThreadPoolExecutor(_REQUESTS) as pool:
        entries = _entries(work, rows, pool)
        members, places = _lay_out(entries, rows.copy)
        samples = Counter(entry["shard"] for entry in entries)
        # a disk is kept busy by the other tasks; a server answers many requests as fast as one
        on_disk = all(shards[shard].place[0].local is not None for shard in samples)
        each = map if on_disk else pool.map

        def copy(shard: int) -> int:
            _copy(shards[shard], places[shard], writer)
            return samples[shard]

        with tarwriter.publishing_shard(out, number, members, len(entries)) as writer:
            for copied in each(copy, sorted(samples)):
                report(copied)
    return sum(member.size for member in members)


def _entries(work: Folder, rows: PlacedSamples, pool: Executor) -> list[dict[str, Any]]:
    """The index rows of the samples of a new shard, in its order."""
    indexes = np.unique(rows.index).tolist()
    where = {index: np.flatnonzero(rows.index == index) for index in indexes}

    def read(index: int) -> list[dict[str, Any]]:
        table = tables.read_table(work, index_name(index))
        found: list[dict[str, Any]] = table.take(pa.array(rows.row[where[index]])).to_pylist()
        return found

    entries: list[dict[str, Any]] = [{}] * rows.row.size
    for index, found in zip(indexes, pool.map(read, indexes), strict=True):
        for at, entry in zip(where[index].tolist(), found, strict=True):
            entries[at] = entry
    return entries


def _lay_out(
    entries: Sequence[dict[str, Any]], copies: I32
) -> tuple[list[tarwriter.Member], dict[int, list[tarwriter.Place]]]:
    """The members of a new shard in their order, and where those of each input shard lie."""
    members: list[tarwriter.Member] = []
    places: dict[int, list[tarwriter.Place]] = {entry["shard"]: [] for entry in entries}
    for entry, copy in zip(entries, copies.tolist(), strict=True):
        key = f"{entry['uid_hi']:016x}{entry['uid_lo']:016x}-{copy}"
        own = places[entry["shard"]]
        for extension, offset, size in zip(
            entry["extensions"], entry["offsets"], entry["sizes"], strict=True
        ):
            own.append(tarwriter.Place(offset, len(members)))
            name = f"{key}.{extension.decode('utf-8', 'surrogateescape')}"
            members.append(tarwriter.Member(name, size))
    return members, places


def _copy(shard: webdataset.Shard, places: list[tarwriter.Place], writer: tarwriter.Writer) -> None:
    """Copy the members that a new shard takes from one input shard."""
    folder, name = shard.place
    with folder.reading(name, shard.info) as buffered:
        # a buffer would read ahead, by megabytes of an object store
        stream = getattr(buffered, "raw", buffered)
        try:
            writer.copy(stream, places, folder.local is not None)
        except EOFError as error:
            raise InputError(
                f"{shard.url} changed while it was read: fetch it again, and begin with an empty "
                "--out-dir"
            ) from error
