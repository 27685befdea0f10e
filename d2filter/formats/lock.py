"""A lock on a run directory: one writer at a time, on a local path or an object store.

OUT/lock.json names the owner: host, process, start time, command, and a heartbeat that the owner
renews. Another command refuses to start while the owner is alive, and takes the lock over when the
owner is dead. The owner and its tasks read the lock before they publish a file, so that tasks that
outlive their driver cannot overwrite the files of the next owner.

On the owner's machine the process table shows whether it is alive. On another machine, an owner
whose heartbeat does not change for `stale` seconds counts as dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from d2filter.errors import InputError, LockedError, StorageError
from d2filter.formats.paths import LOCK, Folder, Owner, writing

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_LOOK_SECONDS = 1.0  # between looks at a heartbeat that is watched
_SETTLE_SECONDS = 0.5  # object stores: two writers at once see who was last


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The content of lock.json."""

    token: str
    """random, new for each command"""
    command: str
    host: str
    pid: int
    machine: str
    """boot and process namespace: `pid` means something only where this is the same"""
    born: str
    """start time of the process in clock ticks since boot: pids are used again"""
    since: float
    """seconds since the epoch when the lock was taken"""
    beat: int = 0
    """counts up while the owner is alive"""
    seen: float = 0.0
    """seconds since the epoch of the last beat, by the owner's clock"""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"`d2filter {self.command}` (process {self.pid} on {self.host}, since {since})"


def read(folder: Folder) -> Holder | None:
    """The owner of the lock of a run directory, dead or alive; None if there is none.

    Raises InputError for a file that cannot be read or is no lock.
    """
    found = folder.read_json(LOCK)
    try:
        return None if found is None else Holder(**found)
    except TypeError as error:
        raise InputError(
            f"{folder.where(LOCK)} is not a lock of this version of d2filter: remove it if no "
            "command writes to this run directory"
        ) from error


def alive_here(holder: Holder) -> bool | None:
    """Whether the owner's process runs; None if it is on another machine or container."""
    if holder.machine != _machine() or not holder.born:
        return None
    born = birth_of(holder.pid)
    if born:
        return born == holder.born
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return None  # hidden from this user: its heartbeat tells


@contextlib.contextmanager
def hold(
    folder: Folder,
    command: str,
    *,
    say: Callable[[str], None] = lambda line: None,
    beat: float = BEAT_SECONDS,
    stale: float = STALE_SECONDS,
) -> Iterator[Folder]:
    """Hold the lock of a run directory; yields the folder through which its owner writes.

    say: gets a line while another owner is watched. beat: seconds between heartbeats. stale:
    seconds without a heartbeat after which an owner counts as dead. Raises LockedError if another
    owner is alive.
    """
    now = time.time()
    mine = Holder(
        token=uuid.uuid4().hex, command=command, host=platform.node(), pid=os.getpid(),
        machine=_machine(), born=birth_of(os.getpid()), since=now, seen=now,
    )  # fmt: skip
    _take(folder, mine, say, stale)
    ended = threading.Event()
    heart = threading.Thread(
        target=_keep_beating, args=(folder, mine, beat, ended), name="run-lock", daemon=True
    )
    heart.start()
    try:
        yield folder.owned_by(Owner(folder.url, mine.token))
    finally:
        ended.set()
        heart.join()
        with contextlib.suppress(OSError, StorageError, InputError), _alone(folder):
            if _is(folder, mine):
                folder.remove(LOCK)


def _take(folder: Folder, mine: Holder, say: Callable[[str], None], stale: float) -> None:
    if folder.local is not None:
        with writing(folder.url):
            folder.local.mkdir(parents=True, exist_ok=True)
    watched: Holder | None = None
    since = time.monotonic()
    while True:
        with _alone(folder):
            other = _look(folder)
            quiet = other == watched and time.monotonic() - since > stale
            if other is None or alive_here(other) is False or quiet:
                _write(folder, mine)
                break
        if alive_here(other) or (watched is not None and other != watched):
            raise LockedError(
                f"{folder.url} is in use by {other}: wait until it is done, or use another "
                "--out-dir"
            )
        if watched is None:
            watched, since = other, time.monotonic()
            say(
                f"{folder.url} was last used by {other}; checking for up to {stale:.0f} s whether "
                "that command is still running"
            )
        time.sleep(min(_LOOK_SECONDS, stale / 4))
    if folder.local is None:
        time.sleep(_SETTLE_SECONDS)
        if not _is(folder, mine):
            raise LockedError(
                f"{folder.url} was locked at the same moment by {read(folder)}: wait until it is "
                "done, or use another --out-dir"
            )


def _look(folder: Folder) -> Holder | None:
    """The owner of the lock. A missing file is read again, because some file systems replace a file
    by removing it first.
    """
    found = read(folder)
    if found is None and folder.local is None:
        time.sleep(_SETTLE_SECONDS)
        found = read(folder)
    return found


def _is(folder: Folder, mine: Holder) -> bool:
    found = _look(folder)
    return found is not None and found.token == mine.token


def _write(folder: Folder, mine: Holder) -> None:
    """With the owner's mark on the temporary file, so that the next one removes it after a kill."""
    folder.owned_by(Owner(folder.url, mine.token, holds=False)).publish_json(LOCK, asdict(mine))


def _keep_beating(folder: Folder, mine: Holder, beat: float, ended: threading.Event) -> None:
    while not ended.wait(beat):
        # a storage that is away for a while costs a beat; whoever publishes will notice a loss
        with contextlib.suppress(OSError, StorageError, InputError), _alone(folder):
            found = _look(folder)
            if found is None:
                continue
            if found.token != mine.token:
                return
            mine = replace(mine, beat=mine.beat + 1, seen=time.time())
            _write(folder, mine)


@contextlib.contextmanager
def _alone(folder: Folder) -> Iterator[None]:
    """On a local file system one process at a time reads and replaces the lock."""
    target = folder.local
    if target is None:
        yield
        return
    handle = os.open(target, os.O_RDONLY)
    try:
        # some network file systems have no flock: the heartbeat is all there is then
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _machine() -> str:
    boot = _text("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{boot} {platform.node()}"


def birth_of(pid: int) -> str:
    """Start time of a process; empty when it cannot be seen. A zombie has ended."""
    # the name, before the last parenthesis, may hold anything
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if fields and fields[0] in ("Z", "X"):
        return "ended"
    return fields[19] if len(fields) > 19 else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
