"""The score of each row of a metadata pair: from its column, from its embeddings, or from terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.algorithm.scores import registry as scores
from d2filter.algorithm.scores.terms import Term, combined
from d2filter.errors import InputError
from d2filter.formats import columns, tables
from d2filter.formats.reading import CatalogConfig
from d2filter.formats.side_inputs import Outside

F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Merged = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Scores of n rows, before their sign is turned."""

    difficulty: F32
    """(n,); of a score that waits for the pool 0, or what its values have that is not finite"""
    terms: F32 | None
    """(n, terms) values of a score that waits for the pool; 0 where the pool makes them"""
    logged: Bools
    """(n,) whether the training log has them"""
    listed: Bools
    """(n,) whether the score file has them"""
    merged: Merged
    """see `metadata.MetadataRows`"""


def arrays_of(config: CatalogConfig, terms: Sequence[Term]) -> list[str]:
    """Arrays that the computed terms of a score need in each pair, in the order of need."""
    image, text = f"{config.arch}_img", f"{config.arch}_txt"
    needs = {scores.SCORES[t.name].needs for t in terms if t.name in scores.SCORES}
    return [image, text] if "pair" in needs else [image] if "target" in needs else []


def columns_of(terms: Sequence[Term], outside: Outside) -> list[str]:
    """Columns of the metadata that a score needs."""
    held = outside.scored.columns if outside.scored is not None else ()
    names = dict.fromkeys(term.name for term in terms)
    return [name for name in names if name not in scores.SCORES and name not in held]


def of_terms(
    config: CatalogConfig,
    terms: Sequence[Term],
    outside: Outside,
    table: Any,
    arrays: Mapping[str, npt.NDArray[Any]],
    ids: tuple[uids.U64, uids.U64],
    where: str,
) -> Scored:
    """Scores of the rows of a pair by terms. table, arrays: what it holds. ids: hi and lo of the
    rows. where: its parquet file, for messages. Raises ValueError for an unknown score.
    """
    n = table.num_rows
    logged, listed = np.ones(n, np.bool_), np.ones(n, np.bool_)
    held: dict[str, F32] = {}
    if outside.scored is not None:
        listed, held = outside.scored.find(*ids)
    lost = distinct = 0
    values: list[F32] = []
    for name in (term.name for term in terms):
        score = scores.SCORES.get(name)
        if score is None and name in held:
            value = held[name]
        elif score is None:
            value, merged = columns.as_float32(table.column(name), f"{where}: column {name}")
            lost, distinct = lost + merged[0], distinct + merged[1]
        elif score.needs == "pool":
            value = np.zeros(n, np.float32)
        elif score.needs == "log":
            value, there = _of_log(outside, name, ids)
            logged &= there
        else:
            value = computed(score, config, outside, arrays, where)
        values.append(value)
    difficulty = combined(terms, values)
    matrix = None
    if config.waits:
        matrix = np.stack(values, axis=1)
        # what is not finite is judged now, whatever its rank would be
        broken = ~np.isfinite(matrix).all(axis=1)
        worst = np.where(np.isnan(matrix).any(axis=1), np.nan, np.inf)
        difficulty = np.where(broken, worst, 0).astype(np.float32)
    return Scored(
        difficulty=difficulty, terms=matrix, logged=logged, listed=listed, merged=(lost, distinct)
    )


def computed(
    score: scores.Score,
    config: CatalogConfig,
    outside: Outside,
    arrays: Mapping[str, npt.NDArray[Any]],
    where: str,
) -> F32:
    """A score of a pair, or of an image and the target set, (n,) float32. where: the pair's parquet
    file, for messages. Raises InputError for embeddings of two models, ValueError for a score
    that nothing computes.
    """
    compute = scores.function_of(score.name)
    image, text = f"{config.arch}_img", f"{config.arch}_txt"
    npz = f"{where.removesuffix('.parquet')}.npz"
    other = outside.target if score.needs == "target" else arrays[text]
    assert other is not None
    widths = (arrays[image].shape[1], other.shape[1])
    if widths[0] != widths[1] and score.needs == "target":
        raise InputError(
            f"score-target {config.score_target} has embeddings of dimension {widths[1]}, "
            f"{image} of {npz} has dimension {widths[0]}: use one model"
        )
    if widths[0] != widths[1]:
        raise InputError(
            f"{npz}: {image} has dimension {widths[0]} and {text} {widths[1]}: the score needs "
            "both from one model; or give a --score-column"
        )
    return np.asarray(compute(arrays[image], other), np.float32)


def missing_column(where: str, name: str, there: Sequence[str]) -> InputError:
    """Of a term of the score that a file of the metadata does not have."""
    return InputError(
        f"{where} has no column {name!r}{tables.nearest(name, there)}, which --score needs; it "
        f"has {tables.listed(there)}"
    )


def _of_log(outside: Outside, name: str, ids: tuple[uids.U64, uids.U64]) -> tuple[F32, Bools]:
    """Scores of a training log, NaN where it has none, and whether it has one."""
    log = outside.logs[name]
    at = uids.positions(log.hi, log.lo, *ids)
    return np.where(at >= 0, log.value[at], np.nan).astype(np.float32), at >= 0
