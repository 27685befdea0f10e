"""Writes the table and the plot of `bench_cifar`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.bench import made_by
from jobs.bench_extra import pyplot
from jobs.supervised_data import pruned

F64 = npt.NDArray[np.float64]
Row = dict[str, Any]

SAYS = {
    "random": "random",
    "margin": "hardest: margin (AUM)",
    "el2n": "hardest: EL2N",
    "forgetting": "hardest: forgetting",
    "entropy": "hardest: entropy",
    "prototypicality": "hardest: prototypicality, no labels",
    "moderate": "moderate",
    "k_center": "k-center",
    "facility_location": "facility location",
    "graph_cut": "graph cut",
    "d2_self": "D2, prototypicality, no labels",
    "ccs": "CCS, no cut",
    "ccs_best": "CCS, best cut in hindsight",
    "d2_published": "D2 as published, no cut",
    "d2_published_best": "D2 as published, best cut in hindsight",
    "d2_fixed": "D2, cut auto, gamma=1",
    "d2_auto": "**D2, cut and gamma auto**",
}
_BEST = {"ccs_best": "ccs", "d2_published_best": "d2_published"}
_LINES = {  # color and style in the plot
    "random": ("black", "--"),
    "margin": ("tab:olive", "-"),
    "moderate": ("tab:brown", "-"),
    "k_center": ("tab:orange", "-"),
    "facility_location": ("tab:pink", "-"),
    "ccs": ("tab:green", ":"),
    "ccs_best": ("tab:green", "-"),
    "d2_published_best": ("tab:cyan", "-"),
    "d2_auto": ("tab:blue", "-"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """How the trainings were made."""

    device: str
    summary: str
    seeds: Sequence[int]
    minutes: float
    smoke: bool


class Found:
    """Accuracies of one set of labels, in percent."""

    def __init__(self, rows: list[Row]) -> None:
        """rows: of one set of labels."""
        self._by: dict[tuple[str, str, str], dict[int, Row]] = {}
        for row in rows:
            self._by.setdefault((row["method"], row["kept"], row["cut"]), {})[row["seed"]] = row
        self.kept = sorted({k for _, k, _ in self._by if k != "1"}, key=float, reverse=True)
        self.all_wrong = 100 * rows[0]["all_wrong"]

    def cut(self, method: str, kept: str) -> str:
        """Of a method that is shown with its best cut: that; of others their cut."""
        name = _BEST.get(method, method)
        cuts = [c for m, k, c in self._by if (m, k) == (name, kept)]
        if method in _BEST:
            return max(cuts, key=lambda c: self._of(name, kept, c, "accuracy").mean())
        return cuts[0] if method in ("d2_auto", "d2_fixed") else "0"

    def has(self, method: str) -> bool:
        """Whether networks were trained on what a method keeps."""
        return any(m == _BEST.get(method, method) for m, _, _ in self._by)

    def of(self, method: str, kept: str, field: str = "accuracy") -> F64:
        """(seeds,) percent."""
        return self._of(_BEST.get(method, method), kept, self.cut(method, kept), field)

    def _of(self, method: str, kept: str, cut: str, field: str) -> F64:
        rows = self._by[method, kept, cut]
        return np.array([100 * rows[seed][field] for seed in sorted(rows)])

    def full(self) -> F64:
        """Trained on everything."""
        return self._of("full", "1", "0", "accuracy")

    def lead(self, kept: str, other: str, method: str = "d2_auto") -> tuple[float, float]:
        """Mean lead over another method and its standard error, seed against same seed."""
        found = self.of(method, kept) - self.of(other, kept)
        return float(found.mean()), float(found.std(ddof=1) / np.sqrt(found.size))


def write(path: Path, rows: list[Row], about: About) -> None:
    """The report, and the plot beside it."""
    found = {
        which: Found([row for row in rows if row["labels"] == which])
        for which in dict.fromkeys(row["labels"] for row in rows)
    }
    plot = path.with_suffix(".png")
    ran = "**A smoke run on few pictures: no figure here means anything.** " if about.smoke else ""
    lines = [
        "# CIFAR-10: accuracy after pruning",
        "",
        f"{made_by('jobs.bench_cifar')} {ran}",
        "",
        f"What ran: `--device {about.device}`: {about.summary}. {len(rows):,} accuracies over "
        f"seeds {', '.join(map(str, about.seeds))}, {about.minutes:.0f} minutes in this run (what "
        "the cache held is not counted).",
        "",
        *_ABOUT,
        "",
        f"![accuracy against the share kept]({plot.name})",
    ]
    for which, one in found.items():
        lines += ["", *_section(which, one)]
    lines += ["", "## What the figures say", "", *_says(found)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    _plot(found, plot)
    print("\n".join(lines))


_ABOUT = [
    "Test accuracy in percent, mean ± standard deviation over seeds. A seed decides first weights, "
    "order of batches and what random keeps; scores and graph come from one training on everything "
    "for each set of labels, and what the other methods keep is the same for all seeds. Labels: "
    "clean, and CIFAR-10N's human ones; the test labels are right. D2 and CCS rank by the margin. "
    "D2 as published: k=5, gamma=0.1 on squared distances of rows of length 1. D2, cut auto: "
    "k=10, distances in units of their median, and `algorithm/greedy/auto_cut.py`, whose cut comes "
    "from the budget and the scores alone; gamma auto is `algorithm/greedy/auto_gamma.py`. "
    "*Best cut in hindsight* is chosen by the test pictures, which favors it. "
    "Methods without labels rank by the distance to the nearest of 10 centers of k-means.",
]


def _section(which: str, found: Found) -> list[str]:
    full = found.full()
    title = "clean labels" if which == "clean" else f"CIFAR-10N, {which}"
    lines = [
        f"## {title} ({found.all_wrong:.1f}% wrong)",
        "",
        f"All training pictures: {full.mean():.1f} ± {full.std(ddof=1):.1f}.",
        "",
        "| pruned | " + " | ".join(map(pruned, found.kept)) + " |",
        "|---" * (len(found.kept) + 1) + "|",
    ]
    there = [method for method in SAYS if found.has(method)]
    for method, summary in ((method, SAYS[method]) for method in there):
        values = [found.of(method, kept) for kept in found.kept]
        cells = (f"{v.mean():.1f} ± {v.std(ddof=1):.1f}" for v in values)
        lines.append(f"| {summary} | " + " | ".join(cells) + " |")
    for method in (*_BEST, "d2_auto"):
        cuts = (f"{float(found.cut(method, kept)):.2f}" for kept in found.kept)
        lines.append(f"| *cut of {SAYS[method].strip('*')}* | " + " | ".join(cuts) + " |")
    if found.all_wrong:
        for method in ("random", "margin", "ccs_best", "d2_auto"):
            shares = (f"{found.of(method, kept, 'wrong').mean():.1f}" for kept in found.kept)
            summary = SAYS[method].strip("*")
            lines.append(
                f"| *wrong labels in what is kept, {summary}* | " + " | ".join(shares) + " |"
            )
    return lines


def _says(found: dict[str, Found]) -> list[str]:
    """The figures in sentences, made from the figures."""
    lines = [
        "Lead of D2 with automatic cut and gamma in points, mean ± standard error of the "
        "difference, seed against same seed; *behind* where it is negative by more than two of "
        "them:",
        "",
    ]
    for other in ("random", "ccs_best", "d2_published_best"):
        for which, one in found.items():
            words = []
            for kept in one.kept:
                mean, error = one.lead(kept, other)
                behind = ", behind" if mean < -2 * error else ""
                words.append(f"{pruned(kept)} {mean:+.1f} ± {error:.1f}{behind}")
            lines.append(f"- against {SAYS[other]}, {which}: {'; '.join(words)}")
    return lines


def _plot(found: dict[str, Found], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 4.6), squeeze=False)
    for panel, (which, one) in zip(axes[0], found.items(), strict=True):
        places = [100 - 100 * float(kept) for kept in one.kept]
        for method, (color, style) in _LINES.items():
            values = np.array([one.of(method, kept) for kept in one.kept])
            panel.errorbar(
                places, values.mean(axis=1), values.std(axis=1, ddof=1), color=color,
                linestyle=style, capsize=2, label=SAYS[method].strip("*"),
            )  # fmt: skip
        panel.axhline(one.full().mean(), color="lightgray", zorder=0)
        low = min(one.of(m, k).mean() for m in ("random", "d2_auto") for k in one.kept)
        high = max(one.of(m, k).mean() for m in _LINES for k in one.kept)
        panel.set_ylim(low - 12, max(high, one.full().mean()) + 2)
        panel.set_title(which if which == "clean" else f"CIFAR-10N {which}")
        panel.set_xlabel("pruned, %")
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
