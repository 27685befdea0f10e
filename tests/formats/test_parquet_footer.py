"""Sizes from a parquet footer: pyarrow's own on whole files, an error on damaged ones."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.formats import parquet_footer

COLUMNS: dict[str, Any] = {
    "uid": [f"{i:032x}" for i in range(40)],
    "a.b": list(range(40)),
    "lists": [[0.5] * (i % 4) for i in range(40)],
    "nested": [{"x": i, "y": [{"z": str(i)}]} for i in range(40)],
    "flag": [i % 2 == 0 for i in range(40)],
    "nothing": [None] * 40,
}


def written(columns: list[str], **options: Any) -> bytes:
    stream = io.BytesIO()
    table = pa.table({name: COLUMNS[name] for name in columns})
    pq.write_table(table, stream, **options)
    return stream.getvalue()


def ended(footer: bytes) -> io.BytesIO:
    """A file with such a footer."""
    return io.BytesIO(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


@given(
    columns=st.lists(st.sampled_from(list(COLUMNS)), min_size=1, unique=True),
    group=st.sampled_from([1, 7, 100]),
    compression=st.sampled_from(["none", "snappy", "zstd"]),
    dictionary=st.booleans(),
    statistics=st.booleans(),
    index=st.booleans(),
)
def test_the_sizes_are_those_that_pyarrow_reads(
    columns: list[str], group: int, compression: str, dictionary: bool, statistics: bool,
    index: bool,
) -> None:  # fmt: skip
    content = written(
        columns, row_group_size=group, compression=compression, use_dictionary=dictionary,
        write_statistics=statistics, write_page_index=index,
    )  # fmt: skip
    parquet = pq.ParquetFile(io.BytesIO(content))
    about = parquet.metadata
    chunks = [
        about.row_group(g).column(c)
        for g in range(about.num_row_groups)
        for c in range(about.num_columns)
    ]
    found = list(parquet_footer.chunk_sizes(io.BytesIO(content)))
    assert [sizes for _, *sizes in found] == [
        [c.num_values, c.total_compressed_size] for c in chunks
    ]
    assert {name for name, _, _ in found} == set(columns)


def test_a_file_without_rows_has_no_sizes() -> None:
    stream = io.BytesIO()
    pq.write_table(pa.table({"x": pa.array([], pa.int64())}), stream, row_group_size=1)
    assert sum(count for _, count, _ in parquet_footer.chunk_sizes(stream)) == 0


_EVERY_BYTE = """
import io, sys
import pyarrow as pa, pyarrow.parquet as pq
from pathlib import Path
from d2filter.errors import InputError
from d2filter.formats import tables
from d2filter.formats.paths import Folder

folder = Path(sys.argv[1])
whole = (folder / "whole.parquet").read_bytes()
begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
read = 0
for at in range(begin, len(whole) - 4):
    for value in (whole[at] ^ 1 << (at % 8), whole[at] - 2 & 255, 0, 21, 255):
        (folder / "x.parquet").write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        try:
            with tables.open_table(Folder(sys.argv[1]), "x.parquet", encoded=["uid"]) as parquet:
                tables.check_size(Folder(sys.argv[1]), "x.parquet", ["uid", "lists"])
                tables.read_checked(parquet, ["uid", "lists"])
            read += 1
        except InputError as error:
            assert "\\n" not in str(error)
print(read)
"""


def test_no_damaged_byte_of_a_footer_ends_the_process(tmp_path: Any) -> None:
    """pyarrow 26.0.1 aborts for 16 of these 3,530 if it is asked for a chunk."""
    (tmp_path / "whole.parquet").write_bytes(written(["uid", "lists"], compression="none"))
    done = subprocess.run(
        [sys.executable, "-c", _EVERY_BYTE, str(tmp_path)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert int(done.stdout) > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends inside a value"),
        (b"\x15", "ends inside a value"),
        (b"\x1c" * 40, "nested too deeply"),
        (b"\x19\xfc\xff\xff\xff\xff\x0f", "longer than the footer"),
        (b"\x16" + b"\xff" * 12, "more than 64 bits"),
        (b"\x1e\x00", "unknown kind 14"),
        (b"\x18\xff\x7f", "ends inside a value"),
        (b"\x00", "lacks the sizes"),
    ],
)
def test_bytes_that_are_no_footer_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(parquet_footer.chunk_sizes(ended(content)))


def test_a_file_that_is_shorter_than_its_footer_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than the file"):
        list(parquet_footer.chunk_sizes(io.BytesIO(b"PAR1\xff\xff\xff\x7fPAR1")))
    with pytest.raises(ValueError, match="longer than the file"):
        list(parquet_footer.chunk_sizes(io.BytesIO(b"")))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        found = list(parquet_footer.chunk_sizes(ended(content)))
    except ValueError:
        return
    assert all(isinstance(count, int) for _, count, _ in found)


def test_a_large_footer_is_read_in_little_time() -> None:
    """A hundred row groups of a hundred columns."""
    stream = io.BytesIO()
    table = pa.table({f"c{i}": np.arange(100) for i in range(100)})
    pq.write_table(table, stream, row_group_size=1)
    assert sum(count for _, count, _ in parquet_footer.chunk_sizes(stream)) == 10_000
