"""Folders on a local path or any fsspec URL, and files that appear whole or not at all.

Local: written beside the final name, fsynced, renamed. Object stores: uploaded in one put, which
those publish atomically; whoever reads waits for the marker that is written last.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.utils import get_protocol

from d2filter.errors import DependencyError, InputError, UsageError

_TEMPORARY = ".tmp-"


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
                stamp = entry.get("ETag") or entry.get("mtime") or entry.get("LastModified")
                found.append(FileInfo(name, int(entry["size"] or 0), str(stamp or "")))
        return sorted(found, key=lambda info: info.name)

    @contextmanager
    def reading(self, name: str) -> Iterator[IO[bytes]]:
        """The file opened for binary reading, seekable. Raises InputError when it is missing."""
        fs, root = filesystem(self.url)
        try:
            stream = fs.open(f"{root}/{name}", "rb")
        except FileNotFoundError as error:
            raise InputError(f"{self.where(name)} does not exist") from error
        except PermissionError as error:
            raise InputError(f"{self.where(name)} cannot be read: permission denied") from error
        with stream:
            yield stream

    def read_json(self, name: str) -> Any:
        """Parsed JSON, or None when the file is missing. Raises InputError when it is no JSON."""
        if not self.exists(name):
            return None
        with self.reading(name) as stream:
            try:
                return json.load(stream)
            except ValueError as error:
                raise InputError(f"{self.where(name)} is not valid JSON: {error}") from error

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """A local temporary path to write; on success it becomes the file `name`, whole.

        On any exception nothing appears under the final name and the temporary file is removed.
        """
        target = self.local
        if target is not None:
            final = target / name
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = final.parent / f"{_TEMPORARY}{uuid.uuid4().hex}-{final.name}"
            try:
                yield temporary
                _fsync(temporary)
                os.replace(temporary, final)
                _fsync(final.parent)
            finally:
                temporary.unlink(missing_ok=True)
            return
        fs, root = filesystem(self.url)
        with tempfile.TemporaryDirectory(prefix="d2filter-") as scratch:
            temporary = Path(scratch) / Path(name).name
            yield temporary
            remote = f"{root}/{name}"
            fs.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
            fs.put_file(str(temporary), remote)

    def publish_json(self, name: str, value: Any) -> None:
        """Publish `value` as indented JSON, keys in the order given."""
        with self.publish(name) as path:
            path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; missing is fine."""
        target = self.local
        if target is not None:
            path = target / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        fs, root = filesystem(self.url)
        if fs.exists(f"{root}/{name}"):
            fs.rm(f"{root}/{name}", recursive=True)


def remove_leftovers(folder: Folder, name: str) -> None:
    """Remove temporary files below a local folder: those of writers that were killed."""
    root = folder.local
    if root is not None and (root / name).is_dir():
        for path in (root / name).rglob(f"{_TEMPORARY}*"):
            path.unlink(missing_ok=True)


def absolute(url: str) -> str:
    """A local path made absolute, `~` expanded, for workers elsewhere; URLs as they are."""
    if "://" in url:
        return url
    return str(Path(url).expanduser().absolute()) if url else url


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path inside it, without a trailing slash.

    Raises DependencyError when its package is missing and UsageError for an unknown protocol.
    """
    try:
        # a listing from before another task published would be wrong
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = " (pip install 'd2filter[s3]')" if url.startswith("s3") else ""
        raise DependencyError(f"{url} needs a package that is missing{extra}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{url} is no usable location: {error}") from error
    return fs, str(path).rstrip("/") or "/"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
