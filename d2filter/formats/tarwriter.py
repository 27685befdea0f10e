"""New shards of raw members, as DataComp's train.py and open_clip read them (DESIGN §6).

00000000.tar, 00000001.tar, …   keys {uid}-{j}: j counts the copies of a uid that a subset repeats
00000000_stats.json             {"successes": n}, written after its tar
sizes.json                      {"00000000.tar": n}
meta.json                       output_shard_count, output_shard_format, and what they were made of
sample_ids.npy                  (n,) (u8, u8), the uids in the order of the shards
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import IO, NamedTuple

from d2filter.formats.paths import Folder

SHARD_FORMAT = "{:08d}.tar"
_BUFFER = 1 << 20
_RUN = 8 << 20  # bytes that are read at one go
# bytes that are read for nothing rather than reading once more
_APART_ON_DISK = 16 << 10
_APART_ELSEWHERE = 512 << 10
_BLOCK = tarfile.BLOCKSIZE
_NAME_BYTES = 100
_LARGE = 8**11  # such sizes have more digits than a plain header has room for
# TarInfo's own defaults: no owner, no time
_EMPTY = tarfile.TarInfo().tobuf()
_EMPTY_SUM = sum(_EMPTY[:124]) + sum(_EMPTY[135:148]) + 8 * ord(" ") + sum(_EMPTY[156:])


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
        told, digits = name.encode(), b"%011o" % size
        total = _EMPTY_SUM + sum(told) + sum(digits)
        begin = told.ljust(_NAME_BYTES, b"\0") + _EMPTY[_NAME_BYTES:124] + digits
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
    """One shard, whose members may be written in any order and from several threads."""

    def __init__(self, stream: IO[bytes], members: Sequence[Member]) -> None:
        self._stream = stream
        self._members = members
        self._left = len(members)
        self._lock = Lock()
        self._places = []
        end = 0
        for member in members:
            self._places.append(end)
            end += len(header(member)) + member.size + -member.size % _BLOCK
        self._end = end
        self._at = 0

    def write(self, number: int, content: Iterable[bytes | memoryview]) -> None:
        """Write a member, once. content: pieces of as many bytes as were told before."""
        member = self._members[number]
        with self._lock:
            # seeking empties the stream's buffer
            if self._at != self._places[number]:
                self._stream.seek(self._places[number])
            self._stream.write(header(member))
            for piece in content:
                self._stream.write(piece)
            self._stream.write(bytes(-member.size % _BLOCK))
            last = number + 1 == len(self._members)
            self._at = self._end if last else self._places[number + 1]
            self._left -= 1

    def copy(self, stream: IO[bytes], places: Iterable[Place], on_disk: bool) -> None:
        """Write members from a file that is read once, in its order: what lies side by side at one
        go. Memory: 8 MB. on_disk: or behind a network, where each reading takes its time.

        Raises EOFError when the file ends before they do.
        """
        apart = _APART_ON_DISK if on_disk else _APART_ELSEWHERE
        for begin, end, run in self._runs(places, apart):
            pieces = _pieces(stream, begin, end)
            if end - begin > _RUN:
                self.write(run[0].number, pieces)
                continue
            held = memoryview(b"".join(pieces))
            for offset, number in run:
                start = offset - begin
                self.write(number, [held[start : start + self._members[number].size]])

    def _runs(self, places: Iterable[Place], apart: int) -> Iterator[tuple[int, int, list[Place]]]:
        """Begin, end and members of what is read at one go: _RUN bytes, or one larger member."""
        run: list[Place] = []
        begin = end = 0
        for place in sorted(places):
            after = place.offset + self._members[place.number].size
            if run and (place.offset > end + apart or max(after, end) > begin + _RUN):
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
        self._stream.seek(self._end)
        self._stream.write(bytes(2 * _BLOCK))
        self._stream.write(bytes(-self._stream.tell() % tarfile.RECORDSIZE))


def _pieces(stream: IO[bytes], begin: int, end: int) -> Iterator[bytes]:
    stream.seek(begin)
    while begin < end:
        piece = stream.read(min(end - begin, _RUN))
        if not piece:
            raise EOFError
        begin += len(piece)
        yield piece


@contextmanager
def publishing_shard(
    folder: Folder, number: int, members: Sequence[Member], samples: int
) -> Iterator[Writer]:
    """What writes one shard, which appears when all is written, then its stats. The same members
    make the same bytes, on any machine.
    """
    with folder.publish(shard_name(number)) as path, path.open("wb", _BUFFER) as stream:
        writer = Writer(stream, members)
        yield writer
        writer.finish()
    folder.publish_json(f"{number:08d}_stats.json", {"successes": samples})
