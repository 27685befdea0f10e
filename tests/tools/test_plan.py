"""`plan`: its counts compared with a real run, its arithmetic, and its refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import pools
from support.runs import stats

from d2filter.algorithm import sizes
from d2filter.algorithm.knn import in_memory as knn
from d2filter.cli import values
from d2filter.cli.main import main
from d2filter.config import CatalogConfig, EmbedConfig, GraphConfig, parse_bytes
from d2filter.errors import UsageError
from d2filter.formats import metadata
from d2filter.formats.paths import Folder
from d2filter.stages.catalog import build as build_catalog
from d2filter.stages.graph import build as graph_stage
from d2filter.tools import cost_model, plan, plan_steps
from d2filter.tools.cost_model import Cluster, Rate
from d2filter.tools.plan_steps import Habits, Pool

HABITS = Habits(samples=50_000, cells=890, probes=4, passes=1, sketch_dim=64, evaluations=100.0)
POOL = Pool(samples=10_000_000, dimension=512, k=5)


def rates(**steps: Rate) -> cost_model.Rates:
    return cost_model.Rates(machine="test", dimension=512, steps=steps, habits=HABITS, k=5)


def every_rate() -> cost_model.Rates:
    names = [step.name for step in plan_steps.count(POOL, HABITS, 4)]
    return rates(**{name: Rate(fixed=0.1, unit=1e-9) for name in names})


def test_the_work_of_a_step_is_divided_among_its_tasks_and_the_cpus() -> None:
    one = plan_steps.Step(stage="graph", name="x", units=1000.0, tasks=1, threads=False)
    known = rates(x=Rate(fixed=2.0, unit=0.01))
    eight = Cluster(nodes=2, cpus=4)
    assert cost_model.seconds(one, eight, known) == pytest.approx(2 + 10)
    assert cost_model.seconds(replace(one, threads=True), eight, known) == pytest.approx(2 + 2.5)
    tasks = replace(one, tasks=8)
    assert cost_model.seconds(tasks, eight, known) == pytest.approx(2 + 10 / 8)
    # nine tasks on eight CPUs: two waves, the second nearly empty
    nine = replace(one, tasks=9)
    assert cost_model.seconds(nine, eight, known) == pytest.approx(4 + 10 / 8 * 16 / 9)
    assert cost_model.seconds(replace(one, name="y"), eight, known) == 0


def test_the_cost_of_a_row_grows_with_the_pool_by_the_given_rate() -> None:
    root = plan_steps.habits_at(HABITS, 5_000_000, 5)
    third = plan_steps.habits_at(replace(HABITS, growth=1 / 3), 5_000_000, 5)
    assert root.evaluations / HABITS.evaluations == pytest.approx(10, rel=0.05)
    assert third.evaluations / HABITS.evaluations == pytest.approx(10 ** (2 / 3), rel=0.05)
    assert (root.cells, root.probes) == (third.cells, third.probes)


def test_a_step_takes_as_long_as_storage_needs_where_that_is_slower() -> None:
    step = plan_steps.Step(
        stage="graph", name="x", units=1000.0, tasks=3, threads=False, read=6e9, written=2e9
    )
    known = rates(x=Rate(fixed=0.0, unit=0.003))
    four = Cluster(nodes=4, cpus=4)
    assert cost_model.seconds(step, four, known) == pytest.approx(1)
    # three tasks keep the storage of three nodes busy
    assert cost_model.seconds(step, replace(four, storage=10**9), known) == pytest.approx(8 / 3)
    assert cost_model.seconds(step, replace(four, storage=10**10), known) == pytest.approx(1)


def test_time_spent_waiting_for_storage_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--samples", "128e6", "--nodes", "4", "--cpus", "32", "--memory", "256GB"]
    words += ["--shards", "--images-per-second", "1000"]
    assert main(words) == 0
    quick = capsys.readouterr().out
    assert "(storage)" not in quick
    assert "storage that keeps up (--storage-rate)" in quick
    assert main([*words, "--storage-rate", "50MB"]) == 0
    slow = capsys.readouterr().out
    assert re.search(r"^graph .*\(storage\)", slow, re.MULTILINE)
    assert "embed (storage)" in slow
    assert "keeps up" not in slow


def test_rates_are_recovered_from_the_seconds_of_two_runs() -> None:
    true = {"catalog": Rate(fixed=1.5, unit=2e-7), "find": Rate(fixed=0.5, unit=3e-9)}
    cluster = Cluster(nodes=1, cpus=2)
    halves = []
    for samples in (6_000, 48_000):
        h = replace(HABITS, samples=samples, cells=samples // 50)
        steps = plan_steps.count(Pool(samples=samples, dimension=512, exact_below=0), h, 1)
        mine = [step for step in steps if step.name in true]
        halves.append([(s, cost_model.seconds(s, cluster, rates(**true))) for s in mine])
    found = cost_model.fit(halves[0], halves[1], cpus=2)
    for name, rate in true.items():
        assert found[name].fixed == pytest.approx(rate.fixed)
        assert found[name].unit == pytest.approx(rate.unit)
    with pytest.raises(UsageError, match="larger"):
        cost_model.fit(halves[1], halves[0], cpus=2)


def test_a_first_run_that_compared_all_with_all_does_not_spoil_the_rates() -> None:
    cluster = Cluster(nodes=1, cpus=2)
    exact = replace(HABITS, samples=6_000, cells=1, probes=1, passes=0, evaluations=6_000.0)
    cells = replace(HABITS, samples=48_000, cells=960)
    halves = []
    for h in (exact, cells):
        steps = plan_steps.count(Pool(samples=h.samples, dimension=512, exact_below=0), h, 1)
        halves.append([(s, cost_model.seconds(s, cluster, every_rate())) for s in steps if s.units])
    small = [(s, t) for s, t in halves[0] if s.name != "refine"]
    found = cost_model.fit(small, halves[1], cpus=2)
    assert set(found) == {step.name for step, _ in halves[1]}
    for step, taken in halves[1]:
        again = cost_model.seconds(step, cluster, rates(**found))
        assert again == pytest.approx(taken)


def test_more_of_anything_is_never_faster_and_more_nodes_never_slower() -> None:
    known = every_rate()
    cluster = Cluster(nodes=2, cpus=8, memory=64_000_000_000)
    base = cost_model.estimate(POOL, cluster, known)
    for larger in (
        replace(POOL, samples=20_000_000),
        replace(POOL, dimension=1024),
        replace(POOL, k=10),
    ):
        found = cost_model.estimate(larger, cluster, known)
        assert found.seconds > base.seconds
        assert found.disk > base.disk
    wider = cost_model.estimate(POOL, replace(cluster, nodes=8), known)
    assert wider.seconds < base.seconds


@pytest.mark.usefixtures("cluster")
def test_the_counts_are_those_of_a_real_run(tmp_path: Path) -> None:
    pools.write(tmp_path / "m", pools.make(3000, 16), files=3)
    words = ["run", "--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    more = ["--exact-below", "0", "--n-neighbors", "3", "--partitions", "4", "--target-recall"]
    assert main([*words, *more, "0.8"]) == 0
    figures = stats(tmp_path / "o")
    graph = figures["graph"]
    h = Habits(
        samples=3000,
        cells=graph["nlist"],
        probes=graph["nprobe"],
        passes=graph["refinement_passes"],
        sketch_dim=graph["sketch_dim"],
        evaluations=graph["evaluations_per_sample"],
    )
    pool = Pool(samples=3000, dimension=32, k=3, exact_below=0)
    steps = {step.name: step for step in plan_steps.count(pool, h, 4)}
    # every step of the run is planned, and no other
    planned = {name for name, step in steps.items() if step.units}
    assert planned - {"catalog", "select"} >= set(figures["seconds_detail"])
    assert plan_steps.parts_of(pool) == figures["catalog"]["parts"]
    assert plan_steps.habits_at(h, 3000, 3).cells == pytest.approx(graph["nlist"], rel=0.1)
    marks = tmp_path / "o/completions/graph"
    names = ("route", "find", "merge", "finish", "measure")
    tasks = {name: len(list(marks.glob(f"{name}-0*.json"))) for name in names}
    assert {name: steps[name].tasks for name in tasks} == tasks
    # bytes that stay: features and rows of the catalog, the graph
    features = sum(path.stat().st_size for path in (tmp_path / "o/catalog").glob("*.npy"))
    assert features == pytest.approx(3000 * 2 * 32, rel=0.05)
    assert steps["measure"].read == pytest.approx(features, rel=0.05)


@pytest.mark.usefixtures("cluster")
def test_rates_are_measured_on_the_pool_that_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "PILOTS", (500, 2500))
    monkeypatch.setattr(plan, "GREEDY_ROWS", 5000)
    pools.write(tmp_path / "m", pools.make(4000, 16), files=4)
    saved = str(tmp_path / "rates.json")
    words = ["plan", "--metadata-dir", str(tmp_path / "m"), "--n-neighbors", "2", "--memory", "4GB"]
    assert main([*words, "--calibrate", "--rates", saved]) == 0
    said = capsys.readouterr().out
    assert "4,000 rows of 32 dimensions in 4 pairs" in said
    assert "calibrating on 2,500 rows" in said
    found = plan.read_rates(saved)
    assert found.dimension == 32
    assert found.habits.samples == 2500
    assert {"catalog", "find", "supersteps", "select"} <= set(found.steps)
    assert all(rate.unit > 0 or rate.fixed >= 0 for rate in found.steps.values())
    assert main([*words, "--rates", saved, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {stage["name"] for stage in told["stages"]} == {"catalog", "graph", "rank", "select"}
    assert told["seconds"] == pytest.approx(sum(s["seconds"] for s in told["stages"]))


def test_only_valid_rows_of_real_metadata_are_measured(tmp_path: Path) -> None:
    pool = pools.make(300, 8)
    pool["img"][::3] = np.nan
    pools.write(tmp_path / "m", pool, files=3)
    source = Folder(str(tmp_path / "m"))
    rows, dimension, names = plan.look_at(source, CatalogConfig())
    assert (rows, dimension) == (300, 16)
    features, difficulty = plan.real_rows(source, names, CatalogConfig(), 150)
    assert features.shape == (150, 16)
    assert np.isfinite(features).all()
    assert np.isfinite(difficulty).all()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "nothing to plan"),
        (("--samples", "1e6", "--nodes", "0"), "nodes is 0"),
        (("--samples", "1e6", "--fraction", "2"), "fraction is 2"),
        (("--samples", "lots"), "'lots', allowed is a whole number"),
        (("--samples", "M"), "'M', allowed is a whole number"),
        (("--samples", "1.5"), "allowed is a whole number"),
        (("--samples", "nan"), "allowed is a whole number"),
        (("--samples", "0.5"), "allowed is a whole number"),
        (("--samples", "1e8", "--disk", "1GB"), "run directory grows to"),
        (("--samples", "1e8", "--memory", "2GB", "--cpus", "8"), "a task may use"),
        (("--samples", "1e10", "--memory", "64GB", "--cpus", "4"), "--nodes"),
        (("--samples", "1e8", "--partitions", "2"), "--partitions"),
        (("--samples", "1e6", "--rates", "/nowhere/rates.json"), "/nowhere/rates.json"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_with_the_remedy(
    words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("128M", 128_000_000), ("12.8m", 12_800_000), ("1.28B", 1_280_000_000), ("5k", 5000),
        ("12.8e6", 12_800_000), ("12,800,000", 12_800_000), ("1_000", 1000),
    ],
)  # fmt: skip
def test_samples_are_counted_as_people_write_them(text: str, count: int) -> None:
    assert values.count(text) == count


def test_the_number_of_partitions_that_a_refusal_names_is_enough() -> None:
    known = every_rate()
    pool = replace(POOL, samples=100_000_000)
    tight = Cluster(nodes=1, cpus=4, memory=32_000_000_000, partitions=3)
    (refusal,) = cost_model.estimate(pool, tight, known).refusals
    enough = int(refusal.rpartition("--partitions ")[2])
    assert not cost_model.estimate(pool, replace(tight, partitions=enough), known).refusals


def test_embedding_has_no_time_unless_a_rate_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--samples", "1e6", "--shards", "--memory", "64GB"]
    assert main(words) == 0
    assert "unknown" in capsys.readouterr().out
    assert main([*words, "--images-per-second", "500", "--gpus", "2"]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("embed"))
    assert "17 min" in line  # 1e6 / (2 · 500) s
    assert "unknown" not in line


def test_the_bundled_rates_plan_every_step() -> None:
    known = plan.read_rates()
    steps = plan_steps.count(POOL, plan_steps.habits_at(known.habits, POOL.samples, POOL.k), 10)
    assert {step.name for step in steps if step.units} <= set(known.steps)


CLUSTER = Path(__file__).parents[2] / "docs/cluster.md"
TABLE = re.compile(r"^\| (small|medium|large|xlarge) \|.*$", re.MULTILINE)


def predicted_row(name: str, samples: int, nodes: int) -> str:
    """A line of the table in docs/cluster.md."""
    cluster = Cluster(nodes=nodes, cpus=32, memory=256 * 10**9, storage=2 * 10**9)
    found = cost_model.estimate(
        Pool(samples=samples, dimension=1536, k=1), cluster, plan.read_rates()
    )
    assert not found.refusals
    graph = next(stage for stage in found.stages if stage.name == "graph")
    largest = max(stage.memory for stage in found.stages)
    cells = (
        name, f"{samples / 1e6:,g}M", str(nodes), plan.duration(found.seconds),
        plan.duration(graph.seconds or 0.0), graph.slowest, plan.amount(largest),
        plan.amount(found.disk), plan.amount(found.routed),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def test_the_published_table_of_datacomp_pools_equals_the_plan() -> None:
    pools_ = {"small": 1, "medium": 4, "large": 32, "xlarge": 256}
    rows = [
        predicted_row(n, 12_800_000 * 10**i, nodes) for i, (n, nodes) in enumerate(pools_.items())
    ]
    assert [line[0] for line in TABLE.finditer(CLUSTER.read_text("utf-8"))] == rows


class Nodes:
    """The part of a Runner that plans need."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def resources(self) -> tuple[int, int, int]:
        return self._cluster.cpus, self._cluster.nodes, self._cluster.memory


POOLS = st.builds(
    Pool, samples=st.integers(20_000, 10**10), dimension=st.sampled_from([16, 512, 1536]),
    k=st.sampled_from([1, 10, 40]),
)  # fmt: skip
CLUSTERS = st.builds(
    Cluster, nodes=st.integers(1, 64), cpus=st.integers(1, 64),
    memory=st.integers(2 * 10**9, 10**12), partitions=st.sampled_from([0, 0, 1, 7]),
    memory_per_worker=st.sampled_from([0, 0, 700_000_000, 8 * 10**9]),
)  # fmt: skip


@given(POOLS, CLUSTERS, st.sampled_from([0, 1]), st.floats(0.02, 1))
def test_the_stage_makes_the_partitions_that_are_planned(
    pool: Pool, cluster: Cluster, passes: int, share: float
) -> None:
    h = replace(HABITS, passes=passes, sketch_dim=max(1, round(share * pool.dimension)))
    planned, memory = cost_model.partitions_of(pool, cluster, h)
    made = graph_stage.partition_plan(
        Nodes(cluster), pool.samples, 2 * pool.dimension, h.sketch_dim,
        knn.list_width(pool.k, passes), memory=cluster.memory_per_worker,
        partitions=cluster.partitions,
    )  # fmt: skip
    assert (made.partitions, made.memory or cluster.memory) == (planned, memory)


@given(st.integers(1, 3000), st.integers(1, 40_000_000), st.sampled_from([0, 10**9, 8 * 10**9]))
def test_the_catalog_has_the_parts_and_about_the_tasks_that_are_planned(
    files: int, rows: int, memory: int
) -> None:
    pool = Pool(samples=files * rows, dimension=512)
    pairs = [metadata.Pair(str(i), pool.metadata_bytes // files) for i in range(files)]
    assert sum(pair.size for pair in pairs) == pool.metadata_bytes
    groups = len(build_catalog.grouped(pairs, sizes.catalog_group(memory)))
    planned = plan_steps.groups_of(pool, memory)
    # files are read whole: one task each if they are large, else tasks are at least half full
    if pairs[0].size > sizes.catalog_group(memory):
        assert groups == files
    else:
        assert planned <= groups <= 2 * planned
    split = sizes.catalog_parts(sum(pair.size for pair in pairs), memory)
    assert plan_steps.parts_of(pool, memory) == split


@given(POOLS, CLUSTERS)
@example(  # a wide block needs more than the rows of a partition
    Pool(samples=362_842, dimension=1536, k=40),
    Cluster(nodes=64, cpus=64, memory=2_000_001_239, partitions=7),
)
@settings(max_examples=300)
def test_partitions_that_a_refusal_asks_for_are_enough(pool: Pool, cluster: Cluster) -> None:
    known = every_rate()
    for refusal in cost_model.estimate(pool, cluster, known).refusals:
        option, _, value = refusal.rpartition("--")[2].partition(" ")
        if option == "partitions":
            more = replace(cluster, partitions=int(value))
        elif option == "memory-per-worker":
            more = replace(cluster, memory_per_worker=parse_bytes(value.split(",")[0]))
        else:
            continue
        again = cost_model.estimate(pool, more, known).refusals
        assert not [text for text in again if text.startswith("a task may use")]
        if option == "partitions":
            assert not [text for text in again if "--partitions" in text]


def test_a_worker_that_the_stages_refuse_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["plan", "--samples", "1e6"], ["run", "--metadata-dir", "m", "--out-dir", "o"]):
        assert main([*words, "--memory-per-worker", "699MB"]) == 2
        assert "memory-per-worker is 699000000 bytes, allowed is" in capsys.readouterr().err


def test_embedding_is_planned_with_what_its_tasks_request() -> None:
    embed = EmbedConfig(shards=("s",))
    pool = replace(POOL, images=True)
    found = cost_model.estimate(pool, Cluster(memory=10**12), every_rate()).stages[0]
    pictures = sizes.beside_model(embed.batch_size, embed.max_pixels)
    assert (found.name, found.memory) == ("embed", sizes.MODEL + pictures)


def test_a_plan_says_for_which_k_its_rates_were_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", "--samples", "1e6", "--memory", "64GB"]
    for k in (1, 10):
        assert main([*words, "--n-neighbors", str(k)]) == 0
        assert ("measured with k=1: with k=10" in capsys.readouterr().out) == (k == 10)
    assert Pool(samples=1, dimension=1).k == GraphConfig().n_neighbors
