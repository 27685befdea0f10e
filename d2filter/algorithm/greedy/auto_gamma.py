"""`--gamma auto`: the width of the kernel, from the budget and what the pool itself shows.

D2 thins a pool: of samples that lie close together one goes first and the others later. Gamma says
how close is close. The *effective share* of a gamma,

    E(gamma) = mean_i 1/(1 + Σ_j w_ij)    over the lists of the graph,

is about the share of the pool that is left when everything close is thinned to one: a sample in a
group of m near-copies counts 1/m, one that lies alone counts 1. It rises with gamma.

A pruning to the kept share f can be made in two ways: by redundancy, then E = f and the prefix
holds one of everything, whatever its score; or by score alone, then E = 1. The rule shares the
work between the two, E = f^a:

    a = max(0, 0.9 − 1.5·u) · (1 − min(1, f/(1 − u))⁴) · min(1, (1 − R)/0.15)

- u is the share of pairs that match no better than random ones (`pairs.wrong_share`). Thinning
  lifts what lies alone, and wrong pairs do: the more of them, the more the score must decide.
- The second factor ends all thinning when every right pair can be kept.
- R is the effective share at one fixed width (`FIXED`). A pool in which nothing is redundant has
  R near 1, and then there is nothing to thin.

The constants were chosen on six pools of which the truth is known; jobs/results/gamma_rules.md
shows what they give on others.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.algorithm.greedy import local_kernel, messages

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

LISTS = 1 << 16
"""that are looked at, about; a pool up to this size is looked at whole. The standard error of an
effective share is below 0.002 then"""
STEP = 1024
"""gammas are whole multiples of 1/STEP"""
MOST = 1024
"""largest gamma: only copies weigh anything then"""
FIXED = 9.0
"""gamma of R: a neighbor within half the distance to the k-th counts as a copy (w = 0.57)"""
UNKNOWN_WRONG = Fraction(1, 4)
"""taken for u where a pool cannot show it"""
MOST_WRONG = Fraction(3, 4)
"""beyond, it is the model that cannot judge these pairs, and u is taken as unknown"""

_FRACTION = 20  # bits of the target


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A gamma, and why."""

    gamma: float
    effective_share: float
    """E at this gamma"""
    target: float
    """f^a, which it is the smallest multiple of 1/STEP to reach"""
    exponent: float
    """a"""
    distinct: float
    """R"""
    lists: int
    """that were looked at"""


def chosen_rows(hi: uids.U64, lo: uids.U64, total: int) -> Bools:
    """Which samples' lists are looked at, (n,) bool; of a pool of `total` about LISTS, by a hash of
    the uid: the same ones whatever part they lie in.
    """
    if total <= LISTS:
        return np.ones(hi.size, np.bool_)
    share = LISTS * (1 << 64) // total
    chosen: Bools = uids.hashed(hi, lo, salt=uids.SALT_TUNING) < np.uint64(share)
    return chosen


def share_of(exponents: F32, gamma: float) -> int:
    """Σ_i 1/(1 + Σ_j w_ij), in units of 2⁻⁴⁰: an integer, so that the order of lists and neighbors
    does not matter.

    exponents: (m, k) float32, what gamma is multiplied by; inf where there is no neighbor.
    """
    weights = messages.edge_weights(exponents, gamma).astype(np.float64)
    one = np.float64(messages.ONE)
    sums = np.rint(weights * one).astype(np.int64).sum(axis=1)
    each = np.rint(one / (1.0 + sums / one)).astype(np.int64)
    return int(each.sum())  # 2¹⁶ lists at most, about: below 2⁵⁷


def exponent(kept: Fraction, wrong: Fraction, distinct: float) -> float:
    """a of the rule. kept: f in (0, 1]; wrong: u in [0, 1]; distinct: R in (0, 1]."""
    u = float(wrong)
    full = 1.0 if kept >= 1 - wrong else float(kept / (1 - wrong))
    base = max(0.0, 0.9 - 1.5 * u) * (1.0 - full * full * full * full)
    return base * min(1.0, max(0.0, (1.0 - distinct) / 0.15))


def tune(exponents: F32, near: F32, kept: Fraction, wrong: Fraction | None) -> Tuned:
    """Gamma for a pool of which m ≥ 1 lists are seen.

    exponents: (m, k) float32 as in `share_of`, for the kernel that is asked for; near: (m, k),
    those of the kernel `local`, which R is measured with. kept: budget as a share of what is ranked
    in earnest. wrong: u; None where it is not known.
    """
    lists = len(exponents)
    whole = lists * messages.ONE
    distinct = share_of(near, FIXED) / whole
    known = wrong is not None and wrong <= MOST_WRONG
    a = exponent(kept, wrong if wrong is not None and known else UNKNOWN_WRONG, distinct)
    # whole units: the last bits of a power differ between mathematical libraries
    units = round(float(kept) ** a * (1 << _FRACTION))
    low, high = 0, MOST * STEP
    while high - low > 1:
        middle = (low + high) // 2
        if _reaches(exponents, middle, units):
            high = middle
        else:
            low = middle
    gamma = high / STEP
    return Tuned(
        gamma=gamma,
        effective_share=share_of(exponents, gamma) / whole,
        target=units / (1 << _FRACTION),
        exponent=a,
        distinct=distinct,
        lists=lists,
    )


def _reaches(exponents: F32, steps: int, units: int) -> bool:
    share = share_of(exponents, steps / STEP)
    return share << _FRACTION >= units * len(exponents) * messages.ONE


def median_scaled(sqdist: F32, unit: float) -> F32:
    """Exponents of the kernel rbf in units of the pool's median squared distance, float32."""
    scaled: F32 = (sqdist.astype(np.float64) / unit).astype(np.float32)
    return scaled


def local_lists(sqdist: F32, reach: F32, reach_of: F32, through: Bools, floor: float) -> F32:
    """Exponents of the kernel `local` for lists, (m, k) float32; inf where nothing passes.

    sqdist: (m, k); reach: (m,) of the lists' owners; reach_of: (m, k) of the neighbors; through:
    (m, k), whether the neighbor is there and ranked in earnest.
    """
    m, k = sqdist.shape
    own = np.repeat(reach, k)
    found = local_kernel.relative(sqdist.ravel(), own, reach_of.ravel(), floor).reshape(m, k)
    return np.where(through, found, np.float32(np.inf))
