"""Reads score files: `uid` and columns of numbers, in one parquet or csv file or a folder of them.

They are read in blocks, so that a file of any length needs the memory of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from d2filter.errors import InputError, UsageError
from d2filter.formats import columns as column_values
from d2filter.formats import tables
from d2filter.formats import uid as uid_format
from d2filter.formats.addresses import file_name
from d2filter.formats.join_table import Block
from d2filter.formats.paths import FileInfo, Folder, absolute, place_of

_SUFFIXES = (".parquet", ".csv")
_ROWS = 1 << 18  # of a block
_CSV_BLOCK = 1 << 24
_CSV_ROW = 34  # bytes: a uid, a comma and a digit are the least


def files(url: str) -> tuple[Folder, list[FileInfo]]:
    """The files of a score file. Raises InputError when there is none, and for both kinds."""
    place = absolute(url)
    if file_name(place).endswith(_SUFFIXES):
        folder, name = place_of(place)
        info = folder.info(name)
        # a file is opened by the name in its URL
        found = [] if info is None else [replace(info, name=name)]
    else:
        folder = Folder(place)
        there = folder.exists()
        found = [one for suffix in _SUFFIXES if there for one in folder.files(suffix)]
    kinds = {file_name(info.name).rpartition(".")[2] for info in found}
    if len(kinds) != 1:
        reason = "is neither a .parquet or .csv file nor a folder of them"
        if kinds:
            reason = "has both kinds"
        raise InputError(f"score-file {url} {reason}")
    return folder, found


def column_names(url: str) -> list[str]:
    """Columns of a score file beside uid, from its first file. Raises InputError without uid."""
    folder, found = files(url)
    name = found[0].name
    there = _names(folder, name)
    if "uid" not in there:
        raise InputError(
            f"{folder.where(name)} has no column uid{tables.nearest('uid', there)}; it has "
            f"{tables.listed(there)}"
        )
    return [column for column in there if column != "uid"]


def only_column(url: str, wanted: str) -> str:
    """The column that is wanted, or the only one beside uid. Raises UsageError where that is none
    or several.
    """
    there = column_names(url)
    if wanted and wanted not in there:
        raise UsageError(
            f"score-file {url} has no column {wanted!r}{tables.nearest(wanted, there)}; it has "
            f"{tables.listed(there)}: choose one with --score-column"
        )
    if not wanted and len(there) != 1:
        raise UsageError(
            f"score-file {url} has {len(there)} columns beside uid ({tables.listed(there)}): "
            "choose one with --score-column"
        )
    return wanted or there[0]


def count_rows(url: str) -> int:
    """An upper bound of the rows: exact for parquet files, from the size for csv files."""
    folder, found = files(url)
    return sum(
        info.size // _CSV_ROW
        if file_name(info.name).endswith(".csv")
        else tables.count_rows(folder, info.name)
        for info in found
    )


def blocks(url: str, columns: Sequence[str]) -> Iterator[Block]:
    """uids and some columns as float32, NaN for missing values, of all rows in their order.

    Raises InputError, naming file and row, for a table that cannot be read.
    """
    folder, found = files(url)
    for info in found:
        where, row = folder.where(info.name), 0
        there = _names(folder, info.name)
        for column in ("uid", *columns):
            if column not in there:
                raise InputError(
                    f"{where} has no column {column}{tables.nearest(column, there)}; it has "
                    f"{tables.listed(there)}"
                )
        for table in _tables(folder, info.name, where, columns):
            hi, lo, known = uid_format.parse(table.column("uid"))
            if not known.all():
                at = int(np.flatnonzero(~known)[0])
                raise InputError(
                    f"{where}: {tables.quoted(table.column('uid')[at])} in row {row + at} is not "
                    "a uid, expected 32 hex digits"
                )
            values = [
                column_values.as_float32(table.column(name), f"{where}: column {name}")[0]
                for name in columns
            ]
            yield hi, lo, values
            row += hi.size


def _names(folder: Folder, name: str) -> list[str]:
    if file_name(name).endswith(".csv"):
        with _csv(folder, name, None) as reader:
            names: list[str] = reader.schema.names
        return names
    with tables.open_table(folder, name) as parquet:
        return list(parquet.schema_arrow.names)


def _tables(folder: Folder, name: str, where: str, columns: Sequence[str]) -> Iterator[Any]:
    wanted = ["uid", *columns]
    if file_name(name).endswith(".csv"):
        with _csv(folder, name, wanted) as reader:
            for batch in reader:
                yield pa.Table.from_batches([batch])
        return
    kinds: dict[str, tables.Kind] = dict.fromkeys(columns, "numbers")
    with tables.open_table(folder, name, encoded=["uid"]) as parquet:
        tables.check_types(parquet, where, {"uid": "strings", **kinds})
        tables.check_size(folder, name, wanted)
        for batch in parquet.iter_batches(batch_size=_ROWS, columns=wanted):
            yield tables.checked(pa.Table.from_batches([batch]))


@contextmanager
def _csv(folder: Folder, name: str, columns: Sequence[str] | None) -> Iterator[Any]:
    """An open csv file, all columns or some. What arrow raises while it is open becomes an
    InputError.
    """
    convert = pacsv.ConvertOptions()
    if columns is not None:
        kinds = {column: pa.string() if column == "uid" else pa.float64() for column in columns}
        convert = pacsv.ConvertOptions(include_columns=list(columns), column_types=kinds)
    with folder.reading(name) as stream:
        try:
            read = pacsv.ReadOptions(block_size=_CSV_BLOCK)
            yield pacsv.open_csv(stream, read_options=read, convert_options=convert)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise InputError(
                f"{folder.where(name)} is not a readable csv file with a header: "
                f"{tables.first_line(error)}"
            ) from error
