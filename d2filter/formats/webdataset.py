"""Samples of WebDataset shards: tar files whose members share a key (DESIGN §6).

A key is the member's path up to the first dot of its base name, as webdataset defines it. Members
of a key need not lie side by side: the headers of a shard are read first, then the samples.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import braceexpand

from d2filter.errors import InputError, UsageError
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import FileInfo, Folder, filesystem

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# what such a member may hold, whatever its name says: a decoder for PostScript runs programs
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file."""

    url: str
    info: FileInfo
    name: str
    """base name without .tar; made unique among the shards of a run"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image-text pair, or what is wrong with it."""

    key: str
    image: bytes = b""
    caption: str = ""
    uid: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    """the json member"""
    reason: str = ""
    """why it cannot be used; empty when it can"""
    message: str = ""


def clean(text: str) -> str:
    """`text` with what UTF-8 cannot hold spelled out: names in tars may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold `text` (JSON can spell lone surrogates, which it cannot)."""
    return clean(text) == text


class LostTail(Exception):
    """The rest of a shard cannot be read; the samples before it were yielded."""


def list_shards(patterns: Sequence[str]) -> list[Shard]:
    """All shards of the given patterns, sorted by URL.

    A pattern is a .tar file, a folder of them, or either with {braces} or wildcards. Raises
    UsageError when a pattern matches nothing and InputError for a named file that is missing.
    """
    found: dict[str, FileInfo] = {}
    listing = _Listing()
    for pattern in patterns:
        matched = False
        for url in _expanded(pattern):
            for shard, info in listing.matches(url):
                found[shard] = info
                matched = True
        if not matched:
            raise UsageError(
                f"no shards match {pattern!r}: give .tar files, a folder of them, or a quoted "
                "pattern like 'data/{00000..00099}.tar'"
            )
    names = [PurePosixPath(url).name.removesuffix(".tar") for url in sorted(found)]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    shards = []
    for url, name in zip(sorted(found), names, strict=True):
        mark = hashlib.blake2b(url.encode(), digest_size=4).hexdigest()
        shards.append(Shard(url, found[url], f"{name}-{mark}" if name in repeated else name))
    return shards


def read_samples(shard: Shard) -> Iterator[Sample]:
    """The samples of a shard in the order of their first member; unusable ones with a reason.

    Raises LostTail after the last readable sample when the file breaks off or is no tar.
    """
    with _local_copy(shard) as stream:
        keys, broken = _headers(stream)
        for key, members in keys:
            yield _sample(stream, key, members)
    if broken:
        raise LostTail(broken)


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member: cut at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _expanded(pattern: str) -> list[str]:
    """A pattern's brace expansion, or the pattern itself where such a name exists."""
    fs, path = filesystem(pattern)
    if fs.exists(path):
        return [pattern]
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:  # its UnbalancedBracesError
        raise UsageError(f"shards pattern {pattern!r} has unbalanced braces") from error


class _Listing:
    """Looks shards up; each folder is listed once, however many of its shards are named."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, FileInfo]] = {}

    def matches(self, url: str) -> Iterator[tuple[str, FileInfo]]:
        parent, _, name = url.rpartition("/")
        known = self._files(parent or ".").get(name)
        if known is not None:
            yield url, known
            return
        fs, path = filesystem(url)
        if fs.isdir(path):
            for info in self._files(url).values():
                if info.name.endswith(".tar"):
                    yield f"{url.rstrip('/')}/{info.name}", info
        elif any(c in url for c in "*?["):
            for match in fs.glob(path):
                address = str(fs.unstrip_protocol(match)) if "://" in url else str(match)
                yield from self.matches(address)
        else:
            raise InputError(f"shard {url} does not exist: check --shards")

    def _files(self, folder: str) -> dict[str, FileInfo]:
        if folder not in self._folders:
            self._folders[folder] = {info.name: info for info in Folder(folder).files()}
        return self._folders[folder]


@contextmanager
def _local_copy(shard: Shard) -> Iterator[IO[bytes]]:
    """The shard as a seekable local file; remote ones are fetched whole and checked for length."""
    local = Folder(shard.url).local
    if local is not None:
        with local.open("rb") as stream:
            yield stream
        return
    fs, path = filesystem(shard.url)
    with tempfile.TemporaryDirectory(prefix="d2filter-") as scratch:
        target = Path(scratch) / "shard.tar"
        fs.get_file(path, str(target))
        if target.stat().st_size != shard.info.size:
            raise InputError(
                f"{shard.url} has {shard.info.size} bytes and {target.stat().st_size} arrived: "
                "the connection broke, run the same command again"
            )
        with target.open("rb") as stream:
            yield stream


_Members = dict[str, tarfile.TarInfo]
_BLOCK = tarfile.BLOCKSIZE


def _headers(stream: IO[bytes]) -> tuple[list[tuple[str, _Members]], str]:
    """Members by key, and what broke off the reading ("" when nothing did)."""
    keys: list[tuple[str, _Members]] = []
    latest: dict[str, _Members] = {}
    broken = ""
    after = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                after = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if not member.isfile():
                    continue
                key, extension = split_name(member.name)
                members = latest.get(key)
                if members is None or extension in members:
                    # a name that comes again begins another sample: nothing is overwritten
                    members = latest[key] = {}
                    keys.append((key, members))
                members[extension] = member
    except (tarfile.TarError, EOFError, ValueError, OverflowError, struct.error) as error:
        broken = str(error) or type(error).__name__
    # tarfile takes a damaged header for the end; a whole archive ends in a block of zeros
    end = stream.seek(0, 2)
    stream.seek(min(after, end))
    block = stream.read(_BLOCK)
    if not broken and len(block) < _BLOCK:
        broken = f"no end-of-archive mark at byte {after}: cut off"
    if not broken and block.strip(b"\0"):
        broken = f"damaged header at byte {after}"
    # the header of the last member may be whole while its content is not
    return [
        (key, members)
        for key, members in keys
        if all(0 <= m.size <= end - m.offset_data for m in members.values())
    ], broken


def _sample(stream: IO[bytes], key: str, members: _Members) -> Sample:
    key = clean(key)

    def read(extension: str) -> bytes:
        stream.seek(members[extension].offset_data)
        return stream.read(members[extension].size)

    parsed: Any = {}
    if "json" in members:
        try:
            parsed = json.loads(read("json"))
        except (ValueError, RecursionError) as error:
            return Sample(key=key, reason="broken json", message=_short(error))
        if not isinstance(parsed, dict):
            return Sample(key=key, reason="broken json", message="not an object")
    meta: dict[str, Any] = parsed
    known = meta["uid"] if uid_format.is_uid(meta.get("uid")) else None
    image = next((e for e in IMAGE_SUFFIXES if e in members), None)
    if image is None:
        there = ", ".join(sorted(members))
        return Sample(
            key=key, uid=known, reason="no image", message=clean(f"members: {there}")[:300]
        )
    caption = meta.get("caption")
    if "txt" in members:
        try:
            caption = read("txt").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Sample(key=key, uid=known, reason="caption is no UTF-8", message=_short(error))
    if not isinstance(caption, str):
        return Sample(key=key, uid=known, reason="no caption")
    if not encodable(caption):
        return Sample(key=key, uid=known, reason="caption is no UTF-8", message="lone surrogate")
    if not caption.strip():
        return Sample(key=key, uid=known, reason="empty caption")
    content = read(image)
    if not content:
        return Sample(key=key, uid=known, reason="empty image")
    return Sample(
        key=key,
        image=content,
        caption=caption,
        uid=known or uid_format.content_uid(content, caption),
        meta=meta,
    )


def _short(error: BaseException) -> str:
    return clean(f"{type(error).__name__}: {error}")[:300]
