"""Plots of a sweep: every value is drawn once, and each setting looks different."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bokeh.models import ColumnDataSource

from d2filter.tools import sweep_plots


def rows(settings: int, fractions: tuple[str, ...] = ("0.1", "0.5")) -> list[dict[str, Any]]:
    rng = np.random.default_rng(settings)
    return [
        {"setting": f"s{i}", "fraction": f, "kept": round(100 * float(f)), "score": rng.random(),
         "coverage": rng.random(), "wrong": None if i % 2 else rng.random()}
        for i in range(settings) for f in fractions
    ]  # fmt: skip


def dots(plot: Any) -> list[tuple[Any, ...]]:
    (source,) = (s for s in plot.select({"type": ColumnDataSource}) if "kept" in s.data)
    names = ("setting", "x", "y", "label", "kept")
    return list(zip(*(source.data[name] for name in names), strict=True))


@pytest.mark.parametrize("settings", [1, 3, 40])
def test_every_value_is_a_dot_with_its_budget(settings: int) -> None:
    found = rows(settings)
    figures = sweep_plots.all_panels(found, ["coverage", "wrong"])
    assert dots(figures["coverage"]) == [
        (r["setting"], float(r["fraction"]), r["coverage"], r["fraction"], r["kept"]) for r in found
    ]
    assert dots(figures["score-coverage"]) == [
        (r["setting"], r["score"], r["coverage"], r["fraction"], r["kept"]) for r in found
    ]
    # what was not measured is no dot
    assert [d[0] for d in dots(figures["wrong"])] == [
        r["setting"] for r in found if r["wrong"] is not None
    ]


def test_no_two_curves_look_alike_and_further_settings_are_left_out() -> None:
    shown = sweep_plots.styles(rows(50))
    assert [style.setting for style in shown] == [f"s{i}" for i in range(sweep_plots.MOST_CURVES)]
    assert len({(style.color, style.dashes) for style in shown}) == len(shown)
    assert len({(style.color, style.marker) for style in shown}) == len(shown)


def test_a_measure_that_no_setting_has_is_known() -> None:
    found = [row | {"wrong": None} for row in rows(2)]
    assert not sweep_plots.any_of(found, "wrong")
    assert sweep_plots.any_of(rows(2), "wrong")
    assert dots(sweep_plots.panel(found, sweep_plots.styles(found), "wrong")) == []
