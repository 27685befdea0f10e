"""Steps lay out and route of stage graph: sends each row to all partitions that must compare it.

Each row goes to its home partition, and as a visitor to every other partition that owns a cell that
it probes.

index/cells.parquet            cell i32, partition i32, rows i64 (several rows for a divided cell)
index/routed-00000.npy         (entries, d) float16, by catalog part: for each partition its home
                               rows, then its visitors, both by catalog row
index/routed-00000.*.npy       of these entries: catalog_row, home (partition), probed; start
                               (2·P + 1,)
index/ids-00000.npy            (rows,) int64, by catalog part: the graph id of each sample

Features travel as float16 files, not through Ray's object store.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import features
from d2filter.algorithm.knn import cells, partition
from d2filter.engine.task import Figures, Report
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.formats.rows import (
    PartedArray,
    read_array,
    read_columns,
    read_range,
    write_array,
    write_columns,
)
from d2filter.stages.graph.train import CENTROIDS, assigned_rows, read_counts

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_WRITE_ROWS = 16384
_OF_A_LAYOUT = ("routed-", "ids-", "found-", "lists-", "merged-", "refined-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """Figures of `lay_out`."""

    sizes: list[int]
    """rows of each partition"""
    partitions: int


def lay_out(*, report: Report, out: Folder, parts: int, partitions: int) -> Figures:
    """Task of the driver: cells → partitions. Removes the files of an earlier layout. Figures:
    `Laid`.
    """
    index = out.sub("index")
    centroids = np.array(read_array(index, CENTROIDS))
    counts = read_counts(out, parts)
    laid = partition.lay_out(centroids, counts, partitions)
    for name in index.names():
        if name.startswith(_OF_A_LAYOUT):
            index.remove(name)
    out.remove("graph")
    write_array(index, "partition.npy", laid.partition)
    write_array(index, "begin.npy", _begins(counts, laid))
    write_array(index, "sizes.npy", counts.sum(axis=0))
    table = pa.table({"cell": laid.cell, "partition": laid.owner, "rows": laid.rows})
    with index.publish("cells.parquet") as path:
        pq.write_table(table, path)
    return asdict(Laid(sizes=laid.sizes().tolist(), partitions=partitions))


def route(
    *, report: Report, out: Folder, part: int, parts: int, probes: int, k: int, partitions: int
) -> Figures:
    """Task: send the rows of one catalog part to partitions. Figures: entries."""
    index = out.sub("index")
    layout = catalog.layout(out.sub("catalog"))
    # of the tables by part only its own row: all of them have gigabytes in large pools
    mine = slice(part, part + 1)
    home_of, begin = (read_range(index, f"{n}.npy", mine) for n in ("partition", "begin"))
    sizes = read_range(index, "sizes.npy")
    table = read_layout(index)
    laid = partition.Layout(
        partition=home_of,
        cell=table["cell"],
        owner=table["partition"],
        rows=table["rows"],
        partitions=partitions,
    )
    assigned = np.array(assigned_rows(out, layout).part(part)[:, :probes])
    home = home_of[0][assigned[:, 0]]
    probed = cells.every_cell_where_short(assigned, sizes, min(k, layout.total - 1))
    row, goal = partition.destinations(probed, home, *laid.owners_of(sizes.size))
    group = 2 * goal.astype(np.int64) + (home[row] != goal)
    start, order = features.bucketed(group, 2 * partitions)
    row = row[order]
    _write_rows(index, f"routed-{part:05d}.npy", layout.part(part), row)
    write_columns(
        index,
        f"routed-{part:05d}",
        start=start,
        catalog_row=layout.starts[part] + row,
        home=home[row],
        probed=probed[row],
    )
    write_array(index, f"ids-{part:05d}.npy", _graph_ids(home, begin[0]))
    report(len(home))
    return {"entries": int(row.size)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Rows that came to a partition from one catalog part."""

    rows: F16
    catalog_row: I64
    home: I32
    probed: I32


def read_entries(out: Folder, part: int, partition: int, *, visitors: bool) -> Entries:
    """The rows that a partition got from a catalog part: its own, or its visitors."""
    index = out.sub("index")
    stem = f"routed-{part:05d}"
    some = _slice(index, stem, partition, visitors=visitors)
    rows = read_range(index, f"{stem}.npy", some)
    return Entries(
        rows=rows, **read_columns(index, stem, "catalog_row", "home", "probed", rows=some)
    )


def read_probed(out: Folder, part: int, partition: int) -> I32:
    """The cells that the own rows of a partition from one catalog part probe."""
    index = out.sub("index")
    stem = f"routed-{part:05d}"
    some = _slice(index, stem, partition, visitors=False)
    return read_columns(index, stem, "probed", rows=some)["probed"]


def read_homes(out: Folder, part: int, partition: int) -> I32:
    """The home partitions of the rows of one catalog part that visit a partition."""
    index = out.sub("index")
    stem = f"routed-{part:05d}"
    some = _slice(index, stem, partition, visitors=True)
    return read_columns(index, stem, "home", rows=some)["home"]


def count_entries(out: Folder, part: int, partition: int, *, visitors: bool) -> int:
    """How many `read_entries` would return."""
    some = _slice(out.sub("index"), f"routed-{part:05d}", partition, visitors=visitors)
    return int(some.stop - some.start)


def _slice(index: Folder, stem: str, partition: int, *, visitors: bool) -> slice:
    start = read_array(index, f"{stem}.start.npy")
    group = 2 * partition + visitors
    return slice(int(start[group]), int(start[group + 1]))


def graph_ids(out: Folder, layout: PartedArray) -> PartedArray:
    """The graph id of each sample."""
    return PartedArray(folder=out.sub("index"), name="ids", starts=layout.starts)


def read_layout(index: Folder) -> dict[str, npt.NDArray[Any]]:
    """cells.parquet as arrays."""
    from d2filter.formats import tables

    table = tables.read_table(index, "cells.parquet")
    return {name: np.array(table.column(name).to_numpy()) for name in table.column_names}


def _begins(counts: I64, laid: partition.Layout) -> I64:
    """Graph id of the first row that each catalog part has in each partition, (parts, partitions).

    Rows of a partition are numbered by uid, as parts follow each other; partitions follow too.
    """
    begin = np.cumsum(laid.sizes()) - laid.sizes()
    out = np.empty((len(counts), laid.partitions), np.int64)
    for part, own in enumerate(counts):
        out[part] = begin
        here = np.bincount(laid.partition[part], weights=own, minlength=laid.partitions)
        begin = begin + here.astype(np.int64)
    return out


def _graph_ids(home: I32, begin: I64) -> I64:
    """Graph ids of the rows of a catalog part. home: (n,) their partitions; begin: (partitions,)"""
    start, order = features.bucketed(home, begin.size)
    ids = np.empty(home.size, np.int64)
    ids[order] = begin[home[order]] + features.inside_runs(np.diff(start))
    return ids


def _write_rows(folder: Folder, name: str, rows: npt.NDArray[Any], which: I64) -> None:
    """Publish rows[which] block by block."""
    with folder.publish(name) as path, path.open("wb") as stream:
        shape = (which.size, rows.shape[1])
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for begin in range(0, which.size, _WRITE_ROWS):
            stream.write(rows[which[begin : begin + _WRITE_ROWS]].tobytes())
