"""The command line: parses a command, runs it, and reports a failure as one line and an exit code.

See docs/settings.md.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from d2filter import __version__, config, signals
from d2filter.cli import options
from d2filter.errors import D2FilterError, UsageError
from d2filter.text import printable, scrubbed, scrubbed_in

if TYPE_CHECKING:
    from d2filter.stages.pipeline import Pipeline

_NOT_IN_A_FILE = ("help", "config", "recipe")
_BROKEN_PIPE = 128 + signal.SIGPIPE

# each command imports the heavy packages that it needs, so that `select` takes about a second


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of an option, unless it is empty or the help contains it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        described = "(default:" in (action.help or "")
        if described or action.default in (None, "", [], ()) or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Keep the line breaks of help texts, so that lists stay lists."""
        out: list[str] = []
        for part in text.splitlines():
            out += super()._split_lines(part, width)
        return out


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises UsageError, and that refuses abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def entry() -> NoReturn:
    """Run the console script `d2filter`."""
    program(main)


def program(run: Callable[[], int]) -> NoReturn:
    """Call `run` and end the process with its exit code.

    Characters that the terminal's encoding lacks are printed as escapes. If the reader of stdout
    goes away, as in `| head`, the program ends without a message.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code: int | str | None
    try:
        try:
            code = run()
        except SystemExit as ended:  # of --help and --version
            code = ended.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        code = _BROKEN_PIPE
    if code == _BROKEN_PIPE:
        # Python flushes these streams once more when it ends
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if signals.received() and isinstance(code, int):
        # everything is stopped; another signal could still interrupt Python's own clean-up
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. argv: words of the command; None: those of Python."""
    with signals.raising():
        try:
            arguments = parse(sys.argv[1:] if argv is None else argv)
            arguments.handler(arguments)
        except KeyboardInterrupt:
            return _interrupted()
        except D2FilterError as error:
            if signals.received():  # the error may be a consequence of the signal
                return _interrupted()
            return _failed(str(error), error.exit_code)
        except BrokenPipeError as error:
            if _stdout_is_gone():
                return _BROKEN_PIPE
            return _failed(str(error), 1)
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            return _failed(f"{error.strerror or error}{place}", 1)
    return 0


def _failed(text: str, code: int) -> int:
    _print_error(f"d2filter: error: {text}")
    return code


def _interrupted() -> int:
    number = signals.received() or signal.SIGINT
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    with contextlib.suppress(OSError):  # the terminal may be gone
        _print_error(
            f"d2filter: interrupted{by}; run the same command again, it keeps what is done"
        )
    return 128 + number


def _stdout_is_gone() -> bool:
    """Whether stdout has no reader any more: output that was not written then fails to flush."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. Options that are not given come from --config, then from --recipe.

    Raises UsageError.
    """
    words = [_dashed(word) for word in argv]
    parser, commands = _parser()
    early = _Parser(add_help=False)
    early.add_argument("command", nargs="?")
    early.add_argument("--config", default="")
    early.add_argument("--recipe", default="")
    early.add_argument("--budget", default=None)
    known, _ = early.parse_known_args(words)
    chosen = commands.get(known.command)
    if chosen is not None:
        if known.recipe:
            _apply_recipe(chosen, known.recipe, known.budget is not None)
        if known.config:
            _apply_config(chosen, known.config)
    if known.command is not None and chosen is None:
        nearest = _nearest(known.command, commands)
        raise UsageError(
            f"{known.command!r} is no command{nearest}, allowed are {', '.join(commands)}"
        )
    # a misspelled option is named here, because argparse would first name required options
    options_of = chosen or parser
    for word in itertools.takewhile(lambda word: word != "--", words):
        name = word.partition("=")[0]
        if re.match("-+[a-z]", name) and name not in options_of._option_string_actions:
            nearest = _nearest(name, options_of._option_string_actions)
            options_of.error(f"unrecognized arguments: {word}{nearest}")
    return parser.parse_args(words)


def _nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelled name, for a message; empty if no known name is similar."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _dashed(word: str) -> str:
    """--out_dir=x → --out-dir=x: underscores and dashes in option names are the same."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _apply_recipe(command: argparse.ArgumentParser, name: str, with_budget: bool) -> None:
    """Make the values of a recipe the defaults of a command's options. with_budget: whether
    --budget is given, which replaces the recipe's fraction.
    """
    if name not in options.RECIPES:
        raise UsageError(f"recipe is {name!r}, allowed are {', '.join(options.RECIPES)}")
    for option, value in options.RECIPES[name].values.items():
        replaced = with_budget and option == "fraction"
        if not replaced and any(action.dest == option for action in command._actions):
            command.set_defaults(**{option: value})


def _apply_config(command: argparse.ArgumentParser, path: str) -> None:
    """Make the values of a YAML file the defaults of a command's options."""
    import fsspec
    import yaml

    try:
        with fsspec.open(path, "rt", encoding="utf-8") as stream:
            values = yaml.safe_load(stream) or {}
    except FileNotFoundError as error:
        raise UsageError(f"--config {path} does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"--config {path} is no valid YAML: {text}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold `option: value` lines")
    known = {action.dest: action for action in command._actions if action.option_strings}
    if values.get("budget") is not None and values.get("fraction") is None:
        command.set_defaults(fraction=None)  # the budget replaces the fraction of a recipe
    for name, value in values.items():
        action = known.get(str(name).replace("-", "_"))
        if action is None or action.dest in _NOT_IN_A_FILE:
            allowed = ", ".join(sorted(d for d in known if d not in _NOT_IN_A_FILE))
            nearest = _nearest(str(name).replace("-", "_"), known)
            raise UsageError(
                f"--config {path}: unknown option {name!r}{nearest}, allowed are {allowed}"
            )
        if value is None:
            continue  # `name:` without a value: not given
        command.set_defaults(**{action.dest: _from_yaml(action, value, f"--config {path}: {name}")})
        action.required = False


def _from_yaml(action: argparse.Action, value: Any, where: str) -> Any:
    """Convert a YAML value to the value that the command line would give. where: for messages."""
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{where} is {value!r}, allowed are true and false")
        return value
    many = action.nargs == "+" or isinstance(action.default, list)
    if isinstance(value, list | dict) and not (many and isinstance(value, list)):
        raise UsageError(f"{where} is {value!r}, allowed is one value")
    convert = action.type if callable(action.type) else str
    try:
        converted = [convert(str(v)) for v in (value if isinstance(value, list) else [value])]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{where} is {value!r}: {error}") from error
    return converted if many else converted[0]


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="d2filter",
        description="Filter an image-text pool with D2 Pruning: one exact ranking, every budget "
        "a prefix of it.",
    )
    parser.add_argument("--version", action="version", version=f"d2filter {__version__}")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, text: str, handler: Callable[[argparse.Namespace], None]) -> Any:
        added = sub.add_parser(name, help=text, description=text)
        added.set_defaults(handler=handler)
        commands[name] = added
        return added

    for name, text, groups in (
        (
            "embed",
            "embed shards: write OUT/metadata",
            (options.common, options.shards, options.device),
        ),
        (
            "graph",
            "build the kNN graph of a pool from its metadata",
            (
                options.common,
                options.recipe,
                options.metadata,
                options.catalog,
                options.graph,
                options.device,
                options.memory,
            ),
        ),
        (
            "rank",
            "rank a pool from its graph",
            (options.common, options.recipe, options.rank, options.rank_alone, options.memory),
        ),
        (
            "select",
            "write the subset of a budget, subset.npy, from a ranking",
            (options.common, options.recipe, options.select),
        ),
        (
            "run",
            "run all stages, from shards or metadata to subset.npy; resumes an earlier run",
            (
                options.common,
                options.recipe,
                options.metadata,
                options.shards,
                options.device,
                options.catalog,
                options.graph,
                options.rank,
                options.select,
                options.memory,
                options.report_of_run,
            ),
        ),
    ):
        added = command(name, text, _run_pipeline)
        for group in groups:
            group(added)
    showing = command(
        "demo", "draw a pool whose wrong pairs are known, filter it, and compare", _run_demo
    )
    showing.add_argument("--out-dir", default="d2filter-demo", help="folder for all files")
    showing.add_argument("--pairs", type=int, default=4200, help="number of pairs to draw")
    showing.add_argument("--seed", type=int, default=0, help="seed of the drawn pairs")
    packing = command("pack", "write shards from a folder of images with captions", _run_pack)
    packing.add_argument(
        "folder", metavar="FOLDER", help="folder with images such as X.png, and X.txt or X.json"
    )
    packing.add_argument(
        "--shards", required=True, metavar="OUT", help="empty folder for the new shards"
    )
    packing.add_argument(
        "--caption-lines",
        choices=["first", "all"],
        default="first",
        help="lines of each caption to use",
    )
    packing.add_argument("--shard-size", type=int, default=10000, help="pairs in a shard")
    sweeping = command(
        "sweep", "rank one graph with many settings and compare their measures", _run_sweep
    )
    options.sweep(sweeping)
    advising = command(
        "advise", "recommend k, gamma, copies and a budget for a pool, with reasons", _run_advise
    )
    advising.add_argument("out_dir", metavar="OUT", help="run directory with a finished graph")
    advising.add_argument(
        "--fraction",
        default="",
        help="share of the samples to keep (default: that of the run, or 0.3)",
    )
    resharding = command("reshard", "copy the kept samples into new shards", _run_reshard)
    options.reshard(resharding)
    looking = command("status", "show how far a run is and what is next", _run_status)
    looking.add_argument("out_dir", metavar="OUT", help="run directory")
    looking.add_argument("--json", action="store_true", help="print JSON, for programs")
    reporting = command("report", "write a page that shows what a run did to its pool", _run_report)
    options.report(reporting)
    planning = command("plan", "predict what a run would need on a cluster", _run_plan)
    options.plan(planning)
    explaining = command("explain", "explain why samples were kept or dropped", _run_explain)
    explaining.add_argument("out_dir", metavar="OUT", help="run directory")
    explaining.add_argument("uids", metavar="UID", nargs="+", help="uid of a sample, 32 hex digits")
    explaining.add_argument("--json", action="store_true", help="print JSON, for programs")
    checking = command("verify", "prove from a run's files that its result is right", _run_verify)
    checking.add_argument("out_dir", metavar="OUT", help="run directory")
    checking.add_argument(
        "--deep", action="store_true", help="read the input again too, and compare it"
    )
    return parser, commands


def _say(line: str) -> None:
    """Print one line on stdout, without secrets and without terminal control characters."""
    print(printable(scrubbed(line)), flush=True)


def _print_error(line: str) -> None:
    """Print one line on stderr, cleaned like `_say`."""
    print(printable(scrubbed(line)), file=sys.stderr, flush=True)


def _say_json(value: object) -> None:
    import json

    for line in json.dumps(scrubbed_in(value), indent=2, ensure_ascii=False).split("\n"):
        _say(line)


def _run_pipeline(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from d2filter.stages import pipeline

    chosen = options.run_config(arguments)
    chosen = replace(chosen, select=pipeline.default_selection(chosen.select))
    work = pipeline.Pipeline(chosen, say=_say)
    if arguments.dry_run:
        for line in [*work.preview(arguments.command), "nothing was changed (--dry-run)"]:
            _say(line)
        return

    wanted = arguments.command == "run" and arguments.report

    def then() -> None:
        _renew_report(work, wanted)
        _say_alerts(work)

    work.run(arguments.command, then=then)


def _say_alerts(work: Pipeline) -> None:
    from d2filter.tools import alerts

    for line in alerts.find(alerts.read(work.out)):
        _say(f"alert     {line}")


def _renew_report(work: Pipeline, wanted: bool) -> None:
    """Write the report if it is wanted, or if one exists, because it may show another subset."""
    if wanted or (work.state.reported() and work.state.done("select")):
        _write_report(work)


def _write_report(work: Pipeline) -> None:
    """Write the report, unless one of the same selection exists. A report of another selection is
    removed if no new one can be written.
    """
    from d2filter.tools import report

    if work.state.has_report(work.state.require("select")["fingerprint"]):
        _say("report    done before")
        return
    obstacle = report.obstacle(work.out)
    if obstacle:
        _say(f"report    left out: {obstacle}")
        work.state.drop_report()
        return
    try:
        _say(f"report    {report.report(work.out, say=_say)}")
    except Exception as error:  # of any kind: the run itself is finished, so only warn
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        _print_error(f"d2filter: warning: no report: {text}; `d2filter report OUT` tries again")
        work.state.drop_report()


def _run_report(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import report

    written = report.report(
        Folder(absolute(arguments.out_dir)),
        each=arguments.gallery,
        shards=[absolute(pattern) for pattern in arguments.shards or ()],
        say=_say,
    )
    _say(f"report    {written}")


def _run_demo(arguments: argparse.Namespace) -> None:
    from d2filter.tools import demo

    demo.demo(arguments.out_dir, pairs=arguments.pairs, seed=arguments.seed, say=_say)


def _run_pack(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from d2filter.formats.paths import Folder
    from d2filter.tools import pack

    shards = Folder(arguments.shards)
    packed = pack.pack(
        Path(arguments.folder),
        shards,
        caption_lines=arguments.caption_lines,
        shard_size=arguments.shard_size,
    )
    pack.summary(packed, shards, _say)


def _run_sweep(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import sweep

    given = {n: v for n, v in vars(arguments).items() if n in config.RankConfig.__slots__}
    folder = Folder(absolute(arguments.out_dir))
    rows = sweep.sweep(folder, sweep.grid(arguments.fraction, **given), _say)
    for line in ("", *sweep.table(rows)):
        _say(line)
    _say("")
    _say(f"all measures: {folder.where('sweep/table.csv')}  plot: {folder.where('sweep/plot.png')}")
    _say(f"`d2filter report {folder.url}` shows them beside the rest")


def _run_advise(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import advise

    folder = Folder(absolute(arguments.out_dir))
    found = advise.advise(folder, fraction=arguments.fraction, say=_say)
    for line in ("", *advise.table(found), "", f"all of it: {folder.where(advise.PAGE)}"):
        _say(line)


def _run_verify(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import verify

    verify.verify(Folder(absolute(arguments.out_dir)), _say, deep=arguments.deep)


def _run_reshard(arguments: argparse.Namespace) -> None:
    from d2filter.engine.runner import Runner
    from d2filter.formats import webdataset
    from d2filter.formats.paths import Folder, absolute
    from d2filter.stages.reshard import build as build_shards
    from d2filter.tools import keep, provenance

    chosen = build_shards.ReshardConfig(
        shard_size=arguments.shard_size,
        shuffle=arguments.shuffle,
        max_missing=arguments.max_missing,
    )
    subset = keep.load_subset(arguments.subset)
    kept = keep.load_kept(arguments.subset, subset)
    # the records of a run contain its shards
    patterns = arguments.shards or list(
        provenance.shards(Folder(absolute(arguments.subset))).values()
    )
    if not patterns:
        raise UsageError(f"no shards: {arguments.subset} names none, give --shards")
    shards = webdataset.list_shards([absolute(pattern) for pattern in patterns])
    out = Folder(absolute(arguments.out_dir))
    runner = Runner(out.sub(build_shards.STATE), arguments.address)
    try:
        figures = build_shards.reshard(runner, out, shards, subset, chosen, kept)
    finally:
        runner.close()
    _say(
        f"{figures['samples']:,} samples, {figures['bytes'] / 1e6:,.1f} MB, from {len(shards):,} "
        f"shards to {out.url}"
    )


def _run_plan(arguments: argparse.Namespace) -> None:
    from d2filter.tools import cost_model, plan

    pool, cluster, rates = plan.asked(arguments, _say if not arguments.json else _print_error)
    found = cost_model.estimate(pool, cluster, rates)
    if arguments.json:
        _say_json(plan.as_json(found))
    else:
        for line in plan.lines(found, pool, cluster, rates):
            _say(line)
    if found.refusals:
        raise UsageError(f"this cannot work: {'; '.join(found.refusals)}")


def _run_explain(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import explain

    found = explain.explain(Folder(absolute(arguments.out_dir)), arguments.uids)
    if arguments.json:
        _say_json(explain.as_json(found))
        return
    for number, one in enumerate(found):
        for line in [*([""] if number else []), *explain.lines(one)]:
            _say(line)


def _run_status(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import status

    found = status.read(Folder(absolute(arguments.out_dir)))
    if arguments.json:
        _say_json(status.as_json(found))
        return
    for line in status.lines(found):
        _say(line)
