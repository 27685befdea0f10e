"""Computes the settings of a ranking that depend on the whole pool, for a pool in memory.

These are the difficulty above which samples are demoted, the median distance to the last neighbor,
the distance up to which samples are near-copies, the demoted samples, and gamma.
`stages/rank/auto_settings.py` computes the same values on partitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from d2filter.algorithm import budget, quantile, uids
from d2filter.algorithm.greedy import auto_cut, auto_gamma, demoted, local_kernel, near_copies
from d2filter.algorithm.scores import mismatched

F32 = demoted.F32
I64 = demoted.I64
Bools = demoted.Bools


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFacts:
    """Facts of a pool that its graph does not contain."""

    wrong: Fraction | None = None
    """share of pairs that match no better than random pairs; None: unknown"""
    learned_below: float | None = None
    """samples of this difficulty or more count as not learned, see `auto_cut.MIDDLE`; None: the
    score defines no such value"""

    @classmethod
    def from_catalog(cls, figures: Mapping[str, Any]) -> PoolFacts:
        """The facts in the figures of a catalog, as the record of its stage contains them."""
        score = figures.get("score", {}).get("name", "")
        return cls(wrong=mismatched.wrong_share(figures), learned_below=auto_cut.MIDDLE.get(score))


@dataclass(frozen=True, slots=True, kw_only=True)
class Requested:
    """The settings of a configuration, before they are fitted to a pool."""

    kernel: str
    gamma: float | None
    """None: auto"""
    median: bool
    """whether gamma is in units of the median squared distance between neighbors"""
    cut_hardest: Decimal | None
    """None: auto"""
    copies: float | Literal["auto"] | None
    """squared distance up to which neighbors are near-copies; None: no near-copies are demoted"""
    tuned_for: Decimal
    """kept share that automatic settings are fitted to"""
    d2: bool
    """whether the method is D2; other methods use no edge weights"""

    @property
    def reaches(self) -> bool:
        """Whether the median distance to the last neighbor is needed."""
        return self.copies == "auto" or self.tunes or (self.d2 and self.kernel == "local")

    @property
    def tunes(self) -> bool:
        """Whether gamma is computed from the pool."""
        return self.d2 and self.gamma is None

    def auto_cut(self, counts: I64, facts: PoolFacts) -> Decimal:
        """The share of the hardest samples to demote, for `--cut-hardest auto`.

        counts: `quantile.upper_counts` of the difficulties of all samples.
        """
        return auto_cut.auto(counts, self.tuned_for, middle=facts.learned_below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The settings, fitted to a pool."""

    k: int
    """number of neighbors in each list that count"""
    gamma: float = 0.0
    unit: float = 1.0
    """squared distance that is the unit of gamma"""
    floor: float = 1.0
    """smallest σ² of the kernel `local`"""
    cut: str = "0"
    """largest share of the hardest samples that is demoted, a decimal"""
    above: float | None = None
    """samples of higher difficulty are demoted; None: no sample is demoted for its difficulty"""
    copies_sqdist: float | None = None
    """neighbors up to this squared distance are near-copies; None: no near-copies are demoted"""
    copies: int = 0
    """number of samples that are demoted as near-copies of a better sample"""
    tuned: dict[str, Any] = field(default_factory=dict)
    """if gamma was computed from the pool: the fields of `auto_gamma.Tuned`, `tuned_for` and
    `wrong_share`"""


def resolve(
    requested: Requested,
    difficulty: F32,
    hi: uids.U64,
    lo: uids.U64,
    neighbors: I64,
    sqdist: F32,
    facts: PoolFacts,
) -> tuple[Resolved, Bools]:
    """Fit the requested settings to a pool. Returns them, and which samples are demoted, (n,) bool.

    difficulty, hi, lo: (n,); neighbors: (n, k) rows, −1 pads; sqdist: (n, k), inf where padded.
    """
    n = difficulty.size
    reach = local_kernel.reach(sqdist)
    median_reach = quantile.middle(reach) if requested.reaches else 0.0
    unit = demoted.unit(sqdist) if requested.median else 1.0
    most: float | None
    most = near_copies.threshold(median_reach) if requested.copies == "auto" else requested.copies
    share = requested.cut_hardest
    if share is None:
        share = requested.auto_cut(quantile.upper_counts(difficulty), facts)
    last = demoted.mask(
        difficulty, hi, lo, neighbors, sqdist, cut_hardest=share, collapse_copies=most
    )
    above = demoted.hardest_above(difficulty, share) if demoted.cut_size(n, share) else None
    cut = 0 if above is None else int(np.count_nonzero(difficulty > np.float32(above)))
    floor = local_kernel.floor_of(median_reach)
    gamma, tuned = 0.0 if requested.gamma is None else requested.gamma, {}
    if requested.tunes:
        rows = np.flatnonzero(~last & auto_gamma.chosen_rows(hi, lo, n))
        there = neighbors[rows] >= 0
        through = there & ~last[np.where(there, neighbors[rows], 0)]
        reach_of = reach[np.where(there, neighbors[rows], 0)]
        lists = Lists(sqdist=sqdist[rows], reach=reach[rows], reach_of=reach_of, through=through)
        tuned = tune(requested, lists, n, int(last.sum()), floor, unit, facts)
        gamma = tuned["gamma"]
    found = Resolved(
        k=sqdist.shape[1],
        gamma=gamma, unit=unit, floor=floor, cut=str(share), above=above, copies_sqdist=most,
        copies=int(last.sum()) - cut, tuned=tuned,
    )  # fmt: skip
    return found, last


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """The neighbor lists from which gamma is computed, in any order."""

    sqdist: F32
    """(m, k)"""
    reach: F32
    """(m,) squared distance of each list's owner, which is not demoted, to its last neighbor"""
    reach_of: F32
    """(m, k) the same for the neighbors in the lists"""
    through: Bools
    """(m, k) whether the entry is a neighbor that is not demoted"""


def tune(
    requested: Requested,
    lists: Lists,
    total: int,
    last: int,
    floor: float,
    unit: float,
    facts: PoolFacts,
) -> dict[str, Any]:
    """Compute gamma. Returns it with the figures that determine it.

    total: samples of the pool; last: number of demoted samples.
    """
    near = auto_gamma.local_lists(lists.sqdist, lists.reach, lists.reach_of, lists.through, floor)
    if requested.kernel == "local":
        exponents = near
    else:
        scaled = auto_gamma.median_scaled(lists.sqdist, unit)
        scaled = np.where(lists.through, scaled, np.float32(np.inf))
        exponents = np.sqrt(scaled) if requested.kernel == "exp" else scaled
    earnest = total - last
    size = min(budget.floor_of(requested.tuned_for, total), earnest)
    kept = Fraction(max(size, 1), max(earnest, 1))
    found = auto_gamma.tune(exponents, near, kept, facts.wrong)
    share = None if facts.wrong is None else float(facts.wrong)
    return {**asdict(found), "tuned_for": str(requested.tuned_for), "wrong_share": share}
