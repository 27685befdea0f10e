"""Writes new shards from raw members, in the layout of DataComp's train.py and open_clip.

00000000.tar, 00000001.tar, …   keys {uid}-{j}: j counts the repeats of a uid in the subset
00000000_stats.json             {"successes": n}, written after its tar
sizes.json                      {"00000000.tar": n}
meta.json                       output_shard_count, output_shard_format, options and counts
sample_ids.npy                  (n,) (u8, u8), the uids in the order of the shards

See docs/files.md#reshard-folder.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import IO, NamedTuple

from d2filter.formats.paths import Folder

SHARD_FORMAT = "{:08d}.tar"
# bytes that are read at one go
RUN_ON_DISK = 2 << 20
RUN = 8 << 20
# bytes that are read for nothing rather than reading once more
APART_ON_DISK = 16 << 10
APART_ELSEWHERE = 512 << 10
_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
PIECES = 1000  # systems take 1,024 at one go
_NAME_BYTES = 100
_LARGE = 8**11  # such sizes have more digits than a plain header has room for
# TarInfo's own defaults: no owner, no time
_EMPTY = tarfile.TarInfo().tobuf()
_EMPTY_SUM = sum(_EMPTY[:124]) + sum(_EMPTY[135:148]) + 8 * ord(" ") + sum(_EMPTY[156:])


Piece = bytes | memoryview


class Member(NamedTuple):
    """One member to write."""

    name: str
    size: int


def shard_name(number: int) -> str:
    """File of one shard."""
    return SHARD_FORMAT.format(number)


def header(member: Member) -> bytes:
    """What stands before a member's content: the bytes that tarfile would write."""
    name, size = member
    if size < _LARGE and len(name) <= _NAME_BYTES and name.isascii():
        # tarfile takes ten times as long, and in most headers no more than this differs
        encoded, digits = name.encode(), b"%011o" % size
        total = _EMPTY_SUM + sum(encoded) + sum(digits)
        begin = encoded.ljust(_NAME_BYTES, b"\0") + _EMPTY[_NAME_BYTES:124] + digits
        return b"%b%b%06o\0 %b" % (begin, _EMPTY[135:148], total, _EMPTY[156:])
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf()


class Place(NamedTuple):
    """Where a member's content comes from."""

    offset: int
    """in the file that it is copied from"""
    number: int
    """of the member in the new shard"""


class Writer:
    """One shard. Its members may be written in any order and from several threads."""

    def __init__(self, file: int, members: Sequence[Member]) -> None:
        """file: descriptor of an empty file."""
        self._file = file
        self._members = members
        self._headers = [header(member) for member in members]
        self._left = len(members)
        self._lock = Lock()
        self._places = []
        end = 0
        for member, own in zip(members, self._headers, strict=True):
            self._places.append(end)
            end += len(own) + member.size + -member.size % _BLOCK
        self._end = end

    def write(self, number: int, content: Iterable[Piece]) -> None:
        """Write a member, once. content: pieces with the announced number of bytes in all."""
        at = self._put(self._places[number], [self._headers[number]])
        for piece in content:
            at = self._put(at, [piece])
        self._put(at, [self._padding(number)])
        self._count(1)

    def copy(self, stream: IO[bytes], places: Iterable[Place], on_disk: bool) -> None:
        """Write members from a file that is read once, in its order; adjacent members are read
        together.

        Memory: 2 MB for a disk, 8 MB for a file behind a network, where each read takes longer.
        Raises EOFError if the file ends before the members do.
        """
        most, apart = (RUN_ON_DISK, APART_ON_DISK) if on_disk else (RUN, APART_ELSEWHERE)
        buffer = memoryview(bytearray(most)) if on_disk else None
        for begin, end, run in self._runs(places, most, apart):
            if end - begin > most:
                self.write(run[0].number, _pieces(stream, begin, end, most))
                continue
            if buffer is None:
                held = memoryview(b"".join(_pieces(stream, begin, end, most)))
            else:
                held = buffer[: end - begin]
                _fill(stream, begin, held)
            self._write_run(held, begin, run)

    def _write_run(self, held: memoryview, begin: int, run: Sequence[Place]) -> None:
        """Members that lie in `held`; those that follow each other are written at one go."""
        pieces: list[Piece] = []
        start = after = self._places[run[0].number]
        for offset, number in run:
            if self._places[number] != after or len(pieces) > PIECES - 3:
                self._put(start, pieces)
                pieces, start = [], self._places[number]
            at = offset - begin
            size = self._members[number].size
            pieces += [self._headers[number], held[at : at + size], self._padding(number)]
            last = number + 1 == len(self._members)
            after = self._end if last else self._places[number + 1]
        self._put(start, pieces)
        self._count(len(run))

    def _padding(self, number: int) -> bytes:
        return _ZEROS[: -self._members[number].size % _BLOCK]

    def _put(self, at: int, pieces: Sequence[Piece]) -> int:
        """Write pieces one behind the other; returns where they end."""
        end = at + sum(len(piece) for piece in pieces)
        done = at + os.pwritev(self._file, pieces, at)
        while done < end:  # a full disk takes a part of it, and fails at the rest
            done += os.pwrite(self._file, b"".join(pieces)[done - at :], done)
        return end

    def _count(self, written: int) -> None:
        with self._lock:
            self._left -= written

    def _runs(
        self, places: Iterable[Place], most: int, apart: int
    ) -> Iterator[tuple[int, int, list[Place]]]:
        """Begin, end and members of what is read at one go: `most` bytes, or one larger member."""
        run: list[Place] = []
        begin = end = 0
        for place in sorted(places):
            after = place.offset + self._members[place.number].size
            if run and (place.offset > end + apart or max(after, end) > begin + most):
                yield begin, end, run
                run = []
            if not run:
                begin = end = place.offset
            run.append(place)
            end = max(end, after)
        if run:
            yield begin, end, run

    def finish(self) -> None:
        """Write what ends an archive. Raises ValueError when members are missing."""
        if self._left:
            raise ValueError(f"{self._left} of {len(self._members)} members were not written")
        end = self._end + 2 * _BLOCK
        self._put(self._end, [bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE)])


def _pieces(stream: IO[bytes], begin: int, end: int, most: int) -> Iterator[bytes]:
    stream.seek(begin)
    while begin < end:
        piece = stream.read(min(end - begin, most))
        if not piece:
            raise EOFError
        begin += len(piece)
        yield piece


def _fill(stream: IO[bytes], begin: int, held: memoryview) -> None:
    """Read what lies from `begin` on."""
    stream.seek(begin)
    while held:
        count: int = stream.readinto(held)  # type: ignore[attr-defined]  # of raw files and BytesIO
        if not count:
            raise EOFError
        held = held[count:]


@contextmanager
def publishing_shard(
    folder: Folder, number: int, members: Sequence[Member], samples: int
) -> Iterator[Writer]:
    """What writes one shard, which appears when all is written, then its stats. The same members
    make the same bytes, on any machine.
    """
    with folder.publish(shard_name(number)) as path, path.open("wb", 0) as stream:
        writer = Writer(stream.fileno(), members)
        yield writer
        writer.finish()
    folder.publish_json(f"{number:08d}_stats.json", {"successes": samples})
