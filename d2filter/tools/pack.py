"""`d2filter pack FOLDER --shards OUT`: a folder of captioned images → WebDataset shards.

An image X.png goes with the caption in X.txt, or in the field `caption` or `text` of X.json. Image
bytes are stored as they are. Beside each shard lies NAME_stats.json, and each sample has a json
with img2dataset's fields, so that tools made for img2dataset's output read ours.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import webdataset
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from d2filter.errors import InputError, UsageError
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.webdataset import IMAGE_SUFFIXES

CaptionLines = Literal["first", "all"]
SKIPPED = "skipped.csv"

_KEY_DIGITS = 4
_SHARD_SIZE = 10**_KEY_DIGITS
# pictures that people keep in such folders and that training readers do not take
_OTHER_IMAGES = ("svg", "gif", "bmp", "tif", "tiff", "avif", "heic", "jxl", "ico", "psd")
_SIDECARS = ("txt", "json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What `pack` did."""

    samples: int
    shards: int
    skipped: dict[str, int]
    """reason → files"""
    long_captions: int
    """captions of which only the first line was taken"""


@dataclass(frozen=True, slots=True)
class _Pair:
    path: Path
    """below the folder that is packed"""
    image: bytes
    caption: str
    size: tuple[int, int]
    meta: dict[str, Any]
    more_lines: bool


def pack(
    source: Path,
    shards: Folder,
    *,
    caption_lines: CaptionLines = "first",
    shard_size: int = _SHARD_SIZE,
    show_progress: bool | None = None,
) -> Packed:
    """Write all captioned images below `source`, in order of their paths, and skipped.csv.

    The same folder gives the same bytes. Raises UsageError for an unusable folder, and InputError
    when there is nothing to pack or `shards` holds shards already.
    """
    if not source.is_dir():
        raise UsageError(f"{source} is no folder: pack takes a folder of images and captions")
    if not 1 <= shard_size <= _SHARD_SIZE:
        raise UsageError(f"shard-size is {shard_size}, allowed is 1 to {_SHARD_SIZE}")
    if shards.names(".tar"):
        raise InputError(
            f"{shards.url} holds .tar files already: pack into an empty folder, or remove them"
        )
    files = sorted(path for path in source.rglob("*") if path.is_file())
    skipped: list[tuple[Path, str]] = []
    long_captions = 0

    def pairs() -> Iterator[_Pair]:
        nonlocal long_captions
        known = set(files)
        disable = None if show_progress is None else not show_progress
        for path in tqdm(files, desc="pack     ", unit=" files", disable=disable):
            found = _read(path, source, known, caption_lines)
            if isinstance(found, str):
                if found:
                    skipped.append((path, found))
                continue
            long_captions += found.more_lines and caption_lines == "first"
            yield found

    samples, count = _write(pairs(), shards, shard_size)
    if samples == 0:
        reasons = Counter(reason for _, reason in skipped).most_common(3)
        what = ", ".join(f"{n} {reason}" for reason, n in reasons) or "it holds no files"
        raise InputError(f"{source} has no captioned image to pack ({what})")
    with shards.publish(SKIPPED) as target, target.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(["path", "reason"])
        for path, reason in skipped:
            name = str(path.relative_to(source)).encode("utf-8", "backslashreplace").decode()
            writer.writerow([name, reason])
    return Packed(
        samples=samples,
        shards=count,
        skipped=dict(Counter(reason for _, reason in skipped).most_common()),
        long_captions=long_captions,
    )


def summary(packed: Packed, shards: Folder, say: Callable[[str], None]) -> None:
    """Tell a person what was packed, what was not and why, and what to do next."""
    say(f"packed {packed.samples:,} pairs into {packed.shards:,} shards in {shards.url}")
    for reason, count in packed.skipped.items():
        say(f"  skipped {count:>6,}  {reason}")
    if packed.skipped:
        say(f"  (each one is listed in {shards.where(SKIPPED)})")
    if packed.long_captions:
        say(
            f"  {packed.long_captions:,} captions have more than one line: the first was taken "
            "(--caption-lines all joins them)"
        )
    say(f"next: d2filter run --shards {shards.url} --out-dir OUT")


def _read(path: Path, source: Path, known: set[Path], caption_lines: CaptionLines) -> _Pair | str:
    """A pair, the reason why the file is skipped, or "" for a sidecar of an image."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix in _SIDECARS:
        pictures = (*IMAGE_SUFFIXES, *_OTHER_IMAGES)
        stems = (path.with_suffix(f".{e}") for s in pictures for e in (s, s.upper()))
        return "" if any(p in known for p in stems) else f"caption (.{suffix}) without an image"
    if suffix in _OTHER_IMAGES:
        captioned = any(path.with_suffix(f".{s}") in known for s in _SIDECARS)
        what = "captioned image" if captioned else "image without a caption"
        return f"{what} of a type that CLIP training does not read (.{suffix})"
    if suffix not in IMAGE_SUFFIXES:
        return f"no image (.{suffix})" if suffix else "no image (no extension)"
    image = path.read_bytes()
    if not image:
        return "empty file"
    try:
        with Image.open(io.BytesIO(image)) as picture:
            size = picture.size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        return f"broken image ({type(error).__name__})"
    caption, meta = _caption(path)
    if caption is None:
        return str(meta.get("reason", "image without a caption"))
    lines = [line.strip() for line in caption.splitlines() if line.strip()]
    if not lines:
        return "empty caption"
    text = lines[0] if caption_lines == "first" else " ".join(lines)
    relative = path.relative_to(source)
    return _Pair(relative, image, text, size, meta, more_lines=len(lines) > 1)


def _caption(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The caption beside an image, and its json; (None, {"reason": …}) when it is unusable."""
    parsed: Any = {}
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        try:
            parsed = json.loads(sidecar.read_text("utf-8-sig"))
        except (ValueError, RecursionError):
            return None, {"reason": "caption (.json) is broken"}
        if not isinstance(parsed, dict):
            return None, {"reason": "caption (.json) is no object"}
    meta: dict[str, Any] = parsed
    sidecar = path.with_suffix(".txt")
    if sidecar.is_file():
        try:
            return sidecar.read_text("utf-8-sig"), meta
        except UnicodeDecodeError:
            return None, {"reason": "caption (.txt) is no UTF-8"}
    caption = meta.get("caption", meta.get("text"))
    return (caption, meta) if isinstance(caption, str) else (None, {})


def _write(pairs: Iterator[_Pair], shards: Folder, shard_size: int) -> tuple[int, int]:
    """Write shards of at most `shard_size` pairs; returns (pairs, shards)."""
    samples = 0
    number = 0
    first = next(pairs, None)
    while first is not None:
        shard = f"{number:05d}"
        with shards.publish(f"{shard}.tar") as path, path.open("wb") as stream:
            # no time stamps and no compression: the same folder gives the same bytes
            writer = webdataset.TarWriter(stream, encoder=False, mtime=0)
            count = 0
            current: _Pair | None = first
            while current is not None:
                writer.write(sample_members(f"{shard}{count:0{_KEY_DIGITS}d}", current))
                count += 1
                current = next(pairs, None) if count < shard_size else None
            writer.close()
        shards.publish_json(f"{shard}_stats.json", _stats(count))
        samples += count
        number += 1
        first = next(pairs, None) if count == shard_size else None
    return samples, number


def sample_members(key: str, pair: _Pair) -> dict[str, Any]:
    """One sample for webdataset's TarWriter, with img2dataset's json fields."""
    width, height = pair.size
    told = pair.meta.get("uid")
    meta = {
        "uid": told
        if uid_format.is_uid(told)
        else uid_format.content_uid(pair.image, pair.caption),
        "caption": pair.caption,
        "url": pair.meta.get("url"),
        "path": pair.path.as_posix().encode("utf-8", "backslashreplace").decode(),
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": hashlib.sha256(pair.image).hexdigest(),
    }
    suffix = pair.path.suffix.lower().removeprefix(".")
    return {
        "__key__": key,
        suffix: pair.image,
        "txt": pair.caption.encode("utf-8", "replace"),
        "json": json.dumps(meta, ensure_ascii=True).encode(),
    }


def _stats(count: int) -> dict[str, Any]:
    return {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "bytes_downloaded": 0,
        "status_dict": {"success": count},
    }
