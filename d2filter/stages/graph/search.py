"""Steps find, merge, refine, finish, measure and judge of stage graph: partitions → graph/.

index/lists-00000.*       shortlists of a partition's own rows: catalog_row, list, near, exact
index/found-00000.*       shortlists that a partition found for visiting rows, sorted by their home
                          partition; start (P + 1,): each home reads one range of each file
index/merged-00000.*      lists after merging, in the home partition: catalog_row, list, sqdist
index/refined-00000.*     the same after the refinement pass
index/truth-00000.*       exact lists of the measured samples within one catalog part
graph/part-00000.parquet  the graph

Shortlists over the members of several partitions merge exactly to the shortlist over all members,
so the partitions cannot change the graph.

See docs/method.md#exact-search.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features
from d2filter.algorithm import sizes as memory_of
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.knn import products, refine, search, shortlist
from d2filter.algorithm.knn.exact_lists import Lists, merge_inplace
from d2filter.algorithm.knn.shortlist import Shortlists
from d2filter.engine.task import Figures, Report, assigned_cpus
from d2filter.formats import catalog, graph
from d2filter.formats.paths import Folder
from d2filter.formats.rows import PartedArray, read_array, read_columns, write_columns
from d2filter.stages.graph.route import (
    Entries,
    count_entries,
    graph_ids,
    read_entries,
    read_homes,
    read_probed,
)
from d2filter.stages.graph.train import MEASURE, assigned_rows, read_sketch

I64 = npt.NDArray[np.int64]

_REFINED_ROWS = 8192  # whose candidates are held at a time


def find(
    *,
    report: Report,
    out: Folder,
    partition: int,
    parts: int,
    partitions: int,
    nlist: int,
    width: int,
) -> Figures:
    """Task: search the cells of one partition for its own rows and for visiting rows.

    Memory: the partition's rows and sketches, the visitors from one catalog part, and shortlists.
    """
    products.use_threads(assigned_cpus())
    index = out.sub("index")
    layout = catalog.layout(out.sub("catalog"))
    sketch = read_sketch(out)
    places = sketch.places(width)
    own = _at_home(out, layout, partition, parts)
    sketches = sketch.apply(own.rows)
    homes = np.ascontiguousarray(assigned_rows(out, layout).gather(own.catalog_row)[:, 0])
    members = search.make_members(sketches, own.catalog_row, homes, nlist)

    def search_for(entries: Entries, short: Any, progress: search.Progress) -> Shortlists:
        return shortlist.find(
            members, own.rows, own.catalog_row, short, entries.rows, entries.catalog_row,
            entries.probed, places, layout.total, progress=progress,
        )  # fmt: skip

    write_short(index, f"lists-{partition:05d}", own.catalog_row, search_for(own, sketches, report))
    # (parts, P): what each part sends here from each home; where each piece goes follows from it
    homes_of = [read_homes(out, part, partition) for part in range(parts)]
    counts = np.array([np.bincount(home, minlength=partitions) for home in homes_of], np.int64)
    del homes_of
    start = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
    free = start[:-1] + np.cumsum(counts, axis=0) - counts
    visits = int(start[-1])
    found = shortlist.empty(visits, places)
    catalog_rows = np.empty(visits, np.int64)
    for part in range(parts):
        entries = read_entries(out, part, partition, visitors=True)
        theirs = search_for(entries, sketch.apply(entries.rows), lambda done: None)
        order = np.argsort(entries.home, kind="stable")
        rows = np.repeat(free[part], counts[part]) + features.inside_runs(counts[part])
        found.put(rows, theirs, order)
        catalog_rows[rows] = entries.catalog_row[order]
        del entries, theirs  # or two parts are held while the next one is read
    write_short(index, f"found-{partition:05d}", catalog_rows, found, start=start)
    return {"rows": int(own.catalog_row.size), "visits": visits}


def merge(*, report: Report, out: Folder, partition: int, partitions: int, width: int) -> Figures:
    """Task: the lists of a partition's own rows, from everywhere they were compared."""
    index = out.sub("index")
    total = catalog.layout(out.sub("catalog")).total
    catalog_rows, short = read_short(index, f"lists-{partition:05d}")
    for other in range(partitions):
        if other == partition:
            continue
        stem = f"found-{other:05d}"
        start = read_array(index, f"{stem}.start.npy")
        visitors, theirs = read_short(
            index, stem, slice(int(start[partition]), int(start[partition + 1]))
        )
        at = np.searchsorted(catalog_rows, visitors)
        shortlist.merge_inplace(short, at, theirs, visitors, total)
    write_lists(
        index,
        f"merged-{partition:05d}",
        catalog_rows,
        shortlist.settle(short, catalog_rows, width, total),
    )
    report(catalog_rows.size)
    return {}


def refine_lists(
    *, report: Report, out: Folder, partition: int, parts: int, sizes: list[int], k: int
) -> Figures:
    """Task: one refinement pass over a partition's own rows. Figures: rows measured.

    Reads the merged lists of all partitions where its own point to, and writes others.
    """
    products.use_threads(assigned_cpus())
    index = out.sub("index")
    layout = catalog.layout(out.sub("catalog"))
    assigned, ids = assigned_rows(out, layout), graph_ids(out, layout)
    starts = (0, *np.cumsum(sizes).tolist())
    lists_of = PartedArray(folder=index, name="merged", starts=starts, column="list")
    catalog_rows, own = read_lists(index, f"merged-{partition:05d}")
    probed = _probed(out, partition, parts)
    after = Lists.empty(catalog_rows.size, k)
    # rows of one cell ask for the same others
    order = np.argsort(probed[:, 0], kind="stable")
    waiting = [order[b : b + _REFINED_ROWS] for b in range(0, order.size, _REFINED_ROWS)][::-1]
    measured = 0
    while waiting:
        some = waiting.pop()
        block = own.take(some)
        lists_of_neighbors, neighbor_row = refine.distinct(block.catalog_rows)
        theirs = lists_of.gather(ids.gather(lists_of_neighbors))
        homes = refine.home_cells(theirs, lambda named: assigned.gather(named)[:, 0])
        start, found = refine.candidates(
            catalog_rows[some], probed[some], block.catalog_rows, theirs, homes, neighbor_row
        )
        fetched, where = np.unique(found, return_inverse=True)
        if fetched.size > memory_of.BLOCK_ROWS and some.size > 1:
            waiting += [some[some.size // 2 :], some[: some.size // 2]]
            continue
        better = refine.improved(
            layout.gather(catalog_rows[some]), catalog_rows[some], block, k, start, found,
            layout.gather(fetched), where, layout.total,
        )  # fmt: skip
        after.catalog_rows[some], after.sqdist[some] = better.catalog_rows, better.sqdist
        measured += found.size
        report(some.size)
    write_lists(index, f"refined-{partition:05d}", catalog_rows, after)
    return {"measured": measured}


def finish(
    *, report: Report, out: Folder, partition: int, stem: str, k: int, first: int, rows: int
) -> Figures:
    """Task: write one part of the graph. Figures: edges, and those that leave the partition.

    first, rows: the graph ids of this partition.
    """
    layout = catalog.layout(out.sub("catalog"))
    catalog_rows, lists = read_lists(out.sub("index"), f"{stem}-{partition:05d}")
    neighbors = np.ascontiguousarray(lists.catalog_rows[:, :k])
    there = neighbors >= 0
    graph_id = np.full(neighbors.shape, -1, np.int64)
    graph_id[there] = graph_ids(out, layout).gather(neighbors[there])
    hi, lo, difficulty = _read_ids(layout, catalog_rows)
    part = graph.GraphPart(
        hi=hi,
        lo=lo,
        difficulty=difficulty,
        neighbors=graph_id,
        sqdist=np.ascontiguousarray(lists.sqdist[:, :k]),
    )
    sums = graph.publish_part(out.sub("graph"), partition, part)
    outside = there & ((graph_id < first) | (graph_id >= first + rows))
    report(len(neighbors))
    return {
        "edges": int(there.sum()),
        "cross_edges": int(outside.sum()),
        "checksums": sums,
    }


def measure(*, report: Report, out: Folder, part: int, k: int) -> Figures:
    """Task: exact lists of the measured queries within one catalog part."""
    report(list_exactly(out, part, MEASURE, f"truth-{part:05d}", k))
    return {}


def list_exactly(out: Folder, part: int, asked: str, answer: str, k: int) -> int:
    """Publish exact lists of some queries over one catalog part; returns its rows.

    asked, answer: file stems of the queries and of their lists. Memory: the part.
    """
    products.use_threads(assigned_cpus())
    layout = catalog.layout(out.sub("catalog"))
    queries = read_columns(out.sub("index"), asked, "catalog_row", "rows")
    rows = layout.read(part)
    catalog_rows = layout.starts[part] + np.arange(len(rows), dtype=np.int64)
    found = search.search_all(
        rows, catalog_rows, queries["rows"], queries["catalog_row"], k, layout.total
    )
    write_lists(out.sub("index"), answer, queries["catalog_row"], found)
    return len(rows)


def judge(
    *, report: Report, out: Folder, parts: int, partitions: int, k: int, stem: str
) -> Figures:
    """Task: recall of the graph's lists against the exact ones."""
    index = out.sub("index")
    layout = catalog.layout(out.sub("catalog"))
    catalog_rows = read_columns(index, MEASURE, "catalog_row")["catalog_row"]
    truth = Lists.empty(catalog_rows.size, k)
    everyone = np.arange(catalog_rows.size, dtype=np.int64)
    for part in range(parts):
        _, theirs = read_lists(index, f"truth-{part:05d}")
        merge_inplace(truth, everyone, theirs, catalog_rows, layout.total)
    found = np.full((catalog_rows.size, k), -1, np.int64)
    for partition in range(partitions):
        named, lists = read_lists(index, f"{stem}-{partition:05d}")
        if named.size:
            at = np.minimum(np.searchsorted(named, catalog_rows), named.size - 1)
            here = np.flatnonzero(named[at] == catalog_rows)
            found[here] = lists.catalog_rows[at[here], :k]
    recall = knn.recall_of(truth, found, layout.total)
    return {
        "recall": recall.value,
        "recall_ci": [recall.low, recall.high],
        "recall_queries": recall.queries,
    }


def _at_home(out: Folder, layout: PartedArray, partition: int, parts: int) -> Entries:
    """A partition's own rows, ascending by catalog row, held once."""
    size = sum(count_entries(out, part, partition, visitors=False) for part in range(parts))
    own = Entries(
        rows=np.empty((size, layout.part(0).shape[1]), np.float16),
        catalog_row=np.empty(size, np.int64),
        home=np.full(size, partition, np.int32),
        probed=np.empty((size, read_probed(out, 0, partition).shape[1]), np.int32),
    )
    begin = 0
    for part in range(parts):
        entries = read_entries(out, part, partition, visitors=False)
        some = slice(begin, begin + entries.catalog_row.size)
        own.rows[some], own.catalog_row[some] = entries.rows, entries.catalog_row
        own.probed[some] = entries.probed
        begin += entries.catalog_row.size
    return own


def _probed(out: Folder, partition: int, parts: int) -> npt.NDArray[np.int32]:
    """The cells that a partition's own rows probe, in the order of their catalog rows."""
    return np.concatenate([read_probed(out, part, partition) for part in range(parts)])


def write_short(
    index: Folder, stem: str, catalog_rows: I64, short: Shortlists, **more: npt.NDArray[Any]
) -> None:
    """Publish shortlists of some samples."""
    write_columns(
        index, stem, catalog_row=catalog_rows, list=short.lists.catalog_rows,
        near=short.lists.sqdist, exact=short.exact, **more,
    )  # fmt: skip


def read_short(index: Folder, stem: str, rows: slice | None = None) -> tuple[I64, Shortlists]:
    """Catalog rows and shortlists of all samples, or of a range."""
    held = read_columns(index, stem, "catalog_row", "list", "near", "exact", rows=rows)
    lists = Lists(catalog_rows=held["list"], sqdist=held["near"])
    return held["catalog_row"], Shortlists(lists=lists, exact=held["exact"])


def write_lists(index: Folder, stem: str, catalog_rows: I64, lists: Lists) -> None:
    """Publish lists of some samples."""
    write_columns(
        index, stem, catalog_row=catalog_rows, list=lists.catalog_rows, sqdist=lists.sqdist
    )


def read_lists(index: Folder, stem: str) -> tuple[I64, Lists]:
    """Catalog rows and lists."""
    held = read_columns(index, stem, "catalog_row", "list", "sqdist")
    return held["catalog_row"], Lists(catalog_rows=held["list"], sqdist=held["sqdist"])


def _read_ids(layout: PartedArray, catalog_rows: I64) -> tuple[Any, Any, Any]:
    """uid_hi, uid_lo and difficulty of ascending catalog rows."""
    hi = np.empty(catalog_rows.size, np.uint64)
    lo = np.empty(catalog_rows.size, np.uint64)
    difficulty = np.empty(catalog_rows.size, np.float32)
    bounds = np.searchsorted(catalog_rows, layout.starts)
    for part, start in enumerate(layout.starts[:-1]):
        some = slice(int(bounds[part]), int(bounds[part + 1]))
        if some.start < some.stop:
            rows = catalog_rows[some] - start
            every = catalog.read_ids(layout.folder, part)
            hi[some], lo[some], difficulty[some] = (values[rows] for values in every)
    return hi, lo, difficulty
