"""Terminal output while a command runs: a progress bar of samples, and lines about problems."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm import tqdm

from d2filter.text import printable, scrubbed

TICK_SECONDS = 1.0


def progress_bar(label: str, total: int | None, show: bool | None) -> Any:
    """A progress bar of samples, whose clock goes on without progress.

    total: expected samples, if known. show: None: on terminals only.
    """
    return _Bar(
        desc=f"{label:<9}",
        total=total,
        unit=" samples",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None if show is None else not show,
    )


def tell(line: str) -> None:
    """Print a line on stderr, above the progress bars."""
    tqdm.write(printable(scrubbed(f"d2filter: {line}")), file=sys.stderr)


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    def __init__(self, **options: Any) -> None:
        self._over = threading.Event()
        super().__init__(**options)
        if not self.disable:
            threading.Thread(target=self._tick, daemon=True).start()

    def close(self) -> None:
        with self.get_lock():
            self._over.set()
            super().close()

    def _tick(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with self.get_lock():
                if not self._over.is_set():
                    self.refresh(nolock=True)
