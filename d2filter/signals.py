"""Ends a command in order on Ctrl-C, SIGTERM and SIGHUP: everything that it started is stopped.

Each signal raises KeyboardInterrupt in the main thread. While something is started or stopped that
must not be left half done (`held`), signals are recorded and raised afterwards. Further signals do
not interrupt the clean-up; after 10 seconds they end the process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PATIENCE_SECONDS = 10.0  # of a user: a signal after that ends a clean-up that hangs


class _State:
    """Of the process, as signals are."""

    received = 0
    """the first one; 0 for none"""
    held = 0
    since = 0.0
    """when the first one came"""
    pending = False


def received() -> int:
    """The signal that ends this command; 0 for none."""
    return _State.received


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Within it signals raise KeyboardInterrupt. Afterwards they do what they did before; where
    one has come, nothing: the process is about to end.

    Those that are ignored, as SIGHUP is under nohup, stay so.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        _State.received, _State.held, _State.pending = 0, 0, False
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, _handle)
    try:
        yield
    finally:
        if _State.received:
            # the clean-up of a command that was interrupted
            _State.held += 1
        else:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals that come within it raise KeyboardInterrupt at its end."""
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
    if _State.pending and not _State.held:
        _State.pending = False
        raise KeyboardInterrupt


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """For a library that sets handlers of its own: those of before stand again afterwards. Ray does
    when it starts, and when it ends it resets that of SIGTERM, below what Python knows.
    """
    mine = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    except SystemExit as error:
        # what Ray's own handler of SIGTERM raises
        if error.code != signal.SIGTERM or mine[signal.SIGTERM] is not _handle:
            raise
        _State.received = _State.received or signal.SIGTERM
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in mine.items():
                if handler is _handle:
                    signal.signal(number, handler)


def _handle(number: int, frame: object) -> None:
    first, now = not _State.received, time.monotonic()
    if first:
        _State.received, _State.since = number, now
    if not _State.held:
        raise KeyboardInterrupt
    if not first and now - _State.since > _PATIENCE_SECONDS:
        os._exit(128 + _State.received)
    _State.pending = True
