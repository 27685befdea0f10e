"""Reads kept/ of a run directory: shard, key and uid of the samples that were kept.

Shards may contain a uid several times: copies, and damaged versions of a good sample. A run ranks
one of them. Code that copies, streams or shows samples finds here which one it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from d2filter.algorithm import uids
from d2filter.errors import InputError
from d2filter.formats import subset as subset_format
from d2filter.formats import tables
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.rows import mapped
from d2filter.formats.runstate import RunState
from d2filter.formats.shardnames import ShardNames

FOLDER = "kept"
_COLUMNS = ("shard", "key", "uid")
_READERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSamples:
    """Kept samples, in some order."""

    key: Any
    """(n,) arrow large_string array"""
    hi: uids.U64
    lo: uids.U64

    def by_key(self) -> dict[str, bytes]:
        """The uid of each key, as 32 hex digits; those of a key that comes again in one string."""
        text = b"".join(bytes(digits, "ascii") for digits in uid_format.to_hex(self.hi, self.lo))
        found: dict[str, bytes] = {}
        for number, key in enumerate(self.key.to_pylist()):
            own = text[32 * number : 32 * number + 32]
            found[key] = found[key] + own if key in found else own
        return found


@dataclass(frozen=True)
class Kept:
    """All of kept/, by shard."""

    names: list[str]
    """shards as the run has them, ascending"""
    counts: list[int]
    """(shards,): kept samples of each"""
    bounds: list[int]
    """(shards + 1,): rows of shard i are bounds[i] to bounds[i + 1]"""
    rows: KeptSamples
    loose: npt.NDArray[np.uint64]
    """(m, 2) hi and lo, ascending: kept samples whose shard or key is not in the run's metadata"""
    embedded: bool
    """whether the run made the uids itself, from the shards; else they came with the metadata, and
    a sample without a uid in its json is known by shard and key alone"""
    empty: dict[str, int] = field(default_factory=dict)
    """shards, by name or address, of which nothing was kept"""

    @cached_property
    def find(self) -> Any:
        """`ShardNames.find`: URL → number of the shard."""
        return ShardNames(self.names).find

    def mapped(self) -> Kept:
        """The same with its rows in files in TMPDIR: forked processes share their pages."""
        key, n = self.rows.key, len(self.rows.key)
        if n:
            offsets, text = (np.frombuffer(b or bytearray(), np.uint8) for b in key.buffers()[1:])
            own = (pa.py_buffer(mapped(array)) for array in (offsets, text))
            key = pa.LargeStringArray.from_buffers(n, *own)
        hi, lo = (mapped(half).view(np.ndarray) for half in (self.rows.hi, self.rows.lo))
        return replace(self, rows=KeptSamples(key=key, hi=hi, lo=lo))

    def digest(self) -> str:
        """Equal for the same samples."""
        held = hashlib.blake2b(digest_size=16)
        held.update(repr((self.names, self.bounds, self.embedded)).encode())
        for buffer in self.rows.key.buffers()[1:]:
            held.update(buffer or b"")
        for array in (self.rows.hi, self.rows.lo, self.loose):
            held.update(np.ascontiguousarray(array).data)
        return held.hexdigest()

    def of_shard(self, number: int) -> KeptSamples:
        """The kept samples of one shard."""
        begin, end = self.bounds[number], self.bounds[number + 1]
        return KeptSamples(
            key=self.rows.key.slice(begin, end - begin),
            hi=self.rows.hi[begin:end],
            lo=self.rows.lo[begin:end],
        )


def read(folder: Folder, subset: npt.NDArray[np.void]) -> Kept | None:
    """kept/ of a run directory; None where it has none, for the run knows of no shards.

    subset: that of the run, (n,) of (u8, u8), ascending. Memory: 25 bytes a sample and its key.
    Raises InputError when the two do not belong together.
    """
    home = folder.sub(FOLDER)
    names: list[str] = []
    counts: list[int] = []
    keys, found_hi, found_lo = [], [], []
    for name in home.names(".parquet"):
        with tables.open_table(home, name, encoded=("shard",)) as parquet:
            table = tables.read_checked(parquet, _COLUMNS)
            for shard, count in _runs(table.column("shard")):
                if names and names[-1] == shard:
                    counts[-1] += count
                else:
                    names.append(shard)
                    counts.append(count)
            keys.append(pa.concat_arrays(table.column("key").cast(pa.large_string()).chunks))
            hi, lo, valid = uid_format.parse(table.column("uid"))
            if not valid.all():
                raise ValueError("column uid holds a value that is not a uid")
        found_hi.append(hi)
        found_lo.append(lo)
    sizes: dict[str, int] | None = folder.read_json(f"{FOLDER}/sizes.json")
    if not keys and sizes is None:
        return None
    if len(set(names)) < len(names):
        raise InputError(f"{home.url} is not sorted by shard: run `d2filter select` again")
    key = pa.concat_arrays([pa.array([], pa.large_string()), *keys])
    known = key.is_valid().to_numpy(zero_copy_only=False)
    number = np.repeat(np.arange(len(names)), np.array(counts, np.int64))[known]
    rows = KeptSamples(
        key=key.filter(pa.array(known)),
        hi=np.concatenate([np.empty(0, np.uint64), *found_hi])[known],
        lo=np.concatenate([np.empty(0, np.uint64), *found_lo])[known],
    )
    catalog = RunState(folder).done("catalog")
    return Kept(
        names=names,
        counts=counts,
        bounds=np.searchsorted(number, np.arange(len(names) + 1)).tolist(),
        rows=rows,
        loose=_loose(folder, subset, rows),
        embedded=bool(catalog is not None and catalog["upstream"]),
        empty={name: count for name, count in (sizes or {}).items() if not count},
    )


def places(folder: Folder, hi: uids.U64, lo: uids.U64) -> dict[str, tuple[str, str]]:
    """Shard and key of some ranked samples, kept or not, by uid, where the catalog knows them.

    Reads the row groups of the catalog that may hold them.
    """
    home = folder.sub("catalog")

    def of_part(name: str) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        with tables.open_table(home, name) as parquet:
            for number in range(parquet.num_row_groups):
                bounds = parquet.metadata.row_group(number).column(0).statistics
                if bounds is None or not ((hi >= bounds.min) & (hi <= bounds.max)).any():
                    continue
                table = parquet.read_row_group(number, columns=["uid_hi", "uid_lo", "shard", "key"])
                rows = uids.positions(
                    table.column("uid_hi").to_numpy(), table.column("uid_lo").to_numpy(), hi, lo
                )
                chosen: Any = table.take(rows[rows >= 0]).to_pydict()
                ids = uid_format.to_hex(hi[rows >= 0], lo[rows >= 0])
                for uid, shard, key in zip(ids, chosen["shard"], chosen["key"], strict=True):
                    if shard is not None and key is not None:
                        found[uid] = (shard, key)
        return found

    # an object store answers one request as fast as many
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(of_part, home.names(".parquet")))
    return {uid: place for part in parts for uid, place in part.items()}


def _runs(shards: Any) -> Iterator[tuple[str, int]]:
    """Each shard of a sorted column, and how often it stands there."""
    for chunk in shards.chunks:
        coded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        indices = coded.indices.to_numpy(zero_copy_only=False)
        begins = np.flatnonzero(np.append(True, indices[1:] != indices[:-1]))[: indices.size]
        names = coded.dictionary.take(pa.array(indices[begins])).to_pylist()
        yield from zip(names, np.diff(np.append(begins, indices.size)).tolist(), strict=True)


def _loose(
    folder: Folder, subset: npt.NDArray[np.void], rows: KeptSamples
) -> npt.NDArray[np.uint64]:
    """The uids of a subset that no row has."""
    pairs = subset_format.pairs(subset)
    own = np.stack([rows.hi, rows.lo], axis=1)
    if len(own) == len(pairs) and _sum(own) == _sum(pairs):
        return np.empty((0, 2), np.uint64)
    order = uids.ascending(rows.hi, rows.lo)
    at = uids.positions(rows.hi[order], rows.lo[order], pairs[:, 0], pairs[:, 1])
    loose: npt.NDArray[np.uint64] = pairs[at < 0]
    if len(own) + len(loose) != len(pairs):
        raise InputError(
            f"{folder.where(FOLDER)} and {folder.where(subset_format.SUBSET)} list different "
            "samples: write both with `d2filter select`, or give the .npy file to match by "
            "uid alone"
        )
    return loose


def _sum(pairs: npt.NDArray[np.uint64]) -> list[int]:
    """Equal for the same pairs in any order, and hardly for others."""
    mixed = uids.hashed(pairs[:, 0], pairs[:, 1], salt=uids.SALT_REPORT)
    return [int(mixed.sum(dtype=np.uint64)), int(np.bitwise_xor.reduce(mixed, initial=0))]
