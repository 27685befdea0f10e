"""Bokeh figures as the pages draw them: axes, lines, dots, tooltips and legends.

The page decides between light and dark, so figures hold stand-ins for its colors. Its script
replaces them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

STAND_INS = {
    "--ink": "#010203",
    "--line": "#010204",
    "--paper": "#010205",
    "--own": "#010206",
    "--score": "#010207",
    "--random": "#010208",
    "--all": "#010209",
}
"""the color that stands for each CSS variable of the page"""
INK, LINE, PAPER, OWN, SCORE, RANDOM, ALL = STAND_INS.values()
PALETTE = ("#b0579b", "#8a6fd1", "#3b9c9c", "#a98a1f", "#c0504d", "#5b8c3a", "#7f7f9f", "#d17f6f")
"""colors of swept settings, readable on light and on dark"""

SCORE_AND_COVERAGE = [("", "@name"), ("mean score", "@x{0.0000}"), ("coverage", "@y{0.0000}")]
"""tooltip of a dot with these axes"""


def figure(x: str, y: str, *, height: int = 290, **more: Any) -> Any:
    """An empty figure as wide as its place, `height` pixels high, with these axis labels."""
    from bokeh.plotting import figure as bokeh_figure

    plot = bokeh_figure(
        height=height, sizing_mode="stretch_width", toolbar_location=None, tools="",
        background_fill_alpha=0, border_fill_alpha=0, outline_line_color=None, **more,
    )  # fmt: skip
    plot.xaxis.axis_label, plot.yaxis.axis_label = plain(x), y
    for axis in (plot.xaxis, plot.yaxis):
        axis.axis_label_text_color = axis.major_label_text_color = INK
        axis.axis_label_text_font_style = "normal"
        axis.axis_line_color = axis.major_tick_line_color = LINE
        axis.minor_tick_line_color = None
    plot.grid.grid_line_color = LINE
    plot.grid.grid_line_alpha = 0.6
    return plot


def source(**columns: Any) -> Any:
    """A ColumnDataSource of columns of equal length."""
    from bokeh.models import ColumnDataSource

    # lists: plain JSON, and no int64, which browsers do not know
    return ColumnDataSource({
        name: column.tolist() if isinstance(column, np.ndarray) else list(column)
        for name, column in columns.items()
    })  # fmt: skip


def finite(*, x: Any, y: Any, name: Any) -> Any:
    """A source of the dots that can be drawn, with their names as labels."""
    dots = [dot for dot in zip(x, y, name, strict=True) if all(map(math.isfinite, dot[:2]))]
    return source(
        x=[x for x, _, _ in dots], y=[y for _, y, _ in dots], name=[n for _, _, n in dots],
        label=[plain(n) for _, _, n in dots],
    )  # fmt: skip


def line(
    plot: Any, x: Any, y: Any, name: str, color: str, x_name: str, y_name: str, x_format: str,
    y_format: str, *, dots: bool = False,
) -> None:  # fmt: skip
    """Add a line with a legend entry and a tooltip; values that are not finite are left out."""
    is_drawn = np.isfinite(np.asarray(y, np.float64))
    x, y = np.asarray(x, np.float64)[is_drawn], np.asarray(y, np.float64)[is_drawn]
    # the name as a column: in a tooltip's own text it would be read as HTML
    points = source(x=x, y=y, name=[name] * x.size)
    drawn = plot.line(
        x="x", y="y", source=points, color=color, line_width=2, legend_label=plain(name)
    )
    if dots:
        drawn = plot.scatter(
            x="x", y="y", source=points, color=color, size=6, legend_label=plain(name)
        )
    hover(plot, drawn, [("", "@name"), (x_name, x_format), (y_name, y_format)])


def named_dots(
    plot: Any, points: Any, color: str, marker: str, size: int, *, labels: bool = True,
    left: bool = False,
) -> None:  # fmt: skip
    """Add dots with their labels beside them, on the left or on the right."""
    dots = plot.scatter(
        x="x", y="y", source=points, color=color, marker=marker, size=size, line_color=PAPER
    )
    hover(plot, dots, SCORE_AND_COVERAGE)
    if labels:
        label_dots(plot, points, left=left)


def label_dots(plot: Any, points: Any, *, left: bool = False) -> None:
    """Add the column `label` as text beside the dots."""
    from bokeh.models.annotations import LabelSet

    plot.add_layout(
        LabelSet(
            x="x", y="y", text="label", source=points, x_offset=-10 if left else 8, y_offset=4,
            text_align="right" if left else "left", text_font_size="11px", text_color=INK,
        )
    )  # fmt: skip


def hover(plot: Any, renderer: Any, tooltips: list[tuple[str, str]]) -> None:
    """Add a tooltip of (name, value) lines to a renderer."""
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(renderers=[renderer], tooltips=tooltips, visible=False))


def plain(name: str) -> str:
    """A user's name without the characters that make a tooltip's field or a formula."""
    return name.replace("@", "").replace("$", "")


def with_legend(plot: Any, where: str = "top_left") -> Any:
    """The figure with its legend, if it has one, at this place and in the page's colors."""
    if not plot.legend:
        return plot
    legend = plot.legend[0]
    legend.location = where
    legend.background_fill_color = PAPER
    legend.background_fill_alpha = 0.7
    legend.border_line_color = None
    legend.label_text_color = INK
    legend.label_text_font_size = "12px"
    legend.padding, legend.spacing = 4, 0
    return plot
