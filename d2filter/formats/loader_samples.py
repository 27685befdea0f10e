"""Checks a sample from webdataset's loader by the rules of `d2filter embed`.

A loader yields a dictionary of bytes by extension. A sample that `embed` would count as bad is in
no subset. All rules are applied that need no image decoder.
"""

from __future__ import annotations

import json
from typing import Any

from d2filter.errors import InputError
from d2filter.formats import uid as uid_format
from d2filter.formats import webdataset

Sample = dict[str, Any]

_KEY = b'"uid"'
_MARK = b'"uid": "'  # as json.dumps writes it
_MARK_TO_END = len(_MARK) + 32
_BACKSLASH = 92
_BYTES = (bytes, bytearray, memoryview)


def uid_of(sample: Sample) -> str | None:
    """The uid of a webdataset sample, by the rule of `d2filter embed`: that of its json, else of
    its content. None for a sample that no run would rank, as far as its bytes show.

    Raises InputError if the content decides and is decoded already.
    """
    parts = _parts(sample)
    return None if parts is None else parts[0] or _content_uid(sample, *parts[1:])


def has_uid(sample: Sample, uids: bytes, strict: bool) -> bool:
    """Whether a sample has one of some uids, 32 hex digits each, in one string.

    strict: whether a sample without a uid in its json has that of its content. Else it has any: its
    uid came from elsewhere. Raises InputError like `uid_of`.
    """
    digits = plain_uid(sample.get("json"))
    if digits is not None and _is_among(digits, uids) and is_whole(sample):
        return True
    parts = _parts(sample)
    if parts is None:
        return False
    uid = parts[0]
    if uid is None and not strict:
        return True
    return _is_among((uid or _content_uid(sample, *parts[1:])).encode(), uids)


def _is_among(digits: bytes, wanted: bytes) -> bool:
    return digits == wanted or any(
        wanted[at : at + 32] == digits for at in range(0, len(wanted), 32)
    )


def is_whole(sample: Sample) -> bool:
    """Whether the sample has an image and a caption as usable bytes. False if only a parser could
    tell.
    """
    text = sample.get("txt")
    if type(text) is not bytes or len(text) > webdataset.MAX_TEXT_BYTES:
        return False
    try:
        if not text.decode("utf-8-sig").strip():
            return False
    except UnicodeDecodeError:
        return False
    image = next((sample[e] for e in webdataset.IMAGE_SUFFIXES if e in sample), None)
    return type(image) is bytes and 0 < len(image) <= webdataset.MAX_IMAGE_BYTES


def _parts(sample: Sample) -> tuple[str | None, Any, Any] | None:
    """uid of the json, picture and caption of a sample, as they are there; None where `d2filter
    embed` would count it as bad.
    """
    meta = sample.get("json", {})
    if isinstance(meta, _BYTES):
        if len(meta) > webdataset.MAX_JSON_BYTES:
            return None
        try:
            meta = json.loads(bytes(meta))
        except (ValueError, RecursionError):
            return None
    image = next((sample[e] for e in webdataset.IMAGE_SUFFIXES if e in sample), None)
    caption = sample["txt"] if "txt" in sample else _get(meta, "caption")
    if isinstance(caption, _BYTES):
        if len(caption) > webdataset.MAX_TEXT_BYTES:
            return None
        try:
            caption = bytes(caption).decode("utf-8-sig")
        except UnicodeDecodeError:
            return None
    if not isinstance(meta, dict) or image is None or caption is None:
        return None
    if isinstance(image, _BYTES) and not 0 < len(image) <= webdataset.MAX_IMAGE_BYTES:
        return None
    if isinstance(caption, str):
        if not caption.strip() or not webdataset.encodable(caption):
            return None
    elif "txt" not in sample:
        return None
    return uid_format.normalized(meta.get("uid")), image, caption


def _get(meta: Any, name: str) -> Any:
    return meta.get(name) if isinstance(meta, dict) else None


def _content_uid(sample: Sample, image: Any, caption: Any) -> str:
    if not isinstance(image, _BYTES) or not isinstance(caption, str):
        raise InputError(
            f"sample {sample.get('__key__')!r} has no uid in its json, and its picture or caption "
            "is already decoded, so its uid cannot be computed: put keep() before decode()"
        )
    return uid_format.content_uid(bytes(image), caption)


def plain_uid(meta: object) -> bytes | None:
    """What stands as uid in a json written as most are, without parsing it; None where one must.

    In an object without others inside, this is its key and no other. Ten times as fast as parsing,
    and nothing else that is done with a sample takes as long.
    """
    if type(meta) is not bytes:
        return None
    at = meta.find(_MARK)
    end = at + _MARK_TO_END
    if (
        at < 1
        or meta[end : end + 1] != b'"'
        or meta[at - 1] == _BACKSLASH
        or meta[:1] != b"{"
        or meta[-1:] not in (b"}", b"\n")  # cut off
        or meta.count(b"{") != 1
        or meta.count(_KEY) != 1
    ):
        return None
    return meta[end - 32 : end]
