"""File systems behind a network: asked again when they fail, and checked for length (DESIGN §8).

A connection that breaks costs the range that was being read, not the file. Everything that a server
may get over is tried again for about a minute; what is left is one StorageError.
"""

from __future__ import annotations

import contextlib
import errno
import io
import random
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from fsspec.dircache import DirCache
from fsspec.utils import get_protocol

from d2filter.errors import D2FilterError, StorageError

T = TypeVar("T")

TRIES = 6
PATIENCE = 60.0  # seconds after which no other try begins
_FIRST_WAIT = 0.5  # seconds; each wait is twice the one before
RANGE = 16 << 20  # bytes asked for at once, and so what a broken connection costs
_BUFFER = 4 << 20  # bytes read ahead: small reads of footers and directories make one request

TEMPORARY = ".tmp-"
# one put makes a whole object there or none, and there are no folders to make: s3fs would make the
# bucket, of a mistyped name too
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"}

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
_OURS = (
    D2FilterError,
    TypeError,
    AttributeError,
    NameError,
    AssertionError,
    NotImplementedError,
    ImportError,
    MemoryError,
)
# botocore's, which is there for s3:// only
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
# what waiting does not change, and what to do about it
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "allow larger files",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
}
_VERBS = {"ls": "listed", "glob": "listed", "info": "looked up", "exists": "looked up"}
_jitter = random.SystemRandom()


class Broken(OSError):
    """Fewer bytes than asked for came or went: worth another try."""


def patiently(ask: Callable[[], T], where: str, done: str) -> T:
    """What `ask` returns, asked again while it fails in a way that may pass.

    where, done: for the message "WHERE could not be DONE". Raises StorageError when patience ends
    or waiting is no use, and what says that a file is not there (or there already) as it is.
    """
    began = time.monotonic()
    tries = 0
    while True:
        try:
            return ask()
        except (*_ABSENT, *_OURS):
            raise
        except Exception as error:
            tries += 1
            if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
                raise StorageError(
                    f"{where} could not be {done}, permission denied: {words(error)}; check the "
                    "credentials and what they allow, then run the same command again"
                ) from error
            if isinstance(error, OSError) and error.errno in REMEDIES:
                raise StorageError(
                    f"{where} could not be {done}: {words(error)}; {REMEDIES[error.errno]} and run "
                    "the same command again"
                ) from error
            # by chance: those that were cut off together must not come back together
            wait = _FIRST_WAIT * 2 ** (tries - 1) * _jitter.uniform(0.5, 1)
            spent = time.monotonic() - began
            if tries == TRIES or spent + wait > PATIENCE:
                raise StorageError(
                    f"{where} could not be {done} in {tries} tries over {spent:.0f} s: "
                    f"{words(error)}; see to the storage or the connection and run the same "
                    "command again"
                ) from error
        time.sleep(wait)


def words(error: BaseException) -> str:
    """The system's own words, on one line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(". ")


class Remote:
    """An fsspec file system of whose methods each is asked patiently."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        cache = getattr(fs, "dircache", None)
        if isinstance(cache, DirCache) and cache.use_listings_cache:
            # a listing from before another task published would be wrong; as an option it would
            # reach the clients of some file systems, which know none of that name
            cache.use_listings_cache = False
            cache.clear()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._fs, name)
        if not callable(found):
            return found

        def asked(*args: Any, **options: Any) -> Any:
            path = next((a for a in args if isinstance(a, str)), "")
            done = _VERBS.get(name, "reached")
            return patiently(lambda: found(*args, **options), self.where(path), done)

        return asked

    def where(self, path: str) -> str:
        """How messages call a path."""
        return str(self._fs.unstrip_protocol(path))

    # fsspec's own answer no to any error in `isdir`, s3fs's to any in `exists` of a bucket

    def exists(self, path: str) -> bool:
        """Whether a file or folder of that name is there."""
        try:
            self.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def isdir(self, path: str) -> bool:
        """Whether it is a folder."""
        try:
            return bool(self.info(path)["type"] == "directory")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def reading(
        self, path: str, size: int | None = None, version: str = ""
    ) -> contextlib.AbstractContextManager[IO[bytes]]:
        """The file for reading, seekable.

        size, version: when known from a listing; looked up otherwise. Raises FileNotFoundError at
        once, and StorageError when the file has changed at the end of reading.
        """
        if size is None:
            info = self.info(path)
            if info["type"] == "directory":
                raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
            size, version = info["size"], version_of(info)
        if size is None:  # of some web servers
            return contextlib.closing(io.BytesIO(self.cat_file(path)))
        return self._reading(path, size, version)

    @contextlib.contextmanager
    def _reading(self, path: str, size: int, version: str) -> Iterator[IO[bytes]]:
        raw = RangeReader(self, path, size, version)
        with io.BufferedReader(raw, min(_BUFFER, size + 1)) as stream:
            yield stream
        raw.require_unchanged()

    def read_small(self, path: str) -> bytes:
        """A file of a few MB at most in one request, if there is no more of it: not checked for
        length. Raises FileNotFoundError.
        """

        def ask() -> bytes:
            try:
                content: bytes = self._fs.cat_file(path, start=0, end=RANGE)
            except OSError as error:
                # S3 knows no range of an empty file
                if error.errno == errno.EINVAL and self._fs.info(path)["size"] == 0:
                    return b""
                raise
            return content

        content = patiently(ask, self.where(path), "read")
        if len(content) < RANGE:
            return content
        with self.reading(path) as stream:
            return stream.read()

    def put(self, source: Path, path: str) -> None:
        """Upload a local file: `path` is the whole file afterwards, or what it was before."""
        size = source.stat().st_size
        parent, _, name = path.rpartition("/")
        in_one = self._is_object_store(path)

        def ask() -> None:
            target = path if in_one else f"{parent}/{TEMPORARY}{uuid.uuid4().hex}-{name}"
            if not in_one:
                self._fs.makedirs(parent, exist_ok=True)
            try:
                self._fs.put_file(str(source), target)
                self._check_put(target, size)
                if target != path:
                    self._move(target, path)
            except BaseException:
                if target != path:
                    with contextlib.suppress(Exception):
                        self._fs.rm_file(target)
                raise

        try:
            patiently(ask, self.where(path), "written")
        except FileNotFoundError as error:
            raise StorageError(
                f"{self.where(path)} could not be written: {words(error)}; make the bucket or "
                "folder, or correct its name"
            ) from error

    def _check_put(self, path: str, size: int) -> None:
        try:
            arrived = self._fs.info(path)["size"]
        except FileNotFoundError as error:
            raise Broken(f"nothing arrived of {size} bytes") from error
        if arrived is not None and arrived != size:
            # nobody must take it for whole
            self._fs.rm_file(path)
            raise Broken(f"{arrived} of {size} bytes arrived")

    def _move(self, source: str, path: str) -> None:
        fs = self._fs
        if _is_pattern(path):
            fs.cp_file(source, path)
            fs.rm_file(source)
            return
        try:
            fs.mv(source, path)
        except OSError as error:
            # some file systems put nothing in the place of what is there, and few say so
            if error.errno not in (None, errno.EEXIST, errno.EIO) or not fs.exists(path):
                raise
            fs.rm_file(path)
            fs.mv(source, path)

    def remove(self, path: str) -> None:
        """Remove a file or a folder with all that is in it; missing is fine."""
        fs, in_one = self._fs, self._is_object_store(path)

        def ask() -> None:
            files = fs.find(path)
            try:
                if _is_pattern(path) or (in_one and len(files) == 1):
                    for file in files:
                        fs.rm_file(file)
                elif files or not in_one:
                    fs.rm(files if in_one else path, recursive=not in_one)
            except FileNotFoundError:
                return
            # s3fs passes over single files that the server would not remove
            if len(files) > 1 and fs.find(path):
                raise OSError("some of its files are still there")

        patiently(ask, self.where(path), "removed")

    def _is_object_store(self, path: str) -> bool:
        return get_protocol(self.where(path)) in _OBJECT_STORES


def _is_pattern(path: str) -> bool:
    """Whether fsspec would take a name for a pattern, and move or remove whatever matches."""
    return any(c in path for c in "*?[")


class RangeReader(io.RawIOBase):
    """A file read by ranges, each asked for again until it is whole."""

    def __init__(self, fs: Remote, path: str, size: int, version: str) -> None:
        self.size = size
        self._fs = fs
        self._path = path
        self._version = version
        self._at = 0
        self._ranges = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes before the place that is read next."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read on at `offset` from the begin, here or the end."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "negative seek position")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        """Fill some of the buffer; 0 only at the end. Raises StorageError."""
        view = memoryview(buffer).cast("B")
        end = min(self._at + min(len(view), RANGE), self.size)
        if end <= self._at:
            return 0
        data = self._fetch(self._at, end)
        view[: len(data)] = data
        self._at = end
        return len(data)

    def readall(self) -> bytes:
        """The rest of the file. Raises StorageError."""
        begin = min(self._at, self.size)
        parts = [
            self._fetch(start, min(start + RANGE, self.size))
            for start in range(begin, self.size, RANGE)
        ]
        self._at = max(self._at, self.size)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def require_unchanged(self) -> None:
        """Raise StorageError when the file is another than when it was opened.

        What came in one range is of one file; a file that grew has been found out by its last.
        """
        if self._ranges > 1 and self._version:
            now = version_of(self._fs.info(self._path))
            if now != self._version:
                raise self._changed()

    def _fetch(self, start: int, end: int) -> Any:
        self._ranges += 1
        fs, where = self._fs._fs, self._fs.where(self._path)

        def ask() -> Any:
            # one byte more than there should be tells of a file that grew
            beyond = end == self.size
            try:
                data = fs.cat_file(self._path, start=start, end=end + beyond)
            except OSError as error:
                if error.errno == errno.EINVAL:  # S3 of a range beyond the end
                    self._require_size(fs)
                raise
            if len(data) == self.size and end - start < self.size:
                return memoryview(data)[start:end]  # a server that knows no ranges
            if len(data) != end - start:
                self._require_size(fs)
                raise Broken(f"{len(data)} of {end - start} bytes at {start} arrived")
            return data

        try:
            return patiently(ask, where, "read")
        except FileNotFoundError as error:
            raise StorageError(f"{where} was removed while it was read") from error

    def _require_size(self, fs: Any) -> None:
        if fs.info(self._path)["size"] not in (self.size, None):
            raise self._changed()

    def _changed(self) -> StorageError:
        return StorageError(
            f"{self._fs.where(self._path)} was changed while it was read: leave the files alone "
            "and run the same command again"
        )


def version_of(entry: dict[str, Any]) -> str:
    """What a listing tells of a file's content or time, whichever the file system knows."""
    stamp = entry.get("ETag") or entry.get("mtime") or entry.get("LastModified")
    return str(stamp or "")
