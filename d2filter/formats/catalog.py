"""The catalog: valid, distinct samples in ascending order of uid, with their fixed features.

catalog/part-00000.parquet   uid_hi u64, uid_lo u64, difficulty f32, shard str?, key str?
catalog/part-00000.npy       (rows, d) float16, row-aligned
catalog/runs/                sorted runs of the first pass, removed when the parts are there

Part b holds the b-th of equal ranges of uid_hi, so the rows of all parts in name order ascend by
uid whatever the number of parts and however the metadata was split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import uids
from d2filter.errors import InputError
from d2filter.formats.paths import Folder

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]

_SCHEMA = pa.schema(
    [
        ("uid_hi", pa.uint64()),
        ("uid_lo", pa.uint64()),
        ("difficulty", pa.float32()),
        ("shard", pa.string()),
        ("key", pa.string()),
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
    )


def range_of(hi: uids.U64, ranges: int) -> npt.NDArray[np.int64]:
    """Which of `ranges` equal parts of [0, 2⁶⁴) each uid_hi falls in; monotone in hi."""
    # 2⁶⁴ has no uint64; the top 32 bits are fine enough for every sensible number of ranges
    return np.asarray((hi >> np.uint64(32)) * np.uint64(ranges) >> np.uint64(32), np.int64)


def publish_run(folder: Folder, name: str, samples: Samples, ranges: int) -> None:
    """Write rows, sorted by range, as one row group a range; features lie in a binary column."""
    where = range_of(samples.hi, ranges)
    order = np.argsort(where, kind="stable").astype(np.int64, copy=False)
    bound = np.searchsorted(where[order], np.arange(ranges + 1))
    width = samples.features.shape[1]
    schema = _SCHEMA.append(pa.field("features", pa.binary(2 * width)))
    ordered = samples.take(order)
    packed = np.ascontiguousarray(ordered.features)
    binary = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * width), len(packed), [None, pa.py_buffer(packed)]
    )
    table = _table(ordered).append_column(schema.field("features"), binary)
    with (
        folder.publish(f"runs/{name}.parquet") as path,
        pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer,
    ):
        for r in range(ranges):
            part = table.slice(int(bound[r]), int(bound[r + 1] - bound[r]))
            # a range without rows is a row group too: its number is the range's
            writer.write_table(part, row_group_size=max(1, part.num_rows))


def read_range(folder: Folder, name: str, number: int) -> Samples:
    """The rows of one range of a run."""
    with folder.reading(f"runs/{name}.parquet") as stream:
        parquet = pq.ParquetFile(stream)
        table = parquet.read_row_group(number).combine_chunks()
        width = parquet.schema_arrow.field("features").type.byte_width // 2
    column = table.column("features")
    raw = b"".join(c.buffers()[1].slice(c.offset * 2 * width, len(c) * 2 * width)
                   for c in column.chunks)  # fmt: skip
    wide = np.frombuffer(raw, np.float16).reshape(table.num_rows, width)
    return _samples(table, wide)


def publish_part(folder: Folder, number: int, samples: Samples) -> None:
    """Write one part; features first, for the parquet file is what readers look for."""
    with folder.publish(f"part-{number:05d}.npy") as path, path.open("wb") as stream:
        np.save(stream, np.ascontiguousarray(samples.features))
    with folder.publish(f"part-{number:05d}.parquet") as path:
        pq.write_table(_table(samples), path, compression="zstd")


def iter_parts(folder: Folder, *, with_features: bool = True) -> Iterator[Samples]:
    """The parts in order of uid. Local features are memory maps. Raises InputError for none."""
    names = folder.names(".parquet")
    if not names:
        raise InputError(f"{folder.url} holds no catalog parts: run `d2filter graph` first")
    for name in names:
        with folder.reading(name) as stream:
            table = pq.read_table(stream)
        wide = np.empty((table.num_rows, 0), np.float16)
        if with_features:
            wide = read_features(folder, name.removesuffix(".parquet") + ".npy")
        yield _samples(table, wide)


def read_features(folder: Folder, name: str) -> F16:
    """(rows, d) float16; a memory map on a local disk."""
    local = folder.local
    if local is not None:
        mapped: F16 = np.load(local / name, mmap_mode="r", allow_pickle=False)
        return mapped
    with folder.reading(name) as stream:
        loaded: F16 = np.load(stream, allow_pickle=False)
    return loaded


def _table(samples: Samples) -> Any:
    return pa.table(
        {
            "uid_hi": samples.hi,
            "uid_lo": samples.lo,
            "difficulty": samples.difficulty,
            "shard": samples.shard,
            "key": samples.key,
        },
        schema=_SCHEMA,
    )


def _samples(table: Any, wide: F16) -> Samples:
    return Samples(
        hi=table.column("uid_hi").to_numpy(),
        lo=table.column("uid_lo").to_numpy(),
        difficulty=table.column("difficulty").to_numpy(),
        features=wide,
        shard=table.column("shard").combine_chunks(),
        key=table.column("key").combine_chunks(),
    )
