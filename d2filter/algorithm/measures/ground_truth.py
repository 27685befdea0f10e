"""Quality of a ranking, for pools in which the copies and wrong pairs are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usefulness:
    """Shares of one budget's kept samples, and of all groups."""

    useful: float
    """kept samples with a right caption whose group has no member ranked above them"""
    swapped: float
    """kept samples with a wrong caption"""
    groups_covered: float
    """groups of which a member with a right caption is kept"""


def usefulness(order: I64, group: I64, swapped: Bools, size: int) -> Usefulness:
    """Judge the first `size` of a ranking against planted truth.

    order: (n,) int64, rows best first. group: (n,) int64 ≥ 0, equal for an original and its
    near-copies. swapped: (n,) bool, True where the caption is another sample's. size: 1 to n.
    """
    first = np.zeros(len(order), np.bool_)
    # the first row of each group in the order of the ranking
    first[np.unique(group[order], return_index=True)[1]] = True
    kept = order[:size]
    right = ~swapped[kept]
    return Usefulness(
        useful=float(np.mean(right & first[:size])),
        swapped=float(np.mean(~right)),
        groups_covered=np.unique(group[kept[right]]).size / np.unique(group).size,
    )


def best_order(group: I64, swapped: Bools) -> I64:
    """A ranking that no other beats: one rightly captioned member of each group first."""
    rows = np.lexsort((np.arange(len(group)), swapped, group))
    lead = np.ones(len(rows), np.bool_)
    lead[1:] = group[rows][1:] != group[rows][:-1]
    late = np.empty(len(rows), np.int64)
    # then the other rightly captioned ones, then everything else
    late[rows] = np.where(swapped[rows], 2, np.where(lead, 0, 1))
    return np.argsort(late, kind="stable").astype(np.int64, copy=False)
