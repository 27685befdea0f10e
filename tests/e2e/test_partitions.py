"""The graph in partitions: the same bits, bounded memory, and degenerate pools."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from support import pools
from support.runs import interrupt, run, stats

from d2filter.algorithm import features, sizes, uids
from d2filter.algorithm.knn import calibrate
from d2filter.algorithm.knn import in_memory as knn
from d2filter.formats import catalog, graph
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.stages.graph import build as graph_stage
from d2filter.stages.graph import calibrate as calibrate_on_parts

pytestmark = pytest.mark.usefixtures("cluster")

# cells although the pool is small, and refinement where it pays
GRAPH = ("--n-neighbors", "4", "--exact-below", "100", "--target-recall", "0.9")


def lists(out: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uids, and each sample's list as rows of the sorted uids with distances, by uid."""
    whole = graph.read(Folder(str(out)).sub("graph"))
    order = uids.ascending(whole.hi, whole.lo)
    position = np.empty(order.size, np.int64)
    position[order] = np.arange(order.size)
    there = whole.neighbors >= 0
    neighbors = np.where(there, position[np.maximum(whole.neighbors, 0)], -1)
    return whole.hi[order], neighbors[order], whole.sqdist[order]


def same_graph(a: Path, b: Path) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(lists(a), lists(b), strict=True))


@pytest.fixture(scope="module")
def pool() -> dict[str, Any]:
    return pools.make(6000, 64, decay=1)


@pytest.fixture(scope="module")
def whole(pool: dict[str, Any], cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One partition."""
    folder = tmp_path_factory.mktemp("whole")
    metadata = pools.write(folder / "m", pool, files=2)
    out = folder / "o"
    assert run("run", "--metadata-dir", metadata, "--out-dir", out, "--partitions", 1, *GRAPH) == 0
    assert run("verify", out) == 0
    return out


@pytest.mark.parametrize("partitions", [3, 8])
def test_partitions_and_the_layout_of_files_do_not_change_the_result(
    partitions: int,
    pool: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sizes, "CATALOG_PART", 150_000)
    metadata = pools.write(tmp_path / "m", pool, files=5, shuffle=partitions)
    out = tmp_path / "o"
    words = ("--metadata-dir", metadata, "--out-dir", out, "--partitions", partitions)
    assert run("run", *words, *GRAPH) == 0
    found = stats(out)["graph"]
    assert found["nlist"] > 1
    assert found["sketch_dim"] < 128
    assert found["partitions"] == partitions == len(list((out / "graph").glob("*.parquet")))
    assert len(list((out / "catalog").glob("*.npy"))) > 2
    assert same_graph(out, whole)
    assert (out / "subset.npy").read_bytes() == (whole / "subset.npy").read_bytes()
    one = stats(whole)["graph"]
    for name in ("recall", "recall_ci", "nprobe", "refinement_passes", "nlist", "sketch_dim"):
        assert found[name] == one[name]
    assert 1 < found["fan_out"] < partitions
    assert 0 < found["cross_edges"] < 1
    assert sum(found["partition_rows"]) == 6000
    assert max(found["partition_rows"]) < 2.5 * 6000 / partitions
    assert run("verify", out) == 0
    left = sorted(p.name for p in (out / "index").iterdir())
    assert left == ["cells.parquet", "centroids.npy"]


def test_refinement_is_the_same_in_partitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two probes and a pass, whatever the calibration would take for so small a pool."""
    rng = np.random.default_rng(0)
    n = 8000
    centers = rng.normal(size=(200, 96))
    wide = centers[rng.integers(0, 200, n)] + 0.9 * rng.normal(size=(n, 96))
    wide = (wide * np.arange(1, 97) ** -0.7).astype(np.float16)
    scattered = {"uid": [rng.bytes(16).hex() for _ in range(n)], "img": wide, "txt": wide}
    metadata = pools.write(tmp_path / "m", scattered, files=2)
    words = ("graph", "--metadata-dir", metadata, "--feature-type", "image", *GRAPH)
    passes = 0

    def chosen(trials: calibrate.Trials, target: float) -> calibrate.Choice:
        trials.train(calibrate.LEAST)
        return calibrate.Choice(
            probes=2, passes=passes, predicted=1.0, evaluations=0.0, reached=True
        )

    monkeypatch.setattr(calibrate, "fit", chosen)
    plain = tmp_path / "plain"
    assert run(*words, "--best-effort", "--out-dir", plain) == 0
    passes = 1
    for partitions in (1, 4, 40):  # more than there are cells: empty ones
        out = tmp_path / f"o{partitions}"
        assert run(*words, "--best-effort", "--out-dir", out, "--partitions", partitions) == 0
        assert stats(out)["graph"]["recall"] > stats(plain)["graph"]["recall"] + 0.05
        assert run(*words, "--out-dir", out, "--partitions", partitions) == 4
        assert same_graph(tmp_path / "o1", out)
    found = stats(tmp_path / "o4")["graph"]
    assert found["sketch_dim"] < 96
    # the same lists as in memory
    rows = features.fix([wide])
    hi, lo, valid = uid_format.parse(pa.array(scattered["uid"]))
    assert valid.all()
    order = uids.ascending(hi, lo)
    pool = knn.make_pool(rows[order], hi[order], lo[order])
    held = knn.in_cells(pool, knn.train(pool, 4, exact_below=100))
    choice = calibrate.Choice(probes=2, passes=1, predicted=0, evaluations=0, reached=True)
    built = knn.build_graph(held, 4, choice)
    assert np.array_equal(built.neighbors, lists(tmp_path / "o4")[1])
    assert found["recall"] == knn.measure_recall(pool, built).value


def test_a_higher_effort_leaves_no_trace_of_a_lower_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows look under one parent first, then under four, where that misses the target."""
    monkeypatch.setattr(calibrate, "LEAST", calibrate.Effort(looked_under=1))
    rng = np.random.default_rng(1)
    n = 10_000
    centers = rng.normal(size=(100, 64))
    rows = (centers[rng.integers(0, 100, n)] + rng.normal(size=(n, 64))).astype(np.float16)
    groups = {"uid": [rng.bytes(16).hex() for _ in range(n)], "img": rows, "txt": rows}
    metadata = pools.write(tmp_path / "m", groups, files=3)
    words = ("graph", "--metadata-dir", metadata, "--feature-type", "image", *GRAPH)
    words += ("--target-recall", "0.97", "--out-dir")
    assert run(*words, tmp_path / "one", "--partitions", 1) == 0
    marks = {path.stem for path in (tmp_path / "one/completions/graph").glob("train-*")}
    assert {"train-cells", "train-cells-4-0"} <= marks
    # another one, of several parts, is interrupted between the tries
    monkeypatch.setattr(sizes, "CATALOG_PART", 300_000)
    out = tmp_path / "three"
    original = graph_stage.PartedTrials.assign_rows

    def cut_off(trials: Any, kind: str, probes: int) -> None:
        if kind != "cells":
            raise KeyboardInterrupt
        original(trials, kind, probes)

    def cut_off_in_a_turn(pool: Any, requests: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(calibrate_on_parts.PartedSearcher, "find", cut_off_in_a_turn)
        assert run(*words, out, "--partitions", 3) == 130
    turns = out / "completions/graph"
    asked = {path.name: path.stat().st_mtime_ns for path in turns.glob("choose-cells-00-*")}
    assert len(asked) > 3
    assert not (turns / "choose-cells.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(graph_stage.PartedTrials, "assign_rows", cut_off)
        assert run(*words, out, "--partitions", 3) == 130
    # what was answered was not asked again
    assert asked == {path.name: path.stat().st_mtime_ns for path in turns.glob("choose-cells-00-*")}
    assert run(*words, out, "--partitions", 3) == 0
    assert same_graph(tmp_path / "one", out)
    assert stats(out)["catalog"]["parts"] > 3
    found = stats(out)["graph"]
    assert found["nlist"] > 1
    assert found["recall"] >= 0.96
    # and in memory
    whole = graph.read(Folder(str(out)).sub("graph"))
    order = uids.ascending(whole.hi, whole.lo)
    samples = catalog_rows(out)
    built, index = knn.build(
        knn.make_pool(samples, whole.hi[order], whole.lo[order]), 4, target_recall=0.97,
        exact_below=100,
    )  # fmt: skip
    assert index.trained.cells.looked_under > 1
    assert np.array_equal(built.neighbors, lists(out)[1])


def catalog_rows(out: Path) -> np.ndarray:
    """Features in the order of their uids."""
    layout = catalog.layout(Folder(str(out)).sub("catalog"))
    return layout.gather(np.arange(layout.total))


def test_a_target_out_of_reach_fails_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = pools.write(tmp_path / "m", pools.make(6000, 24), files=2)
    original = calibrate.fit

    def short(trials: calibrate.Trials, target: float) -> calibrate.Choice:
        return replace(original(trials, target), predicted=0.5)

    monkeypatch.setattr(calibrate, "fit", short)
    words = ("graph", "--metadata-dir", metadata, "--out-dir", tmp_path / "o", *GRAPH)
    assert run(*words) == 4
    assert "is out of reach" in capsys.readouterr().err
    assert not (tmp_path / "o/graph").exists()
    assert run(*words, "--best-effort") == 0


def test_memory_decides_the_number_of_partitions(
    pool: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """What is set aside for a worker holds few of these rows: several partitions, same graph."""
    metadata = pools.write(tmp_path / "m", pool, files=3)
    out = tmp_path / "o"
    words = ("graph", "--metadata-dir", metadata, "--out-dir", out, *GRAPH)
    assert run(*words, "--memory-per-worker", "500MB") == 2
    assert run(*words, "--memory-per-worker", "1GB") == 0
    # of the tasks: the driver is this process, with every test's memory in it
    every = (out / "completions/graph").glob("*.json")
    markers = [m for m in every if m.stem not in ("layout", "choose-cells")]
    assert len(markers) > 8
    assert all(json.loads(m.read_text())["peak_rss_bytes"] < 1e9 for m in markers)
    assert same_graph(out, whole)


def test_a_driver_killed_between_partitions_is_continued_with_another_number_of_them(
    pool: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    metadata = pools.write(tmp_path / "m", pool, files=3)
    out = tmp_path / "o"
    words = ["run", "--metadata-dir", str(metadata), "--out-dir", str(out), *GRAPH]
    words += ["--address", ray.get_runtime_context().gcs_address]
    for marker, partitions in (("route-00000", "3"), ("find-00001", "4"), ("find-00000", "3")):
        driver = subprocess.Popen(
            [sys.executable, "-m", "d2filter", *words, "--partitions", partitions],
            stdout=subprocess.DEVNULL,
        )
        path = out / f"completions/graph/{marker}.json"
        before = path.stat().st_mtime_ns if path.exists() else 0
        while driver.poll() is None:
            if path.exists() and path.stat().st_mtime_ns != before:
                break
            time.sleep(0.01)
        if driver.poll() is None:
            driver.kill()
        driver.wait()
        assert not (out / "subset.npy").exists()
    # 3 → 4 → 3: nothing of the first three may pass for part of the second; then as laid out
    assert run(*words) == 0
    assert len(list((out / "graph").glob("*.parquet"))) == 3
    assert same_graph(out, whole)
    assert (out / "subset.npy").read_bytes() == (whole / "subset.npy").read_bytes()
    assert run("verify", out) == 0


def test_a_layout_stays_while_a_task_can_hold_its_partitions(
    pool: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One partition would do on the rerun: what was routed to three is not thrown away."""
    out = tmp_path / "o"
    metadata = pools.write(tmp_path / "m", pool, files=3)
    words = ("graph", "--metadata-dir", metadata, "--out-dir", out, *GRAPH)
    with monkeypatch.context() as patched:
        interrupt(patched, "find")
        assert run(*words, "--partitions", 3) == 130
    routed = {m: m.stat().st_mtime_ns for m in (out / "completions/graph").glob("route-*.json")}
    assert routed
    assert run(*words, "--memory-per-worker", "2GB") == 0
    assert stats(out)["graph"]["partitions"] == 3
    assert {m: m.stat().st_mtime_ns for m in routed} == routed
    assert same_graph(out, whole)


@pytest.mark.parametrize("equal", [1.0, 0.6])
def test_a_pool_of_copies_is_partitioned_and_ranked(
    equal: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All, or most, vectors equal: one giant cell in slices, the ring goes round all of them."""
    monkeypatch.setattr(sizes, "CATALOG_GROUP", 1)
    monkeypatch.setattr(sizes, "CATALOG_PART", 15_000)
    pool = pools.make(3000, 8, copies=0)
    copied = np.random.default_rng(0).random(3000) < equal
    pool["img"][copied], pool["txt"][copied] = pool["img"][0], pool["txt"][0]
    scores = np.random.default_rng(1).random(3000).astype(np.float32)
    column = {"clip_l14_similarity_score": scores}
    metadata = pools.write(tmp_path / "m", pool, files=8, columns=column)
    words = ("run", "--metadata-dir", metadata, *GRAPH, "--best-effort")
    for partitions in (1, 3):
        out = tmp_path / f"o{partitions}"
        assert run(*words, "--out-dir", out, "--partitions", partitions) == 0
        assert run("verify", out) == 0
    assert same_graph(tmp_path / "o1", tmp_path / "o3")
    assert max(stats(tmp_path / "o3")["graph"]["partition_rows"]) < 0.75 * 3000
    _, neighbors, sqdist = lists(tmp_path / "o3")
    zero = np.flatnonzero((sqdist == 0).all(axis=1))
    assert zero.size > 0.9 * equal * 3000
    at = np.arange(zero.size)[:, None] + np.arange(1, 5)
    assert (neighbors[zero] == zero[at % zero.size]).all()


def test_partitions_with_fewer_than_k_samples_are_ranked(tmp_path: Path) -> None:
    metadata = pools.write(tmp_path / "m", pools.make(50, 4))
    out = tmp_path / "o"
    words = ("--n-neighbors", 80, "--partitions", 7, "--exact-below", 0)
    assert run("run", "--metadata-dir", metadata, "--out-dir", out, *words) == 0
    assert run("verify", out) == 0
    assert ((lists(out)[1] >= 0).sum(axis=1) == 49).all()


def test_unusable_sizes_and_numbers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("graph", "--metadata-dir", tmp_path, "--out-dir", tmp_path / "o")
    for option, value, said in (
        ("--memory-per-worker", "much", "'much', allowed is a size: 1GB"),
        ("--memory-per-worker", "3", "memory-per-worker is 3 bytes, allowed is at least"),
        ("--partitions", "0", "'0', allowed are auto and whole numbers"),
        ("--partitions", "two", "'two', allowed are auto and whole numbers"),
    ):
        assert run(*words, option, value) == 2
        assert said in capsys.readouterr().err
