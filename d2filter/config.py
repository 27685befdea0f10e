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
from d2filter.algorithm.scores import registry as scores
from d2filter.algorithm.scores import terms as summed
from d2filter.errors import UsageError

FeatureType = Literal["image|text", "image", "text"]
METHODS = ("d2", *selectors.SELECTORS)
GAMMA_SCALES = ("none", "median")
AUTO: Literal["auto"] = "auto"
TUNED_FOR = Decimal("0.3")  # where nothing says which budget a ranking is for
FEATURE_TYPES: tuple[FeatureType, ...] = ("image|text", "image", "text")
DEVICES = ("auto", "cpu", "cuda")
ALPHAS = ("drop", "white", "black")
PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp", "amp_bf16")
DEFAULT_ARCH = "l14"
LEAST_MEMORY = 700_000_000  # of a worker: half of it is taken before it holds a sample
BUNDLED_MODEL = "d2filter-tiny"
# options of a catalog that say where something lies; its content counts, not the place
CATALOG_SOURCES = ("score_target", "training_log", "score_file", "within")
MAX_PIXELS = 89_478_485  # Pillow's own limit

# names that DataComp's metadata gives to open_clip's models
_ARCH_OF_MODEL = {"ViT-L-14": "l14", "ViT-B-32": "b32", BUNDLED_MODEL: "tiny"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedConfig:
    """Shards → metadata."""

    shards: tuple[str, ...]
    """WebDataset shards: fsspec URLs with braces or wildcards, or folders of .tar files"""
    model: str = BUNDLED_MODEL
    """open_clip model name"""
    pretrained: str = ""
    """open_clip pretrained tag, or a path to weights; empty for the bundled model"""
    precision: str = "fp32"
    """open_clip precision"""
    batch_size: int = 64
    """images in one forward pass; part of the fingerprint, a shape can change the last bits"""
    fast_decode: bool = False
    """large JPEGs are decoded at a half, quarter or eighth, at least twice the model's input"""
    max_pixels: int = MAX_PIXELS
    """width × height above which a picture is bad"""
    alpha: str = "drop"
    """what is seen through transparent pixels: white, black, or (drop) the colors that the file
    holds there, as open_clip's training does"""
    arch: str = ""
    """NAME in NAME_img, NAME_txt, clip_NAME_similarity_score; empty: from the model's name"""

    def __post_init__(self) -> None:
        _at_least("batch-size", self.batch_size, 1)
        _at_least("max-pixels", self.max_pixels, 1)
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
class CatalogConfig:
    """Metadata → valid, distinct samples."""

    arch: str = DEFAULT_ARCH
    """picks NAME_img, NAME_txt and clip_NAME_similarity_score"""
    score_column: str = ""
    """parquet column with the difficulty; empty: clip_NAME_similarity_score, else the cosine"""
    score: str = ""
    """terms of `scores.SCORES` and columns (`algorithm/scores/terms.py`); empty: the column"""
    score_file: str = ""
    """scores from elsewhere: .parquet or .csv with uid, or a folder of them; score_column, or the
    only other column, is the difficulty, unless score names its columns"""
    within: str = ""
    """subset as .npy, or run directory: samples outside of it are not ranked"""
    keep_first: str = ""
    """which end of the score goes first, high or low; empty: the score's own, high of a column"""
    score_target: str = ""
    """norm_sim: .npy (t, d), or .npz with NAME_img, of the image embeddings of a target set"""
    score_batch: int = 4096
    """negclip_loss: pairs in a random batch, about"""
    score_rounds: int = 4
    """negclip_loss: random batchings that are averaged"""
    group_column: str = ""
    """parquet column with the class of each sample: edges stay inside of it; empty: no classes"""
    clip_scores: Decimal = Decimal(0)
    """share of the samples, at each end, whose scores become that of the next sample inside"""
    training_log: str = ""
    """scores from training: .parquet file, or folder of them (`formats/traininglog.py`)"""
    feature_type: FeatureType = "image|text"
    """which embeddings make the graph"""
    feature_keys: tuple[str, ...] = ()
    """npz keys that make the graph in place of NAME_img and NAME_txt, concatenated"""
    normalize: bool = True
    """L2-normalize each modality"""

    def __post_init__(self) -> None:
        if self.feature_type not in FEATURE_TYPES:
            raise UsageError(
                f"feature-type is {self.feature_type!r}, "
                f"allowed are {', '.join(repr(f) for f in FEATURE_TYPES)}"
            )
        if not self.arch:
            raise UsageError("arch is empty: --arch l14 reads l14_img and l14_txt")
        written = summed.canonical(self.terms) if self.terms else ""
        object.__setattr__(self, "score", written)  # one spelling, one fingerprint
        if self.score and self.score_column:
            raise UsageError("score and score-column are both given: name one of them")
        if self.keep_first not in ("", "high", "low"):
            raise UsageError(f"keep-first is {self.keep_first!r}, allowed are high and low")
        if not (self.clip_scores.is_finite() and 0 <= self.clip_scores < Decimal("0.5")):
            raise UsageError(
                f"clip-scores is {self.clip_scores}, allowed is 0 to below 0.5, a share of the "
                "samples at each end: --clip-scores 0.001"
            )
        _at_least("score-batch", self.score_batch, 2)
        _at_least("score-rounds", self.score_rounds, 1)
        for need, option, value in (
            ("target", "score-target", self.score_target),
            ("log", "training-log", self.training_log),
        ):
            if (need in self.needs) != bool(value):
                names = ", ".join(n for n, s in scores.SCORES.items() if s.needs == need)
                raise UsageError(
                    f"{option} is for the scores {names}, and score is {self.score or 'a column'}"
                    if value
                    else f"score {self.score} needs --{option}"
                )
        both = self.feature_type == "image|text" and not self.feature_keys
        if not both and any(term.name == "negclip_loss" for term in self.terms):
            raise UsageError(
                "score negclip_loss needs both embeddings: use it with --feature-type 'image|text' "
                "and without --feature-keys"
            )

    @classmethod
    def from_options(cls, options: dict[str, Any], sources: dict[str, str]) -> CatalogConfig:
        """From a run's record, which tells apart what was asked and where it lay."""
        places = {name: sources.get(name, "") for name in CATALOG_SOURCES}
        keys = tuple(options["feature_keys"])
        share = Decimal(options.get("clip_scores", "0"))
        return cls(**{**options, **places, "feature_keys": keys, "clip_scores": share})

    def describe(self, has_column: bool, file_column: str = "") -> dict[str, str]:
        """What the difficulty is, for those who come after: name, meaning of a high score, the end
        that is kept first. has_column: whether the metadata brought the score. file_column: that of
        the score file.
        """
        name = self.score or file_column or (self.score_name if has_column else "clip_score")
        given = self.score or self.score_column or self.score_file
        own = self.score if self.score in scores.SCORES else "" if given else "clip_score"
        meaning = scores.SCORES[own].meaning if own else "unknown"
        return {"name": name, "high_is": meaning, "kept_first": self.first}

    @property
    def terms(self) -> tuple[summed.Term, ...]:
        """The terms of the score; none without --score."""
        return summed.parse(self.score) if self.score else ()

    @property
    def needs(self) -> frozenset[str]:
        """What the terms are computed from: some of pair, target, pool and log."""
        computed = [scores.SCORES[t.name] for t in self.terms if t.name in scores.SCORES]
        return frozenset(score.needs for score in computed)

    @property
    def logged(self) -> tuple[str, ...]:
        """Scores that are computed from the training log."""
        names = dict.fromkeys(term.name for term in self.terms)
        return tuple(n for n in names if n in scores.SCORES and scores.SCORES[n].needs == "log")

    @property
    def waits(self) -> bool:
        """Whether the score needs the whole pool: a term does, or is ranked in it."""
        return "pool" in self.needs or any(term.ranked for term in self.terms)

    @property
    def first(self) -> str:
        """The end of the score that is kept first: high or low."""
        own = scores.SCORES[self.score].kept_first if self.score in scores.SCORES else "high"
        return self.keep_first or own

    def raw(self, difficulty: float) -> float:
        """A difficulty as the score that it was made of."""
        return difficulty if self.first == "high" else 0.0 - difficulty

    @property
    def score_name(self) -> str:
        """The parquet column that holds the difficulty, where there is one."""
        return self.score_column or f"clip_{self.arch}_similarity_score"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphConfig:
    """Samples → kNN graph."""

    n_neighbors: int = 10
    """k, the length of each list"""
    target_recall: float = 0.95
    """recall@k that the calibration aims at"""
    exact_below: int = 16384
    """pools with at most this many distinct rows are compared all with all"""
    seed: int = 0
    """of the hashes that choose samples for training, calibration and measuring"""

    def __post_init__(self) -> None:
        _at_least("n-neighbors", self.n_neighbors, 1)
        _at_least("exact-below", self.exact_below, 0)
        _whole("seed", self.seed)
        if not (_finite(self.target_recall) and 0 < self.target_recall <= 1):
            raise UsageError(
                f"target-recall is {self.target_recall}, allowed is above 0 and at most 1: "
                "--target-recall 0.95"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """Graph → ranking (docs/method.md#d2-pruning)."""

    method: str = "d2"
    """d2, or a selector to compare it with"""
    seed: int = 0
    """of the hashes that a selector chooses by; D2 needs none"""
    gamma: float | Literal["auto"] = "auto"
    """kernel width of the reverse pass, and of the forward pass unless that is given; auto: see
    `algorithm/greedy/auto_gamma.py`"""
    tuned_for: Decimal | None = None
    """kept share that auto settings are for; None: that of the selection, else 0.3"""
    gamma_forward: float | None = None
    """kernel width of the forward pass; None: gamma"""
    kernel: str = "local"
    """local: weight = exp(−gamma·(d²/(σ_i·σ_j))²), σ: distance to the own k-th neighbor; rbf:
    exp(−gamma·d²); exp: exp(−gamma·d)"""
    forward: str = "sum"
    """what the forward pass makes of a score: sum, product or none"""
    reverse: str = "weighted"
    """what a selected sample takes from its neighbors: weighted, absolute or none"""
    undirected: bool = False
    """an edge counts in both directions, each pair once"""
    n_neighbors: int = 0
    """neighbors of each list that count; 0: all that the graph has"""
    gamma_scale: str = "none"
    """median: gamma is for distances in units of the median between neighbors; of the kernels rbf
    and exp, and always so where gamma is auto"""
    group_budgets: str = "proportional"
    """of a graph with classes: proportional to their sizes, or uniform"""
    cut_hardest: Decimal | Literal["auto"] = Decimal(0)
    """share of the samples, highest difficulty first, that rank after everything else; auto: see
    `algorithm/greedy/auto_cut.py`"""
    collapse_copies: float | Literal["auto"] | None = "auto"
    """neighbors up to this squared distance are copies: all but the best rank after everything
    else; None: no; auto: with D2 see `algorithm/greedy/near_copies.py`, other methods stay as
    published"""
    redundancy: float = 1.0
    """of infomax: what likeness to a kept sample costs, in units of the scores' range (λ)"""
    temperature: float = 0.1
    """of density: the higher, the more alike are the shares of clusters in a budget (τ)"""

    def __post_init__(self) -> None:
        if self.n_neighbors:
            _at_least("n-neighbors", self.n_neighbors, 1)
        _whole("seed", self.seed)
        cut = self.cut_hardest
        if cut != AUTO and not (Decimal(cut).is_finite() and 0 <= Decimal(cut) < 1):
            raise UsageError(
                f"cut-hardest is {cut}, allowed are auto and 0 to below 1: --cut-hardest 0.4"
            )
        copies = self.collapse_copies
        if copies not in (None, AUTO) and not (_finite(copies) and 0 <= float(copies) <= 4):
            raise UsageError(
                f"collapse-copies is {self.collapse_copies}, allowed are auto, none, or a squared "
                "distance of 0 (identical) to 4: --collapse-copies 0.01"
            )
        if self.gamma != AUTO and not (_finite(self.gamma) and float(self.gamma) >= 0):
            raise UsageError(
                f"gamma is {self.gamma}, allowed is a finite number of at least 0, or auto"
            )
        forward = self.gamma_forward
        if forward is not None and not (_finite(forward) and forward >= 0):
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
        if not (_finite(self.redundancy) and 0 <= self.redundancy <= submodular.MOST_RELEVANCE):
            raise UsageError(
                f"redundancy is {self.redundancy}, allowed is 0 (score alone) to "
                f"{submodular.MOST_RELEVANCE}: --redundancy 1"
            )
        if not (_finite(self.temperature) and self.temperature > 0):
            raise UsageError(
                f"temperature is {self.temperature}, allowed is a finite number above 0: "
                "--temperature 0.1"
            )

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> RankConfig:
        """From `options_of` one, as a run's record holds it."""
        cut = options["cut_hardest"]
        told = {"cut_hardest": cut if cut == AUTO else Decimal(cut)}
        if options.get("tuned_for") is not None:
            told["tuned_for"] = Decimal(options["tuned_for"])
        if options["gamma_forward"] == options["gamma"]:
            options = {**options, "gamma_forward": None}
        return cls(**{**options, **told})

    @property
    def wanted(self) -> auto_settings.Wanted:
        """What has to be found on the pool before the ranking begins."""
        auto = self.gamma == AUTO
        is_local = self.kernel == "local"
        # the methods that D2 is compared with have none of it of their own
        keeps_copies = self.method != "d2" and self.collapse_copies == AUTO
        return auto_settings.Wanted(
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

    def settled_on(
        self,
        difficulty: demoted.F32,
        hi: uids.U64,
        lo: uids.U64,
        neighbors: demoted.I64,
        sqdist: demoted.F32,
        told: auto_settings.Told,
    ) -> tuple[auto_settings.Settled, demoted.Bools]:
        """What this asks for, found on a pool in one piece, and which samples (n,) rank after
        everything else.
        """
        return auto_settings.settle(self.wanted, difficulty, hi, lo, neighbors, sqdist, told)

    def scheme(self, settled: auto_settings.Settled) -> schemes.Scheme:
        """How messages are made, with what was found on the pool."""
        forward = settled.gamma if self.gamma_forward is None else self.gamma_forward
        made = schemes.Scheme(
            kernel=self.kernel,
            forward=self.forward,
            reverse=self.reverse,
            gamma_forward=forward,
            gamma_reverse=settled.gamma,
            floor=settled.floor,
        )
        return made.per(settled.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig:
    """Ranking → subset."""

    fraction: Decimal | None = None
    """share of the ranked samples to keep; None with a budget"""
    budget: int | None = None
    """number of samples to keep"""
    min_score: float | None = None
    """score, as the metadata has it, below which a sample is dropped from within the budget"""
    also: tuple[str, ...] = ()
    """further shares of the same ranking, a file each"""
    soft: float | None = None
    """copies by score in place of a prefix (`algorithm/soft.py`): how much of the range of scores
    is worth one more copy; None: each sample once or not at all"""

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
            _at_least("budget", self.budget, 1)
        if self.soft is not None and not (_finite(self.soft) and 0.001 <= self.soft <= 1000):
            raise UsageError(
                f"soft is {self.soft}, allowed is 0.001 to 1000, the share of the range of scores "
                "that is worth one more copy: --soft 0.1"
            )
        if self.min_score is not None and not _finite(self.min_score):
            raise UsageError(f"min-score is {self.min_score}, allowed is a finite number")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run: what to compute (the stages' parts) and where."""

    out_dir: str
    """run directory, local path or fsspec URL"""
    metadata_dir: str = ""
    """folder of parquet + npz pairs; empty: OUT/metadata, which `embed` writes"""
    embed: EmbedConfig | None = None
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    max_bad: float = 0.01
    """share of bad samples above which a finished run exits with 3"""
    best_effort: bool = False
    """go on with the highest recall that can be had when the target is out of reach"""
    partitions: int = 0
    """parts that graph and ranking are made in; 0: as few as memory allows"""
    memory_per_worker: int = 0
    """bytes that a task may use; 0: the node's share"""
    address: str = ""
    """Ray cluster to join; empty: Ray starts inside this process"""
    device: str = "auto"
    """where models and products run; auto: on GPUs where the cluster has any"""
    overwrite: tuple[str, ...] = ()
    """stages whose results may be replaced"""
    heal: bool = False
    """whether damaged files, and shards that changed, are made again"""

    def __post_init__(self) -> None:
        if not self.out_dir:
            raise UsageError("out-dir is empty: --out-dir runs/first")
        if not (_finite(self.max_bad) and 0 <= self.max_bad <= 1):
            raise UsageError(f"max-bad is {self.max_bad}, allowed is 0 to 1: --max-bad 0.01")
        if self.device not in DEVICES:
            raise UsageError(f"device is {self.device!r}, allowed are {', '.join(DEVICES)}")
        if self.partitions:
            _at_least("partitions", self.partitions, 1)
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


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}, allowed is a whole number of at least {least}")


def _whole(name: str, value: Any) -> None:
    if not isinstance(value, int):
        raise UsageError(f"{name} is {value!r}, allowed is a whole number")


def _finite(value: Any) -> bool:
    """Whether it is a number that a float can hold; a notebook may pass anything."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False
