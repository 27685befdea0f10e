"""Each alert appears if and only if its condition holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import pools

from d2filter.cli.main import main
from d2filter.formats.paths import Folder
from d2filter.tools import alerts

SCORES = {
    "name": "CLIP score", "is_clip": True, "lower_quartile": 0.1, "median": 0.2,
    "upper_quartile": 0.3, "not_positive": 0.02,
}  # fmt: skip
CHECK = {"kept": 0.1, "low": 0.06, "high": 0.15, "by_score": 0.05, "share_kept": 0.3}


def facts(**counted: Any) -> alerts.Facts:
    return alerts.Facts(records={}, counted=counted)


def embedded(read: int = 1000, bad: int = 0, **more: Any) -> alerts.Facts:
    options = {"model": "ViT-L-14", "alpha": "drop", **more.pop("options", {})}
    stats = {"samples": {"read": read, "bad": bad}, "alpha": 0, "one_color": 0, **more}
    return alerts.Facts(records={"embed": {"options": options, "stats": stats}}, counted={})


def ranked(tuned_for: Any, kept: int) -> alerts.Facts:
    samples = {"kept": kept, "pruned": 1000 - kept}
    records = {
        "rank": {"options": {"tuned_for": tuned_for}},
        "select": {"stats": {"samples": samples}},
    }
    return alerts.Facts(records=records, counted={})


def searched(recall: float) -> alerts.Facts:
    record = {"options": {"target_recall": 0.95}, "stats": {"recall": recall, "k": 10}}
    return alerts.Facts(records={"graph": record}, counted={})


def of_arch(arch: str) -> alerts.Facts:
    return alerts.Facts(records={"catalog": {"options": {"arch": arch}}}, counted={})


@pytest.mark.parametrize(
    ("alert", "fires", "summary", "quiet"),
    [
        (
            alerts.bundled_model,
            [embedded(options={"model": "d2filter-tiny"}), of_arch("tiny")],
            "was trained on drawn shapes only",
            [embedded(), of_arch("l14"), facts()],
        ),
        (
            alerts.one_color,
            [embedded(one_color=200), embedded(read=1100, bad=100, one_color=200)],
            "200 of 1,000 pictures have one color",
            [embedded(one_color=199), embedded(), facts()],
        ),
        (
            alerts.alpha_dropped,
            [embedded(alpha=10)],
            "10 of 1,000 pictures have transparent pixels",
            [embedded(alpha=9), embedded(alpha=500, options={"alpha": "white"}), facts()],
        ),
        (
            alerts.exact_copies,
            [facts(exact_copies={"samples": 7, "kept": 2})],
            "7 samples have an exact copy, and 2 kept samples have",
            [facts(exact_copies={"samples": 7, "kept": 0}), facts()],
        ),
        (
            alerts.near_copies,
            [facts(near_copies={"share_of_kept": 0.33, "sqdist": 0.0123})],
            "33% of the kept samples have a kept near-copy (squared distance of at most 0.0123)",
            [facts(near_copies={"share_of_kept": 0.05, "sqdist": 0.01}), facts()],
        ),
        (
            alerts.shared_caption,
            [
                facts(shared_caption={"samples": 200, "looked_at": 100_000, "uid": "a" * 32}),
                facts(shared_caption={"samples": 200, "looked_at": 300, "uid": "a" * 32}),
            ],
            " samples share one caption, that of uid aaaa",
            [
                facts(shared_caption={"samples": 199, "looked_at": 100_000, "uid": "a" * 32}),
                facts(shared_caption={"samples": 9, "looked_at": 20, "uid": "a" * 32}),
                facts(),
            ],
        ),
        (
            alerts.one_score,
            [facts(scores={**SCORES, "lower_quartile": 0.3, "median": 0.3})],
            "at least half of the samples have the same score (CLIP score 0.3)",
            [facts(scores=SCORES), facts(scores={**SCORES, "median": 0.3}), facts()],
        ),
        (
            alerts.one_side,
            [facts(scores={**SCORES, "not_positive": 0.995})],
            "99.5% of the CLIP scores are 0 or below",
            [
                facts(scores=SCORES),
                facts(scores={**SCORES, "not_positive": 1.0, "is_clip": False}),
                facts(),
            ],
        ),
        (
            alerts.swapped_captions,
            [facts(selfcheck={"at_budget": {**CHECK, "kept": 0.28, "high": 0.31}})],
            "28% of the pairs with swapped captions are kept, while 30% of all pairs are kept",
            [
                facts(selfcheck={"at_budget": CHECK}),
                facts(selfcheck={"why_not": "no halves"}),
                facts(),
            ],
        ),
        (
            alerts.recall,
            [searched(0.9499)],
            "recall@10 of the graph is 0.9499, below --target-recall 0.95",
            [searched(0.95), searched(1.0), facts()],
        ),
        (
            alerts.other_budget,
            [ranked(0.3, 100), ranked("0.3", 100)],
            "0.1 of the ranked samples are kept, but the ranking was tuned for 0.3",
            [ranked(0.3, 300), ranked(0.3, 449), ranked(0.3, 201), ranked(None, 100), facts()],
        ),
    ],
)
def test_each_alert_fires_on_its_condition_only(
    alert: alerts.Alert, fires: list[alerts.Facts], summary: str, quiet: list[alerts.Facts]
) -> None:
    assert alert in alerts.ALERTS
    for found in map(alert, fires):
        assert summary in found
        assert "\n" not in found
    assert [alert(one) for one in quiet] == [""] * len(quiet)


def test_every_alert_is_tested() -> None:
    (mark,) = (
        m for m in test_each_alert_fires_on_its_condition_only.pytestmark if m.name == "parametrize"
    )
    assert {case[0] for case in mark.args[1]} == set(alerts.ALERTS)


@pytest.mark.parametrize(("by_score", "cure"), [(0.05, "advise OUT"), (0.25, "the score hardly")])
def test_a_failed_self_check_names_the_score_or_the_setting_as_the_cause(
    by_score: float, cure: str
) -> None:
    at_budget = {**CHECK, "kept": 0.28, "high": 0.31, "by_score": by_score}
    assert cure in alerts.swapped_captions(facts(selfcheck={"at_budget": at_budget}))


def test_a_budget_that_was_tuned_for_and_kept_is_within_half_as_much_again() -> None:
    assert alerts.other_budget(ranked(0.3, 451))
    assert alerts.other_budget(ranked(0.3, 199))


@pytest.mark.usefixtures("cluster", "reports")
def test_alerts_are_the_last_lines_and_on_top_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three in ten are exact copies, one caption is everywhere, and captions say nothing."""
    rng = np.random.default_rng(0)
    pool: dict[str, Any] = pools.make(400, 6, copies=0.3)
    pool["txt"][:120] = pool["txt"][0]
    pool["txt"][120:] = rng.normal(size=(280, 6)).astype(np.float16)
    pool["txt"][120:] *= 1 - 2 * (np.einsum("nd,nd->n", pool["img"], pool["txt"]) > 0)[120:, None]
    pools.write(tmp_path / "m", pool, arch="tiny")
    (tmp_path / "m" / "notes.txt").write_text("no metadata")
    words = ["--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    more = ["--arch", "tiny", "--n-neighbors", "3", "--gamma", "0", "--forward", "none"]
    assert main(["run", *words, *more, "--reverse", "none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("alert ")]
    assert said == lines[-len(said) :]
    data = json.loads((tmp_path / "o/report.json").read_text())
    assert data["shared_caption"]["samples"] == 120
    assert data["exact_copies"]["samples"] > 0
    for text in ("not read of", "the bundled model", "120 of 400 samples share one caption"):
        assert sum(text in line for line in said) == 1, text
    page = (tmp_path / "o/report.html").read_text()
    shown = alerts.find(alerts.read(Folder(str(tmp_path / "o"))))
    assert [f"alert     {text}" for text in shown] == said
    assert page.count("<li>") >= len(said)
    assert "was trained on drawn shapes only" in page.split("<main>")[0]
    # of another selection, what was counted is not told
    assert main(["select", "--out-dir", str(tmp_path / "o"), "--fraction", "0.1"]) == 0
    again = json.loads((tmp_path / "o/report.json").read_text())
    assert again["select"] != data["select"]
    (tmp_path / "o/report.json").write_text(json.dumps(data))
    assert alerts.read(Folder(str(tmp_path / "o"))).counted == {}


@pytest.mark.usefixtures("cluster", "reports")
def test_exact_copies_are_counted_over_the_whole_pool(tmp_path: Path) -> None:
    pool = pools.make(300, 6, copies=0.5)
    pools.write(tmp_path / "m", pool)
    words = ["--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    assert main(["run", *words, "--n-neighbors", "3", "--partitions", "3"]) == 0
    data = json.loads((tmp_path / "o/report.json").read_text())
    both = np.concatenate([pool["img"], pool["txt"]], axis=1)
    _, kind, sizes = np.unique(both, axis=0, return_inverse=True, return_counts=True)
    assert data["exact_copies"]["samples"] == (sizes[kind] > 1).sum() > 20
    kept = {f"{hi:016x}{lo:016x}" for hi, lo in np.load(tmp_path / "o/subset.npy").tolist()}
    rows = [i for i, uid in enumerate(pool["uid"]) if uid in kept]
    per_kind = np.bincount(kind[rows], minlength=sizes.size)
    assert data["exact_copies"]["kept"] <= per_kind[per_kind > 1].sum()
    assert (data["exact_copies"]["kept"] > 0) == bool((per_kind > 1).any())
