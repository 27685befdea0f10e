"""graph/part-00000.parquet: kNN lists, one row a sample, ascending by uid in a part (DESIGN §6).

A *graph id* is the row number over all parts in name order; `neighbors` holds graph ids, −1 pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import uids
from d2filter.errors import InputError
from d2filter.formats import tables
from d2filter.formats.paths import Folder

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


def publish_part(folder: Folder, number: int, part: GraphPart) -> None:
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
    with folder.publish(part_name(number)) as path:
        pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)


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


def read_part(folder: Folder, name: str) -> GraphPart:
    """Read the part file `name`."""
    table = tables.read_table(folder, name)
    return GraphPart(
        hi=table.column("uid_hi").to_numpy(),
        lo=table.column("uid_lo").to_numpy(),
        difficulty=table.column("difficulty").to_numpy(),
        neighbors=_lists(table.column("neighbors")),
        sqdist=_lists(table.column("sqdist")),
    )


def read(folder: Folder) -> GraphPart:
    """All parts, one after the other. Raises InputError when there is none."""
    return concatenate(folder, [read_part(folder, name) for name in folder.names(".parquet")])


def concatenate(folder: Folder, parts: Sequence[GraphPart]) -> GraphPart:
    """The rows of all parts in order; rows are then graph ids. Raises InputError for no parts."""
    if not parts:
        raise InputError(f"{folder.url} holds no parts: `d2filter graph --overwrite graph`")
    if len(parts) == 1:
        return parts[0]
    return GraphPart(
        hi=np.concatenate([p.hi for p in parts]),
        lo=np.concatenate([p.lo for p in parts]),
        difficulty=np.concatenate([p.difficulty for p in parts]),
        neighbors=np.concatenate([p.neighbors for p in parts]),
        sqdist=np.concatenate([p.sqdist for p in parts]),
    )


def _lists(column: Any) -> npt.NDArray[Any]:
    """A fixed_size_list column as a 2-d array."""
    k = column.type.list_size
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    joined = np.concatenate(flat) if flat else np.empty(0)
    return joined.reshape(-1, k)
