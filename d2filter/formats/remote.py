"""File systems behind a network: operations are retried, and files are checked for length.

A broken connection costs the range that was being read, not the whole file. `retry.patiently`
decides how long an operation is retried.

See docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from fsspec.dircache import DirCache
from fsspec.utils import get_protocol

from d2filter.errors import StorageError, UsageError
from d2filter.formats.retry import Broken, NoRangesError, patiently, words
from d2filter.text import redacted

RANGE = 16 << 20  # bytes of one request, and so what a broken connection costs
BUFFER = 4 << 20  # bytes read ahead: small reads of footers and directories make one request

BEYOND_END = errno.EINVAL  # what S3's client raises for a range that begins there
TEMPORARY = ".tmp-"
# one put makes a whole object there or none, and there are no folders to make: s3fs would make the
# bucket, of a mistyped name too
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"}
_READ_ONLY = {"http", "https"}
# what file systems tell of a file's content or time, the first that is there
_STAMPS = (
    *("ETag", "etag", "mtime", "LastModified", "Last-Modified", "last_modified", "modified"),
    *("Content-MD5", "Digest", "checksum", "sha", "blob_id", "CRC", "modify", "last_write_time"),
    "created",
)
_OF_CONTENT = "blake2b:"  # begins a version that is a sum of the content
_VERBS = {"ls": "listed", "glob": "listed", "info": "looked up", "exists": "looked up"}


class Remote:
    """An fsspec file system whose methods are retried."""

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

        def retried(*args: Any, **options: Any) -> Any:
            path = next((a for a in args if isinstance(a, str)), "")
            done = _VERBS.get(name, "reached")
            return patiently(lambda: found(*args, **options), self.where(path), done)

        return retried

    def where(self, path: str) -> str:
        """How messages call a path."""
        return redacted(str(self._fs.unstrip_protocol(path)))

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

    def known(self, path: str) -> tuple[int, str]:
        """Size and version of a file. If its storage gives none, the file is read: the version is
        then a hash of its content. Raises FileNotFoundError.
        """
        size, version = self._looked_up(path)
        if size is not None and version:
            return int(size), version
        digest = hashlib.blake2b(digest_size=16)
        with self._copied(path) as copy:
            while block := copy.read(BUFFER):
                digest.update(block)
            return copy.tell(), version or f"{_OF_CONTENT}{digest.hexdigest()}"

    def reading(
        self, path: str, size: int | None = None, version: str = ""
    ) -> contextlib.AbstractContextManager[IO[bytes]]:
        """The file for reading, seekable.

        size, version: when known from a listing; looked up otherwise. Raises FileNotFoundError at
        once, and StorageError when the file has changed at the end of reading.
        """
        if size is None:
            size, version = self._looked_up(path)
        if size is None:  # of some web servers
            return self._copied(path)
        return self._reading(path, int(size), version)

    def fetch(
        self, path: str, target: IO[bytes], size: int | None = None, version: str = ""
    ) -> None:
        """Write the file to an empty local one, in ranges if the server supports them, and seek to
        its start. Raises like `reading`.
        """
        if size is None:
            size, version = self._looked_up(path)
        if size is None:
            self._copy(path, target)
            return
        raw = RangeReader(self, path, size, version, only_ranges=True)
        try:
            shutil.copyfileobj(raw, target, RANGE)
        except NoRangesError:
            self._copy(path, target, size)
            return
        raw.require_unchanged()
        target.seek(0)

    def _looked_up(self, path: str) -> tuple[int | None, str]:
        info = self.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
        return info["size"], version_of(info)

    @contextlib.contextmanager
    def _reading(self, path: str, size: int, version: str) -> Iterator[IO[bytes]]:
        raw = RangeReader(self, path, size, version)
        with io.BufferedReader(raw, min(BUFFER, size + 1)) as stream:
            yield stream
        raw.require_unchanged()

    @contextlib.contextmanager
    def _copied(self, path: str, size: int | None = None) -> Iterator[IO[bytes]]:
        """A copy in TMPDIR that goes when it is closed. size: that it must have."""
        with tempfile.TemporaryFile(prefix="d2filter-") as copy:
            self._copy(path, copy, size)
            yield copy

    def _copy(self, path: str, target: IO[bytes], size: int | None = None) -> None:
        """Write a file to an empty local one, in one request, and go to its begin. Raises
        StorageError when it has another size than expected.
        """

        def ask() -> None:
            target.seek(0)
            target.truncate()
            if hasattr(self._fs, "copy_whole"):
                self._fs.copy_whole(path, target)
            else:
                with self._fs.open(path, "rb") as stream:
                    shutil.copyfileobj(stream, target, BUFFER)
            if size is not None and target.tell() != size:
                if self._fs.info(path)["size"] not in (size, None):
                    raise _changed(self.where(path))
                raise Broken(f"{target.tell()} of {size} bytes arrived")

        patiently(ask, self.where(path), "read")
        target.seek(0)

    def read_small(self, path: str) -> bytes:
        """A file of a few MB at most, in one request and without a check of its length. Raises
        FileNotFoundError.
        """

        def ask() -> bytes:
            try:
                content: bytes = self._fs.cat_file(path, start=0, end=RANGE)
            except OSError as error:
                # S3 knows no range of an empty file
                if error.errno == BEYOND_END and self._fs.info(path)["size"] == 0:
                    return b""
                raise
            return content

        with contextlib.suppress(NoRangesError):
            content = patiently(ask, self.where(path), "read")
            if len(content) < RANGE:
                return content
        with self.reading(path) as stream:
            return stream.read()

    def put(self, source: Path, path: str) -> None:
        """Upload a local file: `path` is the whole file afterwards, or what it was before."""
        self._require_writable(path)
        size = source.stat().st_size
        parent = path.rpartition("/")[0]
        in_one = self._is_object_store(path)

        def ask() -> None:
            # not called like the file: names have a greatest length
            target = path if in_one else f"{parent}/{TEMPORARY}{uuid.uuid4().hex}"
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
        self._require_writable(path)
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

    def _require_writable(self, path: str) -> None:
        if get_protocol(self.where(path)) in _READ_ONLY:
            raise UsageError(
                f"{self.where(path)} cannot be written: web servers are only read; give a local "
                "path or an object store"
            )

    def _is_object_store(self, path: str) -> bool:
        return get_protocol(self.where(path)) in _OBJECT_STORES


def _is_pattern(path: str) -> bool:
    """Whether fsspec would take a name for a pattern, and move or remove whatever matches."""
    return any(c in path for c in "*?[")


class RangeReader(io.RawIOBase):
    """A file read in ranges, each of which is retried until it is complete."""

    def __init__(
        self, fs: Remote, path: str, size: int, version: str, *, only_ranges: bool = False
    ) -> None:
        """only_ranges: NoRangesError is raised where it comes to that, instead of a copy."""
        self.size = size
        self._only_ranges = only_ranges
        self._fs = fs
        self._path = path
        self._version = version
        self._at = 0
        self._ranges = 0
        self._whole: IO[bytes] | None = None
        """a copy, where the server knows no ranges"""
        self._held = contextlib.ExitStack()

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
        # a sum of the content is not made again: its reader would have had to wait for it
        if self._ranges > 1 and self._version and not self._version.startswith(_OF_CONTENT):
            now = version_of(self._fs.info(self._path))
            if now != self._version:
                raise _changed(self._fs.where(self._path))

    def close(self) -> None:
        """Remove the copy, if there is one."""
        self._held.close()
        super().close()

    def _fetch(self, start: int, end: int) -> Any:
        if self._whole is not None:
            self._whole.seek(start)
            return self._whole.read(end - start)
        self._ranges += 1
        fs, where = self._fs._fs, self._fs.where(self._path)

        def ask() -> Any:
            # one byte more than there should be tells of a file that grew
            beyond = end == self.size
            try:
                data = fs.cat_file(self._path, start=start, end=end + beyond)
            except OSError as error:
                if error.errno == BEYOND_END:
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
        except NoRangesError:
            if self._only_ranges:
                raise
            self._whole = self._held.enter_context(self._fs._copied(self._path, self.size))
        return self._fetch(start, end)

    def _require_size(self, fs: Any) -> None:
        if fs.info(self._path)["size"] not in (self.size, None):
            raise _changed(self._fs.where(self._path))


def _changed(where: str) -> StorageError:
    return StorageError(
        f"{where} was changed while it was read: leave the files alone and run the same command "
        "again"
    )


def version_of(entry: dict[str, Any]) -> str:
    """The content hash or time of a file from a listing; "" if the file system gives neither."""
    stamp = next((entry[name] for name in _STAMPS if entry.get(name)), "")
    # some tell a time in listings and a date of single files
    return str(stamp.timestamp() if isinstance(stamp, datetime) else stamp)
