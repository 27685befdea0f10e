"""Reading parquet, with one clear line for a file that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2filter.errors import InputError
from d2filter.formats.paths import Folder

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
                f"{folder.where(name)} is no readable parquet file, fetch or make it again: "
                f"{first_line(error)}"
            ) from error


def read_checked(parquet: Any, columns: Sequence[str]) -> Any:
    """Some columns of an open file. Raises ValueError for dictionaries that point outside.

    Arrow hands such indices out as the file has them, and whoever follows one reads foreign memory.
    """
    table = parquet.read(columns=list(columns))
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
    return kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def listed(names: Sequence[str]) -> str:
    """Names out of a file, for a message of one line."""
    text = ", ".join(names)[:300]
    return "".join(c if c.isprintable() else "?" for c in text)
