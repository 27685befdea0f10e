"""logs/: what happened in a run, one JSON object per line.

logs/driver.jsonl           the run: stages, fan-outs, retries, failures
logs/<stage>/<task>.jsonl   each attempt at a task: machine, arguments, figures or error

Logs are for counting and searching; samples are in the ledger. `time` (UTC) and `event` come first
in a line. Line separators and control characters are escaped, and URLs contain no passwords.

See docs/files.md#lock-and-logs.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from d2filter.formats.paths import Folder
from d2filter.text import printable, redacted, scrubbed_in

DRIVER = "logs/driver.jsonl"
_LONGEST = 8  # entries of a list; longer lists are cut


def now() -> str:
    """UTC time to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def append(folder: Folder, name: str, event: str, **more: Any) -> None:
    """Add one line to a log of a run."""
    folder.append(name, _line(event, more))


def append_all(folder: Folder, name: str, event: str, many: Sequence[Mapping[str, Any]]) -> None:
    """Add lines of one kind, in one write."""
    if many:
        folder.append(name, "".join(_line(event, more) for more in many))


def read(folder: Folder, name: str) -> list[dict[str, Any]]:
    """The lines of a log; empty when there is none. One that a crash cut off is left out."""
    if not folder.exists(name):
        return []
    with folder.reading(name) as stream:
        lines = stream.read().decode("utf-8", "replace")
    found = []
    # not splitlines: it takes more than line feeds for the end of a line
    for line in lines.split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def of_task(stage: str, task: str) -> str:
    """The log of one task."""
    return f"logs/{stage}/{task}.jsonl"


@dataclass(slots=True)
class TaskLog:
    """Lines of one attempt. On an object store they are put there at its end, all at once."""

    folder: Folder
    name: str
    _held: list[str] = field(default_factory=list, init=False)

    def line(self, event: str, **more: Any) -> None:
        """Add a line."""
        self._held.append(_line(event, more))
        if self.folder.local is not None:
            self.close()

    def close(self) -> None:
        """Write what is held."""
        if self._held:
            self.folder.append(self.name, "".join(self._held))
            self._held.clear()


def where() -> dict[str, Any]:
    """This process: node and number."""
    return {"node": platform.node(), "pid": os.getpid()}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments or figures as they are logged: plain values, addresses, the first items of long
    lists.
    """
    shown = {name: _plain(value) for name, value in values.items()}
    return {name: value for name, value in shown.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float):
        return value
    if hasattr(value, "url"):
        return redacted(value.url)
    if isinstance(value, Mapping):
        return plain(value) if len(value) <= _LONGEST else None
    if isinstance(value, list | tuple):
        first = [_plain(one) for one in value[:_LONGEST]]
        if any(not isinstance(one, str | int | float) for one in first):
            return None
        more = [f"and {len(value) - _LONGEST} more"] if len(value) > _LONGEST else []
        return [*first, *more]
    return None


def _line(event: str, more: Mapping[str, Any]) -> str:
    entry = scrubbed_in({"time": now(), "event": event, **more})
    return printable(json.dumps(entry, ensure_ascii=False)) + "\n"
