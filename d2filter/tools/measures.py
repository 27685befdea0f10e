"""Computes the measures of a finished run that the report shows.

Some are counted over all ranked samples; the others are measured on m of them, which a hash of the
uid chooses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import budget, features
from d2filter.algorithm.measures import coverage, distinct
from d2filter.algorithm.methods import baselines
from d2filter.config import RankConfig, SelectConfig
from d2filter.errors import InputError
from d2filter.formats import ledger
from d2filter.formats import subset as subsets
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import RunState
from d2filter.tools import sweep
from d2filter.tools.sampled import Drawn, Ends, Rule, features_of, kept_ids, read

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CLIP_SCORE = "CLIP score"
FEWEST = 2
"""fewest ranked samples that can be measured"""
_FRACTIONS = tuple(Decimal(f) for f in ("0.05", "0.1", "0.2", "0.3", "0.4", "0.5", "0.7", "0.9"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """Measures of one subset of the m samples, such as that of the run or of the score alone."""

    name: str
    kept: Bools
    """(m,)"""
    nearest: F64
    """(q,) distance of each watched group to the nearest kept sample, 0 if a member is kept"""
    measured: distinct.Measured
    score: float
    """mean score of the kept samples, as in the metadata"""

    @property
    def coverage(self) -> float:
        """Coverage of distinct groups."""
        return self.measured.coverage


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Measures of one ranking at several fractions."""

    name: str
    fractions: tuple[float, ...]
    coverage: tuple[float, ...]
    score: tuple[float, ...]
    """mean score of the kept samples, as in the metadata"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """Regions of the pool, (c,) each, by ascending share of kept samples."""

    center: tuple[str, ...]
    """uid of the sample in the middle"""
    size: I64
    """number of samples"""
    share: F64
    """share of kept samples"""
    score: F64
    """mean score, as in the metadata"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """All measures of a finished run. m: number of samples that are measured."""

    records: dict[str, dict[str, Any]]
    """records of the stages, by stage"""
    stats: dict[str, Any]
    """content of stats.json"""
    reasons: dict[str, dict[str, int]]
    """counts of samples that were not ranked, by reason, see `ledger.count_reasons`"""
    method: str
    setting: str
    """name of the setting in `sweep`, see `sweep.label`"""
    score: str
    """name of the score"""
    rule: Rule
    ranked: int
    first: Ends
    last: Ends
    drawn: Drawn
    near: float
    """squared distance up to which samples are near-copies"""
    groups: int
    """number of distinct groups among the m samples"""
    crowding: distinct.Crowding
    """of the kept samples among the m; their lists contain neighbors from the whole pool"""
    exact_copies: tuple[int, int]
    """number of samples of the whole pool with an exact copy, and number of kept samples with a
    kept exact copy"""
    shared_caption: tuple[int, str] | None
    """number of the m samples that have the most frequent text embedding, and the first uid of
    them; None if features contain no text half"""
    own: Subset
    by_score: Subset
    at_random: Subset
    everything: Subset
    curves: tuple[Curve, ...]
    cells: Cells
    swept: tuple[sweep.Row, ...]
    """rows that `d2filter sweep` has stored for this graph"""

    @property
    def whole(self) -> bool:
        """Whether all ranked samples are measured."""
        return len(self.drawn.hi) == self.ranked

    @property
    def raw(self) -> F32:
        """Scores as in the metadata, (m,)."""
        return self.rule.raw(self.drawn.difficulty)

    @property
    def share(self) -> float:
        """Share of the ranked samples that is kept."""
        return float(self.stats["samples"]["kept"]) / self.ranked


def measure(folder: Folder, ends: int) -> Measures:
    """Compute the measures of a finished run. ends: number of samples to list from the first ranks,
    and from the last ones.

    Raises RunStateError if the run is not finished, InputError for less than FEWEST samples.
    """
    state = RunState(folder)
    records = {stage: state.require(stage) for stage in ("catalog", "graph", "rank", "select")}
    embedded = state.done("embed")
    stats: dict[str, Any] = folder.read_json("stats.json")
    ranked = int(stats["samples"]["ranked"])
    if ranked < FEWEST:
        raise InputError(f"{folder.url} has {ranked} ranked sample, a report needs {FEWEST}")
    score = records["catalog"]["stats"]["score"]
    chosen = SelectConfig.from_options(records["select"]["options"])
    size = int(records["select"]["stats"]["budget"])
    rule = Rule(
        size=size,
        min_score=chosen.min_score,
        kept_first=score["kept_first"],
        pairs=None if chosen.soft is None else subsets.pairs(subsets.read(folder)),
    )
    among_all = kept_ids(folder, ranked, rule)
    pool, among, exact, first, last = read(folder, ranked, ends, among_all)
    drawn = Drawn(**pool, features=features_of(folder, pool["hi"], pool["lo"]))
    kept = drawn.kept
    method = records["rank"]["options"]["method"]
    name = "D2" if method == "d2" else method
    score_label = score_name(score)
    if score_label in (name, "random", "everything"):  # a column may have any name
        score_label = f"column {score_label}"
    by_score = baselines.by_score(drawn.difficulty, drawn.hi, drawn.lo)
    at_random = baselines.at_random(drawn.hi, drawn.lo)
    raw = rule.raw(drawn.difficulty)
    count = sweep.cell_count(len(drawn.hi))
    cell = coverage.cells(drawn.features, drawn.hi, drawn.lo, count)
    yardstick = distinct.Yardstick(
        drawn.features, drawn.hi, drawn.lo, drawn.difficulty, drawn.neighbors, drawn.sqdist,
        watched=sweep.WATCHED,
    )  # fmt: skip

    def subset(name: str, kept: Bools) -> Subset:
        nearest = yardstick.distances(kept)
        return Subset(
            name=name, kept=kept, nearest=nearest, measured=yardstick.measure(kept, nearest),
            score=_mean(raw, kept),
        )  # fmt: skip

    def curve(name: str, order: I64) -> Curve:
        budgets = [f for f in _FRACTIONS if budget.floor_of(f, order.size)]
        prefixes = [_first(order, budget.floor_of(f, order.size)) for f in budgets]
        return Curve(
            name=name,
            fractions=tuple(float(f) for f in budgets),
            coverage=tuple(
                distinct.closeness(yardstick.distances(one), yardstick.unit) for one in prefixes
            ),
            score=tuple(_mean(raw, one) for one in prefixes),
        )

    # one curve for each name: the run's own method may be `random`
    rankings = {
        "random": at_random,
        score_label: by_score,
        name: np.argsort(drawn.rank, kind="stable"),
    }
    size = int(kept.sum())
    return Measures(
        records={**({"embed": embedded} if embedded else {}), **records},
        stats=stats,
        reasons=ledger.count_reasons(folder),
        method=name,
        setting=sweep.label(
            _with_user_settings(RankConfig.from_options(records["rank"]["options"]))
        ),
        score=score_label,
        rule=rule,
        ranked=ranked,
        first=first,
        last=last,
        drawn=drawn,
        near=yardstick.near,
        groups=yardstick.groups.representative.size,
        exact_copies=exact,
        shared_caption=_shared_caption(records["catalog"]["options"], drawn),
        crowding=distinct.crowding_of(among, drawn.sqdist[kept], yardstick.near, yardstick.unit),
        own=subset(name, kept),
        by_score=subset(score_label, _first(by_score, size)),
        at_random=subset("random", _first(at_random, size)),
        everything=subset("everything", np.ones(kept.size, np.bool_)),
        curves=tuple(curve(n, order) for n, order in rankings.items()),
        cells=_cells(drawn, raw, cell, count),
        swept=tuple(sweep.measured(folder)),
    )


def score_name(score: dict[str, str]) -> str:
    """The name of a run's score for people."""
    name = score["name"]
    is_clip = name == "clip_score" or (
        name.startswith("clip_") and name.endswith("_similarity_score")
    )
    return CLIP_SCORE if is_clip else name


def _with_user_settings(config: RankConfig) -> RankConfig:
    """The configuration with `gamma_forward` only if it differs: a record always contains both."""
    return replace(config, gamma_forward=None) if config.gamma_forward == config.gamma else config


def _shared_caption(options: dict[str, Any], drawn: Drawn) -> tuple[int, str] | None:
    if options["feature_type"] != "image|text" or options["feature_keys"]:
        return None
    copies = features.group_copies(drawn.features[:, drawn.features.shape[1] // 2 :])
    sizes = np.diff(copies.start)
    most = int(sizes.argmax())
    row = copies.first[most : most + 1]
    return int(sizes[most]), uid_format.to_hex(drawn.hi[row], drawn.lo[row])[0]


def _mean(raw: F32, kept: Bools) -> float:
    return float(raw[kept].mean(dtype=np.float64)) if kept.any() else math.nan


def _first(order: I64, size: int) -> Bools:
    kept = np.zeros(order.size, np.bool_)
    kept[order[:size]] = True
    return kept


def _cells(drawn: Drawn, raw: F32, cell: I64, count: int) -> Cells:
    centers = coverage.centers(drawn.hi, drawn.lo, count)
    size = np.bincount(cell, minlength=centers.size)
    there = np.flatnonzero(size)
    share = np.bincount(cell, drawn.kept, centers.size)[there] / size[there]
    score = np.bincount(cell, raw, centers.size)[there] / size[there]
    order = np.lexsort((there, share))
    chosen = centers[there[order]]
    return Cells(
        center=tuple(uid_format.to_hex(drawn.hi[chosen], drawn.lo[chosen])),
        size=size[there[order]],
        share=share[order],
        score=score[order],
    )
