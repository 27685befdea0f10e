"""Reads parquet files, with a one-line error for a file that cannot be read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2filter.errors import InputError
from d2filter.formats import parquet_footer
from d2filter.formats.paths import Folder

# of one column of values that are all of one length, each row counted
_MAX_FIXED_BYTES = 1 << 30
_SHOWN = 300
_QUOTED = 60
_UNPACKED_FREELY = 1 << 28
_MOST_UNPACKED = 1000  # bytes of values from one byte of a file
_TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
Kind = Literal["strings", "plain values", "numbers", "lists of numbers"]

# what arrow raises on bytes that are no parquet file, or claim to be a gigantic one
_UNREADABLE = (
    *(pa.ArrowException, OSError, ValueError, LookupError),
    *(MemoryError, OverflowError, RuntimeError, TypeError),
)


def read_table(folder: Folder, name: str, columns: Sequence[str] | None = None) -> Any:
    """A whole parquet file, or some columns of it, as an arrow table. Raises InputError."""
    with open_table(folder, name) as parquet:
        return parquet.read(columns=None if columns is None else list(columns))


def count_rows(folder: Folder, name: str) -> int:
    """Rows of a parquet file, from its footer. Raises InputError."""
    with open_table(folder, name) as parquet:
        rows: int = parquet.metadata.num_rows
        return rows


@contextmanager
def open_table(folder: Folder, name: str, encoded: Sequence[str] = ()) -> Iterator[Any]:
    """An open parquet file. What arrow raises while it is open becomes an InputError.

    encoded: columns to read as dictionaries if they hold strings, by `read_checked`. A small file
    can repeat a long string millions of times; a dictionary of it stays as small as the file.
    """
    with folder.reading(name) as stream:
        try:
            parquet = pq.ParquetFile(stream)
            texts = [f.name for f in parquet.schema_arrow if f.name in encoded and _is_text(f.type)]
            if texts:
                parquet = pq.ParquetFile(stream, metadata=parquet.metadata, read_dictionary=texts)
            yield parquet
        except _UNREADABLE as error:
            raise InputError(
                f"{folder.where(name)} is not a readable parquet file, fetch or make it again: "
                f"{first_line(error)}"
            ) from error


def check_types(parquet: Any, where: str, wanted: Mapping[str, Kind]) -> None:
    """Judge the columns that will be read by the footer, before anything else is read of them.

    A list of long strings can be a thousand times as large as its file. Raises InputError for a
    column that is there twice, that is not of the kind that is wanted (strings may spell numbers),
    or that holds more than can be read.
    """
    schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    for name, kind in wanted.items():
        at = schema.get_all_field_indices(name)
        if len(at) != 1:
            raise InputError(f"{where} has {len(at)} columns of the name {name!r}: keep one")
        found = schema.field(at[0]).type
        if not _FITS[kind](_value_type(found)):
            shown = listed([str(found)])
            raise InputError(f"{where}: column {name} must hold {kind}, and is of type {shown}")
        size = rows * found.byte_width if pa.types.is_fixed_size_binary(found) else 0
        if size > _MAX_FIXED_BYTES:
            raise InputError(
                f"{where}: column {name} holds {size} bytes, at most {_MAX_FIXED_BYTES} are read: "
                "split the file"
            )


def check_size(folder: Folder, name: str, columns: Sequence[str]) -> None:
    """Raise InputError for columns that claim far more values than their bytes can hold, ValueError
    for a damaged footer.

    For tables without a partner of known length: a run of one value takes a few bytes whatever its
    length.
    """
    with folder.reading(name) as stream:
        mine = [sizes for sizes in parquet_footer.chunk_sizes(stream) if sizes[0] in columns]
    values = sum(count for _, count, _ in mine)
    packed = sum(size for _, _, size in mine)
    if values * 8 > max(_UNPACKED_FREELY, _MOST_UNPACKED * packed):
        raise InputError(
            f"{folder.where(name)} claims {values} values in {packed} bytes: write it again, with "
            "values of its own for each row"
        )


def nearest(name: str, there: Sequence[str]) -> str:
    """The name among these that was perhaps meant, as the end of a message; else empty."""
    by_lower = {one.lower(): one for one in there}
    close = difflib.get_close_matches(name.lower(), by_lower, 1, 0.75)
    return f" (did you mean {listed([by_lower[close[0]]])}?)" if close else ""


def read_checked(parquet: Any, columns: Sequence[str]) -> Any:
    """Some columns of an open file. Raises ValueError for dictionaries that point outside."""
    return checked(parquet.read(columns=list(columns)))


def checked(table: Any) -> Any:
    """The same table. Raises ValueError for dictionary indices out of range: Arrow does not check
    them, and using one would read foreign memory.
    """
    for column in table.columns:
        for chunk in column.chunks:
            if not pa.types.is_dictionary(chunk.type):
                continue
            bounds = pc.min_max(chunk.indices).as_py()
            low, high = bounds["min"], bounds["max"]
            if low is not None and not 0 <= low <= high < len(chunk.dictionary):
                raise ValueError(f"an index of {low} to {high} points outside of a dictionary")
    return table


def to_array(column: Any) -> npt.NDArray[Any]:
    """A column without nulls, (n,); (n, k) where it holds lists."""
    if not pa.types.is_fixed_size_list(column.type):
        found: npt.NDArray[Any] = column.to_numpy()
        return found
    chunks = [chunk.flatten() for chunk in column.chunks]
    flat: npt.NDArray[Any] = pa.chunked_array(chunks, column.type.value_type).to_numpy()
    return flat.reshape(-1, column.type.list_size)


def _is_text(kind: Any) -> bool:
    # arrow 15 has no type of views
    return str(kind) in _TEXTS


def _value_type(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_plain(kind: Any) -> bool:
    """One value a row, of a few bytes or a text."""
    fixed = pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)
    return bool(fixed or _is_text(kind) or pa.types.is_fixed_size_binary(kind))


def _is_number(kind: Any) -> bool:
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    odd = pa.types.is_boolean(kind) or pa.types.is_null(kind)
    return bool(number or odd or _is_text(kind))


def _is_list_of_numbers(kind: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(test(kind) for test in lists):
        return False
    value = kind.value_type
    return bool(pa.types.is_integer(value) or pa.types.is_floating(value))


_FITS: dict[str, Callable[[Any], bool]] = {
    "strings": lambda kind: _is_text(kind) or pa.types.is_fixed_size_binary(kind)
    or pa.types.is_null(kind),
    "plain values": _is_plain,
    "numbers": _is_number,
    "lists of numbers": _is_list_of_numbers,
}  # fmt: skip


def shown(value: Any) -> str | None:
    """A string of an arrow column for people, cut if long, whatever bytes it holds."""
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    if not value.is_valid:
        return None
    if not _is_text(value.type) and not pa.types.is_fixed_size_binary(value.type):
        return str(value)[:_SHOWN]
    begin: bytes = value.as_buffer()[: 4 * _SHOWN].to_pybytes()
    return begin.decode("utf-8", "backslashreplace")[:_SHOWN]


def quoted(value: Any) -> str:
    """The same in quotes, on one line of a message."""
    text = shown(value)
    if text is None:
        return "null"
    return repr(text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def listed(names: Sequence[str]) -> str:
    """Names out of a file, for a message of one line."""
    text = ", ".join(names)[:300]
    return "".join(c if c.isprintable() else "?" for c in text)
