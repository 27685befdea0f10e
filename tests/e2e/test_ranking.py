"""The ranking in partitions: actors that die, drivers that die, schemes, both directions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import pools
from support.runs import copy_of, ranking_by_uid, run, same_columns, stats

from d2filter.algorithm.scores import registry as scores
from d2filter.engine.runner import Runner
from d2filter.formats import graph
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import Plan, RunState
from d2filter.stages.rank import actors

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def runs(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One pool, ranked in one partition and in four."""
    folder = tmp_path_factory.mktemp("made")
    pool = pools.make(3000, 12)
    # a score of no known meaning, so that its highest may be cut
    columns = {"hardness": scores.clip_score(pool["img"], pool["txt"])}
    metadata = pools.write(folder / "m", pool, files=2, columns=columns)
    words = ("run", "--metadata-dir", metadata, "--n-neighbors", 3, "--exact-below", 100)
    words = (*words, "--target-recall", 0.9, "--score-column", "hardness")
    for partitions in (1, 4):
        out = folder / f"o{partitions}"
        assert run(*words, "--out-dir", out, "--partitions", partitions) == 0
    return {1: folder / "o1", 4: folder / "o4"}


@pytest.fixture
def rank_again(runs: dict[int, Path]) -> Any:
    """Ranks the pool of four partitions again, with more options."""

    def rank(*more: Any) -> Path:
        words = ("rank", "--out-dir", runs[4], "--overwrite", "rank")
        assert run(*words, *more) == 0
        return runs[4]

    return rank


def test_partitions_do_not_change_the_ranking(runs: dict[int, Path]) -> None:
    assert same_columns(ranking_by_uid(runs[1]), ranking_by_uid(runs[4]))
    one, four = (stats(runs[p])["rank"] for p in (1, 4))
    assert (one["partitions"], four["partitions"]) == (1, 4)
    assert one["supersteps"] == 1 < four["supersteps"]
    assert one["bytes_exchanged"] == 0 < four["bytes_exchanged"]
    assert four["cut_edges"] > 0
    assert not (runs[4] / "ranking-work").exists()
    assert run("verify", runs[4]) == 0


BeforeSupersteps = Callable[[Callable[[actors.Driver, int], None]], None]


@pytest.fixture
def before_supersteps(monkeypatch: pytest.MonkeyPatch) -> BeforeSupersteps:
    """Registers a function that is called with the driver and the number of the superstep, from 1,
    before each superstep of the test.
    """

    def register(action: Callable[[actors.Driver, int], None]) -> None:
        original = actors.Driver.superstep
        numbers = itertools.count(1)

        def superstep(driver: actors.Driver) -> bool:
            action(driver, next(numbers))
            return original(driver)

        monkeypatch.setattr(actors.Driver, "superstep", superstep)

    return register


def kill(driver: actors.Driver, actor: int) -> None:
    """SIGKILL to the process of an actor."""
    driver._ray.kill(driver._actors[actor])


@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(3, 10))]
)
def test_an_actor_killed_at_a_random_superstep_changes_nothing(
    seed: int, runs: dict[int, Path], rank_again: Any, before_supersteps: BeforeSupersteps,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Odd seeds: with a snapshot after every superstep, from which the new actor goes on."""
    before = ranking_by_uid(runs[1])
    monkeypatch.setattr(actors, "SAVE_SECONDS", 0.0 if seed % 2 else 1e9)
    rng = np.random.default_rng(seed)
    at = set(rng.integers(1, 6, 2).tolist())
    killed = 0

    def kill_one(driver: actors.Driver, number: int) -> None:
        nonlocal killed
        if number in at:
            kill(driver, int(rng.integers(0, len(driver._actors))))
            killed += 1

    before_supersteps(kill_one)
    out = rank_again()
    assert killed
    assert stats(out)["rank"]["restarts"] >= 1
    assert same_columns(ranking_by_uid(out), before)


@pytest.fixture
def four_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each of four partitions, whatever CPUs there are."""
    whole = actors.Driver.start_actor
    monkeypatch.setattr(Runner, "processes", lambda runner, most, memory: most)
    monkeypatch.setattr(
        actors.Driver,
        "start_actor",
        lambda driver, numbers, needs: whole(driver, numbers, {"num_cpus": 0}),
    )


@pytest.mark.parametrize("victims", [(1, 3), (0, 1, 2, 3)])
@pytest.mark.usefixtures("four_processes")
def test_several_actors_killed_at_once_change_nothing(
    victims: tuple[int, ...],
    runs: dict[int, Path],
    rank_again: Any,
    before_supersteps: BeforeSupersteps,
) -> None:
    def kill_victims(driver: actors.Driver, number: int) -> None:
        if number in (2, 5):
            for victim in victims:
                kill(driver, victim)

    before_supersteps(kill_victims)
    out = rank_again()
    assert len(victims) <= stats(out)["rank"]["restarts"] <= 2 * len(victims) + 2
    assert same_columns(ranking_by_uid(out), ranking_by_uid(runs[1]))


def test_an_error_in_an_actor_is_one_line_and_finished_steps_stay(
    runs: dict[int, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = actors.run

    def run_without(**arguments: Any) -> dict[str, Any]:
        (runs[4] / "ranking-work" / "known-00002.hi.npy").unlink()
        return whole(**arguments)

    monkeypatch.setattr(actors, "run", run_without)
    assert run("rank", "--out-dir", runs[4], "--overwrite", "rank") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "known-00002.hi.npy does not exist" in said
    assert len(said) < 300
    monkeypatch.undo()
    # its marker says that the file is there: the way out that docs/reliability.md names
    assert run("rank", "--out-dir", runs[4], "--overwrite", "rank") == 0
    assert same_columns(ranking_by_uid(runs[4]), ranking_by_uid(runs[1]))


def test_the_memory_of_workers_does_not_change_the_ranking(
    runs: dict[int, Path], rank_again: Any
) -> None:
    assert same_columns(
        ranking_by_uid(rank_again("--memory-per-worker", "800MB")), ranking_by_uid(runs[1])
    )


def test_partitions_without_cut_edges_are_ranked(tmp_path: Path) -> None:
    """No partition sends any states."""
    out = Folder(str(tmp_path))
    n, parts = 40, 3
    for number in range(parts):
        row = np.arange(n)
        part = graph.GraphPart(
            hi=np.full(n, number, np.uint64),
            lo=row.astype(np.uint64),
            difficulty=np.random.default_rng(number).random(n, dtype=np.float32),
            neighbors=(n * number + (row + 1) % n)[:, None],
            sqdist=np.full((n, 1), 0.5, np.float32),
        )
        graph.publish_part(out.sub("graph"), number, part)
    samples = {"read": n * parts, "ranked": n * parts, "bad": 0, "duplicate": 0}
    for stage, figures in (("catalog", {"samples": samples}), ("graph", {"k": 1})):
        plan = Plan(stage=stage, options={}, upstream="", inputs=())
        RunState(out).finish(plan, seconds=0.0, peak_rss_bytes=0, stats=figures)
    assert run("rank", "--out-dir", tmp_path) == 0
    assert stats(tmp_path)["rank"]["bytes_exchanged"] == 0
    ranks = np.concatenate(
        [pq.read_table(p)["rank"].to_numpy() for p in (tmp_path / "ranking").glob("*.parquet")]
    )
    assert sorted(ranks.tolist()) == list(range(n * parts))


def test_an_actor_that_dies_repeatedly_is_given_up(
    runs: dict[int, Path], before_supersteps: BeforeSupersteps, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before_supersteps(lambda driver, number: kill(driver, 1))
    monkeypatch.setattr(actors, "RESTARTS", 2)
    assert run("rank", "--out-dir", runs[4], "--overwrite", "rank") == 1
    said = capsys.readouterr().err
    assert "the worker of partitions 1, 3 failed 3 times" in said
    assert len(said.strip().splitlines()[-1]) < 300
    monkeypatch.undo()
    assert run("rank", "--out-dir", runs[4]) == 0
    assert same_columns(ranking_by_uid(runs[4]), ranking_by_uid(runs[1]))


def test_a_killed_driver_continues_from_the_last_snapshots(
    runs: dict[int, Path], before_supersteps: BeforeSupersteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_run = stats(runs[4])["rank"]["supersteps"]
    monkeypatch.setattr(actors, "SAVE_SECONDS", 0.0)

    class Death(BaseException):
        pass

    def die(driver: actors.Driver, number: int) -> None:
        if number == 4:
            raise Death

    before_supersteps(die)
    with pytest.raises(Death):
        run("rank", "--out-dir", runs[4], "--overwrite", "rank")
    assert len(list((runs[4] / "ranking-work").glob("state-*.npz"))) == 4
    assert not list((runs[4] / "ranking").glob("*.parquet"))
    monkeypatch.undo()
    taken: list[int] = []
    before_supersteps(lambda driver, number: taken.append(number))
    assert run("rank", "--out-dir", runs[4]) == 0
    assert same_columns(ranking_by_uid(runs[4]), ranking_by_uid(runs[1]))
    # three supersteps lie in the snapshots
    assert 0 < len(taken) < whole_run


@pytest.mark.parametrize(
    "scheme",
    [
        ("--undirected",),
        ("--kernel", "exp", "--forward", "product"),
        ("--reverse", "absolute", "--forward", "none", "--undirected"),
        ("--reverse", "none", "--gamma-forward", "0.2"),
        ("--kernel", "rbf", "--gamma-scale", "median", "--cut-hardest", "0.2"),
        ("--n-neighbors", "2", "--collapse-copies"),
        ("--n-neighbors", "1", "--collapse-copies", "0.3", "--cut-hardest", "0.1", "--undirected"),
    ],
    ids=lambda words: " ".join(words),
)
def test_every_scheme_is_the_same_in_partitions_and_proven(
    scheme: tuple[str, ...], runs: dict[int, Path], tmp_path: Path
) -> None:
    published = ranking_by_uid(runs[1])
    outs = [copy_of(out, tmp_path) for out in runs.values()]
    for out in outs:
        assert run("rank", "--out-dir", out, "--overwrite", "rank", *scheme) == 0
    one, four = (ranking_by_uid(out) for out in outs)
    assert same_columns(one, four)
    assert not same_columns(published, four)
    assert run("select", "--out-dir", outs[1]) == 0
    assert run("verify", outs[1]) == 0


def test_demoted_samples_are_counted_and_come_last(runs: dict[int, Path], rank_again: Any) -> None:
    # a tenth of the pool are exact copies, and those of 0.3 of the hardest are gone before
    out = rank_again("--collapse-copies", "--cut-hardest", "0.3")
    found = ranking_by_uid(out)
    last = found["forward"] == -(2**62)
    late = stats(out)["rank"]["late"]
    assert late["hardest"] + late["copies"] == last.sum()
    assert 890 < late["hardest"] <= 900
    assert late["copies"] > 100
    assert set(found["rank"][last]) == set(range(3000 - int(last.sum()), 3000))
    assert (found["by_uid_hi"][last] == 0).all()
    assert found["difficulty"][~last].max() < np.sort(found["difficulty"])[-899]
    rank_again()


def test_fewer_neighbors_are_a_prefix_of_each_list(
    runs: dict[int, Path], tmp_path: Path, rank_again: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = graph.read(Folder(str(runs[1] / "graph")))
    narrow = graph.GraphPart(
        hi=pool.hi, lo=pool.lo, difficulty=pool.difficulty,
        neighbors=pool.neighbors[:, :1].copy(), sqdist=pool.sqdist[:, :1].copy(),
    )  # fmt: skip
    out = Folder(str(tmp_path))
    graph.publish_part(out.sub("graph"), 0, narrow)
    samples = {"read": 3000, "ranked": 3000, "bad": 0, "duplicate": 0}
    for stage, figures in (("catalog", {"samples": samples}), ("graph", {"k": 1})):
        plan = Plan(stage=stage, options={}, upstream="", inputs=())
        RunState(out).finish(plan, seconds=0.0, peak_rss_bytes=0, stats=figures)
    # a gamma that is fitted looks at the pairs too, and this catalog knows of none
    told = ("--gamma", 1)
    assert run("rank", "--out-dir", tmp_path, *told) == 0
    assert same_columns(
        ranking_by_uid(tmp_path), ranking_by_uid(rank_again("--n-neighbors", 1, *told))
    )
    rank_again()
    assert run("rank", "--out-dir", runs[4], "--n-neighbors", 4) == 2
    assert "n-neighbors is 4, the graph of" in capsys.readouterr().err
    # as many as there are is what was made
    assert run("rank", "--out-dir", runs[4], "--n-neighbors", 3) == 0


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--cut-hardest", "1", "allowed are auto and 0 to below 1"),
        ("--cut-hardest", "much", "a number such as 0.4"),
        ("--collapse-copies", "-1", "a squared distance of 0"),
        ("--n-neighbors", "-1", "of at least 1"),
    ],
)
def test_a_ranking_option_out_of_range_is_refused(
    option: str, value: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rank", "--out-dir", tmp_path, f"{option}={value}") == 2
    said = capsys.readouterr().err
    assert allowed in said
    assert value in said


def test_more_partitions_than_cpus_and_empty_partitions_change_nothing(tmp_path: Path) -> None:
    metadata = pools.write(tmp_path / "m", pools.make(300, 6))
    words = ("run", "--metadata-dir", metadata, "--n-neighbors", 2, "--exact-below", 10)
    for partitions in (1, 24):
        out = tmp_path / f"o{partitions}"
        assert run(*words, "--best-effort", "--out-dir", out, "--partitions", partitions) == 0
        assert run("verify", out) == 0
    assert 0 in stats(tmp_path / "o24")["graph"]["partition_rows"]
    assert same_columns(ranking_by_uid(tmp_path / "o1"), ranking_by_uid(tmp_path / "o24"))


def test_an_unknown_scheme_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--kernel", "--forward", "--reverse"):
        assert run("rank", "--out-dir", tmp_path, option, "cosine") == 2
        assert option in capsys.readouterr().err
