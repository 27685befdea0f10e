"""Runs the self-check on a run directory: would the run's setting keep wrong pairs?

See `algorithm/measures/selfcheck.py`. The self-check works in memory and does not change the run. A
pool of up to MOST samples is checked whole. Of a larger pool a hash of the uid chooses SAMPLED
samples, which get a graph of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import budget, uids
from d2filter.algorithm.greedy import auto_settings, near_copies
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.measures import selfcheck
from d2filter.config import RankConfig
from d2filter.formats import catalog, graph
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import RunState
from d2filter.stages.rank import in_memory as rank_in_memory

Say = Callable[[str], None]
Figures = dict[str, Any]
I64 = npt.NDArray[np.int64]

MOST = 200_000
"""largest pool that is checked whole, in samples"""
SAMPLED = 50_000
"""samples that are checked of a larger pool"""
CHEAP = ("d2", "score", "random")
"""methods that are fast enough to rank a pool a second time for a report"""
FRACTIONS = tuple(Decimal(f) for f in ("0.1", "0.2", "0.3", "0.5", "0.7"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A copy of a pool with swapped captions, which any setting can rank."""

    known: rank_in_memory.LoadedPool
    swapped: I64
    """(m,) rows with swapped captions"""
    correlation: float
    """of cosine and difficulty"""
    ranked: int
    """number of ranked samples in the whole pool"""

    @property
    def whole(self) -> bool:
        """Whether the whole pool is checked."""
        return len(self.known.part.hi) == self.ranked

    def rates(self, config: RankConfig, fractions: Iterable[Decimal]) -> dict[str, Figures]:
        """For each budget, the rates at which a setting and the score alone keep swapped captions.

        Keys: kept, low and high (rate with its 95% interval), by_score, share_kept.
        """
        part = self.known.part
        rank = ranks(self.known, config)
        by_score = selfcheck.rank_by_score(part.difficulty, part.hi, part.lo)
        found = {}
        for fraction in fractions:
            size = budget.budget_of(rank.size, fraction=fraction)
            mine = selfcheck.rate(rank, self.swapped, size)
            found[str(fraction)] = {
                "kept": mine.kept,
                "low": mine.low,
                "high": mine.high,
                "by_score": selfcheck.rate(by_score, self.swapped, size).kept,
                "share_kept": size / rank.size,
            }
        return found


def of_pool(folder: Folder, pool: rank_in_memory.LoadedPool | None = None) -> Prepared | str:
    """A copy of a run's pool with swapped captions, or the reason why the check is impossible.

    pool: the whole pool with features, if it is in memory already.
    """
    return _impossible(folder) or prepare(folder, load(folder, pool=pool))


def load(
    folder: Folder,
    say: Say = lambda line: None,
    *,
    pool: rank_in_memory.LoadedPool | None = None,
) -> rank_in_memory.LoadedPool:
    """Load a pool with graph and features, ascending by uid: all samples up to MOST, else SAMPLED
    of them with a graph of their own, without classes. say: called with a line in that case.
    pool: the whole pool with features, if it is in memory already.
    """
    state = RunState(folder)
    k = int(state.require("graph")["stats"]["k"])
    stats = state.require("catalog")["stats"]
    ranked = int(stats["samples"]["ranked"])
    if ranked <= MOST:
        whole = pool or rank_in_memory.read_pool(folder, k, with_features=True)
        return _ascending(whole)
    say(
        f"measuring on {SAMPLED:,} of {ranked:,} samples, chosen by a hash of the uid, with "
        "their graph"
    )
    return _sampled(folder, k, ranked, auto_settings.PoolFacts.from_catalog(stats))


def prepare(folder: Folder, known: rank_in_memory.LoadedPool) -> Prepared | str:
    """A copy of a loaded pool with swapped captions, or the reason why the check is impossible."""
    reason = _impossible(folder)
    if reason:
        return reason
    ranked = int(RunState(folder).require("catalog")["stats"]["samples"]["ranked"])
    part = known.part
    line = selfcheck.fit(selfcheck.cosines(known.rows), part.difficulty)
    if abs(line.correlation) < selfcheck.CORRELATION:
        return (
            "the score is not the cosine of the two halves (their correlation is "
            f"{line.correlation:.3f})"
        )
    swapped, partner = selfcheck.choose(known.rows, part.hi, part.lo, near_copies.near(part.sqdist))
    if swapped.size < selfcheck.LEAST:
        return f"{swapped.size} distinct pairs are too few"
    changed = selfcheck.splice(
        known.rows, part.difficulty, part.neighbors, part.sqdist, swapped, partner, line
    )
    spliced = graph.GraphPart(
        hi=part.hi, lo=part.lo, difficulty=changed.difficulty, neighbors=changed.neighbors,
        sqdist=changed.sqdist, group=part.group,
    )  # fmt: skip
    return Prepared(
        known=rank_in_memory.LoadedPool(spliced, changed.rows, known.facts), swapped=swapped,
        correlation=line.correlation, ranked=ranked,
    )  # fmt: skip


def _impossible(folder: Folder) -> str:
    """Why a pool cannot be checked, from its records alone; empty: nothing speaks against it."""
    record = RunState(folder).require("catalog")
    options, ranked = record["options"], int(record["stats"]["samples"]["ranked"])
    if options["feature_type"] != "image|text" or options["feature_keys"]:
        return "the features are not an image and a text half"
    if ranked < 10 * selfcheck.LEAST:
        return f"{ranked} samples are too few"
    if ranked > MOST and graph.has_groups(folder.sub("graph")):
        return f"{ranked:,} samples with classes are too many"
    return ""


def ranks(known: rank_in_memory.LoadedPool, config: RankConfig) -> I64:
    """Ranks of a loaded pool by a setting, (n,) int64, with the setting's number of neighbors."""
    k = config.n_neighbors
    if k and k < known.part.neighbors.shape[1]:
        known = known.narrowed(k)
    return rank_in_memory.ranks_of(known, config)[0]


def of_run(folder: Folder) -> Figures:
    """The self-check of the setting of a finished run, in the form of report.json."""
    method = RunState(folder).require("rank")["options"]["method"]
    if method not in CHEAP:
        return {"why_not": f"{method} would have to rank the pool again"}
    prepared = of_pool(folder)
    if isinstance(prepared, str):
        return {"why_not": prepared}
    state = RunState(folder)
    samples = state.require("select")["stats"]["samples"]
    own = Decimal(samples["kept"]) / Decimal(samples["kept"] + samples["pruned"])
    config = RankConfig.from_options(state.require("rank")["options"])
    size = len(prepared.known.part.hi)
    # of a sample of the pool a small budget may keep nothing
    requested = [f for f in {*FRACTIONS, own} if f and budget.floor_of(f, size)]
    rates = prepared.rates(config, sorted(requested))
    found: Figures = {
        "swapped": prepared.swapped.size,
        "of": size,
        "ranked": prepared.ranked,
        "correlation": prepared.correlation,
        "rates": rates,
    }
    if str(own) in rates:
        found["at_budget"] = rates[str(own)]
    return found


def _ascending(known: rank_in_memory.LoadedPool) -> rank_in_memory.LoadedPool:
    """The same pool with rows that ascend by uid."""
    pool = known.by_uid(RankConfig())
    part = graph.GraphPart(
        hi=pool.hi, lo=pool.lo, difficulty=pool.difficulty, neighbors=pool.neighbors,
        sqdist=pool.sqdist, group=pool.group,
    )  # fmt: skip
    return rank_in_memory.LoadedPool(part, known.rows, known.facts)


def _sampled(
    folder: Folder, k: int, ranked: int, facts: auto_settings.PoolFacts
) -> rank_in_memory.LoadedPool:
    """SAMPLED of the samples, ascending by uid, with a graph of their own."""
    home = folder.sub("catalog")
    layout = catalog.layout(home)
    bound = np.uint64(min(2**64 - 1, int(1.2 * SAMPLED / ranked * 2**64)))
    columns: list[tuple[Any, ...]] = []
    for number in range(len(layout.starts) - 1):
        hi, lo, difficulty = catalog.read_ids(home, number)
        some = np.flatnonzero(uids.hashed(hi, lo, salt=uids.SALT_SELFCHECK, seed=2) <= bound)
        columns.append((hi[some], lo[some], difficulty[some], layout.part(number)[some]))
    hi, lo, difficulty, rows = (np.concatenate(column) for column in zip(*columns, strict=True))
    keep = uids.hash_sample(hi, lo, SAMPLED, salt=uids.SALT_SELFCHECK, seed=2)
    hi, lo, difficulty, rows = hi[keep], lo[keep], difficulty[keep], rows[keep]
    width = knn.width(k, len(hi))
    found, _ = knn.build(knn.make_pool(rows, hi, lo), width)
    part = graph.GraphPart(
        hi=hi, lo=lo, difficulty=difficulty, neighbors=found.neighbors, sqdist=found.sqdist
    )
    return rank_in_memory.LoadedPool(part, rows, facts)
