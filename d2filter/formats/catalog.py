"""The catalog: valid, distinct samples in ascending order of uid, with their features.

catalog/part-00000.parquet   uid_hi u64, uid_lo u64, difficulty f32; shard, key, group str?
catalog/part-00000.npy       (rows, d) float16, the same rows
catalog/runs/                sorted runs of the first pass, removed when the parts are written

Each part holds a range of uids. The rows of all parts in name order ascend by uid, for any number
of parts and any split of the metadata.

See docs/files.md#catalog.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2filter.algorithm import uids
from d2filter.errors import InputError
from d2filter.formats import tables
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Checksums, Folder
from d2filter.formats.rows import PartedArray, read_array
from d2filter.text import redacted

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]

ROW_GROUP = 4096
_TERM = "term-"  # columns of a run
_MARKS = 16  # of a run, at least: parts come out even although runs are short

_SCHEMA = pa.schema(
    [
        ("uid_hi", pa.uint64()),
        ("uid_lo", pa.uint64()),
        ("difficulty", pa.float32()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("group", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Some rows of a catalog, or of a run of its first pass."""

    hi: uids.U64
    lo: uids.U64
    difficulty: F32
    features: F16
    shard: Any
    """arrow string array"""
    key: Any
    group: Any
    """arrow string array: the class, null where there are none"""
    terms: F32 | None = None
    """(n, terms) of a score that waits for the pool; only until it is there"""

    def take(self, rows: npt.NDArray[np.int64]) -> Samples:
        """The given rows, in that order."""
        index = pa.array(rows)
        return Samples(
            hi=self.hi[rows],
            lo=self.lo[rows],
            difficulty=self.difficulty[rows],
            features=self.features[rows],
            shard=self.shard.take(index),
            key=self.key.take(index),
            group=self.group.take(index),
            terms=None if self.terms is None else self.terms[rows],
        )


def concatenate(parts: list[Samples]) -> Samples:
    """All rows of `parts` (at least one), in order."""
    return Samples(
        hi=np.concatenate([p.hi for p in parts]),
        lo=np.concatenate([p.lo for p in parts]),
        difficulty=np.concatenate([p.difficulty for p in parts]),
        features=np.concatenate([p.features for p in parts]),
        shard=pa.concat_arrays([p.shard for p in parts]),
        key=pa.concat_arrays([p.key for p in parts]),
        group=pa.concat_arrays([p.group for p in parts]),
        terms=_all_terms([p.terms for p in parts if p.terms is not None]),
    )


def _all_terms(parts: list[F32]) -> F32 | None:
    return np.concatenate(parts) if parts else None


def publish_run(folder: Folder, name: str, samples: Samples) -> list[str]:
    """Write rows sorted by uid, in small row groups; features lie in a binary column.

    Returns evenly spaced uids, from which the ranges of the parts are chosen.
    """
    ordered = samples.take(uids.ascending(samples.hi, samples.lo))
    width = samples.features.shape[1]
    packed = np.ascontiguousarray(ordered.features)
    binary = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * width), len(packed), [None, pa.py_buffer(packed)]
    )
    table = _table(ordered).append_column(pa.field("features", pa.binary(2 * width)), binary)
    if ordered.terms is not None:
        for number, values in enumerate(ordered.terms.T):
            table = table.append_column(f"{_TERM}{number}", pa.array(values))
    with folder.publish(f"runs/{name}.parquet") as path:
        pq.write_table(
            table, path, compression="none", use_dictionary=False, row_group_size=ROW_GROUP
        )
    step = max(1, min(ROW_GROUP, len(packed) // _MARKS))
    return uid_format.to_hex(ordered.hi[::step], ordered.lo[::step])


def read_range(folder: Folder, name: str, low: str, high: str) -> Samples:
    """The rows of a run with low ≤ uid < high, as hex digits; an empty `high` is no bound."""
    low_hi, low_lo = uid_format.from_hex(low)
    high_hi, high_lo = uid_format.from_hex(high) if high else (0, 0)
    with tables.open_table(folder, f"runs/{name}.parquet") as parquet:
        width = parquet.schema_arrow.field("features").type.byte_width // 2
        groups = []
        for number in range(parquet.num_row_groups):
            statistics = parquet.metadata.row_group(number).column(0).statistics
            if statistics.max >= low_hi and (not high or statistics.min <= high_hi):
                groups.append(number)
        table = parquet.read_row_groups(groups)
    raw = b"".join(
        c.buffers()[1].slice(c.offset * 2 * width, len(c) * 2 * width)
        for c in table.column("features").chunks
    )
    found = _samples(table, np.frombuffer(raw, np.float16).reshape(table.num_rows, width))
    inside = _at_least(found, low_hi, low_lo)
    if high:
        inside &= ~_at_least(found, high_hi, high_lo)
    return found.take(np.flatnonzero(inside))


def _at_least(samples: Samples, hi: int, lo: int) -> npt.NDArray[np.bool_]:
    same = samples.hi == np.uint64(hi)
    out: npt.NDArray[np.bool_] = (samples.hi > np.uint64(hi)) | (
        same & (samples.lo >= np.uint64(lo))
    )
    return out


def publish_part(folder: Folder, number: int, samples: Samples) -> Checksums:
    """Write one part; features first, for the parquet file is what readers look for."""
    sums: Checksums = {}
    with folder.publish(f"part-{number:05d}.npy", sums) as path, path.open("wb") as stream:
        np.save(stream, np.ascontiguousarray(samples.features))
    return {**sums, **publish_table(folder, number, samples)}


def publish_table(folder: Folder, number: int, samples: Samples) -> Checksums:
    """Write one part again but for its features, which stay as they are."""
    sums: Checksums = {}
    with folder.publish(f"part-{number:05d}.parquet", sums) as path:
        pq.write_table(_table(samples), path, compression="zstd")
    return sums


def read_part(folder: Folder, number: int) -> Samples:
    """One part; local features are a memory map."""
    table = tables.read_table(folder, f"part-{number:05d}.parquet")
    return _samples(table, read_array(folder, f"part-{number:05d}.npy"))


def iter_parts(folder: Folder, *, with_features: bool = True) -> Iterator[Samples]:
    """The parts in order of uid. Local features are memory maps. Raises InputError for none."""
    names = folder.names(".parquet")
    if not names:
        raise InputError(f"{folder.url} holds no catalog parts: `d2filter graph` makes them")
    for name in names:
        table = tables.read_table(folder, name)
        wide = np.empty((table.num_rows, 0), np.float16)
        if with_features:
            wide = read_array(folder, name.removesuffix(".parquet") + ".npy")
        yield _samples(table, wide)


def layout(folder: Folder) -> PartedArray:
    """Where the features of each sample lie. Raises InputError when there are no parts."""
    names = folder.names(".parquet")
    if not names:
        raise InputError(f"{folder.url} holds no catalog parts: `d2filter graph` makes them")
    starts = [0]
    for name in names:
        with tables.open_table(folder, name) as parquet:
            starts.append(starts[-1] + parquet.metadata.num_rows)
    return PartedArray(folder=folder, name="part", starts=tuple(starts))


def read_ids(folder: Folder, number: int) -> tuple[uids.U64, uids.U64, F32]:
    """uid_hi, uid_lo and difficulty of one part."""
    columns = ["uid_hi", "uid_lo", "difficulty"]
    table = tables.read_table(folder, f"part-{number:05d}.parquet", columns)
    hi, lo, difficulty = (table.column(name).to_numpy() for name in columns)
    return hi, lo, difficulty


def read_groups(folder: Folder, number: int) -> Any:
    """Classes of the samples of one part, an arrow string array."""
    return tables.read_table(folder, f"part-{number:05d}.parquet", ["group"]).column(0)


def _table(samples: Samples) -> Any:
    return pa.table(
        {
            "uid_hi": samples.hi,
            "uid_lo": samples.lo,
            "difficulty": samples.difficulty,
            "shard": _addresses(samples.shard),
            "key": samples.key,
            "group": samples.group,
        },
        schema=_SCHEMA,
    )


def _addresses(shards: Any) -> Any:
    """Shards as they are recorded: metadata of other tools may hold logins and signatures."""
    if not pc.any(pc.match_substring_regex(shards, "://.*[@?#]")).as_py():
        return shards
    coded = shards.dictionary_encode()
    known = [redacted(url) for url in coded.dictionary.to_pylist()]
    return pa.array(known, pa.string()).take(coded.indices)


def _samples(table: Any, wide: F16) -> Samples:
    return Samples(
        hi=table.column("uid_hi").to_numpy(),
        lo=table.column("uid_lo").to_numpy(),
        difficulty=table.column("difficulty").to_numpy(),
        features=wide,
        shard=table.column("shard").combine_chunks(),
        key=table.column("key").combine_chunks(),
        group=table.column("group").combine_chunks(),
        terms=_terms(table),
    )


def _terms(table: Any) -> F32 | None:
    columns = [table.column(n).to_numpy() for n in table.column_names if n.startswith(_TERM)]
    return np.stack(columns, axis=1) if columns else None
