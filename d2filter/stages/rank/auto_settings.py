"""Computes the settings of a ranking that depend on the whole pool, on the parts of a graph.

The settings are the hardest cut, the distance of near-copies, and gamma; they are equal to those of
`algorithm/greedy/auto_settings.py`, which needs the pool in memory. Tasks exchange only counts,
edges between near-copies, and some neighbor lists.

ranking-work/upper-00000.*       counts of distances and difficulties in a part, upper halves of
                                 their keys (see `quantile`); lower-00000.*: lower halves
ranking-work/near-00000.*        edges between near-copies whose source is in a part
ranking-work/copies.ids.npy      graph ids, ascending, of near-copies to demote
ranking-work/lists-00000.*       lists of a part from which gamma is computed: neighbors, sqdist,
                                 reach
ranking-work/asked.ids.npy       graph ids, ascending, of the neighbors in these lists
ranking-work/answers-00000.*     for those of them that are in a part: reach, last (demoted)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import quantile, sizes
from d2filter.algorithm.greedy import auto_gamma, auto_settings, demoted, local_kernel, near_copies
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Report
from d2filter.formats import graph
from d2filter.formats.paths import Folder
from d2filter.formats.rows import read_array, read_columns, write_columns

I64 = npt.NDArray[np.int64]

WORK = "ranking-work"

Resolved = auto_settings.Resolved


def resolve(
    steps: StageRun,
    requested: auto_settings.Requested,
    k: int,
    parts: int,
    total: int,
    facts: auto_settings.PoolFacts,
) -> Resolved:
    """Fit the requested settings to the pool, like `algorithm.greedy.auto_settings.resolve`.

    k: number of neighbors in each list that count. parts: of the graph. total: samples of the pool.
    """
    if total * k <= sizes.SETTLED_WHOLE:
        figures = steps.alone(
            "settle", resolve_whole, {"requested": requested, "k": k, "facts": facts}, total=total
        )
        return Resolved(**figures["resolved"])
    every = [{"number": number} for number in range(parts)]
    values, share = _places(steps, every, requested, k, total, facts)
    median_reach = values.get("reach", 0.0)
    most: float | None
    most = near_copies.threshold(median_reach) if requested.copies == "auto" else requested.copies
    above = values.get("difficulty")
    found = Resolved(
        k=k,
        gamma=0.0 if requested.gamma is None else requested.gamma,
        unit=values.get("sqdist", 1.0),
        floor=local_kernel.floor_of(median_reach),
        cut=str(share),
        above=above,
        copies_sqdist=most,
    )
    if most is not None:
        limits = {"k": k, "most": most, "above": above}
        steps.each("near", near, every, limits, total=total)
        joined = steps.alone("copies", join_copies, {"above": above}, total=total)
        found = replace(found, copies=joined["copies"])
    if requested.tunes:
        settled = {"k": k, "resolved": found}
        steps.each("lists", write_lists, every, settled, total=total)
        steps.alone("asked", gather_asked, {}, total=total)
        answers = steps.each("answers", answer, every, settled, total=total)
        arguments = {
            "requested": requested, "resolved": found, "total": total, "facts": facts,
            "last": sum(figures["last"] for figures in answers),
        }  # fmt: skip
        tuned = steps.alone("gamma", find_gamma, arguments, total=total)["tuned"]
        found = replace(found, gamma=tuned["gamma"], tuned=tuned)
    return found


def resolve_whole(
    *,
    report: Report,
    out: Folder,
    requested: auto_settings.Requested,
    k: int,
    facts: auto_settings.PoolFacts,
) -> Figures:
    """Task: compute all settings at once, for a graph that fits into memory. This replaces a task
    for each part and step.
    """
    whole = graph.read(out.sub("graph"))
    found, last = auto_settings.resolve(
        requested, whole.difficulty, whole.hi, whole.lo, whole.neighbors[:, :k],
        whole.sqdist[:, :k], facts,
    )  # fmt: skip
    if found.above is not None:
        last &= whole.difficulty <= np.float32(found.above)
    write_columns(out.sub(WORK), "copies", ids=np.flatnonzero(last))
    report(last.size)
    return {"resolved": asdict(found)}


def _places(
    steps: StageRun,
    every: Sequence[Figures],
    requested: auto_settings.Requested,
    k: int,
    total: int,
    facts: auto_settings.PoolFacts,
) -> tuple[dict[str, float], Decimal]:
    """Quantiles of the whole pool by name, and the share of the hardest samples to demote. every:
    arguments of the tasks of the parts.
    """
    share = requested.cut_hardest
    kinds = [
        name
        for name, needed in (
            ("difficulty", share is None or demoted.cut_size(total, share) > 0),
            ("sqdist", requested.median),
            ("reach", requested.reaches),
        )
        if needed
    ]
    if not kinds:
        return {}, share or Decimal(0)
    steps.each("upper", count_upper, every, {"k": k, "kinds": kinds}, total=total)
    upper = _summed(steps.out, "upper", kinds)
    if share is None:
        share = requested.auto_cut(upper["difficulty"], facts)
    cut = demoted.cut_size(total, share)
    places: dict[str, tuple[int, int]] = {}
    for name in kinds:
        held = int(upper[name].sum())
        if name == "difficulty":
            if cut:
                places[name] = quantile.locate(upper[name], total - 1 - cut)
        elif held:
            places[name] = quantile.locate(upper[name], (held - 1) // 2)
    bins = {name: at for name, (at, _) in places.items()}
    steps.each("lower", count_lower, every, {"k": k, "bins": bins}, total=total)
    lower = _summed(steps.out, "lower", list(places))
    return {
        name: quantile.value_of(at, quantile.locate(lower[name], rest)[0])
        for name, (at, rest) in places.items()
    }, share


def demoted_rows(
    out: Folder, number: int, difficulty: npt.NDArray[np.float32], resolved: Resolved
) -> Any:
    """Which rows of a part are demoted, (n,) bool."""
    rows = np.zeros(difficulty.size, np.bool_)
    if resolved.above is not None:
        rows = difficulty > np.float32(resolved.above)
    if resolved.copies:
        starts = graph.starts(out.sub("graph"))
        ids = read_array(out.sub(WORK), "copies.ids.npy")
        some = ids[np.searchsorted(ids, starts[number]) : np.searchsorted(ids, starts[number + 1])]
        rows[some - starts[number]] = True
    return rows


def count_upper(*, report: Report, out: Folder, number: int, k: int, kinds: list[str]) -> Figures:
    """Task: count the upper halves of the keys of a part."""
    values = _values(out, number, k, kinds)
    counts = {name: quantile.upper_counts(some) for name, some in values.items()}
    write_columns(out.sub(WORK), f"upper-{number:05d}", **counts)
    report(max(some.size for some in values.values()))
    return {}


def count_lower(
    *, report: Report, out: Folder, number: int, k: int, bins: dict[str, int]
) -> Figures:
    """Task: count the lower halves of those keys of a part whose upper half is in `bins`."""
    values = _values(out, number, k, list(bins))
    counts = {name: quantile.lower_counts(some, bins[name]) for name, some in values.items()}
    write_columns(out.sub(WORK), f"lower-{number:05d}", **counts)
    report(max((some.size for some in values.values()), default=0))
    return {}


def near(
    *, report: Report, out: Folder, number: int, k: int, most: float, above: float | None
) -> Figures:
    """Task: write the edges of a part between near-copies. most: largest squared distance. above:
    samples of higher difficulty are demoted already and have no such edges.
    """
    held = graph.read_columns(out.sub("graph"), number, "difficulty", "neighbors", "sqdist")
    row, target = demoted.near(held["neighbors"][:, :k], held["sqdist"][:, :k], most)
    if above is not None:
        stays = held["difficulty"][row] <= np.float32(above)
        row, target = row[stays], target[stays]
    source = graph.starts(out.sub("graph"))[number] + row
    write_columns(out.sub(WORK), f"near-{number:05d}", source=source, target=target)
    report(held["difficulty"].size)
    return {"edges": int(source.size)}


def join_copies(*, report: Report, out: Folder, above: float | None) -> Figures:
    """Task: find the near-copies to demote. Memory: all edges between near-copies of the pool, and
    about 50 bytes for each sample at their ends.
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
    found = demoted.copies(source, target, difficulty, hi, lo)
    write_columns(out.sub(WORK), "copies", ids=found)
    report(int(starts[-1]))
    return {"copies": int(found.size)}


def write_lists(*, report: Report, out: Folder, number: int, k: int, resolved: Resolved) -> Figures:
    """Task: write the lists of a part from which gamma is computed."""
    held = graph.read_columns(out.sub("graph"), number, "uid_hi", "uid_lo", "difficulty")
    starts = graph.starts(out.sub("graph"))
    chosen = auto_gamma.chosen_rows(held["uid_hi"], held["uid_lo"], int(starts[-1]))
    rows = np.flatnonzero(chosen & ~demoted_rows(out, number, held["difficulty"], resolved))
    lists = graph.read_columns(out.sub("graph"), number, "neighbors", "sqdist")
    neighbors, sqdist = lists["neighbors"][:, :k], lists["sqdist"][:, :k]
    reach = local_kernel.reach(sqdist)
    write_columns(
        out.sub(WORK), f"lists-{number:05d}", neighbors=neighbors[rows], sqdist=sqdist[rows],
        reach=reach[rows],
    )  # fmt: skip
    report(reach.size)
    return {"lists": int(rows.size)}


def gather_asked(*, report: Report, out: Folder) -> Figures:
    """Task: write the graph ids, ascending, of all neighbors in the chosen lists."""
    work = out.sub(WORK)
    starts = graph.starts(out.sub("graph"))
    named = [
        np.unique(read_array(work, f"lists-{p:05d}.neighbors.npy")) for p in range(len(starts) - 1)
    ]
    ids = np.unique(np.concatenate(named))
    write_columns(work, "asked", ids=ids[ids >= 0])
    report(int(starts[-1]))
    return {"asked": int(ids.size)}


def answer(*, report: Report, out: Folder, number: int, k: int, resolved: Resolved) -> Figures:
    """Task: write reach of the neighbors of chosen lists that are in a part, and whether they are
    demoted.
    """
    starts = graph.starts(out.sub("graph"))
    ids = read_array(out.sub(WORK), "asked.ids.npy")
    mine = ids[np.searchsorted(ids, starts[number]) : np.searchsorted(ids, starts[number + 1])]
    held = graph.read_columns(out.sub("graph"), number, "difficulty", "sqdist")
    rows = mine - starts[number]
    last = demoted_rows(out, number, held["difficulty"], resolved)
    write_columns(
        out.sub(WORK), f"answers-{number:05d}", reach=local_kernel.reach(held["sqdist"][rows, :k]),
        last=last[rows],
    )  # fmt: skip
    report(last.size)
    return {"last": int(last.sum())}


def find_gamma(
    *,
    report: Report,
    out: Folder,
    requested: auto_settings.Requested,
    resolved: Resolved,
    total: int,
    facts: auto_settings.PoolFacts,
    last: int,
) -> Figures:
    """Task: compute gamma from the chosen lists and the data of their neighbors. last: number of
    demoted samples.
    """
    work = out.sub(WORK)
    parts = len(graph.starts(out.sub("graph"))) - 1
    ids = read_array(work, "asked.ids.npy")

    def column(stem: str, name: str) -> Any:
        return np.concatenate(
            [read_array(work, f"{stem}-{p:05d}.{name}.npy") for p in range(parts)]
        )

    neighbors = column("lists", "neighbors")
    there = neighbors >= 0
    at = np.searchsorted(ids, np.where(there, neighbors, ids[0] if ids.size else 0))
    reach, are_demoted = column("answers", "reach"), column("answers", "last")
    if not ids.size:
        reach, are_demoted = np.zeros(1, np.float32), np.zeros(1, np.bool_)
    lists = auto_settings.Lists(
        sqdist=column("lists", "sqdist"),
        reach=column("lists", "reach"),
        reach_of=reach[at],
        through=there & ~are_demoted[at],
    )
    tuned = auto_settings.tune(requested, lists, total, last, resolved.floor, resolved.unit, facts)
    report(total)
    return {"tuned": tuned}


def _values(
    out: Folder, number: int, k: int, kinds: list[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """The values of a part that are counted, by name."""
    folder = out.sub("graph")
    found: dict[str, npt.NDArray[np.float32]] = {}
    if "difficulty" in kinds:
        found["difficulty"] = graph.read_columns(folder, number, "difficulty")["difficulty"]
    if set(kinds) - {"difficulty"}:
        sqdist = graph.read_columns(folder, number, "sqdist")["sqdist"][:, :k]
        made = {"sqdist": demoted.apart, "reach": local_kernel.reach}
        found |= {name: make(sqdist) for name, make in made.items() if name in kinds}
    return found


def _summed(out: Folder, stem: str, kinds: list[str]) -> dict[str, I64]:
    if not kinds:
        return {}
    parts = len(graph.starts(out.sub("graph"))) - 1
    total: dict[str, I64] = {}
    for number in range(parts):
        for name, counts in read_columns(out.sub(WORK), f"{stem}-{number:05d}", *kinds).items():
            total[name] = total.get(name, 0) + counts
    return total
