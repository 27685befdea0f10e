"""Reads arrays from .npz and .npy files of unknown origin.

Nothing is unpickled. A header cannot make the reader allocate memory: the shape must match the
table beside the file, the size must match the zip directory, and compression ratios are limited.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from d2filter.errors import InputError
from d2filter.formats.paths import Folder
from d2filter.formats.tables import first_line, listed, nearest

Array = npt.NDArray[Any]

# embeddings are narrower, and hardly deflate
_MAX_DIMENSION = 1 << 16
_MAX_INFLATION = 100
_INFLATED_FREELY = 64 << 20
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

# what zipfile and numpy raise on hostile archives; a password is a RuntimeError
_UNREADABLE = (
    *(ValueError, OSError, EOFError, LookupError, MemoryError, OverflowError, RuntimeError),
    *(SyntaxError, TypeError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


class Need(NamedTuple):
    """Why an array is read, for the message where it is missing."""

    why: str
    option: str
    """that chooses it"""


class _OddShape(ValueError):
    """A header of an array that is no (rows, dimension) of floats."""


def read_arrays(
    folder: Folder, name: str, keys: Mapping[str, Need], rows: int | None = None
) -> dict[str, Array]:
    """Some arrays (rows, dimension) of an .npz file, C-contiguous float16, float32 or float64.

    keys: what each is needed for. rows: the number of rows of the table beside it, None for any.
    Raises InputError, naming the file, for pickled objects, another shape, a header or directory
    that claims more than the file has, and everything else that is no such archive.
    """
    where = folder.where(name)
    with folder.reading(name) as stream:
        try:
            size = stream.seek(0, 2)
            stream.seek(0)
            if stream.read(6) == b"\x93NUMPY":
                raise InputError(f"{where} is a single array, a .npz archive is needed")
            with zipfile.ZipFile(stream) as archive:
                there = [n.removesuffix(".npy") for n in archive.namelist()]
                missing = [key for key in keys if f"{key}.npy" not in archive.NameToInfo]
                if missing:
                    raise InputError(
                        f"{where} {_lacks([keys[key] for key in missing], missing, there)}"
                    )
                for key in keys:
                    info = archive.getinfo(f"{key}.npy")
                    if info.header_offset + info.compress_size > size:
                        raise ValueError(f"{key} reaches beyond the end of the file")
                    _check_member(where, archive, info, rows)
                return {key: _read_member(archive, key) for key in keys}
        except _UNREADABLE as error:
            raise InputError(
                f"{where} is not a readable npz file of plain arrays, fetch it again: "
                f"{first_line(error)}"
            ) from error


def _lacks(needs: list[Need], missing: list[str], there: list[str]) -> str:
    """What an archive has not, what it has, and what to do."""
    why = "; for ".join(dict.fromkeys(need.why for need in needs))
    option = needs[0].option
    archs = sorted({key.removesuffix("_img") for key in there if key.endswith("_img")})
    if option == "--arch" and archs:
        advice = f": try --arch {listed(archs[:1])}"
    else:
        advice = nearest(missing[0], there) or f": choose with {option}"
    return f"has no {' and no '.join(missing)} (needed for {why}); it has {listed(there)}{advice}"


def read_array(folder: Folder, name: str, what: str) -> Array:
    """The array (rows, dimension) of floats in an .npy file. Raises InputError about `what`."""
    with folder.reading(name) as stream:
        try:
            size = stream.seek(0, 2)
            stream.seek(0)
            _checked_header(stream, size)
            stream.seek(0)
            return _native(np.lib.format.read_array(stream, allow_pickle=False))
        except _OddShape as error:
            raise InputError(
                f"{what} must hold an array (rows, dimension) of floats: {error}"
            ) from error
        except _UNREADABLE as error:
            raise InputError(f"{what} is not an array file: {first_line(error)}") from error


def _check_member(
    where: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, rows: int | None
) -> None:
    key = info.filename.removesuffix(".npy")
    if info.file_size > max(_INFLATED_FREELY, _MAX_INFLATION * info.compress_size):
        raise ValueError(f"{key} would inflate from {info.compress_size} to {info.file_size} bytes")
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        raise ValueError(f"{key} has two sizes")
    try:
        with archive.open(info) as member:
            found = _checked_header(member, info.file_size)[0]
    except _OddShape as error:
        raise InputError(
            f"{where}: {key} has {error}, expected (rows, dimension) of floats"
        ) from error
    if rows is not None and found != rows:
        raise InputError(
            f"{where.removesuffix('.npz')}.parquet has {rows} rows and {key} of "
            f"{where.rpartition('/')[2]} has {found}: the pair does not belong together, "
            "fetch it again"
        )


def _checked_header(stream: IO[bytes], size: int) -> tuple[int, ...]:
    """Shape of the array in a .npy file of `size` bytes. Raises ValueError if it does not fit."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"array of format {version}")
    shape, _, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if len(shape) != 2 or dtype.kind != "f" or not 0 < shape[1] <= _MAX_DIMENSION:
        raise _OddShape(f"shape {shape} and dtype {dtype}")
    if min(shape) < 0 or math.prod(shape) * dtype.itemsize != size - stream.tell():
        raise ValueError(f"a header claims shape {shape}, {size - stream.tell()} bytes follow")
    found: tuple[int, ...] = shape
    return found


def _read_member(archive: zipfile.ZipFile, key: str) -> Array:
    with archive.open(f"{key}.npy") as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):
            raise ValueError(f"{key} is followed by other bytes")
    return _native(array)


def _native(array: Array) -> Array:
    """The same values as all later steps know them: this machine's float16, 32 or 64, row by row.

    Sums run along memory: of columns one after the other they have other last bits.
    """
    kind = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(kind, order="C", copy=False)
