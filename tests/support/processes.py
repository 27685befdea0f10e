"""Processes of this machine, as /proc shows them. Reading it is fast enough to find a task of some
milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

_NO_TASK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def parents() -> dict[int, int]:
    """Parent of every process."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{entry}/stat").read_text()
                # the name before the last parenthesis may hold anything
                found[int(entry)] = int(status.rpartition(")")[2].split()[1])
    return found


def title_of(pid: int) -> str:
    """The command line of a process, where Ray writes what it does; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def works(title: str) -> bool:
    """Whether a process with this title runs a task of Ray or is an actor."""
    return title.startswith("ray::") and title not in _NO_TASK


def runs_task(pid: int) -> bool:
    """Whether a process runs a task of Ray or is an actor."""
    return works(title_of(pid))


def wait_for(over: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait until a condition holds. Raises TimeoutError, with `what` as the cause."""
    end = time.monotonic() + seconds
    while not over():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} is still at work after {seconds:.0f} s")
        time.sleep(0.05)
