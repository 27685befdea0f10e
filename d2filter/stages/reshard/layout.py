"""Decides which sample of `reshard` goes to which new shard, while the input shards are searched.

Without a shuffle, the content of a new shard is known as soon as the inputs up to its last sample
have been searched, so it can be written while other inputs are still searched. A shuffle needs all
of them first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.formats import uid as uid_format
from d2filter.formats.subset import DTYPE

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedSamples:
    """Samples of a new shard, in its order; all (n,)."""

    index: I32
    """number of the index that knows the sample"""
    row: I32
    """in that index"""
    copy: I32
    """0 for the first of a uid, 1 for its first repetition, …"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Samples in some order, with their uids."""

    rows: PlacedSamples
    ids: npt.NDArray[np.void]
    """(n,) of (u8, u8)"""

    def take(self, some: slice | I64) -> _Found:
        """A copy of some of them, so that the others can be freed."""
        rows = {name: getattr(self.rows, name)[some].copy() for name in _COLUMNS}
        return _Found(rows=PlacedSamples(**rows), ids=self.ids[some].copy())


_COLUMNS = ("index", "row", "copy")


class Placing:
    """Takes what each index holds, in order, and lays out one new shard after the other.

    A uid that the subset repeats comes as often, side by side; one that the indexes repeat is taken
    where it stands first. Memory: 25 bytes a uid of the subset, besides the subset itself, and 28 a
    found sample, of which 16 stay; shuffled, some 100 a sample.
    """

    def __init__(
        self, subset: npt.NDArray[np.void], *, shard_size: int, shuffle: int | None
    ) -> None:
        """subset: (n,) of (u8, u8), ascending. shuffle: seed, None for the order of the indexes."""
        hi, lo = subset["f0"], subset["f1"]
        begins = np.flatnonzero(~uids.repeats(hi, lo))
        self._hi, self._lo = np.ascontiguousarray(hi[begins]), np.ascontiguousarray(lo[begins])
        self._times = np.diff(np.append(begins, hi.size))
        self._there = np.zeros(begins.size, np.bool_)
        self._size = shard_size
        self._seed = shuffle
        self._indexes = 0
        self._held: list[_Found] = []  # found, and not yet in a shard
        self._waiting = 0
        self._ids: list[npt.NDArray[np.void]] = []
        self.repeated = 0
        """samples that were left out, for they stood elsewhere before"""

    def add(self, hi: uids.U64, lo: uids.U64) -> list[PlacedSamples]:
        """The new shards that are settled by the next index, with samples hi, lo (m,) of the
        subset.
        """
        at = uids.positions(self._hi, self._lo, hi, lo)
        _, first = np.unique(at, return_index=True)
        new = np.sort(first[~self._there[at[first]]])
        self._there[at[new]] = True
        self.repeated += hi.size - new.size
        times = self._times[at[new]]
        row = np.repeat(new, times)
        copy = np.arange(row.size) - np.repeat(np.cumsum(times) - times, times)
        ids = np.empty(row.size, DTYPE)
        ids["f0"], ids["f1"] = hi[row], lo[row]
        rows = PlacedSamples(
            index=np.full(row.size, self._indexes, np.int32),
            row=row.astype(np.int32),
            copy=copy.astype(np.int32),
        )
        self._indexes += 1
        self._held.append(_Found(rows=rows, ids=ids))
        self._waiting += row.size
        whole = 0 if self._seed is not None else self._waiting // self._size
        return self._cut(whole * self._size)

    def close(self) -> list[PlacedSamples]:
        """The new shards that are left, after the last index."""
        if self._seed is not None and self._held:
            self._held = [_shuffled(_joined(self._held), self._seed)]
        return self._cut(self._waiting)

    def _cut(self, samples: int) -> list[PlacedSamples]:
        if not samples:
            return []
        held = _joined(self._held)
        bounds = [*range(0, samples, self._size), samples]
        cut = [held.take(slice(a, b)) for a, b in itertools.pairwise(bounds)]
        self._held = [held.take(slice(samples, None))]
        self._waiting -= samples
        self._ids += [found.ids for found in cut]
        return [found.rows for found in cut]

    @property
    def ids(self) -> list[npt.NDArray[np.void]]:
        """Uids of each new shard in its order, (n,) of (u8, u8)."""
        return self._ids

    @property
    def missing(self) -> int:
        """How many of the subset were in no index so far, each repetition counted."""
        return int(self._times[~self._there].sum())

    @property
    def first_missing(self) -> str:
        """The least uid of those, empty for none."""
        gone = np.flatnonzero(~self._there)[:1]
        return "".join(uid_format.to_hex(self._hi[gone], self._lo[gone]))


def _joined(parts: Sequence[_Found]) -> _Found:
    rows = {n: np.concatenate([getattr(part.rows, n) for part in parts]) for n in _COLUMNS}
    return _Found(rows=PlacedSamples(**rows), ids=np.concatenate([part.ids for part in parts]))


def _shuffled(found: _Found, seed: int) -> _Found:
    """By a hash of uid and repetition: the order that the samples had before leaves no trace."""
    hi, lo, copy = found.ids["f0"], found.ids["f1"], found.rows.copy
    key = uids.hashed(hi, lo + copy.astype(np.uint64), salt=uids.SALT_SHUFFLE, seed=seed)
    return found.take(np.lexsort((copy, lo, hi, key)))
