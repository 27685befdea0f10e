"""Computes scores that need the whole pool, after the catalog's parts are written.

Such terms are negclip_loss, prototypicality and percentile ranks. The result replaces the
difficulty in catalog/part-*.parquet. Batches are chosen by a hash of the uid and sorted by it, and
ranks are computed from counts, so that files and parts cannot change a score.

catalog/scores/terms-00000.npy    values of the terms that need no pool; 0 for the others
catalog/scores/centroids.npy      for prototypicality: trained on hash-chosen samples
catalog/scores/value-00000.*      negclip_loss of the batches of one task: row, value; start by part
catalog/scores/whole-00000.npy    values of all terms, if some are ranked
catalog/scores/keys-00000.t0.*    of a ranked term: distinct keys of a part, and their counts
catalog/scores/pool.t0.*          the same of the pool, and how many values are below each
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import quantile, uids
from d2filter.algorithm.knn import cells, products
from d2filter.algorithm.scores import registry as scores
from d2filter.algorithm.scores import terms
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Report, assigned_cpus
from d2filter.errors import InputError
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.formats.reading import CatalogConfig
from d2filter.formats.rows import read_array, read_columns, write_array, write_columns
from d2filter.stages.catalog.clip_scores import part_figures
from d2filter.stages.graph.train import sample_by_hash

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

FOLDER = "scores"

_CLUSTERS = 1000
_ROWS_A_CLUSTER = 64  # that train it
KEYS_AT_ONCE = 4_000_000  # of the pool, at a time


def build(steps: StageRun, config: CatalogConfig) -> list[Figures]:
    """Compute the scores of all parts; returns `part_figures` of each."""
    folder = steps.out.sub("catalog")
    every = [{"number": part} for part in range(len(catalog.layout(folder).starts) - 1)]
    same = {"config": config}
    for one in _of_pool(config):
        some = every if one.in_parts else every[:1]
        steps.each(one.label, one.prepare, some, same, share_node=True)
    if any(term.ranked for term in config.terms):
        steps.each("count", count_values, every, same, share_node=True)
        steps.each("ranks", join_counts, every[:1], same, share_node=True)
    done = steps.each("score", score_part, every, same, share_node=True)
    folder.remove(FOLDER)
    return done


def write_terms(folder: Folder, number: int, values: F32) -> None:
    """Keep the values of the terms of a part for the score. folder: the catalog's. values: (n,
    terms).
    """
    write_array(folder, f"{FOLDER}/terms-{number:05d}.npy", values)


def train_centroids(*, report: Report, out: Folder, number: int, config: CatalogConfig) -> Figures:
    """Task: centroids of the pool. Figures: how many."""
    products.use_threads(assigned_cpus())
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
    products.use_threads(assigned_cpus())
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


def count_values(*, report: Report, out: Folder, number: int, config: CatalogConfig) -> Figures:
    """Task: the values of all terms of a part, and how often it has each of a ranked one."""
    products.use_threads(assigned_cpus())
    folder = out.sub("catalog")
    values = _values(folder, number, config)
    for at, term in enumerate(config.terms):
        if term.ranked:
            key, count = quantile.distinct(values[:, at])
            write_columns(folder, _keys(number, at), key=key, count=count)
    write_array(folder, f"{FOLDER}/whole-{number:05d}.npy", values)
    report(len(values))
    return {}


def join_counts(*, report: Report, out: Folder, number: int, config: CatalogConfig) -> Figures:
    """Task: how often the pool has each value of the ranked terms. Memory: 50 bytes for each."""
    folder = out.sub("catalog")
    layout = catalog.layout(folder)
    for at, term in enumerate(config.terms):
        if not term.ranked:
            continue
        parts = (
            read_columns(folder, _keys(part, at), "key", "count")
            for part in range(len(layout.starts) - 1)
        )
        key, count = terms.merged((part["key"], part["count"]) for part in parts)
        below = np.cumsum(count) - count
        write_columns(folder, f"{FOLDER}/pool.t{at}", key=key, count=count, below=below)
    report(layout.total)
    return {}


def score_part(*, report: Report, out: Folder, number: int, config: CatalogConfig) -> Figures:
    """Task: write one part with its new difficulty. Figures: smallest and largest."""
    products.use_threads(assigned_cpus())
    folder = out.sub("catalog")
    samples = catalog.read_part(folder, number)
    if any(term.ranked for term in config.terms):
        values = read_array(folder, f"{FOLDER}/whole-{number:05d}.npy")
    else:
        values = _values(folder, number, config)
    columns: list[npt.NDArray[Any]] = list(values.T)
    total = catalog.layout(folder).total
    for at, term in enumerate(config.terms):
        if term.ranked:
            columns[at] = _ranks(folder, at, quantile.keys(columns[at]), total)
    difficulty = scores.difficulty(terms.combined(config.terms, columns), config.first)
    if not np.isfinite(difficulty).all():
        raise InputError(f"score {config.score} is too large for float32: use smaller weights")
    table = replace(samples, difficulty=difficulty)
    sums = catalog.publish_table(folder, number, table)
    report(difficulty.size)
    return {**part_figures(samples.hi, samples.lo, difficulty), "checksums": sums}


def _values(folder: Folder, number: int, config: CatalogConfig) -> F32:
    """Values of all terms of a part, (n, terms)."""
    of_pool = [_pool_score(term.name) for term in config.terms]
    values: F32 = np.array(read_array(folder, f"{FOLDER}/terms-{number:05d}.npy"))
    layout = catalog.layout(folder)
    for at, one in enumerate(of_pool):
        if one is not None:
            values[:, at] = one.values(folder, layout, number, config)
    return values


def _of_pool(config: CatalogConfig) -> Iterator[PoolScore]:
    """The terms that need the pool, in the order of `POOL_SCORES`."""
    found = [one for one in (_pool_score(term.name) for term in config.terms) if one is not None]
    yield from (one for one in POOL_SCORES.values() if one in found)


def _pool_score(name: str) -> PoolScore | None:
    """How a score is computed from the pool; None: it does not need it. Raises ValueError if it
    needs it and nothing here computes it.
    """
    if name not in scores.SCORES or scores.SCORES[name].needs != "pool":
        return None
    if name not in POOL_SCORES:
        raise ValueError(f"score {name!r} needs the pool, and nothing here computes it")
    return POOL_SCORES[name]


def _to_centroids(
    folder: Folder, layout: Any, number: int, config: CatalogConfig
) -> npt.NDArray[np.float32]:
    """Distance of each sample of a part to the nearest centroid."""
    centroids = read_array(folder, f"{FOLDER}/centroids.npy")
    return scores.prototypicality(layout.part(number), centroids)


def _ranks(folder: Folder, at: int, keys: I64, total: int) -> npt.NDArray[np.float64]:
    """Percentile ranks of a term of a part. Some keys of the pool at a time."""
    stem = f"{FOLDER}/pool.t{at}"
    ranks = np.empty(keys.size, np.float64)
    order = np.argsort(keys, kind="stable")
    begin = done = 0
    while done < keys.size:
        rows = slice(begin, begin + KEYS_AT_ONCE)
        some = read_columns(folder, stem, "key", "count", "below", rows=rows)
        end = int(np.searchsorted(keys[order], some["key"][-1], side="right"))
        mine = order[done:end]
        pool = (some["key"], some["count"])
        ranks[mine] = terms.percentile(keys[mine], pool, some["below"], total)
        begin, done = begin + KEYS_AT_ONCE, end
    return ranks


def _keys(number: int, at: int) -> str:
    return f"{FOLDER}/keys-{number:05d}.t{at}"


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
    folder: Folder, layout: Any, number: int, config: CatalogConfig
) -> npt.NDArray[np.float64]:
    """Mean over the rounds of each row of a part, which the tasks hold in their order of turns."""
    rounds = config.score_rounds
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolScore:
    """How a score is computed that needs the whole pool: tasks that prepare it, then its values."""

    label: str
    """name of the tasks"""
    prepare: Callable[..., Figures]
    """a task; see `score_batches`"""
    in_parts: bool
    """whether there is a task for each part of the catalog, or one in all"""
    values: Callable[[Folder, Any, int, CatalogConfig], npt.NDArray[Any]]
    """values of one part, (n,), from the catalog's folder, its layout and the part's number"""


POOL_SCORES = {
    "negclip_loss": PoolScore(
        label="batches", prepare=score_batches, in_parts=True, values=_mean_of_rounds
    ),
    "prototypicality": PoolScore(
        label="centroids", prepare=train_centroids, in_parts=False, values=_to_centroids
    ),
}
"""by the name of a score whose `needs` is pool"""
