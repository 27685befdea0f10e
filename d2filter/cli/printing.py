"""Lines that the command line prints: without secrets and without terminal control characters."""

from __future__ import annotations

import sys

from d2filter.text import printable, scrubbed, scrubbed_in


def say(line: str) -> None:
    """Print one line on stdout, without secrets and without terminal control characters."""
    print(printable(scrubbed(line)), flush=True)


def print_error(line: str) -> None:
    """Print one line on stderr, cleaned like `say`."""
    print(printable(scrubbed(line)), file=sys.stderr, flush=True)


def say_json(value: object) -> None:
    import json

    for line in json.dumps(scrubbed_in(value), indent=2, ensure_ascii=False).split("\n"):
        say(line)
