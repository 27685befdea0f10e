"""Draw the picture of the README: `python docs/img/draw.py` writes docs/img/kept.svg. It needs
matplotlib, of the extra `bench`.

Left and middle: a small pool of points, once filtered by the score alone and once by
`d2filter.rank` with its defaults. Right: figures of jobs/results/bench_flickr.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt

import d2filter

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "jobs/results/bench_flickr.md"
SHARE = 0.2
BLUE, ORANGE, GRAY, INK, RED = "#1f6fb2", "#d97706", "#c3c8ce", "#24292f", "#c0392b"


def pool(seed: int = 4) -> tuple[Any, Any, Any]:
    """Points (n, 2), scores (n,) and which pairs are wrong (n,)."""
    rng = np.random.default_rng(seed)
    groups = 60
    centers = rng.uniform(0.06, 0.94, (groups, 2))
    quality = rng.normal(0.5, 0.12, groups)
    sizes = rng.choice([1, 1, 1, 2, 3, 5, 9], groups)
    of = np.repeat(np.arange(groups), sizes)
    points = centers[of] + rng.normal(0, 0.012, (of.size, 2))
    scores = quality[of] + rng.normal(0, 0.03, of.size)
    wrong = rng.random(of.size) < 0.15
    scores[wrong] = rng.normal(0.12, 0.06, int(wrong.sum()))
    return points.astype(np.float32), scores.astype(np.float32), wrong


def measured(row: str) -> list[float]:
    """The useful share of a method at each kept share, with 20% of the captions swapped."""
    text = RESULTS.read_text("utf-8").split("## 20% swapped: useful")[1].split("##")[0]
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [float(cell) for cell in re.findall(r"\| ([\d.]+) ±", line)]


def scatter(axes: Any, points: Any, wrong: Any, kept: Any, color: str, title: str) -> None:
    out = np.ones(len(points), bool)
    out[kept] = False
    axes.scatter(*points[out & ~wrong].T, s=26, facecolor="white", edgecolor=GRAY, linewidth=1.2)
    axes.scatter(*points[out & wrong].T, s=26, marker="x", color=GRAY, linewidth=1.3)
    axes.scatter(*points[~out & ~wrong].T, s=34, color=color, edgecolor="white", linewidth=0.7)
    axes.scatter(*points[~out & wrong].T, s=34, marker="x", color=RED, linewidth=1.8)
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_title(title, fontsize=13, color=color, fontweight="bold", pad=8)
    for spine in axes.spines.values():
        spine.set_color("#d0d7de")


def main() -> None:
    plt.rcParams.update({
        "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "svg.hashsalt": "d2filter",
    })  # fmt: skip
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12.6, 4.5), gridspec_kw={"width_ratios": [1, 1, 1.12]}
    )
    points, scores, wrong = pool()
    size = round(SHARE * len(scores))
    by_score = np.argsort(-scores)[:size]
    ranked = d2filter.rank(points, scores, normalize=False, tuned_for=str(SHARE))
    own = ranked.select(size=size)
    scatter(left, points, wrong, by_score, ORANGE, f"score alone keeps {size} of {len(scores)}")
    scatter(middle, points, wrong, own, BLUE, f"d2filter keeps {size} of {len(scores)}")
    middle.set_xlabel(
        "near points are alike · open: dropped · ×: wrong caption, red if kept", fontsize=10
    )
    middle.xaxis.set_label_coords(-0.05, -0.03)
    shares = [10, 20, 30, 50, 70]
    for row, label, color, style in (
        ("best that is possible", "best possible", "#8a9199", ":"),
        ("D2 auto", "d2filter, no options", BLUE, "-"),
        ("D2 k=1 gamma=1", "D2 as published", "#6ba3d0", "--"),
        ("score", "score alone", ORANGE, "-"),
        ("random", "random", "#8a9199", "-"),
    ):
        wide = 3 if row == "D2 auto" else 2
        right.plot(
            shares, measured(row), style, color=color, linewidth=wide, marker="o",
            markersize=4 if style != ":" else 0, label=label, zorder=3 if wide == 3 else 2,
        )  # fmt: skip
    right.set(xlabel="% of the pool kept", ylim=(0, 104), xticks=shares)
    right.set_title("useful samples among those kept, %", fontsize=13, fontweight="bold", pad=8)
    right.grid(axis="y", color="#e5e8eb")
    right.set_axisbelow(True)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=10, loc="lower left")
    figure.tight_layout(w_pad=2)
    figure.savefig(HERE / "kept.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
