"""Starts a run by its name, here or on the cluster that a job was submitted to.

    python -m jobs.run --list
    python -m jobs.run datacomp_small --set metadata-dir=/shared/pool out-dir=/shared/run
    ray job submit --address http://HEAD:8265 --working-dir . -- python -m jobs.run demo --set …

`--set` takes the options of the command line without leading dashes, with `true` or `false` for
options without a value. A submitted job joins the cluster to which it was submitted: Ray sets
RAY_ADDRESS.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

from d2filter import __version__
from d2filter.cli import main as cli
from d2filter.cli.commands import Parser
from d2filter.cli.recipes import RUNS
from d2filter.errors import D2FilterError, UsageError

_LISTS = ("shards", "feature-keys")  # options that take several values, separated by spaces


def main(argv: Sequence[str] | None = None) -> int:
    """Run by name; returns the exit code of the command line."""
    try:
        words = command_line(argv)
    except D2FilterError as error:
        print(f"jobs.run: error: {error}", file=sys.stderr)
        return error.exit_code
    return cli.main(words) if words else 0


def command_line(argv: Sequence[str] | None = None) -> list[str]:
    """The words of the d2filter command, which are printed; none if the runs are listed.

    Raises UsageError for an unknown name, for an option that is not key=value, and for missing
    options.
    """
    parser = Parser(prog="python -m jobs.run", description="Start a run by its name.")
    parser.add_argument("name", nargs="?", metavar="NAME", help=", ".join(RUNS))
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="given",
        help="options of the d2filter command line",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="explain each run in a line")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for name, run in RUNS.items():
            print(f"{name:<17} {run.summary}")
        return []
    if not arguments.name:
        raise UsageError(f"name a run: {', '.join(RUNS)} (`--list` explains them)")
    if arguments.name not in RUNS:
        raise UsageError(f"{arguments.name!r} is no run, allowed are {', '.join(RUNS)}")
    words = _words(arguments.name, _pairs(arguments.given))
    print(f"{arguments.name}: d2filter {__version__} {shlex.join(words)}", flush=True)
    return words


def _words(name: str, given: Mapping[str, str]) -> list[str]:
    """The command line of a named run. given: values by option, in place of those of the run."""
    run = RUNS[name]
    recipe = {"recipe": run.recipe} if run.recipe else {}
    chosen = {**recipe, **run.values, **given}
    missing = [need for need in run.needs if not chosen.get(need)]
    if missing:
        raise UsageError(
            f"{name} needs {' and '.join(missing)}: add --set "
            + " ".join(f"{need}=…" for need in missing)
        )
    words = [run.command]
    for option, value in chosen.items():
        if value in ("true", "false"):
            words.append(f"--{option}" if value == "true" else f"--no-{option}")
        elif option in _LISTS:
            words += [f"--{option}", *value.split()]
        else:
            words.append(f"--{option}={value}")
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
