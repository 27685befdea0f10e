"""Commands that are killed at each kind of publication and removal give the undisturbed result.

A seed draws a point from all points that undisturbed commands pass, in the driver and in workers.
The process that reaches the point is killed. The same command is run again until it ends.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support import faults, kill_points, pools, runs, shard_files

from d2filter.cli import main as cli
from d2filter.formats.paths import Folder
from d2filter.formats.uid import from_hex
from d2filter.tools import provenance

KILLS = 5  # of one play
DRAWS = 5  # until the first command is killed
NIGHTLY = 5  # plays of each scenario: 8 × 5 × 5 points
ORDINARY = ("another split", "another split of classes", "anew, another budget", "another budget")
ALL = (*ORDINARY, "catalog anew", "embedded anew", "healed", "reshard")
SIGKILLED = -9

# two files of metadata are read by a task, where it is one by faults.SMALL_TASKS
OTHER_TASKS = (
    faults.SMALL_TASKS
    + """
sizes.CATALOG_GROUP, sizes.CATALOG_PART = 60_000, 80_000
"""
)
OPTIONS = ("--n-neighbors", 3, "--exact-below", 100, "--target-recall", 0.9, "--no-report")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Commands whose end must not depend on when processes die."""

    first: tuple[object, ...] = ()
    """the command that is under way, or done; none: `then` begins in an empty folder"""
    then: tuple[object, ...]
    """the command that comes after it, with other options"""
    at: str = ""
    """the stage in which the driver of `first` dies; empty: `first` ends before `then` begins"""
    damaged: tuple[str, ...] = ()
    """files of a finished `first` that lose their last bytes before `then`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a scenario comes to when nothing dies."""

    scenario: Scenario
    files: dict[str, bytes]
    points: int
    start: Path | None = None
    """what `first` leaves, where it ends before"""
    deaths: tuple[int, ...] = ()
    """points of the driver of `first` in the stage where it is to die"""


@pytest.fixture(scope="module")
def killing() -> Iterator[kill_points.Points]:
    with kill_points.points() as found:
        yield found


@pytest.fixture(scope="module")
def machines(killing: kill_points.Points) -> Iterator[faults.Machines]:
    # one node: processes die here, machines in test_faults.py
    found = faults.Machines(nodes=1, cpus=2)
    yield found
    found.close()


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("input")
    pool = pools.make(1500, 16)
    plain = pools.write(folder / "m", pool, files=5)
    labels = [f"class {i % 7}" for i in range(1500)]
    grouped = pools.write(folder / "g", pool, files=2, columns={"label": labels})
    uids = [f"{i * 77_777:032x}" for i in range(120)]
    for number in range(3):
        content = [
            m for i in range(40 * number, 40 * (number + 1))
            for m in shard_files.members(f"{i:05d}", i, uid=uids[i])
        ]  # fmt: skip
        shard_files.write(folder / f"s/{number:05d}.tar", content)
    half = folder / "half.npy"
    np.save(half, np.array([from_hex(uid) for uid in uids[::2]], "u8,u8"))
    run = ("run", "--metadata-dir", plain, "--clip-scores", "0.01", *OPTIONS)
    classes = ("run", "--metadata-dir", grouped, "--group-column", "label", *OPTIONS)
    embed = ("run", "--shards", folder / "s", "--batch-size", 16, "--best-effort", *OPTIONS)
    ranked = (*run, "--partitions", 2, "--fraction", "0.3,0.5")
    embedded = (*embed, "--partitions", 2)
    return {
        "another split": Scenario(
            first=(*run, "--partitions", 4),
            then=(*run, "--partitions", 2),
            at="catalog",
        ),
        "another split of classes": Scenario(
            first=(*classes, "--partitions", 5), then=(*classes, "--partitions", 2), at="graph"
        ),
        "anew, another budget": Scenario(
            first=ranked,
            then=(*run, "--partitions", 2, "--fraction", "0.2,0.1", "--overwrite", "rank"),
        ),
        "another budget": Scenario(first=ranked, then=("select", "--fraction", "0.1,0.2")),
        "catalog anew": Scenario(first=ranked, then=(*ranked, "--overwrite", "catalog")),
        "embedded anew": Scenario(
            first=embedded, then=(*embedded, "--fraction", "0.2,0.1", "--overwrite", "embed")
        ),
        "healed": Scenario(
            first=embedded,
            then=(*embedded, "--heal"),
            damaged=("metadata/00001.npz", "graph/part-00001.parquet", "subset.npy"),
        ),
        "reshard": Scenario(
            then=("reshard", "--shards", folder / "s", "--subset", half, "--shard-size", 7)
        ),
    }


def play(
    command: faults.Command,
    once: bool = False,
    after_a_kill: Callable[[], None] = lambda: None,
) -> int:
    """Give a command until it ends by itself; `once`: only until the driver was killed. Returns
    how often it was.
    """
    for deaths in range(4 * KILLS):
        command.start()
        code, stderr = command.wait()
        if code != SIGKILLED:
            assert code == 0, stderr
            return deaths
        after_a_kill()
        if once:
            return 1
    pytest.fail("it never ends")


@pytest.fixture(scope="module")
def finished(
    machines: faults.Machines,
    killing: kill_points.Points,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Scenario, Path], None]:
    """Copies what the first command of a scenario leaves; it is run once."""
    found: dict[tuple[object, ...], Path] = {}

    def copy(scenario: Scenario, out: Path) -> None:
        if scenario.first not in found:
            folder = tmp_path_factory.mktemp("first") / "o"
            killing.watch(folder)
            play(faults.Command(machines, scenario.first, folder))
            found[scenario.first] = folder
        shutil.copytree(found[scenario.first], out)
        for name in scenario.damaged:
            content = (out / name).read_bytes()
            (out / name).write_bytes(content[:-9])

    return copy


@pytest.fixture(scope="module")
def known(
    machines: faults.Machines,
    killing: kill_points.Points,
    scenarios: dict[str, Scenario],
    finished: Callable[[Scenario, Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Known]:
    found: dict[str, Known] = {}

    def of(name: str) -> Known:
        if name not in found:
            scenario = scenarios[name]
            folder = tmp_path_factory.mktemp("known")
            out, start = folder / "o", None
            deaths: list[int] = []
            if scenario.at:
                killing.watch(folder / "f")
                command = faults.Command(machines, scenario.first, folder / "f")
                play(command)
                deaths = [
                    number
                    for number, (pid, _, path) in enumerate(map(str.split, killing.passed()))
                    if int(pid) == command.pid and f"/{scenario.at}" in path
                ]
                assert deaths
            elif scenario.first:
                start = folder / "start"
                finished(scenario, start)
                shutil.copytree(start, out)
            killing.watch(out)
            play(faults.Command(machines, scenario.then, out, before=OTHER_TASKS))
            verify(scenario, out)
            found[name] = Known(
                scenario=scenario, files=runs.files(out), points=len(killing.passed()),
                start=start, deaths=tuple(deaths),
            )  # fmt: skip
        return found[name]

    return of


def verify(scenario: Scenario, out: Path) -> None:
    """What a command has left agrees with itself; new shards can only be compared."""
    if scenario.then[0] != "reshard":
        assert cli.main(["verify", str(out)]) == 0


def kill_numbers(seed: int, count: int) -> Sequence[int]:
    """Points of a play, one of each fifth of the undisturbed command: all stages are hit."""
    rng = np.random.default_rng(seed)
    bounds = np.linspace(0, count, KILLS + 1).astype(int)
    return [int(rng.integers(low, max(high, low + 1))) for low, high in pairwise(bounds)]


def outputs(files: dict[str, bytes]) -> set[str]:
    """Names of the files that stages have written, without what only verify and sweep need."""
    homes = ("metadata/", "catalog/", "graph/", "ranking/", "kept/", "subsets/", "subset.npy")
    return {name for name in files if name.startswith(homes)}


def recorded(out: Path) -> set[str]:
    """The same, as the records of the finished stages tell."""
    found = set()
    for stage, record in provenance.records(Folder(str(out))).items():
        home = provenance.home(Folder("/"), stage).url.strip("/")
        found |= {f"{home}/{name}".lstrip("/") for name in record["checksums"]}
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        *((name, 0) for name in ORDINARY),
        *(
            pytest.param(name, seed, marks=pytest.mark.nightly)
            for name in ALL
            for seed in range(1, 1 + NIGHTLY)
        ),
    ],
)
def test_a_kill_at_any_publication_or_removal_leaves_no_trace(
    name: str,
    seed: int,
    machines: faults.Machines,
    killing: kill_points.Points,
    known: Callable[[str], Known],
    tmp_path: Path,
) -> None:
    whole = known(name)
    scenario, out = whole.scenario, tmp_path / "o"
    subsets: list[bytes] = []

    def look() -> None:
        """A subset that was there is never gone, nor half of another."""
        if whole.start is not None and scenario.then[0] == "select":
            subsets.append((out / "subset.npy").read_bytes())

    if whole.start is not None:
        shutil.copytree(whole.start, out)
    elif scenario.at:
        # points of workers come between those of the driver in another order each time
        for number in np.random.default_rng(seed).permutation(whole.deaths)[:DRAWS].tolist():
            killing.watch(out, [number])
            if play(faults.Command(machines, scenario.first, out), once=True):
                break
            shutil.rmtree(out)
        else:
            pytest.fail("the driver of the first command could not be killed")
    kills = kill_numbers(seed, whole.points)
    killing.watch(out, kills)
    play(faults.Command(machines, scenario.then, out, before=OTHER_TASKS), after_a_kill=look)
    machines.wait_until_idle()
    # what the first command has finished is not done again, and has no points then
    assert sum(kill < len(killing.passed()) for kill in kills) >= 2
    found = runs.files(out)
    if scenario.at:
        assert found["subset.npy"] == whole.files["subset.npy"]
    else:
        assert found.keys() == whole.files.keys()
        assert [n for n, content in found.items() if content != whole.files[n]] == []
    # a stage that was finished before the other split stays as it is: no file of both is there
    assert outputs(found) == recorded(out)
    assert runs.unpublished(out) == []
    verify(scenario, out)
    if subsets:
        assert whole.start is not None
        old, new = (whole.start / "subset.npy").read_bytes(), whole.files["subset.npy"]
        assert set(subsets) <= {old, new}
