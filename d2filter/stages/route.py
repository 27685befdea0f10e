"""Catalog parts → partitions: every row goes home, and as a query to where it must be compared.

index/cells.parquet            cell i32, partition i32, rows i64 (a cell cut in slices: several)
index/routed-00000.npy         (entries, d) float16, by catalog part: for every partition the rows
                               that are at home there, then those that visit, both by number
index/routed-00000.*.npy       beside it: number, home partition, probed; start (2·P + 1,)
index/ids-00000.npy            (rows,) int64, by catalog part: the graph id of each sample

Vectors travel as float16 on disk and never through an object store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import cells, features, partition
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.formats.rows import (
    Rows,
    read_array,
    read_columns,
    read_range,
    write_array,
    write_columns,
)
from d2filter.stages.index import CENTROIDS, assigned_rows, read_counts
from d2filter.stages.worker import Report

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_WRITE_ROWS = 16384
_OF_A_LAYOUT = ("routed-", "ids-", "found-", "lists-", "merged-", "refined-")


def lay_out(*, report: Report, out: Folder, parts: int, partitions: int) -> dict[str, Any]:
    """Task of the driver: cells → partitions. Removes what another layout has left."""
    index = out.sub("index")
    centroids = np.array(read_array(index, CENTROIDS))
    laid = partition.lay_out(centroids, read_counts(out, parts), partitions)
    for name in index.names():
        if name.startswith(_OF_A_LAYOUT):
            index.remove(name)
    out.remove("graph")
    write_array(index, "partition.npy", laid.partition)
    table = pa.table({"cell": laid.cell, "partition": laid.owner, "rows": laid.rows})
    with index.publish("cells.parquet") as path:
        pq.write_table(table, path)
    return {"sizes": laid.sizes().tolist(), "partitions": partitions}


def route(
    *, report: Report, out: Folder, part: int, parts: int, probes: int, k: int, partitions: int
) -> dict[str, Any]:
    """Task: send the rows of one catalog part on. Figures: entries, home rows by partition."""
    index = out.sub("index")
    layout = catalog.layout(out.sub("catalog"))
    counts = read_counts(out, parts)
    home_of = read_array(index, "partition.npy")
    table = read_layout(index)
    laid = partition.Layout(
        partition=home_of,
        cell=table["cell"],
        owner=table["partition"],
        rows=table["rows"],
        partitions=partitions,
    )
    assigned = np.array(assigned_rows(out, layout).part(part)[:, :probes])
    home = home_of[part][assigned[:, 0]]
    probed = cells.every_cell_where_short(assigned, counts.sum(axis=0), min(k, layout.total - 1))
    row, goal = partition.destinations(probed, home, *laid.owners_of(counts.shape[1]))
    group = 2 * goal.astype(np.int64) + (home[row] != goal)
    start, order = features.bucketed(group, 2 * partitions)
    row = row[order]
    _write_rows(index, f"routed-{part:05d}.npy", layout.part(part), row)
    write_columns(
        index,
        f"routed-{part:05d}",
        start=start,
        number=layout.starts[part] + row,
        home=home[row],
        probed=probed[row],
    )
    write_array(index, f"ids-{part:05d}.npy", _graph_ids(home, home_of, counts, part, laid))
    report(len(home))
    return {"entries": int(row.size)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Rows that came to a partition from one catalog part."""

    rows: F16
    number: I64
    home: I32
    probed: I32


def read_entries(out: Folder, part: int, number: int, *, visitors: bool) -> Entries:
    """What partition `number` got from catalog part `part`: its own rows, or those that visit."""
    index = out.sub("index")
    stem = f"routed-{part:05d}"
    some = _slice(index, stem, number, visitors=visitors)
    rows = read_range(index, f"{stem}.npy", some)
    return Entries(rows=rows, **read_columns(index, stem, "number", "home", "probed", rows=some))


def read_probed(out: Folder, part: int, number: int) -> I32:
    """The cells that the own rows of partition `number` from one catalog part probe."""
    index = out.sub("index")
    stem = f"routed-{part:05d}"
    some = _slice(index, stem, number, visitors=False)
    return read_columns(index, stem, "probed", rows=some)["probed"]


def read_homes(out: Folder, part: int, number: int) -> I32:
    """The home partitions of the rows of one catalog part that visit partition `number`."""
    index = out.sub("index")
    stem = f"routed-{part:05d}"
    some = _slice(index, stem, number, visitors=True)
    return read_columns(index, stem, "home", rows=some)["home"]


def count_entries(out: Folder, part: int, number: int, *, visitors: bool) -> int:
    """How many `read_entries` would return."""
    some = _slice(out.sub("index"), f"routed-{part:05d}", number, visitors=visitors)
    return int(some.stop - some.start)


def _slice(index: Folder, stem: str, number: int, *, visitors: bool) -> slice:
    start = read_array(index, f"{stem}.start.npy")
    group = 2 * number + visitors
    return slice(int(start[group]), int(start[group + 1]))


def graph_ids(out: Folder, layout: Rows) -> Rows:
    """The graph id of each sample."""
    return Rows(folder=out.sub("index"), name="ids", starts=layout.starts)


def read_layout(index: Folder) -> dict[str, npt.NDArray[Any]]:
    """cells.parquet as arrays."""
    from d2filter.formats import tables

    table = tables.read_table(index, "cells.parquet")
    return {name: np.array(table.column(name).to_numpy()) for name in table.column_names}


def _graph_ids(
    home: I32, home_of: npt.NDArray[Any], counts: I64, part: int, laid: partition.Layout
) -> I64:
    """Rows of a partition are numbered by uid; partitions follow one another."""
    first = np.cumsum(laid.sizes()) - laid.sizes()
    for before in range(part):
        first += np.bincount(
            home_of[before], weights=counts[before], minlength=laid.partitions
        ).astype(np.int64)
    start, order = features.bucketed(home, laid.partitions)
    ids = np.empty(home.size, np.int64)
    ids[order] = first[home[order]] + features.inside_runs(np.diff(start))
    return ids


def _write_rows(folder: Folder, name: str, rows: npt.NDArray[Any], which: I64) -> None:
    """Publish rows[which] block by block."""
    with folder.publish(name) as path, path.open("wb") as stream:
        shape = (which.size, rows.shape[1])
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for begin in range(0, which.size, _WRITE_ROWS):
            stream.write(rows[which[begin : begin + _WRITE_ROWS]].tobytes())
