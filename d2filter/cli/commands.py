"""Defines the commands: their options, and the function that each one runs.

Each command imports the heavy packages that it needs, so that `select` takes about a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from d2filter import __version__, config
from d2filter.cli import options
from d2filter.cli.printing import print_error, say, say_json
from d2filter.errors import UsageError

if TYPE_CHECKING:
    from d2filter.stages.pipeline import Pipeline


class Help(argparse.ArgumentDefaultsHelpFormatter):
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


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UsageError, and that refuses abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Help, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and the parsers of its commands by name."""
    parser = Parser(
        prog="d2filter",
        description="Filter an image-text pool with D2 Pruning: one exact ranking, every budget "
        "a prefix of it.",
    )
    parser.add_argument("--version", action="version", version=f"d2filter {__version__}")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, Parser] = {}

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


def _run_pipeline(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from d2filter.stages import pipeline

    chosen = options.run_config(arguments)
    chosen = replace(chosen, select=pipeline.default_selection(chosen.select))
    work = pipeline.Pipeline(chosen, say=say)
    if arguments.dry_run:
        for line in [*work.preview(arguments.command), "nothing was changed (--dry-run)"]:
            say(line)
        return

    wanted = arguments.command == "run" and arguments.report

    def then() -> None:
        _renew_report(work, wanted)
        _say_alerts(work)

    work.run(arguments.command, then=then)


def _say_alerts(work: Pipeline) -> None:
    from d2filter.tools import alerts

    for line in alerts.find(alerts.read(work.out)):
        say(f"alert     {line}")


def _renew_report(work: Pipeline, wanted: bool) -> None:
    """Write the report if it is wanted, or if one exists, because it may show another subset."""
    if wanted or (work.state.reported() and work.state.done("select")):
        write_report(work)


def write_report(work: Pipeline) -> None:
    """Write the report, unless one of the same selection exists. A report of another selection is
    removed if no new one can be written.
    """
    from d2filter.tools import report

    if work.state.has_report(work.state.require("select")["fingerprint"]):
        say("report    done before")
        return
    obstacle = report.obstacle(work.out)
    if obstacle:
        say(f"report    left out: {obstacle}")
        work.state.drop_report()
        return
    try:
        say(f"report    {report.report(work.out, say=say)}")
    except Exception as error:  # of any kind: the run itself is finished, so only warn
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        print_error(f"d2filter: warning: no report: {text}; `d2filter report OUT` tries again")
        work.state.drop_report()


def _run_report(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import report

    written = report.report(
        Folder(absolute(arguments.out_dir)),
        each=arguments.gallery,
        shards=[absolute(pattern) for pattern in arguments.shards or ()],
        say=say,
    )
    say(f"report    {written}")


def _run_demo(arguments: argparse.Namespace) -> None:
    from d2filter.tools import demo

    demo.demo(arguments.out_dir, pairs=arguments.pairs, seed=arguments.seed, say=say)


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
    pack.summary(packed, shards, say)


def _run_sweep(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import sweep

    given = {n: v for n, v in vars(arguments).items() if n in config.RankConfig.__slots__}
    folder = Folder(absolute(arguments.out_dir))
    rows = sweep.sweep(folder, sweep.grid(arguments.fraction, **given), say)
    for line in ("", *sweep.table(rows)):
        say(line)
    say("")
    say(f"all measures: {folder.where(sweep.TABLE)}  plots: {folder.where(sweep.PAGE)}")
    say(f"`d2filter report {folder.url}` adds them to the report")


def _run_advise(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import advise

    folder = Folder(absolute(arguments.out_dir))
    found = advise.advise(folder, fraction=arguments.fraction, say=say)
    for line in ("", *advise.table(found), "", f"all of it: {folder.where(advise.PAGE)}"):
        say(line)


def _run_verify(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import verify

    verify.verify(Folder(absolute(arguments.out_dir)), say, deep=arguments.deep)


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
        raise UsageError(f"{arguments.subset} does not name its shards: give --shards")
    shards = webdataset.list_shards([absolute(pattern) for pattern in patterns])
    out = Folder(absolute(arguments.out_dir))
    runner = Runner(out.sub(build_shards.STATE), arguments.address)
    try:
        figures = build_shards.reshard(runner, out, shards, subset, chosen, kept)
    finally:
        runner.close()
    say(
        f"{figures['samples']:,} samples, {figures['bytes'] / 1e6:,.1f} MB, from {len(shards):,} "
        f"shards to {out.url}"
    )


def _run_plan(arguments: argparse.Namespace) -> None:
    from d2filter.tools import cost_model, plan

    pool, cluster, rates = plan.inputs(arguments, say if not arguments.json else print_error)
    found = cost_model.estimate(pool, cluster, rates)
    if arguments.json:
        say_json(plan.as_json(found))
    else:
        for line in plan.lines(found, pool, cluster, rates):
            say(line)
    if found.refusals:
        raise UsageError(f"this cannot work: {'; '.join(found.refusals)}")


def _run_explain(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import explain

    found = explain.explain(Folder(absolute(arguments.out_dir)), arguments.uids)
    if arguments.json:
        say_json(explain.as_json(found))
        return
    for number, one in enumerate(found):
        for line in [*([""] if number else []), *explain.lines(one)]:
            say(line)


def _run_status(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder, absolute
    from d2filter.tools import status

    found = status.read(Folder(absolute(arguments.out_dir)))
    if arguments.json:
        say_json(status.as_json(found))
        return
    for line in status.lines(found):
        say(line)
