"""Arrays with one row per sample in numbered files: NAME-00000.npy, NAME-00001.npy, …

A sample's *number* is its row over all files in name order. Only the needed rows are read: from a
local disk by memory map, from elsewhere part by part.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from d2filter.errors import InputError
from d2filter.formats.paths import Folder, writing
from d2filter.formats.tables import first_line

I64 = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

_READERS = 16
# numpy parses headers with `ast`, which threads can break for each other (CPython gh-106905): one
# at a time, and nothing is fetched meanwhile. A finalizer may come in between, in the same thread
_PARSING = threading.RLock()
ROWS_A_RANGE = 512  # rows that are read for nothing rather than asking once more


@dataclass(frozen=True, slots=True, kw_only=True)
class PartedArray:
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
        return read_array(self.folder, self._file(number))

    def read(self, number: int) -> Array:
        """One part in memory: a map would take as much again for a while."""
        return read_range(self.folder, self._file(number))

    def _file(self, number: int) -> str:
        column = f".{self.column}" if self.column else ""
        return f"{self.name}-{number:05d}{column}.npy"

    def gather(self, numbers: I64) -> Array:
        """Rows of the given samples, in any order."""
        bounds = np.asarray(self.starts)
        part = np.searchsorted(bounds, numbers, side="right") - 1
        first = np.array(self.part(0)[:0]) if self.folder.local else self.read_few(0, numbers[:0])
        out = np.empty((numbers.size, *first.shape[1:]), first.dtype)

        def fill(p: int, read: Callable[[int, I64], Array]) -> None:
            where = np.flatnonzero(part == p)
            out[where] = read(p, numbers[where] - bounds[p])

        places, count = np.unique(part, return_counts=True)
        few = count * ROWS_A_RANGE <= bounds[places + 1] - bounds[places]
        few &= self.folder.local is None
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(lambda p: fill(p, self.read_few), places[few].tolist()))
        for p in places[~few].tolist():  # one in memory at a time
            fill(p, lambda p, rows: self.part(p)[rows])
        return out

    def read_few(self, number: int, rows: I64) -> Array:
        """Some rows of one part, each read on its own: for rows that are far apart."""
        name = self._file(number)
        with _reported(self.folder, name), self.folder.reading(name) as stream:
            shape, kind = _header(stream)
            begin = stream.tell()
            out = np.empty((rows.size, *shape[1:]), kind)
            # a buffer would read ahead, by megabytes
            raw = getattr(stream, "raw", stream)
            for at, row in enumerate(rows.tolist()):
                raw.seek(begin + row * out[:1].nbytes)
                _fill(raw, out[at : at + 1])
            return out


def read_array(folder: Folder, name: str) -> Array:
    """One .npy file; a memory map on a local disk. Raises InputError for a broken one."""
    local = folder.local
    if local is None:
        return read_range(folder, name)
    with _reported(folder, name):
        with _PARSING:
            mapped: Array = np.load(local / name, mmap_mode="r", allow_pickle=False)
        return mapped


def read_range(folder: Folder, name: str, rows: slice | None = None) -> Array:
    """All rows of one .npy file or a range of them, in memory and writable. Nothing else is read.

    Raises InputError for a broken file.
    """
    with _reported(folder, name), folder.reading(name) as stream:
        shape, kind = _header(stream)
        begin, end, _ = (rows or slice(None)).indices(shape[0])
        out = np.empty((max(0, end - begin), *shape[1:]), kind)
        if out.size:
            stream.seek(begin * (out.nbytes // len(out)), os.SEEK_CUR)
        _fill(stream, out)
        return out


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a .npy file, which is then read up to its values."""
    version = np.lib.format.read_magic(stream)
    header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    size = stream.read(2 if version == (1, 0) else 4)
    text = stream.read(int.from_bytes(size, "little"))
    with _PARSING:
        shape, _, kind = header(io.BytesIO(size + text))
    if kind.hasobject:
        raise ValueError("it holds Python objects")
    return shape, kind


def _fill(stream: IO[bytes], out: Array) -> None:
    left = out.reshape(-1).view(np.uint8).data
    while left:
        got = stream.readinto(left)  # type: ignore[attr-defined]  # files and fsspec's have it
        if not got:
            raise ValueError(f"{left.nbytes} bytes are missing at its end")
        left = left[got:]


@contextmanager
def _reported(folder: Folder, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{folder.where(name)} is not a readable .npy file: {first_line(error)}"
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
    return {name: read_range(folder, f"{stem}.{name}.npy", rows) for name in names}


def mapped(array: Array) -> Array:
    """The same values in an unnamed file in TMPDIR, which disappears with the process.

    Raises StorageError if there is no room for it.
    """
    if not array.nbytes:
        return array
    with tempfile.TemporaryFile() as stream:
        with writing(f"a file in {tempfile.gettempdir()}"):
            # not by numpy's `tofile`, which does not tell why it stopped
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            stream.flush()
        # private: what compiled code may write to is what it was compiled for, and nobody writes
        return np.memmap(stream, array.dtype, "c", shape=array.shape)
