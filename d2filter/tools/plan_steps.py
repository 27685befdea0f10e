"""Counts the work of every step of a run: tasks, units, bytes and matrix products.

The work of a step is counted in units that grow with the pool as its cost does. What depends on the
data (how many cells must be probed, how short sketches can be) is in `Habits`, measured on a small
pool. `cost_model.py` makes seconds and memory of these counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from d2filter.algorithm import sizes
from d2filter.algorithm.knn import calibrate, cells, sketch
from d2filter.algorithm.knn import in_memory as knn
from d2filter.config import GraphConfig

_FAN_OUT = 0.42  # a row goes to 1 + this · log2(P) partitions: 2.8 of 19 (bench_memory.md)
_DEFAULT = GraphConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The size of the pool to filter."""

    samples: int
    dimension: int
    """of a row of features: both embeddings together for image|text"""
    k: int = _DEFAULT.n_neighbors
    fraction: float = 0.3
    exact_below: int = _DEFAULT.exact_below
    images: bool = False
    """whether the run starts from shards"""
    image_bytes: int = 60_000
    """of a pair in a shard"""

    @property
    def row_bytes(self) -> int:
        """Bytes of the features of a sample, float16."""
        return 2 * self.dimension

    @property
    def metadata_bytes(self) -> int:
        """Bytes of the metadata of all samples."""
        return self.samples * (self.row_bytes + sizes.METADATA_ROW)

    @property
    def is_exact(self) -> bool:
        """Whether all samples are compared with all, for the pool is small."""
        return knn.count_to_train(self.samples, self.k, self.exact_below) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a pool makes of the search, as a pool of `samples` was measured to."""

    samples: int
    cells: int
    probes: int
    passes: int
    sketch_dim: int
    evaluations: float
    """cost per row, as a number of distances between whole rows by products"""
    growth: float = 0.5
    """power of the pool's size by which that cost grows"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A fan-out, or a single task."""

    stage: str
    name: str
    units: float
    tasks: int
    threads: bool
    """whether a task uses all CPUs that it is given"""
    read: float = 0.0
    """bytes"""
    written: float = 0.0
    flops: float = 0.0
    """of matrix products"""


def habits_at(habits: Habits, samples: int, k: int) -> Habits:
    """The habits of the same pool with more samples: cells grow, and with them the cost of a probe.

    The number of probes stays, unless the habits are those of a sample of the pool, which is
    sparser and needs more.
    """
    count = cells.cell_count(samples, k)
    # cells hold √n rows: of a growth by the root, this is what it is
    grown = ((samples / count) / (habits.samples / habits.cells)) ** (habits.growth / 0.5)
    return replace(habits, samples=samples, cells=count, evaluations=habits.evaluations * grown)


def count(pool: Pool, h: Habits, partitions: int, memory: int = 0) -> list[Step]:
    """The steps of a run that starts from metadata, with their work. memory: bytes that a task may
    use; 0: not limited.
    """
    n, d, k = pool.samples, pool.dimension, pool.k
    row = pool.row_bytes
    parts = parts_of(pool, memory)
    fan = fan_out(partitions)
    exact = pool.is_exact
    found = [
        Step(
            stage="catalog", name="catalog", units=n * (d + 700.0), tasks=groups_of(pool, memory),
            threads=False, read=n * (2.0 * row + sizes.METADATA_ROW + sizes.CATALOG_ROW),
            written=n * 2.0 * (row + sizes.CATALOG_ROW),
        )
    ]  # fmt: skip
    width = knn.list_width(k, h.passes)
    places = sketch.places(width, identity=h.sketch_dim >= d)
    root = math.sqrt(h.cells)
    trained = min(n, cells.TRAINING_ROWS_A_CELL * h.cells)
    short = h.sketch_dim
    # a product costs as much as one of so many dimensions more
    wide, narrow = d + calibrate.OVERHEAD, short + calibrate.OVERHEAD
    # principal axes, and how many of them find the neighbors of the judged rows
    axes = 6.0 * min(trained, sketch.LOOKED_AT) * (d * d + 2 * sketch.JUDGED * wide)
    # units of a step that searches are multiplications of products
    scanned = float(n) * wide if exact else h.evaluations * wide
    sketched = 0.0 if exact or short == d else float(d * short)
    # a row is compared with √cells / 2 parents, and with 2·√cells cells under each of the nearest
    compared = (2.0 * cells.PARENTS_LOOKED_UNDER + 0.5) * root
    assigned = 0.0 if exact else compared * narrow + sketched
    read = float(n * row)
    routed = fan * n * (row + float(sizes.ROUTED_ROW))
    graph = [
        ("train", 0.0 if exact else 27.0 * trained * root * narrow + axes, 1, True, trained * row,
         0.0),
        ("assign", n * assigned, parts, True, read, n * 64.0),
        ("choose", 0.0 if exact else n * (calibrate.QUERIES * wide + 2 * sketched), parts, True,
         3 * read, 0.0),
        ("route", n * fan * d, parts, False, read, routed),
        ("find", n * (scanned + fan * sketched + 4.0 * places * d), partitions, True,
         routed, fan * n * (16.0 * places + 8)),
        ("merge", n * fan * places, partitions, False, fan * n * 16.0 * places, n * 12.0 * width),
        ("refine", float(n * d * width * h.passes), partitions, True, h.passes * 4 * read,
         h.passes * n * 12.0 * k),
        ("finish", float(n * (k + 3)), partitions, False, n * (12.0 * width + 24),
         n * (12.0 * k + 20)),
        ("measure", float(n * knn.MEASURE_QUERIES * wide), parts, True, read, 0.0),
        ("judge", 1.0, 1, False, 0.0, 0.0),
    ]  # fmt: skip
    flops = {
        "train": 54 * trained * root * short,
        "assign": 2 * n * (compared * short + sketched),
        "choose": 2.0 * n * calibrate.QUERIES * d,
        "find": 2 * n * scanned,
        "measure": 2.0 * n * knn.MEASURE_QUERIES * d,
    }
    found += [
        Step(
            stage="graph", name=name, units=units, tasks=tasks, threads=threads, read=reads,
            written=writes, flops=flops.get(name, 0.0) if units else 0.0,
        )
        for name, units, tasks, threads, reads, writes in graph
    ]  # fmt: skip
    edges = n * (12.0 * k + 20)
    settled = [("rank_settle", k + 3, edges, 0.0)]
    if n * k > sizes.SETTLED_WHOLE:
        settled = [
            ("rank_upper", k, n * 4.0 * k, 0.0),
            ("rank_lower", k, n * 4.0 * k, 0.0),
            ("rank_near", k, edges, 0.0),
            ("rank_lists", k, edges, 0.0),
            ("rank_answers", k, n * 4.0 * k, 0.0),
        ]
    for name, weight, reads, writes in (
        *settled,
        ("rank_cut", k + 3, edges, 0.0),
        ("rank_describe", 3, n * 20.0, 0.0),
        # partitions look again when news come from others: 1.2 times at k=1, 2.5 at k=5
        ("supersteps", (k + 3) * (1 + 0.3 * k if partitions > 1 else 1), edges, n * 60.0),
        ("rank_ranges", 1, n * 24.0, 0.0),
        ("rank_merge", 1, n * 24.0, n * 8.0),
        ("rank_finish", 4, n * 60.0, n * 46.0),
    ):
        found.append(
            Step(
                stage="rank", name=name, units=float(n * weight),
                tasks=1 if name == "rank_settle" else partitions, threads=False,
                read=reads, written=writes,
            )
        )  # fmt: skip
    found.append(
        Step(
            stage="select", name="select", units=float(n), tasks=1, threads=False, read=n * 46.0,
            written=pool.fraction * n * 40,
        )
    )  # fmt: skip
    return found


def parts_of(pool: Pool, memory: int = 0) -> int:
    """Parts of the catalog. memory: bytes that a task may use; 0: not limited."""
    return sizes.catalog_parts(pool.metadata_bytes, memory)


def groups_of(pool: Pool, memory: int = 0) -> int:
    """Tasks that read metadata, if files are small."""
    return max(1, math.ceil(pool.metadata_bytes / sizes.catalog_group(memory)))


def graph_row(pool: Pool, h: Habits) -> int:
    """Bytes of a row in the task that searches it."""
    return sizes.graph_row(pool.row_bytes, h.sketch_dim, knn.list_width(pool.k, h.passes))


def fan_out(partitions: int) -> float:
    """Partitions that a row goes to."""
    return 1 + _FAN_OUT * math.log2(partitions)
