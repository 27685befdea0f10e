"""Retries storage operations that fail temporarily: for about a minute, with growing pauses.

What still fails then is raised as one StorageError.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from d2filter.errors import D2FilterError, StorageError
from d2filter.text import scrubbed

T = TypeVar("T")

TRIES = 6
PATIENCE = 60.0  # seconds after which no other try begins
_FIRST_WAIT = 0.5  # seconds; each wait is twice the one before

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
_jitter = random.SystemRandom()


class Broken(OSError):
    """Fewer bytes were transferred than requested. The operation can be retried."""


class NoRangesError(Exception):
    """The server sends whole files only."""


def patiently(ask: Callable[[], T], where: str, done: str) -> T:
    """The result of `ask`, which is retried while it fails in a way that may be temporary.

    where, done: for the message "WHERE could not be DONE". Raises StorageError after the last try,
    or if a retry is useless. Errors about a file that is missing (or exists already) are raised
    unchanged.
    """
    began = time.monotonic()
    tries = 0
    while True:
        try:
            return ask()
        except (*_ABSENT, *_OURS, NoRangesError):
            raise
        except Exception as error:
            tries += 1
            if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
                raise StorageError(
                    f"{where} could not be {done}, permission denied: {words(error)}; check the "
                    "credentials and their permissions, then run the same command again"
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
                    f"{words(error)}; check the storage and the connection, then run the same "
                    "command again"
                ) from error
        time.sleep(wait)


def words(error: BaseException) -> str:
    """The system's own words, on one line, without passwords."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    return scrubbed(lines[0])[:300].rstrip(". ")
