"""Finds the shards that patterns name, and gives each a name that is unique in the run."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from d2filter.errors import InputError, StorageError, UsageError
from d2filter.formats import braces
from d2filter.formats.addresses import file_name, inside, is_web, parted, without_query
from d2filter.formats.paths import FileInfo, Folder, absolute, filesystem, place_of
from d2filter.text import redacted

COMPRESSED = tuple(
    f".{name}"
    for name in (
        *("tar.gz", "tar.bz2", "tar.xz", "tar.zst", "tar.lz4", "tar.z"),
        *("tgz", "tbz", "tbz2", "txz", "tzst"),
    )
)
"""endings of compressed tars: they are taken for shards, and lost by name"""

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jp2")
# files of a shard are called like it: with an ending, and a mark while they are written, they must
# stay within the 143 bytes that encrypted file systems allow
_LONGEST_NAME = 96
_MARK_DIGITS = 32  # 128 bits
_RESERVED = frozenset(("tasks",))  # a file of that name lies beside the markers of the shards
# file systems that read from another one, behind "::"; the others cannot be chained
# but between the brackets of a numeric host
_JOINED = re.compile(r"::(?![0-9a-fA-F:.%]*\])")
_AHEAD = 64  # names on a web server that are looked up at once
_OF_ANOTHER = frozenset(("zip", "tar", "libarchive", "reference", "dir", "generic"))


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file."""

    url: str
    info: FileInfo
    name: str
    """base name without .tar; made unique among the shards of a run, and not long"""

    @property
    def place(self) -> tuple[Folder, str]:
        """The folder that it lies in, and the file's name there."""
        return place_of(self.url)

    @property
    def address(self) -> str:
        """How the shard is recorded and shown: its URL without passwords and signatures."""
        return redacted(self.url)

    @property
    def compressed(self) -> bool:
        """Whether its name is that of a compressed tar."""
        return file_name(self.url).lower().endswith(COMPRESSED)


@dataclass(frozen=True, slots=True)
class Found:
    """What some patterns name."""

    shards: list[Shard]
    """by URL"""
    left_out: dict[str, int] = field(default_factory=dict)
    """files of the folders that are no shards, by ending; `folders` are those inside"""


def clean(text: str) -> str:
    """`text` with what UTF-8 cannot hold spelled out: names in tars may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold `text` (JSON can spell lone surrogates, which it cannot)."""
    return clean(text) == text


def list_shards(patterns: Sequence[str]) -> list[Shard]:
    """All shards of the given patterns, sorted by URL; see `find_shards`."""
    return find_shards(patterns).shards


def find_shards(patterns: Sequence[str]) -> Found:
    """All shards of the given patterns, and what else lies in their folders.

    A pattern is a file, a folder of .tar files, or either with {braces} or wildcards; several are
    joined by `::`, as open_clip does. Raises UsageError when one of its names matches nothing, and
    InputError for a named file that is missing: the first one, whatever would follow.
    """
    found: dict[str, FileInfo] = {}
    listing = _Listing()
    for pattern in patterns:
        for name in listing.ahead(_names(pattern)):
            matches = listing.matches(name)
            if not matches:
                raise UsageError(listing.nothing(name))
            found.update(matches)
    urls = sorted(found)
    for url in urls:
        if not encodable(url):
            raise InputError(f"shard {clean(url)} has a name that is not UTF-8: rename the file")
    _require_distinct(urls)
    names = unique_names(urls)
    shards = [Shard(url, found[url], name) for url, name in zip(urls, names, strict=True)]
    return Found(shards, listing.left_out())


def shard_at(url: str) -> Shard:
    """The shard of exactly this name: no pattern, no folder. Raises InputError when it is missing,
    StorageError when a remote one cannot be looked up.
    """
    info = _looked_up(url)
    if info is None:
        raise InputError(f"shard {clean(url)} does not exist")
    return Shard(url, info, unique_names([url])[0])


def unique_names(urls: Sequence[str]) -> list[str]:
    """What each shard is called: its base name without .tar, where no other is called so.

    Files that are derived from a shard are called like it, so no two names are equal, not even to
    file systems that ignore case or compose accents, and none is long, hidden or reserved. Where a
    base name does not do, 128 bits of the URL's hash mark it.
    """
    bases = [_stem(url) for url in urls]
    counts = Counter(map(_folded, bases))
    marked = [counts[_folded(base)] > 1 or not _fits(base) for base in bases]
    while True:
        names = [
            marked_name(base, url) if mark else base
            for base, url, mark in zip(bases, urls, marked, strict=True)
        ]
        counts = Counter(map(_folded, names))
        # a base name may be spelled like the marked name of another shard
        clashes = [i for i, name in enumerate(names) if counts[_folded(name)] > 1]
        if not clashes:
            return names
        if all(marked[i] for i in clashes):
            both = " and ".join(urls[i] for i in clashes[:2])
            raise InputError(f"shards {both} would get the same name: rename one of them")
        for i in clashes:
            marked[i] = True


def counted_by_kind(left_out: dict[str, int]) -> str:
    """A list of what was left out, for messages: `100 .json, 2 folders`; empty if nothing was."""
    return ", ".join(f"{count:,} {ending}" for ending, count in left_out.items())


def _names(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for, one at a time; itself where it exists as it is.

    Raises UsageError for what cannot be split or expanded.
    """
    for part in _parts(pattern):
        if not any(c in part for c in "{}*?["):
            yield part
            continue
        fs, path = filesystem(part)
        if not is_web(part) and fs.exists(path):
            yield part
            continue
        try:
            yield from braces.expand(part)
        except ValueError as error:
            raise UsageError(f"shards pattern {clean(part)!r}: {error}") from error


def _parts(pattern: str) -> list[str]:
    """A pattern split at `::`, but not between a file system and the one that it reads from."""
    if _JOINED.search(pattern) is None:
        return [pattern]
    if os.path.lexists(pattern):
        fs, path = filesystem(pattern)
        if isinstance(fs, LocalFileSystem) and str(path) == os.path.normpath(pattern):
            return [pattern]
        raise UsageError(
            f"{clean(pattern)} has '::' in its name, which joins patterns: rename it, or give it "
            "through a link with another name"
        )
    parts: list[str] = []
    chain = ""
    for part in _JOINED.split(pattern):
        if _reads_from_the_next(part):
            chain += f"{part}::"
            continue
        # the first one was made absolute with the whole
        parts.append(chain + (part if chain else absolute(part)))
        chain = ""
    if chain or not all(parts):
        raise UsageError(
            f"shards pattern {clean(pattern)!r} has an empty part beside '::', which joins patterns"
        )
    return parts


def _reads_from_the_next(part: str) -> bool:
    """Whether fsspec would open what follows `::` through it."""
    protocol, found, _ = part.partition("://")
    return protocol in _OF_ANOTHER if found else part in known_implementations


class _Listing:
    """Looks shards up; each folder is listed once, however many of its shards are named."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, FileInfo] | None] = {}
        self._left_out: dict[str, Counter[str]] = {}
        self._known: dict[str, FileInfo | None] = {}

    def ahead(self, names: Iterator[str]) -> Iterator[str]:
        """The same names. Those on web servers are looked up several at once, after the first one:
        if that is not there, no other one is asked for.
        """
        first = next(names, None)
        if first is None:
            return
        yield first
        if not is_web(first):
            yield from names
            return
        while batch := list(itertools.islice(names, _AHEAD)):
            places = [parted(url) for url in batch]
            self._known.clear()
            for parent in {parent for parent, _ in places}:
                own = [name for folder, name in places if folder == parent]
                # what fails is asked for again, by itself
                with suppress(StorageError):
                    infos = Folder(parent).infos(own)
                    self._known.update(zip((inside(parent, n) for n in own), infos, strict=True))
            yield from batch

    def matches(self, url: str) -> list[tuple[str, FileInfo]]:
        """The shards that a name without braces stands for. Raises InputError for a file that is
        missing.
        """
        info = self._listed(url)
        if info is not None:
            return [(url, info)]
        fs, path = filesystem(url)
        # a web server may know its folders by the slash alone
        if without_query(url)[0].endswith("/") and is_web(url):
            return self._in_folder(url)
        info = self._known.get(url) or _looked_up(url)
        if info is not None:
            return [(url, info)]
        if fs.isdir(path):
            return self._in_folder(url)
        if any(c in without_query(url)[0] for c in "*?["):
            return self._globbed(url)
        raise InputError(f"shard {clean(url)} does not exist: check --shards")

    def left_out(self) -> dict[str, int]:
        """What lies in the folders beside their shards, by ending, most first."""
        total: Counter[str] = Counter()
        for counts in self._left_out.values():
            total += counts
        return dict(sorted(total.items(), key=lambda one: (-one[1], one[0])))

    def nothing(self, name: str) -> str:
        """What to say where a name matches nothing."""
        there = self._left_out.get(name, Counter())
        held = counted_by_kind(dict(there.most_common(3)))
        if any(there[f".{ending}"] for ending in PICTURES):
            return (
                f"{clean(name)} holds no shards but pictures ({held}): `d2filter pack "
                f"{clean(name)} --shards OUT` makes shards of a folder of pictures"
            )
        if there[".parquet"] and there[".npz"]:
            return f"{clean(name)} holds no shards but metadata ({held}): give it as --metadata-dir"
        if held:
            return (
                f"{clean(name)} holds no shards ({held}): give the folder of the .tar files; "
                "`d2filter pack` makes shards of a folder of pictures"
            )
        return (
            f"no shards match {clean(name)!r}: give .tar files, a folder of them, or a quoted "
            "pattern like 'data/{00000..00099}.tar'"
        )

    def _listed(self, url: str) -> FileInfo | None:
        """A file as the listing of its folder has it; None where that does not help."""
        parent, name = parted(url)
        if not name or is_web(url):
            return None  # listings of web servers tell no sizes, and many have none
        try:
            return (self._files(parent) or {}).get(name)
        except StorageError:  # folders that may not be listed hold files that may be read
            self._folders[parent] = None
            return None

    def _in_folder(self, url: str) -> list[tuple[str, FileInfo]]:
        files = Folder(url).names() if is_web(url) else list(self._files(url) or {})
        # what a Mac adds beside a file on other disks
        files = [name for name in files if not name.startswith("._")]
        taken = [name for name in files if _is_tar(name)]
        counts = Counter(_ending(name) for name in files if not _is_tar(name))
        folders = _folders_inside(url)
        if folders:
            counts["folders"] = folders
        self._left_out[url] = counts
        infos: list[FileInfo | None]
        if is_web(url):
            infos = Folder(url).infos(taken)
        else:
            infos = [(self._files(url) or {})[name] for name in taken]
        # a link that leads nowhere is a lost shard
        return [
            (inside(url, name), info or FileInfo(name, 0, ""))
            for name, info in zip(taken, infos, strict=True)
        ]

    def _globbed(self, url: str) -> list[tuple[str, FileInfo]]:
        """Matches that are tars by name, and the tars in folders among them; all files where none
        is.
        """
        fs, path = filesystem(url)
        matched = [str(fs.unstrip_protocol(m)) if "://" in url else str(m) for m in fs.glob(path)]
        found: list[tuple[str, FileInfo]] = []
        others: list[tuple[str, FileInfo]] = []
        for address in matched:
            info = self._listed(address) or _looked_up(address)
            if info is None:
                found += self._in_folder(address)
            else:
                (found if _is_tar(info.name) else others).append((address, info))
        if not found:
            return others
        if others:
            self._left_out[url] = Counter(_ending(info.name) for _, info in others)
        return found

    def _files(self, folder: str) -> dict[str, FileInfo] | None:
        if folder not in self._folders:
            self._folders[folder] = {info.name: info for info in Folder(folder).files()}
        return self._folders[folder]


def _looked_up(url: str) -> FileInfo | None:
    """A single file; None when there is none of that name."""
    folder, name = place_of(url)
    return folder.info(name)


def _require_distinct(urls: Sequence[str]) -> None:
    known: dict[str, str] = {}
    for url in urls:
        if known.setdefault(redacted(url), url) != url:
            raise UsageError(
                f"two shards have the URL {redacted(url)} and differ only in login or query, "
                "which are not recorded: give each shard once, or under another path"
            )


def _folders_inside(url: str) -> int:
    fs, path = filesystem(url)
    try:
        entries = [e for e in fs.ls(path, detail=True) if e["type"] == "directory"]
    except (FileNotFoundError, NotADirectoryError):
        return 0  # what looked like a folder of a web server
    names = [str(entry["name"]).rstrip("/") for entry in entries]
    return sum(name != path and not name.rpartition("/")[2].startswith(".") for name in names)


def _stem(url: str) -> str:
    base = file_name(url)
    return base[: -len(".tar")] if base.lower().endswith(".tar") else base


def _is_tar(name: str) -> bool:
    return name.partition("?")[0].lower().endswith((".tar", *COMPRESSED))


def _ending(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return clean(suffix) if 1 < len(suffix) <= 9 else "without a suffix"


def _fits(base: str) -> bool:
    short = 0 < len(base.encode("utf-8", "backslashreplace")) <= _LONGEST_NAME
    return short and base[0] != "." and _folded(base) not in _RESERVED


def _folded(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def marked_name(base: str, url: str) -> str:
    """The name of a shard, with a hash of its URL at the end."""
    mark = hashlib.blake2b(clean(redacted(url)).encode(), digest_size=_MARK_DIGITS // 2).hexdigest()
    room = _LONGEST_NAME - _MARK_DIGITS - 1
    start = clean(base).encode()[:room].decode("utf-8", "ignore").lstrip(".")
    return f"{start or 'shard'}-{mark}"
