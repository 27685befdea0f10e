"""Computes the share of the hardest samples to cut (`--cut-hardest auto`).

A small budget needs a large cut: the hardest samples are wrong labels, and samples that a network
with so little data cannot learn. Zheng et al. 2022 tune the share by hand. Here it is computed from
the budget and a histogram of the difficulties. Histograms of parts add up and the arithmetic is
decimal, so the partitions, order and split of the samples cannot change it.

See docs/method.md#hardest-samples.
"""

from __future__ import annotations

import math
from decimal import ROUND_FLOOR, Context, Decimal

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import quantile

I64 = npt.NDArray[np.int64]

MIDDLE = {"margin": 0.0, "el2n": math.sqrt(0.5)}
"""For each score, the difficulty from which on a sample counts as not learned: the label and the
best other class are equally probable there. Other scores define no such difficulty."""

_EXACT = Context(prec=28)
_STEP = Decimal("0.000001")  # of a share


def auto(counts: I64, kept: Decimal, *, middle: float | None = None) -> Decimal:
    """The share of the hardest samples to cut when `kept` of all samples are kept.

    counts: (65536,) int64, `quantile.upper_counts` of the difficulties of all n samples. kept:
    share of the n that a budget keeps, in (0, 1]. middle: difficulty from which on a sample counts
    as not learned; None: halfway between the lowest and the highest.

    e = the share of samples at or above the middle, and β = min(1, kept/(1 − e)) the share of the
    others that a budget has room for. The cut is

        min(e + (1 − e)·(1 − √β)²/2, 1 − kept).

    A network that has seen everything did not learn the share e, so a smaller one will not either:
    most of it is wrong or ambiguous, and it contains the wrong labels that the log can reveal. A
    small budget also leaves out the hardest of the rest, because a network that sees few samples
    needs typical ones first: (1 − √β)²/2 is 0.23 at β = 0.1, 0.15 at 0.2, 0.10 at 0.3 and 0.04 at
    0.5. The form was found by measurement, not derived (jobs/results/bench_cifar.md;
    bench_cifar_cuda.md and bench_supervised.md were measured later). At most 1 − kept is cut,
    because a larger cut would put demoted samples into the budget.

    Returns a decimal of 6 digits, 0 to below 1, rounded down; 0 if all difficulties are equal. The
    middle is compared with the bins of the histogram, which are 2⁻⁷ of a value wide or less. Raises
    ValueError for counts of no samples and a share outside (0, 1].
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept is {kept}: it must be above 0 and at most 1")
    total = int(counts.sum())
    if total == 0:
        raise ValueError("there are no samples: an automatic cut needs some")
    there = np.flatnonzero(counts)
    if there[0] == there[-1]:
        return Decimal(0)
    first = _bin_of(_halfway(int(there[0]), int(there[-1])) if middle is None else middle)
    hard = _EXACT.divide(Decimal(int(counts[first:].sum())), Decimal(total))
    learned = _EXACT.subtract(Decimal(1), hard)
    beyond = Decimal(0)
    if learned > kept:
        room = _EXACT.sqrt(_EXACT.divide(kept, learned))
        left = _EXACT.subtract(Decimal(1), room)
        beyond = _EXACT.divide(_EXACT.multiply(left, left), Decimal(2))
    share = _EXACT.add(hard, _EXACT.multiply(learned, beyond))
    most = _EXACT.subtract(Decimal(1), kept)
    return max(Decimal(0), min(share, most)).quantize(_STEP, rounding=ROUND_FLOOR)


def _halfway(low: int, high: int) -> float:
    """The middle between the lowest values of two bins."""
    return (quantile.value_of(low, 0) + quantile.value_of(high, 0)) / 2


def _bin_of(value: float) -> int:
    """The bin that contains a float32."""
    return int(np.flatnonzero(quantile.upper_counts(np.array([value], np.float32)))[0])
