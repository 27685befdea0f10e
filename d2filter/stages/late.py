"""What a ranking has to know of the whole pool before it begins: the unit of distances, and which
samples rank last (`algorithm/late.py`). Counts and edges between copies travel, samples do not.

ranking-work/upper-00000.*       counts of sqdist and of difficulty, see `quantile`; and
                                 lower-00000.*
ranking-work/near-00000.*        edges between copies that begin in a part
ranking-work/copies.ids.npy      graph ids, ascending, of those that a better copy stands for
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import late, quantile
from d2filter.config import RankConfig
from d2filter.formats import graph
from d2filter.formats.paths import Folder
from d2filter.formats.rows import read_array, read_columns, write_columns
from d2filter.stages.worker import Report

Figures = dict[str, Any]
I64 = npt.NDArray[np.int64]

WORK = "ranking-work"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What all partitions of a ranking share."""

    k: int
    """neighbors of each list that count"""
    unit: float = 1.0
    """squared distance that gamma is in units of"""
    above: float | None = None
    """samples of higher difficulty rank last"""
    copies: int = 0
    """samples in copies.ids.npy, which rank last"""


def settle(each: Any, run: Any, out: Folder, config: RankConfig, k: int, total: int) -> Settled:
    """Find what `config` asks for. each(label, task, **arguments) runs a task on every part, run
    does so on none in particular; both return figures.
    """
    cut = late.cut_size(total, config.cut_hardest)
    median = config.gamma_scale == "median"
    unit, above, copies = 1.0, None, 0
    if cut or median:
        wanted = {"k": k, "distances": median, "difficulties": bool(cut)}
        each("upper", count_upper, **wanted)
        upper = _summed(out, "upper")
        places: dict[str, tuple[int, int]] = {}
        if cut:
            places["difficulty"] = quantile.locate(upper["difficulty"], total - 1 - cut)
        edges = int(upper["sqdist"].sum())
        if edges:
            places["sqdist"] = quantile.locate(upper["sqdist"], (edges - 1) // 2)
        each("lower", count_lower, **wanted, bins={name: at for name, (at, _) in places.items()})
        lower = _summed(out, "lower")
        values = {
            name: quantile.value_of(at, quantile.locate(lower[name], rest)[0])
            for name, (at, rest) in places.items()
        }
        unit, above = values.get("sqdist", 1.0), values.get("difficulty")
    if config.collapse_copies is not None:
        each("near", near, k=k, most=config.collapse_copies, above=above)
        copies = run("copies", join_copies, above=above)["copies"]
    return Settled(k=k, unit=unit, above=above, copies=copies)


def late_rows(
    out: Folder, number: int, difficulty: npt.NDArray[np.float32], settled: Settled
) -> Any:
    """Which rows of a part rank last, (n,) bool."""
    rows = np.zeros(difficulty.size, np.bool_)
    if settled.above is not None:
        rows = difficulty > np.float32(settled.above)
    if settled.copies:
        starts = graph.starts(out.sub("graph"))
        ids = read_array(out.sub(WORK), "copies.ids.npy")
        some = ids[np.searchsorted(ids, starts[number]) : np.searchsorted(ids, starts[number + 1])]
        rows[some - starts[number]] = True
    return rows


def count_upper(
    *, report: Report, out: Folder, number: int, k: int, distances: bool, difficulties: bool
) -> Figures:
    """Task: upper halves of the keys of a part."""
    values = _values(out, number, k, distances=distances, difficulties=difficulties)
    counts = {name: quantile.upper_counts(some) for name, some in values.items()}
    write_columns(out.sub(WORK), f"upper-{number:05d}", **counts)
    report(values["difficulty"].size)
    return {}


def count_lower(
    *, report: Report, out: Folder, number: int, k: int, distances: bool, difficulties: bool,
    bins: dict[str, int],
) -> Figures:  # fmt: skip
    """Task: lower halves of those that share the upper half of what is looked for."""
    values = _values(out, number, k, distances=distances, difficulties=difficulties)
    counts = {
        name: quantile.lower_counts(some, bins.get(name, -1)) for name, some in values.items()
    }
    write_columns(out.sub(WORK), f"lower-{number:05d}", **counts)
    report(values["difficulty"].size)
    return {}


def near(
    *, report: Report, out: Folder, number: int, k: int, most: float, above: float | None
) -> Figures:
    """Task: edges of a part between copies."""
    held = graph.read_columns(out.sub("graph"), number, "difficulty", "neighbors", "sqdist")
    row, target = late.near(held["neighbors"][:, :k], held["sqdist"][:, :k], most)
    if above is not None:
        stays = held["difficulty"][row] <= np.float32(above)
        row, target = row[stays], target[stays]
    source = graph.starts(out.sub("graph"))[number] + row
    write_columns(out.sub(WORK), f"near-{number:05d}", source=source, target=target)
    report(held["difficulty"].size)
    return {"edges": int(source.size)}


def join_copies(*, report: Report, out: Folder, above: float | None) -> Figures:
    """Task: which copies a better one stands for. Holds the edges between copies of the pool, and
    about 50 bytes for each of their ends.
    """
    starts = graph.starts(out.sub("graph"))
    parts = len(starts) - 1
    edges = [read_columns(out.sub(WORK), f"near-{p:05d}", "source", "target") for p in range(parts)]
    source = np.concatenate([some["source"] for some in edges])
    target = np.concatenate([some["target"] for some in edges])
    del edges
    ids = np.unique(np.concatenate([source, target]))
    cuts = np.searchsorted(ids, starts)
    known: dict[str, list[Any]] = {"difficulty": [], "uid_hi": [], "uid_lo": []}
    for p in range(parts):
        mine = ids[cuts[p] : cuts[p + 1]] - starts[p]
        if mine.size:
            columns = graph.read_columns(out.sub("graph"), p, *known)
            for name, values in columns.items():
                known[name].append(values[mine])
    difficulty, hi, lo = (
        np.concatenate([np.empty(0, kind), *known[name]])
        for name, kind in (("difficulty", np.float32), ("uid_hi", np.uint64), ("uid_lo", np.uint64))
    )
    if above is not None:
        stays = difficulty <= np.float32(above)
        both = stays[np.searchsorted(ids, source)] & stays[np.searchsorted(ids, target)]
        source, target = source[both], target[both]
        left = np.isin(ids, np.concatenate([source, target]))
        difficulty, hi, lo = difficulty[left], hi[left], lo[left]
    found = late.copies(source, target, difficulty, hi, lo)
    write_columns(out.sub(WORK), "copies", ids=found)
    report(int(starts[-1]))
    return {"copies": int(found.size)}


def _values(
    out: Folder, number: int, k: int, *, distances: bool, difficulties: bool
) -> dict[str, npt.NDArray[np.float32]]:
    """What is counted of a part."""
    folder = out.sub("graph")
    difficulty, sqdist = np.empty(0, np.float32), np.empty(0, np.float32)
    if difficulties:
        difficulty = graph.read_columns(folder, number, "difficulty")["difficulty"]
    if distances:
        sqdist = late.apart(graph.read_columns(folder, number, "sqdist")["sqdist"][:, :k])
    return {"difficulty": difficulty, "sqdist": sqdist}


def _summed(out: Folder, stem: str) -> dict[str, I64]:
    parts = len(graph.starts(out.sub("graph"))) - 1
    total: dict[str, I64] = {}
    for number in range(parts):
        for name, counts in read_columns(
            out.sub(WORK), f"{stem}-{number:05d}", "difficulty", "sqdist"
        ).items():
            total[name] = total.get(name, 0) + counts
    return total
