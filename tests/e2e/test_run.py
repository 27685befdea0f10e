"""The command line from metadata to subset, on a real local Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import oracle, pools
from support.runs import copy_of, run, stats

import d2filter
from d2filter.algorithm import sizes
from d2filter.formats import uid as uid_format

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """A finished run of 6,000 samples, 2×48-d, k=5, with copies."""
    folder = tmp_path_factory.mktemp("run")
    pools.write(folder / "metadata", pools.make(6000, 48), files=1)
    words = ("--metadata-dir", folder / "metadata", "--n-neighbors", 5)
    assert run("run", *words, "--out-dir", folder / "out") == 0
    return folder


def table(out: Path, name: str) -> dict[str, np.ndarray]:
    read = pq.read_table(out / name / "part-00000.parquet")
    return {
        c: (
            np.stack(read.column(c).to_pylist())
            if pa.types.is_fixed_size_list(read.column(c).type)
            else read.column(c).to_numpy()
        )
        for c in read.column_names
    }


def test_the_run_directory_is_complete(finished: Path) -> None:
    out = finished / "out"
    for name in (
        "config.json", "stats.json", "bad_samples.parquet", "subset.npy", "index/centroids.npy",
        "index/cells.parquet", "graph/part-00000.parquet", "ranking/part-00000.parquet",
        "logs/driver.jsonl",
    ):  # fmt: skip
        assert (out / name).exists(), name
    assert stats(out)["samples"] == {
        "read": 6000, "ranked": 6000, "bad": 0, "duplicate": 0, "kept": 1800, "pruned": 4200
    }  # fmt: skip
    graph = pq.read_schema(out / "graph/part-00000.parquet")
    assert [str(graph.field(n).type) for n in graph.names] == [
        "uint64", "uint64", "float",
        "fixed_size_list<element: int64>[5]", "fixed_size_list<element: float>[5]",
    ]  # fmt: skip
    ranking = pq.read_schema(out / "ranking/part-00000.parquet")
    assert [f"{n} {ranking.field(n).type}" for n in ranking.names] == [
        "uid_hi uint64", "uid_lo uint64", "difficulty float", "forward int64", "final int64",
        "rank int64", "suppressed_by int64",
    ]  # fmt: skip
    assert not list(out.rglob(".tmp-*"))


def test_recall_and_ranking_agree_with_independent_code(finished: Path, tmp_path: Path) -> None:
    """Done means: recall@5 ≥ 0.95, and the ranking of the written graph is the sequential one."""
    out = copy_of(finished / "out", tmp_path)
    published = ("--kernel", "rbf", "--gamma", 1, "--collapse-copies", "none")
    assert run("rank", "--out-dir", out, *published, "--overwrite", "rank") == 0
    graph, ranking = table(out, "graph"), table(out, "ranking")
    uids = [
        int(h) * 2**64 + int(low) for h, low in zip(graph["uid_hi"], graph["uid_lo"], strict=True)
    ]
    assert uids == sorted(uids)
    pool = pools.make(6000, 48)
    place = {int(u, 16): i for i, u in enumerate(pool["uid"])}
    rows = np.array([place[u] for u in uids])
    halves = []
    for name in ("img", "txt"):
        wide = pool[name][rows].astype(np.float64)
        halves.append(wide / np.linalg.norm(wide, axis=1, keepdims=True))
    features = np.concatenate(halves, axis=1).astype(np.float16).astype(np.float64)
    sample = np.random.default_rng(0).choice(6000, 400, replace=False)
    hits = 0
    for i in sample:
        d = np.square(features - features[i]).sum(axis=1).astype(np.float32)
        others = np.delete(np.arange(6000), i)
        best = others[np.lexsort(((others - i) % 6000, d[others]))[:5]]
        hits += len(set(best) & set(graph["neighbors"][i]))
    assert hits / (400 * 5) >= 0.95
    assert stats(out)["graph"]["recall"] >= 0.95
    forward = oracle.forward(
        graph["difficulty"].tolist(), graph["neighbors"].tolist(), graph["sqdist"], 1.0
    )
    assert ranking["forward"].tolist() == forward
    weights = np.vectorize(lambda d: oracle.weight(d, 1.0))(graph["sqdist"])
    order, final = oracle.greedy_argmax(np.array(forward), graph["neighbors"], weights)
    assert (ranking["final"] == final).all()
    assert (np.argsort(ranking["rank"]) == order).all()
    cosine = (halves[0] * halves[1]).sum(axis=1)
    assert np.abs(graph["difficulty"] - cosine).max() < 1e-6


@pytest.mark.parametrize("files", [1, 3, 7])
def test_the_split_of_the_metadata_changes_nothing(
    finished: Path, tmp_path: Path, files: int
) -> None:
    pools.write(tmp_path / "m", pools.make(6000, 48), files=files, shuffle=files)
    words = ("--metadata-dir", tmp_path / "m", "--n_neighbors", 5, "--out_dir", tmp_path / "o")
    assert run("run", *words) == 0
    for name in ("subset.npy", "index/centroids.npy"):
        assert (tmp_path / "o" / name).read_bytes() == (finished / "out" / name).read_bytes()
    for name in ("graph", "ranking"):
        one, other = table(tmp_path / "o", name), table(finished / "out", name)
        assert all((one[c] == other[c]).all() for c in one)


def test_the_split_changes_nothing_with_cells(tmp_path: Path) -> None:
    pool = pools.make(2500, 16, copies=0.3)
    subsets = []
    for files in (1, 5):
        folder = pools.write(tmp_path / f"m{files}", pool, files=files, shuffle=files)
        out = tmp_path / f"o{files}"
        words = ("--metadata-dir", folder, "--n-neighbors", 3, "--exact-below", 100)
        assert run("run", *words, "--out-dir", out) == 0
        assert stats(out)["graph"]["nlist"] > 20
        assert run("verify", out) == 0
        subsets.append((out / "subset.npy").read_bytes())
    assert subsets[0] == subsets[1]


def test_a_notebook_gets_the_same_bits(finished: Path) -> None:
    pool = pools.make(6000, 48)
    ranking = table(finished / "out", "ranking")
    hexes = uid_format.to_hex(ranking["uid_hi"], ranking["uid_lo"])
    score = dict(zip(hexes, ranking["difficulty"], strict=True))
    ranked = d2filter.rank(
        [pool["img"], pool["txt"]],
        [score[u] for u in pool["uid"]],
        n_neighbors=5,
        uids_hex=pool["uid"],
    )
    place = {u: i for i, u in enumerate(pool["uid"])}
    rows = np.array([place[u] for u in hexes])
    assert (ranked.rank[rows] == ranking["rank"]).all()
    assert (ranked.final[rows] == ranking["final"]).all()
    assert (rows[np.maximum(ranking["suppressed_by"], 0)] == ranked.suppressed_by[rows])[
        ranking["suppressed_by"] >= 0
    ].all()
    chosen = ranked.select("0.3")
    subset = np.load(finished / "out/subset.npy")
    assert sorted(pool["uid"][i] for i in chosen) == uid_format.to_hex(subset["f0"], subset["f1"])
    assert ranked.select(size=10).tolist() == chosen[:10].tolist()


def test_stages_run_alone(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    words = ("--metadata-dir", finished / "metadata", "--n-neighbors", 5, "--out-dir", out)
    assert run("graph", *words) == 0
    assert not (out / "ranking").exists()
    assert run("rank", "--out-dir", out) == 0
    assert run("select", "--out-dir", out) == 0
    assert (out / "subset.npy").read_bytes() == (finished / "out/subset.npy").read_bytes()


def test_select_other_budgets_from_one_ranking(finished: Path, tmp_path: Path) -> None:
    out = copy_of(finished / "out", tmp_path)
    kept = {}
    for words in (("--fraction", "0.5"), ("--budget", "123"), ("--fraction", "1")):
        started = time.monotonic()
        assert run("select", "--out-dir", out, *words) == 0
        assert time.monotonic() - started < 5
        subset = np.load(out / "subset.npy")
        assert subset.dtype == np.dtype("u8,u8")
        kept[words] = set(subset.tolist())
    assert [len(s) for s in kept.values()] == [3000, 123, 6000]
    assert kept["--budget", "123"] < kept["--fraction", "0.5"] < kept["--fraction", "1"]
    ranking = table(out, "ranking")
    floor = float(np.median(ranking["difficulty"]))
    assert run("select", "--out-dir", out, "--fraction", "0.5", "--min-score", floor) == 0
    expected = (ranking["rank"] < 3000) & (ranking["difficulty"] >= floor)
    assert len(np.load(out / "subset.npy")) == expected.sum() == stats(out)["samples"]["kept"]
    assert run("verify", out) == 0


def test_several_budgets_of_one_ranking_are_nested_files(finished: Path, tmp_path: Path) -> None:
    out = copy_of(finished / "out", tmp_path)
    assert run("select", "--out-dir", out, "--fraction", "0.3,0.1,0.125") == 0
    assert sorted(p.name for p in (out / "subsets").iterdir()) == [
        "d2_l14_10_percent.npy", "d2_l14_12.5_percent.npy", "d2_l14_30_percent.npy"
    ]  # fmt: skip
    tenth, eighth, third = (
        set(np.load(out / f"subsets/d2_l14_{percent}_percent.npy").tolist())
        for percent in ("10", "12.5", "30")
    )
    assert [len(s) for s in (tenth, eighth, third)] == [600, 750, 1800]
    assert tenth < eighth < third == set(np.load(out / "subset.npy").tolist())
    assert stats(out)["samples"]["kept"] == 1800
    assert run("verify", out) == 0
    other = out / "subsets/d2_l14_10_percent.npy"
    np.save(other, np.load(out / "subset.npy")[:600])
    assert run("verify", out) == 1
    assert run("select", "--out-dir", out, "--fraction", "0.3,2") == 2
    assert run("select", "--out-dir", out, "--fraction", "0.2") == 0
    assert not (out / "subsets").exists()
    assert run("verify", out) == 0


def test_the_same_command_again_does_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(finished / "out", tmp_path)
    outputs = [out / "graph/part-00000.parquet", out / "subset.npy"]
    before = [path.stat().st_mtime_ns for path in outputs]
    words = ("--metadata-dir", finished / "metadata", "--n-neighbors", 5, "--out-dir", out)
    started = time.monotonic()
    assert run("run", *words) == 0
    assert time.monotonic() - started < 5
    assert capsys.readouterr().out.count("done before") == 4
    assert [path.stat().st_mtime_ns for path in outputs] == before


def test_a_contradiction_names_what_differs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(finished / "out", tmp_path)
    words = ("run", "--metadata-dir", finished / "metadata", "--out-dir", out)
    assert run(*words, "--n-neighbors", 4) == 1
    assert "n_neighbors was 5 and is 4" in capsys.readouterr().err
    assert run("rank", "--out-dir", out, "--gamma", 2) == 1
    assert "gamma was 'auto' and is 2.0" in capsys.readouterr().err
    assert run("rank", "--out-dir", out, "--gamma", 2, "--overwrite", "rank") == 0
    assert not (out / "subset.npy").exists(), "a subset of the old ranking must not stay"
    assert run(*words, "--n-neighbors", 5, "--gamma", 2) == 0
    assert run("verify", out) == 0
    assert run(*words, "--n-neighbors", 5, "--gamma", 2, "--overwrite", "report") == 2
    assert "overwrite names report" in capsys.readouterr().err


def test_a_mistake_beside_overwrite_costs_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(finished / "out", tmp_path)
    before = sorted(p for p in out.rglob("*") if p.is_file() and "logs" not in p.parts)
    words = ("--overwrite", "catalog", "--out-dir", out)
    assert run("run", "--metadata-dir", tmp_path / "typo", *words) == 1
    assert run("select", *words) == 2
    assert "`d2filter select` makes select" in capsys.readouterr().err
    assert sorted(p for p in out.rglob("*") if p.is_file() and "logs" not in p.parts) == before
    assert run("verify", out) == 0


def test_options_that_contradict_an_existing_catalog_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(finished / "out", tmp_path)
    assert run("run", "--out-dir", out, "--n-neighbors", 5) == 0
    assert run("run", "--out-dir", out, "--n-neighbors", 5, "--feature-type", "image") == 1
    assert "feature_type was 'image|text' and is 'image'" in capsys.readouterr().err


def test_nothing_of_an_earlier_attempt_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken file, then fewer and other files: parts and ledgers of the first try are gone."""
    monkeypatch.setattr(sizes, "CATALOG_GROUP", 1)
    monkeypatch.setattr(sizes, "CATALOG_PART", 5_000)
    pool = pools.make(600, 8)
    pool["uid"][5] = pool["uid"][6] = "bad"
    folder = pools.write(tmp_path / "m", pool, files=6)
    whole = (folder / "00002.npz").read_bytes()
    (folder / "00002.npz").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "o"
    words = ("run", "--metadata-dir", folder, "--max-bad", 1, "--out-dir", out)
    assert run(*words) == 1
    for name in ("00000", "00002"):
        for suffix in (".npz", ".parquet"):
            (folder / (name + suffix)).unlink()
    assert run(*words) == 0
    assert run("verify", out) == 0
    assert stats(out)["samples"]["read"] == 400
    clean = tmp_path / "clean"
    assert run(*words[:-1], clean) == 0
    assert (clean / "subset.npy").read_bytes() == (out / "subset.npy").read_bytes()
    # merged, and dead before the stage was recorded; then another input
    (out / "completions/catalog.json").unlink()
    for suffix in (".npz", ".parquet"):
        (folder / ("00005" + suffix)).unlink()
    assert run(*words) == 0
    assert run("verify", out) == 0
    assert stats(out)["samples"]["ranked"] == 300


def test_lost_figures_are_written_again(finished: Path, tmp_path: Path) -> None:
    out = copy_of(finished / "out", tmp_path)
    for name in ("stats.json", "config.json", "subset.npy"):
        (out / name).unlink()
    assert run("select", "--out-dir", out) == 0
    assert run("verify", out) == 0


def test_files_with_and_without_a_score_column_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = pools.make(60, 4)
    column = {"clip_l14_similarity_score": np.linspace(0, 1, 60).astype(np.float32)}
    folder = pools.write(tmp_path / "m", pool, columns=column)
    pools.write(tmp_path / "n", pools.make(40, 4, seed=1))
    for suffix in (".npz", ".parquet"):
        shutil.copy(tmp_path / f"n/00000{suffix}", folder / f"00001{suffix}")
    assert run("run", "--metadata-dir", folder, "--out-dir", tmp_path / "o") == 1
    assert "scores of two sources would be mixed" in capsys.readouterr().err


@pytest.mark.nightly  # test_faults.py kills drivers in every run of the tests
def test_a_killed_driver_is_continued_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL at three moments, each in a process of its own; then the same command."""
    folder = pools.write(tmp_path / "m", pools.make(3000, 32), files=3)
    words = ["run", "--metadata-dir", str(folder), "--n-neighbors", "3", "--partitions", "2"]
    assert run(*words, "--out-dir", tmp_path / "whole") == 0
    out = tmp_path / "o"
    for marker in ("completions/catalog/read-00000.json", "completions/graph/train-cells.json"):
        driver = subprocess.Popen(
            [sys.executable, "-m", "d2filter", *words, "--out-dir", str(out)],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not (out / marker).exists() and driver.poll() is None:
            time.sleep(0.02)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        assert not (out / "subset.npy").exists()
    assert run(*words, "--out-dir", out) == 0
    for name in ("subset.npy", "graph/part-00000.parquet", "ranking/part-00000.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(out.rglob(".tmp-*.json"))


def test_changed_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pools.write(tmp_path / "m", pools.make(60, 4), files=2)
    words = ("run", "--metadata-dir", folder, "--out-dir", tmp_path / "o")
    assert run(*words) == 0
    pools.write(folder, pools.make(80, 4), files=2)
    assert run(*words) == 1
    assert "input file 00000.npz has changed" in capsys.readouterr().err


def test_dirty_rows_are_counted_with_reasons(tmp_path: Path) -> None:
    pool = pools.make(400, 8, copies=0)
    uid, img, txt = pool["uid"], pool["img"], pool["txt"]
    # another spelling of a uid is the same uid
    uid[0], uid[1], uid[2] = "short", uid[3].upper(), None
    uid[4] = uid[5]
    uid[6] = uid[7] = uid[8]
    img[10, 2], img[11, 0], img[12] = np.nan, np.inf, 0
    txt[13, 1], txt[14] = np.nan, 0
    score = np.linspace(0, 1, 400).astype(np.float32)
    score[15], score[16] = np.nan, np.inf
    out = tmp_path / "o"
    pools.write(tmp_path / "m", pool, files=3, shuffle=1, columns={"mine": score})
    words = ("run", "--metadata-dir", tmp_path / "m", "--out-dir", out, "--score-column", "mine")
    assert run(*words, "--max-bad", "0.5") == 0
    samples = stats(out)["samples"]
    assert samples["read"] == 400 == samples["ranked"] + samples["bad"] + samples["duplicate"]
    assert (samples["bad"], samples["duplicate"]) == (9, 4)
    assert run("verify", out) == 0
    bad = pq.read_table(out / "bad_samples.parquet").to_pylist()
    reasons: dict[str, int] = {}
    for row in bad:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    assert reasons == {
        "malformed uid": 2,
        "non-finite image embedding": 2,
        "zero image embedding": 1,
        "non-finite text embedding": 1,
        "zero text embedding": 1,
        "score is NaN": 1,
        "score is infinite": 1,
        "repeated uid": 4,
    }
    # over the allowed share: everything is finished and the exit code says so
    assert run(*words, "--max-bad", "0.01") == 3
    assert len(np.load(out / "subset.npy")) == samples["kept"]


def test_kept_lists_are_written_where_shards_are_known(tmp_path: Path) -> None:
    pool = pools.make(200, 6)
    shards = [f"data/{i % 3:08d}.tar" for i in range(200)]
    keys = [f"{i:09d}" for i in range(200)]
    folder = pools.write(tmp_path / "m", pool, files=2, columns={"shard": shards, "key": keys})
    out = tmp_path / "o"
    assert run("run", "--metadata-dir", folder, "--out-dir", out, "--budget", 50) == 0
    kept = pq.read_table(out / "kept/part-00000.parquet").to_pylist()
    assert len(kept) == 50
    assert [(k["shard"], k["key"]) for k in kept] == sorted((k["shard"], k["key"]) for k in kept)
    for k in kept:
        row = int(k["key"])
        assert k["uid"] == pool["uid"][row]
        assert k["shard"] == shards[row]
    assert sorted(k["rank"] for k in kept) == list(range(50))
    sizes = json.loads((out / "kept/sizes.json").read_text())
    assert sum(sizes.values()) == 50
    assert set(sizes) <= {f"{i:08d}.tar" for i in range(3)}
    assert run("verify", out) == 0


def test_image_or_text_alone_give_features_of_their_own_width(tmp_path: Path) -> None:
    folder = pools.write(tmp_path / "m", pools.make(150, 6), arch="b32")
    for feature_type, width in (("image", 6), ("text", 6), ("image|text", 12)):
        out = tmp_path / feature_type.replace("|", "_")
        words = ("--arch", "b32", "--feature-type", feature_type, "--out-dir", out)
        assert run("run", "--metadata-dir", folder, *words) == 0
        assert stats(out)["catalog"]["dimension"] == width


def test_a_pool_smaller_than_k_is_ranked(tmp_path: Path) -> None:
    folder = pools.write(tmp_path / "m", pools.make(3, 4, copies=0))
    out = tmp_path / "o"
    words = ("--n-neighbors", 5, "--fraction", 1, "--out-dir", out)
    assert run("run", "--metadata-dir", folder, *words) == 0
    assert run("verify", out) == 0
    neighbors = table(out, "graph")["neighbors"]
    assert neighbors.shape == (3, 2), "no list is longer than there are others"
    assert all(set(row) == {0, 1, 2} - {i} for i, row in enumerate(neighbors.tolist()))


def test_an_unreachable_recall_exits_with_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pools.write(tmp_path / "m", pools.make(900, 12))
    out = tmp_path / "o"
    assert run("run", "--metadata-dir", folder, "--out-dir", out) == 0
    # a recall below the target, as a graph of too few probes would have measured
    record = json.loads((out / "completions/graph.json").read_text())
    record["stats"]["recall"] = 0.9
    (out / "completions/graph.json").write_text(json.dumps(record))
    (out / "completions/select.json").unlink()
    assert run("run", "--metadata-dir", folder, "--out-dir", out) == 4
    assert "recall@10 is 0.9000 and --target-recall 0.95" in capsys.readouterr().err
    assert (out / "subset.npy").exists()


def test_options_are_read_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pools.write(tmp_path / "m", pools.make(100, 4))
    settings = tmp_path / "run.yaml"
    settings.write_text(f"metadata_dir: {folder}\nn-neighbors: 2\nfraction: 0.1\n")
    words = ("run", "--config", settings, "--out-dir", tmp_path / "o")
    assert run(*words) == 0
    assert stats(tmp_path / "o")["graph"]["k"] == 2
    assert run(*words, "--fraction", "0.2") == 0
    assert stats(tmp_path / "o")["samples"]["kept"] == 20
    settings.write_text(
        f"out_dir: {tmp_path}/p\nmetadata_dir: {folder}\nbudget:\nnormalize: true\n"
    )
    assert run("run", "--config", settings) == 0
    assert run("run", "--config", settings, "--overwrite", "rank") == 0
    capsys.readouterr()
    for text, said in (
        ("neighbours: 2", "unknown option 'neighbours'"),
        ("metadata_dir: [a, b]", "allowed is one value"),
        ("n_neighbors: many", "n_neighbors is 'many'"),
        ("normalize: maybe", "allowed are true and false"),
        ("- a list", "must hold `option: value` lines"),
        ("a: {", "is not valid YAML"),
    ):
        settings.write_text(text)
        assert run(*words) == 2
        assert said in capsys.readouterr().err


def test_the_run_directory_may_be_a_url(tmp_path: Path) -> None:
    folder = pools.write(tmp_path / "m", pools.make(50, 4))
    words = ("--metadata-dir", f"file://{folder}", "--out-dir", f"file://{tmp_path}/o")
    assert run("run", *words) == 0
    assert run("verify", f"file://{tmp_path}/o") == 0
