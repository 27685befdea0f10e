"""Runs with automatic settings: the same bits for any layout; `verify` and `explain` agree."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import pools
from support.runs import stats

from d2filter import rank as rank_arrays
from d2filter.algorithm import sizes
from d2filter.cli import main as cli
from d2filter.config import RankConfig
from d2filter.errors import VerificationError
from d2filter.formats.paths import Folder
from d2filter.stages.rank import in_memory as rank_in_memory
from d2filter.tools import selfcheck, verify

pytestmark = pytest.mark.usefixtures("cluster")
N = 700


@pytest.fixture(scope="module")
def pool() -> dict[str, Any]:
    return pools.make(N, 12, copies=0.2, seed=5)


@pytest.fixture(scope="module")
def score() -> np.ndarray:
    return np.random.default_rng(3).normal(size=N).astype(np.float32)


def run(tmp: Path, pool: dict[str, Any], score: np.ndarray, *options: str, **layout: Any) -> Path:
    metadata = pools.write(tmp / "metadata", pool, columns={"s": score}, **layout)
    out = tmp / "out"
    told = ["--metadata-dir", str(metadata), "--out-dir", str(out), "--score-column", "s"]
    assert cli.main(["run", *told, "--recipe", "web", *options]) == 0
    return out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--kernel", "rbf", "--undirected"],
        ["--cut-hardest", "0.1"],
        ["--cut-hardest", "auto"],
        ["--cut-hardest", "auto", "--method", "ccs"],
    ],
)
def test_layout_partitions_and_task_sizes_do_not_change_automatic_settings(
    tmp_path: Path, pool: dict[str, Any], score: np.ndarray, options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = run(tmp_path / "a", pool, score, *options, "--partitions", "1")
    # as a pool that no task can hold is settled
    monkeypatch.setattr(sizes, "SETTLED_WHOLE", 0)
    parts = run(tmp_path / "b", pool, score, *options, "--partitions", "3", files=4, shuffle=9)
    assert (whole / "subset.npy").read_bytes() == (parts / "subset.npy").read_bytes()
    a, b = stats(whole)["rank"], stats(parts)["rank"]
    found = ["copies_sqdist", "cut_hardest", "late"]
    if "--method" not in options:
        found += ["gamma", "gamma_floor", "gamma_unit", "effective_share"]
        assert a["tuned_for"] == "0.3"
    for name in found:
        assert a[name] == b[name], name
    assert (0 < float(a["cut_hardest"]) < 0.7) == ("--cut-hardest" in options)
    for out in (whole, parts):
        verify.verify(Folder(str(out)), lambda line: None)


def test_a_notebook_gets_the_bits_of_the_command_line(
    tmp_path: Path, pool: dict[str, Any], score: np.ndarray
) -> None:
    out = run(tmp_path, pool, score, "--fraction", "0.2", "--cut-hardest", "auto")
    found = rank_arrays(
        [pool["img"], pool["txt"]], score, uids_hex=pool["uid"], tuned_for="0.2", n_neighbors=10,
        gamma="auto", kernel="local", collapse_copies="auto", cut_hardest="auto",
    )  # fmt: skip
    kept = sorted(pool["uid"][row] for row in found.select("0.2"))
    pairs = np.load(out / "subset.npy")
    assert kept == [f"{hi:016x}{lo:016x}" for hi, lo in pairs.tolist()]
    assert found.gamma == stats(out)["rank"]["gamma"]


def test_another_budget_is_a_prefix_of_the_ranking_that_is_there(
    tmp_path: Path, pool: dict[str, Any], score: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(tmp_path, pool, score, "--fraction", "0.2")
    ranking = (out / "ranking" / "part-00000.parquet").read_bytes()
    gamma = stats(out)["rank"]["gamma"]
    capsys.readouterr()
    run(tmp_path, pool, score, "--fraction", "0.6")
    assert "rank      done before" in capsys.readouterr().out
    assert (out / "ranking" / "part-00000.parquet").read_bytes() == ranking
    assert stats(out)["rank"]["tuned_for"] == "0.2"
    # asked for, it is another ranking
    told = ["--out-dir", str(out), "--recipe", "web", "--tuned-for", "0.6"]
    assert cli.main(["rank", *told]) == 1
    assert "tuned_for" in capsys.readouterr().err
    assert cli.main(["rank", *told, "--overwrite", "rank"]) == 0
    assert stats(out)["rank"]["tuned_for"] == "0.6"
    assert stats(out)["rank"]["gamma"] != gamma


def test_a_sweep_and_the_self_check_fit_gamma_as_the_ranking_does(
    tmp_path: Path, pool: dict[str, Any], score: np.ndarray
) -> None:
    out = run(tmp_path, pool, score, "--fraction", "0.2")
    told = ["--gamma", "auto", "--kernel", "local", "--collapse-copies", "auto"]
    assert cli.main(["sweep", str(out), *told, "--tuned-for", "0.2,0.6", "--fraction", "0.2"]) == 0
    swept = [json.loads(p.read_text()) for p in (out / "sweep" / "settings").glob("*.json")]
    assert sorted(found["options"]["tuned_for"] for found in swept) == ["0.2", "0.6"]
    # in memory, with the pool's own share of wrong pairs
    record = json.loads((out / "completions" / "rank.json").read_text())
    config = RankConfig.from_options(record["options"])
    known = selfcheck.load(Folder(str(out)))
    rank, _, settled = rank_in_memory.ranks_of(known, config)
    assert settled.gamma == record["stats"]["gamma"]
    assert settled.tuned["wrong_share"] == record["stats"]["wrong_share"] is not None
    kept = {(int(known.part.hi[i]), int(known.part.lo[i])) for i in np.flatnonzero(rank < N // 5)}
    assert kept == set(np.load(out / "subset.npy").tolist())


def test_a_gamma_that_is_not_the_one_that_was_found_is_a_breach(
    tmp_path: Path, pool: dict[str, Any], score: np.ndarray
) -> None:
    out = run(tmp_path, pool, score)
    record = out / "completions" / "rank.json"
    told = json.loads(record.read_text())
    told["stats"]["gamma"] += 1 / 1024
    told["stats"]["cut_hardest"] = "0.5"
    # its access rights are those of the file that it replaces
    os.truncate(record, 0)
    record.write_text(json.dumps(told))
    lines: list[str] = []
    with pytest.raises(VerificationError):
        verify.verify(Folder(str(out)), lines.append)
    assert any("gamma is" in line and "in the record" in line for line in lines)
    assert any("cut_hardest is 0, found again" in line for line in lines)


def test_the_labels_recipe_cuts_samples_with_a_margin_below_zero(
    tmp_path: Path, pool: dict[str, Any]
) -> None:
    """A tenth of the labels is wrong, by a margin below 0; the middle of its range is another."""
    margin = np.random.default_rng(1).uniform(0.5, 1, N).astype(np.float32)
    margin[:70] = -0.1
    metadata = pools.write(tmp_path / "metadata", pool, columns={"margin": margin})
    told = ["--metadata-dir", str(metadata), "--out-dir", str(tmp_path / "out")]
    told += ["--score-column", "margin", "--keep-first", "low", "--recipe", "labels"]
    assert cli.main(["run", *told, "--fraction", "0.9"]) == 0
    assert stats(tmp_path / "out")["rank"]["cut_hardest"] == "0.100000"
    assert stats(tmp_path / "out")["rank"]["late"]["hardest"] == 70
    wrong = {pool["uid"][row] for row in range(70)}
    kept = {f"{hi:016x}{lo:016x}" for hi, lo in np.load(tmp_path / "out" / "subset.npy").tolist()}
    assert len(kept) == 630
    assert not kept & wrong


@pytest.mark.parametrize(
    ("option", "value", "summary"),
    [
        ("--gamma", "wide", "allowed are a number and auto"),
        ("--cut-hardest", "some", "allowed are auto and a number"),
        ("--collapse-copies", "some", "allowed are auto, none and a squared distance"),
        ("--tuned-for", "2", "2"),
    ],
)
def test_impossible_values_are_refused(
    tmp_path: Path, option: str, value: str, summary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["run", "--metadata-dir", str(tmp_path), "--out-dir", str(tmp_path / "o")]
    assert cli.main([*told, option, value]) == 2
    assert summary in capsys.readouterr().err
