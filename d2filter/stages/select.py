"""Ranking → subset.npy and kept/: one budget of a finished ranking (DESIGN §3, §6)."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np

from d2filter.algorithm import budget, uids
from d2filter.config import SelectConfig
from d2filter.formats import catalog, ranking, subset
from d2filter.formats.paths import Checksums, Folder
from d2filter.stages.worker import Report


def select(
    *,
    report: Report,
    out: Folder,
    config: SelectConfig,
    ranked: int,
    kept_first: str,
    method: str,
    arch: str,
) -> dict[str, Any]:
    """Task: keep the first B of `ranked` samples; figures: kept and pruned. kept_first: the end of
    the score, high or low, that is kept first; low ones lie in the files with their sign turned.
    method, arch: for the names of several subsets.

    Memory: 24 bytes a sample of the largest subset and one part of the ranking.
    """
    size, several = check(config, ranked)
    most = max(size, *several.values()) if several else size
    kept_hi, kept_lo, kept_rank = [], [], []
    columns = ("uid_hi", "uid_lo", "difficulty", "rank")
    for part in ranking.iter_columns(out.sub("ranking"), columns):
        keep = budget.kept_mask(
            part["rank"].astype(np.int64),
            budget.raw_scores(part["difficulty"].astype(np.float32), kept_first),
            most,
            config.min_score,
        )
        kept_hi.append(part["uid_hi"][keep].astype(np.uint64))
        kept_lo.append(part["uid_lo"][keep].astype(np.uint64))
        kept_rank.append(part["rank"][keep].astype(np.int64))
        report(len(keep))
    hi, lo, rank = np.concatenate(kept_hi), np.concatenate(kept_lo), np.concatenate(kept_rank)
    order = uids.ascending(hi, lo)
    hi, lo, rank = hi[order], lo[order], rank[order]
    sums: Checksums = {}
    for share, count in several.items():
        name = subset.named(method, arch, share)
        sums.update(subset.publish(out, hi[rank < count], lo[rank < count], name))
    hi, lo, rank = hi[rank < size], lo[rank < size], rank[rank < size]
    samples = catalog.iter_parts(out.sub("catalog"), with_features=False)
    shards: set[str] = set()
    table = subset.kept_table(samples, hi, lo, rank, shards)
    sums.update(subset.publish_kept(out, table, shards))
    sums.update(subset.publish(out, hi, lo))
    # readers may hold what was there before: it goes when its successors are there
    for place in ("kept", "subsets"):
        subset.remove_others(out, place, sums)
    return {"budget": size, "kept": len(hi), "pruned": ranked - len(hi), "checksums": sums}


def check(config: SelectConfig, ranked: int) -> tuple[int, dict[Decimal, int]]:
    """Samples to keep of `ranked`: of subset.npy, and of each further share. Raises UsageError for
    a budget that keeps nothing or more than there is.
    """
    size = budget.budget_of(ranked, fraction=config.fraction, budget=config.budget)
    return size, {share: budget.budget_of(ranked, fraction=share) for share in shares(config)}


def shares(config: SelectConfig) -> list[Decimal]:
    """Those that get a file each: none where only one was asked for."""
    if not config.also or config.fraction is None:
        return []
    return [config.fraction, *(budget.parse_fraction(share) for share in config.also)]
