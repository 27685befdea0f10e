"""Sentinel scores such as −9999: the alert, the error if scores become equal, and the clipping."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import pools
from support.runs import difficulties, run, stats

from d2filter.algorithm import sizes

pytestmark = pytest.mark.usefixtures("cluster")

N = 400
POOL = pools.make(N, 8)
SCORES = np.random.default_rng(7).normal(0.25, 0.05, N).astype(np.float32)
SCORES[3] = SCORES[4]


def with_sentinel(value: float, rows: tuple[int, ...] = (11,)) -> list[float]:
    scores = SCORES.copy()
    scores[list(rows)] = value
    return scores.tolist()


def metadata(
    folder: Path, scores: list[float], *, files: int = 1, shuffle: int | None = None
) -> Path:
    return pools.write(folder, POOL, files=files, shuffle=shuffle, columns={"mine": scores})


def subset(out: Path) -> bytes:
    return (out / "subset.npy").read_bytes()


@pytest.mark.parametrize("first", ["high", "low"])
def test_one_sentinel_is_an_alert_with_its_score_and_uid(tmp_path: Path, first: str) -> None:
    folder = metadata(tmp_path / "m", with_sentinel(-9999))
    words = ("--metadata-dir", folder, "--out-dir", tmp_path / "o", "--score-column", "mine")
    assert run("run", *words, "--keep-first", first) == 0
    (alert,) = stats(tmp_path / "o")["catalog"]["alerts"]
    assert f"reaches to -9999 of uid {POOL['uid'][11]}" in alert
    assert "--clip-scores 0.001" in alert
    assert "mine" in alert
    assert "\n" not in alert
    # a pool without it has nothing to say
    folder = metadata(tmp_path / "n", SCORES.tolist())
    words = ("--metadata-dir", folder, "--out-dir", tmp_path / "p", "--score-column", "mine")
    assert run("run", *words, "--keep-first", first) == 0
    assert stats(tmp_path / "p")["catalog"]["alerts"] == []


@pytest.mark.parametrize("sentinel", [1e20, 3e38, -3e38])
def test_scores_that_become_equal_when_normalized_are_refused_in_one_line(
    tmp_path: Path, sentinel: float, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = metadata(tmp_path / "m", with_sentinel(sentinel))
    words = ("--metadata-dir", folder, "--out-dir", tmp_path / "o", "--score-column", "mine")
    assert run("run", *words) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"reaches to {sentinel:g} of uid {POOL['uid'][11]}" in line
    assert "--clip-scores 0.001" in line
    # what it advises works at once, in the same run directory
    assert run("run", *words, "--clip-scores", "0.001") == 0
    assert stats(tmp_path / "o")["catalog"]["alerts"] == []
    assert run("verify", tmp_path / "o") == 0


def test_few_scores_that_keep_their_units_are_no_error(tmp_path: Path) -> None:
    scores = [float(i % 10) for i in range(N)]
    scores[11] = 1e12
    folder = metadata(tmp_path / "m", scores)
    words = ("--metadata-dir", folder, "--out-dir", tmp_path / "o", "--score-column", "mine")
    assert run("graph", *words) == 0
    assert len(stats(tmp_path / "o")["catalog"]["alerts"]) == 1


@pytest.mark.parametrize("share", ["0.001", "0.03"])
def test_clipping_is_by_rank_over_all_samples_in_any_layout(
    tmp_path: Path, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = with_sentinel(-9999)
    scores[20] = 7.0
    outside = 1 if share == "0.001" else 12
    ordered = sorted(scores)
    low, high = ordered[outside], ordered[-1 - outside]
    bits = set()
    for files, shuffle, partitions, small in (
        (1, None, 1, False),
        (3, 5, 3, True),
        (5, 9, 8, True),
    ):
        with monkeypatch.context() as patch:
            if small:
                patch.setattr(sizes, "CATALOG_PART", 6_000)
            folder = metadata(tmp_path / f"m{partitions}", scores, files=files, shuffle=shuffle)
            out = tmp_path / f"o{partitions}"
            words = ("--metadata-dir", folder, "--out-dir", out, "--partitions", partitions)
            words = (*words, "--score-column", "mine", "--clip-scores", share)
            assert run("run", *words, "--n-neighbors", 3, "--exact-below", 50) == 0
        assert (len(list((out / "catalog").glob("part-*.npy"))) > 1) == small
        assert not (out / "catalog" / "spread").exists()
        assert run("verify", out, "--deep") == 0
        bits.add(subset(out))
        expected = dict(zip(POOL["uid"], np.clip(scores, low, high).tolist(), strict=True))
        assert difficulties(out) == expected
        told = stats(out)["catalog"]
        assert told["difficulty"] == {"min": low, "max": high}
        assert told["clipped"]["samples"] == sum(v < low or v > high for v in scores)
    assert len(bits) == 1


def test_a_clip_belongs_to_the_fingerprint_of_the_catalog(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = metadata(tmp_path / "m", SCORES.tolist())
    words = ("--metadata-dir", folder, "--out-dir", tmp_path / "o", "--score-column", "mine")
    assert run("run", *words) == 0
    capsys.readouterr()
    assert run("run", *words, "--clip-scores", "0.01") == 1
    assert "clip_scores was '0' and is '0.01'" in capsys.readouterr().err
    assert run("run", *words, "--clip-scores", "0.7") == 2
    assert "clip-scores is 0.7" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["ends", "clip"])
def test_an_interrupted_clip_continues(
    tmp_path: Path, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the parts is never clipped before the interruption."""
    from d2filter.engine.stage_run import StageRun
    from d2filter.stages.catalog import clip_scores

    monkeypatch.setattr(sizes, "CATALOG_PART", 6_000)
    folder = metadata(tmp_path / "m", with_sentinel(-9999))
    words = ("--metadata-dir", folder, "--score-column", "mine", "--clip-scores", "0.01")
    assert run("run", *words, "--out-dir", tmp_path / "a") == 0
    original = StageRun.run

    def stop(self: StageRun, label: str, tasks: Any, **more: Any) -> Any:
        found = original(self, label, tasks[:1] if label == wanted else tasks, **more)
        if label == wanted:
            raise KeyboardInterrupt
        return found

    wanted = label
    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "run", stop)
        assert run("run", *words, "--out-dir", tmp_path / "b") == 130
    assert (tmp_path / "b" / "catalog" / clip_scores.FOLDER).exists()
    assert run("run", *words, "--out-dir", tmp_path / "b") == 0
    assert subset(tmp_path / "b") == subset(tmp_path / "a")
    assert difficulties(tmp_path / "b") == difficulties(tmp_path / "a")
    assert (
        stats(tmp_path / "b")["catalog"]["clipped"] == stats(tmp_path / "a")["catalog"]["clipped"]
    )
    shutil.rmtree(tmp_path / "a")


def test_a_score_of_the_pool_is_clipped_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "CATALOG_PART", 6_000)
    folder = pools.write(tmp_path / "m", POOL, files=2)
    words = ("--metadata-dir", folder, "--score", "prototypicality", "--keep-first", "low")
    assert run("graph", *words, "--out-dir", tmp_path / "a") == 0
    assert run("graph", *words, "--out-dir", tmp_path / "b", "--clip-scores", "0.1") == 0
    plain, clipped = difficulties(tmp_path / "a"), difficulties(tmp_path / "b")
    ordered = sorted(plain.values())
    low, high = ordered[N // 10], ordered[-1 - N // 10]
    assert clipped == {uid: min(max(v, low), high) for uid, v in plain.items()}
    told = stats(tmp_path / "b")["catalog"]["clipped"]
    assert (told["from"], told["to"]) == (-low, -high)
