"""The plots of the report, as Bokeh figures of `Measures`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm.measures import coverage
from d2filter.tools import drawing, sweep_plots
from d2filter.tools.measures import Measures, Subset

_BINS = 60
_MOST_LABELS = 10
_COVERAGE = "coverage of distinct groups"


def all_plots(m: Measures) -> dict[str, Any]:
    """Figures by the name that the page gives their place."""
    found = {
        "seconds": seconds(m),
        "difficulty": difficulty(m),
        "score_deciles": deciles(m, m.raw, f"tenths by {m.score}, low to high"),
        "density_deciles": deciles(
            m, m.drawn.spacing, "tenths by distance to neighbors, dense to sparse"
        ),
        "pareto": pareto(m),
        "coverage": coverage_bars(m),
        "nearest": nearest(m),
        "budgets": budgets(m),
        "cells": cells(m),
        "overlap": overlap(m),
    }
    if m.swept:
        found["sweep"] = sweep_plots.panel(m.swept, sweep_plots.styles(m.swept), "coverage")
    return found


def seconds(m: Measures) -> Any:
    """Wall seconds of each stage."""
    stages = list(m.stats["seconds"])[::-1]
    taken = [m.stats["seconds"][stage] for stage in stages]
    peak = [m.stats["peak_rss_bytes"][stage] / 1e9 for stage in stages]
    plot = drawing.figure("seconds", "", y_range=stages, height=60 + 34 * len(stages))
    bars = plot.hbar(
        y="stage", right="seconds", height=0.6, color=drawing.OWN,
        source=drawing.source(stage=stages, seconds=taken, peak=peak),
    )  # fmt: skip
    plot.x_range.start = 0
    drawing.hover(
        plot, bars, [("stage", "@stage"), ("seconds", "@seconds{0,0.0}"), ("peak", "@peak{0.0} GB")]
    )
    return plot


def difficulty(m: Measures) -> Any:
    """Histogram of the difficulty: all ranked samples, kept ones, pruned ones."""
    raw = m.raw.astype(np.float64)
    edges = np.histogram_bin_edges(raw, _BINS)
    before, _ = np.histogram(raw, edges)
    kept, _ = np.histogram(raw[m.drawn.kept], edges)
    source = drawing.source(
        left=edges[:-1], right=edges[1:], before=before, kept=kept, pruned=before - kept
    )
    plot = drawing.figure(m.score, "samples")
    both = plot.quad(
        left="left", right="right", top="before", bottom="kept", source=source,
        color=drawing.RANDOM, fill_alpha=0.55, line_color=None, legend_label="pruned",
    )  # fmt: skip
    own = plot.quad(
        left="left", right="right", top="kept", bottom=0, source=source, color=drawing.OWN,
        fill_alpha=0.85, line_color=None, legend_label="kept",
    )  # fmt: skip
    plot.y_range.start = 0
    for bars in (both, own):
        drawing.hover(
            plot, bars,
            [("score", "@left{0.000} to @right{0.000}"), ("kept", "@kept{0,0}"),
             ("pruned", "@pruned{0,0}")],
        )  # fmt: skip
    return drawing.with_legend(plot)


def deciles(m: Measures, values: npt.NDArray[np.floating], axis: str) -> Any:
    """Share kept in each tenth of the pool."""
    share = coverage.kept_by_decile(values, m.drawn.kept)
    tenth = np.arange(1, coverage.DECILES + 1)
    plot = drawing.figure(axis, "share kept")
    bars = plot.vbar(
        x="tenth",
        top="share",
        width=0.8,
        color=drawing.OWN,
        source=drawing.source(tenth=tenth, share=share),
    )
    plot.xaxis.ticker = tenth.tolist()
    plot.y_range.start, plot.y_range.end = 0, 1.02
    _budget_line(plot, m)
    drawing.hover(plot, bars, [("tenth", "@tenth"), ("kept", "@share{0.0%}")])
    return plot


def coverage_bars(m: Measures) -> Any:
    """Coverage of several subsets of the same size."""
    bars = [(subset.name, subset.coverage, color) for subset, color in _subsets(m)]
    bars += [(row["setting"], row["coverage"], drawing.PALETTE[0]) for row in _alike(m)]
    bars = [bar for bar in {bar[0]: bar for bar in bars}.values() if math.isfinite(bar[1])]
    if not bars:  # nothing is kept but held-out samples
        return drawing.figure(_COVERAGE, "")
    names, values, colors = zip(*bars, strict=True)
    plot = drawing.figure(
        _COVERAGE, "", y_range=names[::-1],
        height=60 + 30 * len(names),
    )  # fmt: skip
    shown = plot.hbar(
        y="name", right="value", height=0.6, color="color",
        source=drawing.source(name=names, value=values, color=colors),
    )  # fmt: skip
    plot.x_range.start = 0
    drawing.hover(plot, shown, [("", "@name"), ("coverage", "@value{0.0000}")])
    return plot


def nearest(m: Measures) -> Any:
    """Share of distinct groups with a kept sample within a distance."""
    plot = drawing.figure("distance", "share of distinct groups")
    for subset, color in _subsets(m):
        finite = np.sort(subset.nearest[np.isfinite(subset.nearest)])
        if not finite.size:
            continue
        at = np.unique(np.linspace(0, finite.size - 1, 200).astype(np.int64))
        drawing.line(
            plot, finite[at], (at + 1) / subset.nearest.size, subset.name, color, "distance",
            "share", "@x{0.000}", "@y{0.0%}",
        )  # fmt: skip
    plot.y_range.start, plot.y_range.end = 0, 1.02
    return drawing.with_legend(plot, "bottom_right")


def budgets(m: Measures) -> Any:
    """What each fraction costs in coverage."""
    plot = drawing.figure("fraction kept", _COVERAGE)
    colors = {"random": drawing.RANDOM, m.score: drawing.SCORE, m.method: drawing.OWN}
    for curve in m.curves:
        drawing.line(
            plot, curve.fractions, curve.coverage, curve.name, colors[curve.name], "fraction",
            "coverage", "@x{0%}", "@y{0.0000}", dots=True,
        )  # fmt: skip
    # what is kept need not be a prefix: --min-score drops samples from within
    drawing.line(
        plot, [m.share], [m.own.coverage], "this run", drawing.INK, "fraction", "coverage",
        "@x{0.0%}", "@y{0.0000}", dots=True,
    )  # fmt: skip
    plot.x_range.start, plot.x_range.end = 0, 1
    return drawing.with_legend(plot, "bottom_right")


def cells(m: Measures) -> Any:
    """Each region of the pool: its size, and the share of it that is kept."""
    c = m.cells
    plot = drawing.figure("samples in the region", "share kept", x_axis_type="log")
    dots = plot.scatter(
        x="size", y="share", size=7, color=drawing.OWN, alpha=0.55, line_color=None,
        source=drawing.source(size=c.size, share=c.share, score=c.score, center=c.center),
    )  # fmt: skip
    _budget_line(plot, m)
    plot.y_range.start, plot.y_range.end = -0.03, 1.03
    drawing.hover(
        plot, dots,
        [("samples", "@size{0,0}"), ("kept", "@share{0.0%}"), ("mean score", "@score{0.000}"),
         ("around", "@center")],
    )  # fmt: skip
    return plot


def overlap(m: Measures) -> Any:
    """Kept by the run, by the score alone, by both."""
    own, score = m.own.kept, m.by_score.kept
    parts = {
        "both": (own & score, drawing.ALL),
        f"{m.method} only": (own & ~score, drawing.OWN),
        f"{m.score} only": (score & ~own, drawing.SCORE),
        "neither": (~own & ~score, drawing.RANDOM),
    }
    names = list(parts)
    counts = [int(mask.sum()) for mask, _ in parts.values()]
    plot = drawing.figure("samples", "", y_range=names[::-1], height=190)
    bars = plot.hbar(
        y="name", right="count", height=0.6, color="color",
        source=drawing.source(
            name=names, count=counts, share=[count / own.size for count in counts],
            color=[color for _, color in parts.values()],
        ),
    )  # fmt: skip
    plot.x_range.start = 0
    drawing.hover(
        plot, bars, [("kept by", "@name"), ("samples", "@count{0,0}"), ("share", "@share{0%}")]
    )
    return plot


def pareto(m: Measures) -> Any:
    """Mean score against coverage: this run, its other budgets, and what else could be kept."""
    plot = drawing.figure(f"mean {m.score} of what is kept", _COVERAGE, height=420)
    plot.x_range.range_padding = 0.3  # room for names
    colors = {"random": drawing.RANDOM, m.score: drawing.SCORE, m.method: drawing.OWN}
    for curve in m.curves:
        color = colors[curve.name]
        names = [f"{curve.name}, {fraction:.0%}" for fraction in curve.fractions]
        source = drawing.finite(x=curve.score, y=curve.coverage, name=names)
        plot.line(
            x="x", y="y", source=source, color=color, line_width=1.5, line_alpha=0.6,
            legend_label=drawing.plain(f"{curve.name}, other budgets"),
        )  # fmt: skip
        dots = plot.scatter(x="x", y="y", source=source, color=color, size=5)
        drawing.hover(plot, dots, drawing.SCORE_AND_COVERAGE)
    rows = _alike(m)
    near = drawing.finite(
        x=[row["score"] for row in rows], y=[row["coverage"] for row in rows],
        name=_unshared_words([row["setting"] for row in rows]),
    )  # fmt: skip
    drawing.named_dots(
        plot, near, drawing.PALETTE[0], "square", 8, labels=len(rows) <= _MOST_LABELS
    )
    for subset, color in _subsets(m):
        name = "this run" if subset is m.own else subset.name
        found = drawing.finite(x=[subset.score], y=[subset.coverage], name=[name])
        drawing.named_dots(
            plot,
            found,
            color,
            "diamond" if subset is m.own else "circle",
            15 - 5 * (subset is not m.own),
        )
    return drawing.with_legend(plot, "bottom_left")


def trials(dots: list[tuple[str, float, float]], chosen: str) -> Any:
    """Mean score against coverage of settings: (name, score, coverage) each, one of them chosen."""
    plot = drawing.figure("mean score of what is kept", _COVERAGE, height=420)
    plot.x_range.range_padding = 0.2  # room for names
    for color, marker, size, own in (
        (drawing.PALETTE[0], "square", 8, False),
        (drawing.OWN, "diamond", 15, True),
    ):
        some = [dot for dot in dots if (dot[0] == chosen) == own]
        names, x, y = zip(*some, strict=True) if some else ((), (), ())
        source = drawing.finite(x=x, y=y, name=names)
        source.data["label"] = ["recommended" for _ in source.data["name"]]
        drawing.named_dots(plot, source, color, marker, size, labels=own, left=True)
    return plot


def _unshared_words(settings: list[str]) -> list[str]:
    """Settings in the words that not all of them share."""
    words = [setting.split() for setting in settings]
    common = set.intersection(*map(set, words)) if len(words) > 1 else set()
    return [" ".join(w for w in some if w not in common) or " ".join(some) for some in words]


def _alike(m: Measures) -> list[dict[str, Any]]:
    """The swept settings at the budget of this run, measured on the same samples."""
    size, known = int(m.drawn.kept.sum()), {"score", "random", m.setting}
    return [
        row for row in m.swept if m.whole and row["kept"] == size and row["setting"] not in known
    ]


def _subsets(m: Measures) -> list[tuple[Subset, str]]:
    """By name: a run may itself be ranked at random."""
    found = [
        (m.everything, drawing.ALL),
        (m.at_random, drawing.RANDOM),
        (m.by_score, drawing.SCORE),
        (m.own, drawing.OWN),
    ]
    return list({subset.name: (subset, color) for subset, color in found}.values())


def _budget_line(plot: Any, m: Measures) -> None:
    from bokeh.models.annotations import Span

    plot.add_layout(
        Span(location=m.share, dimension="width", line_color=drawing.INK, line_dash="dotted")
    )
