"""Catalog + index → graph/, index/cells.parquet, and the measured recall (DESIGN §4.4–4.7)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import knn
from d2filter.config import GraphConfig
from d2filter.formats import catalog, graph
from d2filter.formats.paths import Folder
from d2filter.stages.index import CENTROIDS, load_pool
from d2filter.stages.runner import Report


def search(*, report: Report, out: Folder, config: GraphConfig, nprobe: int) -> dict[str, Any]:
    """Task: search all cells, write the one part of the graph, measure recall."""
    pool, difficulty = load_pool(out)
    # a copy: compiled code is made anew for read-only arrays
    centroids = np.array(catalog.read_features(out.sub("index"), CENTROIDS))
    index = knn.Index(centroids=centroids, probes=nprobe)
    built = knn.build_graph(pool, config.n_neighbors, index, progress=report)
    cells = pa.table(
        {
            "cell": np.arange(len(centroids), dtype=np.int32),
            "partition": np.zeros(len(centroids), np.int32),
            "rows": built.cell_rows,
        }
    )
    with out.sub("index").publish("cells.parquet") as path:
        pq.write_table(cells, path)
    part = graph.GraphPart(
        hi=pool.hi,
        lo=pool.lo,
        difficulty=difficulty,
        neighbors=built.neighbors,
        sqdist=built.sqdist,
    )
    graph.publish_part(out.sub("graph"), 0, part)
    recall = knn.measure_recall(pool, built, seed=config.seed)
    return {
        "recall": recall.value,
        "recall_ci": [recall.low, recall.high],
        "recall_queries": recall.queries,
        "partitions": 1,
        "cross_edges": 0,
    }
