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
    """The points of the processes that were started with `environment`."""

    place: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to have points."""
        here = str(Path(__file__).parent / "kill_points_hook")
        path = os.environ.get("PYTHONPATH", "")
        return {
            "KILL_POINTS": str(self.place / "control.json"),
            "PYTHONPATH": f"{here}:{path}" if path else here,
        }

    def watch(self, folder: Path, kill: Sequence[int] = ()) -> None:
        """Count the points below a folder from 0, and kill whoever comes to one of these."""
        log = self.place / "log"
        log.write_text("")
        control = self.place / "control.json"
        aside = self.place / "control.aside"
        aside.write_text(json.dumps({"folder": f"{folder}", "log": str(log), "kill": [*kill]}))
        aside.replace(control)

    def passed(self) -> list[str]:
        """What was about to be done at each point so far: process, operation, path."""
        return (self.place / "log").read_text().splitlines()


@contextmanager
def points() -> Iterator[Points]:
    """Points for processes that are started meanwhile, workers of a new cluster too."""
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
