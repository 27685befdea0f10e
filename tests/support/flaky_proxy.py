"""An HTTP proxy that breaks connections and answers 500, as a seed determines."""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

# "refused": 500, the server never sees the request; "unheard": the server does what it is asked and
# 500 is the answer; "hung up": the connection ends without an answer; "cut": it ends in the middle
# of what is downloaded; "cut upload": in the middle of what is uploaded
KINDS = ("refused", "unheard", "hung up", "cut", "cut upload")

_ERROR = (
    b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>by chance</Message></Error>"
)


class FlakyProxy:
    """Forwards to `upstream` (http://host:port); while `rate` is above 0, that share of requests
    fails, but never more than `in_a_row` of the same: a server that gets over it. `only`: what
    must be in the path of those that fail.

    `faults` counts the failures by kind, `requests` those and the others by method. `ranges` lists
    path and bytes of each request for a part of a file.
    """

    def __init__(self, upstream: str, *, seed: int = 0, rate: float = 0) -> None:
        self.upstream = urlsplit(upstream)
        self.rate = rate
        self.in_a_row = 3
        self.only = ""
        self.faults: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.ranges: list[tuple[str, int]] = []
        self._rng = random.Random(seed)
        self._in_a_row: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FlakyProxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_fault(self, method: str, path: str, upload: int) -> str:
        """What happens to a request; "" for nothing."""
        what = f"{method} {path}"
        with self._lock:
            self.requests[method] += 1
            spared = self.only not in path or self._in_a_row[what] >= self.in_a_row
            if self._rng.random() >= self.rate or spared:
                del self._in_a_row[what]
                return ""
            self._in_a_row[what] += 1
            possible = ["refused", "unheard", "hung up"]
            possible += ["cut"] * 3 * (method == "GET") + ["cut upload"] * 3 * (upload > 1)
            return self._rng.choice(possible)

    def note_range(self, path: str, asked: str) -> None:
        """asked: the header Range of a request."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if found is not None:
            with self._lock:
                self.ranges.append((path, int(found[2]) + 1 - int(found[1])))

    def happened(self, fault: str) -> None:
        with self._lock:
            self.faults[fault] += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: FlakyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms an answer
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        proxy = self.server.proxy
        length = int(self.headers.get("Content-Length") or 0)
        proxy.note_range(self.path, self.headers.get("Range", ""))
        fault = proxy.next_fault(self.command, self.path, length)
        if fault == "cut upload":
            self.rfile.read(length // 2)
            self._hang_up(fault)
            return
        body = self.rfile.read(length)
        if fault == "refused":
            self._answer(500, [], _ERROR)
            proxy.happened(fault)
            return
        status, headers, content = self._forward(body)
        if fault == "unheard":
            self._answer(500, [], _ERROR)
            proxy.happened(fault)
        elif fault == "hung up":
            self._hang_up(fault)
        elif fault == "cut" and len(content) > 1 and status < 300:
            self._answer(status, headers, content, content[: len(content) // 2])
            self._hang_up(fault)
        else:
            self._answer(status, headers, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = self.server.proxy.upstream
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        with contextlib.closing(connection):
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _OF_A_HOP}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        sent: bytes | None = None,
    ) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # without content, that of what HEAD asks about
            elif name.lower() not in _OF_A_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if sent is None else sent)

    def _hang_up(self, fault: str) -> None:
        self.server.proxy.happened(fault)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


_OF_A_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}
