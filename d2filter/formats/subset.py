"""subset.npy, which DataComp's resharder reads, and kept/, the kept samples of each shard.

See docs/files.md#subset-and-kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import uids
from d2filter.errors import InputError
from d2filter.formats import catalog, tables
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Checksums, Folder
from d2filter.formats.rows import read_range

SUBSET = "subset.npy"
SIZES = "kept/sizes.json"
DTYPE = np.dtype("u8,u8")
_KEPT_ROWS = 1_000_000
_BLOCK_ROWS = 1 << 20


def named(method: str, arch: str, fraction: Decimal) -> str:
    """File of one of several subsets, as DataComp's users name them: d2_l14_30_percent.npy."""
    percent = f"{(100 * fraction).normalize():f}"
    return f"subsets/{method}_{arch}_{percent}_percent.npy"


def publish(folder: Folder, hi: uids.U64, lo: uids.U64, name: str = SUBSET) -> Checksums:
    """Write a subset: (n,) of (u8, u8), ascending. hi, lo: (n,) in any order; repeats stay."""
    order = uids.ascending(hi, lo)
    subset = np.empty(len(hi), DTYPE)
    subset["f0"] = hi[order]
    subset["f1"] = lo[order]
    sums: Checksums = {}
    with folder.publish(name, sums) as path, path.open("wb") as stream:
        np.save(stream, subset)
    return sums


def read(folder: Folder, name: str = SUBSET) -> npt.NDArray[np.void]:
    """A subset file as an (n,) array of (u8, u8). Raises InputError when it is none."""
    with folder.reading(name) as stream:
        try:
            subset = np.load(stream, allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError, OverflowError) as error:
            raise InputError(
                f"{folder.where(name)} is not a readable .npy file: {tables.first_line(error)}"
            ) from error
    if not isinstance(subset, np.ndarray):
        raise InputError(f"{folder.where(name)} holds several arrays (.npz): give one .npy file")
    _require(folder, name, subset)
    out: npt.NDArray[np.void] = subset
    return out


def _require(folder: Folder, name: str, subset: npt.NDArray[Any]) -> None:
    if subset.dtype != DTYPE or subset.ndim != 1:
        raise InputError(
            f"{folder.where(name)} has dtype {subset.dtype} and shape {subset.shape}, "
            "expected a one-dimensional array of (u8, u8)"
        )


def blocks(folder: Folder, name: str) -> Iterator[tuple[uids.U64, uids.U64]]:
    """hi and lo of a subset file, some rows at a time. Raises InputError when it is none."""
    begin = 0
    while True:
        some = read_range(folder, name, slice(begin, begin + _BLOCK_ROWS))
        _require(folder, name, some)
        yield some["f0"], some["f1"]
        begin += len(some)
        if len(some) < _BLOCK_ROWS:
            return


def count_rows(folder: Folder, name: str) -> int:
    """Rows of a subset file at most, from its size."""
    info = folder.info(name)
    if info is None:
        raise InputError(f"{folder.where(name)} does not exist: a subset is a .npy of (u8, u8)")
    return info.size // DTYPE.itemsize


def pairs(subset: npt.NDArray[np.void]) -> uids.U64:
    """The same as (n, 2) uint64: hi and lo."""
    found: uids.U64 = np.ascontiguousarray(subset).view(np.uint64).reshape(-1, 2)
    return found


def kept_table(
    samples: Iterable[catalog.Samples],
    hi: uids.U64,
    lo: uids.U64,
    rank: npt.NDArray[np.int64],
    shards: set[str] | None = None,
) -> Any:
    """shard, key, uid, rank of the kept samples whose shard is known, by shard and key.

    samples: the parts of a catalog. hi, lo: (n,) kept uids, ascending, repeated for repeated
    samples; rank: (n,) their ranks. shards: all shards of the catalog are added to it, also those
    of which nothing is kept.
    """
    parts = []
    start = 0
    for part in samples:
        if shards is not None:
            shards.update(part.shard.drop_null().unique().to_pylist())
        # both ascend by uid: the kept ones of this part are a run of the kept list
        end = start + _count_up_to(hi[start:], lo[start:], part.hi, part.lo)
        known = np.append(part.shard.is_valid().to_numpy(zero_copy_only=False), False)
        where = uids.positions(part.hi, part.lo, hi[start:end], lo[start:end])
        mask = known[where]  # −1, not in the catalog, is the False at the end
        chosen = start + np.flatnonzero(mask)
        parts.append(
            pa.table(
                {
                    "shard": part.shard.take(where[mask]),
                    "key": part.key.take(where[mask]),
                    "uid": pa.array(uid_format.to_hex(hi[chosen], lo[chosen]), pa.string()),
                    "rank": pa.array(rank[chosen], pa.int64()),
                }
            )
        )
        start = end
    return pa.concat_tables(parts).sort_by([(c, "ascending") for c in ("shard", "key", "uid")])


def publish_kept(folder: Folder, table: Any, shards: Iterable[str] = ()) -> Checksums:
    """Write kept/: the kept samples of each shard, and sizes.json; nothing if no shard is known.

    shards: further shards that the run has ranked; sizes.json lists them with 0.
    """
    sums: Checksums = {}
    counted: Any = table.group_by("shard").aggregate([([], "count_all")]).to_pydict()
    known = dict.fromkeys(shards, 0) | dict(
        zip(counted["shard"], counted["count_all"], strict=True)
    )
    sizes = sorted(known.items())
    if not sizes:
        return sums
    names = [PurePosixPath(name).name for name, _ in sizes]
    # shards of one base name in different folders keep their whole address
    keys = names if len(set(names)) == len(names) else [name for name, _ in sizes]
    for number, start in enumerate(range(0, table.num_rows, _KEPT_ROWS)):
        with folder.publish(f"kept/part-{number:05d}.parquet", sums) as path:
            pq.write_table(table.slice(start, _KEPT_ROWS), path, compression="zstd")
    counts = {k: int(count) for k, (_, count) in zip(keys, sizes, strict=True)}
    with folder.publish(SIZES, sums) as path:
        path.write_text(json.dumps(counts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a selection keeps, (n,) each, ascending by uid; repeated samples come repeatedly."""

    hi: uids.U64
    lo: uids.U64
    rank: npt.NDArray[np.int64]


def _publish_lists(folder: Folder, kept: Kept) -> Checksums:
    samples = catalog.iter_parts(folder.sub("catalog"), with_features=False)
    shards: set[str] = set()
    table = kept_table(samples, kept.hi, kept.lo, kept.rank, shards)
    return publish_kept(folder, table, shards)


OUTPUTS: dict[str, Callable[[Folder, Kept], Checksums]] = {
    "kept": _publish_lists,
    SUBSET: lambda folder, kept: publish(folder, kept.hi, kept.lo),
}
"""writers of what a selection keeps, by the file or folder of the run directory that they write;
each returns the checksums of its files"""
FURTHER = "subsets"
"""folder of further budgets, a file each"""


def remove_others(folder: Folder, place: str, kept: Checksums) -> None:
    """Remove the files of a subfolder that are not among `kept`, and the subfolder if it is empty
    then.
    """
    names = folder.sub(place).names()
    others = [name for name in names if f"{place}/{name}" not in kept]
    for name in [place] if len(others) == len(names) else [f"{place}/{name}" for name in others]:
        folder.remove(name)


def _count_up_to(hi: uids.U64, lo: uids.U64, part_hi: uids.U64, part_lo: uids.U64) -> int:
    """How many of the ascending uids are at most the last of a part."""
    if not part_hi.size:
        return 0
    last_hi, last_lo = part_hi[-1], part_lo[-1]
    return int(np.count_nonzero((hi < last_hi) | ((hi == last_hi) & (lo <= last_lo))))
