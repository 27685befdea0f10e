"""`d2filter verify OUT`: checks everything that the files of a finished run can prove.

Each check is a function from a loaded run to a list of breaches. Memory: the graph and the ranking
of the whole run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from d2filter.algorithm import budget, by_class, features, uids
from d2filter.algorithm.greedy import auto_settings, certificate, halo, local_kernel, messages
from d2filter.algorithm.scores import mismatched
from d2filter.config import RankConfig, SelectConfig
from d2filter.errors import InputError, VerificationError
from d2filter.formats import catalog, graph, ledger, ranking, subset, tables
from d2filter.formats.paths import Folder
from d2filter.formats.rows import read_array
from d2filter.formats.runstate import RunState
from d2filter.stages import select_soft
from d2filter.tools.provenance import follow, inputs, sums
from d2filter.tools.reread import rows, shards

I64 = npt.NDArray[np.int64]
Breaches = list[str]


@dataclass
class _Run:
    """Lazily loaded files of one run."""

    folder: Folder

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        state = RunState(self.folder)
        return {stage: state.require(stage) for stage in ("catalog", "graph", "rank", "select")}

    @cached_property
    def stats(self) -> dict[str, Any]:
        stats = self.folder.read_json("stats.json")
        if stats is None:
            raise InputError(f"{self.folder.where('stats.json')} does not exist")
        found: dict[str, Any] = stats
        return found

    @cached_property
    def catalog(self) -> catalog.Samples:
        return catalog.concatenate(list(catalog.iter_parts(self.folder.sub("catalog"))))

    @cached_property
    def graph_sizes(self) -> list[int]:
        return [int(rows) for rows in np.diff(graph.starts(self.folder.sub("graph")))]

    @cached_property
    def graph(self) -> graph.GraphPart:
        return graph.read(self.folder.sub("graph"))

    @cached_property
    def ranking_parts(self) -> list[dict[str, npt.NDArray[Any]]]:
        return list(ranking.iter_columns(self.folder.sub("ranking")))

    @cached_property
    def ranking(self) -> dict[str, npt.NDArray[Any]]:
        return {n: np.concatenate([p[n] for p in self.ranking_parts]) for n in ranking.COLUMNS}

    @cached_property
    def subset(self) -> npt.NDArray[np.void]:
        return subset.read(self.folder)

    @cached_property
    def precedence(self) -> I64:
        order = uids.ascending(self.graph.hi, self.graph.lo)
        position = np.empty_like(order)
        position[order] = np.arange(order.size)
        return position


def verify(folder: Folder, say: Callable[[str], None], *, deep: bool = False) -> None:
    """Run all checks, one line each. deep: those that read the input again, too. Raises
    VerificationError when any is broken.
    """
    run = _Run(folder)
    broken = 0
    for group in (_FILES, _STRUCTURE, _MEANING, *([_INPUT] if deep else [])):
        before = broken
        for name, check in group.items():
            breaches = check(run)
            broken += bool(breaches)
            say(f"{'FAILED' if breaches else 'ok':<7}{name}")
            for breach in breaches:
                say(f"       {breach}")
        if group is _STRUCTURE and broken > before:
            left = len(_MEANING) + deep * len(_INPUT)
            say(f"       {left} more checks were skipped: they need intact files")
            break
    if broken:
        raise VerificationError(f"{folder.url}: {broken} checks failed (listed above)")


def _accounting(run: _Run) -> Breaches:
    s = run.stats["samples"]
    out = []
    statuses = ("bad", "duplicate", *(["outside"] if "outside" in s else []))
    if s["read"] != s["ranked"] + sum(s[status] for status in statuses):
        out.append(f"read is not ranked + {' + '.join(statuses)}: {s}")
    if s["ranked"] != s["kept"] + s["pruned"]:
        out.append(f"ranked is not kept + pruned: {s}")
    listed = ledger.count_reasons(run.folder)
    for status in statuses:
        count = sum(listed.get(status, {}).values())
        if count != s[status]:
            out.append(f"{ledger.BAD_SAMPLES} lists {count} {status}, stats.json has {s[status]}")
    return out


def _rows(run: _Run) -> Breaches:
    g, r = run.graph, run.ranking
    ranked = run.stats["samples"]["ranked"]
    rows = {"catalog": len(run.catalog.hi), "graph": len(g.hi), "ranking": len(r["rank"])}
    out = [f"{name} has {n} rows, ranked are {ranked}" for name, n in rows.items() if n != ranked]
    if out:
        return out
    if run.graph_sizes != [len(part["rank"]) for part in run.ranking_parts]:
        out.append("parts of graph/ and ranking/ differ in length")
        return out
    for name, a, b in (
        ("uid_hi", g.hi, r["uid_hi"]),
        ("uid_lo", g.lo, r["uid_lo"]),
        ("difficulty", g.difficulty, r["difficulty"]),
    ):
        out += _count(f"rows differ in {name} between graph and ranking", a != b)
    order = uids.ascending(g.hi, g.lo)
    hi, lo = g.hi[order], g.lo[order]
    for name, a, b in (
        ("uid_hi", hi, run.catalog.hi),
        ("uid_lo", lo, run.catalog.lo),
        ("difficulty", g.difficulty[order], run.catalog.difficulty),
    ):
        out += _count(f"rows differ in {name} between graph and catalog", a != b)
    out += _count("uids are repeated", uids.repeats(hi, lo))
    start = 0
    for size in run.graph_sizes:
        inside = np.diff(run.precedence[start : start + size])
        out += _count("rows of a graph part are not in ascending order of uid", inside <= 0)
        start += size
    return out


def _neighbors(run: _Run) -> Breaches:
    g = run.graph
    n, k = g.neighbors.shape
    rows = np.arange(n)[:, None]
    out = _count("neighbors out of range", (g.neighbors < -1) | (g.neighbors >= n))
    out += _count("samples list themselves", g.neighbors == rows)
    padding = g.neighbors < 0
    others = np.full(n, n - 1)
    if g.group is not None:
        others = np.bincount(g.group)[g.group] - 1
        there = np.clip(g.neighbors, 0, n - 1)
        out += _count("neighbors of another class", ~padding & (g.group[there] != g.group[:, None]))
    expected = np.maximum(0, k - others)
    out += _count("lists do not end in the paddings they need", padding.sum(axis=1) != expected)
    out += _count("lists have a padding before a neighbor", padding[:, :-1] & ~padding[:, 1:])
    ordered = np.sort(np.where(padding, -1 - np.arange(k), g.neighbors), axis=1)
    out += _count("lists name a neighbor twice", ordered[:, 1:] == ordered[:, :-1])
    if out:
        return out
    # equals stand in the order of (uid_j − uid_i) mod 2¹²⁸, which is that of positions by uid
    offset = (run.precedence[g.neighbors] - run.precedence[:, None]) % n
    tied = (g.sqdist[:, 1:] == g.sqdist[:, :-1]) & ~padding[:, 1:]
    return _count("equals are not in ring order", tied & (offset[:, 1:] < offset[:, :-1]))


def _sqdist(run: _Run) -> Breaches:
    g = run.graph
    padding = g.neighbors < 0
    out = _count("sqdist is NaN or negative", ~(g.sqdist >= 0))
    out += _count("sqdist of a neighbor is infinite", np.isinf(g.sqdist) & ~padding)
    out += _count("sqdist of a padding is finite", ~np.isinf(g.sqdist) & padding)
    out += _count("sqdist falls inside a list", g.sqdist[:, 1:] < g.sqdist[:, :-1])
    if out:
        return out
    measured = features.sqdist_pairs(run.catalog.features[run.precedence], g.neighbors)
    return _count("sqdist are not those of the features", measured != g.sqdist)


def _cells(run: _Run) -> Breaches:
    index = run.folder.sub("index")
    table = tables.read_table(index, "cells.parquet")
    held = int(table.column("rows").to_numpy().sum())
    ranked = run.stats["samples"]["ranked"]
    out = [] if held == ranked else [f"cells hold {held} rows, ranked are {ranked}"]
    if run.graph.group is not None:
        counted = np.bincount(run.graph.group, minlength=table.num_rows)
        return out + _count("classes differ in size", counted != table.column("rows").to_numpy())
    centroids = read_array(index, "centroids.npy")
    named = len(set(table.column("cell").to_pylist()))
    expected = (named, run.stats["graph"]["sketch_dim"])
    if centroids.shape != expected:
        out.append(f"centroids have shape {centroids.shape}, cells and sketches make {expected}")
    return out


def _ranks(run: _Run) -> Breaches:
    rank = run.ranking["rank"]
    n = len(rank)
    inside = (rank >= 0) & (rank < n)
    seen = np.bincount(rank[inside], minlength=n)
    out = _count("ranks out of range", ~inside)
    return out + _count("ranks are missing or repeated", seen != 1)


def _order(run: _Run) -> Breaches:
    r, group = run.ranking, run.graph.group
    options = RankConfig.from_options(run.records["rank"]["options"])
    if group is not None and options.method == "d2":
        by_uid = uids.ascending(r["uid_hi"], r["uid_lo"])
        alone = np.empty(by_uid.size, np.int64)
        alone[np.argsort(~r["final"][by_uid], kind="stable")] = np.arange(by_uid.size)
        last = r["forward"][by_uid] == messages.FLOOR
        shared = by_class.interleaved(alone, group[by_uid], last, options.group_budgets)
        return _count("ranks do not give each class its turn", shared != r["rank"][by_uid])
    order = np.argsort(r["rank"], kind="stable")
    final, precedence = r["final"][order], run.precedence[order]
    out = _count("final scores rise with rank", final[1:] > final[:-1])
    tied = (final[1:] == final[:-1]) & (precedence[1:] < precedence[:-1])
    return out + _count("ties are not in ascending order of uid", tied)


def _scores(run: _Run) -> Breaches:
    g, r = run.graph, run.ranking
    options = RankConfig.from_options(run.records["rank"]["options"])
    if options.method != "d2":
        return _method(run, options)
    k = options.n_neighbors
    neighbors, distances = g.neighbors[:, :k], g.sqdist[:, :k]
    facts = auto_settings.PoolFacts.from_catalog(run.records["catalog"]["stats"])
    resolved, last = options.resolve_on(g.difficulty, g.hi, g.lo, neighbors, distances, facts)
    scheme = options.scheme(resolved)
    source, target, sqdist = halo.whole(neighbors, distances, both_ways=options.undirected)
    through = ~last[source] & ~last[target]
    source, target, sqdist = source[through], target[through], sqdist[through]
    if scheme.is_local:
        reach = local_kernel.reach(distances)
        sqdist = local_kernel.relative(sqdist, reach[source], reach[target], scheme.floor)
    start = np.searchsorted(source, np.arange(len(g.hi) + 1))
    earnest = g.difficulty[~last]
    scores = messages.normalized(g.difficulty, float(earnest.min()), float(earnest.max()))
    weights = scheme.forward_weights(sqdist)
    gathered = messages.gather(scores, start, target, weights)
    forward = scheme.forward_scores(scores, gathered)
    forward[last] = messages.FLOOR
    out = _found(resolved, run.records["rank"]["stats"])
    out += _count("forward scores are not those of the graph", forward != r["forward"])
    # with classes, ranks are shared out afterwards: the greedy's own are those of the scores
    rank = np.empty(len(g.hi), np.int64)
    rank[np.lexsort((run.precedence, ~r["final"]))] = np.arange(rank.size)
    wrong, delayed, other = certificate.breaches(
        r["forward"],
        r["final"],
        rank,
        run.precedence,
        (source, target, scheme.reverse_weights(sqdist)),
        r["suppressed_by"],
    )
    if wrong:
        out.append(f"{wrong} final scores are not forward minus the messages received")
    if delayed:
        out.append(f"{delayed} samples were taken later than the greedy would")
    if other:
        out.append(f"{other} samples name another suppressor than the strongest")
    return out


def _found(resolved: auto_settings.Resolved, figures: dict[str, Any]) -> Breaches:
    """Find the settings of the ranking again, gamma above all, and compare them with the record."""
    mine = {
        "gamma": resolved.gamma,
        "gamma_unit": resolved.unit,
        "copies_sqdist": resolved.copies_sqdist,
        "cut_hardest": resolved.cut,
    }
    return [
        f"{name} is {value}, found again on this graph, and {figures[name]} in the record"
        for name, value in mine.items()
        if name in figures and figures[name] != value
    ]


def _pairs(run: _Run) -> Breaches:
    """The share of pairs that gamma was found with."""
    recorded = run.records["catalog"]["stats"].get("pairs")
    if not recorded:
        return []
    c = run.catalog
    found = mismatched.judged(c.features[mismatched.sampled(c.hi, c.lo)])
    return [] if found == recorded else [f"pairs are {found}, and {recorded} in the record"]


def _method(run: _Run, options: RankConfig) -> Breaches:
    """Another method than D2 is proven by doing it again."""
    from d2filter.stages.rank import in_memory as rank_in_memory

    features_too = rank_in_memory.wants_features(options.method)
    known = rank_in_memory.read_pool(run.folder, options.n_neighbors, with_features=features_too)
    rank, _, resolved = rank_in_memory.ranks_of(known, options)
    out = _found(resolved, run.records["rank"]["stats"])
    return out + _count(f"ranks are not those of {options.method}", rank != run.ranking["rank"])


def _subset(run: _Run) -> Breaches:
    options, figures = run.records["select"]["options"], run.records["select"]["stats"]
    fraction = options["fraction"]
    exact = None if fraction is None else budget.parse_fraction(fraction)
    size = budget.budget_of(len(run.ranking["rank"]), fraction=exact, budget=options["budget"])
    if options.get("soft") is not None and figures.get("total") != len(run.subset):
        return [
            f"{subset.SUBSET} has {len(run.subset)} entries, {figures.get('total')} are recorded"
        ]
    out = _prefix(run, subset.SUBSET, run.subset, size)
    if size != figures["budget"]:
        out.append(f"the budget is {size} by its option and {figures['budget']} in the record")
    kept = run.stats["samples"]["kept"]
    distinct = len(np.unique(run.subset))
    if distinct != kept:
        out.append(f"{subset.SUBSET} has {distinct} samples, stats.json keeps {kept}")
    arch = run.records["catalog"]["options"]["arch"]
    method = run.records["rank"]["options"]["method"]
    for share in [fraction, *options["also"]] if options["also"] and exact else []:
        requested = budget.parse_fraction(share)
        count = budget.budget_of(len(run.ranking["rank"]), fraction=requested)
        name = subset.named(method, arch, requested)
        out += _prefix(run, name, subset.read(run.folder, name), count)
    return out


def _prefix(run: _Run, name: str, chosen: npt.NDArray[np.void], size: int) -> Breaches:
    """A subset that is not the first `size` of the ranking."""
    hi, lo = chosen["f0"], chosen["f1"]
    options, r = run.records["select"]["options"], run.ranking
    repeated = uids.repeats(hi, lo) & (options.get("soft") is None)
    out = _count(f"entries of {name} are unsorted or repeated", uids.falls(hi, lo) | repeated)
    score = run.records["catalog"]["stats"].get("score", {})
    raw = budget.raw_scores(r["difficulty"], score.get("kept_first", "high"))
    times = budget.kept_mask(r["rank"], raw, size, options["min_score"]).astype(np.int64)
    what = "prefix"
    if options.get("soft") is not None:
        chosen_by = SelectConfig.from_options(options)
        method, first = run.records["rank"]["options"]["method"], score.get("kept_first", "high")
        (times,) = select_soft.times(r, chosen_by, first, method, [size], run.graph.group)
        what = "soft selection"
    expected_hi, expected_lo = np.repeat(r["uid_hi"], times), np.repeat(r["uid_lo"], times)
    order = uids.ascending(expected_hi, expected_lo)
    expected_hi, expected_lo = expected_hi[order], expected_lo[order]
    if len(hi) != len(expected_hi):
        return [*out, f"{name} has {len(hi)} entries, the ranking's {what} {len(expected_hi)}"]
    different = (hi != expected_hi) | (lo != expected_lo)
    return out + _count(f"entries of {name} are not the ranking's {what}", different)


def _kept(run: _Run) -> Breaches:
    pairs = subset.pairs(run.subset)
    hi, lo = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
    r = run.ranking
    order = uids.ascending(r["uid_hi"], r["uid_lo"])
    where = uids.positions(r["uid_hi"][order], r["uid_lo"][order], hi, lo)
    expected = subset.kept_table([run.catalog], hi, lo, r["rank"][order][where])
    folder = run.folder.sub("kept")
    parts = [tables.read_table(folder, name) for name in folder.names(".parquet")]
    rows = sum(part.num_rows for part in parts)
    if rows != expected.num_rows:
        return [f"kept/ lists {rows} samples, {expected.num_rows} of the subset have a shard"]
    if not rows:
        return []
    listed = pa.concat_tables(parts)
    out = [
        f"kept/ differs from the subset in column {name}"
        for name in expected.column_names
        if listed.column(name).to_pylist() != expected.column(name).to_pylist()
    ]
    counted = sum((folder.read_json("sizes.json") or {}).values())
    if counted != rows:
        out.append(f"kept/sizes.json counts {counted}, the lists hold {rows}")
    return out


def _count(what: str, broken: npt.NDArray[np.bool_]) -> Breaches:
    count = int(np.count_nonzero(broken))
    return [f"{count} {what}"] if count else []


# what the third group and the last take for granted is checked by the second
_FILES: dict[str, Callable[[_Run], Breaches]] = {
    "each stage was made from the output of the stage before it": lambda run: follow(run.folder),
    "files hold the bytes that were published": lambda run: sums(run.folder),
    "the input is what was read, by sizes, times and checksums": lambda run: inputs(run.folder),
}
_STRUCTURE: dict[str, Callable[[_Run], Breaches]] = {
    "every sample read is ranked, bad, duplicate or outside; ranked is kept or pruned": _accounting,
    "catalog, graph and ranking hold the same distinct samples in the same rows": _rows,
    "neighbors are in range, distinct, never the sample itself, equals in ring order": _neighbors,
    "squared distances ascend and are those of the features": _sqdist,
    "cells hold every sample once, each with its centroid": _cells,
    "ranks are a permutation": _ranks,
}
_MEANING: dict[str, Callable[[_Run], Breaches]] = {
    "final scores fall with rank, ties by uid": _order,
    "the ranking is that of its method: for D2, of the sequential greedy on this graph": _scores,
    "gamma is based on the share of pairs that match no better than random ones": _pairs,
    "the subset is sorted, unique and the first B of the ranking": _subset,
    "the kept lists agree with the subset": _kept,
}
_INPUT: dict[str, Callable[[_Run], Breaches]] = {
    "read again, shards hold the samples that were embedded or reported": lambda run: shards(
        run.folder
    ),
    "read again, each row of the metadata is in the catalog bit by bit, or reported": (
        lambda run: rows(run.folder, run.catalog)
    ),
}
