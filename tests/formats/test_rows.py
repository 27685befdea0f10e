"""Rows read from numpy arrays on disk and on object stores."""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2filter.errors import InputError, StorageError
from d2filter.formats import rows as rows_module
from d2filter.formats.paths import Folder
from d2filter.formats.rows import (
    PartedArray,
    mapped,
    read_array,
    read_columns,
    read_range,
    write_array,
    write_columns,
)


def test_few_rows_of_a_remote_part_are_requested_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder("memory://few/rows")
    whole = np.arange(4000, dtype=np.int64).reshape(2000, 2)
    write_array(folder, "x-00000.npy", whole)
    rows = PartedArray(folder=folder, name="x", starts=(0, 2000))
    monkeypatch.setattr(rows_module, "read_range", None)  # what would read all of it
    assert rows.gather(np.array([1999, 7, 1999])).tolist() == whole[[1999, 7, 1999]].tolist()
    with folder.publish("x-00000.npy") as path, path.open("wb") as stream:
        np.save(stream, whole)
        stream.truncate(2000)
    with pytest.raises(InputError, match=r"x-00000\.npy .*16 bytes are missing"):
        rows.gather(np.array([1500]))


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A local folder, and one that is only reached through fsspec."""
    return Folder(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}/rows")


@pytest.mark.parametrize("a_range", [1, 2, 512])
def test_rows_of_any_part_come_in_the_requested_order(
    folder: Folder, a_range: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "ROWS_A_RANGE", a_range)
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 100, (10, 3)).astype(np.int32)
    starts = (0, 4, 4, 10)
    for part in range(3):
        write_array(folder, f"x-{part:05d}.npy", whole[starts[part] : starts[part + 1]])
    rows = PartedArray(folder=folder, name="x", starts=starts)
    numbers = np.array([9, 0, 4, 3, 9])
    assert rows.total == 10
    assert (rows.gather(numbers) == whole[numbers]).all()
    assert rows.gather(numbers[:0]).shape == (0, 3)
    assert rows.gather(numbers[:0]).dtype == np.int32


def test_columns_are_read_by_range_and_writable(folder: Folder) -> None:
    write_columns(folder, "y", a=np.arange(6), b=np.arange(12).reshape(6, 2))
    some = read_columns(folder, "y", "a", "b", rows=slice(2, 4))
    assert some["a"].tolist() == [2, 3]
    assert some["b"].tolist() == [[4, 5], [6, 7]]
    some["a"][0] = 99
    assert read_columns(folder, "y", "a")["a"].tolist() == list(range(6))


def test_a_broken_file_is_named(folder: Folder) -> None:
    write_array(folder, "z.npy", np.arange(4))
    with folder.publish("z.npy") as path:
        path.write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"z\.npy is not a readable \.npy file"):
        read_array(folder, "z.npy")


def test_a_file_that_ends_early_is_no_shorter_array(folder: Folder) -> None:
    write_array(folder, "w.npy", np.arange(1000))
    with folder.reading("w.npy") as stream:
        whole = stream.read()
    with folder.publish("w.npy") as path:
        path.write_bytes(whole[:-8])
    assert read_range(folder, "w.npy", slice(3, 999)).tolist() == list(range(3, 999))
    with pytest.raises(InputError, match=r"w\.npy .*8 bytes are missing"):
        read_range(folder, "w.npy")


@pytest.mark.parametrize("shape", [(0,), (0, 4), (5, 0)])
def test_arrays_without_values_keep_their_shape(folder: Folder, shape: tuple[int, ...]) -> None:
    write_array(folder, "v.npy", np.empty(shape, np.float16))
    assert read_range(folder, "v.npy").shape == shape
    assert read_range(folder, "v.npy", slice(0, 3)).shape == np.empty(shape)[0:3].shape


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_a_mapped_array_is_equal_and_its_file_is_private(size: int) -> None:
    array = np.arange(size, dtype=np.int32)
    held = mapped(array)
    assert held.dtype == array.dtype
    assert (held == array).all()
    if size:
        held[0] = 7  # private: compiled code may be typed for arrays that can be written to
        assert array[0] == 0


def test_no_room_for_a_mapped_array_fails_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # /dev/full takes nothing, like a disk that is full
    full = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115  # closed by what is tested
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: full)
    with pytest.raises(StorageError, match=r"a file in .* No space left on device; make room"):
        mapped(np.arange(100_000))


class Finalized:
    """Garbage that only the collector finds, and that lets other threads run when it does."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        time.sleep(1e-5)


@pytest.mark.parametrize("read", [read_range, read_array])
def test_threads_that_read_headers_at_once_do_not_break_each_other(
    tmp_path: Path, read: Any
) -> None:
    folder = Folder(str(tmp_path))
    write_array(folder, "a.npy", np.arange(10))
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()

    def one(_: int) -> int:
        Finalized()
        return int(read(folder, "a.npy").sum())

    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(20)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(one, range(6000))) == {45}
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
