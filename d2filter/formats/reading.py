"""The options of the catalog: which columns, scores and embeddings are read from which files."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from d2filter.algorithm.scores import registry as scores
from d2filter.algorithm.scores import terms as summed
from d2filter.checks import at_least
from d2filter.errors import UsageError
from d2filter.options import option

FeatureType = Literal["image|text", "image", "text"]
FEATURE_TYPES: tuple[FeatureType, ...] = ("image|text", "image", "text")
DEFAULT_ARCH = "l14"
# options that are paths: the content of the file is part of the fingerprint, the path is not
CATALOG_SOURCES = ("score_target", "training_log", "score_file", "within")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogConfig:
    """Options of the stage catalog: metadata → valid, distinct samples."""

    arch: str = option(
        DEFAULT_ARCH,
        "name of the CLIP model in the metadata, which has ARCH_img, ARCH_txt and "
        "clip_ARCH_similarity_score (default: that of --model with --shards, else "
        f"{DEFAULT_ARCH})",
        shown_default=None,
    )
    score_column: str = option("", "column with the score, in the parquet files or in --score-file")
    # empty: the column
    score: str = option(
        "",
        "a name, or a sum such as 0.7*clip_score+0.3*column-rank(el2n); sums use values as they "
        "are, or percentile ranks with rank(), for scores of different scales; in a sum, high goes "
        "first; a name is a column of --score-file or of the parquet files, or a computed score:\n"
        + "\n".join(
            f"{one.name}: {one.summary}; high is {one.meaning}, {one.kept_first} goes first"
            for one in scores.SCORES.values()
        ),
        metavar="SCORE",
    )
    score_file: str = option(
        "",
        "file with scores: .parquet or .csv with a column uid and columns of scores, or a folder "
        "of such files; --score-column chooses a column",
        metavar="FILE",
    )
    within: str = option(
        "",
        "rank only the samples of this subset: a .npy of (u8, u8), or a run directory",
        metavar="SUBSET",
    )
    keep_first: str = option(
        "",
        "end of the score that goes first; low turns the sign of scores in the run's files, but "
        "not for --min-score (default: the score's own, high for a column)",
        choices=("high", "low"),
    )
    score_target: str = option(
        "",
        "for the score norm_sim: embeddings of a target set, .npy (t, d), or .npz with ARCH_img",
        metavar="FILE",
    )
    score_batch: int = option(4096, "for the score negclip_loss: pairs in a batch", "whole number")
    score_rounds: int = option(
        4,
        "for the score negclip_loss: number of random batchings, which are averaged",
        "whole number",
    )
    group_column: str = option(
        "",
        "parquet column with classes: neighbors are of the same class, and every budget contains "
        "the share of each class",
    )
    clip_scores: Decimal = option(
        Decimal(0),
        "clip the scores of this share of the samples at each end, such as 0.001, to the score of "
        "the next sample inside; use it if a few scores such as -9999 make all others nearly equal",
        "share",
        metavar="SHARE",
    )
    training_log: str = option(
        "",
        "for scores from training: a .parquet, or a folder of them, with uid, epoch, label, and "
        "probabilities or logits",
        metavar="FILE",
    )
    feature_type: FeatureType = option(
        "image|text", "embeddings that make the graph: image|text, image or text"
    )
    feature_keys: tuple[str, ...] = option(
        (),
        "npz keys of other embeddings that make the graph, in place of ARCH_img and ARCH_txt",
        "texts",
        metavar="KEY",
    )
    normalize: bool = option(
        True, "scale each embedding to length 1 (L2) (default: yes)", "yes or no"
    )

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
        at_least("score-batch", self.score_batch, 2)
        at_least("score-rounds", self.score_rounds, 1)
        for need, name, value in (
            ("target", "score-target", self.score_target),
            ("log", "training-log", self.training_log),
        ):
            if (need in self.needs) != bool(value):
                names = ", ".join(n for n, s in scores.SCORES.items() if s.needs == need)
                raise UsageError(
                    f"{name} is for the scores {names}, and score is {self.score or 'a column'}"
                    if value
                    else f"score {self.score} needs --{name}"
                )
        both = self.feature_type == "image|text" and not self.feature_keys
        if not both and (name := self._with_both_halves):
            raise UsageError(
                f"score {name} needs both embeddings: use it with --feature-type 'image|text' "
                "and without --feature-keys"
            )

    @classmethod
    def from_options(cls, options: dict[str, Any], sources: dict[str, str]) -> CatalogConfig:
        """The configuration from a run's record, which stores the paths (`sources`) separately."""
        places = {name: sources.get(name, "") for name in CATALOG_SOURCES}
        keys = tuple(options["feature_keys"])
        share = Decimal(options.get("clip_scores", "0"))
        return cls(**{**options, **places, "feature_keys": keys, "clip_scores": share})

    def describe(self, has_column: bool, file_column: str = "") -> dict[str, str]:
        """Description of the score for the record: name, meaning of a high score (high_is), and the
        end that is kept first (kept_first). has_column: whether the score is a column of the
        metadata. file_column: column of the score file.
        """
        name = self.score or file_column or (self.score_name if has_column else "clip_score")
        given = self.score or self.score_column or self.score_file
        own = self.score if self.score in scores.SCORES else "" if given else "clip_score"
        meaning = scores.SCORES[own].meaning if own else "unknown"
        return {"name": name, "high_is": meaning, "kept_first": self.first}

    @property
    def terms(self) -> tuple[summed.Term, ...]:
        """The terms of --score; empty without it."""
        return summed.parse(self.score) if self.score else ()

    @property
    def needs(self) -> frozenset[str]:
        """The inputs of the computed terms: a subset of pair, target, pool and log."""
        computed = [scores.SCORES[t.name] for t in self.terms if t.name in scores.SCORES]
        return frozenset(score.needs for score in computed)

    @property
    def _with_both_halves(self) -> str:
        """The first term that needs features with an image and a text half; empty if none does."""
        known = (t.name for t in self.terms if t.name in scores.SCORES)
        return next((name for name in known if scores.SCORES[name].both_halves), "")

    @property
    def logged(self) -> tuple[str, ...]:
        """Scores that are computed from the training log."""
        names = dict.fromkeys(term.name for term in self.terms)
        return tuple(n for n in names if n in scores.SCORES and scores.SCORES[n].needs == "log")

    @property
    def waits(self) -> bool:
        """Whether the score needs the whole pool: a term is computed from it, or is a rank."""
        return "pool" in self.needs or any(term.ranked for term in self.terms)

    @property
    def first(self) -> str:
        """The end of the score that is kept first: high or low."""
        own = scores.SCORES[self.score].kept_first if self.score in scores.SCORES else "high"
        return self.keep_first or own

    def raw(self, difficulty: float) -> float:
        """The score from which a difficulty was computed."""
        return difficulty if self.first == "high" else 0.0 - difficulty

    @property
    def score_name(self) -> str:
        """The parquet column of the score; it may not exist."""
        return self.score_column or f"clip_{self.arch}_similarity_score"
