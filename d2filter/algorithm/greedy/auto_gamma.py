"""Computes gamma from the budget and the pool (`--gamma auto`).

D2 thins a pool: it selects one of several close samples early and the others later. Gamma sets how
close a neighbor must be to count. The *effective share* of a gamma,

    E(gamma) = mean_i 1/(1 + Σ_j w_ij)    over the lists of the graph,

is about the share of the pool that is left when close samples count once: a sample in a group of m
near-copies counts 1/m, a sample without close neighbors counts 1. E rises with gamma.

There are two extreme ways to keep a share f of a pool. By redundancy alone, E = f: the subset
contains one sample of every group, whatever its score. By score alone, E = 1. The rule lies between
them, E = f^a:

    a = max(0, 0.9 − 1.5·u) · (1 − min(1, f/(1 − u))⁴) · min(1, (1 − R)/0.15)

- u is the share of pairs that match no better than random pairs (`mismatched.wrong_share`).
  Thinning favors samples without close neighbors, and wrong pairs have none: the larger u, the more
  the score must decide.
- The second factor ends all thinning when the budget has room for every right pair.
- R is the effective share at a fixed gamma (`FIXED`). In a pool without redundancy R is near 1, and
  nothing needs thinning.

The constants were chosen on six pools whose truth is known; jobs/results/gamma_rules.md has the
results on other pools.

See docs/method.md#automatic-gamma.
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
"""about so many lists are used, or all lists of a pool of up to this size; the standard error of an
effective share is then below 0.002"""
STEP = 1024
"""gammas are whole multiples of 1/STEP"""
MOST = 1024
"""largest gamma: only edges between copies have a weight then"""
FIXED = 9.0
"""gamma of R: a neighbor within half the distance to the k-th counts as a copy (w = 0.57)"""
UNKNOWN_WRONG = Fraction(1, 4)
"""value of u if it is unknown"""
MOST_WRONG = Fraction(3, 4)
"""above this value the model cannot judge these pairs, and u counts as unknown"""

_FRACTION = 20  # fractional bits of the target


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A gamma, and the values that determine it."""

    gamma: float
    effective_share: float
    """E at this gamma"""
    target: float
    """f^a; gamma is the smallest multiple of 1/STEP whose effective share is at least this"""
    exponent: float
    """a"""
    distinct: float
    """R"""
    lists: int
    """number of lists that were used"""


def chosen_rows(hi: uids.U64, lo: uids.U64, total: int) -> Bools:
    """Which samples' lists are used, (n,) bool: about LISTS of a pool of `total` samples.

    A hash of the uid chooses, so the choice does not depend on the part that contains a sample.
    """
    if total <= LISTS:
        return np.ones(hi.size, np.bool_)
    share = LISTS * (1 << 64) // total
    chosen: Bools = uids.hashed(hi, lo, salt=uids.SALT_TUNING) < np.uint64(share)
    return chosen


def share_of(exponents: F32, gamma: float) -> int:
    """Σ_i 1/(1 + Σ_j w_ij), in units of 2⁻⁴⁰: an integer, so that the order of lists and neighbors
    does not matter.

    exponents: (m, k) float32, the factors of gamma; inf where there is no neighbor.
    """
    weights = messages.edge_weights(exponents, gamma).astype(np.float64)
    one = np.float64(messages.ONE)
    sums = np.rint(weights * one).astype(np.int64).sum(axis=1)
    each = np.rint(one / (1.0 + sums / one)).astype(np.int64)
    return int(each.sum())  # about 2¹⁶ lists at most: the sum is below 2⁵⁷


def exponent(kept: Fraction, wrong: Fraction, distinct: float) -> float:
    """The exponent a. kept: f in (0, 1]; wrong: u in [0, 1]; distinct: R in (0, 1]."""
    u = float(wrong)
    full = 1.0 if kept >= 1 - wrong else float(kept / (1 - wrong))
    base = max(0.0, 0.9 - 1.5 * u) * (1.0 - full * full * full * full)
    return base * min(1.0, max(0.0, (1.0 - distinct) / 0.15))


def tune(exponents: F32, near: F32, kept: Fraction, wrong: Fraction | None) -> Tuned:
    """Compute gamma from m ≥ 1 lists of a pool.

    exponents: (m, k) float32 as in `share_of`, for the kernel of the configuration; near: (m, k),
    for the kernel `local`, which determines R. kept: budget as a share of the samples that are not
    demoted. wrong: u; None: unknown.
    """
    lists = len(exponents)
    whole = lists * messages.ONE
    distinct = share_of(near, FIXED) / whole
    known = wrong is not None and wrong <= MOST_WRONG
    a = exponent(kept, wrong if wrong is not None and known else UNKNOWN_WRONG, distinct)
    # rounded, because the last bits of a power differ between mathematical libraries
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
    """Exponents of the kernel `rbf` in units of the pool's median squared distance, float32."""
    scaled: F32 = (sqdist.astype(np.float64) / unit).astype(np.float32)
    return scaled


def local_lists(sqdist: F32, reach: F32, reach_of: F32, through: Bools, floor: float) -> F32:
    """Exponents of the kernel `local` for lists, (m, k) float32; inf where `through` is False.

    sqdist: (m, k); reach: (m,) of the lists' owners; reach_of: (m, k) of the neighbors; through:
    (m, k), whether the entry is a neighbor that is not demoted.
    """
    m, k = sqdist.shape
    own = np.repeat(reach, k)
    found = local_kernel.relative(sqdist.ravel(), own, reach_of.ravel(), floor).reshape(m, k)
    return np.where(through, found, np.float32(np.inf))
