"""Catalog → index/centroids.npy and the number of probes (DESIGN §4.1, §4.7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from d2filter.algorithm import backend, features, knn, uids
from d2filter.config import GraphConfig
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.stages.runner import Report, assigned_cpus

CENTROIDS = "centroids.npy"


@dataclass(frozen=True, slots=True)
class Pool:
    """A whole catalog in memory, ascending by uid."""

    hi: uids.U64
    lo: uids.U64
    difficulty: features.F32
    rows: features.F16


def load_pool(out: Folder) -> Pool:
    """Read all parts of a catalog, for a task that then uses the CPUs it was given.

    Memory: 2·d + 20 bytes a sample, while it loads twice that.
    """
    backend.use_threads(assigned_cpus())
    parts = list(catalog.iter_parts(out.sub("catalog")))
    return Pool(
        hi=np.concatenate([p.hi for p in parts]),
        lo=np.concatenate([p.lo for p in parts]),
        difficulty=np.concatenate([p.difficulty for p in parts]),
        # one writable array: compiled code is made anew for read-only ones
        rows=np.concatenate([p.features for p in parts]),
    )


def train(*, report: Report, out: Folder, config: GraphConfig) -> dict[str, Any]:
    """Task: train and calibrate. Figures: nlist, nprobe."""
    pool = load_pool(out)
    index = knn.train_index(
        knn.make_pool(pool.rows, pool.hi, pool.lo),
        config.n_neighbors,
        target_recall=config.target_recall,
        exact_below=config.exact_below,
        seed=config.seed,
    )
    with out.sub("index").publish(CENTROIDS) as path, path.open("wb") as stream:
        np.save(stream, index.centroids)
    return {"nlist": len(index.centroids), "nprobe": index.probes}
