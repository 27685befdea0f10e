"""Soft selections: their content, and how the other commands handle repeated samples."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from support import pools, shard_files
from support.runs import ranking_columns, run, stats

import d2filter
from d2filter.algorithm import soft
from d2filter.algorithm.greedy import messages

pytestmark = pytest.mark.usefixtures("cluster")

N = 60
POOL = pools.make(N, 8, seed=3)
OWN = np.random.default_rng(4).random(N).astype(np.float32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of the pool, in its order."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        files = []
        for row in range(number, N, 3):
            files += shard_files.members(f"{row:04d}", row % 5, uid=POOL["uid"][row])
        shard_files.write(folder / f"{number:05d}.tar", files)
    return folder


@pytest.fixture(scope="module")
def outs(cluster: None, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One soft selection, whatever the files and partitions."""
    folder = tmp_path_factory.mktemp("soft")
    columns = {
        "own": OWN.tolist(),
        "shard": [str(shards / f"{row % 3:05d}.tar") for row in range(N)],
        "key": [f"{row:04d}" for row in range(N)],
    }
    made = []
    for number, (files, shuffle, partitions) in enumerate([(1, None, 1), (4, 2, 3), (5, 7, 8)]):
        metadata = pools.write(
            folder / f"m{number}", POOL, files=files, shuffle=shuffle, columns=columns
        )
        out = folder / f"o{number}"
        words = ("--metadata-dir", metadata, "--out-dir", out, "--partitions", partitions)
        words = (*words, "--score-column", "own", "--n-neighbors", 2, "--soft", 0.05)
        assert run("run", *words, "--fraction", "0.6,0.2") == 0
        made.append(out)
    return made


def counts(path: Path) -> Counter[str]:
    found = np.load(path)
    assert found.dtype == np.dtype("u8,u8")
    pairs = found.tolist()
    assert pairs == sorted(pairs)
    return Counter(f"{hi:016x}{lo:016x}" for hi, lo in pairs)


def test_copies_follow_the_ranking_and_no_layout(outs: list[Path]) -> None:
    subsets = [(out / "subset.npy").read_bytes() for out in outs]
    assert len(set(subsets)) == 1
    r = ranking_columns(outs[0])
    for name, size in (
        ("subset.npy", 36),
        ("subsets/d2_l14_60_percent.npy", 36),
        ("subsets/d2_l14_20_percent.npy", 12),
    ):
        found = counts(outs[0] / name)
        assert found.total() == size
        times = soft.copies(np.maximum(r["final"], 0), r["uid_hi"], r["uid_lo"], size, 0.05)
        expected = {
            f"{hi:016x}{lo:016x}": n
            for hi, lo, n in zip(r["uid_hi"], r["uid_lo"], times.tolist(), strict=True)
            if n
        }
        assert found == expected
        assert max(found.values()) > 1
    figures = stats(outs[0])
    distinct = len(counts(outs[0] / "subset.npy"))
    assert (figures["samples"]["kept"], figures["samples"]["pruned"]) == (distinct, N - distinct)
    assert (figures["select"]["budget"], figures["select"]["total"]) == (36, 36)
    for out in outs:
        assert run("verify", out) == 0


def test_a_changed_soft_selection_is_noticed(
    outs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = outs[1] / "subset.npy"
    whole = path.read_bytes()
    changed = np.load(path)
    changed[-1] = changed[0]
    np.save(path, np.sort(changed))
    assert run("verify", outs[1]) == 1
    assert "are not the ranking's soft selection" in capsys.readouterr().out
    path.write_bytes(whole)


@pytest.mark.parametrize("by", ["run", "npy"])
def test_shards_and_loaders_repeat_what_the_subset_repeats(
    by: str, outs: list[Path], shards: Path, tmp_path: Path
) -> None:
    wanted = counts(outs[0] / "subset.npy")
    subset = outs[0] if by == "run" else outs[0] / "subset.npy"
    words = ("--subset", subset, "--shards", shards, "--out-dir", tmp_path / "o")
    assert run("reshard", *words, "--shuffle", 1, "--shard-size", 10) == 0
    urls = sorted(str(path) for path in (tmp_path / "o").glob("*.tar"))
    keys = [s["__key__"] for s in wds.WebDataset(urls, shardshuffle=False, empty_check=False)]
    assert sorted(keys) == sorted(f"{uid}-{j}" for uid, n in wanted.items() for j in range(n))
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    stage = d2filter.keep(subset)
    loaded = wds.WebDataset(urls, shardshuffle=False, empty_check=False).compose(stage)
    assert Counter(json.loads(s["json"])["uid"] for s in loaded) == wanted
    if by == "run":
        assert sum(stage.expected(urls).values()) == wanted.total()
        sizes = json.loads((outs[0] / "kept" / "sizes.json").read_text())
        assert sum(sizes.values()) == wanted.total()


def test_explain_and_report_know_who_is_in(
    outs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = counts(outs[0] / "subset.npy")
    for uid in POOL["uid"][:20]:
        assert d2filter.explain(outs[0], uid).kept == (uid in wanted)
    assert run("report", outs[0]) == 0
    assert (outs[0] / "report.html").exists()


def test_demoted_samples_and_low_scores_get_no_copy(outs: list[Path], tmp_path: Path) -> None:
    words = ("--overwrite", "rank", "--collapse-copies", "--method", "score")
    out = outs[2]
    assert run("rank", "--out-dir", out, *words) == 0
    words = ("--soft", "--budget", 50, "--min-score", 0.3)
    assert run("select", "--out-dir", out, *words) == 0
    r = ranking_columns(out)
    among = (r["forward"] != messages.FLOOR) & (r["difficulty"] >= np.float32(0.3))
    assert not (r["forward"] != messages.FLOOR).all()
    times = soft.copies(r["difficulty"][among], r["uid_hi"][among], r["uid_lo"][among], 50, 0.1)
    ids = zip(r["uid_hi"][among], r["uid_lo"][among], times.tolist(), strict=True)
    found = counts(out / "subset.npy")
    assert found == {f"{hi:016x}{lo:016x}": n for hi, lo, n in ids if n}
    assert run("verify", out) == 0
    # a selection without repeats is another one
    assert run("select", "--out-dir", out, "--budget", 50) == 0
    assert set(counts(out / "subset.npy").values()) == {1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--soft", 0), "soft is 0.0, allowed is 0.001 to 1000"),
        (("--soft", "warm"), "argument --soft: invalid float value: 'warm'"),
        (("--soft", "--min-score", 9), "no sample has a score of at least min-score 9"),
    ],
)
def test_impossible_soft_selections_are_refused(
    words: tuple[Any, ...], said: str, outs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("select", "--out-dir", outs[0], *words) == 2
    assert said in capsys.readouterr().err


def test_each_class_gets_its_share_in_copies(tmp_path: Path) -> None:
    """A class of good scores and one of bad ones: neither takes from the other, in any layout."""
    label = dict(zip(POOL["uid"], ["aab"[row % 3] for row in range(N)], strict=True))
    score = [OWN[row] + (label[uid] == "a") for row, uid in enumerate(POOL["uid"])]
    columns = {"label": list(label.values()), "own": np.array(score, np.float32).tolist()}
    subsets = set()
    for number, (files, shuffle, partitions) in enumerate([(1, None, 1), (4, 2, 3)]):
        metadata = pools.write(
            tmp_path / f"m{number}", POOL, files=files, shuffle=shuffle, columns=columns
        )
        out = tmp_path / f"o{number}"
        words = ("--metadata-dir", metadata, "--out-dir", out, "--partitions", partitions)
        words = (*words, "--score-column", "own", "--n-neighbors", 2, "--group-column", "label")
        assert run("run", *words, "--soft", 0.05, "--fraction", "0.6,0.2") == 0
        assert run("verify", out) == 0
        subsets.add((out / "subset.npy").read_bytes())
        r = ranking_columns(out)
        uid = [f"{hi:016x}{lo:016x}" for hi, lo in zip(r["uid_hi"], r["uid_lo"], strict=True)]
        for name, size in (("subset.npy", 36), ("subsets/d2_l14_20_percent.npy", 12)):
            found = counts(out / name)
            share = Counter(label[u] for u, at in zip(uid, r["rank"], strict=True) if at < size)
            mine: Counter[str] = Counter()
            for one, times in found.items():
                mine[label[one]] += times
            assert mine == share
            assert max(found.values()) > 1
    assert len(subsets) == 1
