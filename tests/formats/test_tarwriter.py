"""New shards compared with archives of the same members from tarfile."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import shard_files

from d2filter.formats import tarwriter
from d2filter.formats.paths import Folder


@given(st.text(min_size=1, max_size=120), st.integers(0, 2**40))
@example("x" * 100, 8**11 - 1)
@example("x" * 101, 8**11)
@example("é.jpg", 0)
@example("a/../b c\n.jpg", 511)
@example("\udcff.jpg", 1)
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert tarwriter.header(tarwriter.Member(name, size)) == info.tobuf()


def published(folder: Path, files: list[tuple[str, bytes]], order: list[int]) -> bytes:
    members = [tarwriter.Member(name, len(content)) for name, content in files]
    with tarwriter.publishing_shard(Folder(str(folder)), 3, members, 2) as writer:
        for number in order:
            content = files[number][1]
            writer.write(number, [content[:5], memoryview(content)[5:]])
    return (folder / "00000003.tar").read_bytes()


FILES = [
    ("a.jpg", b"x" * 511), ("long/" * 40 + "b.jpg", b""), ("é.txt", b"y" * 512),
    ("c.jpg", b"z" * 3000),
]  # fmt: skip


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_members_written_in_any_order_make_the_same_archive(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    assert published(tmp_path, FILES, list(order)) == shard_files.tar(FILES)
    assert (tmp_path / "00000003_stats.json").read_text() == '{\n  "successes": 2\n}\n'


def test_a_shard_that_lacks_members_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 4 members were not written"):
        published(tmp_path, FILES, [3, 0, 1])
    assert list(tmp_path.iterdir()) == []


class Counted(io.BytesIO):
    """What is read of it."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.ranges: list[tuple[int, int]] = []

    def read(self, size: int | None = -1, /) -> bytes:
        begin = self.tell()
        content = super().read(size)
        self.ranges.append((begin, self.tell()))
        return content

    def readinto(self, buffer: Any, /) -> int:
        content = self.read(min(len(buffer), 333))  # systems give less than is asked for
        buffer[: len(content)] = content
        return len(content)


SOURCE = bytes(i * 7 % 251 for i in range(4000))
PIECES = st.tuples(st.integers(0, 3400), st.one_of(st.integers(0, 60), st.integers(0, 600)))


@given(st.lists(PIECES, min_size=1, max_size=12), st.randoms(), st.booleans())
def test_members_are_copied_with_any_bytes_between_them(
    pieces: list[tuple[int, int]], order: object, on_disk: bool
) -> None:
    """Also those that overlap, and those that are larger than what is read at one go."""
    files = [(f"{n}.bin", SOURCE[at : at + size]) for n, (at, size) in enumerate(pieces)]
    members = [tarwriter.Member(name, len(content)) for name, content in files]
    places = [tarwriter.Place(at, number) for number, (at, _) in enumerate(pieces)]
    order.shuffle(places)  # type: ignore[attr-defined]
    run, apart = 500, 100
    source = Counted(SOURCE)
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryFile() as out:
        for name in ("RUN", "RUN_ON_DISK"):
            patched.setattr(tarwriter, name, run)
        for name in ("APART_ELSEWHERE", "APART_ON_DISK"):
            patched.setattr(tarwriter, name, apart)
        patched.setattr(tarwriter, "PIECES", 7)
        writer = tarwriter.Writer(out.fileno(), members)
        writer.copy(source, places, on_disk=on_disk)
        writer.finish()
        assert out.read() == shard_files.tar(files)
    assert all(end - begin <= run for begin, end in source.ranges)
    asked = {byte for at, size in pieces for byte in range(at, at + size)}
    near = {byte + d for byte in (at + size for at, size in pieces) for d in range(apart + 1)}
    got = {byte for begin, end in source.ranges for byte in range(begin, end)}
    assert got <= asked | near


def test_adjacent_members_are_read_at_once_and_others_separately() -> None:
    members = [tarwriter.Member(f"{n}.bin", 100) for n in range(4)]
    at = [3_000_000, 0, 1000, 3_000_200]
    places = [tarwriter.Place(offset, number) for number, offset in enumerate(at)]
    source = Counted(bytes(4_000_000))
    with tempfile.TemporaryFile() as out:
        tarwriter.Writer(out.fileno(), members).copy(source, places, on_disk=False)
    assert source.ranges == [(0, 1100), (3_000_000, 3_000_300)]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_source_that_ends_too_soon_is_an_error(on_disk: bool) -> None:
    with tempfile.TemporaryFile() as out:
        writer = tarwriter.Writer(out.fileno(), [tarwriter.Member("a.bin", 100)])
        with pytest.raises(EOFError):
            writer.copy(io.BytesIO(b"x" * 199), [tarwriter.Place(100, 0)], on_disk=on_disk)


def test_a_partial_write_of_the_system_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwritev

    def some(file: int, pieces: list[bytes], at: int) -> int:
        return whole(file, [b"".join(pieces)[:700]], at)

    monkeypatch.setattr(os, "pwritev", some)
    assert published(tmp_path, FILES, [2, 3, 0, 1]) == shard_files.tar(FILES)
