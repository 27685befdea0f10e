"""Starts a run by its name, here or on the cluster that a job was submitted to.

    python -m jobs.run --list
    python -m jobs.run datacomp_small --set metadata-dir=/shared/pool out-dir=/shared/run
    ray job submit --address http://HEAD:8265 --working-dir . -- python -m jobs.run demo --set …

`--set` takes the options of the command line without leading dashes, with `true` or `false` for
options without a value. A submitted job joins the cluster to which it was submitted: Ray sets
RAY_ADDRESS.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from d2filter import __version__
from d2filter.cli import main as cli
from d2filter.errors import D2FilterError, UsageError
from jobs.runs import RUNS


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `python -m jobs.run --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run by name; returns the exit code of the command line."""
    try:
        words = command_line(argv)
    except D2FilterError as error:
        print(f"jobs.run: error: {error}", file=sys.stderr)
        return error.exit_code
    return cli.main(words) if words else 0


def command_line(argv: Sequence[str] | None = None) -> list[str]:
    """The words for d2filter, which are told; none when the runs are listed.

    Raises UsageError for an unknown name, for what is not key=value, and for what is missing.
    """
    parser = _Parser(prog="jobs.run", description="Start a run by its name.", allow_abbrev=False)
    parser.add_argument("name", nargs="?", metavar="NAME", help=", ".join(RUNS))
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="given",
        help="options of the d2filter command line",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="explain each run in a line")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for name, run in RUNS.items():
            print(f"{name:<17} {(run.__doc__ or '').strip()}")
        return []
    if not arguments.name:
        raise UsageError(f"name a run: {', '.join(RUNS)} (`--list` explains them)")
    if arguments.name not in RUNS:
        raise UsageError(f"{arguments.name!r} is no run, allowed are {', '.join(RUNS)}")
    words = RUNS[arguments.name]().words(arguments.name, _pairs(arguments.given))
    print(f"{arguments.name}: d2filter {__version__} {shlex.join(words)}", flush=True)
    return words


def _pairs(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UsageError(f"--set {pair}: needed is key=value, as in --set out-dir=/shared/run")
        found[key.replace("_", "-")] = value
    return found


if __name__ == "__main__":
    cli.program(main)
