"""Stage rank: graph → ranking/. This module runs the steps in order.

Each graph part is a partition. The steps are: settings (`auto_settings`), cut, describe, supersteps
(`actors`); then the partitions are merged into one order: ranges, merge, finish.

ranking-work/cut-00000.*      cut edges of a partition: source, target, sqdist; start (P + 1,)
ranking-work/reach-00000.npy  squared distances of its rows to their last neighbors
ranking-work/known-00000.*    its samples in the halos of other partitions: ids, hi, lo, difficulty,
                              is_demoted, reach; start (P + 1,)
ranking-work/state-*.npz      the last snapshot of each partition
ranking-work/scores-00000.*   forward, final, suppressed_by of its rows; order: best key first
ranking-work/best-00000.*     its keys in that order; sampled-00000.*: some of them, for splitters
ranking-work/ranges-00000.*   where the splitters cut these keys into ranges
ranking-work/ranks-00000.*    ranks of one range of keys, by partition; start (P + 1,)
ranking/part-00000.parquet    the ranking

`tidy` removes ranking-work/ after the stage is recorded.

See docs/method.md#global-order.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from d2filter.algorithm.greedy import auto_settings, merge
from d2filter.config import RunConfig
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Report, Task
from d2filter.formats import graph, ranking
from d2filter.formats.paths import Folder
from d2filter.formats.rows import read_array, read_columns, write_array, write_columns
from d2filter.stages.rank import actors
from d2filter.stages.rank import auto_settings as settings_on_parts
from d2filter.stages.rank import in_memory as rank_in_memory
from d2filter.stages.rank.auto_settings import WORK
from d2filter.stages.rank.partition_actor import Setup, read_cut, read_partition


def build(steps: StageRun, config: RunConfig, k: int, facts: auto_settings.PoolFacts) -> Figures:
    """Run all tasks; returns the stage's figures. k: number of neighbors per list that count."""
    if config.rank.method != "d2":
        return rank_in_memory.build(steps, config, k)
    starts = graph.starts(steps.out.sub("graph"))
    parts, total = len(starts) - 1, int(starts[-1])
    every = [{"number": number} for number in range(parts)]

    resolved = settings_on_parts.resolve(steps, config.rank.requested, k, parts, total, facts)
    ends = steps.each("cut", cut, every, {"resolved": resolved}, total=total)
    steps.each("describe", describe, every, {"parts": parts, "resolved": resolved}, total=total)
    setup = Setup(
        resolved=resolved,
        scheme=config.rank.scheme(resolved),
        both_ways=config.rank.undirected,
        budgets=config.rank.group_budgets,
        fingerprint=steps.fingerprint,
        low=min(f["low"] for f in ends),
        high=max(f["high"] for f in ends),
    )
    if parts == 1:
        done = steps.alone(
            "supersteps", actors.rank_single_partition, {"setup": setup}, total=total,
            share_node=True,
        )  # fmt: skip
    else:
        arguments = {"steps": steps, "parts": parts, "setup": setup, "total": total}
        task = Task(name="supersteps", run=actors.run, arguments=arguments)
        done = steps.in_driver(task, label="supersteps", skip=True)
    steps.each("ranges", ranges, every, {"parts": parts}, total=total)
    steps.each("merge", merge_one_range, every, {"parts": parts}, total=total)
    steps.each("finish", finish, every, {"parts": parts}, total=total)
    return {
        "method": "d2",
        "rounds": done["rounds"],
        "supersteps": done["supersteps"],
        "bytes_exchanged": done["bytes"],
        "restarts": done["restarts"],
        "cut_edges": sum(f["edges"] for f in ends),
        "late": {
            "hardest": sum(f["late"] for f in ends) - resolved.copies,
            "copies": resolved.copies,
        },
        **found_settings(resolved),
        "difficulty_range": [setup.low, setup.high],
        "partitions": parts,
        "seconds_detail": {
            label if label == "supersteps" else f"rank_{label}": seconds
            for label, seconds in steps.totals.seconds.items()
        },
    }


def found_settings(resolved: settings_on_parts.Resolved) -> Figures:
    """The settings that were fitted to the pool, for the record of the stage."""
    tuned = {name: value for name, value in resolved.tuned.items() if name != "gamma"}
    return {
        "gamma": resolved.gamma,
        "gamma_unit": resolved.unit,
        "gamma_floor": resolved.floor,
        "copies_sqdist": resolved.copies_sqdist,
        "cut_hardest": resolved.cut,
        **tuned,
    }


def tidy(out: Folder) -> None:
    """Remove the intermediate files. Call it after the stage is recorded."""
    out.remove(WORK)


def cut(
    *, report: Report, out: Folder, number: int, resolved: settings_on_parts.Resolved
) -> Figures:
    """Task: write the cut edges of a partition. Figures: their number, the extremes of difficulty,
    and the number of demoted samples.
    """
    one = read_partition(out, number, resolved)
    leaving = one.leaving_edges()
    write_columns(
        out.sub(WORK), f"cut-{number:05d}", start=leaving.start, source=leaving.source,
        target=leaving.target, sqdist=leaving.sqdist,
    )  # fmt: skip
    write_array(out.sub(WORK), f"reach-{number:05d}.npy", one.reach)
    low, high = one.range()
    report(one.size)
    return {
        "edges": int(leaving.source.size),
        "low": low,
        "high": high,
        "late": one.demoted_count(),
    }


def describe(
    *, report: Report, out: Folder, number: int, parts: int, resolved: settings_on_parts.Resolved
) -> Figures:
    """Task: write the data of a partition's samples that other partitions need for their halos."""
    work = out.sub(WORK)
    one = read_partition(out, number, resolved, lists=False)
    own = read_columns(work, f"cut-{number:05d}", "start", "source")
    ids = []
    for peer in range(parts):
        mine = own["source"][own["start"][peer] : own["start"][peer + 1]]
        theirs = np.empty(0, np.int64)
        if peer != number:
            theirs = read_cut(work, peer, number, "target")["target"]
        ids.append(np.union1d(mine, theirs))
    every = np.concatenate(ids)
    known = one.halo_data(every)
    start = np.cumsum([0, *(some.size for some in ids)])
    columns = {field.name: getattr(known, field.name) for field in fields(known)}
    write_columns(work, f"known-{number:05d}", start=start, **columns)
    report(one.size)
    return {}


def ranges(*, report: Report, out: Folder, number: int, parts: int) -> Figures:
    """Task: cut the keys of a partition, best first, into ranges."""
    work = out.sub(WORK)
    samples = [_keys(read_columns(work, f"sampled-{p:05d}", "x", "hi", "lo")) for p in range(parts)]
    best = _keys(read_columns(work, f"best-{number:05d}", "x", "hi", "lo"))
    cuts = merge.split_at(best, merge.splitters(samples, parts))
    # with fewer keys than ranges, the last ranges are empty
    cuts = np.append(cuts, np.full(parts + 1 - cuts.size, best.x.size))
    write_columns(work, f"ranges-{number:05d}", start=cuts)
    report(best.x.size)
    return {}


def merge_one_range(*, report: Report, out: Folder, number: int, parts: int) -> Figures:
    """Task: compute the ranks of one range of keys, over all partitions."""
    work = out.sub(WORK)
    pieces, first = [], 0
    for p in range(parts):
        start = read_array(work, f"ranges-{p:05d}.start.npy")
        first += int(start[number])
        some = slice(int(start[number]), int(start[number + 1]))
        pieces.append(_keys(read_columns(work, f"best-{p:05d}", "x", "hi", "lo", rows=some)))
    ranks = merge.ranks(pieces, first)
    write_columns(
        work, f"ranks-{number:05d}", start=np.cumsum([0, *(r.size for r in ranks)]),
        rank=np.concatenate(ranks),
    )  # fmt: skip
    report(sum(r.size for r in ranks))
    return {}


def finish(*, report: Report, out: Folder, number: int, parts: int) -> Figures:
    """Task: write one part of the ranking."""
    work = out.sub(WORK)
    rows = graph.read_columns(out.sub("graph"), number, "uid_hi", "uid_lo", "difficulty")
    scores = read_columns(
        work, f"scores-{number:05d}", "forward", "final", "suppressed_by", "order"
    )
    pieces = []
    for r in range(parts):
        start = read_array(work, f"ranks-{r:05d}.start.npy")
        some = slice(int(start[number]), int(start[number + 1]))
        pieces.append(read_columns(work, f"ranks-{r:05d}", "rank", rows=some)["rank"])
    rank = np.empty(scores["order"].size, np.int64)
    rank[scores["order"]] = np.concatenate(pieces)
    part = ranking.RankingPart(
        **rows,
        forward=scores["forward"],
        final=scores["final"],
        rank=rank,
        suppressed_by=scores["suppressed_by"],
    )
    sums = ranking.publish_part(out.sub("ranking"), number, part)
    report(rank.size)
    return {"checksums": sums}


def _keys(columns: dict[str, Any]) -> merge.Keys:
    return merge.Keys(x=columns["x"], hi=columns["hi"], lo=columns["lo"])
