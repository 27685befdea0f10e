"""Steps train and assign of stage graph: sketches, centroids, and the cells that each row probes.

index/centroids.npy            (nlist, d') float16; parents.npy, parent.npy, looked_under.npy: the
                               upper level, and the number of parents that a row considers
index/sketch.*                 the projection: mean (d,), axes (d, d') and grid
index/calibrate.*, measure.*   hash-chosen samples: catalog rows and features; calibrate.probed.npy:
                               the cells that may be searched for them
index/assigned-00000.npy       (rows, p) int32, by catalog part: cells that each row probes
index/counts-00000.npy         (nlist,) int64 rows of each cell in that part

All files except centroids.npy and cells.parquet are removed when the graph is done.

See docs/method.md#cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import sizes as memory_of
from d2filter.algorithm import uids
from d2filter.algorithm.knn import calibrate, cells, products
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.knn.sketch import Sketch
from d2filter.config import GraphConfig
from d2filter.engine.task import Figures, Report, assigned_cpus
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.formats.rows import PartedArray, read_array, read_columns, write_array, write_columns

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

CENTROIDS = "centroids.npy"
CALIBRATE, MEASURE = "calibrate", "measure"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Figures of `train`."""

    nlist: int
    """cells"""
    sketch_dim: int
    axes: int
    """of a sketch, 0 where rows are their own sketches"""
    parents: int


def train(
    *, report: Report, out: Folder, config: GraphConfig, exact: bool, effort: calibrate.Effort
) -> Figures:
    """Task: choose samples by uid hash, train sketches and centroids. Figures: `Trained`.

    Memory: the training sample, 16 rows a cell; one part's uids.
    """
    products.use_threads(assigned_cpus())
    layout = catalog.layout(out.sub("catalog"))
    count = knn.count_to_train(layout.total, config.n_neighbors, config.exact_below)
    count = 1 if exact else count
    sizes = {
        uids.SALT_TRAIN: cells.TRAINING_ROWS_A_CELL * count if count > 1 else 1,
        uids.SALT_CALIBRATE: calibrate.QUERIES,
        uids.SALT_MEASURE: knn.MEASURE_QUERIES,
    }
    chosen = sample_by_hash(layout, sizes, config.seed)
    index = out.sub("index")
    for stem, salt in ((CALIBRATE, uids.SALT_CALIBRATE), (MEASURE, uids.SALT_MEASURE)):
        write_columns(index, stem, catalog_row=chosen[salt], rows=layout.gather(chosen[salt]))
    trained = knn.train_on(layout.gather(chosen[uids.SALT_TRAIN]), count, effort)
    to_sketch = trained.sketch
    write_columns(
        index, "sketch", mean=to_sketch.mean, axes=to_sketch.axes, grid=np.array([to_sketch.grid])
    )
    if count > 1:
        # all matrix products run in tasks: the driver, which calibrates, has no GPU
        asked = trained.sketch.apply(layout.gather(chosen[uids.SALT_CALIBRATE]))
        probed = cells.assign(asked, trained.cells, cells.MOST_PROBES)
        write_array(index, f"{CALIBRATE}.probed.npy", probed)
    write_array(index, "parents.npy", trained.cells.parents)
    write_array(index, "parent.npy", trained.cells.parent)
    write_array(index, "looked_under.npy", np.array([trained.cells.looked_under]))
    write_array(index, CENTROIDS, trained.cells.centroids)
    made = Trained(
        nlist=trained.cells.count,
        sketch_dim=trained.cells.centroids.shape[1],
        axes=to_sketch.axes.shape[1],
        parents=len(trained.cells.parents),
    )
    return asdict(made)


def assign(*, report: Report, out: Folder, part: int, probes: int) -> Figures:
    """Task: the cells that each row of a catalog part probes. Memory: a block of rows."""
    products.use_threads(assigned_cpus())
    trained = read_trained(out)
    rows = catalog.layout(out.sub("catalog")).part(part)
    found = np.zeros((len(rows), min(probes, trained.cells.count)), np.int32)
    for begin in range(0, len(rows), memory_of.BLOCK_ROWS):
        block = np.array(rows[begin : begin + memory_of.BLOCK_ROWS])
        sketches = trained.sketch.apply(block)
        found[begin : begin + len(sketches)] = cells.assign(sketches, trained.cells, probes)
        report(len(sketches))
    index = out.sub("index")
    counts = np.bincount(found[:, 0], minlength=trained.cells.count).astype(np.int64)
    write_array(index, f"counts-{part:05d}.npy", counts)
    write_array(index, f"assigned-{part:05d}.npy", found)
    return {}


def read_trained(out: Folder) -> knn.Trained:
    """Sketches and cells, as copies: numba would compile once more for read-only arrays."""
    index = out.sub("index")
    found = cells.Cells(
        centroids=np.array(read_array(index, CENTROIDS)),
        parents=np.array(read_array(index, "parents.npy")),
        parent=np.array(read_array(index, "parent.npy")),
        looked_under=int(read_array(index, "looked_under.npy")[0]),
    )
    return knn.Trained(sketch=read_sketch(out), cells=found)


def read_sketch(out: Folder) -> Sketch:
    """The projection of rows."""
    held = read_columns(out.sub("index"), "sketch", "mean", "axes", "grid")
    return Sketch(mean=held["mean"], axes=held["axes"], grid=float(held["grid"][0]))


def read_counts(out: Folder, parts: int) -> I64:
    """(parts, nlist) rows of each cell in each catalog part."""
    return np.stack(list(each_count(out, parts)))


def each_count(out: Folder, parts: int) -> Iterator[I64]:
    """(nlist,) rows of each cell in one catalog part after the other."""
    for part in range(parts):
        yield read_array(out.sub("index"), f"counts-{part:05d}.npy")


def assigned_rows(out: Folder, layout: PartedArray) -> PartedArray:
    """The cells that each sample probes."""
    return PartedArray(folder=out.sub("index"), name="assigned", starts=layout.starts)


def sample_by_hash(layout: PartedArray, sizes: dict[int, int], seed: int) -> dict[int, I64]:
    """Numbers of the samples with the smallest hashes, ascending, for each salt and size."""
    held: dict[int, list[tuple[Any, ...]]] = {salt: [] for salt in sizes}
    for part, start in enumerate(layout.starts[:-1]):
        hi, lo, _ = catalog.read_ids(layout.folder, part)
        for salt, size in sizes.items():
            some = uids.hash_sample(hi, lo, size, salt=salt, seed=seed)
            held[salt].append((hi[some], lo[some], start + some))
    out = {}
    for salt, size in sizes.items():
        hi, lo, catalog_rows = (np.concatenate(values) for values in zip(*held[salt], strict=True))
        # a sample of samples: the smallest hashes of all are among the smallest of each part
        out[salt] = catalog_rows[uids.hash_sample(hi, lo, size, salt=salt, seed=seed)]
    return out
