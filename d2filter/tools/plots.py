"""The report's plots: Bokeh figures of `Measures`, whose colors the page replaces by its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm.measures import coverage
from d2filter.tools.measures import Measures, Subset

# stand-ins for CSS variables of the page, which knows whether it is light or dark
STAND_INS = {
    "--ink": "#010203",
    "--line": "#010204",
    "--paper": "#010205",
    "--own": "#010206",
    "--score": "#010207",
    "--random": "#010208",
    "--all": "#010209",
}
_INK, _LINE, _PAPER, _OWN, _SCORE, _RANDOM, _ALL = STAND_INS.values()
_SWEPT = ("#b0579b", "#8a6fd1", "#3b9c9c", "#a98a1f", "#c0504d", "#5b8c3a", "#7f7f9f", "#d17f6f")

_BINS = 60
_HEIGHT = 290
_MOST_SWEPT = 16
_MOST_LABELS = 10
_COVERAGE = "coverage of distinct groups"
_PARETO = [("", "@name"), ("mean score", "@x{0.0000}"), ("coverage", "@y{0.0000}")]


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
        found["sweep"] = swept(m)
    return found


def seconds(m: Measures) -> Any:
    """Wall seconds of each stage."""
    stages = list(m.stats["seconds"])[::-1]
    taken = [m.stats["seconds"][stage] for stage in stages]
    peak = [m.stats["peak_rss_bytes"][stage] / 1e9 for stage in stages]
    plot = _figure("seconds", "", y_range=stages, height=60 + 34 * len(stages))
    bars = plot.hbar(
        y="stage", right="seconds", height=0.6, color=_OWN,
        source=_source(stage=stages, seconds=taken, peak=peak),
    )  # fmt: skip
    plot.x_range.start = 0
    _hover(
        plot, bars, [("stage", "@stage"), ("seconds", "@seconds{0,0.0}"), ("peak", "@peak{0.0} GB")]
    )
    return plot


def difficulty(m: Measures) -> Any:
    """Histogram of the difficulty: all ranked samples, kept ones, pruned ones."""
    raw = m.raw.astype(np.float64)
    edges = np.histogram_bin_edges(raw, _BINS)
    before, _ = np.histogram(raw, edges)
    kept, _ = np.histogram(raw[m.drawn.kept], edges)
    source = _source(
        left=edges[:-1], right=edges[1:], before=before, kept=kept, pruned=before - kept
    )
    plot = _figure(m.score, "samples")
    both = plot.quad(
        left="left", right="right", top="before", bottom="kept", source=source, color=_RANDOM,
        fill_alpha=0.55, line_color=None, legend_label="pruned",
    )  # fmt: skip
    own = plot.quad(
        left="left", right="right", top="kept", bottom=0, source=source, color=_OWN,
        fill_alpha=0.85, line_color=None, legend_label="kept",
    )  # fmt: skip
    plot.y_range.start = 0
    for bars in (both, own):
        _hover(
            plot, bars,
            [("score", "@left{0.000} to @right{0.000}"), ("kept", "@kept{0,0}"),
             ("pruned", "@pruned{0,0}")],
        )  # fmt: skip
    return _with_legend(plot)


def deciles(m: Measures, values: npt.NDArray[np.floating], axis: str) -> Any:
    """Share kept in each tenth of the pool."""
    share = coverage.kept_by_decile(values, m.drawn.kept)
    tenth = np.arange(1, coverage.DECILES + 1)
    plot = _figure(axis, "share kept")
    bars = plot.vbar(
        x="tenth", top="share", width=0.8, color=_OWN, source=_source(tenth=tenth, share=share)
    )
    plot.xaxis.ticker = tenth.tolist()
    plot.y_range.start, plot.y_range.end = 0, 1.02
    _budget_line(plot, m)
    _hover(plot, bars, [("tenth", "@tenth"), ("kept", "@share{0.0%}")])
    return plot


def coverage_bars(m: Measures) -> Any:
    """Coverage of several subsets of the same size."""
    bars = [(subset.name, subset.coverage, color) for subset, color in _subsets(m)]
    bars += [(row["setting"], row["coverage"], _SWEPT[0]) for row in _alike(m)]
    bars = [bar for bar in {bar[0]: bar for bar in bars}.values() if math.isfinite(bar[1])]
    if not bars:  # nothing is kept but held-out samples
        return _figure(_COVERAGE, "")
    names, values, colors = zip(*bars, strict=True)
    plot = _figure(
        _COVERAGE, "", y_range=names[::-1],
        height=60 + 30 * len(names),
    )  # fmt: skip
    shown = plot.hbar(
        y="name", right="value", height=0.6, color="color",
        source=_source(name=names, value=values, color=colors),
    )  # fmt: skip
    plot.x_range.start = 0
    _hover(plot, shown, [("", "@name"), ("coverage", "@value{0.0000}")])
    return plot


def nearest(m: Measures) -> Any:
    """Share of distinct groups with a kept sample within a distance."""
    plot = _figure("distance", "share of distinct groups")
    for subset, color in _subsets(m):
        finite = np.sort(subset.nearest[np.isfinite(subset.nearest)])
        if not finite.size:
            continue
        at = np.unique(np.linspace(0, finite.size - 1, 200).astype(np.int64))
        _line(
            plot, finite[at], (at + 1) / subset.nearest.size, subset.name, color, "distance",
            "share", "@x{0.000}", "@y{0.0%}",
        )  # fmt: skip
    plot.y_range.start, plot.y_range.end = 0, 1.02
    return _with_legend(plot, "bottom_right")


def budgets(m: Measures) -> Any:
    """What each fraction costs in coverage."""
    plot = _figure("fraction kept", _COVERAGE)
    colors = {"random": _RANDOM, m.score: _SCORE, m.method: _OWN}
    for curve in m.curves:
        _line(
            plot, curve.fractions, curve.coverage, curve.name, colors[curve.name], "fraction",
            "coverage", "@x{0%}", "@y{0.0000}", dots=True,
        )  # fmt: skip
    # what is kept need not be a prefix: --min-score drops samples from within
    _line(
        plot, [m.share], [m.own.coverage], "this run", _INK, "fraction", "coverage", "@x{0.0%}",
        "@y{0.0000}", dots=True,
    )  # fmt: skip
    plot.x_range.start, plot.x_range.end = 0, 1
    return _with_legend(plot, "bottom_right")


def cells(m: Measures) -> Any:
    """Each region of the pool: its size, and the share of it that is kept."""
    c = m.cells
    plot = _figure("samples in the region", "share kept", x_axis_type="log")
    dots = plot.scatter(
        x="size", y="share", size=7, color=_OWN, alpha=0.55, line_color=None,
        source=_source(size=c.size, share=c.share, score=c.score, center=c.center),
    )  # fmt: skip
    _budget_line(plot, m)
    plot.y_range.start, plot.y_range.end = -0.03, 1.03
    _hover(
        plot, dots,
        [("samples", "@size{0,0}"), ("kept", "@share{0.0%}"), ("mean score", "@score{0.000}"),
         ("around", "@center")],
    )  # fmt: skip
    return plot


def overlap(m: Measures) -> Any:
    """Kept by the run, by the score alone, by both."""
    own, score = m.own.kept, m.by_score.kept
    parts = {
        "both": (own & score, _ALL),
        f"{m.method} only": (own & ~score, _OWN),
        f"{m.score} only": (score & ~own, _SCORE),
        "neither": (~own & ~score, _RANDOM),
    }
    names = list(parts)
    counts = [int(mask.sum()) for mask, _ in parts.values()]
    plot = _figure("samples", "", y_range=names[::-1], height=190)
    bars = plot.hbar(
        y="name", right="count", height=0.6, color="color",
        source=_source(
            name=names, count=counts, share=[count / own.size for count in counts],
            color=[color for _, color in parts.values()],
        ),
    )  # fmt: skip
    plot.x_range.start = 0
    _hover(plot, bars, [("kept by", "@name"), ("samples", "@count{0,0}"), ("share", "@share{0%}")])
    return plot


def swept(m: Measures) -> Any:
    """Coverage of all settings that were swept."""
    plot = _figure("fraction kept", _COVERAGE, height=420)
    names = list(dict.fromkeys(row["setting"] for row in m.swept))
    for number, name in enumerate(names[:_MOST_SWEPT]):
        rows = [row for row in m.swept if row["setting"] == name]
        _line(
            plot, [float(row["fraction"]) for row in rows], [row["coverage"] for row in rows], name,
            _SWEPT[number % len(_SWEPT)], "fraction", "coverage", "@x{0%}", "@y{0.0000}",
            dots=True, dash="solid" if number < len(_SWEPT) else "dashed",
        )  # fmt: skip
    return _with_legend(plot, "bottom_right")


def pareto(m: Measures) -> Any:
    """Mean score against coverage: this run, its other budgets, and what else could be kept."""
    plot = _figure(f"mean {m.score} of what is kept", _COVERAGE, height=420)
    plot.x_range.range_padding = 0.3  # room for names
    colors = {"random": _RANDOM, m.score: _SCORE, m.method: _OWN}
    for curve in m.curves:
        color = colors[curve.name]
        names = [f"{curve.name}, {fraction:.0%}" for fraction in curve.fractions]
        source = _finite(x=curve.score, y=curve.coverage, name=names)
        plot.line(
            x="x", y="y", source=source, color=color, line_width=1.5, line_alpha=0.6,
            legend_label=_plain(f"{curve.name}, other budgets"),
        )  # fmt: skip
        dots = plot.scatter(x="x", y="y", source=source, color=color, size=5)
        _hover(plot, dots, _PARETO)
    rows = _alike(m)
    near = _finite(
        x=[row["score"] for row in rows], y=[row["coverage"] for row in rows],
        name=_told_apart([row["setting"] for row in rows]),
    )  # fmt: skip
    _named(plot, near, _SWEPT[0], "square", 8, labels=len(rows) <= _MOST_LABELS)
    for subset, color in _subsets(m):
        name = "this run" if subset is m.own else subset.name
        found = _finite(x=[subset.score], y=[subset.coverage], name=[name])
        _named(
            plot,
            found,
            color,
            "diamond" if subset is m.own else "circle",
            15 - 5 * (subset is not m.own),
        )
    return _with_legend(plot, "bottom_left")


def trials(dots: list[tuple[str, float, float]], chosen: str) -> Any:
    """Mean score against coverage of settings: (name, score, coverage) each, one of them chosen."""
    plot = _figure("mean score of what is kept", _COVERAGE, height=420)
    plot.x_range.range_padding = 0.2  # room for names
    for color, marker, size, own in ((_SWEPT[0], "square", 8, False), (_OWN, "diamond", 15, True)):
        some = [dot for dot in dots if (dot[0] == chosen) == own]
        names, x, y = zip(*some, strict=True) if some else ((), (), ())
        source = _finite(x=x, y=y, name=names)
        source.data["label"] = ["recommended" for _ in source.data["name"]]
        _named(plot, source, color, marker, size, labels=own, left=True)
    return plot


def _told_apart(settings: list[str]) -> list[str]:
    """Settings in the words that not all of them share."""
    words = [setting.split() for setting in settings]
    common = set.intersection(*map(set, words)) if len(words) > 1 else set()
    return [" ".join(w for w in some if w not in common) or " ".join(some) for some in words]


def _named(
    plot: Any,
    source: Any,
    color: str,
    marker: str,
    size: int,
    *,
    labels: bool = True,
    left: bool = False,
) -> None:
    """Dots with their labels beside them."""
    from bokeh.models.annotations import LabelSet

    dots = plot.scatter(
        x="x", y="y", source=source, color=color, marker=marker, size=size, line_color=_PAPER
    )
    _hover(plot, dots, _PARETO)
    if labels:
        plot.add_layout(
            LabelSet(
                x="x", y="y", text="label", source=source, x_offset=-10 if left else 8, y_offset=4,
                text_align="right" if left else "left", text_font_size="11px", text_color=_INK,
            )
        )  # fmt: skip


def _alike(m: Measures) -> list[dict[str, Any]]:
    """The swept settings at the budget of this run, measured on the same samples."""
    size, known = int(m.drawn.kept.sum()), {"score", "random", m.setting}
    return [
        row for row in m.swept if m.whole and row["kept"] == size and row["setting"] not in known
    ]


def _finite(*, x: Any, y: Any, name: Any) -> Any:
    """A source of the dots that can be drawn, labelled by their names."""
    dots = [dot for dot in zip(x, y, name, strict=True) if all(map(math.isfinite, dot[:2]))]
    return _source(
        x=[x for x, _, _ in dots], y=[y for _, y, _ in dots], name=[n for _, _, n in dots],
        label=[_plain(n) for _, _, n in dots],
    )  # fmt: skip


def _subsets(m: Measures) -> list[tuple[Subset, str]]:
    """By name: a run may itself be ranked at random."""
    found = [(m.everything, _ALL), (m.at_random, _RANDOM), (m.by_score, _SCORE), (m.own, _OWN)]
    return list({subset.name: (subset, color) for subset, color in found}.values())


def _figure(x: str, y: str, *, height: int = _HEIGHT, **more: Any) -> Any:
    from bokeh.plotting import figure

    plot = figure(
        height=height, sizing_mode="stretch_width", toolbar_location=None, tools="",
        background_fill_alpha=0, border_fill_alpha=0, outline_line_color=None, **more,
    )  # fmt: skip
    plot.xaxis.axis_label, plot.yaxis.axis_label = _plain(x), y
    for axis in (plot.xaxis, plot.yaxis):
        axis.axis_label_text_color = axis.major_label_text_color = _INK
        axis.axis_label_text_font_style = "normal"
        axis.axis_line_color = axis.major_tick_line_color = _LINE
        axis.minor_tick_line_color = None
    plot.grid.grid_line_color = _LINE
    plot.grid.grid_line_alpha = 0.6
    return plot


def _source(**columns: Any) -> Any:
    from bokeh.models import ColumnDataSource

    # lists: plain JSON, and no int64, which browsers do not know
    plain = {n: v.tolist() if isinstance(v, np.ndarray) else list(v) for n, v in columns.items()}
    return ColumnDataSource(plain)


def _line(
    plot: Any, x: Any, y: Any, name: str, color: str, x_says: str, y_says: str, x_format: str,
    y_format: str, *, dots: bool = False, dash: str = "solid",
) -> None:  # fmt: skip
    there = np.isfinite(np.asarray(y, np.float64))
    x, y = np.asarray(x, np.float64)[there], np.asarray(y, np.float64)[there]
    # the name as a column: in a tooltip's own text it would be read as HTML
    source = _source(x=x, y=y, name=[name] * x.size)
    drawn = plot.line(
        x="x", y="y", source=source, color=color, line_width=2, line_dash=dash, legend_label=name
    )
    if dots:
        drawn = plot.scatter(x="x", y="y", source=source, color=color, size=6, legend_label=name)
    _hover(plot, drawn, [("", "@name"), (x_says, x_format), (y_says, y_format)])


def _plain(name: str) -> str:
    """A name of the user's, without what would make it a field of a tooltip or a formula."""
    return name.replace("@", "").replace("$", "")


def _budget_line(plot: Any, m: Measures) -> None:
    from bokeh.models.annotations import Span

    plot.add_layout(Span(location=m.share, dimension="width", line_color=_INK, line_dash="dotted"))


def _hover(plot: Any, renderer: Any, tooltips: list[tuple[str, str]]) -> None:
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(renderers=[renderer], tooltips=tooltips, visible=False))


def _with_legend(plot: Any, where: str = "top_left") -> Any:
    if not plot.legend:
        return plot
    legend = plot.legend[0]
    legend.location = where
    legend.background_fill_color = _PAPER
    legend.background_fill_alpha = 0.7
    legend.border_line_color = None
    legend.label_text_color = _INK
    legend.label_text_font_size = "12px"
    legend.padding, legend.spacing = 4, 0
    return plot
