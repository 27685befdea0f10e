"""Plots of `sweep`: a curve for each setting, the same color, dash and marker in each plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2filter.tools import drawing

Row = Mapping[str, Any]

MOST_CURVES = 40  # PALETTE × _LINES: more would repeat
_MOST_LABELED = 8  # settings; more labels would cover each other
_LINES = (
    # dashes, marker, the marker as an SVG path around (0, 0)
    ("solid", "circle", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0"),
    ("7 3", "square", "M-3.5-3.5h7v7h-7z"),
    ("2 3", "triangle", "M0-4.5l4.5 8h-9z"),
    ("9 3 2 3", "diamond", "M0-5l4 5l-4 5l-4-5z"),
    ("14 4", "inverted_triangle", "M0 4.5l4.5-8h-9z"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How the curve of a setting looks, in plots and in the legend of the page."""

    setting: str
    color: str
    dashes: str
    """lengths of dashes and gaps in pixels, or `solid`"""
    marker: str
    """Bokeh's name of the marker"""
    path: str
    """the marker as an SVG path around (0, 0)"""


def styles(rows: Sequence[Row]) -> list[Style]:
    """Styles of the first MOST_CURVES settings, in the order of the rows."""
    found = []
    for number, setting in enumerate(list(dict.fromkeys(r["setting"] for r in rows))[:MOST_CURVES]):
        dashes, marker, path = _LINES[number // len(drawing.PALETTE)]
        color = drawing.PALETTE[number % len(drawing.PALETTE)]
        found.append(Style(setting=setting, color=color, dashes=dashes, marker=marker, path=path))
    return found


def all_panels(rows: Sequence[Row], measures: Sequence[str]) -> dict[str, Any]:
    """A figure for each of these measures, and one of score against coverage."""
    shown = styles(rows)
    found = {name: panel(rows, shown, name) for name in measures}
    return {"score-coverage": score_against_coverage(rows, shown), **found}


def any_of(rows: Sequence[Row], measure: str) -> bool:
    """True if a row has a value of this measure."""
    return any(row[measure] is not None for row in rows)


def panel(rows: Sequence[Row], shown: Sequence[Style], measure: str) -> Any:
    """A measure against the fraction kept."""
    plot = drawing.figure("fraction kept", measure)
    _curves(plot, rows, shown, "fraction", measure, [(measure, "@y{0.0000}")])
    plot.x_range.default_span = 0.5  # axis length if there is one fraction
    return plot


def score_against_coverage(rows: Sequence[Row], shown: Sequence[Style]) -> Any:
    """Mean score against coverage, a dot for each fraction."""
    plot = drawing.figure("mean score of the kept samples", "coverage", height=420)
    tooltip = [("mean score", "@x{0.0000}"), ("coverage", "@y{0.0000}")]
    dots = _curves(plot, rows, shown, "score", "coverage", tooltip)
    if len(shown) <= _MOST_LABELED:
        drawing.label_dots(plot, dots)
    return plot


def _curves(
    plot: Any, rows: Sequence[Row], shown: Sequence[Style], x: str, y: str,
    tooltip: list[tuple[str, str]],
) -> Any:  # fmt: skip
    """Add the curves of all settings; returns the source of their dots.

    Both sources have a column `setting`, by which the page's legend selects curves.
    """
    lines: list[tuple[Any, ...]] = []
    dots: list[tuple[Any, ...]] = []
    for style in shown:
        own = [r for r in rows if r["setting"] == style.setting and r[y] is not None]
        points = [(float(r[x]), r[y], r["fraction"], r["kept"]) for r in own]
        if not points:
            continue
        xs, ys, *_ = zip(*points, strict=True)
        lines.append((style.setting, xs, ys, style.color, style.dashes))
        dots += [(style.setting, *point, style.color, style.marker) for point in points]
    columns = zip(*lines, strict=True) if lines else [()] * 5
    plot.multi_line(
        xs="xs", ys="ys", line_color="color", line_dash="dashes", line_width=2,
        nonselection_line_alpha=0.12,
        source=_source(("setting", "xs", "ys", "color", "dashes"), columns),
    )  # fmt: skip
    columns = zip(*dots, strict=True) if dots else [()] * 7
    source = _source(("setting", "x", "y", "label", "kept", "color", "marker"), columns)
    drawn = plot.scatter(
        x="x", y="y", color="color", marker="marker", size=7, source=source,
        nonselection_alpha=0.12,
    )  # fmt: skip
    budget = ("kept", "@label of the pool, @kept{0,0} samples")
    drawing.hover(plot, drawn, [("", "@setting"), budget, *tooltip])
    return source


def _source(names: Sequence[str], columns: Any) -> Any:
    return drawing.source(**dict(zip(names, columns, strict=True)))
