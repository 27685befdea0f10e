"""Ranking → subset.npy and kept/: one budget of a finished ranking (DESIGN §3, §6)."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2filter.algorithm import budget, uids
from d2filter.config import SelectConfig
from d2filter.formats import catalog, ranking, subset
from d2filter.formats.paths import Folder
from d2filter.stages.runner import Report


def select(
    *, report: Report, out: Folder, config: SelectConfig, ranked: int, kept_first: str
) -> dict[str, Any]:
    """Task: keep the first B of `ranked` samples; figures: kept and pruned. kept_first: the end of
    the score, high or low, that is kept first; low ones lie in the files with their sign turned.

    Memory: 24 bytes a kept sample and one part of the ranking.
    """
    size = budget.budget_of(ranked, fraction=config.fraction, budget=config.budget)
    kept_hi, kept_lo, kept_rank = [], [], []
    columns = ("uid_hi", "uid_lo", "difficulty", "rank")
    for part in ranking.iter_columns(out.sub("ranking"), columns):
        keep = budget.kept_mask(
            part["rank"].astype(np.int64),
            budget.raw_scores(part["difficulty"].astype(np.float32), kept_first),
            size,
            config.min_score,
        )
        kept_hi.append(part["uid_hi"][keep].astype(np.uint64))
        kept_lo.append(part["uid_lo"][keep].astype(np.uint64))
        kept_rank.append(part["rank"][keep].astype(np.int64))
        report(len(keep))
    hi, lo, rank = np.concatenate(kept_hi), np.concatenate(kept_lo), np.concatenate(kept_rank)
    order = uids.ascending(hi, lo)
    hi, lo, rank = hi[order], lo[order], rank[order]
    out.remove("kept")
    samples = catalog.iter_parts(out.sub("catalog"), with_features=False)
    subset.publish_kept(out, subset.kept_table(samples, hi, lo, rank))
    subset.publish(out, hi, lo)
    return {"budget": size, "kept": len(hi), "pruned": ranked - len(hi)}
