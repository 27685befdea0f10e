"""Uids: 32 lowercase hex digits on disk, two uint64 in arrays.

See docs/files.md#identity.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

U64 = npt.NDArray[np.uint64]

_HEX = re.compile(r"[0-9a-f]{32}")
_NOT_HEX = 255
_DIGIT = np.full(256, _NOT_HEX, np.uint8)
for _value, _character in enumerate(b"0123456789abcdef"):
    _DIGIT[_character] = _DIGIT[ord(chr(_character).upper())] = _value
_DASHES = np.array([8, 13, 18, 23])  # of a UUID as it is usually written
_WITHOUT_DASHES = np.setdiff1d(np.arange(36), _DASHES)
_SPELLED = re.compile(r"([0-9a-f]{8})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{12})")


def is_uid(text: object) -> bool:
    """Whether `text` is a string of exactly 32 lowercase hex digits."""
    return isinstance(text, str) and _HEX.fullmatch(text) is not None


def normalized(text: object) -> str | None:
    """The uid that `text` spells: 32 hex digits in either case, or those of a UUID with its four
    dashes. None for everything else.

    >>> normalized("01234567-89AB-CDEF-0123-456789abcdef")
    '0123456789abcdef0123456789abcdef'
    """
    if not isinstance(text, str) or len(text) not in (32, 36):
        return None
    found = _SPELLED.fullmatch(text.lower() if text.isascii() else "")
    return "".join(found.groups()) if found else None


def content_uid(image: bytes, caption: str) -> str:
    """blake2b-128 of the image bytes and the caption: the id of a sample that brings none.

    The length of the image comes first, so that no other split of the same bytes collides.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(image).to_bytes(8, "little"))
    digest.update(image)
    digest.update(caption.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def parse(column: Any) -> tuple[U64, U64, npt.NDArray[np.bool_]]:
    """hi, lo (n,) uint64 and valid (n,) bool of an arrow column of strings or binaries, spelled in
    any way that `normalized` takes.

    Rows that are null or no uid have hi = lo = 0 and valid = False. Raises pa.ArrowInvalid or
    pa.ArrowNotImplementedError for columns that hold no strings.
    """
    if isinstance(column, pa.ChunkedArray):
        # an empty one first: there may be no chunk
        parts = [parse(chunk) for chunk in (pa.array([], column.type), *column.chunks)]
        return (
            np.concatenate([part[0] for part in parts]),
            np.concatenate([part[1] for part in parts]),
            np.concatenate([part[2] for part in parts]),
        )
    if pa.types.is_dictionary(column.type):
        # never decoded: a long string may be repeated millions of times
        null = pa.nulls(1, column.type.value_type)
        hi, lo, valid = parse(pa.concat_arrays([column.dictionary, null]))
        rows = pc.fill_null(column.indices.cast(pa.int64()), len(hi) - 1).to_numpy()
        return hi[rows], lo[rows], valid[rows]
    if not _is_text(column.type):
        raise pa.ArrowInvalid(f"type {column.type} where strings are needed")
    column = column.cast(pa.large_binary())
    length = pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
    hi = np.zeros(length.size, np.uint64)
    lo = np.zeros(length.size, np.uint64)
    valid = np.zeros(length.size, np.bool_)
    for width in (32, 36):
        fitting = length == width
        rows = np.flatnonzero(fitting)
        if not rows.size:
            continue
        sound = column.filter(pa.array(fitting))
        raw = np.frombuffer(sound.buffers()[2], np.uint8)[: width * rows.size].reshape(-1, width)
        good = np.ones(rows.size, np.bool_)
        if width == 36:
            good = (raw[:, _DASHES] == ord("-")).all(axis=1)
            raw = raw[:, _WITHOUT_DASHES]
        digit = _DIGIT[raw]
        good &= (digit != _NOT_HEX).all(axis=1)
        packed = np.ascontiguousarray((digit[:, 0::2] << 4) | digit[:, 1::2]).view(">u8")
        rows = rows[good]
        hi[rows] = packed[good, 0]
        lo[rows] = packed[good, 1]
        valid[rows] = True
    return hi, lo, valid


def _is_text(kind: Any) -> bool:
    # arrow 15 has no type of views
    names = ("null", "string", "large_string", "string_view", "binary", "large_binary")
    return pa.types.is_fixed_size_binary(kind) or str(kind) in (*names, "binary_view")


def from_hex(text: str) -> tuple[int, int]:
    """hi and lo of 32 hex digits."""
    return int(text[:16], 16), int(text[16:], 16)


def to_hex(hi: U64, lo: U64) -> list[str]:
    """The 32 hex digits of each uid."""
    packed = np.empty((len(hi), 2), ">u8")
    packed[:, 0] = hi
    packed[:, 1] = lo
    text = packed.tobytes().hex()
    return [text[at : at + 32] for at in range(0, len(text), 32)]
