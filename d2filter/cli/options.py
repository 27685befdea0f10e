"""Adds the options of each command to its parser, and builds the configuration from parsed options.

Most options are declared as fields of the configuration (`d2filter/options.py`). See
docs/settings.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from d2filter import config
from d2filter.algorithm.budget import parse_fraction
from d2filter.cli import values
from d2filter.cli.recipes import RECIPES
from d2filter.errors import UsageError
from d2filter.options import options_in


def common(parser: argparse.ArgumentParser) -> None:
    """Add the options of all commands that run stages."""
    group = parser.add_argument_group("where and how")
    add(group, config.RunConfig, "out_dir", "address", "max_bad", "overwrite", "heal")
    group.add_argument(
        "--dry-run", action="store_true", help="show what would be done, and change nothing"
    )
    group.add_argument(
        "--config", default="", help="YAML file with values of options, under the same names"
    )


def metadata(parser: argparse.ArgumentParser) -> None:
    add(parser, config.RunConfig, "metadata_dir")


def shards(parser: argparse.ArgumentParser) -> None:
    add(parser.add_argument_group("embedding"), config.EmbedConfig)


def device(parser: argparse.ArgumentParser) -> None:
    add(parser, config.RunConfig, "device")


def catalog(parser: argparse.ArgumentParser) -> None:
    add(parser.add_argument_group("samples"), config.CatalogConfig)


def graph(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("graph")
    add(group, config.GraphConfig)
    add(group, config.RunConfig, "best_effort", "partitions")


def memory(parser: argparse.ArgumentParser) -> None:
    add(parser, config.RunConfig, "memory_per_worker")


def rank(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ranking, but for those that `rank_alone` adds to `d2filter rank`."""
    names = [name for name in options_in(config.RankConfig) if name not in _RANK_ALONE]
    add(parser.add_argument_group("ranking"), config.RankConfig, *names)


def rank_alone(parser: argparse.ArgumentParser) -> None:
    add(parser, config.RankConfig, *_RANK_ALONE)


def select(parser: argparse.ArgumentParser) -> None:
    add(parser.add_argument_group("budget"), config.SelectConfig)


_RANK_ALONE = ("n_neighbors", "seed")  # options of the graph have the same names


def add(group: Any, part: Any, *names: str) -> None:
    """Add the options that a configuration class declares: all, or those with the given names.

    group: an ArgumentParser or one of its groups.
    """
    declared = options_in(part)
    for name in names or declared:
        one, default = declared[name]
        words: dict[str, Any] = {"help": one.help}
        if one.shown_default is not ...:
            words["default"] = one.shown_default
        elif default is dataclasses.MISSING:
            words["required"] = True
        else:
            words["default"] = default
        if one.kind == "flag":
            words["action"] = "store_true"
        elif one.kind == "yes or no":
            words["action"] = argparse.BooleanOptionalAction
        elif one.kind == "repeated":
            words |= {"action": "append", "default": list(default), "metavar": one.metavar}
        else:
            words |= {"type": values.CONVERTERS[one.kind], "metavar": one.metavar}
            words |= {"choices": one.choices} if one.choices else {}
            words |= {"nargs": "+"} if one.kind == "texts" else {}
            if one.without_value is not None:
                words |= {"nargs": "?", "const": one.without_value}
        group.add_argument(f"--{name.replace('_', '-')}", **words)


def recipe(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe`. Options that are given beside it take precedence."""
    parser.add_argument(
        "--recipe",
        default="",
        metavar="NAME",
        help="values of several options for one situation; options that you give take precedence:\n"
        + "\n".join(
            f"{name}: {one.summary} ("
            + ", ".join(f"{option} {value}" for option, value in one.values.items())
            + ")"
            for name, one in RECIPES.items()
        ),
    )


_SWEPT = (
    "method", "n_neighbors", "gamma", "tuned_for", "gamma_scale", "kernel", "forward", "reverse",
    "cut_hardest", "collapse_copies", "redundancy", "temperature",
)  # fmt: skip


def sweep(parser: argparse.ArgumentParser) -> None:
    """Add the options of `d2filter sweep`: those of the ranking, with lists of values."""
    parser.add_argument("out_dir", metavar="OUT", help="run directory with a finished graph")
    declared = options_in(config.RankConfig)
    for name in _SWEPT:
        one, default = declared[name]
        if name == "tuned_for":
            default = config.TUNED_FOR
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=values.comma_separated(values.CONVERTERS[one.kind]),
            default=str(default),
            metavar="LIST",
            help=f"some of {', '.join(one.choices)}"
            if one.choices
            else one.help.partition(" (default:")[0],
        )
    parser.add_argument(
        "--fraction", type=values.comma_separated(str), default="0.1,0.3,0.5", metavar="LIST",
        help="shares to keep, separated by commas like all lists of this command",
    )  # fmt: skip


def reshard(parser: argparse.ArgumentParser) -> None:
    """Add the options of `d2filter reshard`."""
    parser.add_argument(
        "--subset",
        required=True,
        metavar="RUN",
        help="run directory, whose samples are found by shard and key, or a subset as .npy, whose "
        "samples are found by uid",
    )
    parser.add_argument(
        "--shards",
        nargs="+",
        default=None,
        metavar="URL",
        help="shards to copy from (default: those that the run has embedded)",
    )
    parser.add_argument(
        "--out-dir", required=True, help="empty folder for the new shards: a path or an fsspec URL"
    )
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples in a new shard")
    parser.add_argument(
        "--shuffle",
        type=int,
        default=None,
        metavar="SEED",
        help="shuffle the samples with this seed (default: they stay in the order of the input)",
    )
    parser.add_argument(
        "--max-missing",
        type=float,
        default=0.0,
        help="share of the subset that may be missing from the shards; above it the exit code is 3",
    )
    parser.add_argument(
        "--address", default="", help="Ray cluster to join; empty: $RAY_ADDRESS, or start Ray here"
    )
    parser.add_argument(
        "--config", default="", help="YAML file with values of options, under the same names"
    )


def report(parser: argparse.ArgumentParser) -> None:
    """Add the options of `d2filter report`."""
    parser.add_argument("out_dir", metavar="OUT", help="run directory")
    parser.add_argument(
        "--gallery",
        type=int,
        default=None,
        metavar="N",
        help="pictures in a gallery, 0 for none; if given, pictures are also read from shards on "
        "other machines and from shards that only the metadata names (default: 12, from embedded "
        "shards at hand)",
    )
    parser.add_argument(
        "--shards",
        nargs="+",
        default=None,
        metavar="URL",
        help="shards with the pictures, for a run that began with metadata or whose shards were "
        "moved",
    )


def report_of_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write report.html at the end (default: yes)",
    )


def plan(parser: argparse.ArgumentParser) -> None:
    """Add the options of `d2filter plan`."""
    default = config.GraphConfig()
    group = parser.add_argument_group("pool")
    group.add_argument(
        "--samples",
        type=values.count,
        default=0,
        metavar="N",
        help="number of samples: 12800000, 12.8e6 or 12.8M",
    )
    group.add_argument("--dim", type=int, default=768, help="dimension of one embedding")
    group.add_argument(
        "--metadata-dir",
        default="",
        help="folder with the metadata of a real pool, to count and measure in place of --samples "
        "and --dim",
    )
    group.add_argument(
        "--arch",
        default=config.DEFAULT_ARCH,
        help="with --metadata-dir: name of the CLIP model whose embeddings are measured",
    )
    group.add_argument(
        "--feature-type",
        default="image|text",
        help="embeddings that make the graph: image|text, image or text",
    )
    group.add_argument(
        "--n-neighbors",
        type=int,
        default=default.n_neighbors,
        help="k, the number of neighbors of each sample",
    )
    group.add_argument("--fraction", default="0.3", help="share of the samples to keep")
    group.add_argument(
        "--shards", action="store_true", help="the run begins with shards, which are embedded"
    )
    group.add_argument(
        "--images-per-second", type=float, default=0.0, metavar="X",
        help="images that one GPU embeds in a second, or one node without GPUs",
    )  # fmt: skip
    group = parser.add_argument_group("cluster")
    group.add_argument("--nodes", type=int, default=1, help="number of equal nodes")
    group.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="CPUs of a node")
    group.add_argument("--gpus", type=int, default=0, help="GPUs of a node")
    group.add_argument(
        "--memory",
        type=values.size,
        default=16_000_000_000,
        metavar="SIZE",
        help="memory that Ray may use of a node, such as 512GB; `ray status` shows it",
    )
    group.add_argument(
        "--disk", type=values.size, default=0, help="space for the run directory, such as 40TB"
    )
    group.add_argument(
        "--storage-rate", type=values.size, default=0, metavar="SIZE",
        help="bytes that a node reads and writes in a second, such as 2GB (default: storage is no "
        "limit)",
    )  # fmt: skip
    group.add_argument(
        "--partitions",
        type=values.partitions,
        default=0,
        help="number of parts of the graph, or auto",
    )
    memory(parser)
    group = parser.add_argument_group("rates")
    group.add_argument(
        "--rates",
        default="",
        metavar="FILE",
        help="file with measured rates (default: those of 2 CPUs)",
    )
    group.add_argument(
        "--calibrate", action="store_true",
        help="measure the rates of this machine first, in about half a minute; with --rates, write "
        "them to that file",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run_config(arguments: argparse.Namespace) -> config.RunConfig:
    """The whole configuration for a command; options that the command lacks keep their defaults."""
    given = vars(arguments)

    def pick(part: Any, **special: Any) -> Any:
        # None is a value of collapse_copies only; of other options it means "not given"
        fields = {f: given[f] for f in part.__dataclass_fields__ if _is_given(given, f)}
        return part(**{**fields, **special})

    # the first of several fractions is for subset.npy
    fraction, *also = str(given.get("fraction") or "").split(",")
    shards = given.get("shards")
    if shards and given.get("metadata_dir"):
        raise UsageError("shards and metadata-dir are both given: name one of them")
    embed = pick(config.EmbedConfig, shards=_tuple(shards)) if shards else None
    special: dict[str, Any] = {"feature_keys": tuple(given.get("feature_keys") or ())}
    if embed is not None and not given.get("arch"):
        special["arch"] = embed.resolved_arch  # the catalog reads the embeddings of `embed`
    return config.RunConfig(
        out_dir=arguments.out_dir,
        metadata_dir=given.get("metadata_dir", ""),
        embed=embed,
        catalog=pick(config.CatalogConfig, **special),
        graph=pick(config.GraphConfig),
        rank=pick(config.RankConfig),
        select=pick(
            config.SelectConfig,
            fraction=parse_fraction(fraction) if fraction else None,
            also=tuple(str(parse_fraction(share.strip())) for share in also),
        ),
        max_bad=arguments.max_bad,
        best_effort=given.get("best_effort", False),
        partitions=given.get("partitions", 0),
        memory_per_worker=given.get("memory_per_worker", 0),
        address=arguments.address,
        device=given.get("device", "auto"),
        overwrite=tuple(arguments.overwrite),
        heal=arguments.heal,
    )


def _is_given(options: dict[str, Any], name: str) -> bool:
    return name in options and (options[name] is not None or name == "collapse_copies")


def _tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
