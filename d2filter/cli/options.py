"""The options of the commands, in groups, and the configuration that they make.

See docs/settings.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from d2filter import config
from d2filter.algorithm import by_class
from d2filter.algorithm.budget import parse_fraction
from d2filter.algorithm.greedy import schemes
from d2filter.algorithm.methods import selectors
from d2filter.algorithm.scores import registry as scores
from d2filter.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Options for one situation."""

    summary: str
    """what it is for"""
    values: dict[str, Any]


RECIPES = {
    "datacomp": Recipe(
        summary="as published for DataComp",
        values={
            "feature_type": "image|text",
            "n_neighbors": 1,
            "gamma": 1.0,
            "kernel": "rbf",
            "collapse_copies": None,
            "fraction": "0.3",
        },
    ),
    # what jobs/results/gamma_rules.md found best
    "web": Recipe(
        summary="image-text pairs from the web: the setting fits itself to the pool and the budget",
        values={
            "feature_type": "image|text",
            "n_neighbors": 10,
            "gamma": config.AUTO,
            "kernel": "local",
            "collapse_copies": config.AUTO,
            "fraction": "0.3",
        },
    ),
    # what jobs/results/bench_cifar_cuda.md and bench_supervised.md found best
    "labels": Recipe(
        summary="classes, with wrong labels or without, and a score that puts hard samples first",
        values={
            "n_neighbors": 10,
            "gamma": config.AUTO,
            "kernel": "rbf",
            "collapse_copies": None,
            "cut_hardest": config.AUTO,
        },
    ),
    "text": Recipe(
        summary="texts with classes, when few are kept",
        values={
            "n_neighbors": 10,
            "gamma": 0.1,
            "kernel": "rbf",
            "gamma_scale": "median",
            "collapse_copies": None,
            "cut_hardest": Decimal("0.2"),
        },
    ),
}


def common(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument(
        "--heal", action="store_true",
        help="make again what was damaged (see verify) and embed shards that changed, and all that "
        "follows from them",
    )  # fmt: skip
    group.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and change nothing"
    )
    group.add_argument("--config", default="", help="YAML file with the same option names")


def metadata(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metadata-dir", default="", help="folder of NAME.parquet + NAME.npz pairs"
    )


def shards(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument(
        "--fast-decode", action="store_true",
        help="decode large JPEGs at a part of their size, at least twice the model's input",
    )  # fmt: skip
    group.add_argument(
        "--max-pixels", type=int, default=config.MAX_PIXELS, metavar="N",
        help="larger pictures are bad; each pixel may take 20 bytes of memory (default: Pillow's "
        "own limit)",
    )  # fmt: skip
    group.add_argument(
        "--alpha", choices=config.ALPHAS, default="drop",
        help="what is seen through transparent pixels: white, black, or the colors that the file "
        "holds there (drop), as in open_clip's training",
    )  # fmt: skip
    group.add_argument(
        "--device",
        choices=config.DEVICES,
        default="auto",
        help="auto: GPUs where the cluster has any; cuda: GPUs, or not at all; for the graph too",
    )


def catalog(parser: argparse.ArgumentParser) -> None:
    default = config.CatalogConfig()
    group = parser.add_argument_group("samples")
    group.add_argument(
        "--arch",
        default=None,
        help="reads ARCH_img, ARCH_txt, clip_ARCH_similarity_score "
        f"(default: that of --model with --shards, else {default.arch})",
    )
    group.add_argument(
        "--score-column", default="", help="column with the difficulty, of the parquet files or of "
        "--score-file",
    )  # fmt: skip
    group.add_argument(
        "--score-file", default="", metavar="FILE",
        help="scores from elsewhere: .parquet or .csv with uid and columns, or a folder of them; "
        "--score-column chooses one",
    )  # fmt: skip
    group.add_argument(
        "--within", default="", metavar="SUBSET",
        help="rank only samples of this subset: a .npy of (u8, u8), or a run directory",
    )  # fmt: skip
    group.add_argument(
        "--score",
        default="",
        metavar="SCORE",
        help="a name, or a sum such as 0.7*clip_score+0.3*column-rank(el2n) of raw values, or of "
        "percentile ranks where scales differ; high goes first in a sum; a name is a column of "
        "--score-file or of the parquet files, or computed:\n"
        + "\n".join(
            f"{one.name}: {one.summary}; high is {one.meaning}, {one.kept_first} goes first"
            for one in scores.SCORES.values()
        ),
    )
    group.add_argument(
        "--group-column",
        default="",
        help="parquet column with classes: neighbors are of the same class, and every budget gives "
        "each class its share",
    )
    group.add_argument(
        "--keep-first",
        choices=["high", "low"],
        default="",
        help="which end of the score goes first; low turns its sign in the run's files, not for "
        "--min-score (default: the score's own, high of a column)",
    )
    group.add_argument(
        "--clip-scores", type=_share, default=default.clip_scores, metavar="SHARE",
        help="of this share of the samples at each end, 0.001 for example, the score becomes that "
        "of the next sample inside: for scores such as -9999 that leave all others equal",
    )  # fmt: skip
    group.add_argument(
        "--score-target", default="", metavar="FILE",
        help="of norm_sim: .npy (t, d), or .npz with ARCH_img, of a target set",
    )  # fmt: skip
    group.add_argument(
        "--score-batch", type=int, default=default.score_batch, help="of negclip_loss: pairs"
    )
    group.add_argument(
        "--score-rounds", type=int, default=default.score_rounds,
        help="of negclip_loss: random batchings that are averaged",
    )  # fmt: skip
    group.add_argument(
        "--training-log", default="", metavar="FILE",
        help="of scores from training: .parquet, or a folder of them, with uid, epoch, label, and "
        "probabilities or logits",
    )  # fmt: skip
    group.add_argument(
        "--feature-type", default=default.feature_type, help="image|text, image or text"
    )
    group.add_argument(
        "--feature-keys",
        nargs="+",
        default=(),
        metavar="KEY",
        help="npz keys that make the graph in place of ARCH_img and ARCH_txt: any embeddings",
    )
    group.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=default.normalize,
        help="L2-normalize each embedding (default: yes)",
    )


def graph(parser: argparse.ArgumentParser) -> None:
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


def memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-per-worker",
        type=_bytes,
        default=0,
        metavar="SIZE",
        help="what a task may use, 1GB or 800MiB (default: the node's share)",
    )


def recipe(parser: argparse.ArgumentParser) -> None:
    """Named settings; what is given beside them counts."""
    parser.add_argument(
        "--recipe",
        default="",
        metavar="NAME",
        help="options for a situation, where they are not given:\n"
        + "\n".join(
            f"{name}: {one.summary} ("
            + ", ".join(f"{option.replace('_', '-')} {v}" for option, v in one.values.items())
            + ")"
            for name, one in RECIPES.items()
        ),
    )


def rank_alone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--n-neighbors",
        type=int,
        default=None,
        help="neighbors of each list that count (default: all that the graph has)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the hashes that a method uses")


def _share(text: str, allowed: str = "allowed is") -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise argparse.ArgumentTypeError(f"{text!r}, {allowed} a number such as 0.4") from None


def _cut(text: str) -> Any:
    return text if text == config.AUTO else _share(text, "allowed are auto and")


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


def rank(parser: argparse.ArgumentParser) -> None:
    default = config.RankConfig()
    group = parser.add_argument_group("ranking")
    group.add_argument(
        "--method",
        choices=config.METHODS,
        default=default.method,
        metavar="NAME",
        help="d2, or one to compare it with:\n"
        + "\n".join(
            f"{name}: {one.summary}; up to {one.most:,} samples"
            for name, one in selectors.SELECTORS.items()
        ),
    )
    group.add_argument(
        "--gamma", type=_gamma, default=default.gamma, metavar="X",
        help="how close is close: a number, or auto, which fits it to the budget and the pool "
        f"(default: {default.gamma})",
    )  # fmt: skip
    group.add_argument(
        "--tuned-for", type=_share, default=None, metavar="SHARE",
        help="kept share that --gamma auto is for (default: that of --fraction or --budget)",
    )  # fmt: skip
    group.add_argument(
        "--gamma-forward", type=float, default=None, help="of the forward pass, if another"
    )
    for name, choices, text in (
        (
            "kernel",
            schemes.KERNELS,
            "weight of an edge: local: exp(-gamma·x²), x: squared distance in units of those to "
            "the k-th neighbors of both ends; rbf: exp(-gamma·d²); exp: exp(-gamma·d)",
        ),
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
    group.add_argument(
        "--gamma-scale",
        choices=config.GAMMA_SCALES,
        default=default.gamma_scale,
        help="median: gamma is for distances in units of the pool's median between neighbors, so "
        "that it means the same for any encoder; the unit grows with k",
    )
    group.add_argument(
        "--group-budgets",
        choices=by_class.BUDGETS,
        default=default.group_budgets,
        help="shares of the classes, where there are any: as large as they are, or all alike",
    )
    group.add_argument(
        "--cut-hardest",
        type=_cut,
        default=default.cut_hardest,
        metavar="SHARE",
        help="rank this share of the samples, hardest first, after everything else, because wrong "
        "labels are among them; auto fits the share to the budget and the scores",
    )
    group.add_argument(
        "--collapse-copies",
        type=_copies,
        nargs="?",
        const=0.0,
        default=default.collapse_copies,
        metavar="SQDIST",
        help="of neighbors up to this squared distance (0: identical; auto: with d2 1/20 of the "
        "pool's median to the k-th neighbor; none) the best one stays, the others rank after "
        f"everything else (default: {default.collapse_copies})",
    )
    group.add_argument(
        "--redundancy", type=float, default=default.redundancy, metavar="LAMBDA",
        help="of --method infomax: what likeness to a kept sample costs, in units of the scores' "
        f"range, 0 (score alone) to 16 (default: {default.redundancy:g})",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=float, default=default.temperature, metavar="TAU",
        help="of --method density: the higher, the more alike are the shares of clusters in a "
        f"budget (default: {default.temperature:g})",
    )  # fmt: skip


def select(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget")
    group.add_argument(
        "--fraction",
        default=None,
        help="share to keep; several, as 0.3,0.1,0.2: subset.npy is the first, and each has a file "
        "in subsets/ (default: 0.3)",
    )
    group.add_argument("--budget", type=int, default=None, help="number of samples to keep")
    group.add_argument(
        "--min-score", type=float, default=None,
        help="drop samples of a lower score within the budget: the score as the metadata has it, "
        "whichever end is kept first",
    )  # fmt: skip
    group.add_argument(
        "--soft", type=float, nargs="?", const=0.1, default=None, metavar="TEMPERATURE",
        help="repeat samples by their score: the budget counts repeats, and a score higher by this "
        "share of the scores' range is worth one more copy (without a number: 0.1)",
    )  # fmt: skip


def sweep(parser: argparse.ArgumentParser) -> None:
    default = config.RankConfig()
    parser.add_argument("out_dir", metavar="OUT", help="run directory with a finished graph")
    many: list[tuple[str, Callable[[str], Any], str, str]] = [
        ("--method", str, default.method, f"some of {', '.join(config.METHODS)}"),
        ("--n-neighbors", int, "0", "k, up to that of the graph; 0: all it has"),
        ("--gamma", _gamma, f"{default.gamma}", "kernel widths, or auto"),
        ("--tuned-for", Decimal, str(config.TUNED_FOR), "kept shares that --gamma auto is for"),
        ("--gamma-scale", str, default.gamma_scale, f"some of {', '.join(config.GAMMA_SCALES)}"),
        ("--kernel", str, default.kernel, f"some of {', '.join(schemes.KERNELS)}"),
        ("--forward", str, default.forward, f"some of {', '.join(schemes.FORWARD)}"),
        ("--reverse", str, default.reverse, f"some of {', '.join(schemes.REVERSE)}"),
        ("--cut-hardest", _cut, "0", "shares that rank last, or auto"),
        (
            "--collapse-copies",
            _copies,
            f"{default.collapse_copies}",
            "squared distances of copies, auto or none",
        ),
        ("--redundancy", float, f"{default.redundancy:g}", "of infomax"),
        ("--temperature", float, f"{default.temperature:g}", "of density"),
        ("--fraction", str, "0.1,0.3,0.5", "budgets"),
    ]
    for name, convert, given, text in many:
        parser.add_argument(
            name,
            type=_comma_separated(convert),
            default=given,
            metavar="LIST",
            help=f"{text}, separated by commas",
        )


def reshard(parser: argparse.ArgumentParser) -> None:
    """Of the command that copies kept samples."""
    parser.add_argument(
        "--subset",
        required=True,
        metavar="RUN",
        help="run directory (samples go by shard and key), or a subset as .npy (they go by uid)",
    )
    parser.add_argument(
        "--shards",
        nargs="+",
        default=None,
        metavar="URL",
        help="the shards to copy from (default: those that the run has embedded)",
    )
    parser.add_argument("--out-dir", required=True, help="empty folder: a path or an fsspec URL")
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples in a new shard")
    parser.add_argument(
        "--shuffle",
        type=int,
        default=None,
        metavar="SEED",
        help="mix the samples (default: they stay in the order of the input)",
    )
    parser.add_argument(
        "--max-missing",
        type=float,
        default=0.0,
        help="share of the subset that may be in none of the shards; above it the exit code is 3",
    )
    parser.add_argument("--address", default="", help="Ray cluster to join; empty: start Ray here")
    parser.add_argument("--config", default="", help="YAML file with the same option names")


def report(parser: argparse.ArgumentParser) -> None:
    """Of the command that writes report.html."""
    parser.add_argument("out_dir", metavar="OUT", help="run directory")
    parser.add_argument(
        "--gallery",
        type=int,
        default=None,
        metavar="N",
        help="pictures in a gallery, 0 for none; given, shards on other machines, and those that "
        "only the metadata names, are read for them (default: 12, from embedded shards at hand)",
    )
    parser.add_argument(
        "--shards",
        nargs="+",
        default=None,
        metavar="URL",
        help="where the pictures are, of a run that was given metadata or whose shards were moved",
    )


def report_of_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write report.html at the end (default: yes)",
    )


def plan(parser: argparse.ArgumentParser) -> None:
    """Of the command that predicts."""
    default = config.GraphConfig()
    group = parser.add_argument_group("pool")
    group.add_argument(
        "--samples", type=_count, default=0, metavar="N", help="12800000, 12.8e6 or 12.8M"
    )
    group.add_argument("--dim", type=int, default=768, help="of one embedding")
    group.add_argument(
        "--metadata-dir", default="", help="count and measure the rows of a real pool instead"
    )
    group.add_argument(
        "--arch", default=config.DEFAULT_ARCH, help="of --metadata-dir: which embeddings"
    )
    group.add_argument("--feature-type", default="image|text", help="image|text, image or text")
    group.add_argument("--n-neighbors", type=int, default=default.n_neighbors, help="k")
    group.add_argument("--fraction", default="0.3", help="share that is kept")
    group.add_argument(
        "--shards", action="store_true", help="it begins with shards, which are embedded"
    )
    group.add_argument(
        "--images-per-second", type=float, default=0.0, metavar="X",
        help="that one GPU embeds, or a node without",
    )  # fmt: skip
    group = parser.add_argument_group("cluster")
    group.add_argument("--nodes", type=int, default=1, help="of one kind")
    group.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="of a node")
    group.add_argument("--gpus", type=int, default=0, help="of a node")
    group.add_argument("--memory", type=_bytes, default=16_000_000_000, help="of a node: 512GB")
    group.add_argument("--disk", type=_bytes, default=0, help="room for the run directory: 40TB")
    group.add_argument(
        "--storage-rate", type=_bytes, default=0, metavar="SIZE",
        help="that a node reads and writes in a second: 2GB (default: storage keeps up)",
    )  # fmt: skip
    group.add_argument("--partitions", type=_partitions, default=0, help="auto, or a number")
    memory(parser)
    group = parser.add_argument_group("rates")
    group.add_argument(
        "--rates", default="", metavar="FILE", help="measured rates (default: those of 2 CPUs)"
    )
    group.add_argument(
        "--calibrate", action="store_true",
        help="measure rates on this machine first, in about half a minute, into --rates if given",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs")


def _count(text: str) -> int:
    word = text.strip().replace(",", "").replace("_", "")
    times = {"k": 10**3, "m": 10**6, "b": 10**9}.get(word[-1:].lower(), 1)
    try:
        value = Decimal(word if times == 1 else word[:-1]) * times
        whole = value.is_finite() and 1 <= value <= 10**15 and value == int(value)
    except InvalidOperation:
        whole = False
    if not whole:
        raise argparse.ArgumentTypeError(
            f"{text!r}, allowed is a whole number: 12800000, 12.8e6 or 12.8M (K, M, B)"
        )
    return int(value)


def _comma_separated(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def values(text: str) -> list[Any]:
        try:
            return [convert(word.strip()) for word in text.split(",")]
        except (ValueError, InvalidOperation, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(
                f"{text!r}, allowed are values separated by commas"
            ) from None

    return values


def _copies(text: str) -> float | str | None:
    if text in ("none", "auto"):
        return None if text == "none" else text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}, allowed are auto, none and a squared distance such as 0.01"
        ) from None


def _gamma(text: str) -> float | str:
    if text == config.AUTO:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, allowed are a number and auto") from None


def run_config(arguments: argparse.Namespace) -> config.RunConfig:
    """The whole configuration of a command; options that it does not have keep their defaults."""
    given = vars(arguments)

    def pick(part: Any, **special: Any) -> Any:
        # none is a value of copies only, elsewhere it means that nothing was said
        fields = {f: given[f] for f in part.__dataclass_fields__ if _is_given(given, f)}
        return part(**{**fields, **special})

    # the first of several is that of subset.npy
    fraction, *also = str(given.get("fraction") or "").split(",")
    shards = given.get("shards")
    if shards and given.get("metadata_dir"):
        raise UsageError("shards and metadata-dir are both given: name one of them")
    embed = pick(config.EmbedConfig, shards=_tuple(shards)) if shards else None
    special: dict[str, Any] = {"feature_keys": tuple(given.get("feature_keys") or ())}
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
