"""subset.npy, which DataComp's resharder takes, and kept/, the filtered shard lists (DESIGN §6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import uids
from d2filter.errors import InputError
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder

SUBSET = "subset.npy"
DTYPE = np.dtype("u8,u8")
_KEPT_ROWS = 1_000_000


def publish(folder: Folder, hi: uids.U64, lo: uids.U64) -> None:
    """Write subset.npy: (n,) of (u8, u8), ascending. hi, lo: (n,) in any order, no repeats."""
    order = uids.ascending(hi, lo)
    subset = np.empty(len(hi), DTYPE)
    subset["f0"] = hi[order]
    subset["f1"] = lo[order]
    with folder.publish(SUBSET) as path, path.open("wb") as stream:
        np.save(stream, subset)


def read(folder: Folder, name: str = SUBSET) -> npt.NDArray[np.void]:
    """A subset file as an (n,) array of (u8, u8). Raises InputError when it is none."""
    with folder.reading(name) as stream:
        try:
            subset = np.load(stream, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"{folder.where(name)} is no readable .npy file: {error}") from error
    if subset.dtype != DTYPE or subset.ndim != 1:
        raise InputError(
            f"{folder.where(name)} has dtype {subset.dtype} and shape {subset.shape}, "
            "needed is a one-dimensional array of (u8, u8)"
        )
    out: npt.NDArray[np.void] = subset
    return out


def publish_kept(
    folder: Folder,
    shard: Sequence[str],
    key: Sequence[str],
    hi: uids.U64,
    lo: uids.U64,
    rank: npt.NDArray[np.int64],
) -> None:
    """Write kept/: what to keep of each shard, in the order of the shards, and sizes.json."""
    table = pa.table(
        {
            "shard": pa.array(shard, pa.string()),
            "key": pa.array(key, pa.string()),
            "uid": pa.array(uid_format.to_hex(hi, lo), pa.string()),
            "rank": pa.array(rank, pa.int64()),
        }
    ).sort_by([("shard", "ascending"), ("key", "ascending"), ("uid", "ascending")])
    counted: Any = table.group_by("shard").aggregate([([], "count_all")]).to_pydict()
    sizes = sorted(zip(counted["shard"], counted["count_all"], strict=True))
    names = [PurePosixPath(name).name for name, _ in sizes]
    # shards of one base name in different folders keep their whole address
    keys = names if len(set(names)) == len(names) else [name for name, _ in sizes]
    for number, start in enumerate(range(0, max(1, table.num_rows), _KEPT_ROWS)):
        with folder.publish(f"kept/part-{number:05d}.parquet") as path:
            pq.write_table(table.slice(start, _KEPT_ROWS), path, compression="zstd")
    counts = {k: int(count) for k, (_, count) in zip(keys, sizes, strict=True)}
    folder.publish_json("kept/sizes.json", counts)
