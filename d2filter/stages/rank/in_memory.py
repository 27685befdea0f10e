"""Stage rank for other methods than D2: one task that holds the whole pool.

`algorithm/methods/selectors.py` states the largest pool of each method; larger pools are refused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import by_class, uids
from d2filter.algorithm.greedy import auto_settings, messages
from d2filter.algorithm.greedy import in_memory as greedy_in_memory
from d2filter.algorithm.knn import products
from d2filter.algorithm.methods import selectors
from d2filter.config import RankConfig, RunConfig
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Report, assigned_cpus
from d2filter.formats import catalog, graph, ranking
from d2filter.formats.paths import Checksums, Folder
from d2filter.formats.runstate import RunState

I64 = npt.NDArray[np.int64]


def build(steps: StageRun, config: RunConfig, k: int) -> Figures:
    """Rank by `config.rank.method`; returns the stage's figures. k: neighbors that count."""
    starts = graph.starts(steps.out.sub("graph"))
    found = steps.alone(
        config.rank.method, rank_all, {"config": config.rank, "k": k}, total=int(starts[-1]),
        share_node=True,
    )  # fmt: skip
    return {
        "method": config.rank.method,
        "supersteps": 0,
        "rounds": 0,
        "partitions": len(starts) - 1,
        **{name: found[name] for name in ("late", "copies_sqdist", "cut_hardest")},
    }


def rank_all(*, report: Report, out: Folder, config: RankConfig, k: int) -> Figures:
    """Task: the whole ranking. Figures: the number of demoted samples.

    Scores have no meaning here: `forward` and `final` are the number of samples that rank behind,
    and `suppressed_by` is −1.
    """
    products.use_threads(assigned_cpus())
    known = read_pool(out, k, with_features=wants_features(config.method))
    rank, last, resolved = ranks_of(known, config)
    starts = graph.starts(out.sub("graph"))
    n = int(starts[-1])
    sums: Checksums = {}
    for number in range(len(starts) - 1):
        some = slice(int(starts[number]), int(starts[number + 1]))
        behind = n - 1 - rank[some]
        part = ranking.RankingPart(
            uid_hi=known.part.hi[some],
            uid_lo=known.part.lo[some],
            difficulty=known.part.difficulty[some],
            forward=np.where(last[some], np.int64(messages.FLOOR), behind),
            final=behind,
            rank=rank[some],
            suppressed_by=np.full(behind.size, -1, np.int64),
        )
        sums.update(ranking.publish_part(out.sub("ranking"), number, part))
        report(behind.size)
    demoted_counts = {"hardest": int(last.sum()) - resolved.copies, "copies": resolved.copies}
    return {
        "late": demoted_counts,
        "copies_sqdist": resolved.copies_sqdist,
        "cut_hardest": resolved.cut,
        "checksums": sums,
    }


class LoadedPool:
    """A pool in memory: rows of the graph as they lie, and features in the order of uid."""

    def __init__(
        self,
        part: graph.GraphPart,
        rows: npt.NDArray[np.float16],
        facts: auto_settings.PoolFacts,
    ) -> None:
        self.part = part
        self.rows = rows
        """(n, d), or (n, 0): not read"""
        self.facts = facts
        self.order = uids.ascending(part.hi, part.lo)
        """(n,) graph ids by ascending uid"""
        self.position = np.empty_like(self.order)
        """(n,) place by uid of each graph id"""
        self.position[self.order] = np.arange(self.order.size)

    def narrowed(self, k: int) -> LoadedPool:
        """The same with lists of k."""
        return LoadedPool(narrowed(self.part, k), self.rows, self.facts)

    def by_uid(self, config: RankConfig) -> selectors.Pool:
        """What selectors see."""
        part, order = self.part, self.order
        neighbors = part.neighbors[order]
        return selectors.Pool(
            hi=part.hi[order],
            lo=part.lo[order],
            difficulty=part.difficulty[order],
            features=self.rows,
            neighbors=np.where(neighbors >= 0, self.position[neighbors], -1),
            sqdist=part.sqdist[order],
            group=None if part.group is None else part.group[order],
            seed=config.seed,
            redundancy=config.redundancy,
            temperature=config.temperature,
        )


def read_pool(out: Folder, k: int, *, with_features: bool) -> LoadedPool:
    """The whole graph with lists of k, and the features where wanted."""
    part = narrowed(graph.read(out.sub("graph")), k)
    rows = np.empty((len(part.hi), 0), np.float16)
    if with_features:
        layout = catalog.layout(out.sub("catalog"))
        # the catalog ascends by uid
        parts = [layout.part(number) for number in range(len(layout.starts) - 1)]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
    made = RunState(out).done("catalog")
    return LoadedPool(
        part, rows, auto_settings.PoolFacts.from_catalog(made["stats"] if made else {})
    )


def narrowed(part: graph.GraphPart, k: int) -> graph.GraphPart:
    """The same with lists of k."""
    return replace(
        part,
        neighbors=np.ascontiguousarray(part.neighbors[:, :k]),
        sqdist=np.ascontiguousarray(part.sqdist[:, :k]),
    )


def ranks_of(
    known: LoadedPool, config: RankConfig
) -> tuple[I64, npt.NDArray[np.bool_], auto_settings.Resolved]:
    """The rank of each row of the graph, by D2 or any other method; which samples are demoted; the
    settings found on the pool.
    """
    part = known.part
    resolved, last = config.resolve_on(
        part.difficulty, part.hi, part.lo, part.neighbors, part.sqdist, known.facts
    )
    if config.method != "d2":
        rank = greedy_in_memory.rank_by(
            config.method, known.by_uid(config), is_demoted=last[known.order]
        )
        return interleaved(known, rank[known.position], last, config), last, resolved
    found = greedy_in_memory.rank_graph(
        part.hi, part.lo, part.difficulty, part.neighbors, part.sqdist,
        scheme=config.scheme(resolved),
        undirected=config.undirected, is_demoted=last,
    )  # fmt: skip
    return interleaved(known, found.rank, last, config), last, resolved


def interleaved(
    known: LoadedPool, rank: I64, last: npt.NDArray[np.bool_], config: RankConfig
) -> I64:
    """Ranks by graph row; with classes, every budget gives each class its share."""
    group, order = known.part.group, known.order
    if group is None:
        return rank
    shared = by_class.interleaved(rank[order], group[order], last[order], config.group_budgets)
    return shared[known.position]


def wants_features(method: str) -> bool:
    """Whether a method looks at embeddings."""
    return method != "d2" and "features" in selectors.SELECTORS[method].wants
