"""Scores that need the whole pool, between the catalog's parts and the graph: negclip_loss and
prototypicality. What they find replaces the difficulty in catalog/part-*.parquet.

catalog/scores/centroids.npy      prototypicality: trained on samples chosen by uid hash
catalog/scores/value-00000.*      negclip_loss of the batches of one task: row, value; start by part

Batches are chosen by a hash of the uid and sorted by it, so that neither files nor parts show.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import backend, cells, scores, uids
from d2filter.config import CatalogConfig
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.formats.rows import read_array, read_columns, write_array, write_columns
from d2filter.stages.index import sample_by_hash
from d2filter.stages.runner import Runner
from d2filter.stages.spread import part_figures
from d2filter.stages.worker import Report, Task, assigned_cpus

Figures = dict[str, Any]
I64 = npt.NDArray[np.int64]

FOLDER = "scores"

_CLUSTERS = 1000
_ROWS_A_CLUSTER = 64  # that train it


def build(
    runner: Runner, out: Folder, config: CatalogConfig, fingerprint: str, memory: int
) -> tuple[list[Figures], int]:
    """Score all parts anew; returns `part_figures` of each, and the peak memory of a task. Raises
    ValueError for a score that is not of the whole pool.
    """
    peaks: list[int] = []
    folder = out.sub("catalog")
    parts = len(catalog.layout(folder).starts) - 1

    def each(label: str, run: Any, count: int) -> list[Figures]:
        tasks = [
            Task(
                name=f"{label}-{number:05d}",
                run=run,
                arguments={"out": out, "number": number, "config": config},
            )
            for number in range(count)
        ]
        found = runner.map(
            "catalog", tasks, fingerprint=fingerprint, label=label, memory=memory,
            share_node=True,
        )  # fmt: skip
        peaks.extend(f["peak_rss_bytes"] for f in found)
        return found

    match config.score:
        case "negclip_loss":
            each("batches", score_batches, parts)
        case "prototypicality":
            each("centroids", train_centroids, 1)
        case _:
            raise _unknown(config)
    done = each("score", score_part, parts)
    folder.remove(FOLDER)
    return done, max(peaks)


def train_centroids(*, report: Report, out: Folder, number: int, config: CatalogConfig) -> Figures:
    """Task: centroids of the pool. Figures: how many."""
    backend.use_threads(assigned_cpus())
    folder = out.sub("catalog")
    layout = catalog.layout(folder)
    count = max(1, min(_CLUSTERS, layout.total // _ROWS_A_CLUSTER))
    salt = uids.SALT_PROTOTYPES
    chosen = sample_by_hash(layout, {salt: count * _ROWS_A_CLUSTER}, 0)[salt]
    found = cells.train(layout.gather(chosen), count).centroids
    write_array(folder, f"{FOLDER}/centroids.npy", found)
    report(layout.total)
    return {"centroids": len(found)}


def score_batches(*, report: Report, out: Folder, number: int, config: CatalogConfig) -> Figures:
    """Task: negclip_loss of a share of the batches. Memory: the features of as many samples as a
    part has, and those of a part.
    """
    backend.use_threads(assigned_cpus())
    folder = out.sub("catalog")
    layout = catalog.layout(folder)
    parts = len(layout.starts) - 1
    batches = scores.batches_for(layout.total, config.score_batch)
    first, end = number * batches // parts, (number + 1) * batches // parts
    rows: list[I64] = []
    values: list[npt.NDArray[np.float64]] = []
    for turn in range(config.score_rounds):
        mine, batch, held = _members(folder, layout, turn, batches, first, end)
        width = held.shape[1] // 2
        # parts and the rows in them ascend by uid: a stable sort leaves a batch in that order
        order = np.argsort(batch, kind="stable")
        bounds = np.searchsorted(batch[order], np.arange(first, end + 1))
        for at in range(end - first):
            some = order[bounds[at] : bounds[at + 1]]
            pairs = held[some]
            rows.append(mine[some])
            values.append(scores.negclip_loss(pairs[:, :width], pairs[:, width:]))
            report(some.size)
    row = np.concatenate([np.empty(0, np.int64), *rows])
    value = np.concatenate([np.empty(0), *values])
    # all rounds of a row one after the other: sums must not depend on the tasks
    order = np.argsort(row, kind="stable")
    write_columns(
        folder, f"{FOLDER}/value-{number:05d}", row=row[order], value=value[order],
        start=np.searchsorted(row[order], layout.starts),
    )  # fmt: skip
    return {}


def score_part(*, report: Report, out: Folder, number: int, config: CatalogConfig) -> Figures:
    """Task: write one part with its new difficulty. Figures: smallest and largest."""
    backend.use_threads(assigned_cpus())
    folder = out.sub("catalog")
    layout = catalog.layout(folder)
    samples = catalog.read_part(folder, number)
    values: npt.NDArray[Any]
    match config.score:
        case "negclip_loss":
            values = _mean_of_rounds(folder, layout, number, config.score_rounds)
        case "prototypicality":
            centroids = read_array(folder, f"{FOLDER}/centroids.npy")
            values = scores.prototypicality(samples.features, centroids)
        case _:
            raise _unknown(config)
    difficulty = scores.difficulty(values, config.first)
    table = replace(samples, difficulty=difficulty)
    sums = catalog.publish_table(folder, number, table)
    report(difficulty.size)
    return {**part_figures(samples.hi, samples.lo, difficulty), "checksums": sums}


def _unknown(config: CatalogConfig) -> ValueError:
    return ValueError(f"score {config.score!r} needs the pool, and nothing here computes it")


def _members(
    folder: Folder, layout: Any, turn: int, batches: int, first: int, end: int
) -> tuple[I64, I64, npt.NDArray[np.float16]]:
    """Row, batch and features of the samples of some batches, ascending by row."""
    rows, of, held = [], [], []
    for part in range(len(layout.starts) - 1):
        hi, lo, _ = catalog.read_ids(folder, part)
        batch = scores.batch_of(hi, lo, batches=batches, round=turn)
        inside = np.flatnonzero((batch >= first) & (batch < end))
        rows.append(layout.starts[part] + inside)
        of.append(batch[inside])
        held.append(layout.part(part)[inside])
    return np.concatenate(rows), np.concatenate(of), np.concatenate(held)


def _mean_of_rounds(
    folder: Folder, layout: Any, number: int, rounds: int
) -> npt.NDArray[np.float64]:
    """Mean over the rounds of each row of a part, which the tasks hold in their order of turns."""
    rows, values = [], []
    for task in range(len(layout.starts) - 1):
        stem = f"{FOLDER}/value-{task:05d}"
        start = read_array(folder, f"{stem}.start.npy")
        some = slice(int(start[number]), int(start[number + 1]))
        columns = read_columns(folder, stem, "row", "value", rows=some)
        rows.append(columns["row"])
        values.append(columns["value"])
    row, value = np.concatenate(rows), np.concatenate(values)
    # by value: which task found it must not decide the order of the sum
    order = np.lexsort((value, row))
    found: npt.NDArray[np.float64] = value[order].reshape(-1, rounds).sum(axis=1) / rounds
    return found
