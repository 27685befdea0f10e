"""Runs on a cluster whose processes are killed give the same bits as an undisturbed run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import faults, pools, runs, shard_files
from support.runs import stats

from d2filter.cli import main as cli

OPTIONS = ("--n-neighbors", 3, "--exact-below", 100, "--target-recall", 0.9, "--partitions", 4)
ORDINARY, ALL = 3, 28  # schedules; three kill every kind of process
DRAWS = 3  # of one seed, until all that it must kill has been killed


@pytest.fixture(scope="module")
def machines() -> Iterator[faults.Machines]:
    found = faults.Machines()
    yield found
    found.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    words: tuple[object, ...]
    files: dict[str, bytes]
    samples: dict[str, int]
    marks: int
    snapshots: int


def undisturbed(machines: faults.Machines, words: tuple[object, ...], out: Path) -> Undisturbed:
    command = faults.Command(machines, words, out)
    result = command.run_with_faults()
    assert result.code == 0, result.stderr
    marks, snapshots = command.progress()
    return Undisturbed(
        words=words,
        files=runs.files(out),
        samples=stats(out)["samples"],
        marks=marks,
        snapshots=snapshots,
    )


@pytest.fixture(scope="module")
def plain(machines: faults.Machines, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A run from metadata: six files, four partitions."""
    folder = tmp_path_factory.mktemp("plain")
    metadata = pools.write(folder / "m", pools.make(3000, 24), files=6)
    return undisturbed(machines, ("run", "--metadata-dir", metadata, *OPTIONS), folder / "o")


def same(out: Path, whole: Undisturbed) -> None:
    """Assert that a run shows no trace of what was done to it."""
    found = runs.files(out)
    assert found.keys() == whole.files.keys()
    assert [name for name, content in found.items() if content != whole.files[name]] == []
    assert sum(name.startswith(("graph/", "ranking/")) for name in found) == 8
    assert stats(out)["samples"] == whole.samples
    assert runs.unpublished(out) == []
    assert cli.main(["verify", str(out)]) == 0


def survive(machines: faults.Machines, whole: Undisturbed, seed: int, folder: Path) -> None:
    """Play the schedule of a seed; another one of it where a victim was not found in time."""
    wanted = set(faults.kinds_of(seed))
    tried = []
    for attempt in range(DRAWS):
        schedule = faults.draw(seed, attempt, marks=whole.marks, snapshots=whole.snapshots)
        out = folder / f"o{attempt}"
        result = faults.Command(machines, whole.words, out).run_with_faults(schedule)
        machines.wait_until_idle()
        assert result.code == 0, (result, schedule)
        same(out, whole)
        if wanted <= result.kinds:
            return
        tried.append((schedule, result.killed))
    pytest.fail(f"no {wanted} could be killed at its time: {tried}")


@pytest.mark.parametrize(
    "seed",
    [
        *range(ORDINARY),
        *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(ORDINARY, ALL)),
    ],
)
def test_kills_at_random_points_of_a_run_leave_no_trace(
    seed: int, machines: faults.Machines, plain: Undisturbed, tmp_path: Path
) -> None:
    survive(machines, plain, seed, tmp_path)


def test_the_ordinary_schedules_kill_every_kind_of_process() -> None:
    assert {kind for seed in range(ORDINARY) for kind in faults.kinds_of(seed)} == set(faults.KINDS)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_kills_while_shards_are_embedded_leave_no_trace(
    machines: faults.Machines, tmp_path: Path
) -> None:
    for number in range(4):
        content = [
            m for i in range(80) for m in shard_files.members(f"{number}{i:04d}", 100 * number + i)
        ]
        shard_files.write(tmp_path / f"s/{number:05d}.tar", content)
    words = ("run", "--shards", tmp_path / "s", "--batch-size", 16, "--best-effort", *OPTIONS)
    whole = undisturbed(machines, words, tmp_path / "o")
    # all but the last within the four tasks that embed
    kinds = ("worker", "raylet", "driver", "writer", "actor")
    schedule = [faults.Fault(kind=kind, after=after) for after, kind in enumerate(kinds)]
    out = tmp_path / "p"
    result = faults.Command(machines, words, out).run_with_faults(schedule)
    machines.wait_until_idle()
    assert result.code == 0, result
    assert result.kinds == set(kinds), result
    assert [one.marks < 6 for one in result.killed] == [True, True, True, True, False]
    same(out, whole)


@pytest.mark.nightly
def test_a_node_that_hangs_is_given_up_and_changes_nothing_when_it_wakes(
    machines: faults.Machines, plain: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    command = faults.Command(machines, plain.words, out)
    # Ray waits for seven minutes otherwise, until it calls a connection broken
    command.environment["RAY_grpc_client_keepalive_time_ms"] = "2000"
    command.environment["RAY_grpc_client_keepalive_timeout_ms"] = "3000"
    result = command.run_with_faults([faults.Fault(kind="absence", after=plain.marks // 4)])
    machines.wait_until_idle()
    assert result.code == 0, result
    assert result.kinds == {"absence"}
    same(out, plain)


# a task that says who runs it, and waits for its fate
FATED = """
import os, pathlib, time
from d2filter.engine import fanout
from d2filter.stages.catalog import build
fanout.FIRST_PAUSE = 0.1
whole, victims = build.read_group, os.environ["VICTIMS"]
def read_group(**arguments):
    if arguments["names"] == ["00003"]:
        pathlib.Path(victims, str(os.getpid())).touch()
        time.sleep(600)
    return whole(**arguments)
build.read_group = read_group
"""


def test_a_task_whose_workers_all_die_is_named_and_stops_no_other(
    machines: faults.Machines, plain: Undisturbed, tmp_path: Path
) -> None:
    out, victims = tmp_path / "o", tmp_path / "victims"
    victims.mkdir()
    dead: set[str] = set()

    def slay() -> bool:
        for path in victims.iterdir():
            if path.name not in dead:
                assert int(path.name) in machines.at_work()
                os.kill(int(path.name), signal.SIGKILL)
                dead.add(path.name)
        return False

    doomed = faults.Command(machines, plain.words, out, before=faults.SMALL_TASKS + FATED)
    doomed.environment["VICTIMS"] = str(victims)
    doomed.start()
    code, stderr = doomed.wait(slay)
    assert code == 1
    assert len(dead) == 5
    *retries, line = stderr.strip().splitlines()
    assert "catalog task read-00003: its worker died 5 times" in line
    assert len(retries) == 4
    assert all("catalog task read-00003 is tried again" in retry for retry in retries)
    assert len(line) < 400
    done = {p: p.stat().st_mtime_ns for p in (out / "completions/catalog").glob("read-*.json")}
    assert {path.name for path in done} == {f"read-{n:05d}.json" for n in (0, 1, 2, 4, 5)}
    again = faults.Command(machines, plain.words, out)

    def leave_off() -> bool:
        if (out / "completions/catalog.json").exists():
            again.kill()
        return False

    again.start()
    again.wait(leave_off)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a published task ran again"
    found = {name: text for name, text in runs.files(out).items() if name.startswith("catalog/")}
    assert len(found) > 1
    assert {name: plain.files[name] for name in found} == found


def test_a_lost_head_ends_the_driver_and_a_new_cluster_goes_on(
    machines: faults.Machines, plain: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    command = faults.Command(machines, plain.words, out)
    # Ray hopes for a minute otherwise
    command.environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "3"
    command.start()
    lost: list[float] = []

    def behead() -> bool:
        if not lost and command.progress()[0] >= plain.marks // 3:
            machines.kill_head()
            lost.append(time.monotonic())
        return False

    code, stderr = command.wait(behead)
    assert code == 1
    assert time.monotonic() - lost[0] < 30
    assert "GCS" in stderr
    machines.restart()
    published = command.progress()[0]
    assert plain.marks // 3 <= published < plain.marks
    # as an earlier owner leaves it that is killed where no stage has to begin again
    (out / ".tmp-0123456789ab-stats.json").touch()
    again = faults.Command(machines, plain.words, out).run_with_faults()
    assert again.code == 0, again.stderr
    same(out, plain)
