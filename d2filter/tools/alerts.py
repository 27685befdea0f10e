"""Warnings about a finished run: the last lines of its output, and the top of the report.

Each alert is a function from `Facts` to one line, empty if there is nothing to report. To add one,
add a function to `ALERTS`. Alerts read no samples: counts over samples are in report.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from d2filter.config import EmbedConfig
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import REPORT_DATA, STAGES, RunState
from d2filter.models import BUNDLED_MODEL

Record = dict[str, Any]

ONE_COLOR = 0.2  # share of the pictures
ALPHA = 0.01
SHARED_CAPTION = 0.002  # of the samples looked at, and
FEWEST_SHARED = 10
CROWDED = 0.05  # share of the kept samples with a kept near-copy
ONE_SIDE = 0.99  # of the scores
FAR = 1.5  # largest ratio of the share kept and the share that the ranking was tuned for


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What alerts look at; anything may be missing."""

    records: dict[str, Record]
    """of the finished stages"""
    counted: Record
    """report.json: counts over samples; empty without a report"""

    def stats(self, stage: str) -> Record:
        """Figures of a stage."""
        found: Record = self.records.get(stage, {}).get("stats", {})
        return found

    def option(self, stage: str, name: str) -> Any:
        """An option of a stage."""
        return self.records.get(stage, {}).get("options", {}).get(name)


Alert = Callable[[Facts], str]


def read(folder: Folder) -> Facts:
    """The facts of a run directory as far as it is finished."""
    state = RunState(folder)
    done = {stage: state.done(stage) for stage in STAGES}
    select = done["select"]
    data = folder.read_json(REPORT_DATA) if select else None
    if data is not None and select is not None and data["select"] != select["fingerprint"]:
        data = None  # of another selection
    records = {stage: record for stage, record in done.items() if record is not None}
    return Facts(records=records, counted=data or {})


def find(facts: Facts) -> list[str]:
    """All alerts, those that the stages have recorded first."""
    found = [line for stage in STAGES for line in facts.stats(stage).get("alerts", ())]
    return found + [line for alert in ALERTS if (line := alert(facts))]


def bundled_model(facts: Facts) -> str:
    """The bundled model was used."""
    tiny = EmbedConfig(shards=("",)).resolved_arch
    if facts.option("embed", "model") != BUNDLED_MODEL and facts.option("catalog", "arch") != tiny:
        return ""
    return (
        "the bundled model made the embeddings, but it was trained on drawn shapes only: for real "
        "pictures use --model ViT-L-14 --pretrained openai"
    )


def one_color(facts: Facts) -> str:
    """Many pictures have one color."""
    return _of_pictures(
        facts, "one_color", ONE_COLOR,
        "have one color: placeholders, or cut-outs whose transparency is dropped (--alpha white)",
    )  # fmt: skip


def alpha_dropped(facts: Facts) -> str:
    """Transparent pixels were embedded as the colors below them."""
    if facts.option("embed", "alpha") != "drop":
        return ""
    return _of_pictures(
        facts, "alpha", ALPHA,
        "have transparent pixels, which were embedded in the colors stored under the transparency, "
        "often black: --alpha white puts them on white",
    )  # fmt: skip


def exact_copies(facts: Facts) -> str:
    """Copies at distance 0 are kept side by side."""
    found = facts.counted.get("exact_copies", {})
    if not found.get("kept"):
        return ""
    return (
        f"{found['samples']:,} samples have an exact copy, and {found['kept']:,} kept samples have "
        "a kept exact copy: --collapse-copies 0 keeps only the best of each group"
    )


def near_copies(facts: Facts) -> str:
    """Near-copies are kept side by side."""
    found = facts.counted.get("near_copies", {})
    if found.get("share_of_kept", 0.0) <= CROWDED:
        return ""
    return (
        f"{found['share_of_kept']:.0%} of the kept samples have a kept near-copy (squared distance "
        f"of at most {found['sqdist']:.3g}): --collapse-copies {found['sqdist']:.3g} keeps the "
        "best of each group only"
    )


def shared_caption(facts: Facts) -> str:
    """One caption stands beside many pictures."""
    found = facts.counted.get("shared_caption", {})
    count, looked = found.get("samples", 0), found.get("looked_at", 0)
    if count < max(FEWEST_SHARED, SHARED_CAPTION * looked):
        return ""
    return (
        f"{count:,} of {looked:,} samples share one caption, that of uid {found['uid']}: check "
        "whether it describes the pictures"
    )


def one_score(facts: Facts) -> str:
    """The middle half of the scores is one number."""
    found = facts.counted.get("scores", {})
    if not found or found["lower_quartile"] != found["upper_quartile"]:
        return ""
    return (
        f"at least half of the samples have the same score ({found['name']} {found['median']:g}): "
        "neighbors and uids rank them, not the score"
    )


def one_side(facts: Facts) -> str:
    """No pair looks right: nearly all CLIP scores are 0 or below."""
    found = facts.counted.get("scores", {})
    if found.get("not_positive", 0.0) < ONE_SIDE or not found.get("is_clip"):
        return ""
    return (
        f"{found['not_positive']:.1%} of the CLIP scores are 0 or below, as those of wrong pairs "
        "are: check that image and text embeddings come from one model and from the same rows"
    )


def swapped_captions(facts: Facts) -> str:
    """The self-check keeps swapped captions as often as anything."""
    found = facts.counted.get("selfcheck", {}).get("at_budget")
    if not found or found["high"] < found["share_kept"]:
        return ""
    cure = "`d2filter advise OUT` looks for a better setting"
    if found["by_score"] >= found["share_kept"] / 2:
        cure = "the score hardly separates wrong pairs from right ones"
    return (
        f"in the self-check {found['kept']:.0%} of the pairs with swapped captions are kept, while "
        f"{found['share_kept']:.0%} of all pairs are kept; the score alone keeps "
        f"{found['by_score']:.0%} of them: {cure}"
    )


def recall(facts: Facts) -> str:
    """The recall of the graph is below the target."""
    target, found = facts.option("graph", "target_recall"), facts.stats("graph").get("recall")
    if target is None or found is None or found >= target:
        return ""
    return (
        f"recall@{facts.stats('graph')['k']} of the graph is {found:.4f}, below --target-recall "
        f"{target:g}: raise --exact-below for an exact graph"
    )


def other_budget(facts: Facts) -> str:
    """The budget is far from what the ranking was tuned for."""
    tuned, samples = facts.option("rank", "tuned_for"), facts.stats("select").get("samples")
    if tuned is None or not samples:
        return ""
    tuned, kept = float(tuned), int(samples["kept"])
    share = kept / (kept + int(samples["pruned"]))
    if tuned / FAR <= share <= tuned * FAR:
        return ""
    return (
        f"{share:.3g} of the ranked samples are kept, but the ranking was tuned for {tuned:.3g}: "
        "rank again for this budget (--overwrite rank)"
    )


ALERTS: tuple[Alert, ...] = (
    bundled_model, one_color, alpha_dropped, shared_caption, one_score, one_side, recall,
    exact_copies, near_copies, swapped_captions, other_budget,
)  # fmt: skip


def _of_pictures(facts: Facts, name: str, least: float, summary: str) -> str:
    figures = facts.stats("embed")
    count = figures.get(name, 0)
    read = figures["samples"]["read"] - figures["samples"]["bad"] if figures else 0
    if not count or count < least * read:
        return ""
    return f"{count:,} of {read:,} pictures {summary}"
