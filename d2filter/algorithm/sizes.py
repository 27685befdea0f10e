"""Bytes that samples take in each stage; parts, partitions and memory that follow from them.

The stages divide their work by these figures, and `d2filter plan` predicts with the same ones. All
figures are bytes, if the name does not say otherwise. Sources are files in jobs/results/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.knn import sketch

# processes before they hold a sample
WORKER = 250_000_000  # of the catalog (bench_plan.md)
SEARCHING = 450_000_000  # with compiled search and products (bench_memory.md)
RANKING = 730_000_000  # with the ranking's code and parquet (bench_plan.md)
SELECTING = 400_000_000  # the driver, which selects (bench_plan.md)
MODEL = 4_000_000_000  # with ViT-L-14: 428M float32 weights, twice while they load; not measured
LEAST_WORKER = 700_000_000
"""a task may not be limited to less: more than half of it is used before it holds a sample"""

# embed
PICTURE = 1 << 20  # of an encoded picture, more than most
PICTURES_AHEAD = 512 << 20  # of encoded pictures that wait for a thread, at most
PIXEL = 20  # of a pixel while it is decoded, at most: of AVIF and TIFF (stages/decode.py)
_TENSOR = 3 * 336 * 336 * 4  # of the largest common input

# catalog
METADATA_ROW = 150  # of a row of metadata beside its embeddings: uid, url, caption, score
CATALOG_ROW = 60  # of a row of the catalog beside its features
CATALOG_PART = 512_000_000  # of metadata for a part of the catalog, at most
CATALOG_GROUP = 128_000_000  # of metadata that a task reads
_CATALOG_COPIES = 3  # of a part while it is merged, of a group while it is read (bench_plan.md)

# graph
SHARE = 0.5  # of what a worker has beyond SEARCHING: products, arrow and copies need the rest
BLOCK_ROWS = 65536
"""rows that a task widens to float32 at a time"""
ROUTED_ROW = 80  # of a row on its way to a partition, beside its features
_UNEVEN = 1.1  # rows of the largest partition, in those of the mean; a margin

# rank and select
RANKED_STATE = 85
"""of a ranked sample: scores, queues and boundaries over all processes (bench_rank_large.md)"""
RANKED_EDGES = 100
"""of a ranked sample: edges in both directions, in memory or mapped files (bench_rank_large.md)"""
_RANKED_LIST = 20  # of an edge while the lists become edges
_SELECTED = 24  # of a sample of the subset
_RANKED_ROW = 60  # of a row of the ranking while a part is read
SETTLED_WHOLE = 4_000_000
"""neighbors of a graph that one task settles at once, in less than 400 MB: this saves a task for
each part and step
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPlan:
    """The number of partitions of a graph, and the memory of their tasks."""

    partitions: int
    memory: int
    """bytes that a task of a partition requests; 0: a task has the node for itself"""


def waiting_pictures(batch_size: int) -> int:
    """Encoded pictures that wait for a thread, of two batches."""
    return min(2 * batch_size * PICTURE, PICTURES_AHEAD)


def decoded_pictures(max_pixels: int) -> int:
    """Pictures that a task decodes at the same time: one of the largest, or many small ones."""
    return max_pixels * PIXEL


def beside_model(batch_size: int, max_pixels: int) -> int:
    """What a task that embeds holds beside its model: pictures that wait or are decoded, and
    tensors of two batches that are made ready and of three that the model has or is to have.
    """
    tensors = 5 * batch_size * _TENSOR
    return waiting_pictures(batch_size) + decoded_pictures(max_pixels) + tensors


def catalog_group(memory: int = 0) -> int:
    """Metadata that a task of the catalog reads, at most. memory: that a task may use; 0: not
    limited.
    """
    return min(CATALOG_GROUP, memory // 20) if memory else CATALOG_GROUP


def catalog_parts(metadata: float, memory: int = 0) -> int:
    """Number of parts of the catalog. metadata: bytes of all its files. memory: as above."""
    part = min(CATALOG_PART, memory // 10) if memory else CATALOG_PART
    return 1 + int(metadata // part)


def catalog_task(part: float, group: float) -> float:
    """Peak of a task of the catalog. part: features of a part; group: metadata that it reads."""
    return WORKER + _CATALOG_COPIES * max(part, group)


def graph_row(row_bytes: int, sketch_dim: int, width: int) -> int:
    """A row in the task that searches it: features, sketch, copies and cells; shortlists of own
    rows, then of visiting ones. width: places of the lists that are searched.
    """
    return _searched_row(
        row_bytes, sketch_dim, sketch.places(width, identity=2 * sketch_dim >= row_bytes)
    )


def class_row(row_bytes: int, k: int) -> int:
    """The same where samples have classes: the rows of a partition, and those of the class that is
    searched once more.
    """
    places = sketch.places(knn.list_width(k, 1), identity=False)
    return row_bytes + _searched_row(row_bytes, row_bytes // 2, places)


def _searched_row(row_bytes: int, sketch_dim: int, places: int) -> int:
    return row_bytes + 2 * sketch_dim + 200 + 32 * places


def task_memory(rows: float, row: float) -> int:
    """What a task of the graph requests for `rows` rows of `row` bytes."""
    return math.ceil(SEARCHING + rows * row / SHARE)


def graph_task(rows: int, partitions: float, row: float, row_bytes: int) -> float:
    """Expected peak of a task of the graph: a wide block, and a partition.

    rows: of the pool, with `row` bytes each, of which `row_bytes` are features.
    """
    block = 2.0 * min(rows, BLOCK_ROWS) * row_bytes
    return SEARCHING + block + _UNEVEN * rows / partitions * row


def least_graph_task(rows: int, row: float, row_bytes: int) -> float:
    """Memory below which no number of partitions is sensible: that of a quarter of a block."""
    partitions = max(1.0, rows / (BLOCK_ROWS / 4))
    return max(LEAST_WORKER, graph_task(rows, partitions, row, row_bytes))


def partitions_within(memory: float, rows: int, row: float, row_bytes: int) -> int:
    """Partitions whose tasks are expected to stay within `memory`, which is at least
    `least_graph_task`.
    """
    left = memory - graph_task(rows, math.inf, row, row_bytes)
    return max(_partitions_in(memory, rows, row), math.ceil(_UNEVEN * rows * row / left))


def _partitions_in(memory: float, rows: int, row: float) -> int:
    """As few partitions as the stage makes for tasks with `memory`."""
    return math.ceil(rows * row / max(1.0, (memory - SEARCHING) * SHARE))


def plan_partitions(
    rows: int, row: float, *, nodes: int, cpus: int, node_bytes: int, memory: int = 0,
    partitions: int = 0, row_bytes: int = 0,
) -> PartitionPlan:  # fmt: skip
    """As few partitions as memory allows, but at least one per node; one if a single node holds all
    rows.

    rows: of the pool, with `row` bytes each. cpus, node_bytes: of a node. memory: bytes that a task
    may use; 0: a CPU's share of the node. partitions: a fixed number; 0: choose it. A task then
    requests what its rows need, with a wide block of features of `row_bytes`, so that no node
    starts more tasks than it can hold.
    """
    if not memory:
        whole = rows * row <= (node_bytes - SEARCHING) * SHARE
        if whole and nodes == 1 and partitions <= 1:
            return PartitionPlan(partitions=1, memory=0)
        memory = max(2 * SEARCHING, node_bytes // max(1, cpus))
        if partitions:
            peak = math.ceil(graph_task(rows, partitions, row, row_bytes))
            needed = max(task_memory(rows / partitions, row), peak)
            memory = max(2 * SEARCHING, min(needed, node_bytes))
    return PartitionPlan(
        partitions=partitions or max(nodes, _partitions_in(memory, rows, row)), memory=memory
    )


def rank_task(rows: float, k: int) -> float:
    """Peak of a process that ranks `rows` samples with k neighbors each."""
    return RANKING + rows * (RANKED_STATE + RANKED_EDGES + _RANKED_LIST * k)


def select_task(kept: float, part: float) -> float:
    """Peak of the driver while it selects. kept: samples of the subset; part: rows of a part of the
    ranking.
    """
    return SELECTING + _SELECTED * kept + _RANKED_ROW * part
