"""The command line (DESIGN §7). Every failure is one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from d2filter import __version__, config
from d2filter.algorithm import schemes
from d2filter.algorithm.budget import parse_fraction
from d2filter.errors import D2FilterError, UsageError

# heavy packages are imported by the command that needs them: `select` takes about a second


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", []) or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """argparse that fails with one line and never guesses at an abbreviated option."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def entry() -> NoReturn:
    """Console script."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        arguments.handler(arguments)
    except D2FilterError as error:
        print(f"d2filter: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        print(f"d2filter: error: {error.strerror or error}{place}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "d2filter: interrupted; run the same command again, it keeps what is done",
            file=sys.stderr,
        )
        return 130
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; options of --config stand in for those not given."""
    words = [_dashed(word) for word in argv]
    parser, commands = _parser()
    early = _Parser(add_help=False)
    early.add_argument("command", nargs="?")
    early.add_argument("--config", default="")
    known, _ = early.parse_known_args(words)
    if known.config and known.command in commands:
        _apply_config(commands[known.command], known.config)
    return parser.parse_args(words)


def _dashed(word: str) -> str:
    """--out_dir=x → --out-dir=x: underscores and dashes in option names are the same."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


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
    for name, value in values.items():
        action = known.get(str(name).replace("-", "_"))
        if action is None or action.dest in ("help", "config"):
            allowed = ", ".join(sorted(d for d in known if d not in ("help", "config")))
            raise UsageError(f"--config {path}: unknown option {name!r}, allowed are {allowed}")
        if value is None:
            continue  # `name:` without a value: not given
        command.set_defaults(**{action.dest: _from_yaml(action, value, f"--config {path}: {name}")})
        action.required = False


def _from_yaml(action: argparse.Action, value: Any, where: str) -> Any:
    """A YAML value as the command line would have made it."""
    if isinstance(action, argparse.BooleanOptionalAction):
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
        ("embed", "shards → metadata in OUT/metadata", (_common, _shards)),
        ("graph", "metadata → kNN graph", (_common, _metadata, _catalog, _graph, _memory)),
        ("rank", "graph → ranking", (_common, _rank, _memory)),
        ("select", "ranking → subset.npy for one budget", (_common, _select)),
        (
            "run",
            "shards or metadata → subset.npy, resuming what is there",
            (_common, _metadata, _shards, _catalog, _graph, _rank, _select, _memory),
        ),
    ):
        added = command(name, text, _run_pipeline)
        for group in groups:
            group(added)
    showing = command("demo", "draw a pool with planted truth, filter it, compare", _run_demo)
    showing.add_argument("--out-dir", default="d2filter-demo", help="where everything goes")
    showing.add_argument("--pairs", type=int, default=4200, help="pairs to draw")
    showing.add_argument("--seed", type=int, default=0, help="of the drawings")
    packing = command("pack", "folder of images with captions → shards", _run_pack)
    packing.add_argument("folder", metavar="FOLDER", help="X.png with X.txt or X.json beside it")
    packing.add_argument("--shards", required=True, metavar="OUT", help="empty folder to write to")
    packing.add_argument(
        "--caption-lines",
        choices=["first", "all"],
        default="first",
        help="lines of a caption to take",
    )
    packing.add_argument("--shard-size", type=int, default=10000, help="pairs in a shard")
    checking = command("verify", "prove from a run's files that it is right", _run_verify)
    checking.add_argument("out_dir", metavar="OUT", help="run directory")
    return parser, commands


def _common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where and how")
    group.add_argument("--out-dir", required=True, help="run directory: a path or an fsspec URL")
    group.add_argument("--address", default="", help="Ray cluster to join; empty: start Ray here")
    group.add_argument(
        "--max-bad", type=float, default=0.01, help="share of bad samples that still exits with 0"
    )
    group.add_argument(
        "--overwrite",
        action="append",
        default=[],
        metavar="STAGE",
        help="make this stage of the command, and all after it, anew",
    )
    group.add_argument("--config", default="", help="YAML file with the same option names")


def _metadata(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metadata-dir", default="", help="folder of NAME.parquet + NAME.npz pairs"
    )


def _shards(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("embedding")
    group.add_argument(
        "--shards",
        nargs="+",
        default=None,
        metavar="URL",
        help="WebDataset shards: .tar files, folders of them, 'quoted/{00000..00099}.tar'",
    )
    group.add_argument(
        "--model",
        default=config.BUNDLED_MODEL,
        help="open_clip model; the bundled one is for trying out, real work wants "
        "--model ViT-L-14 --pretrained openai",
    )
    group.add_argument("--pretrained", default="", help="open_clip tag or path to weights")
    group.add_argument("--precision", default="fp32", help=", ".join(config.PRECISIONS))
    group.add_argument("--batch-size", type=int, default=64, help="images in a forward pass")


def _catalog(parser: argparse.ArgumentParser) -> None:
    default = config.CatalogConfig()
    group = parser.add_argument_group("samples")
    group.add_argument(
        "--arch",
        default=None,
        help="reads ARCH_img, ARCH_txt, clip_ARCH_similarity_score "
        f"(default: that of --model with --shards, else {default.arch})",
    )
    group.add_argument("--score-column", default="", help="parquet column with the difficulty")
    group.add_argument(
        "--feature-type", default=default.feature_type, help="image|text, image or text"
    )
    group.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=default.normalize,
        help="L2-normalize each embedding (default: yes)",
    )


def _graph(parser: argparse.ArgumentParser) -> None:
    default = config.GraphConfig()
    group = parser.add_argument_group("graph")
    group.add_argument("--n-neighbors", type=int, default=default.n_neighbors, help="k")
    group.add_argument(
        "--target-recall", type=float, default=default.target_recall, help="recall@k to reach"
    )
    group.add_argument(
        "--exact-below",
        type=int,
        default=default.exact_below,
        help="compare all with all up to this many distinct rows",
    )
    group.add_argument("--seed", type=int, default=default.seed, help="of the uid hashes")
    group.add_argument(
        "--best-effort",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="exit with 0 although the target recall is out of reach (default: no)",
    )
    group.add_argument(
        "--partitions",
        type=_partitions,
        default=0,
        metavar="N",
        help="auto, or a number: parts that the graph is made in; never changes the result "
        "(default: auto, as few as memory allows)",
    )


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-per-worker",
        type=_bytes,
        default=0,
        metavar="SIZE",
        help="what a task may use, 1GB or 800MiB (default: the node's share)",
    )


def _partitions(text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, allowed are auto and whole numbers from 1")
    return int(text)


def _bytes(text: str) -> int:
    try:
        return config.parse_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, allowed is a size: 1GB, 800MiB, 2e9") from None


def _rank(parser: argparse.ArgumentParser) -> None:
    default = config.RankConfig()
    group = parser.add_argument_group("ranking")
    group.add_argument(
        "--gamma", type=float, default=default.gamma, help="kernel width: weight = exp(-gamma·d²)"
    )
    group.add_argument(
        "--gamma-forward", type=float, default=None, help="of the forward pass, if another"
    )
    for name, choices, text in (
        ("kernel", schemes.KERNELS, "rbf: of the squared distance; exp: exp(-gamma·d)"),
        ("forward", schemes.FORWARD, "how a score takes in those of its neighbors"),
        (
            "reverse",
            schemes.REVERSE,
            "what a kept sample takes from its neighbors: its weighted score, all of it, nothing",
        ),
    ):
        group.add_argument(f"--{name}", choices=choices, default=getattr(default, name), help=text)
    group.add_argument(
        "--undirected", action="store_true", help="edges count both ways, as in the paper"
    )


def _select(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget")
    group.add_argument("--fraction", default=None, help="share to keep (default: 0.3)")
    group.add_argument("--budget", type=int, default=None, help="number of samples to keep")
    group.add_argument(
        "--min-score", type=float, default=None, help="drop lower raw scores within the budget"
    )


def run_config(arguments: argparse.Namespace) -> config.RunConfig:
    """The whole configuration of a command; options that it does not have keep their defaults."""
    given = vars(arguments)

    def pick(part: Any, **special: Any) -> Any:
        fields = {f: given[f] for f in part.__dataclass_fields__ if given.get(f) is not None}
        return part(**{**fields, **special})

    fraction = given.get("fraction")
    shards = given.get("shards")
    if shards and given.get("metadata_dir"):
        raise UsageError("shards and metadata-dir are both given: name one of them")
    embed = pick(config.EmbedConfig, shards=_tuple(shards)) if shards else None
    special = {}
    if embed is not None and not given.get("arch"):
        special["arch"] = embed.resolved_arch  # the catalog reads what `embed` writes
    return config.RunConfig(
        out_dir=arguments.out_dir,
        metadata_dir=given.get("metadata_dir", ""),
        embed=embed,
        catalog=pick(config.CatalogConfig, **special),
        graph=pick(config.GraphConfig),
        rank=pick(config.RankConfig),
        select=pick(
            config.SelectConfig,
            fraction=None if fraction is None else parse_fraction(fraction),
        ),
        max_bad=arguments.max_bad,
        best_effort=given.get("best_effort", False),
        partitions=given.get("partitions", 0),
        memory_per_worker=given.get("memory_per_worker", 0),
        address=arguments.address,
        overwrite=tuple(arguments.overwrite),
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _run_pipeline(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from d2filter.stages import pipeline

    chosen = run_config(arguments)
    chosen = replace(chosen, select=pipeline.default_selection(chosen.select))
    pipeline.Pipeline(chosen, say=_say).run(arguments.command)


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


def _run_verify(arguments: argparse.Namespace) -> None:
    from d2filter.formats.paths import Folder
    from d2filter.tools import verify

    verify.verify(Folder(arguments.out_dir), _say)
