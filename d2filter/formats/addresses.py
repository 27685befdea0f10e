"""Parses addresses: local paths, URLs with and without a query, and file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from d2filter.errors import DependencyError, UsageError
from d2filter.formats.remote import Remote
from d2filter.text import redacted

_LOCAL = ("file", "local")
_WEB = ("http", "https")
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
_SUFFIX_BYTES = 16  # of .parquet, .jsonl and the like; file systems bound names


def absolute(url: str) -> str:
    """A local path made absolute, `~` expanded, for workers elsewhere; URLs as they are."""
    if "://" in url:
        return url
    return str(Path(url).expanduser().absolute()) if url else url


def is_local(url: str) -> bool:
    """Whether it is a path of this machine's file systems, with or without file://."""
    return _protocol(url) in _LOCAL


def is_web(url: str) -> bool:
    """Whether it is an http:// or https:// address, in which ? starts a query."""
    return _protocol(url) in _WEB


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it, without a trailing slash: fsspec's own for local
    paths, else one with retries.

    Raises DependencyError if its package is missing and UsageError for an unknown protocol.
    """
    protocol = _protocol(url)
    try:
        if protocol in _LOCAL:
            # :: is a part of the name there, and no chain
            fs: Any = LocalFileSystem()
            path = fs._strip_protocol(url)
        elif protocol in _WEB:
            from d2filter.formats.web import Web

            fs, path = Web(), url
        else:
            fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f" (pip install 'd2filter[{extra}]')" if extra else ""
        raise DependencyError(f"{url} needs a package that is missing{remedy}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{url} is not a usable location: {error}") from error
    if not isinstance(fs, LocalFileSystem):
        fs = Remote(fs)
    head, query = without_query(str(path))
    return fs, (head.rstrip("/") or "/") + query


def without_query(url: str) -> tuple[str, str]:
    """A URL parted before the ? of its query; only those of web servers have one."""
    if not is_web(url):
        return url, ""
    head, mark, query = url.partition("?")
    return head, mark + query


def inside(root: str, name: str) -> str:
    """The path of a file in a folder. The query of a web folder goes behind the names in it."""
    if not name:
        return root
    head, query = without_query(root)
    return f"{head.rstrip('/')}/{name}{'' if '?' in name else query}"


def parted(url: str) -> tuple[str, str]:
    """The folder that a file lies in, and its name there: with its query, if it has one."""
    head, query = without_query(url)
    parent, slash, name = head.rpartition("/")
    return parent or slash or ".", name + query


def file_name(url: str) -> str:
    """The last part of a path or of a URL, which may be named by its query; as it is recorded."""
    known = redacted(url)
    if is_web(known) and "?" in known:
        known = known.rpartition("=")[2]
    return known.rstrip("/").rpartition("/")[2]


def temporary_suffix(name: str) -> str:
    """The ending of a temporary file, for tools that choose a format by it; "" for a long one."""
    suffix = Path(name).suffix
    return suffix if len(suffix.encode("utf-8", "surrogateescape")) <= _SUFFIX_BYTES else ""


def _protocol(url: str) -> str:
    return str(get_protocol(url)) if "://" in url else "file"
