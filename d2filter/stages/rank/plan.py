"""Plans the stage rank: its options, and which methods and settings a pool allows."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from d2filter.algorithm.methods import selectors
from d2filter.config import TUNED_FOR, options_of
from d2filter.errors import UsageError
from d2filter.formats import graph
from d2filter.formats.runstate import Plan
from d2filter.stages.stage import Planned, Run


def plan(run: Run, upstream: str) -> Planned:
    """The plan for a ranking of all samples."""
    require_method(run)
    rank = run.config.rank
    options = options_of(rank)
    options["gamma_forward"] = rank.gamma if rank.gamma_forward is None else rank.gamma_forward
    # all neighbors that the graph has, and as many as it has, are one plan
    options["n_neighbors"] = _neighbors(run)
    if rank.method == "d2":
        options["seed"] = 0  # it needs none
    options["tuned_for"] = _tuned_for(run, options)
    return Planned(plan=Plan(stage="rank", options=options, upstream=upstream))


def require_method(run: Run) -> None:
    """Raise UsageError for a method that the pool does not allow, before anything is removed
    for it.
    """
    record = run.state.done("catalog")
    if record is None:
        return  # a plan only: the catalog is not made yet
    catalog, rank = record["stats"], run.config.rank
    if rank.method != "d2":
        selectors.check_size(rank.method, catalog["samples"]["ranked"])
    score = catalog.get("score", {"high_is": "unknown"})
    if rank.cut_hardest and score["high_is"] != "unknown":
        hard_end = {"harder": "high", "easier": "low"}.get(score["high_is"])
        if score["kept_first"] != hard_end:
            raise UsageError(
                "cut-hardest drops the samples that would be ranked first, but with "
                f"{score['name']} ({score['kept_first']} goes first, high is {score['high_is']}) "
                "these are not the hardest: use a score that puts hard samples first"
            )


def _tuned_for(run: Run, options: dict[str, Any]) -> str | None:
    """The kept share that automatic settings are for: the requested one; else that of an
    existing ranking that is otherwise the same, so that another budget does not need another
    ranking; else that of the selection.
    """
    rank, select = run.config.rank, run.config.select
    if not rank.is_tuned:
        return None
    if rank.tuned_for is not None:
        return str(rank.tuned_for)
    made = run.state.done("rank")
    if made is not None and "rank" not in run.config.overwrite:
        before = made["options"].get("tuned_for")
        if before and made["options"] == {**options, "tuned_for": before}:
            return str(before)
    if select.fraction is not None:
        return str(select.fraction)
    catalog = run.state.done("catalog")
    if select.budget is not None and catalog is not None:
        ranked = max(1, catalog["stats"]["samples"]["ranked"])
        return str(min(Decimal(1), Decimal(select.budget) / ranked))
    return str(TUNED_FOR)


def _neighbors(run: Run) -> int:
    """How many neighbors of each list count. Raises UsageError for more than there are."""
    made = run.state.done("graph")
    there = run.config.graph.n_neighbors
    if made is not None:
        there = graph.width(run.out.sub("graph"))
    wanted = run.config.rank.n_neighbors or there
    if made is not None and wanted == made["options"].get("n_neighbors"):
        return min(wanted, there)  # a small pool has fewer
    if wanted > there:
        raise UsageError(
            f"n-neighbors is {wanted}, the graph of {run.out.url} has {there}: rank with at "
            "most that many, or build the graph again"
        )
    return wanted
