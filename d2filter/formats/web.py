"""Web servers as file systems: folders from index pages, files by HEAD and ranged GET.

fsspec's own client reports every failure as a missing file, and an unknown size as 0. Here 404 is a
missing file, 403 a refusal, 503 is retried, and unknown values are None. Signed URLs are sent
unchanged.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from typing import IO, Any
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp
import yarl
from fsspec.asyn import sync_wrapper
from fsspec.implementations.http import HTTPFileSystem

from d2filter.errors import StorageError
from d2filter.formats.remote import BEYOND_END
from d2filter.formats.retry import Broken, NoRangesError

_BLOCK = 1 << 20
_MAX_INDEX_BYTES = 64 << 20
_SILENCE = 60.0  # seconds without a byte; files may take as long as they need
_MISSING = (404, 410)
_REFUSED = (401, 402, 403, 407, 451)
_PASSES = (408, 425, 429)  # and 500 to 599
_AS_GIVEN = re.compile(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})*")
_STAMPS = ("ETag", "Last-Modified", "Content-MD5", "Digest")


class Web(HTTPFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """Reads http:// and https://. Paths are whole URLs."""

    def __init__(self) -> None:
        # compressed content would have another length than the file
        headers = {"Accept-Encoding": "identity"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
        super().__init__(client_kwargs={"headers": headers, "timeout": timeout})

    def encode_url(self, url: str) -> yarl.URL:
        """The URL as it is sent: unchanged where it can be, for a signature may cover it."""
        return yarl.URL(url, encoded=_AS_GIVEN.fullmatch(url) is not None)

    @asynccontextmanager
    async def _requested(
        self, method: str, url: str, **headers: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        session = await self.set_session()
        try:
            address = self.encode_url(url)
            asking = session.request(method, address, headers=headers, allow_redirects=True)
        except ValueError as error:
            raise StorageError(f"{url} is not a usable URL: {error}") from error
        async with asking as answer:
            yield answer

    async def _info(self, url: str, **options: Any) -> dict[str, Any]:
        """size, type and what tells of a change, of those that the server tells."""
        try:
            async with self._requested("HEAD", url) as answer:
                _require_success(answer, url)
                found = _described(url, answer)
            if found["size"]:
                return found
        except (OSError, StorageError, aiohttp.ClientError):
            pass  # many a server answers GET alone: signatures cover the method
        async with self._requested("GET", url, Range="bytes=0-0") as answer:
            if answer.status == 416:  # of an empty file
                return {**_described(url, answer), "size": _whole_size(answer)}
            _require_success(answer, url)
            found = _described(url, answer)
            if answer.status == 206:
                found["size"] = _whole_size(answer)
            return found

    async def _ls(self, url: str, detail: bool = True, **options: Any) -> list[Any]:
        """What the index page of a folder links to directly inside it; the page has no sizes."""
        head, mark, query = url.partition("?")
        folder = f"{head.rstrip('/')}/"
        try:
            page, base = await self._index(folder + mark + query)
        except FileNotFoundError:
            page, base = await self._index(folder[:-1] + mark + query)
        found = []
        for name in _inside(page, base):
            kind = "directory" if name.endswith("/") else "file"
            found.append({"name": folder + name, "size": None, "type": kind})
        return found if detail else [entry["name"] for entry in found]

    ls = sync_wrapper(_ls)

    async def _index(self, url: str) -> tuple[str, str]:
        async with self._requested("GET", url) as answer:
            try:
                _require_success(answer, url)
            except PermissionError as error:
                raise PermissionError(f"{error}, so its files cannot be listed") from error
            if answer.content_type != "text/html":
                raise NotADirectoryError(url)
            page = await answer.content.read(_MAX_INDEX_BYTES)
            while page and len(page) < _MAX_INDEX_BYTES:
                more = await answer.content.read(_MAX_INDEX_BYTES - len(page))
                if not more:
                    break
                page += more
            return page.decode("utf-8", "replace"), str(answer.url)

    async def _cat_file(
        self, url: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        """A file or a range of it. Raises NoRangesError where the server would send more."""
        if start is None and end is None:
            async with self._requested("GET", url) as answer:
                _require_success(answer, url)
                return bytes(await answer.read())
        begin = start or 0
        last = "" if end is None else str(end - 1)
        async with self._requested("GET", url, Range=f"bytes={begin}-{last}") as answer:
            if answer.status == 416:
                if begin == 0 and _whole_size(answer) == 0:
                    return b""
                raise OSError(BEYOND_END, f"{begin} is beyond the end")
            _require_success(answer, url)
            if answer.status == 206 and _is_encoded(answer):
                raise NoRangesError  # a range of other bytes
            if answer.status == 206:
                content_range = answer.headers.get("Content-Range", "")
                if content_range and re.match(rf"bytes\s+{begin}-", content_range) is None:
                    raise Broken(f"the server sent {content_range}, requested were {begin}-{last}")
                return bytes(await answer.read())
            if begin or end is None:
                raise NoRangesError
            return await _at_most(answer, end)

    async def _copy_whole(self, url: str, target: IO[bytes]) -> None:
        """Write the whole file to `target`, in one request."""
        async with self._requested("GET", url) as answer:
            _require_success(answer, url)
            async for block in answer.content.iter_chunked(_BLOCK):
                target.write(block)

    copy_whole = sync_wrapper(_copy_whole)


async def _at_most(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """All of an answer, unless it is longer than that."""
    if (answer.content_length or 0) > most:
        raise NoRangesError
    content = b""
    async for block in answer.content.iter_chunked(_BLOCK):
        content += block
        if len(content) > most:
            raise NoRangesError
    return content


def _require_success(answer: aiohttp.ClientResponse, url: str) -> None:
    if answer.status < 400:
        return
    status = f"the server answers {answer.status} {answer.reason or ''}".rstrip()
    if answer.status in _MISSING:
        raise FileNotFoundError(url)
    if answer.status in _REFUSED:
        raise PermissionError(status)
    if answer.status >= 500 or answer.status in _PASSES:
        raise Broken(status)
    raise StorageError(f"{url} cannot be read: {status}; check the URL")


def _described(url: str, answer: aiohttp.ClientResponse) -> dict[str, Any]:
    base = urlsplit(url).path.rpartition("/")[2]
    is_page = answer.content_type == "text/html" and "." not in base
    # a server sends those who ask for a folder to its name with a slash
    is_folder = (answer.url.path.endswith("/") and "?" not in url) or is_page
    length = answer.headers.get("Content-Length", "")
    known = length.isdigit() and not _is_encoded(answer) and not is_folder
    return {
        "name": url,
        "size": int(length) if known else None,
        "type": "directory" if is_folder else "file",
        **{name: answer.headers[name] for name in _STAMPS if answer.headers.get(name)},
    }


def _is_encoded(answer: aiohttp.ClientResponse) -> bool:
    """Whether the bytes that come are others than those of the file."""
    return answer.headers.get("Content-Encoding", "identity") not in ("identity", "")


def _whole_size(answer: aiohttp.ClientResponse) -> int | None:
    """The size of a file, from the answer to a request for a range."""
    size = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(size) if size.isdigit() and not _is_encoded(answer) else None


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _inside(page: str, base: str) -> list[str]:
    """Names, as the links spell them, of what lies directly in the folder of an index page."""
    links = _Links()
    links.feed(page)
    home = urlsplit(base)
    folder = home.path if home.path.endswith("/") else f"{home.path}/"
    names = set()
    for link in links.found:
        try:
            there = urlsplit(
                urljoin(f"{home.scheme}://{home.netloc}{home.path.rstrip('/')}/", link)
            )
        except ValueError:
            continue  # no URL
        slash = "/" if there.path.endswith("/") else ""
        parent, _, name = there.path.rstrip("/").rpartition("/")
        # orders of the same page are links with a query and no name
        if name and there.netloc == home.netloc and unquote(f"{parent}/") == unquote(folder):
            names.add(name + slash)
    return sorted(names)
