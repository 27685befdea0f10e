"""What is read of the metadata and of the files beside it: the options of the catalog."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from d2filter.algorithm.scores import registry as scores
from d2filter.algorithm.scores import terms as summed
from d2filter.checks import at_least
from d2filter.errors import UsageError

FeatureType = Literal["image|text", "image", "text"]
FEATURE_TYPES: tuple[FeatureType, ...] = ("image|text", "image", "text")
DEFAULT_ARCH = "l14"
# options that say where something lies; its content counts, not the place
CATALOG_SOURCES = ("score_target", "training_log", "score_file", "within")


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
        at_least("score-batch", self.score_batch, 2)
        at_least("score-rounds", self.score_rounds, 1)
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
