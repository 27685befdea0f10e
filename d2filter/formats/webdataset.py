"""Samples of WebDataset shards: tar files whose members share a key (DESIGN §6).

A key is the member's path up to the first dot of its base name, as webdataset defines it. Members
of a key need not lie side by side: the headers of a shard are read first, then the samples. Nothing
is ever extracted: a name is a name, whatever path it spells.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

import braceexpand

from d2filter.errors import InputError, UsageError
from d2filter.formats import tarindex
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import FileInfo, Folder, filesystem
from d2filter.formats.remote import version_of

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# what such a member may hold, whatever its name says: a decoder for PostScript runs programs
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

MAX_IMAGE_BYTES = 256 << 20
MAX_JSON_BYTES = 16 << 20
MAX_TEXT_BYTES = 1 << 20

_KEPT_META = ("url", "sha256", "original_width", "original_height")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file."""

    url: str
    info: FileInfo
    name: str
    """base name without .tar; made unique among the shards of a run"""

    @property
    def place(self) -> tuple[Folder, str]:
        """The folder that it lies in, and the file's name there."""
        parent, _, name = self.url.rpartition("/")
        return Folder(parent or "."), name


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image-text pair, or what is wrong with it."""

    key: str
    image: bytes = b""
    caption: str = ""
    uid: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    """url, sha256, original_width and original_height of the json member, if it has them"""
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
        if not encodable(url):
            raise InputError(f"shard {clean(url)} has a name that is no UTF-8: rename the file")
        mark = hashlib.blake2b(url.encode(), digest_size=4).hexdigest()
        shards.append(Shard(url, found[url], f"{name}-{mark}" if name in repeated else name))
    return shards


def shard_at(url: str) -> Shard:
    """The shard of exactly this name: no pattern, no folder. Raises InputError when it is missing,
    StorageError when a remote one cannot be looked up.
    """
    fs, path = filesystem(url)
    try:
        entry = fs.info(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"shard {clean(url)} does not exist") from error
    name = PurePosixPath(url).name
    info = FileInfo(name, int(entry["size"] or 0), version_of(entry))
    return Shard(url, info, name.removesuffix(".tar"))


def read_samples(shard: Shard, wanted: Container[str] | None = None) -> Iterator[Sample]:
    """The samples of a shard in the order of their first member; unusable ones with a reason.
    wanted: keys to read, all without it.

    Memory: one sample, and some 300 bytes a member. Raises LostTail after the last readable sample
    when the file breaks off or is no tar.
    """
    with _local_copy(shard) as stream:
        found, broken = tarindex.read(stream, IMAGE_SUFFIXES)
        for key in found:
            if wanted is None or clean(key.name) in wanted:
                yield _sample(stream, key)
    if broken:
        raise LostTail(clean(broken)[:300])


class Located(NamedTuple):
    """Where a sample lies in its shard."""

    key: str
    uid: str
    told: bool
    """whether the uid stands in the json; else it is made from the content"""
    members: dict[str, tarindex.Member]
    """those that are plain files, by extension"""


def locate_samples(shard: Shard, wanted: Container[str] | None = None) -> Iterator[Located]:
    """Each sample with a picture and a caption. Pictures and captions are only read where the json
    has no uid. wanted: keys to look at, all without it.

    Raises LostTail like `read_samples`.
    """
    with _local_copy(shard) as stream:
        found, broken = tarindex.read(stream, IMAGE_SUFFIXES)
        for key in found:
            name = clean(key.name)
            if key.cut or (wanted is not None and name not in wanted):
                continue
            uid = told = _told_uid(stream, key)
            if uid is None:
                sample = _sample(stream, key)
                uid = None if sample.reason else sample.uid
            if uid is not None:
                places = {ext: place for ext, place in key.members.items() if not place.odd}
                yield Located(name, uid, told is not None, places)
    if broken:
        raise LostTail(broken)


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
    folder, name = shard.place
    with folder.fetched(name, shard.info) as stream:
        yield stream


class _Unusable(Exception):
    """A sample that cannot be used: (reason, message)."""


def _sample(stream: IO[bytes], found: tarindex.Key) -> Sample:
    key, members = clean(found.name), found.members
    known: str | None = None

    def read(extension: str, most: int) -> bytes:
        member = members[extension]
        if member.odd:
            raise _Unusable("no plain file", f"{extension} is {member.odd}")
        if member.size > most:
            message = f"{extension} has {member.size} bytes, at most {most} are read"
            raise _Unusable("member too large", message)
        stream.seek(member.offset)
        return stream.read(member.size)

    try:
        if found.cut:
            raise _Unusable("cut off", f"the shard breaks off; members: {_listed(members)}")
        meta = _parsed(read("json", MAX_JSON_BYTES)) if "json" in members else {}
        known = meta["uid"] if uid_format.is_uid(meta.get("uid")) else None
        images = [e for e in IMAGE_SUFFIXES if e in members]
        if not images:
            raise _Unusable("no image", f"members: {_listed(members)}")
        caption = meta.get("caption")
        if "txt" in members:
            caption = _decoded(read("txt", MAX_TEXT_BYTES))
        if not isinstance(caption, str):
            raise _Unusable("no caption", "")
        if not encodable(caption):
            raise _Unusable("caption is no UTF-8", "lone surrogate")
        if not caption.strip():
            raise _Unusable("empty caption", "")
        content = read(min(images, key=lambda e: members[e].odd != ""), MAX_IMAGE_BYTES)
        if not content:
            raise _Unusable("empty image", "")
    except _Unusable as error:
        reason, message = error.args
        return Sample(key=key, uid=known, reason=reason, message=message)
    return Sample(
        key=key,
        image=content,
        caption=caption,
        uid=known or uid_format.content_uid(content, caption),
        # the rest of a json may be large, and samples wait in memory for their batch
        meta={name: meta[name] for name in _KEPT_META if isinstance(meta.get(name), (str, int))},
    )


def _told_uid(stream: IO[bytes], found: tarindex.Key) -> str | None:
    """That of the json member, where it has one and the members look like those of a sample."""
    sound = {name: place for name, place in found.members.items() if place.size and not place.odd}
    place = sound.get("json")
    if place is None or place.size > MAX_JSON_BYTES or not sound.keys() & set(IMAGE_SUFFIXES):
        return None
    stream.seek(place.offset)
    try:
        meta = _parsed(stream.read(place.size))
    except _Unusable:
        return None
    if "txt" not in sound and not isinstance(meta.get("caption"), str):
        return None
    told = meta.get("uid")
    return str(told) if uid_format.is_uid(told) else None


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _Unusable("broken json", _short(error)) from error
    if not isinstance(parsed, dict):
        raise _Unusable("broken json", "not an object")
    return parsed


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unusable("caption is no UTF-8", _short(error)) from error


def _listed(members: dict[str, tarindex.Member]) -> str:
    return clean(", ".join(sorted(members)))[:300]


def _short(error: BaseException) -> str:
    return clean(f"{type(error).__name__}: {error}")[:300]
