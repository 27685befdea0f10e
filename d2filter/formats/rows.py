"""Arrays of one row a sample that lie in parts: NAME-00000.npy, NAME-00001.npy, …

A sample's *number* is its row over all parts in name order. Only what is asked for is read: from a
local disk by memory map, from elsewhere part by part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.errors import InputError
from d2filter.formats.paths import Folder
from d2filter.formats.tables import first_line

I64 = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Row-aligned parts of one array. `starts` has one entry more than there are parts."""

    folder: Folder
    name: str
    starts: tuple[int, ...]
    column: str = ""
    """of parts that `write_columns` wrote"""

    @property
    def total(self) -> int:
        """Rows of all parts."""
        return self.starts[-1]

    def part(self, number: int) -> Array:
        """One part; a memory map on a local disk."""
        column = f".{self.column}" if self.column else ""
        return read_array(self.folder, f"{self.name}-{number:05d}{column}.npy")

    def gather(self, numbers: I64) -> Array:
        """Rows of the given samples, in any order."""
        bounds = np.asarray(self.starts)
        part = np.searchsorted(bounds, numbers, side="right") - 1
        out: Array | None = None
        for p in np.unique(part).tolist():
            where = np.flatnonzero(part == p)
            rows = self.part(p)
            if out is None:
                out = np.empty((numbers.size, *rows.shape[1:]), rows.dtype)
            out[where] = rows[numbers[where] - bounds[p]]
        if out is None:
            sample = self.part(0)
            return np.empty((0, *sample.shape[1:]), sample.dtype)
        return out


def read_array(folder: Folder, name: str) -> Array:
    """One .npy file; a memory map on a local disk. Raises InputError for a broken one."""
    local = folder.local
    try:
        if local is not None:
            mapped: Array = np.load(local / name, mmap_mode="r", allow_pickle=False)
            return mapped
        with folder.reading(name) as stream:
            loaded: Array = np.load(stream, allow_pickle=False)
            return loaded
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{folder.where(name)} is no readable .npy file: {first_line(error)}"
        ) from error


def write_array(folder: Folder, name: str, array: Array) -> None:
    """Publish one .npy file."""
    with folder.publish(name) as path, path.open("wb") as stream:
        np.save(stream, np.ascontiguousarray(array))


def write_columns(folder: Folder, stem: str, **columns: Array) -> None:
    """Publish row-aligned arrays, one file each: STEM.NAME.npy."""
    for name, values in columns.items():
        write_array(folder, f"{stem}.{name}.npy", values)


def read_columns(
    folder: Folder, stem: str, *names: str, rows: slice | None = None
) -> dict[str, Array]:
    """Some of these arrays, all rows or a range of them, in memory and writable."""
    some = slice(None) if rows is None else rows
    return {name: np.array(read_array(folder, f"{stem}.{name}.npy")[some]) for name in names}
