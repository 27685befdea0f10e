"""The driver of the supersteps, with fake actors whose results and deaths are planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.exceptions

from d2filter.engine import same_code
from d2filter.errors import StageError
from d2filter.formats.paths import Folder
from d2filter.stages.rank import actors, partition_actor


class Answer:
    """A reference that is ready."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Method:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def remote(self, *arguments: Any) -> Answer:
        return Answer(self.answer(*arguments))


class Actor:
    def __init__(
        self, name: str, calls: list[str], live: int | Exception, ping: Any = None
    ) -> None:
        def step(heard: list[Any]) -> Any:
            calls.append(f"{name} steps")
            if isinstance(live, Exception):
                return live
            return partition_actor.Step(live=live, news=True, rounds=1, sent={})

        def finish() -> bool:
            calls.append(f"{name} finishes")
            return True

        self.step, self.finish = Method(step), Method(finish)
        self.ping = Method(lambda: ping)
        self.everything_for = Method(lambda peer: None)
        self.save = Method(lambda: True)


Start = Callable[[list[int], dict[str, int]], Actor]


class ActorClass:
    """What `ray.remote` makes of a class."""

    def __init__(self, start: Start, needs: dict[str, int]) -> None:
        self.start, self.needs = start, needs

    def options(self, *, max_restarts: int, **needs: int) -> ActorClass:
        return ActorClass(self.start, needs)

    def remote(self, numbers: list[int], *arguments: Any) -> Actor:
        return self.start(numbers, self.needs)


class Ray:
    """A cluster; start: makes the actor of some partitions, which requests some resources."""

    exceptions = ray.exceptions

    def __init__(self, start: Start) -> None:
        self.start = start
        self.killed: list[Any] = []

    def remote(self, kind: type) -> ActorClass:
        return ActorClass(self.start, {})

    def get(self, reference: Answer) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def wait(self, pings: list[Answer], num_returns: int, timeout: float) -> Any:
        late = [ping for ping in pings if ping.value == "no place"]
        return [ping for ping in pings if ping not in late], late

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


def driver_of(cluster: Ray, out: Path, *, places: int = 2) -> actors.Driver:
    """The driver of two actors with a partition each, on a cluster with room for some."""
    arguments = (Folder(str(out)), 2, {})
    return actors.Driver(cluster, [[0], [1]], {"num_cpus": 1}, arguments, lambda: places)


def test_an_answer_of_a_lost_actor_does_not_count_for_its_successor(tmp_path: Path) -> None:
    """Both actors of a node are gone; the answer of one of them, that it is done, came before."""
    dead = ray.exceptions.ActorDiedError()
    calls: list[str] = []

    def start(numbers: list[int], needs: dict[str, int]) -> Actor:
        if needs == {"num_cpus": 0}:  # in place of one that died
            return Actor(f"new {numbers[0]}", calls, 0)
        return Actor(f"old {numbers[0]}", calls, 0 if numbers == [1] else dead, dead)

    figures = driver_of(Ray(start), tmp_path).run(lambda live: None)
    assert calls == [
        "old 0 steps", "old 1 steps", "new 0 steps", "new 1 steps", "new 0 finishes",
        "new 1 finishes",
    ]  # fmt: skip
    assert figures["restarts"] == 2


def test_scores_that_are_not_final_are_never_written(tmp_path: Path) -> None:
    class Unfinished:
        def live(self) -> int:
            return 3

    actor = partition_actor.PartitionActor([0], Folder(str(tmp_path)), 2, {}, same_code.own())
    actor._shares = {0: Unfinished()}  # type: ignore[dict-item]
    with pytest.raises(StageError, match="3 scores of partition 0 are not final"):
        actor.finish()
    assert not np.any([p.name.startswith("scores") for p in tmp_path.rglob("*")])


def one_place(started: list[Actor]) -> Ray:
    """Only the first actor finds a CPU; actors that need none start."""

    def start(numbers: list[int], needs: dict[str, int]) -> Actor:
        waits = numbers == [1] and needs["num_cpus"] > 0
        started.append(Actor(f"{numbers}", [], 0, ping="no place" if waits else None))
        return started[-1]

    return Ray(start)


def test_if_a_node_is_lost_before_its_actor_starts_the_actor_starts_without_a_cpu(
    tmp_path: Path,
) -> None:
    started: list[Actor] = []
    cluster = one_place(started)
    driver_of(cluster, tmp_path, places=1)
    assert len(started) == 3
    assert cluster.killed == [started[1]]


def test_a_busy_cluster_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "PLACE_SECONDS", 0.1)
    with pytest.raises(StageError, match="2 processes are needed at once, the cluster started 1"):
        driver_of(one_place([]), tmp_path, places=2)


@pytest.mark.parametrize(
    ("ping", "line"),
    [
        (ray.exceptions.ActorDiedError(), "the worker of partition 1 died and is started again"),
        (None, "states for partition 0 are sent again"),
    ],
    ids=["peer died", "states lost"],
)
def test_the_lost_actor_is_named_and_not_the_one_that_waited_for_it(
    tmp_path: Path, ping: Any, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Actor 0 lives, but what another one sent to it is gone."""
    calls: list[str] = []
    steps = iter([ray.exceptions.OwnerDiedError("0" * 56, None, ""), 0])

    def start(numbers: list[int], needs: dict[str, int]) -> Actor:
        if numbers == [1]:
            return Actor("1", calls, 0, ping if needs["num_cpus"] else None)
        actor = Actor("0", calls, 0)
        actor.step = Method(lambda heard: Actor("0", calls, next(steps)).step.answer(heard))
        return actor

    driver_of(Ray(start), tmp_path).run(lambda live: None)
    assert f"d2filter: rank: {line} (" in capsys.readouterr().err
    logged = (tmp_path / "logs" / "driver.jsonl").read_text()
    assert ("worker lost" in logged) == (ping is not None)
