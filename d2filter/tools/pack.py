"""`d2filter pack FOLDER --shards OUT`: a folder of captioned images → WebDataset shards.

The caption of X.png is in X.txt, or in the field `caption` or `text` of X.json. Image bytes are
stored unchanged. Each shard has a NAME_stats.json, and each sample a json with img2dataset's
fields, so that tools for img2dataset's output can read them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import webdataset
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from d2filter.errors import InputError, UsageError
from d2filter.formats import filetype
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.webdataset import IMAGE_FORMATS, IMAGE_SUFFIXES, clean, encodable

CaptionLines = Literal["first", "all"]
SKIPPED = "skipped.csv"

_UNFINISHED = "pack-unfinished.json"
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
    """Write all captioned images below `source`, in order of their paths; skipped.csv comes last.

    The same folder gives the same bytes. Files of an interrupted run are replaced. Raises
    UsageError for an unusable folder, and InputError if there is nothing to pack or `shards`
    contains finished shards or files of another tool.
    """
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder: pack takes a folder of images and captions")
    if not 1 <= shard_size <= _SHARD_SIZE:
        raise UsageError(f"shard-size is {shard_size}, allowed is 1 to {_SHARD_SIZE}")
    _begin(shards)
    skipped: list[tuple[str, str]] = []
    long_captions = 0
    files = _Files(source)
    skipped += files.unreadable

    def pairs() -> Iterator[_Pair]:
        nonlocal long_captions
        disable = None if show_progress is None else not show_progress
        for path in tqdm(files.paths, desc="pack     ", unit=" files", disable=disable):
            try:
                found = _read(path, files, caption_lines)
            except OSError as error:
                found = f"file that cannot be read ({error.strerror or type(error).__name__})"
            if isinstance(found, str):
                if found:
                    skipped.append((_shown(path.relative_to(source)), found))
                continue
            long_captions += found.more_lines and caption_lines == "first"
            yield found

    samples, count = _write(pairs(), shards, shard_size)
    reasons = Counter(reason for _, reason in skipped).most_common()
    if samples == 0:
        shards.remove(_UNFINISHED)
        what = ", ".join(f"{n} {reason}" for reason, n in reasons[:3]) or "it holds no files"
        raise InputError(f"{source} has no captioned image to pack ({what})")
    with shards.publish(SKIPPED) as target, target.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(["path", "reason"])
        writer.writerows(skipped)
    shards.remove(_UNFINISHED)
    return Packed(samples=samples, shards=count, skipped=dict(reasons), long_captions=long_captions)


def summary(packed: Packed, shards: Folder, say: Callable[[str], None]) -> None:
    """Print what was packed, what was not and why, and what to do next."""
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
    say(f"next: d2filter run --shards {shlex.quote(shards.url)} --out-dir OUT")


class _Files:
    """What lies below a folder: files in order, sidecars by stem, what cannot be looked into."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.unreadable: list[tuple[str, str]] = []
        self.paths: list[Path] = []
        self._by_stem: dict[Path, dict[str, Path]] = {}
        for folder, folders, names in os.walk(source, onerror=self._refused):
            folders.sort()
            for name in folders:
                if (Path(folder) / name).is_symlink():
                    self._leave(Path(folder) / name, "link to a folder (not followed)")
            for name in names:
                path = Path(folder) / name
                if path.is_file():
                    self.paths.append(path)
                    suffix = path.suffix.lower().removeprefix(".")
                    self._by_stem.setdefault(path.with_suffix(""), {}).setdefault(suffix, path)
                else:
                    dangling = path.is_symlink()
                    self._leave(path, "link that leads nowhere" if dangling else "no regular file")
        self.paths.sort()

    def beside(self, path: Path, suffixes: Sequence[str]) -> Path | None:
        """The first file of the same stem with one of the suffixes, in either case."""
        there = self._by_stem[path.with_suffix("")]
        return next((there[s] for s in suffixes if s in there), None)

    def _refused(self, error: OSError) -> None:
        if error.filename is not None:
            self._leave(Path(os.fsdecode(error.filename)), "folder that cannot be read")

    def _leave(self, path: Path, reason: str) -> None:
        self.unreadable.append((_shown(path.relative_to(self.source)), reason))


def _begin(shards: Folder) -> None:
    """Make room: what an interrupted pack left is replaced, finished or foreign shards are not."""
    if shards.exists(_UNFINISHED):
        for name in (*shards.names(".tar"), *shards.names("_stats.json"), SKIPPED):
            shards.remove(name)
    if shards.names(".tar"):
        raise InputError(
            f"{shards.url} holds .tar files already: pack into an empty folder, or remove them"
        )
    shards.publish_json(_UNFINISHED, {})


def _read(path: Path, files: _Files, caption_lines: CaptionLines) -> _Pair | str:
    """A pair, the reason why the file is skipped, or "" for a sidecar of an image."""
    suffix = path.suffix.lower().removeprefix(".")
    if suffix in _SIDECARS:
        image_there = files.beside(path, (*IMAGE_SUFFIXES, *_OTHER_IMAGES)) is not None
        return "" if image_there else f"caption (.{suffix}) without an image"
    if suffix in _OTHER_IMAGES:
        captioned = files.beside(path, _SIDECARS) is not None
        what = "captioned image" if captioned else "image without a caption"
        return f"{what} of a type that CLIP training does not read (.{suffix})"
    if suffix not in IMAGE_SUFFIXES:
        return f"no image (.{suffix})" if suffix else "no image (no extension)"
    image = path.read_bytes()
    if not image:
        return "empty file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a large picture is packed, not announced
            with Image.open(io.BytesIO(image), formats=IMAGE_FORMATS) as picture:
                size = picture.size
    except UnidentifiedImageError:
        kind = filetype.recognize(image[: filetype.HEAD_BYTES])
        return f"no image that is read: {kind.name}" if kind else "broken image (of no known kind)"
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        return f"broken image ({type(error).__name__})"
    caption, meta = _caption(path, files)
    if caption is None:
        return str(meta.get("reason", "image without a caption"))
    lines = [line.strip() for line in caption.splitlines() if line.strip()]
    if not lines:
        return "empty caption"
    text = lines[0] if caption_lines == "first" else " ".join(lines)
    relative = path.relative_to(files.source)
    return _Pair(relative, image, text, size, meta, more_lines=len(lines) > 1)


def _caption(path: Path, files: _Files) -> tuple[str | None, dict[str, Any]]:
    """The caption beside an image, and its json; (None, {"reason": …}) when it is unusable.

    A .txt goes before a .json: annotations of another kind often lie beside images.
    """
    text, described = files.beside(path, ("txt",)), files.beside(path, ("json",))
    meta: dict[str, Any] = {}
    reason = ""
    if described is not None:
        try:
            parsed = json.loads(described.read_text("utf-8-sig"))
        except (ValueError, RecursionError):
            parsed, reason = None, "caption (.json) is broken"
        if isinstance(parsed, dict):
            meta = parsed
        reason = reason or ("" if meta else "caption (.json) holds no text")
    if text is not None:
        try:
            return text.read_text("utf-8-sig"), meta
        except UnicodeDecodeError:
            return None, {"reason": "caption (.txt) is no UTF-8"}
    if described is None:
        return None, {}
    caption = meta.get("caption", meta.get("text"))
    if not isinstance(caption, str):
        return None, {"reason": reason or "caption (.json) holds no text"}
    if not encodable(caption):
        return None, {"reason": "caption (.json) is no UTF-8"}
    return caption, meta


def _shown(path: Path) -> str:
    """A path as text that every file can hold."""
    return clean(str(path))


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
    uid, url = uid_format.normalized(pair.meta.get("uid")), pair.meta.get("url")
    meta = {
        "uid": uid or uid_format.content_uid(pair.image, pair.caption),
        "caption": pair.caption,
        "url": url if isinstance(url, str) and encodable(url) else None,
        "path": clean(pair.path.as_posix()),
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
        "txt": pair.caption.encode(),
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
