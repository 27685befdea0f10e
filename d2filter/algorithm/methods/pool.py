"""`Pool`, the input of a ranking method, and `Selector`, a row of the table of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.errors import InputError

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The arrays that a ranking method may use: n ≥ 1 rows in ascending order of uid."""

    hi: uids.U64
    """(n,) first halves of the uids"""
    lo: uids.U64
    """(n,) second halves"""
    difficulty: F32
    """(n,) finite, higher is kept first"""
    features: Array
    """(n, d) float16 or float32, finite; d = 0 if the pool has no features"""
    neighbors: I64
    """(n, k) rows, −1 pads, no row is its own neighbor"""
    sqdist: F32
    """(n, k) squared distances"""
    group: I64 | None = None
    """(n,) class of each sample, ≥ 0; None: all samples are one class"""
    seed: int = 0
    """seed of the hashes"""
    redundancy: float = 1.0
    """for `infomax`: cost of similarity to a kept sample, in units of the scores' range"""
    temperature: float = 0.1
    """for `density`: temperature of the softmax over the complexity of clusters"""

    def __post_init__(self) -> None:
        n = len(self.hi)
        sizes = [len(self.lo), len(self.difficulty), len(self.features)]
        sizes += [len(self.neighbors), len(self.sqdist)]
        sizes += [] if self.group is None else [len(self.group)]
        if n == 0 or any(size != n for size in sizes):
            raise InputError(
                f"the arrays of a pool have {[n, *sizes]} rows, expected one length of at least 1"
            )
        before = (self.hi[:-1] < self.hi[1:]) | (
            (self.hi[:-1] == self.hi[1:]) & (self.lo[:-1] < self.lo[1:])
        )
        if not before.all():
            raise InputError(
                f"uid of row {int(np.argmin(before)) + 1} does not come after the one before it: "
                "sort the rows by uid and drop repeated ones"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """A ranking method: one row of `SELECTORS`."""

    name: str
    summary: str
    """one line for --help, with the source"""
    rank: Callable[[Pool], I64]
    most: int
    """number of samples up to which it is practical"""
    instead: str
    """alternative for larger pools"""
    wants: frozenset[str]
    """arrays it uses besides difficulty: a subset of {"features", "neighbors"}"""
    options: frozenset[str] = frozenset()
    """fields of `Pool` that are options of this method alone"""


def ascending(values: Array) -> I64:
    """Positions in ascending order of value; equal values stay in the order of rows, so of uids."""
    return np.argsort(values, kind="stable").astype(np.int64, copy=False)
