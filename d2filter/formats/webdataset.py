"""Reads the samples of WebDataset shards: tar files whose members share a key.

A key is the member's path up to the first dot of its base name, as in webdataset; members without a
key are ignored, as there. Members of a key need not be adjacent, because all headers of a shard are
read before the samples. Nothing is extracted to disk, so a path in a name has no effect.

See docs/files.md#shards.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from d2filter.errors import InputError
from d2filter.formats import filetype, tarindex
from d2filter.formats import uid as uid_format
from d2filter.formats.shardlist import (
    PICTURES,
    Shard,
    clean,
    encodable,
    find_shards,
    list_shards,
    shard_at,
)

__all__ = [
    "IMAGE_FORMATS", "IMAGE_SUFFIXES", "LostTail", "Sample", "Shard", "clean", "describe",
    "encodable", "find_shards", "list_shards", "locate_samples", "read_samples", "shard_at",
]  # fmt: skip

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# what such a member may hold, whatever its name says: a decoder for PostScript runs programs
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

MAX_IMAGE_BYTES = 256 << 20
MAX_JSON_BYTES = 16 << 20
MAX_TEXT_BYTES = 1 << 20

_KEPT_META = ("url", "sha256", "original_width", "original_height")
# `<_io.BytesIO object at 0x7f3a5c0>`: the same fault must read the same in every run
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+[^<>]*>")


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
    replaced: bool = False
    """whether its json gave an id that is no uid, and `uid` is another"""


class LostTail(Exception):
    """The rest of a shard cannot be read; the samples before it were yielded."""


def describe(error: BaseException) -> str:
    """An exception in one short text that is the same in every run: without memory addresses."""
    text = _OBJECT.sub("the file", f"{type(error).__name__}: {error}")
    return clean(" ".join(text.split()))[:300]


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
                yield from _beside_their_key(key) or [_sample(stream, key)]
    if broken:
        raise LostTail(clean(broken)[:300])


class Located(NamedTuple):
    """Where a sample lies in its shard."""

    key: str
    uid: str
    has_uid: bool
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
            uid = given = _given_uid(stream, key)
            if uid is None:
                sample = _sample(stream, key)
                uid = None if sample.reason else sample.uid
            if uid is not None:
                places = {ext: place for ext, place in key.members.items() if not place.odd}
                yield Located(name, uid, given is not None, places)
    if broken:
        raise LostTail(clean(broken)[:300])


@contextmanager
def _local_copy(shard: Shard) -> Iterator[IO[bytes]]:
    """The shard as a seekable local file; remote ones are fetched whole and checked for length."""
    folder, name = shard.place
    if folder.local is not None:
        path = folder.local / name
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            # opening a pipe waits for ever
            raise InputError(f"shard {clean(shard.url)} is not a regular file")
    elif shard.compressed:
        # not worth its whole way here
        with folder.reading(name, shard.info) as stream:
            why = filetype.why_no_shard(stream.read(filetype.HEAD_BYTES))
        if why:
            raise LostTail(why)
    with folder.fetched(name, shard.info) as stream:
        yield stream


class _Unusable(Exception):
    """A sample that cannot be used: (reason, message)."""


def _beside_their_key(found: tarindex.Key) -> list[Sample]:
    """Pictures that have no key of their own because of a dot in their names (`photo.0001.jpg` and
    `photo.0002.jpg` both have the key `photo`), where the key itself has no picture.
    """
    if not found.members.keys().isdisjoint(IMAGE_SUFFIXES):
        return []
    key = clean(found.name)
    return [
        Sample(
            key=clean(f"{found.name}.{extension.rpartition('.')[0]}"),
            reason="dot in the name",
            message=f"a key ends at the first dot, so {clean(extension)[:100]} belongs to "
            f"{key[-100:]}: rename it without that dot",
        )
        for extension in found.members
        if "." in extension and extension.rpartition(".")[2] in PICTURES
    ]


def _sample(stream: IO[bytes], found: tarindex.Key) -> Sample:
    key, members = clean(found.name), found.members
    known: str | None = None
    replaced = False

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
        known = uid_format.normalized(meta.get("uid"))
        replaced = known is None and meta.get("uid") is not None
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
        replaced=replaced,
    )


def _given_uid(stream: IO[bytes], found: tarindex.Key) -> str | None:
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
    return uid_format.normalized(meta.get("uid"))


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _Unusable("broken json", describe(error)) from error
    if not isinstance(parsed, dict):
        raise _Unusable("broken json", "not an object")
    return parsed


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unusable("caption is no UTF-8", describe(error)) from error


def _listed(members: dict[str, tarindex.Member]) -> str:
    return clean(", ".join(sorted(members)))[:300]
