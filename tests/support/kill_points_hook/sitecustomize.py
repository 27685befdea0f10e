"""Kills its process at chosen file operations below a folder. Every Python process that has this
folder in PYTHONPATH loads it when it starts.

A point is the moment before a file is renamed to its final name, or before a file or folder is
removed. The points of all processes are counted together. See `tests/support/kill_points.py`.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys

_CONTROL = os.environ.get("KILL_POINTS", "")
_EVENTS = ("os.rename", "os.remove", "os.rmdir")


def _path(name, folder):
    """The path that an operation names, relative to an open folder or not."""
    name = os.fsdecode(name)
    if isinstance(folder, int) and folder >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    return os.path.abspath(name)


def _point(event, arguments):
    if event not in _EVENTS:
        return
    with contextlib.suppress(OSError, ValueError):
        with open(_CONTROL) as stream:
            control = json.load(stream)
        if event == "os.rename":
            path = _path(arguments[1], arguments[3])
        else:
            path = _path(arguments[0], arguments[1])
        if not path.startswith(control["folder"]) or os.path.basename(path).startswith(".tmp-"):
            return
        with open(control["log"], "r+") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            number = sum(1 for _ in log)
            log.write(f"{os.getpid()} {event} {path}\n")
            log.flush()
        if number in control["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)


if _CONTROL:
    sys.addaudithook(_point)
