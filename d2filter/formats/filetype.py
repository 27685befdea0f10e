"""Recognizes a file by its first bytes.

A message about a broken image or shard can then name what the file is.
"""

from __future__ import annotations

from typing import NamedTuple

HEAD_BYTES = 512
"""bytes of a file that `recognize` looks at"""


class Kind(NamedTuple):
    """A sort of file."""

    name: str
    """with its article"""
    group: str
    """compressed, archive, picture, table, text or other"""


_MAGIC = (
    (0, b"\x1f\x8b", Kind("a gzip file", "compressed")),
    (0, b"\x28\xb5\x2f\xfd", Kind("a zstd file", "compressed")),
    (0, b"\xfd7zXZ\0", Kind("an xz file", "compressed")),
    (0, b"\x04\x22\x4d\x18", Kind("an lz4 file", "compressed")),
    (4, b"1AY&SY", Kind("a bzip2 file", "compressed")),
    (0, b"PK\x03\x04", Kind("a zip file", "archive")),
    (0, b"7z\xbc\xaf\x27\x1c", Kind("a 7z file", "archive")),
    (0, b"Rar!\x1a\x07", Kind("a rar file", "archive")),
    (0, b"\xff\xd8\xff", Kind("a JPEG picture", "picture")),
    (0, b"\x89PNG\r\n\x1a\n", Kind("a PNG picture", "picture")),
    (0, b"GIF8", Kind("a GIF picture", "picture")),
    (8, b"WEBP", Kind("a WebP picture", "picture")),
    (0, b"II*\0", Kind("a TIFF picture", "picture")),
    (0, b"MM\0*", Kind("a TIFF picture", "picture")),
    (4, b"ftypavi", Kind("an AVIF picture", "picture")),
    (4, b"ftyphei", Kind("a HEIC picture", "picture")),
    (4, b"ftyphev", Kind("a HEIC picture", "picture")),
    (4, b"ftypmif1", Kind("a HEIF picture", "picture")),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", Kind("a JPEG 2000 picture", "picture")),
    (0, b"\xff\x4f\xff\x51", Kind("a JPEG 2000 picture", "picture")),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", Kind("a JPEG XL picture", "picture")),
    (0, b"\xff\x0a", Kind("a JPEG XL picture", "picture")),
    (0, b"8BPS", Kind("a PSD picture", "picture")),
    (0, b"\0\0\1\0", Kind("an ICO picture", "picture")),
    (0, b"%!PS", Kind("a PostScript file", "other")),
    (0, b"%PDF", Kind("a PDF file", "other")),
    (4, b"ftyp", Kind("a video", "other")),
    (0, b"\x1aE\xdf\xa3", Kind("a video", "other")),
    (0, b"PAR1", Kind("a parquet file", "table")),
    (0, b"ARROW1", Kind("an Arrow file", "table")),
    (0, b"\x93NUMPY", Kind("a .npy file", "table")),
    (0, b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file", "table")),
)
_LFS = b"version https://git-lfs.github.com/spec/"
_TEXTS = (
    (b"<!doctype html", Kind("an HTML page", "text")),
    (b"<html", Kind("an HTML page", "text")),
    (b"<svg", Kind("an SVG picture", "picture")),
    (b"<?xml", Kind("an XML text", "text")),
    (b"<error", Kind("an XML text", "text")),
    (b'{"', Kind("a JSON text", "text")),
)

LFS_POINTER = Kind("a Git LFS pointer", "text")


def recognize(head: bytes) -> Kind | None:
    """What a file with these first bytes is, as far as it is known here.

    >>> recognize(b"PAR1" + bytes(9))
    Kind(name='a parquet file', group='table')
    """
    for offset, magic, kind in _MAGIC:
        if head.startswith(magic, offset):
            return kind
    if head.startswith(_LFS):
        return LFS_POINTER
    begin = head[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((kind for magic, kind in _TEXTS if begin.startswith(magic)), None)


def why_no_shard(head: bytes) -> str:
    """Why a file with these first bytes is no shard, and what to do; empty where neither is known.

    >>> why_no_shard(b"PAR1")
    'it is a parquet file, not a tar: a folder of metadata goes with --metadata-dir'
    """
    kind = recognize(head)
    if kind is None:
        return ""
    if kind == LFS_POINTER:
        return f"it is {kind.name}, not the file: fetch it with `git lfs pull`"
    if kind.group in ("compressed", "archive"):
        return f"it is {kind.name}: unpack it, shards are plain tar files"
    remedy = {
        "picture": "`d2filter pack` makes shards of a folder of pictures",
        "table": "a folder of metadata goes with --metadata-dir",
        "text": "a server may have sent it in place of the file: fetch it again",
    }.get(kind.group, "shards are plain tar files")
    return f"it is {kind.name}, not a tar: {remedy}"
