"""Stage select: writes subset.npy and kept/ for one budget of a finished ranking.

See docs/method.md#budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import budget, uids
from d2filter.config import SelectConfig
from d2filter.engine.task import Figures, Report
from d2filter.formats import graph, ranking, subset
from d2filter.formats.paths import Checksums, Folder
from d2filter.stages import select_soft

I64 = npt.NDArray[np.int64]
Chosen = tuple[uids.U64, uids.U64, I64, list[I64]]
"""hi, lo and rank of samples, (n,) each, and for each subset how often a sample is in it, (n,)"""


def select(
    *,
    report: Report,
    out: Folder,
    config: SelectConfig,
    ranked: int,
    kept_first: str,
    method: str,
    arch: str,
) -> Figures:
    """Task: keep the first B of `ranked` samples; in a soft selection, B samples with repeats.

    kept_first: end of the score that is kept first, high or low; files contain low ones with the
    sign turned. method, arch: for the names of several subsets. Figures: budget, kept (distinct
    samples), total (with repeats) and pruned.

    Memory: 24 bytes per sample of the largest subset, and one part of the ranking; for a soft
    selection 100 bytes per sample of the ranking.
    """
    size, several = check(config, ranked)
    chosen = _repeated if config.soft is not None else _first
    sizes = [size, *several.values()]
    hi, lo, rank, times = chosen(report, out, config, kept_first, method, sizes)
    order = uids.ascending(hi, lo)
    hi, lo, rank = hi[order], lo[order], rank[order]
    sums: Checksums = {}
    for share, count in zip(several, times[1:], strict=True):
        repeats = count[order]
        name = subset.named(method, arch, share)
        sums.update(subset.publish(out, np.repeat(hi, repeats), np.repeat(lo, repeats), name))
    repeats = times[0][order]
    hi, lo, rank = np.repeat(hi, repeats), np.repeat(lo, repeats), np.repeat(rank, repeats)
    kept_samples = subset.Kept(hi=hi, lo=lo, rank=rank)
    for write in subset.OUTPUTS.values():
        sums.update(write(out, kept_samples))
    # readers may use earlier files, so these are removed after the new ones are published
    for place in (*subset.OUTPUTS, subset.FURTHER):
        if place not in sums:
            subset.remove_others(out, place, sums)
    kept = int(np.count_nonzero(repeats))
    return {
        "budget": size,
        "kept": kept,
        "total": len(hi),
        "pruned": ranked - kept,
        "checksums": sums,
    }


def _first(
    report: Report, out: Folder, config: SelectConfig, kept_first: str, method: str,
    sizes: Sequence[int],
) -> Chosen:  # fmt: skip
    """The prefixes of the ranking: uids and ranks of the longest, and which samples each has."""
    kept_hi, kept_lo, kept_rank = [], [], []
    columns = ("uid_hi", "uid_lo", "difficulty", "rank")
    for part in ranking.iter_columns(out.sub("ranking"), columns):
        keep = budget.kept_mask(
            part["rank"].astype(np.int64),
            budget.raw_scores(part["difficulty"].astype(np.float32), kept_first),
            max(sizes),
            config.min_score,
        )
        kept_hi.append(part["uid_hi"][keep].astype(np.uint64))
        kept_lo.append(part["uid_lo"][keep].astype(np.uint64))
        kept_rank.append(part["rank"][keep].astype(np.int64))
        report(len(keep))
    rank = np.concatenate(kept_rank)
    times = [(rank < size).astype(np.int64) for size in sizes]
    return np.concatenate(kept_hi), np.concatenate(kept_lo), rank, times


def _repeated(
    report: Report, out: Folder, config: SelectConfig, kept_first: str, method: str,
    sizes: Sequence[int],
) -> Chosen:  # fmt: skip
    """Soft selections: uids and ranks of all samples, and how often each subset has them."""
    parts = list(ranking.iter_columns(out.sub("ranking"), select_soft.COLUMNS))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in select_soft.COLUMNS}
    times = select_soft.times(
        whole, config, kept_first, method, sizes, graph.read_groups(out.sub("graph"))
    )
    report(len(whole["rank"]))
    hi, lo = whole["uid_hi"].astype(np.uint64), whole["uid_lo"].astype(np.uint64)
    return hi, lo, whole["rank"].astype(np.int64), times


def check(config: SelectConfig, ranked: int) -> tuple[int, dict[Decimal, int]]:
    """Number of samples to keep in subset.npy, and for each share that has its own file. Raises
    UsageError for a budget that keeps nothing.
    """
    size = budget.budget_of(ranked, fraction=config.fraction, budget=config.budget)
    return size, {share: budget.budget_of(ranked, fraction=share) for share in shares(config)}


def shares(config: SelectConfig) -> list[Decimal]:
    """The shares that have a file of their own; empty if only one share is given."""
    if not config.also or config.fraction is None:
        return []
    return [config.fraction, *(budget.parse_fraction(share) for share in config.also)]
