"""graph/part-00000.parquet: the neighbor lists, one row per sample, ascending by uid in a part.

A *graph id* is the row number over all parts in name order. `neighbors` holds graph ids; −1 pads.

See docs/files.md#index-and-graph.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import uids
from d2filter.errors import InputError
from d2filter.formats import tables
from d2filter.formats.paths import Checksums, Folder

ROW_GROUP = 262144


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPart:
    """n rows of a graph."""

    hi: uids.U64
    lo: uids.U64
    difficulty: npt.NDArray[np.float32]
    neighbors: npt.NDArray[np.int64]
    """(n, k)"""
    sqdist: npt.NDArray[np.float32]
    """(n, k)"""
    group: npt.NDArray[np.int64] | None = None
    """(n,) number of the class, as in index/classes.json; None: there are none"""


def publish_part(folder: Folder, number: int, part: GraphPart) -> Checksums:
    """Write one part."""
    k = part.neighbors.shape[1]
    table = pa.table(
        {
            "uid_hi": part.hi,
            "uid_lo": part.lo,
            "difficulty": part.difficulty,
            "neighbors": pa.FixedSizeListArray.from_arrays(pa.array(part.neighbors.ravel()), k),
            "sqdist": pa.FixedSizeListArray.from_arrays(pa.array(part.sqdist.ravel()), k),
        }
    )
    if part.group is not None:
        table = table.append_column("group", pa.array(part.group))
    sums: Checksums = {}
    with folder.publish(part_name(number), sums) as path:
        pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)
    return sums


def part_name(number: int) -> str:
    """File of one part."""
    return f"part-{number:05d}.parquet"


def starts(folder: Folder) -> npt.NDArray[np.int64]:
    """First graph id of each part, and the number of all samples at the end, (parts + 1,).

    Raises InputError when there is no part.
    """
    names = folder.names(".parquet")
    if not names:
        raise InputError(f"{folder.url} holds no parts: `d2filter graph --overwrite graph`")
    rows = [tables.count_rows(folder, name) for name in names]
    return np.cumsum([0, *rows]).astype(np.int64)


def width(folder: Folder) -> int:
    """k, the length of the lists. Raises InputError when there is no part."""
    starts(folder)
    with tables.open_table(folder, part_name(0)) as parquet:
        k: int = parquet.schema_arrow.field("neighbors").type.list_size
    return k


def has_groups(folder: Folder) -> bool:
    """Whether the samples of a graph have classes."""
    with tables.open_table(folder, part_name(0)) as parquet:
        return "group" in parquet.schema_arrow.names


def read_groups(folder: Folder) -> npt.NDArray[np.int64] | None:
    """Classes of all samples by graph id, (n,) int64; None where they have none."""
    if not has_groups(folder):
        return None
    parts = range(len(starts(folder)) - 1)
    return np.concatenate([read_columns(folder, part, "group")["group"] for part in parts])


def read_columns(folder: Folder, number: int, *names: str) -> dict[str, npt.NDArray[Any]]:
    """Some columns of one part; (n, k) where they hold lists. One is read after the other: two
    copies of a part would be what a partition takes most memory for.
    """
    out = {}
    with tables.open_table(folder, part_name(number)) as parquet:
        for name in names:
            out[name] = tables.to_array(parquet.read(columns=[name]).column(name))
    return out


def read_part(folder: Folder, number: int, *, lists: bool = True) -> GraphPart:
    """Read one part; lists: or no neighbors, (n, 0). Raises InputError for a broken file."""
    names = ("neighbors", "sqdist") if lists else ()
    if has_groups(folder):
        names = (*names, "group")
    held = read_columns(folder, number, "uid_hi", "uid_lo", "difficulty", *names)
    n = len(held["uid_hi"])
    return GraphPart(
        hi=held["uid_hi"],
        lo=held["uid_lo"],
        difficulty=held["difficulty"],
        neighbors=held["neighbors"] if lists else np.empty((n, 0), np.int64),
        sqdist=held["sqdist"] if lists else np.empty((n, 0), np.float32),
        group=held.get("group"),
    )


def read(folder: Folder) -> GraphPart:
    """All parts, one after the other; rows are then graph ids. Raises InputError for no parts."""
    parts = [read_part(folder, number) for number in range(len(starts(folder)) - 1)]
    if len(parts) == 1:
        return parts[0]
    return GraphPart(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(GraphPart)
            if getattr(parts[0], field.name) is not None
        }
    )
