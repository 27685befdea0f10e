"""How well a subset covers its pool, measured without knowing the truth.

Every measure is a function of a mask of kept samples, so that any method at any budget can be
compared in one table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features, uids

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

DECILES = 10

LOOKED_THROUGH = 256  # nearest ones of a sample, before all that is kept is
BLOCK = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """q samples that measure coverage, and where the pool lies around them."""

    rows: I64
    """(q,) ascending by uid"""
    neighbors: I64
    """(q, m) the nearest samples that are not held out, nearest first"""
    distance: F32
    """(q, m) Euclidean"""


def hold_out(
    rows: features.F16, hi: uids.U64, lo: uids.U64, size: int, *, seed: int = 0
) -> HeldOut:
    """Choose samples by a hash of the uid and find what lies around them.

    rows: (n, d) features. At most half of the pool is held out. Raises ValueError for n < 2.
    """
    n = len(hi)
    if n < 2:
        raise ValueError("coverage needs two samples at least")
    chosen = uids.hash_sample(hi, lo, min(size, n // 2), salt=uids.SALT_HELD_OUT, seed=seed)
    others = np.setdiff1d(np.arange(n), chosen)
    near, distance = nearest(rows, rows[chosen], others, min(LOOKED_THROUGH, others.size))
    return HeldOut(rows=chosen, neighbors=near, distance=distance)


def aucpr(rows: features.F16, held: HeldOut, kept: Bools) -> float:
    """Mean distance of the held-out samples to the nearest kept one; lower is better (the area
    under the curve of coverage against radius, Zheng et al. 2022). See `nearest_kept`.
    """
    return float(nearest_kept(rows, held, kept).mean())


def nearest_kept(rows: features.F16, held: HeldOut, kept: Bools) -> F64:
    """Distance of each held-out sample to the nearest kept one, (q,). A held-out sample does not
    cover itself or another one.

    rows: (n, d). kept: (n,) bool. inf when nothing is kept but held-out samples.
    """
    others = kept.copy()
    others[held.rows] = False
    return to_kept(rows, held.rows, held.neighbors, held.distance, others)


def to_kept(rows: features.F16, chosen: I64, near: I64, distance: F32, kept: Bools) -> F64:
    """Distance of some samples to the nearest kept one, (q,) float64; inf when nothing is kept.

    rows: (n, d) features. chosen: (q,) rows. near, distance: (q, m) what lies nearest to each, see
    `nearest`; looked through before all that is kept. kept: (n,) bool.
    """
    there = kept[near]
    first = np.argmax(there, axis=1)
    found: F64 = distance[np.arange(first.size), first].astype(np.float64)
    far = ~there.any(axis=1)
    if far.any():
        candidates = np.flatnonzero(kept)
        if not candidates.size:
            return np.full(first.size, np.inf)
        found[far] = nearest(rows, rows[chosen[far]], candidates, 1)[1][:, 0]
    return found


def kept_by_decile(values: npt.NDArray[np.floating], kept: Bools) -> F64:
    """Share kept in each tenth of the pool by ascending value, (10,); values: (n,).

    Equal values count with the share that is kept of all of them, because their order has no
    meaning. NaN for a tenth without samples.
    """
    order = np.argsort(values, kind="stable")
    _, tie = np.unique(values[order], return_inverse=True)
    share = np.bincount(tie, kept[order]) / np.bincount(tie)
    parts = np.array_split(share[tie], DECILES)
    return np.array([part.mean() if part.size else np.nan for part in parts])


def spacing(sqdist: F32) -> F32:
    """Distance to the farthest neighbor in the list, (n,): large where a sample lies alone.
    sqdist: (n, k), inf pads; inf for an empty list.
    """
    finite = np.where(np.isfinite(sqdist), sqdist, -1).max(axis=1, initial=-1)
    return np.where(finite >= 0, np.sqrt(np.maximum(finite, 0)), np.inf).astype(np.float32)


def centers(hi: uids.U64, lo: uids.U64, count: int, *, seed: int = 0) -> I64:
    """`count` rows, or all, chosen by a hash of the uid, ascending by uid."""
    return uids.hash_sample(hi, lo, count, salt=uids.SALT_HELD_OUT, seed=seed + 1)


def cells(rows: features.F16, hi: uids.U64, lo: uids.U64, count: int, *, seed: int = 0) -> I64:
    """Cell of each sample, (n,): the nearest of `centers`."""
    chosen = centers(hi, lo, count, seed=seed)
    out = np.empty(len(hi), np.int64)
    middle = rows[chosen].astype(np.float32)
    norms = np.square(middle).sum(axis=1)
    for begin in range(0, len(hi), BLOCK):
        some = slice(begin, begin + BLOCK)
        out[some] = np.argmin(norms - 2 * (rows[some].astype(np.float32) @ middle.T), axis=1)
    return out


def jaccard(a: Bools, b: Bools) -> float:
    """|A ∩ B| / |A ∪ B| of two subsets of one pool, (n,) bool; 1 for two empty ones."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def nearest(rows: features.F16, queries: features.F16, among: I64, m: int) -> tuple[I64, F32]:
    """The m rows of `among` (ascending) nearest to each query, nearest first, and distances."""
    wide = queries.astype(np.float32)
    near = np.empty((len(queries), 0), np.int64)
    distance = np.empty((len(queries), 0), np.float32)
    for begin in range(0, among.size, BLOCK):
        some = among[begin : begin + BLOCK]
        block = rows[some].astype(np.float32)
        gap = np.square(block).sum(axis=1) - 2 * (wide @ block.T)
        near = np.concatenate([near, np.broadcast_to(some, gap.shape)], axis=1)
        distance = np.concatenate([distance, gap], axis=1)
        if near.shape[1] > m:
            best = np.argpartition(distance, m - 1, axis=1)[:, :m]
            near = np.take_along_axis(near, best, axis=1)
            distance = np.take_along_axis(distance, best, axis=1)
    exact = np.empty(near.shape, np.float32)
    for at, query in enumerate(queries.astype(np.float64)):
        exact[at] = np.square(rows[near[at]].astype(np.float64) - query).sum(axis=1)
    order = np.lexsort((near, exact), axis=1)
    return (
        np.take_along_axis(near, order, axis=1),
        np.sqrt(np.take_along_axis(exact, order, axis=1)),
    )
