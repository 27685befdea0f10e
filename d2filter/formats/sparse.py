"""Reads a few rows of parquet parts, by graph id or uid, without reading the other row groups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.errors import InputError
from d2filter.formats import tables
from d2filter.formats.paths import Folder


class Sparse:
    """The parts of graph/ or ranking/. Rows are numbered over all parts, in name order; inside a
    part they ascend by uid. Reads the footers on construction.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._places: list[tuple[str, int]] = []
        """part and row group, in order"""
        self._bounds: list[tuple[int, int]] = []
        """smallest and largest uid_hi of each"""
        sizes = []
        for name in folder.names(".parquet"):
            with tables.open_table(folder, name) as parquet:
                for number in range(parquet.num_row_groups):
                    group = parquet.metadata.row_group(number)
                    if not group.num_rows:
                        continue  # of a partition without samples
                    statistics = group.column(0).statistics
                    self._places.append((name, number))
                    self._bounds.append((statistics.min, statistics.max))
                    sizes.append(group.num_rows)
        if not self._places:
            raise InputError(f"{folder.url} holds no parts")
        self._starts = np.array([0, *accumulate(sizes)], np.int64)

    @property
    def total(self) -> int:
        """Rows of all parts."""
        return int(self._starts[-1])

    def find(self, hi: int, lo: int) -> int:
        """The row of a uid, −1 where it is missing."""
        return int(self.find_all(np.array([hi], np.uint64), np.array([lo], np.uint64))[0])

    def find_all(self, hi: uids.U64, lo: uids.U64) -> npt.NDArray[np.int64]:
        """The rows of some uids, (n,) int64, −1 where one is missing."""
        found = np.full(hi.size, -1, np.int64)
        for place, (low, high) in enumerate(self._bounds):
            maybe = np.flatnonzero((found < 0) & (low <= hi) & (hi <= high))
            if not maybe.size:
                continue
            # every part has a group that a uid may lie in, and one of them has its first half
            known_hi = self.read_row_group(place, ("uid_hi",))["uid_hi"]
            at = np.searchsorted(known_hi, hi[maybe])  # not beyond: high is there
            maybe = maybe[known_hi[at] == hi[maybe]]
            if not maybe.size:
                continue
            known_lo = self.read_row_group(place, ("uid_lo",))["uid_lo"]
            at = uids.positions(known_hi, known_lo, hi[maybe], lo[maybe])
            found[maybe] = np.where(at >= 0, self._starts[place] + at, -1)
        return found

    def rows(
        self, numbers: npt.NDArray[np.int64], columns: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """Columns of some rows, in the given order; (n, k) for lists."""
        place = np.searchsorted(self._starts, numbers, side="right") - 1
        out: dict[str, npt.NDArray[Any]] = {}
        for p in np.unique(place).tolist():
            where = np.flatnonzero(place == p)
            held = self.read_row_group(p, columns)
            for name, values in held.items():
                if name not in out:
                    out[name] = np.empty((numbers.size, *values.shape[1:]), values.dtype)
                out[name][where] = values[numbers[where] - self._starts[p]]
        return out

    def read_row_group(self, place: int, columns: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Columns of a row group; place: its number, counted over all parts."""
        name, number = self._places[place]
        with tables.open_table(self._folder, name) as parquet:
            table = parquet.read_row_group(number, columns=list(columns))
        return {column: tables.to_array(table.column(column)) for column in columns}
