"""The k-th smallest of float32 values that lie in several parts, exactly.

The bits of a float32 are turned into an integer, the *key*, that has the order of the values. A
first histogram over the upper 16 bits of the keys tells in which bin the value is; a second one,
over the lower 16 bits, finds it in that bin. Histograms of parts add up, so the number and order of
parts do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_BINS = 1 << 16


def upper_counts(values: F32) -> I64:
    """How many of the values (n,), none of them NaN, have each upper half: (65536,) int64."""
    return np.bincount(_keys(values) >> np.uint32(16), minlength=_BINS)


def lower_counts(values: F32, upper: int) -> I64:
    """The same for the lower halves of those whose upper half is `upper`."""
    keys = _keys(values)
    keys = keys[keys >> np.uint32(16) == upper]
    return np.bincount(keys & np.uint32(_BINS - 1), minlength=_BINS)


def keys_counted(values: F32, halves: Sequence[int]) -> tuple[I64, I64]:
    """Keys of the values whose upper half is one of these, ascending (m,) int64, and how many have
    each: what several lower histograms hold, without their zeros.
    """
    keys = _keys(values)
    keys = keys[np.isin(keys >> np.uint32(16), np.array(halves, np.uint32))]
    key, count = np.unique(keys, return_counts=True)
    return key.astype(np.int64), count.astype(np.int64)


def keys(values: F32) -> I64:
    """Integers (n,) that ascend as the values do; equal for equal values, −0 and 0 too."""
    return _keys(values).astype(np.int64)


def distinct(values: F32) -> tuple[I64, I64]:
    """All keys of the values, ascending (m,), and how many have each."""
    key, count = np.unique(_keys(values), return_counts=True)
    return key.astype(np.int64), count.astype(np.int64)


def locate(counts: I64, place: int) -> tuple[int, int]:
    """Bin of the value at a place (0 = smallest), and its place in there. Raises ValueError for a
    place that is not there.
    """
    below = np.cumsum(counts)
    if not 0 <= place < below[-1]:
        raise ValueError(f"place {place} of {below[-1]} values")
    found = int(np.searchsorted(below, place, side="right"))
    return found, place - int(below[found] - counts[found])


def middle(values: F32) -> float:
    """The lower median of values (n,); 0 for nothing."""
    return smallest(values, (values.size - 1) // 2) if values.size else 0.0


def value_of(upper: int, lower: int) -> float:
    """The float32 with this key."""
    key = upper << 16 | lower
    bits = key ^ (1 << 31) if key >> 31 else key ^ 0xFFFFFFFF
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def smallest(values: F32, place: int) -> float:
    """All of it for values in one piece: the one at a place, 0 = smallest."""
    upper, rest = locate(upper_counts(values), place)
    lower, _ = locate(lower_counts(values, upper), rest)
    return value_of(upper, lower)


def _keys(values: F32) -> npt.NDArray[np.uint32]:
    """uint32 that ascend as the values do; −0 counts as 0."""
    bits = np.ascontiguousarray(values + np.float32(0)).view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    return np.where(negative, ~bits, bits | np.uint32(1 << 31))
