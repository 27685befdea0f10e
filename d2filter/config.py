"""Configuration is data: frozen dataclasses, checked on construction.

A stage's fingerprint covers the fields of its own dataclass and the fingerprint of its input
(docs/files.md#records-and-fingerprints). Where a run happens (address, workers) is in `RunConfig`
and never counts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, cast

from d2filter.algorithm import by_class, uids
from d2filter.algorithm.budget import parse_fraction
from d2filter.algorithm.greedy import auto_settings, demoted, schemes
from d2filter.algorithm.methods import selectors, submodular
from d2filter.checks import at_least, finite, whole
from d2filter.errors import UsageError
from d2filter.formats.reading import DEFAULT_ARCH as DEFAULT_ARCH
from d2filter.formats.reading import CatalogConfig as CatalogConfig
from d2filter.models import BUNDLED_MODEL as BUNDLED_MODEL
from d2filter.options import option

METHODS = ("d2", *selectors.SELECTORS)
GAMMA_SCALES = ("none", "median")
AUTO: Literal["auto"] = "auto"
TUNED_FOR = Decimal("0.3")  # where nothing says which budget a ranking is for
DEVICES = ("auto", "cpu", "cuda")
ALPHAS = ("drop", "white", "black")
PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp", "amp_bf16")
LEAST_MEMORY = 700_000_000  # of a worker: half of it is taken before it holds a sample
MAX_PIXELS = 89_478_485  # Pillow's own limit

# names that DataComp's metadata gives to open_clip's models
_ARCH_OF_MODEL = {"ViT-L-14": "l14", "ViT-B-32": "b32", BUNDLED_MODEL: "tiny"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedConfig:
    """Shards → metadata."""

    shards: tuple[str, ...] = option(
        ...,
        "WebDataset shards: .tar files, folders of them, 'quoted/{00000..00099}.tar', on any "
        "fsspec URL",
        "texts",
        metavar="URL",
        shown_default=None,
    )
    model: str = option(
        BUNDLED_MODEL,
        "open_clip model; the bundled one is for trying out, real work wants --model ViT-L-14 "
        "--pretrained openai",
    )
    pretrained: str = option("", "open_clip tag or path to weights")
    precision: str = option("fp32", ", ".join(PRECISIONS))
    # part of the fingerprint: a shape can change the last bits
    batch_size: int = option(64, "images in a forward pass", "whole number")
    fast_decode: bool = option(
        False,
        "decode large JPEGs at a part of their size, at least twice the model's input",
        "flag",
    )
    max_pixels: int = option(
        MAX_PIXELS,
        "larger pictures are bad; each pixel may take 20 bytes of memory (default: Pillow's own "
        "limit)",
        "whole number",
        metavar="N",
    )
    alpha: str = option(
        "drop",
        "what is seen through transparent pixels: white, black, or the colors that the file holds "
        "there (drop), as in open_clip's training",
        choices=ALPHAS,
    )
    arch: str = ""
    """NAME in NAME_img, NAME_txt, clip_NAME_similarity_score; empty: from the model's name"""

    def __post_init__(self) -> None:
        at_least("batch-size", self.batch_size, 1)
        at_least("max-pixels", self.max_pixels, 1)
        if self.alpha not in ALPHAS:
            raise UsageError(f"alpha is {self.alpha!r}, allowed are {', '.join(ALPHAS)}")
        if not self.shards:
            raise UsageError("shards is empty: --shards 'data/{00000..00099}.tar' or a folder")
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"precision is {self.precision!r}, allowed are {', '.join(PRECISIONS)}"
            )
        if self.model != BUNDLED_MODEL and not self.pretrained:
            raise UsageError(
                f"model {self.model} has no weights yet: add --pretrained with one of open_clip's "
                "tags (--model ViT-L-14 --pretrained openai) or a path to weights"
            )

    @property
    def resolved_arch(self) -> str:
        """The name under which embeddings are stored."""
        short = "".join(c if c.isalnum() else "_" for c in self.model.lower())
        return self.arch or _ARCH_OF_MODEL.get(self.model, short)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphConfig:
    """Samples → kNN graph."""

    n_neighbors: int = option(10, "k, neighbors of each sample", "whole number")
    target_recall: float = option(0.95, "recall@k to reach", "number")
    exact_below: int = option(
        16384, "compare all with all up to this many distinct rows", "whole number"
    )
    seed: int = option(
        0, "of the uid hashes that choose samples for training and measuring", "whole number"
    )

    def __post_init__(self) -> None:
        at_least("n-neighbors", self.n_neighbors, 1)
        at_least("exact-below", self.exact_below, 0)
        whole("seed", self.seed)
        if not (finite(self.target_recall) and 0 < self.target_recall <= 1):
            raise UsageError(
                f"target-recall is {self.target_recall}, allowed is above 0 and at most 1: "
                "--target-recall 0.95"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """Graph → ranking (docs/method.md#d2-pruning)."""

    method: str = option(
        "d2",
        "d2, or one to compare it with:\n"
        + "\n".join(
            f"{one.name}: {one.summary}; up to {one.most:,} samples"
            for one in selectors.SELECTORS.values()
        ),
        choices=METHODS,
        metavar="NAME",
    )
    seed: int = option(0, "of the hashes that a method uses; D2 needs none", "whole number")
    gamma: float | Literal["auto"] = option(
        AUTO,
        "how close is close: a number, or auto, which fits it to the budget and the pool "
        "(default: auto)",
        "auto or number",
        metavar="X",
    )
    # None: the share of the selection, else 0.3
    tuned_for: Decimal | None = option(
        None,
        "kept share that automatic settings are for (default: that of --fraction or --budget)",
        "share",
        metavar="SHARE",
    )
    gamma_forward: float | None = option(None, "of the forward pass, if another", "number")
    # formulas: docs/method.md
    kernel: str = option(
        "local",
        "weight of an edge: local: exp(-gamma·x²), x: squared distance in units of those to the "
        "k-th neighbors of both ends; rbf: exp(-gamma·d²); exp: exp(-gamma·d)",
        choices=tuple(schemes.KERNELS),
    )
    forward: str = option(
        "sum", "how a score takes in those of its neighbors", choices=tuple(schemes.FORWARD)
    )
    reverse: str = option(
        "weighted",
        "what a kept sample takes from its neighbors: its weighted score, all of it, nothing",
        choices=tuple(schemes.REVERSE),
    )
    undirected: bool = option(
        False, "edges count both ways, each pair once, as in the paper", "flag"
    )
    # 0: all that the graph has
    n_neighbors: int = option(
        0,
        "neighbors of each list that count, 0: all (default: all that the graph has)",
        "whole number",
        shown_default=None,
    )
    gamma_scale: str = option(
        "none",
        "median: gamma is for distances in units of the pool's median between neighbors, so that "
        "it means the same for any encoder; the unit grows with k; of the kernels rbf and exp",
        choices=GAMMA_SCALES,
    )
    group_budgets: str = option(
        "proportional",
        "shares of the classes, where there are any: as large as they are, or all alike",
        choices=by_class.BUDGETS,
    )
    cut_hardest: Decimal | Literal["auto"] = option(
        Decimal(0),
        "rank this share of the samples, hardest first, after everything else, because wrong "
        "labels are among them; auto fits the share to the budget and the scores",
        "auto or share",
        metavar="SHARE",
    )
    # None: no near-copies; other methods than D2 stay as published with auto
    collapse_copies: float | Literal["auto"] | None = option(
        AUTO,
        "of neighbors up to this squared distance (0: identical; auto: with d2 1/20 of the pool's "
        "median to the k-th neighbor; none) the best one stays, the others rank after everything "
        "else (default: auto)",
        "copies",
        metavar="SQDIST",
        without_value=0.0,
    )
    redundancy: float = option(
        1.0,
        "of --method infomax: what likeness to a kept sample costs, in units of the scores' range, "
        "0 (score alone) to 16 (default: 1)",
        "number",
        metavar="LAMBDA",
    )
    temperature: float = option(
        0.1,
        "of --method density: the higher, the more alike are the shares of clusters in a budget "
        "(default: 0.1)",
        "number",
        metavar="TAU",
    )

    def __post_init__(self) -> None:
        if self.n_neighbors:
            at_least("n-neighbors", self.n_neighbors, 1)
        whole("seed", self.seed)
        cut = self.cut_hardest
        if cut != AUTO and not (Decimal(cut).is_finite() and 0 <= Decimal(cut) < 1):
            raise UsageError(
                f"cut-hardest is {cut}, allowed are auto and 0 to below 1: --cut-hardest 0.4"
            )
        copies = self.collapse_copies
        if copies not in (None, AUTO) and not (finite(copies) and 0 <= float(copies) <= 4):
            raise UsageError(
                f"collapse-copies is {self.collapse_copies}, allowed are auto, none, or a squared "
                "distance of 0 (identical) to 4: --collapse-copies 0.01"
            )
        if self.gamma != AUTO and not (finite(self.gamma) and float(self.gamma) >= 0):
            raise UsageError(
                f"gamma is {self.gamma}, allowed is a finite number of at least 0, or auto"
            )
        forward = self.gamma_forward
        if forward is not None and not (finite(forward) and forward >= 0):
            raise UsageError(
                f"gamma-forward is {forward}, allowed is a finite number of at least 0"
            )
        if self.tuned_for is not None:
            parse_fraction(self.tuned_for)
        for name, word, known in (
            ("method", self.method, METHODS),
            ("kernel", self.kernel, schemes.KERNELS),
            ("forward", self.forward, schemes.FORWARD),
            ("reverse", self.reverse, schemes.REVERSE),
            ("gamma-scale", self.gamma_scale, GAMMA_SCALES),
            ("group-budgets", self.group_budgets, by_class.BUDGETS),
        ):
            if word not in known:
                raise UsageError(f"{name} is {word!r}, allowed are {', '.join(known)}")
        self._check_options_of_methods()
        if self.kernel == "local" and self.gamma_scale != "none":
            raise UsageError(
                f"gamma-scale is {self.gamma_scale} and the kernel local has units of its own, the "
                "distances to the k-th neighbors: leave it out, or take --kernel rbf"
            )

    def _check_options_of_methods(self) -> None:
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for name in sorted(selectors.OPTIONS):
            value = getattr(self, name)
            readers = [one for one in selectors.SELECTORS if name in selectors.options(one)]
            if value != default[name] and self.method not in readers:
                raise UsageError(
                    f"{name} is {value} and the method {self.method} does not read it: leave it "
                    f"out, or take --method {' or '.join(readers)}"
                )
        if not (finite(self.redundancy) and 0 <= self.redundancy <= submodular.MOST_RELEVANCE):
            raise UsageError(
                f"redundancy is {self.redundancy}, allowed is 0 (score alone) to "
                f"{submodular.MOST_RELEVANCE}: --redundancy 1"
            )
        if not (finite(self.temperature) and self.temperature > 0):
            raise UsageError(
                f"temperature is {self.temperature}, allowed is a finite number above 0: "
                "--temperature 0.1"
            )

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> RankConfig:
        """From `options_of` one, as a run's record holds it."""
        cut = options["cut_hardest"]
        exact = {"cut_hardest": cut if cut == AUTO else Decimal(cut)}
        if options.get("tuned_for") is not None:
            exact["tuned_for"] = Decimal(options["tuned_for"])
        if options["gamma_forward"] == options["gamma"]:
            options = {**options, "gamma_forward": None}
        return cls(**{**options, **exact})

    @property
    def requested(self) -> auto_settings.Requested:
        """What has to be found on the pool before the ranking begins."""
        auto = self.gamma == AUTO
        is_local = self.kernel == "local"
        # the methods that D2 is compared with have none of it of their own
        keeps_copies = self.method != "d2" and self.collapse_copies == AUTO
        return auto_settings.Requested(
            kernel=self.kernel,
            gamma=None if self.gamma == AUTO else float(self.gamma),
            median=not is_local and (auto or self.gamma_scale == "median"),
            cut_hardest=None if self.cut_hardest == AUTO else Decimal(self.cut_hardest),
            copies=None if keeps_copies else self.collapse_copies,
            tuned_for=TUNED_FOR if self.tuned_for is None else self.tuned_for,
            d2=self.method == "d2",
        )

    @property
    def is_tuned(self) -> bool:
        """Whether the ranking depends on the budget that it is for."""
        return self.cut_hardest == AUTO or (self.method == "d2" and self.gamma == AUTO)

    def resolve_on(
        self,
        difficulty: demoted.F32,
        hi: uids.U64,
        lo: uids.U64,
        neighbors: demoted.I64,
        sqdist: demoted.F32,
        facts: auto_settings.PoolFacts,
    ) -> tuple[auto_settings.Resolved, demoted.Bools]:
        """What this asks for, found on a pool in one piece, and which samples (n,) rank after
        everything else.
        """
        return auto_settings.resolve(self.requested, difficulty, hi, lo, neighbors, sqdist, facts)

    def scheme(self, resolved: auto_settings.Resolved) -> schemes.Scheme:
        """How messages are made, with what was found on the pool."""
        forward = resolved.gamma if self.gamma_forward is None else self.gamma_forward
        made = schemes.Scheme(
            kernel=self.kernel,
            forward=self.forward,
            reverse=self.reverse,
            gamma_forward=forward,
            gamma_reverse=resolved.gamma,
            floor=resolved.floor,
        )
        return made.per(resolved.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig:
    """Ranking → subset."""

    # None with a budget
    fraction: Decimal | None = option(
        None,
        "share to keep; several, as 0.3,0.1,0.2: subset.npy is the first, and each has a file in "
        "subsets/ (default: 0.3)",
    )
    budget: int | None = option(None, "number of samples to keep", "whole number")
    min_score: float | None = option(
        None,
        "drop samples of a lower score within the budget: the score as the metadata has it, "
        "whichever end is kept first",
        "number",
    )
    also: tuple[str, ...] = ()
    """further shares of the same ranking, a file each"""
    # None: each sample once or not at all
    soft: float | None = option(
        None,
        "repeat samples by their score: the budget counts repeats, and a score higher by this "
        "share of the scores' range is worth one more copy (without a number: 0.1)",
        "number",
        metavar="TEMPERATURE",
        without_value=0.1,
    )

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> SelectConfig:
        """From `options_of` one, as a run's record holds it."""
        share = options["fraction"]
        return cls(
            **{
                **options,
                "fraction": None if share is None else Decimal(share),
                "also": tuple(options["also"]),
            }
        )

    def __post_init__(self) -> None:
        for share in self.also:
            parse_fraction(share)
        if self.fraction is not None and self.budget is not None:
            raise UsageError("fraction and budget are both given: name one of them")
        if self.fraction is not None:
            parse_fraction(self.fraction)
        if self.budget is not None:
            at_least("budget", self.budget, 1)
        if self.soft is not None and not (finite(self.soft) and 0.001 <= self.soft <= 1000):
            raise UsageError(
                f"soft is {self.soft}, allowed is 0.001 to 1000, the share of the range of scores "
                "that is worth one more copy: --soft 0.1"
            )
        if self.min_score is not None and not finite(self.min_score):
            raise UsageError(f"min-score is {self.min_score}, allowed is a finite number")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run: what to compute (the stages' parts) and where."""

    out_dir: str = option(..., "run directory: a path or an fsspec URL")
    # empty: OUT/metadata, which `embed` writes
    metadata_dir: str = option("", "folder of NAME.parquet + NAME.npz pairs; any fsspec URL")
    embed: EmbedConfig | None = None
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    max_bad: float = option(0.01, "share of bad samples that still exits with 0", "number")
    best_effort: bool = option(
        False, "exit with 0 although the target recall is out of reach (default: no)", "yes or no"
    )
    # 0: as few as memory allows
    partitions: int = option(
        0,
        "auto, or a number: parts that the graph is made in; never changes the result (default: "
        "auto, as few as memory allows)",
        "partitions",
        metavar="N",
    )
    # bytes; 0: the node's share
    memory_per_worker: int = option(
        0,
        "what a task may use, 1GB or 800MiB (default: the node's share)",
        "bytes",
        metavar="SIZE",
    )
    address: str = option("", "Ray cluster to join; empty: start Ray here")
    device: str = option(
        "auto",
        "auto: GPUs where the cluster has any; cuda: GPUs, or not at all; for the graph too",
        choices=DEVICES,
    )
    overwrite: tuple[str, ...] = option(
        (), "make this stage of the command, and all after it, anew", "repeated", metavar="STAGE"
    )
    heal: bool = option(
        False,
        "make again what was damaged (see verify) and embed shards that changed, and all that "
        "follows from them",
        "flag",
    )

    def __post_init__(self) -> None:
        if not self.out_dir:
            raise UsageError("out-dir is empty: --out-dir runs/first")
        if not (finite(self.max_bad) and 0 <= self.max_bad <= 1):
            raise UsageError(f"max-bad is {self.max_bad}, allowed is 0 to 1: --max-bad 0.01")
        if self.device not in DEVICES:
            raise UsageError(f"device is {self.device!r}, allowed are {', '.join(DEVICES)}")
        if self.partitions:
            at_least("partitions", self.partitions, 1)
        if self.memory_per_worker and self.memory_per_worker < LEAST_MEMORY:
            raise UsageError(
                f"memory-per-worker is {self.memory_per_worker} bytes, allowed is at least "
                f"{LEAST_MEMORY}: --memory-per-worker 1GB"
            )


def parse_bytes(text: str) -> int:
    """Bytes from `1GB`, `512MiB`, `2e9`. Raises ValueError."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    units.update({"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40})
    word = text.strip().lower().replace(" ", "")
    number = word.rstrip("bikmgt")
    value = float(number) * units[word[len(number) :]] if word[len(number) :] in units else None
    if value is None or not math.isfinite(value) or value <= 0:
        raise ValueError(text)
    return int(value)


def options_of(part: Any) -> dict[str, Any]:
    """The fields of one stage's dataclass as plain JSON values, for the fingerprint."""
    plain = {}
    for name, value in dataclasses.asdict(cast(Any, part)).items():
        plain[name] = str(value) if isinstance(value, Decimal) else value
        if isinstance(value, tuple):
            plain[name] = list(value)  # as JSON gives it back
    return plain
