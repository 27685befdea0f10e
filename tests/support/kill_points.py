"""Kills processes at chosen points: before a file gets its final name, or before a removal.

d2filter needs no hook for this: `kill_points_hook/sitecustomize.py` installs an audit hook of
Python in the driver and in every worker.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Points:
    """Kill points of all processes that are started with `environment`."""

    place: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that install the audit hook in a process."""
        here = str(Path(__file__).parent / "kill_points_hook")
        path = os.environ.get("PYTHONPATH", "")
        return {
            "KILL_POINTS": str(self.place / "control.json"),
            "PYTHONPATH": f"{here}:{path}" if path else here,
        }

    def watch(self, folder: Path, kill: Sequence[int] = ()) -> None:
        """Count the points below a folder, from 0; kill the process that reaches one of `kill`."""
        log = self.place / "log"
        log.write_text("")
        control = self.place / "control.json"
        aside = self.place / "control.aside"
        aside.write_text(json.dumps({"folder": f"{folder}", "log": str(log), "kill": [*kill]}))
        aside.replace(control)

    def passed(self) -> list[str]:
        """Process, operation and path of each point so far."""
        return (self.place / "log").read_text().splitlines()


@contextmanager
def points() -> Iterator[Points]:
    """Kill points of all processes that are started inside the `with` block."""
    with tempfile.TemporaryDirectory(prefix="d2f-points-") as place:
        found = Points(Path(place))
        before = {name: os.environ.get(name) for name in found.environment}
        os.environ.update(found.environment)
        try:
            yield found
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
