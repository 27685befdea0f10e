"""Partitions → graph/: search by cell, merge at home, refine, measure (DESIGN §4.4–4.7).

index/found-00000.*       lists that a partition found for rows of others
index/lists-00000.*       lists of a partition's own rows: number, list, sqdist, probed
index/merged-00000.*      the same after what other partitions found came home
index/refined-00000.*     the same after the refinement pass
index/truth-00000.*       exact lists of the measured samples within one catalog part
graph/part-00000.parquet  the graph

Lists over the members of several partitions merge to the list over all of them, exactly: how rows
were partitioned cannot be seen in the graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import backend, knn, refine, search
from d2filter.algorithm.lists import Lists, merge_inplace
from d2filter.errors import InputError
from d2filter.formats import catalog, graph
from d2filter.formats.paths import Folder
from d2filter.formats.rows import Rows, read_array, read_columns, write_columns
from d2filter.stages.index import MEASURE, assigned_rows
from d2filter.stages.route import Entries, graph_ids, read_entries, read_layout
from d2filter.stages.runner import Report, assigned_cpus

I64 = npt.NDArray[np.int64]

_REFINED_ROWS = 8192  # whose candidates are held at a time
_FETCHED_ROWS = 65536  # features from anywhere that are held at a time


def find(
    *, report: Report, out: Folder, number: int, parts: int, partitions: int, nlist: int, width: int
) -> dict[str, Any]:
    """Task: search the cells of one partition for its own rows and for those that visit.

    Memory: the partition's rows, the visitors from one catalog part, and the lists.
    """
    backend.use_threads(assigned_cpus())
    index = out.sub("index")
    total = catalog.layout(out.sub("catalog")).total
    at_home = _at_home(out, number, parts)
    home_cell = _home_cells(out, at_home.number)
    members = search.make_members(at_home.rows, at_home.number, home_cell, nlist)
    found = search.search(
        members, at_home.rows, at_home.number, at_home.probed, width, total, progress=report
    )
    write_columns(
        index,
        f"lists-{number:05d}",
        number=at_home.number,
        list=found.numbers,
        sqdist=found.sqdist,
        probed=at_home.probed,
    )
    homes, numbers, lists, sqdist = [], [], [], []
    for part in range(parts):
        entries = read_entries(out, part, number)
        visits = np.flatnonzero(entries.home != number)
        some = search.search(
            members, entries.rows[visits], entries.number[visits], entries.probed[visits], width,
            total,
        )  # fmt: skip
        homes.append(entries.home[visits])
        numbers.append(entries.number[visits])
        lists.append(some.numbers)
        sqdist.append(some.sqdist)
    home = np.concatenate(homes)
    order = np.argsort(home, kind="stable")
    write_columns(
        index,
        f"found-{number:05d}",
        start=np.searchsorted(home[order], np.arange(partitions + 1)),
        number=np.concatenate(numbers)[order],
        list=np.concatenate(lists)[order],
        sqdist=np.concatenate(sqdist)[order],
    )
    return {"rows": int(at_home.number.size), "visits": int(home.size)}


def merge(*, report: Report, out: Folder, number: int, partitions: int) -> dict[str, Any]:
    """Task: the lists of a partition's own rows, from everywhere they were compared."""
    index = out.sub("index")
    total = catalog.layout(out.sub("catalog")).total
    own = read_columns(index, f"lists-{number:05d}", "number", "list", "sqdist", "probed")
    lists = Lists(numbers=own["list"], sqdist=own["sqdist"])
    for other in range(partitions):
        if other == number:
            continue
        stem = f"found-{other:05d}"
        start = read_array(index, f"{stem}.start.npy")
        some = slice(int(start[number]), int(start[number + 1]))
        theirs = read_columns(index, stem, "number", "list", "sqdist", rows=some)
        merge_inplace(
            lists,
            np.searchsorted(own["number"], theirs["number"]),
            Lists(numbers=theirs["list"], sqdist=theirs["sqdist"]),
            theirs["number"],
            total,
        )
    write_columns(
        index,
        f"merged-{number:05d}",
        number=own["number"],
        list=lists.numbers,
        sqdist=lists.sqdist,
        probed=own["probed"],
    )
    report(len(lists.numbers))
    return {}


def improve(*, report: Report, out: Folder, number: int, sizes: list[int]) -> dict[str, Any]:
    """Task: one refinement pass over a partition's own rows. Figures: rows measured.

    Reads the merged lists of all partitions where its own point to, and writes others.
    """
    backend.use_threads(assigned_cpus())
    index = out.sub("index")
    layout = catalog.layout(out.sub("catalog"))
    homes, ids = assigned_rows(out, layout), graph_ids(out, layout)
    own = read_columns(index, f"merged-{number:05d}", "number", "list", "sqdist", "probed")
    mine = _round(own["list"], own["sqdist"], homes)
    reader = _FriendLists(index, sizes, homes)
    width = own["list"].shape[1]
    after = Lists.empty(len(own["number"]), width)
    # rows of one cell ask for the same others
    order = np.argsort(own["probed"][:, 0], kind="stable")
    waiting = [order[b : b + _REFINED_ROWS] for b in range(0, order.size, _REFINED_ROWS)][::-1]
    measured = 0
    while waiting:
        some = waiting.pop()
        block = mine.take(some)
        numbers = own["number"][some]
        there = block.lists.numbers >= 0
        friends = np.unique(block.lists.numbers[there])
        friend_of = np.where(there, np.searchsorted(friends, block.lists.numbers), -1)
        start, found, cells = refine.candidates(
            numbers, own["probed"][some], block, reader.read(ids.gather(friends)), friend_of
        )
        fetched, where = np.unique(found, return_inverse=True)
        if fetched.size > _FETCHED_ROWS and some.size > 1:
            waiting += [some[some.size // 2 :], some[: some.size // 2]]
            continue
        better = refine.improved(
            layout.gather(numbers), numbers, block, start, found, cells, layout.gather(fetched),
            where, layout.total,
        ).lists  # fmt: skip
        after.numbers[some], after.sqdist[some] = better.numbers, better.sqdist
        measured += found.size
        report(some.size)
    write_columns(
        index,
        f"refined-{number:05d}",
        number=own["number"],
        list=after.numbers,
        sqdist=after.sqdist,
    )
    return {"measured": measured}


def finish(
    *, report: Report, out: Folder, number: int, stem: str, k: int, first: int, rows: int
) -> dict[str, Any]:
    """Task: write one part of the graph. Figures: edges, and those that leave the partition.

    first, rows: the graph ids of this partition.
    """
    layout = catalog.layout(out.sub("catalog"))
    stem = f"{stem}-{number:05d}"
    lists = read_columns(out.sub("index"), stem, "number", "list", "sqdist")
    neighbors = np.ascontiguousarray(lists["list"][:, :k])
    there = neighbors >= 0
    graph_id = np.full(neighbors.shape, -1, np.int64)
    graph_id[there] = graph_ids(out, layout).gather(neighbors[there])
    hi, lo, difficulty = _read_ids(layout, lists["number"])
    part = graph.GraphPart(
        hi=hi,
        lo=lo,
        difficulty=difficulty,
        neighbors=graph_id,
        sqdist=np.ascontiguousarray(lists["sqdist"][:, :k]),
    )
    graph.publish_part(out.sub("graph"), number, part)
    outside = there & ((graph_id < first) | (graph_id >= first + rows))
    report(len(neighbors))
    return {"edges": int(there.sum()), "cross_edges": int(outside.sum())}


def measure(*, report: Report, out: Folder, part: int, k: int) -> dict[str, Any]:
    """Task: exact lists of the measured queries within one catalog part."""
    backend.use_threads(assigned_cpus())
    layout = catalog.layout(out.sub("catalog"))
    queries = read_columns(out.sub("index"), MEASURE, "number", "rows")
    rows = np.array(layout.part(part))
    numbers = layout.starts[part] + np.arange(len(rows), dtype=np.int64)
    members = search.make_members(rows, numbers, np.zeros(len(rows), np.int32), 1)
    probed = np.zeros((len(queries["number"]), 1), np.int32)
    found = search.search(members, queries["rows"], queries["number"], probed, k, layout.total)
    write_columns(out.sub("index"), f"truth-{part:05d}", list=found.numbers, sqdist=found.sqdist)
    report(len(rows))
    return {}


def judge(
    *, report: Report, out: Folder, parts: int, partitions: int, k: int, stem: str
) -> dict[str, Any]:
    """Task: recall of the graph's lists against the exact ones."""
    index = out.sub("index")
    layout = catalog.layout(out.sub("catalog"))
    numbers = read_columns(index, MEASURE, "number")["number"]
    truth = Lists.empty(numbers.size, k)
    everyone = np.arange(numbers.size, dtype=np.int64)
    for part in range(parts):
        theirs = read_columns(index, f"truth-{part:05d}", "list", "sqdist")
        more = Lists(numbers=theirs["list"], sqdist=theirs["sqdist"])
        merge_inplace(truth, everyone, more, numbers, layout.total)
    found = np.full((numbers.size, k), -1, np.int64)
    for number in range(partitions):
        lists = read_columns(index, f"{stem}-{number:05d}", "number", "list")
        if len(lists["number"]):
            at = np.minimum(np.searchsorted(lists["number"], numbers), len(lists["number"]) - 1)
            here = np.flatnonzero(lists["number"][at] == numbers)
            found[here] = lists["list"][at[here], :k]
    recall = knn.recall_of(truth.numbers, found, layout.total)
    return {
        "recall": recall.value,
        "recall_ci": [recall.low, recall.high],
        "recall_queries": recall.queries,
    }


class _FriendLists:
    """Merged lists of any samples, by graph id; the last partition read is kept."""

    def __init__(self, index: Folder, sizes: list[int], homes: Rows) -> None:
        self._index = index
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._homes = homes
        self._held: dict[int, dict[str, npt.NDArray[Any]]] = {}

    def read(self, ids: I64) -> refine.Round:
        """The lists of samples with the given graph ids."""
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        lists, sqdist = None, None
        for number in np.unique(owner).tolist():
            held = self._read(number)
            if lists is None or sqdist is None:
                lists = np.empty((ids.size, held["list"].shape[1]), np.int64)
                sqdist = np.empty(lists.shape, np.float32)
            where = np.flatnonzero(owner == number)
            lists[where] = held["list"][ids[where] - self._starts[number]]
            sqdist[where] = held["sqdist"][ids[where] - self._starts[number]]
        if lists is None or sqdist is None:
            lists, sqdist = np.empty((0, 1), np.int64), np.empty((0, 1), np.float32)
        return _round(lists, sqdist, self._homes)

    def _read(self, number: int) -> dict[str, npt.NDArray[Any]]:
        if number not in self._held:
            self._held.clear()
            stem = f"merged-{number:05d}"
            self._held[number] = read_columns(self._index, stem, "list", "sqdist")
        return self._held[number]


def _round(lists: I64, sqdist: npt.NDArray[np.float32], homes: Rows) -> refine.Round:
    there = lists >= 0
    cells = np.full(lists.shape, -1, np.int32)
    distinct, back = np.unique(lists[there], return_inverse=True)
    if distinct.size:
        cells[there] = homes.gather(distinct)[back, 0]
    return refine.first_round(Lists(numbers=lists, sqdist=sqdist), cells)


def _at_home(out: Folder, number: int, parts: int) -> Entries:
    """A partition's own rows, ascending by number, held once."""
    at_home: Entries | None = None
    begin = 0
    for part in range(parts):
        entries = read_entries(out, part, number)
        here = np.flatnonzero(entries.home == number)
        if at_home is None:
            table = read_layout(out.sub("index"))
            size = int(table["rows"][table["partition"] == number].sum())
            at_home = Entries(
                rows=np.empty((size, entries.rows.shape[1]), np.float16),
                number=np.empty(size, np.int64),
                home=np.empty(size, np.int32),
                probed=np.empty((size, entries.probed.shape[1]), np.int32),
            )
        some = slice(begin, begin + here.size)
        at_home.rows[some] = entries.rows[here]
        at_home.number[some] = entries.number[here]
        at_home.home[some] = entries.home[here]
        at_home.probed[some] = entries.probed[here]
        begin += here.size
    if at_home is None:
        raise InputError(f"{out.where('index')} holds no routed rows: `--overwrite graph`")
    return at_home


def _home_cells(out: Folder, numbers: I64) -> npt.NDArray[np.int32]:
    layout = catalog.layout(out.sub("catalog"))
    return np.ascontiguousarray(assigned_rows(out, layout).gather(numbers)[:, 0])


def _read_ids(layout: Rows, numbers: I64) -> tuple[Any, Any, Any]:
    """uid_hi, uid_lo and difficulty of ascending numbers."""
    hi = np.empty(numbers.size, np.uint64)
    lo = np.empty(numbers.size, np.uint64)
    difficulty = np.empty(numbers.size, np.float32)
    bounds = np.searchsorted(numbers, layout.starts)
    for part, start in enumerate(layout.starts[:-1]):
        some = slice(int(bounds[part]), int(bounds[part + 1]))
        if some.start < some.stop:
            rows = numbers[some] - start
            every = catalog.read_ids(layout.folder, part)
            hi[some], lo[some], difficulty[some] = (values[rows] for values in every)
    return hi, lo, difficulty
