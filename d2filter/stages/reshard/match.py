"""Which samples `reshard` searches in the input shards, and which of several matches it takes.

A task searches its shards for two kinds of samples: those with a known key, which the run ranked
from this shard, and those with a known uid only, which may be in any shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2filter.algorithm import uids
from d2filter.errors import UsageError
from d2filter.formats import kept as kept_format
from d2filter.formats import subset as subset_format
from d2filter.formats import tables, webdataset
from d2filter.formats import uid as uid_format
from d2filter.formats.kept import Kept
from d2filter.formats.paths import Folder
from d2filter.formats.rows import read_array, write_array

Uid = tuple[int, int]

_UIDS = "uids.npy"
_KEPT = "kept.parquet"
_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("key", pa.large_string()),
        ("uid_hi", pa.uint64()),
        ("uid_lo", pa.uint64()),
    ]
)
"""a sample to find by key: number of the input shard, key, uid"""


class Wanted:
    """All samples that the inputs are searched for."""

    def __init__(
        self,
        shards: Sequence[webdataset.Shard],
        subset: npt.NDArray[np.void],
        kept: Kept | None,
    ) -> None:
        """subset: (n,) of (u8, u8), ascending. kept: shard and key of its samples; None: all go by
        uid. Raises UsageError when the shards are not those of `kept`.
        """
        self.subset = subset
        self.strict = kept is None or kept.embedded
        """whether a sample whose json has no uid must have that of its content"""
        self._kept = kept
        self._numbers = [] if kept is None else _numbers(shards, kept)

    def digest(self) -> str:
        """Equal for the same samples."""
        held = hashlib.blake2b(np.ascontiguousarray(self.subset).data, digest_size=16)
        if self._kept is not None:
            held.update(self._kept.digest().encode())
        return held.hexdigest()

    def publish(self, work: Folder, bounds: Sequence[tuple[int, int]]) -> list[int | None]:
        """Write what tasks read of it. bounds: the first input of each task, and of the next.

        Returns the row group that each task reads, None for none.
        """
        kept = self._kept
        write_array(work, _UIDS, subset_format.pairs(self.subset) if kept is None else kept.loose)
        groups: list[int | None] = [None] * len(bounds)
        if kept is None:
            return groups
        written = 0
        with work.publish(_KEPT) as path, pq.ParquetWriter(path, _SCHEMA) as writer:
            for task, (first, after) in enumerate(bounds):
                parts = [
                    _table(kept.of_shard(number), place)
                    for place, number in enumerate(self._numbers[first:after], first)
                    if number >= 0
                ]
                table = pa.concat_tables([_SCHEMA.empty_table(), *parts])
                if table.num_rows:
                    writer.write_table(table, row_group_size=table.num_rows)
                    groups[task], written = written, written + 1
        return groups

    def not_given(self) -> str:
        """Part of a message: how many shards of the run are not among the inputs."""
        if self._kept is None:
            return ""
        given = set(self._numbers)
        gone = [name for number, name in enumerate(self._kept.names) if number not in given]
        return f"; {len(gone)} shards of the run were not given ({gone[0]})" if gone else ""


class Searched:
    """The samples that one task searches its shards for."""

    def __init__(self, work: Folder, group: int | None, strict: bool) -> None:
        """group: row group of its samples with a key, None for none; strict: see `Wanted`."""
        # a map, where the disk is local: all tasks of a node share its pages
        self._pairs = read_array(work, _UIDS)
        self._strict = strict
        self._keys: dict[int, dict[str, list[Uid]]] = {}
        if group is not None:
            with tables.open_table(work, _KEPT) as parquet:
                rows: dict[str, list[Any]] = parquet.read_row_group(group).to_pydict()
            for place, key, hi, lo in zip(*rows.values(), strict=True):
                self._keys.setdefault(place, {}).setdefault(key, []).append((hi, lo))

    def anything(self, place: int) -> bool:
        """Whether an input shard, by number, may hold a wanted sample."""
        return bool(len(self._pairs)) or place in self._keys

    def keys(self, place: int) -> Container[str] | None:
        """Keys of an input shard to read; None for all."""
        return None if len(self._pairs) else self._keys.get(place, {})

    def choose(self, place: int, found: Sequence[webdataset.Located]) -> list[tuple[int, Uid]]:
        """Of the samples of an input shard the wanted ones, by number, and their uids."""
        by_key = self._by_key(found, self._keys.get(place, {}))
        return sorted([*by_key.items(), *self._by_uid(found, by_key)])

    def _by_key(
        self, found: Sequence[webdataset.Located], keys: dict[str, list[Uid]]
    ) -> dict[int, Uid]:
        """Of several samples with one key the one with the right uid is taken. If none has it, and
        not `strict`, the first one without a uid in its json.
        """
        left = {key: list(own) for key, own in keys.items()}
        chosen: dict[int, Uid] = {}
        for loosely in (False,) if self._strict else (False, True):
            for n, sample in enumerate(found):
                wanted = left.get(sample.key)
                if not wanted or n in chosen or (loosely and sample.has_uid):
                    continue
                uid = wanted[0] if loosely else uid_format.from_hex(sample.uid)
                if uid in wanted:
                    wanted.remove(uid)
                    chosen[n] = uid
        return chosen

    def _by_uid(
        self, found: Sequence[webdataset.Located], chosen: Container[int]
    ) -> list[tuple[int, Uid]]:
        if not len(self._pairs) or not found:
            return []
        own = [uid_format.from_hex(sample.uid) for sample in found]
        hi, lo = np.array(own, np.uint64).T
        # a loop in numba takes a worker a second to load
        there = uids.positions(self._pairs[:, 0], self._pairs[:, 1], hi, lo) >= 0
        return [(n, own[n]) for n in np.flatnonzero(there).tolist() if n not in chosen]


def _numbers(shards: Sequence[webdataset.Shard], kept: Kept) -> list[int]:
    """Which shard of the run each input is, −1 for none."""
    numbers = [kept.find(shard.url) for shard in shards]
    first: dict[int, str] = {}
    for number, shard in zip(numbers, shards, strict=True):
        if number >= 0 and number in first:
            raise UsageError(
                f"shards {first[number]} and {shard.address} both match the shard "
                f"{kept.names[number]} of the run: give only the one that was ranked"
            )
        first[number] = shard.address
    if len(kept.rows.key) and max(numbers, default=-1) < 0:
        raise UsageError(
            f"none of the {len(shards)} shards ({shards[0].address} first) has the name of one "
            f"that was ranked ({kept.names[0]} first): give those, or the run's subset.npy as "
            "--subset, to match by uid alone"
        )
    return numbers


def _table(rows: kept_format.KeptSamples, place: int) -> Any:
    """Each sample once; the subset contains the number of its repeats."""
    n = len(rows.key)
    if n > 1:
        # rows ascend by key and uid
        again = uids.repeats(rows.hi, rows.lo)
        again[1:] &= pc.equal(rows.key[1:], rows.key[:-1]).to_numpy(zero_copy_only=False)
        first = np.flatnonzero(~again)
        rows = kept_format.KeptSamples(
            key=rows.key.take(pa.array(first)), hi=rows.hi[first], lo=rows.lo[first]
        )
    columns = [np.full(len(rows.key), place), rows.key, rows.hi, rows.lo]
    return pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)
