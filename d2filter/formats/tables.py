"""Reading parquet, with one clear line for a file that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.errors import InputError
from d2filter.formats.paths import Folder


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
def open_table(folder: Folder, name: str) -> Iterator[Any]:
    """An open parquet file. What arrow raises while it is open becomes an InputError."""
    with folder.reading(name) as stream:
        try:
            yield pq.ParquetFile(stream)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{folder.where(name)} is no readable parquet file, fetch or make it again: "
                f"{first_line(error)}"
            ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
