"""The demo: it draws, embeds and ranks a pool, and shows that d2 keeps the useful pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.algorithm.measures import ground_truth
from d2filter.cli.main import main
from d2filter.errors import RunStateError
from d2filter.formats.paths import Folder
from d2filter.tools import demo


@given(st.integers(2, 30), st.integers(0, 2**32))
def test_usefulness_equals_its_definition(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group, swapped = rng.integers(0, 1 + n // 2, n), rng.random(n) < 0.3
    order = rng.permutation(n)
    size = int(rng.integers(1, n + 1))
    got = ground_truth.usefulness(order, group, swapped, size)
    useful = [
        not swapped[i] and all(group[j] != group[i] for j in order[:place])
        for place, i in enumerate(order[:size])
    ]
    assert got.useful == pytest.approx(np.mean(useful))
    assert got.swapped == pytest.approx(swapped[order[:size]].mean())
    covered = {group[i] for i in order[:size] if not swapped[i]}
    assert got.groups_covered == pytest.approx(len(covered) / len(set(group)))
    best = ground_truth.usefulness(ground_truth.best_order(group, swapped), group, swapped, size)
    assert best.useful >= got.useful - 1e-12
    assert best.groups_covered >= got.groups_covered - 1e-12


def test_the_demo_writes_the_requested_layout() -> None:
    layout = demo.lay_out(4200, 0)
    assert layout.copy.mean() == pytest.approx(0.3, abs=0.001)
    assert layout.swapped.mean() == pytest.approx(0.2, abs=0.005)
    originals = layout.scene[~layout.copy]
    assert len(set(originals)) == len(originals)
    assert set(layout.scene[layout.copy]) <= set(originals)
    # a swapped caption never describes its own picture
    moved = layout.swapped
    assert (layout.scene[layout.caption_of[moved]] != layout.scene[moved]).all()
    assert (demo.lay_out(4200, 1).scene != layout.scene).any()


def test_pairs_are_drawn_from_the_seed_alone() -> None:
    layout = demo.lay_out(100, 3)
    first = demo.draw_pair(layout, 5, 3)
    demo.draw_pair(layout, 6, 3)
    assert demo.draw_pair(layout, 5, 3) == first
    assert demo.draw_pair(demo.lay_out(100, 4), 5, 4) != first


@pytest.mark.usefixtures("cluster")
def test_d2_keeps_more_useful_pairs_than_the_baselines_in_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = demo.demo(str(tmp_path), pairs=1200, seed=5, say=print)
    published, auto, score, random, best = (line.result for line in lines)
    assert best.useful == 1.0
    assert auto.useful > published.useful > score.useful > random.useful
    assert random.swapped == pytest.approx(0.2, abs=0.04)
    assert max(auto.swapped, published.swapped) < 0.02
    shown = capsys.readouterr().out
    assert "next:    d2filter select --out-dir" in shown
    assert main(["verify", str(tmp_path / "d2-auto")]) == 0
    capsys.readouterr()
    # the same command continues: nothing is drawn or embedded again
    before = (tmp_path / "shards/00000.tar").stat().st_mtime_ns
    again = demo.demo(str(tmp_path), pairs=1200, seed=5, say=print)
    assert again == lines
    assert capsys.readouterr().out.count("done before") == 9
    assert (tmp_path / "shards/00000.tar").stat().st_mtime_ns == before


def test_another_demo_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    demo._claim(folder, 120, 0)
    demo._claim(folder, 120, 0)
    with pytest.raises(RunStateError, match="holds a demo of 120 pairs, seed 0"):
        demo._claim(folder, 150, 0)
    with pytest.raises(RunStateError):
        demo._claim(folder, 120, 1)


def test_too_few_pairs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--pairs", "3", "--out-dir", str(tmp_path)]) == 2
    assert "pairs is 3" in capsys.readouterr().err
    assert not Folder(str(tmp_path)).names()
