"""An HTTP server on loopback that can misbehave like real web servers."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit


@dataclass
class WebServer:
    """`files` by path without the first slash. Used as a context manager."""

    files: dict[str, bytes]
    index: int = 200
    """status of a folder's page"""
    query: str = ""
    """that a request needs, or it is forbidden"""
    login: str = ""
    """user:password that a request needs"""
    head: bool = True
    lengths: bool = True
    """whether answers have a Content-Length; else the content comes in chunks"""
    ranges: bool = True
    etags: bool = True
    times: bool = True
    missing: int = 404
    encoding: str = ""
    """claimed for all content"""
    cut: int = 0
    """bytes after which so many of the next answers break off"""
    fails: list[int] = field(default_factory=list)
    """statuses of the next answers"""
    changed: float = 1e9
    """time of all files"""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """method, path with its query, and range of each request"""
    sent: int = 0
    """bytes of content"""

    def __post_init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.web = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def url(self, path: str = "") -> str:
        """Of a file or folder, with what lets one in."""
        login = f"{self.login}@" if self.login else ""
        query = f"?{self.query}" if self.query else ""
        return f"http://{login}{self.host}/{path}{query}"

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    web: WebServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up before the end are wanted."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        web = self.server.web
        where = urlsplit(self.path)
        path = unquote(where.path).lstrip("/")
        web.requests.append((self.command, self.path, self.headers.get("Range", "")))
        if web.fails:
            self._answer(web.fails.pop(0), b"")
        elif web.login and self.headers.get("Authorization") != _basic(web.login):
            self._answer(401, b"who?")
        elif web.query and where.query != web.query:
            self._answer(403, b"not signed")
        elif self.command == "HEAD" and not web.head:
            self._answer(405, b"")
        elif path in web.files:
            self._file(web.files[path])
        elif any(name.startswith(f"{path}/") for name in web.files) and path:
            self.send_response(301)
            query = f"?{where.query}" if where.query else ""
            self.send_header("Location", f"{where.path}/{query}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif any(name.startswith(path) for name in web.files) and path[-1:] in ("", "/"):
            self._index(path)
        else:
            self._answer(web.missing, b"no such file")

    do_GET = do_HEAD = _serve

    def _index(self, path: str) -> None:
        web = self.server.web
        if web.index != 200:
            self._answer(web.index, b"no listing")
            return
        inside = {n[len(path) :].partition("/")[0::2] for n in web.files if n.startswith(path)}
        lines = ["<a href='?C=N;O=D'>Name</a>", '<a href="../">Parent Directory</a>']
        inside_names = sorted({name + ("/" if more else "") for name, more in inside})
        lines += [f'<a href="{quote(name)}">{name}</a>' for name in inside_names]
        lines.append('<a href="http://elsewhere.invalid/x.tar">another server</a>')
        page = f"<html><body>{'<br>'.join(lines)}</body></html>".encode()
        self._answer(200, page, {"Content-Type": "text/html; charset=utf-8"})

    def _file(self, content: bytes) -> None:
        web = self.server.web
        headers = {"Content-Type": "application/octet-stream"}
        if web.etags:
            headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        if web.times:
            headers["Last-Modified"] = formatdate(web.changed, usegmt=True)
        if web.encoding:
            headers["Content-Encoding"] = web.encoding
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not web.ranges or wanted is None or self.command == "HEAD":
            self._answer(200, content, headers)
            return
        begin, last = int(wanted[1]), int(wanted[2] or len(content))
        if begin >= len(content):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        part = content[begin : last + 1]
        size = str(len(content)) if web.lengths else "*"
        headers["Content-Range"] = f"bytes {begin}-{begin + len(part) - 1}/{size}"
        self._answer(206, part, headers)

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        web = self.server.web
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        chunked = not web.lengths and status in (200, 206)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if web.cut and len(content) > web.cut:
            self.wfile.write(content[: web.cut] if not chunked else b"%x\r\n" % len(content))
            web.cut = 0
            self.close_connection = True
            return
        web.sent += len(content)
        if chunked:
            for at in range(0, len(content), 1 << 16):
                piece = content[at : at + (1 << 16)]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(content)


def _basic(login: str) -> str:
    return f"Basic {base64.b64encode(login.encode()).decode()}"
