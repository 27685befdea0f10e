"""The configuration of a run: frozen dataclasses that declare the options and check their values.

The fingerprint of a stage covers the fields of the stage's dataclass and the fingerprint of its
input (docs/files.md#records-and-fingerprints). `RunConfig` also contains where a run happens
(address, memory, device), which is not part of any fingerprint.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, cast

from d2filter.algorithm import by_class, sizes, uids
from d2filter.algorithm.budget import parse_fraction
from d2filter.algorithm.greedy import auto_settings, demoted, schemes
from d2filter.algorithm.methods import density, selectors, submodular
from d2filter.checks import at_least, finite, whole
from d2filter.errors import UsageError
from d2filter.formats.reading import DEFAULT_ARCH as DEFAULT_ARCH
from d2filter.formats.reading import CatalogConfig as CatalogConfig
from d2filter.models import BUNDLED_MODEL as BUNDLED_MODEL
from d2filter.options import option

METHODS = ("d2", *selectors.SELECTORS)
GAMMA_SCALES = ("none", "median")
AUTO: Literal["auto"] = "auto"
TUNED_FOR = Decimal("0.3")  # kept share for automatic settings if no budget is given
DEVICES = ("auto", "cpu", "cuda")
ALPHAS = ("drop", "white", "black")
PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp", "amp_bf16")
BATCH_SIZE = 64
MAX_PIXELS = 89_478_485  # Pillow's own limit

# short names of open_clip's models in DataComp's metadata
_ARCH_OF_MODEL = {"ViT-L-14": "l14", "ViT-B-32": "b32", BUNDLED_MODEL: "tiny"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedConfig:
    """Options of the stage embed: shards → metadata."""

    shards: tuple[str, ...] = option(
        ...,
        "WebDataset shards to embed: .tar files, folders of them, or patterns in quotes such as "
        "'data/{00000..00099}.tar'; paths or fsspec URLs",
        "texts",
        metavar="URL",
        shown_default=None,
    )
    model: str = option(
        BUNDLED_MODEL,
        "open_clip model; the bundled one is for trials only, real data needs a better one, such "
        "as --model ViT-L-14 --pretrained openai",
    )
    pretrained: str = option(
        "", "weights of the model: a tag of open_clip, which is downloaded, or a path"
    )
    precision: str = option("fp32", "precision of the model: " + ", ".join(PRECISIONS))
    # part of the fingerprint, because a batch size can change the last bits of embeddings
    batch_size: int = option(
        BATCH_SIZE, "images in a forward pass; fewer need less memory", "whole number"
    )
    fast_decode: bool = option(
        False,
        "decode large JPEGs at a reduced size, at least twice the model's input; faster, and "
        "embeddings change slightly",
        "flag",
    )
    max_pixels: int = option(
        MAX_PIXELS,
        "pictures with more pixels are bad samples; each pixel may take 20 bytes of memory "
        "(default: Pillow's own limit)",
        "whole number",
        metavar="N",
    )
    alpha: str = option(
        "drop",
        "color of transparent pixels: white, black, or the color that the file contains there "
        "(drop), as in open_clip's training",
        choices=ALPHAS,
    )
    arch: str = ""
    """NAME in NAME_img, NAME_txt, clip_NAME_similarity_score; empty: derived from the model"""

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
        """NAME of the stored embeddings, see `arch`."""
        short = "".join(c if c.isalnum() else "_" for c in self.model.lower())
        return self.arch or _ARCH_OF_MODEL.get(self.model, short)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphConfig:
    """Options of the stage graph: samples → kNN graph."""

    n_neighbors: int = option(10, "k, the number of neighbors of each sample", "whole number")
    target_recall: float = option(
        0.95, "recall@k of the graph; if it is lower, the exit code is 4", "number"
    )
    exact_below: int = option(
        16384,
        "compare all pairs of a pool with up to this many distinct samples; a value above the size "
        "of the pool makes the graph exact",
        "whole number",
    )
    seed: int = option(
        0,
        "seed of the uid hashes that choose samples for training and measuring",
        "whole number",
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
    """Options of the stage rank: graph → ranking (docs/method.md#d2-pruning)."""

    method: str = option(
        "d2",
        "d2, or a method to compare it with:\n"
        + "\n".join(
            f"{one.name}: {one.summary}; up to {one.most:,} samples"
            for one in selectors.SELECTORS.values()
        ),
        choices=METHODS,
        metavar="NAME",
    )
    seed: int = option(0, "seed of the hashes that a method uses; d2 uses none", "whole number")
    gamma: float | Literal["auto"] = option(
        AUTO,
        "how close a neighbor must be to count; a larger gamma lets fewer neighbors count: a "
        "number, or auto, which fits it to the budget and the pool (default: auto)",
        "auto or number",
        metavar="X",
    )
    # None: the share of the selection, or 0.3
    tuned_for: Decimal | None = option(
        None,
        "kept share to which automatic settings are fitted (default: that of --fraction or "
        "--budget)",
        "share",
        metavar="SHARE",
    )
    gamma_forward: float | None = option(
        None, "gamma of the forward pass (default: that of --gamma)", "number"
    )
    # formulas: docs/method.md
    kernel: str = option(
        "local",
        "weight of an edge by its distance d: local: exp(-gamma·x²), where x is d² divided by the "
        "distances of both ends to their k-th neighbors; rbf: exp(-gamma·d²), as published; exp: "
        "exp(-gamma·d)",
        choices=tuple(schemes.KERNELS),
    )
    forward: str = option(
        "sum",
        "forward pass, from the weighted scores of the neighbors: sum adds them to the score, "
        "product multiplies the score by their sum, none leaves the score as it is",
        choices=tuple(schemes.FORWARD),
    )
    reverse: str = option(
        "weighted",
        "what a selected sample subtracts from its neighbors: its score times the weight "
        "(weighted), its whole score (absolute), or nothing (none)",
        choices=tuple(schemes.REVERSE),
    )
    undirected: bool = option(
        False, "use edges in both directions, each pair once, as in the paper", "flag"
    )
    # 0: all that the graph has
    n_neighbors: int = option(
        0,
        "number of neighbors in each list that count; 0: all (default: all that the graph has)",
        "whole number",
        shown_default=None,
    )
    gamma_scale: str = option(
        "none",
        "for the kernels rbf and exp: median scales distances by the pool's median between "
        "neighbors, so that gamma means the same for any encoder; the median grows with k",
        choices=GAMMA_SCALES,
    )
    group_budgets: str = option(
        "proportional",
        "with --group-column: share of each class in a budget, proportional to its size, or "
        "uniform",
        choices=by_class.BUDGETS,
    )
    cut_hardest: Decimal | Literal["auto"] = option(
        Decimal(0),
        "share of the samples, hardest first, to rank after all others, because wrong labels are "
        "among them; auto fits the share to the budget and the scores",
        "auto or share",
        metavar="SHARE",
    )
    # None: no near-copies; with auto, other methods than D2 keep near-copies, as published
    collapse_copies: float | Literal["auto"] | None = option(
        AUTO,
        "squared distance up to which neighbors are near-copies: the best one stays, the others "
        "rank after all other samples; 0: identical features only; auto: with d2, 1/20 of the "
        "pool's median squared distance to the k-th neighbor; none: near-copies stay (default: "
        "auto)",
        "copies",
        metavar="SQDIST",
        without_value=0.0,
    )
    redundancy: float = option(
        1.0,
        "for --method infomax: cost of similarity to a kept sample, in units of the scores' range, "
        "0 (score alone) to 16 (default: 1)",
        "number",
        metavar="LAMBDA",
    )
    temperature: float = option(
        0.1,
        "for --method density: a higher value gives clusters more equal shares of a budget "
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
                f"gamma-scale is {self.gamma_scale}, but the kernel local has its own unit, the "
                "distance to the k-th neighbor: leave it out, or use --kernel rbf"
            )

    def _check_options_of_methods(self) -> None:
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for name in sorted(selectors.OPTIONS):
            value = getattr(self, name)
            readers = [one for one in selectors.SELECTORS if name in selectors.options(one)]
            if value != default[name] and self.method not in readers:
                raise UsageError(
                    f"{name} is {value}, but the method {self.method} does not use it: leave it "
                    f"out, or use --method {' or '.join(readers)}"
                )
        submodular.check_redundancy(self.redundancy)
        density.check_temperature(self.temperature)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> RankConfig:
        """The configuration from its `options_of`, which a run's record contains."""
        cut = options["cut_hardest"]
        exact = {"cut_hardest": cut if cut == AUTO else Decimal(cut)}
        if options.get("tuned_for") is not None:
            exact["tuned_for"] = Decimal(options["tuned_for"])
        if options["gamma_forward"] == options["gamma"]:
            options = {**options, "gamma_forward": None}
        return cls(**{**options, **exact})

    @property
    def requested(self) -> auto_settings.Requested:
        """The settings that are fitted to the pool before the ranking begins."""
        auto = self.gamma == AUTO
        is_local = self.kernel == "local"
        # the other methods keep near-copies, as published
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
        """Whether the ranking depends on `tuned_for`."""
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
        """The settings, fitted to a pool in memory, and which samples are demoted, (n,) bool.

        Arguments are those of `auto_settings.resolve`.
        """
        return auto_settings.resolve(self.requested, difficulty, hi, lo, neighbors, sqdist, facts)

    def scheme(self, resolved: auto_settings.Resolved) -> schemes.Scheme:
        """The message scheme, with the settings that were fitted to the pool."""
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
    """Options of the stage select: ranking → subset."""

    # None with a budget
    fraction: Decimal | None = option(
        None,
        "share of the ranked samples to keep; several, such as 0.3,0.1,0.2: subset.npy is the "
        "first, and each has a file in subsets/ (default: 0.3)",
    )
    budget: int | None = option(
        None, "number of samples to keep, in place of --fraction", "whole number"
    )
    min_score: float | None = option(
        None,
        "drop samples with a lower score from the budget, in the units of the metadata, whichever "
        "end of the score is kept first",
        "number",
    )
    also: tuple[str, ...] = ()
    """further shares of the same ranking; each has a file of its own"""
    # None: each sample once or not at all
    soft: float | None = option(
        None,
        "repeat samples by score: the budget counts repeats, and a score that is higher by this "
        "share of the scores' range gets about one more copy (without a number: 0.1)",
        "number",
        metavar="TEMPERATURE",
        without_value=0.1,
    )

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> SelectConfig:
        """The configuration from its `options_of`, which a run's record contains."""
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
            raise UsageError("fraction and budget are both given: give one of them")
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
    """One run: the configuration of each stage, and where and how to run."""

    out_dir: str = option(..., "run directory: a path or an fsspec URL")
    # empty: OUT/metadata, which `embed` writes
    metadata_dir: str = option(
        "", "folder of NAME.parquet + NAME.npz pairs: a path or an fsspec URL"
    )
    embed: EmbedConfig | None = None
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    max_bad: float = option(0.01, "share of bad samples up to which the exit code is 0", "number")
    best_effort: bool = option(
        False, "exit with 0 even if the graph misses the target recall (default: no)", "yes or no"
    )
    # 0: as few as memory allows
    partitions: int = option(
        0,
        "number of partitions of graph and ranking, or auto; changes memory and time, never the "
        "result (default: auto, as few as memory allows, at least one a node)",
        "partitions",
        metavar="N",
    )
    # bytes; 0: the node's share
    memory_per_worker: int = option(
        0,
        "memory that a task may use, such as 1GB or 800MiB (default: the node's share)",
        "bytes",
        metavar="SIZE",
    )
    address: str = option("", "Ray cluster to join; empty: $RAY_ADDRESS, or start Ray here")
    device: str = option(
        "auto",
        "auto: use GPUs if the cluster has any; cuda: use only GPUs; cpu: use none; for the graph "
        "too",
        choices=DEVICES,
    )
    overwrite: tuple[str, ...] = option(
        (),
        "run this stage of the command and all later ones again, and replace their files",
        "repeated",
        metavar="STAGE",
    )
    heal: bool = option(
        False,
        "repair damaged files (see verify), embed changed shards again, and run again everything "
        "that depends on them",
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
        check_memory(self.memory_per_worker)


def check_memory(memory_per_worker: int) -> None:
    """Raise UsageError for fewer bytes than a task needs; 0 stands for the node's share."""
    if 0 < memory_per_worker < sizes.LEAST_WORKER:
        raise UsageError(
            f"memory-per-worker is {memory_per_worker} bytes, allowed is at least "
            f"{sizes.LEAST_WORKER}: --memory-per-worker 1GB"
        )


def parse_bytes(text: str) -> int:
    """Bytes from a text such as `1GB`, `512MiB` or `2e9`. Raises ValueError for other text."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    units.update({"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40})
    word = text.strip().lower().replace(" ", "")
    number = word.rstrip("bikmgt")
    value = float(number) * units[word[len(number) :]] if word[len(number) :] in units else None
    if value is None or not math.isfinite(value) or value <= 0:
        raise ValueError(text)
    return int(value)


def options_of(part: Any) -> dict[str, Any]:
    """The fields of a stage's dataclass as JSON values, for the fingerprint."""
    plain = {}
    for name, value in dataclasses.asdict(cast(Any, part)).items():
        plain[name] = str(value) if isinstance(value, Decimal) else value
        if isinstance(value, tuple):
            plain[name] = list(value)  # JSON has no tuples: a record read back contains a list
    return plain
