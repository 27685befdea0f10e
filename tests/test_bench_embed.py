"""The benchmark of `embed` runs, and measures the parts that it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from d2filter.config import BUNDLED_MODEL
from jobs import bench_embed


@pytest.mark.nightly  # most of its time is loading torch
def test_every_part_is_timed_and_end_to_end_publishes_each_sample(tmp_path: Path) -> None:
    setting = bench_embed.Setting(
        name="tiny", model=BUNDLED_MODEL, sizes=((640, 480),), samples=5, batch_size=4, turns=2
    )
    (timing,) = bench_embed.measure(setting, tmp_path / "work")
    parts = {"decode", "decode + transform", "bare model", "end to end", *bench_embed.DRAFTS}
    assert timing.seconds.keys() == timing.cpu.keys() == parts
    assert all(len(turns) == 2 and min(turns) > 0 for turns in timing.seconds.values())
    metadata = tmp_path / "work/out/metadata"
    assert pq.read_table(metadata / "640.parquet").num_rows == 5
    arrays = np.load(metadata / "640.npz")
    assert all(np.isfinite(arrays[name]).all() for name in arrays.files)
    # other pixels, and still the same picture
    assert all(0.99 < least < mean < 1 for mean, least in timing.drafts.values())


def test_shares_of_time_are_computed_within_each_turn() -> None:
    timing = bench_embed.Timing(size=(1, 1), kilobytes=1, samples=8)
    timing.seconds.update(
        {"bare model": [2.0, 3.0], "decode": [1.0, 4.0], "end to end": [4.0, 8.0]}
    )
    assert timing.rate("bare model") == 8 / 2.5
    assert timing.share(["bare model"]) == [0.5, 3 / 8]
    assert timing.share(["bare model", "decode"]) == [0.75, 7 / 8]
    assert timing.share(["bare model", "decode"], slowest=True) == [0.5, 0.5]


def test_a_picture_has_the_bytes_of_a_photograph() -> None:
    for (width, height), least, most in (((640, 480), 30e3, 150e3), ((1600, 1200), 150e3, 900e3)):
        sizes = [len(bench_embed.picture(seed, width, height)) for seed in range(3)]
        assert least < np.mean(sizes) < most


@pytest.mark.parametrize(("side", "size"), [(224, (400, 300)), (448, (800, 600)), (1100, None)])
def test_draft_takes_the_least_size_that_is_large_enough(
    side: int, size: tuple[int, int] | None
) -> None:
    opened = []

    class Model:
        @staticmethod
        def transform(image: object) -> None:
            opened.append(image)

    bench_embed._drafted(Model(), side, bench_embed.picture(0, 1600, 1200))  # type: ignore[arg-type]
    assert opened[0].size == (size or (1600, 1200))
