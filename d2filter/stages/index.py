"""Catalog → index/centroids.npy and the number of probes (DESIGN §4.1, §4.7)."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2filter.algorithm import backend, features, knn
from d2filter.config import GraphConfig
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.stages.runner import Report, assigned_cpus

CENTROIDS = "centroids.npy"


def load_pool(out: Folder) -> tuple[knn.Pool, features.F32]:
    """A whole catalog and its difficulty (n,), for a task that then uses the CPUs it was given.

    Memory: 2·d + 60 bytes a sample; while it loads, twice the features.
    """
    backend.use_threads(assigned_cpus())
    parts = list(catalog.iter_parts(out.sub("catalog")))
    pool = knn.make_pool(
        # one writable array: compiled code is made anew for read-only ones
        np.concatenate([p.features for p in parts]),
        np.concatenate([p.hi for p in parts]),
        np.concatenate([p.lo for p in parts]),
    )
    return pool, np.concatenate([p.difficulty for p in parts])


def train(*, report: Report, out: Folder, config: GraphConfig) -> dict[str, Any]:
    """Task: train and calibrate. Figures: nlist, nprobe."""
    pool, _ = load_pool(out)
    index = knn.train_index(
        pool,
        config.n_neighbors,
        target_recall=config.target_recall,
        exact_below=config.exact_below,
        seed=config.seed,
    )
    with out.sub("index").publish(CENTROIDS) as path, path.open("wb") as stream:
        np.save(stream, index.centroids)
    return {"nlist": len(index.centroids), "nprobe": index.probes}
