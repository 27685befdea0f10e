"""Catalog → index/: centroids, the cells of every row, how to search (DESIGN §4.1, §4.3, §4.7).

index/centroids.npy            (nlist, d) float16; parents.npy, parent.npy: the level above
index/calibrate.*, measure.*   hash-chosen samples: numbers and features
index/assigned-00000.npy       (rows, p) int32, by catalog part: cells that each row probes
index/counts-00000.npy         (nlist,) int64 rows of each cell in that part

All but centroids.npy and cells.parquet is removed when the graph is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import backend, calibrate, cells, knn, search, uids
from d2filter.algorithm.lists import Lists, merge_inplace
from d2filter.config import GraphConfig
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.formats.rows import Rows, read_array, read_columns, write_array, write_columns
from d2filter.stages.runner import Report, assigned_cpus

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

CENTROIDS = "centroids.npy"
CALIBRATE, MEASURE = "calibrate", "measure"
_BLOCK = 65536


def train(*, report: Report, out: Folder, config: GraphConfig, exact: bool) -> dict[str, Any]:
    """Task: choose samples by uid hash and train the centroids. Figures: nlist.

    Memory: the training sample, 16 rows a cell; one part's uids.
    """
    backend.use_threads(assigned_cpus())
    layout = catalog.layout(out.sub("catalog"))
    k = config.n_neighbors
    count = 1 if exact else cells.cell_count(layout.total, k)
    if layout.total <= max(1, config.exact_below):
        count = 1
    sizes = {
        uids.SALT_TRAIN: cells.TRAINING_ROWS_A_CELL * count if count > 1 else 1,
        uids.SALT_CALIBRATE: calibrate.QUERIES,
        uids.SALT_MEASURE: knn.MEASURE_QUERIES,
    }
    chosen = _choose(layout, sizes, config.seed)
    index = out.sub("index")
    for stem, salt in ((CALIBRATE, uids.SALT_CALIBRATE), (MEASURE, uids.SALT_MEASURE)):
        write_columns(index, stem, number=chosen[salt], rows=layout.gather(chosen[salt]))
    sample = layout.gather(chosen[uids.SALT_TRAIN])
    trained = knn.single_cell(sample) if count == 1 else cells.train(sample, count)
    write_array(index, "parents.npy", trained.parents)
    write_array(index, "parent.npy", trained.parent)
    write_array(index, CENTROIDS, trained.centroids)
    return {"nlist": trained.count}


def assign(*, report: Report, out: Folder, part: int, probes: int) -> dict[str, Any]:
    """Task: the cells that each row of a catalog part probes. Memory: a block of rows."""
    backend.use_threads(assigned_cpus())
    trained = read_cells(out)
    rows = catalog.layout(out.sub("catalog")).part(part)
    found = np.zeros((len(rows), min(probes, trained.count)), np.int32)
    for begin in range(0, len(rows), _BLOCK):
        block = np.array(rows[begin : begin + _BLOCK])
        found[begin : begin + len(block)] = cells.assign(block, trained, probes)
        report(len(block))
    index = out.sub("index")
    counts = np.bincount(found[:, 0], minlength=trained.count).astype(np.int64)
    write_array(index, f"counts-{part:05d}.npy", counts)
    write_array(index, f"assigned-{part:05d}.npy", found)
    return {}


def choose(*, report: Report, out: Folder, config: GraphConfig, parts: int) -> dict[str, Any]:
    """Task: how many cells to probe, and whether to refine. Memory: one part at a time."""
    backend.use_threads(assigned_cpus())
    trained = read_cells(out)
    pool = Streamed(out, parts, trained.count)
    queries = read_columns(out.sub("index"), CALIBRATE, "number", "rows")
    rows = queries["rows"]
    choice = calibrate.choose(
        pool,
        rows,
        queries["number"],
        cells.assign(rows, trained, cells.MOST_PROBES),
        config.n_neighbors,
        config.target_recall,
    )
    return {
        "probes": choice.probes,
        "passes": choice.passes,
        "predicted": choice.predicted,
        "evaluations": choice.evaluations,
        "reached": choice.reached,
        "pays": knn.pays(choice, pool.total, trained.count),
    }


def read_cells(out: Folder) -> cells.Cells:
    """The trained cells; copies, for compiled code is made anew for read-only arrays."""
    index = out.sub("index")
    return cells.Cells(
        centroids=np.array(read_array(index, CENTROIDS)),
        parents=np.array(read_array(index, "parents.npy")),
        parent=np.array(read_array(index, "parent.npy")),
    )


def read_counts(out: Folder, parts: int) -> I64:
    """(parts, nlist) rows of each cell in each catalog part."""
    index = out.sub("index")
    return np.stack([read_array(index, f"counts-{part:05d}.npy") for part in range(parts)])


def assigned_rows(out: Folder, layout: Rows) -> Rows:
    """The cells that each sample probes."""
    return Rows(folder=out.sub("index"), name="assigned", starts=layout.starts)


@dataclass
class Streamed:
    """The whole catalog, one part in memory at a time (calibrate.Searcher)."""

    out: Folder
    parts: int
    nlist: int

    def __post_init__(self) -> None:
        self._layout = catalog.layout(self.out.sub("catalog"))
        self._assigned = assigned_rows(self.out, self._layout)
        self.total = self._layout.total
        self.sizes: I64 = read_counts(self.out, self.parts).sum(axis=0)
        self._held: dict[int, search.Members] = {}

    def find(self, queries: F16, numbers: I64, probed: I32, k: int) -> Lists:
        """Exact lists within the probed cells, merged over the parts."""
        found = Lists.empty(len(queries), k)
        everyone = np.arange(len(queries), dtype=np.int64)
        for part in range(self.parts):
            theirs = search.search(self._members(part), queries, numbers, probed, k, self.total)
            merge_inplace(found, everyone, theirs, numbers, self.total)
        return found

    def rows(self, numbers: I64) -> F16:
        """Their features."""
        return self._layout.gather(numbers)

    def probed(self, numbers: I64) -> I32:
        """The cells that they probe."""
        return self._assigned.gather(numbers)

    def _members(self, part: int) -> search.Members:
        if part not in self._held:
            self._held.clear()
            start = self._layout.starts[part]
            rows = np.array(self._layout.part(part))
            numbers = start + np.arange(len(rows), dtype=np.int64)
            home = np.array(self._assigned.part(part)[:, 0])
            self._held[part] = search.make_members(rows, numbers, home, self.nlist)
        return self._held[part]


def _choose(layout: Rows, sizes: dict[int, int], seed: int) -> dict[int, I64]:
    """Numbers of the samples with the smallest hashes, ascending, for each salt and size."""
    keys: dict[int, list[npt.NDArray[np.uint64]]] = {salt: [] for salt in sizes}
    numbers: dict[int, list[I64]] = {salt: [] for salt in sizes}
    for part, start in enumerate(layout.starts[:-1]):
        hi, lo, _ = catalog.read_ids(layout.folder, part)
        for salt, size in sizes.items():
            some = uids.hash_sample(hi, lo, size, salt=salt, seed=seed)
            keys[salt].append(uids.hashed(hi[some], lo[some], salt=salt, seed=seed))
            numbers[salt].append(start + some)
    out = {}
    for salt, size in sizes.items():
        key, number = np.concatenate(keys[salt]), np.concatenate(numbers[salt])
        # numbers ascend with uids: the tie rule of `uids.hash_sample`
        out[salt] = np.sort(number[np.lexsort((number, key))[:size]])
    return out
