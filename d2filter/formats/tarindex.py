"""Finds the members of a tar file, whatever its headers claim.

The standard library's tarfile parses headers, but trusts them: a negative size makes it loop, and a
header of gigabytes fills the memory. Its input is limited here. Headers of plain files with short
names, nearly all headers, are parsed here in a quarter of the time.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, NamedTuple, cast

from d2filter.formats import filetype

_BLOCK = tarfile.BLOCKSIZE
_NAME_BYTES = 100
_FOLDER = "a folder"
_KINDS = frozenset(("image", "txt", "json"))
# per member, long names and extended headers included; tarfile believes what headers claim
_MAX_HEADER_BYTES = 1 << 20
_MAX_GLOBAL_RECORDS = 100
# a header from its mode on, as programs write it for a plain file with a short name: mode, owner
# and group; size; time and checksum; the type; link, owners' names; device; no prefix. Numbers may
# be spelled otherwise, and tarfile knows how
_OCTAL = rb"(?:[0-7]{7}[\0 ]|[0-7]{6} \0)"
_PLAIN = re.compile(
    rb"%b{3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})(?:\0 | \0)0(?s:.{172})(?:%b|\0{8}){2}\0"
    % (_OCTAL, _OCTAL)
)
_DIGITS = re.compile(rb"[0-9]+")
_MAX_DIGITS = 256
# what webdataset itself leaves out: notes of a whole tar
_NOTES = re.compile(r"__[^/]*__(?:/|$)")


class Member(NamedTuple):
    """Where the content of a member lies."""

    offset: int
    size: int
    number: int
    """among all members of the shard"""
    odd: str = ""
    """what it is when it is no plain file"""


@dataclass(slots=True)
class Key:
    """The members that make one sample, by extension."""

    name: str
    members: dict[str, Member] = field(default_factory=dict)
    cut: bool = False
    """whether the archive probably ends before all its members were read"""


def read(stream: IO[bytes], images: Sequence[str]) -> tuple[list[Key], str]:
    """Keys in the order of their first member, and what broke off the reading ("": nothing did).

    images: extensions of which one is enough. A key that comes again with an extension that it has
    begins another sample: nothing is overwritten. Left out are directories, what webdataset gives
    no key, what a Mac adds, and links and devices that are no image, txt or json.
    """
    size = stream.seek(0, 2)
    keys, broken = _headers(stream, size, frozenset(images))
    if broken:
        _mark_cut(keys, size, frozenset(images))
    return keys, broken


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member: split at the first dot of the base name. The key
    is empty where webdataset finds none: without a dot, and mostly if the name begins with a dot.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    # its pattern takes the folder `a` of `a/.jpg` for the key, and none of `a.b/.jpg` or `./.jpg`
    named = stem or (slash and "." not in folder.rpartition("/")[2])
    return (folder + slash + stem if dot and named else ""), extension.lower()


def _is_of_a_sample(name: str, extension: str, images: frozenset[str]) -> bool:
    """Whether a member with this key and extension can be part of a sample.

    What a Mac adds to a folder (`a/._1.jpg`, `a/.DS_Store`) has a key that ends in a slash, and an
    extension that is no sample's.
    """
    return bool(name) and (name[-1] != "/" or _kind(extension, images) in _KINDS)


class _HeaderReader:
    """What tarfile reads headers from. It neither leaves the file nor reads without a limit."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream = stream
        self._size = size
        self._left = _MAX_HEADER_BYTES

    def next_member(self) -> None:
        """The headers of another member begin."""
        self._left = _MAX_HEADER_BYTES

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int) -> int:
        if not 0 <= offset <= self._size:
            raise tarfile.ReadError("a member reaches beyond the end of the file: cut off")
        return self._stream.seek(offset)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.ReadError(f"header of more than {_MAX_HEADER_BYTES} bytes")
        self._left -= size
        block = self._stream.read(size)
        # older versions of tarfile search extended headers in time quadratic in runs of digits
        if size > _BLOCK and any(len(run) > _MAX_DIGITS for run in _DIGITS.findall(block)):
            raise tarfile.ReadError(f"header with a number of more than {_MAX_DIGITS} digits")
        return block


def _headers(stream: IO[bytes], size: int, images: frozenset[str]) -> tuple[list[Key], str]:
    keys: list[Key] = []
    latest: dict[str, Key] = {}
    broken = ""
    after = 0
    number = 0
    reader = _HeaderReader(stream, size)
    reader.seek(0)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], reader), mode="r:") as archive:
            for member in _members(archive, reader, stream, size):
                after = member.after
                name, extension = split_name(member.name)
                odd = member.odd
                if odd == _FOLDER or (odd and _kind(extension, images) not in _KINDS):
                    continue
                if not _is_of_a_sample(name, extension, images) or _NOTES.match(member.name):
                    continue
                key = latest.get(name)
                if key is None or extension in key.members:
                    key = latest[name] = Key(name)
                    keys.append(key)
                key.members[extension] = Member(member.offset, member.size, number, odd)
                number += 1
    except OSError:
        raise
    except Exception as error:  # tarfile raises nearly anything on hostile headers
        broken = str(error) or type(error).__name__
    broken = broken or _rest(stream, min(after, size))
    if broken and after == 0:
        # not even one header: perhaps it is another kind of file
        stream.seek(0)
        broken = filetype.why_no_shard(stream.read(filetype.HEAD_BYTES)) or broken
    return keys, broken


class _Found(NamedTuple):
    """The content of a header."""

    name: str
    offset: int
    size: int
    after: int
    """where the next header lies"""
    odd: str = ""


def _members(
    archive: tarfile.TarFile, reader: _HeaderReader, stream: IO[bytes], size: int
) -> Iterator[_Found]:
    """All members. Raises ReadError for hostile headers."""
    after = 0
    while (member := archive.next()) is not None:
        _refuse_hostile(archive, member, after)
        # it would keep every header otherwise
        archive.members = []  # type: ignore[attr-defined]  # typeshed does not know it
        reader.next_member()
        after = archive.offset
        yield _Found(member.name, member.offset_data, member.size, after, _oddity(member))
        while found := plain_file(archive, stream, size):
            after = archive.offset = found.after
            yield found


def plain_file(archive: tarfile.TarFile, stream: IO[bytes], size: int) -> _Found | None:
    """The next member where it is a plain file with a sound, simple header; else None."""
    at = archive.offset
    if not 0 <= at <= size - _BLOCK:
        return None
    stream.seek(at)
    header = stream.read(_BLOCK)
    fields = _PLAIN.match(header, _NAME_BYTES)
    if fields is None or int(fields[2], 8) != _checksum(header):
        return None
    name = header[:_NAME_BYTES].partition(b"\0")[0].decode(archive.encoding, archive.errors)
    length = int(fields[1], 8)
    begin = at + _BLOCK
    return _Found(name, begin, length, begin + length + -length % _BLOCK)


def _checksum(header: bytes) -> int:
    """The sum of a header's bytes, its checksum taken for blanks.

    Adler-32 holds one more than the sum of the bytes modulo 65521, which 256 bytes cannot reach.
    """
    begin = zlib.adler32(header[:148]) & 0xFFFF
    middle = zlib.adler32(header[156:256]) & 0xFFFF
    return begin + middle + (zlib.adler32(header[256:]) & 0xFFFF) - 3 + 8 * ord(" ")


def _refuse_hostile(archive: tarfile.TarFile, member: tarfile.TarInfo, after: int) -> None:
    """Raise ReadError for headers that would lead in circles, or multiply what they hold."""
    if archive.offset <= after or member.size < 0:
        raise tarfile.ReadError(f"damaged header at byte {after}: it points backwards")
    everywhere = archive.pax_headers
    if len(everywhere) > _MAX_GLOBAL_RECORDS or any(
        name in ("path", "linkpath", "size") or name.startswith("GNU.sparse") for name in everywhere
    ):
        raise tarfile.ReadError("a global header sets what belongs to one member")


def _rest(stream: IO[bytes], after: int) -> str:
    """What is wrong after the last member, because tarfile takes a damaged header for the end.

    A whole archive ends in a block of zeros, and only zeros follow. If an archive was appended to
    another one, or a header was zeroed, samples would otherwise be missing without an error.
    """
    stream.seek(after)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK:
        return f"no end-of-archive mark at byte {after}: cut off"
    at = after
    while block:
        if block.count(0) != len(block):
            if at == after:
                return f"damaged header at byte {after}"
            return f"data behind the end-of-archive mark at byte {after}, not read"
        at += len(block)
        block = stream.read(1 << 20)
    return ""


def _mark_cut(keys: Sequence[Key], size: int, images: frozenset[str]) -> None:
    """Mark the keys that lost a member to the break, or may have.

    The last key may; where members of a key lie apart, any may. One that has all kinds of members
    that others have is taken as whole.
    """
    apart = False
    for key in keys:
        numbers = [member.number for member in key.members.values()]
        apart |= max(numbers) - min(numbers) >= len(numbers)
        key.cut = any(member.offset + member.size > size for member in key.members.values())
    kinds = [{_kind(extension, images) for extension in key.members} & _KINDS for key in keys]
    usual = set().union(*(kinds if apart else kinds[:-1])) or _KINDS
    for number in range(len(keys))[0 if apart else -1 :]:
        keys[number].cut |= not usual <= kinds[number]


def _kind(extension: str, images: frozenset[str]) -> str:
    return "image" if extension in images else extension


def _oddity(member: tarfile.TarInfo) -> str:
    """What a member is that holds no bytes of its own, or not in one piece; "" for plain files."""
    if member.isdir():
        return _FOLDER
    if member.issparse():
        return "a sparse file"
    if member.isfile():
        return ""
    if member.islnk() or member.issym():
        return "a link"
    return "a device or pipe" if member.isdev() else f"of type {member.type!r}"
