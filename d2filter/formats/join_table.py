"""A large table from another tool, prepared for joining by uid: in buckets, each sorted by uid.

NAME.json                 buckets, columns, rows
NAME-00000.hi.npy, .lo    uids of a bucket, ascending, distinct
NAME-00000.v0.npy, …      float32, one file per column

A hash of the uid chooses the bucket, so that buckets have about equal sizes. A task holds one
bucket at a time; on a local disk only the pages that it reads. A bucket in an object store is
fetched once by each process.
"""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.errors import InputError
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.rows import mapped, read_array, write_array

F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Block = tuple[uids.U64, uids.U64, Sequence[F32]]
"""hi, lo and one array a column, all (n,)"""

_FETCHED = 512  # arrays that a process keeps: of 300 million rows
BUCKET_ROWS = 2_000_000
ROW_BYTES = 100
"""of a row with one column, while its bucket is made"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A joined table on disk."""

    folder: Folder
    name: str
    buckets: int
    columns: tuple[str, ...]
    rows: int
    """distinct uids"""
    made: str
    """names this making of it"""

    def find(self, hi: uids.U64, lo: uids.U64) -> tuple[Bools, dict[str, F32]]:
        """Which of some uids (n,) the table contains, and the values of each column, NaN for the
        others.
        """
        there = np.zeros(hi.size, np.bool_)
        values = {column: np.full(hi.size, np.nan, np.float32) for column in self.columns}
        bucket = bucket_of(hi, lo, self.buckets)
        order = np.argsort(bucket, kind="stable")
        bounds = np.searchsorted(bucket[order], np.arange(self.buckets + 1))
        for number in range(self.buckets):
            mine = order[bounds[number] : bounds[number + 1]]
            if not mine.size:
                continue
            stem = f"{self.name}-{number:05d}"
            own = [self._array(f"{stem}.{half}.npy") for half in ("hi", "lo")]
            at = uids.positions(own[0], own[1], hi[mine], lo[mine])
            found = mine[at >= 0]
            there[found] = True
            for column, name in enumerate(self.columns):
                if found.size:
                    held = self._array(f"{stem}.v{column}.npy")
                    values[name][found] = held[at[at >= 0]]
        return there, values

    def _array(self, name: str) -> npt.NDArray[Any]:
        if self.folder.local is not None:
            return read_array(self.folder, name)
        return _fetched(self.folder.url, name, self.made)


@functools.lru_cache(maxsize=_FETCHED)
def _fetched(url: str, name: str, made: str) -> npt.NDArray[Any]:
    """An array of an object store, in a file in TMPDIR: the next task of this process needs it
    too. made: so that none of an earlier table is taken for it.
    """
    return mapped(read_array(Folder(url), name))


def bucket_of(hi: uids.U64, lo: uids.U64, buckets: int) -> npt.NDArray[np.int64]:
    """Bucket of each uid, (n,) int64, by a hash."""
    high = uids.hashed(hi, lo, salt=uids.SALT_JOIN) >> np.uint64(32)
    bucket: npt.NDArray[np.int64] = ((high * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)
    return bucket


def gather(
    folder: Folder,
    name: str,
    blocks: Iterable[Block],
    what: str,
    columns: Sequence[str],
    buckets: int,
    first: int,
    end: int,
) -> int:
    """Write buckets `first` to below `end` of a table; returns how many distinct uids they hold.

    blocks: the whole table. what: the table, for messages. Memory: ROW_BYTES a row of the buckets.
    Raises InputError, naming the smallest such uid of a bucket, where a uid has two values.
    """
    held: list[list[npt.NDArray[Any]]] = [[] for _ in range(2 + len(columns))]
    for hi, lo, values in blocks:
        own = bucket_of(hi, lo, buckets)
        rows = np.flatnonzero((own >= first) & (own < end))
        arrays: list[npt.NDArray[Any]] = [hi, lo, *values]
        for kept, array in zip(held, arrays, strict=True):
            kept.append(array[rows])
    kinds = (np.uint64, np.uint64, *(np.float32 for _ in columns))
    whole = [
        np.concatenate([np.empty(0, kind), *parts]) for kind, parts in zip(kinds, held, strict=True)
    ]
    del held
    bucket = bucket_of(whole[0], whole[1], buckets)
    order = np.lexsort((whole[1], whole[0], bucket))
    bounds = np.searchsorted(bucket[order], np.arange(first, end + 1))
    total = 0
    for number, (begin, after) in zip(range(first, end), itertools.pairwise(bounds), strict=True):
        hi, lo = whole[0][order[begin:after]], whole[1][order[begin:after]]
        values = [array[order[begin:after]] for array in whole[2:]]
        again = np.flatnonzero(uids.repeats(hi, lo))
        for column, value in zip(columns, values, strict=True):
            a, b = value[again - 1], value[again]
            other = again[~((a == b) | (np.isnan(a) & np.isnan(b)))]
            if other.size:
                at = other[:1]
                raise InputError(
                    f"{what}: uid {uid_format.to_hex(hi[at], lo[at])[0]} has {value[at[0] - 1]:g} "
                    f"and {value[at[0]]:g} in column {column}: keep one row a uid"
                )
        stays = np.ones(hi.size, np.bool_)
        stays[again] = False
        named: dict[str, npt.NDArray[Any]] = {
            "hi": hi,
            "lo": lo,
            **{f"v{n}": value for n, value in enumerate(values)},
        }
        for part, array in named.items():
            write_array(folder, f"{name}-{number:05d}.{part}.npy", array[stays])
        total += int(stays.sum())
    return total


def publish(folder: Folder, name: str, *, buckets: int, columns: Sequence[str], rows: int) -> None:
    """Note what the buckets hold, when all are there."""
    folder.publish_json(
        f"{name}.json",
        {"buckets": buckets, "columns": list(columns), "rows": rows, "made": uuid.uuid4().hex},
    )


def read(folder: Folder, name: str) -> Joined:
    """A table that was published."""
    record = folder.read_json(f"{name}.json")
    if record is None:
        raise InputError(f"{folder.where(name)} is gone: run the same command again")
    return Joined(folder=folder, name=name, **{**record, "columns": tuple(record["columns"])})
