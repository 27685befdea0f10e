"""Clips the scores of a catalog, and checks that min–max scaling keeps them apart.

One extreme score can make all others equal after scaling. This causes an alert, or an error if too
many distinct scores become the same number. `--clip-scores` solves it: it raises the lowest scores
and lowers the highest ones in catalog/part-*.parquet.

catalog/spread/LABEL-00000.*   counts of a part, where the histograms of `part_figures` are too
                               coarse to find the score at a position
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import quantile, uids
from d2filter.algorithm.scores import clipping
from d2filter.engine.stage_run import StageRun, TaskFunction
from d2filter.engine.task import Figures, Report
from d2filter.errors import InputError
from d2filter.formats import catalog
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.reading import CatalogConfig
from d2filter.formats.rows import read_columns, write_columns

I64 = npt.NDArray[np.int64]

FOLDER = "spread"
_BINS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The score at a position in the order of all scores."""

    value: float
    below: int
    """number of samples with lower scores"""
    above: int
    """number of samples with higher scores"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedScores:
    """The result of `clip`."""

    figures: Figures
    """figures of the stage: difficulty, and clipped if scores were clipped"""
    alerts: list[str]


def part_figures(hi: uids.U64, lo: uids.U64, difficulty: npt.NDArray[np.float32]) -> Figures:
    """Figures of a part whose rows ascend by uid: the number of samples, the extremes of difficulty
    with their smallest uids, and a histogram of the upper halves of keys, as [halves, counts].
    """
    if not difficulty.size:
        return {"ranked": 0, "min": None, "max": None, "ends": None, "upper": [[], []]}
    ends = [int(difficulty.argmin()), int(difficulty.argmax())]
    counts = quantile.upper_counts(difficulty)
    halves = np.flatnonzero(counts)
    return {
        "ranked": difficulty.size,
        "min": float(difficulty[ends[0]]),
        "max": float(difficulty[ends[1]]),
        "ends": uid_format.to_hex(hi[ends], lo[ends]),
        "upper": [halves.tolist(), counts[halves].tolist()],
    }


def clip(steps: StageRun, config: CatalogConfig, parts: list[Figures], name: str) -> ClippedScores:
    """Clip the scores if `--clip-scores` is given, and judge them. parts: `part_figures` of each
    part, with at least one sample in all; name: name of the score.

    Raises InputError if too many distinct scores become equal by scaling, so that only their uids
    would rank them.
    """
    clipped: Figures = {}
    if config.clip_scores:
        places = clipping.places(_total(parts), config.clip_scores)
        ((low, high),) = _values(steps, "ends", parts, [places])
        done = _each(steps, "clip", clip_part, len(parts), low=low.value, high=high.value)
        parts = [{**before, **now} for before, now in zip(parts, done, strict=True)]
        clipped = {
            "clipped": {
                "from": config.raw(low.value), "to": config.raw(high.value),
                "samples": low.below + high.above,
            }
        }  # fmt: skip
    alerts = _judge(steps, config, parts, name)
    there = [f for f in parts if f["ranked"]]
    ends = [min(f["min"] for f in there), max(f["max"] for f in there)]
    figures = {"difficulty": {"min": ends[0], "max": ends[1]}, **clipped}
    return ClippedScores(figures=figures, alerts=alerts)


def tidy(out: Folder) -> None:
    """Remove the intermediate files. Call it after the stage is recorded: a rerun reads them."""
    out.sub("catalog").remove(FOLDER)


def _each(steps: StageRun, label: str, run: TaskFunction, parts: int, **same: Any) -> list[Figures]:
    """Run a task for each part; files of counts have its label in their names."""
    every = [{"number": part} for part in range(parts)]
    return steps.each(label, run, every, {"label": label, **same})


def _judge(steps: StageRun, config: CatalogConfig, parts: list[Figures], name: str) -> list[str]:
    there = [f for f in parts if f["ranked"]]
    low, low_uid = min((f["min"], f["ends"][0]) for f in there)
    high = max(f["max"] for f in there)
    high_uid = min(f["ends"][1] for f in there if f["max"] == high)
    if clipping.surely_wide(_upper(parts), low, high):
        return []
    n = _total(parts)
    found = _values(steps, "places", parts, [clipping.places(n, tail) for tail in clipping.TAILS])
    tails = [(first.value, last.value) for first, last in found]
    squeezed = clipping.judge(n, low, high, dict(zip(clipping.TAILS, tails, strict=True)))
    if squeezed is None:
        return []
    extreme, uid = (low, low_uid) if squeezed.at_low_end else (high, high_uid)
    a, b = sorted(config.raw(value) for value in squeezed.middle)
    warning = (
        f"the middle {100 - 200 * squeezed.share:.0f}% of {n:,} scores ({name}) lie from {a:g} to "
        f"{b:g}, less than 1% of a range that reaches to {config.raw(extreme):g} of uid {uid}"
    )
    cure = f"mend or drop such scores, or clip them with --clip-scores {squeezed.clip}"
    if clipping.few_units(squeezed.middle, low, high):
        ends = {"middle": squeezed.middle, "low": low, "high": high}
        _each(steps, "units", count_units, len(parts), **ends)
        shared, total, too_many = clipping.collapsed(
            clipping.joined([tuple(c.values()) for c in _columns(steps.out, "units", len(parts))])
        )
        if too_many:
            raise InputError(
                f"{warning}: {shared:,} of those {total:,} samples get the score of another one "
                f"after scaling although theirs differ, so that only uids would rank them: {cure}"
            )
    return [f"{warning}, so that they hardly differ after scaling: {cure}"]


def _total(parts: Iterable[Figures]) -> int:
    return sum(f["ranked"] for f in parts)


def _upper(parts: Iterable[Figures]) -> I64:
    counts = np.zeros(_BINS, np.int64)
    for f in parts:
        halves, some = f["upper"]
        counts[halves] += np.array(some, np.int64)
    return counts


def _values(
    steps: StageRun, label: str, parts: list[Figures], places: list[tuple[int, int]]
) -> list[tuple[Placed, Placed]]:
    """The scores at pairs of positions in the order of all scores of the pool."""
    upper = _upper(parts)
    located = [[quantile.locate(upper, place) for place in pair] for pair in places]
    halves = sorted({half for pair in located for half, _ in pair})
    _each(steps, label, count_lower, len(parts), halves=halves)
    lower = {half: np.zeros(_BINS, np.int64) for half in halves}
    for counted in _columns(steps.out, label, len(parts)):
        for half in halves:
            mine = counted["key"] >> 16 == half
            lower[half][counted["key"][mine] & (_BINS - 1)] += counted["count"][mine]

    def placed(half: int, rest: int) -> Placed:
        at = quantile.locate(lower[half], rest)[0]
        below = int(upper[:half].sum() + lower[half][:at].sum())
        above = int(upper.sum()) - below - int(lower[half][at])
        return Placed(value=quantile.value_of(half, at), below=below, above=above)

    return [(placed(*first), placed(*last)) for first, last in located]


def _columns(out: Folder, label: str, parts: int) -> Iterable[dict[str, Any]]:
    names = ("unit", "samples", "least", "most") if label == "units" else ("key", "count")
    for number in range(parts):
        yield read_columns(out.sub("catalog"), f"{FOLDER}/{label}-{number:05d}", *names)


def count_lower(
    *, report: Report, out: Folder, number: int, label: str, halves: list[int]
) -> Figures:
    """Task: count the scores of a part for each key whose upper half is in `halves`."""
    _, _, difficulty = catalog.read_ids(out.sub("catalog"), number)
    key, count = quantile.keys_counted(difficulty, halves)
    write_columns(out.sub("catalog"), f"{FOLDER}/{label}-{number:05d}", key=key, count=count)
    report(difficulty.size)
    return {}


def count_units(
    *, report: Report, out: Folder, number: int, label: str, middle: clipping.Ends, low: float,
    high: float,
) -> Figures:  # fmt: skip
    """Task: write `clipping.shared_units` of a part."""
    _, _, difficulty = catalog.read_ids(out.sub("catalog"), number)
    unit, samples, least, most = clipping.shared_units(difficulty, middle, low, high)
    write_columns(
        out.sub("catalog"), f"{FOLDER}/{label}-{number:05d}", unit=unit, samples=samples,
        least=least, most=most,
    )  # fmt: skip
    report(difficulty.size)
    return {}


def clip_part(
    *, report: Report, out: Folder, number: int, label: str, low: float, high: float
) -> Figures:
    """Task: rewrite a part with its scores clipped to [low, high]. Repeating it changes nothing."""
    folder = out.sub("catalog")
    samples = catalog.read_part(folder, number)
    difficulty = np.clip(samples.difficulty, np.float32(low), np.float32(high))
    sums = catalog.publish_table(folder, number, replace(samples, difficulty=difficulty))
    report(difficulty.size)
    return {
        **part_figures(samples.hi, samples.lo, difficulty),
        "checksums": sums,
    }
