"""Memory that samples take, and the number of partitions that follows from it.

The stages and `d2filter plan` both use these numbers (measured: jobs/results/bench_memory.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.knn import sketch

SEARCHING = 450_000_000  # bytes of a worker with compiled search and products, before any row
SHARE = 0.5  # of what is left: products, arrow buffers and copies need the rest
CATALOG_PART = 512_000_000  # bytes of features in a part of the catalog, at most
CATALOG_GROUP = 128_000_000  # of metadata that a task reads


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPlan:
    """The number of partitions of a graph, and the memory of their tasks."""

    partitions: int
    memory: int
    """bytes that a task of a partition requests; 0: a task has the node for itself"""


def graph_row(row_bytes: int, sketch_dim: int, places: int) -> int:
    """Bytes per row in the task that searches it: features, sketch, copies and cells; shortlists of
    own rows, then of visiting ones. places: length of a shortlist.
    """
    return row_bytes + 2 * sketch_dim + 200 + 32 * places


def class_row(row_bytes: int, k: int) -> int:
    """The same where samples have classes: the rows of a partition, and those of the class that is
    searched once more.
    """
    places = sketch.places(knn.list_width(k, 1), identity=False)
    return row_bytes + graph_row(row_bytes, row_bytes // 2, places)


def task_memory(rows: float, row: float) -> int:
    """Bytes of a task that holds `rows` rows of `row` bytes."""
    return math.ceil(SEARCHING + rows * row / SHARE)


def plan_partitions(
    rows: int, row: float, *, nodes: int, cpus: int, node_bytes: int, memory: int = 0,
    partitions: int = 0,
) -> PartitionPlan:  # fmt: skip
    """As few partitions as memory allows, but at least one per node; one if a single node holds all
    rows.

    rows: of the pool, with `row` bytes each. cpus, node_bytes: of a node. memory: bytes that a task
    may use; 0: a CPU's share of the node. partitions: a fixed number; 0: choose it. A task then
    requests what its rows need, so that no node starts more tasks than it can hold.
    """
    if not memory:
        whole = rows * row <= (node_bytes - SEARCHING) * SHARE
        if whole and nodes == 1 and partitions <= 1:
            return PartitionPlan(partitions=1, memory=0)
        memory = max(2 * SEARCHING, node_bytes // max(1, cpus))
        if partitions:
            memory = max(2 * SEARCHING, min(task_memory(rows / partitions, row), node_bytes))
    room = max(1.0, (memory - SEARCHING) * SHARE)
    return PartitionPlan(
        partitions=partitions or int(max(nodes, math.ceil(rows * row / room))), memory=memory
    )


SETTLED_WHOLE = 4_000_000
"""neighbors of a graph that one task settles at once, in less than 400 MB: this saves a task for
each part and step"""
