"""Folders on a local path or any fsspec URL, and files that appear whole or not at all.

Local: written beside the final name, fsynced, renamed. Object stores: uploaded in one put, which
those publish atomically; whoever reads waits for the marker that is written last. How the network
is borne with is in `remote`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from d2filter.errors import DependencyError, InputError, StorageError, UsageError
from d2filter.formats.remote import RANGE, REMEDIES, TEMPORARY, Remote, version_of

Checksums = dict[str, list[int | str]]
"""[size, blake2b-128 in hex] by file name"""

_READERS = 16
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What tells whether a file changed."""

    name: str
    size: int
    version: str
    """modification time or etag, whichever the file system knows"""


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory by URL. Picklable; opens nothing on construction."""

    url: str

    @property
    def local(self) -> Path | None:
        """The path when the folder is on this machine's file system, else None."""
        if get_protocol(self.url) in ("file", "local"):
            return Path(filesystem(self.url)[1])
        return None

    def sub(self, name: str) -> Folder:
        """A folder inside this one."""
        return Folder(f"{self.url.rstrip('/')}/{name}")

    def where(self, name: str) -> str:
        """How messages call a file of this folder."""
        return f"{self.url.rstrip('/')}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        fs, root = filesystem(self.url)
        return bool(fs.exists(f"{root}/{name}" if name else root))

    def names(self, suffix: str = "") -> list[str]:
        """Names of the files directly inside, sorted; temporary and hidden ones are left out."""
        return [info.name for info in self.files(suffix)]

    def files(self, suffix: str = "") -> list[FileInfo]:
        """Files directly inside that end in `suffix`, sorted by name."""
        fs, root = filesystem(self.url)
        try:
            entries = fs.ls(root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = []
        for entry in entries:
            name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
            # links that lead nowhere are listed too: leaving them out would lose what they name
            if entry["type"] != "directory" and name.endswith(suffix) and name[0] != ".":
                found.append(FileInfo(name, int(entry["size"] or 0), version_of(entry)))
        return sorted(found, key=lambda info: info.name)

    @contextmanager
    def reading(self, name: str, info: FileInfo | None = None) -> Iterator[IO[bytes]]:
        """The file opened for binary reading, seekable.

        info: of a listing; spares a remote file's being looked up, and it must not have changed
        since. Raises InputError when the file is missing, StorageError when a remote one stays out
        of reach or changes while it is open.
        """
        try:
            opened = self._open(name, info)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{self.where(name)} does not exist") from error
        except IsADirectoryError as error:
            raise InputError(f"{self.where(name)} is a folder, needed is a file") from error
        except PermissionError as error:
            raise InputError(f"{self.where(name)} cannot be read: permission denied") from error
        with opened as stream:
            yield stream

    def _open(self, name: str, info: FileInfo | None = None) -> AbstractContextManager[IO[bytes]]:
        target = self.local
        if target is not None:
            return (target / name).open("rb")
        fs, root = filesystem(self.url)
        known = (info.size, info.version) if info is not None else ()
        remote: AbstractContextManager[IO[bytes]] = fs.reading(f"{root}/{name}", *known)
        return remote

    @contextmanager
    def fetched(self, name: str, info: FileInfo | None = None) -> Iterator[IO[bytes]]:
        """The same file, a remote one copied whole to a local disk first: for reading here and
        there. Raises StorageError when TMPDIR has no room for it.
        """
        with self.reading(name, info) as stream:
            if self.local is not None:
                yield stream
                return
            with tempfile.TemporaryFile(prefix="d2filter-") as copy:
                with writing(f"the copy of {self.where(name)} in {tempfile.gettempdir()}"):
                    shutil.copyfileobj(stream, copy, RANGE)
                    copy.seek(0)
                stream.close()
                yield copy

    def read_json(self, name: str) -> Any:
        """Parsed JSON, or None when the file is missing. Raises InputError when it is no JSON."""
        fs, root = filesystem(self.url)
        try:
            if isinstance(fs, Remote):
                with suppress(ValueError):
                    return json.loads(fs.read_small(f"{root}/{name}"))
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
            temporary = final.parent / f"{TEMPORARY}{uuid.uuid4().hex}-{final.name}"
            try:
                with writing(self.where(name), temporary):
                    final.parent.mkdir(parents=True, exist_ok=True)
                    yield temporary
                    _note(checksums, name, temporary)
                    _fsync(temporary)
                    os.replace(temporary, final)
                    _fsync(final.parent)
            finally:
                # what cannot be removed now is a leftover for the next run
                with suppress(OSError):
                    temporary.unlink()
            return
        fs, root = filesystem(self.url)
        with tempfile.TemporaryDirectory(prefix="d2filter-") as scratch:
            temporary = Path(scratch) / Path(name).name
            with writing(f"{self.where(name)}, in {tempfile.gettempdir()} for now,", temporary):
                yield temporary
                _note(checksums, name, temporary)
            fs.put(temporary, f"{root}/{name}")

    def publish_json(self, name: str, value: Any) -> None:
        """Publish `value` as indented JSON, keys in the order given."""
        with self.publish(name) as path:
            path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def append(self, name: str, text: str) -> None:
        """Add text to the end of a file, which begins if there is none.

        For logs: it is not fsynced, and elsewhere than on a local disk the file is written anew,
        so that only one may write to it at a time.
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
            content = fs.read_small(f"{root}/{name}") + content
        with self.publish(name) as path:
            path.write_bytes(content)

    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; missing is fine."""
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
        fs.remove(f"{root}/{name}")


def checksum(folder: Folder, name: str) -> list[int | str]:
    """[size, blake2b-128 in hex] of a file, reread. Raises InputError when it is missing."""
    with folder.reading(name) as stream:
        return _checksum(stream)


def read_jsons(folder: Folder, names: Sequence[str]) -> dict[str, Any]:
    """Several JSON files of a folder at once, without those that are missing: an object store
    answers one request as fast as many.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        found = zip(names, pool.map(folder.read_json, names), strict=True)
        return {name: value for name, value in found if value is not None}


def remove_leftovers(folder: Folder, name: str) -> None:
    """Remove temporary files below a local folder: those of writers that were killed."""
    root = folder.local
    if root is not None and (root / name).is_dir():
        for path in (root / name).rglob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)


def absolute(url: str) -> str:
    """A local path made absolute, `~` expanded, for workers elsewhere; URLs as they are."""
    if "://" in url:
        return url
    return str(Path(url).expanduser().absolute()) if url else url


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path inside it, without a trailing slash: fsspec's own for
    local paths, else one that is asked patiently.

    Raises DependencyError when its package is missing and UsageError for an unknown protocol.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = " (pip install 'd2filter[s3]')" if url.startswith("s3") else ""
        raise DependencyError(f"{url} needs a package that is missing{extra}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{url} is no usable location: {error}") from error
    if not isinstance(fs, LocalFileSystem):
        fs = Remote(fs)
    return fs, str(path).rstrip("/") or "/"


@contextmanager
def writing(where: str, path: Path | None = None, done: str = "written") -> Iterator[None]:
    """What the system says of a full disk and the like becomes a StorageError.

    where: how the message calls it. path: what is written; errors of other files are left alone.
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
