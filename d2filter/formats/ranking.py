"""ranking/part-00000.parquet: the ranking, with the same rows as the part of the graph.

See docs/files.md#ranking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import uids
from d2filter.errors import InputError
from d2filter.formats import tables
from d2filter.formats.graph import ROW_GROUP
from d2filter.formats.paths import Checksums, Folder

I64 = npt.NDArray[np.int64]

COLUMNS = ("uid_hi", "uid_lo", "difficulty", "forward", "final", "rank", "suppressed_by")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingPart:
    """n rows of a ranking; `forward` and `final` in units of 2⁻⁴⁰, rank 0 = first."""

    uid_hi: uids.U64
    uid_lo: uids.U64
    difficulty: npt.NDArray[np.float32]
    forward: I64
    final: I64
    rank: I64
    suppressed_by: I64
    """graph id of the strongest suppressor, −1 none"""


def publish_part(folder: Folder, number: int, part: RankingPart) -> Checksums:
    """Write one part."""
    table = pa.table({name: getattr(part, name) for name in COLUMNS})
    sums: Checksums = {}
    with folder.publish(f"part-{number:05d}.parquet", sums) as path:
        pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)
    return sums


def iter_columns(
    folder: Folder, columns: Sequence[str] = COLUMNS
) -> Iterator[dict[str, npt.NDArray[np.generic]]]:
    """The named columns of each part, in name order. Raises InputError when there is no part."""
    names = folder.names(".parquet")
    if not names:
        raise InputError(f"{folder.url} holds no parts: `d2filter rank --overwrite rank`")
    for name in names:
        table = tables.read_table(folder, name, columns)
        yield {column: table.column(column).to_numpy() for column in columns}
