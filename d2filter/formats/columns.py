"""Converts columns of tables from other tools to arrays of one type."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from d2filter.errors import InputError
from d2filter.formats import tables

# of one text column of one file, each row counted
_MAX_TEXT_BYTES = 1 << 30


def as_float32(column: Any, where: str) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
    """A column of numbers, or of strings that spell them, as float32, null becomes NaN; and how
    many of its distinct values are one with another now, of how many (`Rows.merged`).
    """
    try:
        values = np.concatenate([np.empty(0), *(_as_float64(chunk) for chunk in column.chunks)])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{where} must hold numbers: {tables.first_line(error)}") from error
    with np.errstate(over="ignore"):
        rounded: npt.NDArray[np.float32] = values.astype(np.float32)
    exact = _is_exact(column.type)
    if not exact and np.array_equal(rounded, values, equal_nan=True):
        return rounded, (0, 0)
    # arrow counts whole numbers that float64 does not tell apart
    counted = pc.count_distinct(column).as_py() if exact else None
    distinct = counted or np.unique(values[np.isfinite(values)]).size
    lost = max(0, distinct - np.unique(rounded[np.isfinite(rounded)]).size)
    # of many floats some are always neighbors; that most are is another thing
    return rounded, (lost, distinct) if lost > (0 if exact else distinct // 2) else (0, 0)


def _is_exact(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_decimal(kind))


def _as_float64(chunk: Any) -> npt.NDArray[np.float64]:
    if pa.types.is_dictionary(chunk.type):
        # never decoded: see tables.open_table
        values = np.append(_as_float64(chunk.dictionary), np.nan)
        rows = pc.fill_null(chunk.indices.cast(pa.int64()), len(values) - 1).to_numpy()
        taken: npt.NDArray[np.float64] = values[rows]
        return taken
    if not pa.types.is_float16(chunk.type):  # arrow 15 does not cast them
        chunk = chunk.cast(pa.float64(), safe=False)
    return np.asarray(chunk.to_numpy(zero_copy_only=False), np.float64)


def strings(table: Any, name: str, where: str) -> Any:
    """A column as valid UTF-8, null where there is none. Raises InputError if it is too large."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    column = table.column(name)
    size = sum(_text_bytes(chunk) for chunk in column.chunks)
    if size > _MAX_TEXT_BYTES:
        raise InputError(
            f"{where}: column {name} holds {size} bytes of text, at most {_MAX_TEXT_BYTES} are "
            "read: split the file"
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        text = column.cast(pa.string())
        text.validate(full=True)
    except pa.ArrowInvalid:
        if column.type not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
            raise
        raw = column.cast(pa.large_binary()).to_pylist()
        shown_bytes = [None if v is None else v.decode("utf-8", "backslashreplace") for v in raw]
        text = pa.chunked_array([pa.array(shown_bytes, pa.string())])
    return text.combine_chunks()


def _text_bytes(chunk: Any) -> int:
    """Bytes of all rows of a dictionary of strings; 0 for what is not repeated."""
    if not pa.types.is_dictionary(chunk.type):
        return 0
    length = pc.binary_length(chunk.dictionary.cast(pa.large_binary()))
    return int(pc.sum(pc.take(length, chunk.indices)).as_py() or 0)
