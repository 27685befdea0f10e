"""Folders on a local path or any fsspec URL, and files that appear whole or not at all.

A local file is written beside its final name, fsynced and renamed. An object store gets the whole
file in one put, which it publishes atomically. `remote` handles network failures.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from d2filter.errors import InputError, LockedError, StorageError
from d2filter.formats import addresses
from d2filter.formats.addresses import absolute as absolute
from d2filter.formats.addresses import filesystem as filesystem
from d2filter.formats.addresses import inside
from d2filter.formats.remote import TEMPORARY, Remote, version_of
from d2filter.formats.retry import REMEDIES
from d2filter.text import printable, redacted

Checksums = dict[str, list[int | str]]
"""[size, blake2b-128 in hex] by file name"""

LOCK = "lock.json"

_READERS = 16
_BLOCK = 1 << 20
_OWNED = re.compile(rf"{re.escape(TEMPORARY)}([0-9a-f]{{12}})-")
_REPLACED_SECONDS = 1.0  # a remote lock may be away while it is replaced
_FORGOTTEN_SECONDS = 3600.0  # a temporary file of no owner, unchanged for as long, is a leftover


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Name, size and version of a file, to detect changes."""

    name: str
    size: int
    version: str
    """modification time or etag, whichever the file system knows, else a sum of the content"""


@dataclass(frozen=True, slots=True)
class Owner:
    """The right to write below a run directory, while its lock holds this token (see `lock`)."""

    url: str
    token: str
    holds: bool = True
    """False: it has not got the lock yet, and only marks its temporary files"""

    def check(self) -> None:
        """Raise LockedError when another command has taken the run directory over."""
        if not self.holds:
            return
        folder = Folder(self.url)
        held = folder.read_json(LOCK)
        if held is None and folder.local is None:
            # some file systems replace a file by removing it first
            time.sleep(_REPLACED_SECONDS)
            held = folder.read_json(LOCK)
        if not isinstance(held, dict) or held.get("token") != self.token:
            raise LockedError(
                f"{self.url} was taken over by another command: this one stops, and the files "
                "that it has written stay"
            )

    @property
    def mark(self) -> str:
        """The start of the names of this owner's temporary files."""
        return f"{TEMPORARY}{self.token[:12]}-"


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory by URL. Picklable; opens nothing on construction."""

    url: str
    owner: Owner | None = field(default=None, compare=False, repr=False)
    """owner whose lock is checked before anything is published or removed; None: no check"""

    @property
    def local(self) -> Path | None:
        """The path when the folder is on this machine's file system, else None."""
        if addresses.is_local(self.url):
            return Path(filesystem(self.url)[1])
        return None

    def sub(self, name: str) -> Folder:
        """A folder inside this one."""
        return Folder(inside(self.url, name), self.owner)

    def owned_by(self, owner: Owner) -> Folder:
        """The same folder, for writing as this owner."""
        return Folder(self.url, owner)

    def _check_owner(self) -> None:
        if self.owner is not None:
            self.owner.check()

    def where(self, name: str) -> str:
        """The name of a file of this folder for messages, without passwords."""
        return redacted(inside(self.url, name))

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        fs, root = filesystem(self.url)
        return bool(fs.exists(inside(root, name)))

    def names(self, suffix: str = "") -> list[str]:
        """Names of the files directly inside, sorted; temporary and hidden ones are left out."""
        return sorted(name for name, _ in self._listed(suffix))

    def files(self, suffix: str = "") -> list[FileInfo]:
        """Files directly inside that end in `suffix`, sorted by name. Values that the listing lacks
        are looked up file by file.
        """
        fs, root = filesystem(self.url)

        def known(found: tuple[str, dict[str, Any]]) -> FileInfo:
            name, entry = found
            size, version = entry["size"], version_of(entry)
            if isinstance(fs, Remote) and (size is None or not version):
                # a link that leads nowhere is listed too: leaving it out would lose what it names
                with suppress(FileNotFoundError, IsADirectoryError):
                    size, version = fs.known(inside(root, name))
            return FileInfo(name, int(size or 0), version)

        with ThreadPoolExecutor(_READERS) as pool:
            return sorted(pool.map(known, self._listed(suffix)), key=lambda info: info.name)

    def info(self, name: str) -> FileInfo | None:
        """One file, looked up without listing its folder; None if there is no such file. A query of
        its URL is not part of its name.
        """
        fs, root = filesystem(self.url)
        path = inside(root, name)
        try:
            entry = fs.info(path)
            if entry["type"] == "directory":
                return None
            size, version = entry["size"], version_of(entry)
            if isinstance(fs, Remote) and (size is None or not version):
                size, version = fs.known(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        plain = addresses.file_name(path) if addresses.is_web(path) else name
        return FileInfo(plain, int(size or 0), version)

    def infos(self, names: Sequence[str]) -> list[FileInfo | None]:
        """The same for many files, several at once."""
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self.info, names))

    def _listed(self, suffix: str) -> list[tuple[str, dict[str, Any]]]:
        fs, root = filesystem(self.url)
        try:
            entries = fs.ls(root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = []
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["type"] != "directory" and name.endswith(suffix) and name[0] != ".":
                found.append((name, entry))
        return found

    @contextmanager
    def reading(self, name: str, info: FileInfo | None = None) -> Iterator[IO[bytes]]:
        """The file opened for binary reading, seekable.

        info: of a listing; spares a remote file's being looked up, and it must not have changed
        since. Raises InputError when the file is missing, StorageError when a remote one stays out
        of reach or changes while it is open.
        """
        with self._reported(name):
            opened = self._open(name, info)
        with opened as stream:
            yield stream

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{self.where(name)} does not exist") from error
        except IsADirectoryError as error:
            raise InputError(f"{self.where(name)} is a folder: give a file") from error
        except PermissionError as error:
            raise InputError(f"{self.where(name)} cannot be read: permission denied") from error

    def _open(self, name: str, info: FileInfo | None = None) -> AbstractContextManager[IO[bytes]]:
        target = self.local
        if target is not None:
            return (target / name).open("rb")
        fs, root = filesystem(self.url)
        remote: AbstractContextManager[IO[bytes]] = fs.reading(inside(root, name), *_known(info))
        return remote

    @contextmanager
    def fetched(self, name: str, info: FileInfo | None = None) -> Iterator[IO[bytes]]:
        """The same file, a remote one copied whole to a local disk first: for reading here and
        there. Raises StorageError when TMPDIR has no room for it.
        """
        if self.local is not None:
            with self.reading(name, info) as stream:
                yield stream
            return
        fs, root = filesystem(self.url)
        where = f"the copy of {self.where(name)} in {tempfile.gettempdir()}"
        with tempfile.TemporaryFile(prefix="d2filter-") as copy:
            with self._reported(name), writing(where):
                fs.fetch(inside(root, name), copy, *_known(info))
            yield copy

    def read_json(self, name: str) -> Any:
        """Parsed JSON, or None when the file is missing. Raises InputError when it is no JSON."""
        fs, root = filesystem(self.url)
        try:
            if isinstance(fs, Remote):
                with suppress(ValueError):
                    return json.loads(fs.read_small(inside(root, name)))
            # what is no JSON may have been cut off; this is checked for length
            with self._open(name) as stream:
                content = stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            raise InputError(f"{self.where(name)} cannot be read: permission denied") from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise InputError(f"{self.where(name)} is not valid JSON: {error}") from error

    def folders(self) -> list[str]:
        """Names of the folders directly inside, sorted; hidden ones are left out."""
        fs, root = filesystem(self.url)
        try:
            entries = fs.ls(root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (
            e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory"
        )
        return sorted(name for name in names if name[0] != ".")

    @contextmanager
    def publish(self, name: str, checksums: Checksums | None = None) -> Iterator[Path]:
        """A local temporary path to write; on success it becomes the file `name`, whole.

        checksums: gets [size, blake2b-128] of the file under its name. On any exception nothing
        appears under the final name and the temporary file is removed.
        """
        target = self.local
        if target is not None:
            final = target / name
            temporary = final.parent / _temporary(final.name, self.owner)
            try:
                with writing(self.where(name), temporary):
                    final.parent.mkdir(parents=True, exist_ok=True)
                    yield temporary
                    _note(checksums, name, temporary)
                    _fsync(temporary)
                    self._check_owner()
                    os.replace(temporary, final)
                    _fsync(final.parent)
            finally:
                # what cannot be removed now is a leftover for the next run
                with suppress(OSError):
                    temporary.unlink()
            return
        fs, root = filesystem(self.url)
        with tempfile.TemporaryDirectory(prefix="d2filter-") as scratch:
            temporary = Path(scratch) / _temporary(name)
            with writing(f"{self.where(name)}, in {tempfile.gettempdir()} for now,", temporary):
                yield temporary
                _note(checksums, name, temporary)
            self._check_owner()
            fs.put(temporary, inside(root, name))

    def publish_json(self, name: str, value: Any) -> None:
        """Publish `value` as indented JSON, keys in the given order. Control characters are
        escaped. URLs are not redacted here, because a class name may look like one; the caller
        redacts them.
        """
        text = json.dumps(value, indent=2, ensure_ascii=False)
        with self.publish(name) as path:
            path.write_text(printable(text, lines=True) + "\n", "utf-8")

    def append(self, name: str, text: str) -> None:
        """Add text to the end of a file, which is created if missing. For logs: the file is not
        fsynced. In an object store the whole file is written again, so only one process may write
        to it at a time.
        """
        content = text.encode("utf-8", "backslashreplace")
        target = self.local
        if target is not None:
            path = target / name
            with writing(self.where(name), path):
                path.parent.mkdir(parents=True, exist_ok=True)
                # unbuffered and O_APPEND: lines of several processes do not mix
                with path.open("ab", buffering=0) as stream:
                    stream.write(content)
            return
        fs, root = filesystem(self.url)
        with suppress(FileNotFoundError):  # it begins here
            content = fs.read_small(inside(root, name)) + content
        with self.publish(name) as path:
            path.write_bytes(content)

    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; missing is fine."""
        self._check_owner()
        target = self.local
        if target is not None:
            path = target / name
            with writing(self.where(name), done="removed"):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            return
        fs, root = filesystem(self.url)
        fs.remove(inside(root, name))


def checksum(folder: Folder, name: str) -> list[int | str]:
    """[size, blake2b-128 in hex] of a file, reread. Raises InputError when it is missing."""
    with folder.reading(name) as stream:
        return _checksum(stream)


def read_jsons(folder: Folder, names: Sequence[str]) -> dict[str, Any]:
    """Several JSON files of a folder, without missing ones. They are read in parallel, because an
    object store answers many requests as fast as one.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        found = zip(names, pool.map(folder.read_json, names), strict=True)
        return {name: value for name, value in found if value is not None}


def remove_leftovers(folder: Folder, name: str, *, own: bool = False) -> None:
    """Remove temporary files of writers that were killed, below a local folder.

    Files of earlier owners are removed, because these owners are dead. Files of the folder's own
    owner are removed only with `own`: when none of its tasks runs any more. Other files (such as a
    report that is being written) are removed if they are unchanged for an hour.
    """
    root = folder.local
    if root is None or not (root / name).is_dir():
        return
    for path in (root / name).rglob(f"{TEMPORARY}*"):
        if _is_leftover(path, folder.owner, own):
            path.unlink(missing_ok=True)


def _is_leftover(path: Path, owner: Owner | None, own: bool) -> bool:
    if owner is not None and _OWNED.match(path.name):
        return own or not path.name.startswith(owner.mark)
    try:
        return time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS
    except FileNotFoundError:
        return False  # published meanwhile


def is_within(inner: Folder, outer: Folder) -> bool:
    """Whether a folder is another one or lies in it, links followed."""
    one, other = inner.local, outer.local
    if one is not None and other is not None:
        return one.resolve().is_relative_to(other.resolve())
    return f"{inner.url.rstrip('/')}/".startswith(f"{outer.url.rstrip('/')}/")


def place_of(url: str) -> tuple[Folder, str]:
    """The folder that a file lies in, and its name there: with its query, if it has one."""
    parent, name = addresses.parted(url)
    return Folder(parent), name


@contextmanager
def writing(where: str, path: Path | None = None, done: str = "written") -> Iterator[None]:
    """Turn the system's errors about full disks and the like into StorageError. where: the name for
    the message. path: the file that is written; errors of other files are not changed.
    """
    try:
        yield
    except OSError as error:
        reason = _failed_write(error, path)
        place = error.filename
        beside = (
            path is not None
            and isinstance(place, str | bytes)
            and Path(os.fsdecode(place)) not in (path, *path.parents)
        )
        if reason.errno not in REMEDIES or beside:
            raise
        raise StorageError(
            f"{where} could not be {done}: {os.strerror(reason.errno)}; {REMEDIES[reason.errno]} "
            "and run the same command again"
        ) from error


def _failed_write(error: OSError, path: Path | None) -> OSError:
    """The same error with the system's reason, which numpy does not tell."""
    if error.errno is None and path is not None and re.search(r"requested and \d+ wri", str(error)):
        try:
            with path.open("ab") as stream:
                stream.write(bytes(_BLOCK))
        except OSError as reason:
            return reason
    return error


def _known(info: FileInfo | None) -> tuple[int, str] | tuple[()]:
    return (info.size, info.version) if info is not None else ()


def _temporary(name: str, owner: Owner | None = None) -> str:
    mark = TEMPORARY if owner is None else owner.mark
    return f"{mark}{uuid.uuid4().hex}{addresses.temporary_suffix(name)}"


def _note(checksums: Checksums | None, name: str, path: Path) -> None:
    if checksums is not None:
        with path.open("rb") as stream:
            checksums[name] = _checksum(stream)


def _checksum(stream: IO[bytes]) -> list[int | str]:
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    while block := stream.read(_BLOCK):
        digest.update(block)
        size += len(block)
    return [size, digest.hexdigest()]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
