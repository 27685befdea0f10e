"""Measures how well a subset covers a pool if copies count once, and how close its samples are.

A *group* is a connected component of near-copies. Its *representative* is the member of the highest
difficulty (ties go to the smaller uid). Coverage uses the distance d from each representative to
the nearest kept sample; d is 0 if any member of its group is kept:

    coverage = mean over groups of exp(−d²/unit)

unit is the pool's median squared distance between neighbors. Coverage is 1 if every group has a
kept member, and 1/e if the nearest kept samples are as far away as neighbors usually are.

The usual measure is the mean distance of held-out *samples* to the nearest other kept sample
(AUCpr). It counts a group of a thousand copies a thousand times, so that subsets with many copies
seem to cover the pool. A kept sample does not cover itself, so that a subset with one sample of
each kind seems to cover nothing. If copies count once, a second kept copy gains nothing and takes a
place in the budget. Coverage does not measure quality, because wrong pairs are often alone and form
groups too: compare it together with the mean score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features, uids
from d2filter.algorithm.greedy import demoted, messages, near_copies
from d2filter.algorithm.measures import coverage

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The groups of near-copies of n samples; a sample without near-copies is a group."""

    group: I64
    """(n,) number of each sample's group"""
    representative: I64
    """(g,) row of the best member of each group"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowding:
    """How close the kept samples of a subset are to each other."""

    copies: float
    """share of them with a kept near-copy in their list; 0 if nothing is kept"""
    effective: float
    """effective share, see `effective_share`; NaN if nothing is kept"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The measures of one subset."""

    coverage: float
    groups: float
    """share of the groups with a kept member"""
    copies: float
    effective: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """q groups whose distance to the nearest kept sample is measured."""

    rows: I64
    """(q,) their representatives, ascending by uid"""
    neighbors: I64
    """(q, m) the samples nearest to each representative, itself included, nearest first"""
    distance: F32
    """(q, m) Euclidean distances"""


def groups(
    hi: uids.U64, lo: uids.U64, difficulty: F32, neighbors: I64, sqdist: F32, near: float
) -> Groups:
    """Connected components of the pairs whose squared distance is at most `near`.

    hi, lo, difficulty: (n,). neighbors: (n, k) rows, −1 pads. sqdist: (n, k).
    """
    root = np.arange(len(hi))
    source, target = demoted.near(neighbors, sqdist, near)
    ids, first = demoted.components(source, target)
    root[ids] = ids[first]
    _, group = np.unique(root, return_inverse=True)
    order = np.lexsort((lo, hi, -difficulty.astype(np.float64), group))
    leads = np.ones(order.size, np.bool_)
    leads[1:] = group[order[1:]] != group[order[:-1]]
    return Groups(group=group.astype(np.int64, copy=False), representative=order[leads])


def share_of_groups(found: Groups, kept: Bools) -> float:
    """Share of the groups with a kept member. kept: (n,) bool."""
    return float(_covered(found, kept).mean())


def watch(rows: features.F16, hi: uids.U64, lo: uids.U64, found: Groups, size: int) -> Watched:
    """Up to `size` groups, chosen by a hash of the representative's uid. rows: (n, d) features."""
    lead = found.representative
    chosen = uids.hash_sample(hi[lead], lo[lead], size, salt=uids.SALT_HELD_OUT)
    everyone = np.arange(len(hi))
    most = min(coverage.LOOKED_THROUGH, everyone.size)
    near, distance = coverage.nearest(rows, rows[lead[chosen]], everyone, most)
    return Watched(rows=lead[chosen], neighbors=near, distance=distance)


def distances(rows: features.F16, found: Groups, watched: Watched, kept: Bools) -> F64:
    """Distance of each watched group to the nearest kept sample, (q,): 0 if a member is kept, inf
    if no sample is kept. rows: (n, d). kept: (n,) bool.
    """
    far = coverage.to_kept(rows, watched.rows, watched.neighbors, watched.distance, kept)
    far[_covered(found, kept)[found.group[watched.rows]]] = 0.0
    return far


def closeness(distance: F64, unit: float) -> float:
    """Coverage: mean of exp(−d²/unit) over the watched groups, in [0, 1]; high is good.

    distance: (q,), see `distances`. unit: of the whole pool, see `demoted.unit`.
    """
    return float(np.exp(-np.square(distance) / unit).mean())


def crowding(neighbors: I64, sqdist: F32, kept: Bools, near: float, unit: float) -> Crowding:
    """How close the kept samples are to each other.

    neighbors, sqdist: (n, k) lists. kept: (n,) bool. near: squared distance up to which samples are
    near-copies. unit: of the whole pool, see `demoted.unit`.
    """
    among = (neighbors >= 0) & kept[neighbors]
    return crowding_of(among[kept], sqdist[kept], near, unit)


def crowding_of(among: Bools, sqdist: F32, near: float, unit: float) -> Crowding:
    """`crowding` for m kept samples. among, sqdist: (m, k) which entries of their lists are kept,
    and the squared distances of the entries.
    """
    if not len(among):
        return Crowding(copies=0.0, effective=float("nan"))
    close = (among & (sqdist <= np.float32(near))).any(axis=1)
    return Crowding(
        copies=float(close.mean()), effective=float(effective_share(among, sqdist, unit).mean())
    )


def effective_share(among: Bools, sqdist: F32, unit: float) -> F64:
    """1/(1 + Σ_j w_ij) for each of m kept samples, over the kept samples in its list, (m,).

    w = exp(−d²/unit), for all settings, so that they can be compared. The value is 1 if no kept
    sample is near, and 1/2 if one kept sample is equal and no other is near.
    """
    weights = messages.edge_weights(sqdist, 1.0 / unit).astype(np.float64)
    share: F64 = 1.0 / (1.0 + np.where(among, weights, 0.0).sum(axis=1))
    return share


def _covered(found: Groups, kept: Bools) -> Bools:
    covered = np.zeros(found.representative.size, np.bool_)
    covered[found.group[kept]] = True
    return covered


class Yardstick:
    """Measures subsets of one pool, all in the same way."""

    def __init__(
        self, rows: features.F16, hi: uids.U64, lo: uids.U64, difficulty: F32, neighbors: I64,
        sqdist: F32, *, watched: int,
    ) -> None:  # fmt: skip
        """rows: (n, d) features. neighbors, sqdist: (n, k) lists; entries of −1 do not count.
        watched: largest number of groups whose distances are measured.
        """
        self.unit = demoted.unit(sqdist)
        """median squared distance between neighbors"""
        self.near = near_copies.near(sqdist)
        """squared distance up to which samples are near-copies: that of `--collapse-copies auto`
        for lists of this length"""
        self.groups = groups(hi, lo, difficulty, neighbors, sqdist, self.near)
        self._rows, self._neighbors, self._sqdist = rows, neighbors, sqdist
        self._watched = watch(rows, hi, lo, self.groups, watched)

    def distances(self, kept: Bools) -> F64:
        """Distances of the watched groups to the nearest kept sample, (q,). kept: (n,) bool."""
        return distances(self._rows, self.groups, self._watched, kept)

    def measure(self, kept: Bools, distance: F64 | None = None) -> Measured:
        """All measures of a subset. kept: (n,) bool. distance: result of `distances`, if known."""
        crowd = crowding(self._neighbors, self._sqdist, kept, self.near, self.unit)
        far = self.distances(kept) if distance is None else distance
        return Measured(
            coverage=closeness(far, self.unit),
            groups=share_of_groups(self.groups, kept),
            copies=crowd.copies,
            effective=crowd.effective,
        )
