"""Ranking → subset.npy and kept/: one budget of a finished ranking (DESIGN §3, §6)."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2filter.algorithm import budget, uids
from d2filter.config import SelectConfig
from d2filter.formats import catalog, ranking, subset
from d2filter.formats.paths import Folder
from d2filter.stages.runner import Report


def select(*, report: Report, out: Folder, config: SelectConfig, ranked: int) -> dict[str, Any]:
    """Task: keep the first B of `ranked` samples; figures: kept and pruned.

    Memory: 24 bytes a kept sample and one part of the ranking.
    """
    size = budget.budget_of(ranked, fraction=config.fraction, budget=config.budget)
    kept_hi, kept_lo, kept_rank = [], [], []
    columns = ("uid_hi", "uid_lo", "difficulty", "rank")
    for part in ranking.iter_columns(out.sub("ranking"), columns):
        keep = budget.kept_mask(
            part["rank"].astype(np.int64),
            part["difficulty"].astype(np.float32),
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
    _publish_kept(out, hi, lo, rank)
    subset.publish(out, hi, lo)
    return {"budget": size, "kept": len(hi), "pruned": ranked - len(hi)}


def _publish_kept(out: Folder, hi: uids.U64, lo: uids.U64, rank: ranking.I64) -> None:
    """Write kept/ if the metadata told shard and key. hi, lo, rank: kept ones, ascending by uid."""
    shards: list[str] = []
    keys: list[str] = []
    rows = []
    start = 0
    for part in catalog.iter_parts(out.sub("catalog"), with_features=False):
        # both ascend by uid: the kept ones of this part are a run of the kept list
        known = np.flatnonzero(part.shard.is_valid().to_numpy(zero_copy_only=False))
        end = start + _count_up_to(hi[start:], lo[start:], part.hi, part.lo)
        where = uids.positions(part.hi, part.lo, hi[start:end], lo[start:end])
        mask = np.isin(where, known)
        shards += part.shard.take(where[mask]).to_pylist()
        keys += part.key.take(where[mask]).to_pylist()
        rows.append(start + np.flatnonzero(mask))
        start = end
    chosen = np.concatenate(rows)
    if chosen.size:
        subset.publish_kept(out, shards, keys, hi[chosen], lo[chosen], rank[chosen])


def _count_up_to(hi: uids.U64, lo: uids.U64, part_hi: uids.U64, part_lo: uids.U64) -> int:
    """How many of the ascending uids are at most the last of a part."""
    if not part_hi.size:
        return 0
    last_hi, last_lo = part_hi[-1], part_lo[-1]
    return int(np.count_nonzero((hi < last_hi) | ((hi == last_hi) & (lo <= last_lo))))
