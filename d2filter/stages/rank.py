"""Graph → ranking/ (DESIGN §3)."""

from __future__ import annotations

from typing import Any

from d2filter.algorithm import ranking as algorithm
from d2filter.config import RankConfig
from d2filter.formats import graph, ranking
from d2filter.formats.paths import Folder
from d2filter.stages.runner import Report


def rank(*, report: Report, out: Folder, config: RankConfig) -> dict[str, Any]:
    """Task: rank the whole graph in one partition; one ranking part for each graph part."""
    folder = out.sub("graph")
    parts = [graph.read_part(folder, name) for name in folder.names(".parquet")]
    whole = graph.concatenate(folder, parts)
    ranked = algorithm.rank_graph(
        whole.hi,
        whole.lo,
        whole.difficulty,
        whole.neighbors,
        whole.sqdist,
        gamma_forward=config.forward,
        gamma_reverse=config.gamma,
    )
    start = 0
    for number, part in enumerate(parts):
        end = start + len(part.hi)
        ranking.publish_part(
            out.sub("ranking"),
            number,
            ranking.RankingPart(
                uid_hi=part.hi,
                uid_lo=part.lo,
                difficulty=part.difficulty,
                forward=ranked.forward[start:end],
                final=ranked.final[start:end],
                rank=ranked.rank[start:end],
                suppressed_by=ranked.suppressed_by[start:end],
            ),
        )
        start = end
    report(start)
    return {"rounds": ranked.rounds, "supersteps": 1}
