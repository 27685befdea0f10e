"""The driver of the supersteps, with fake actors whose results and deaths are planned."""

from __future__ import annotations

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


class Ray:
    exceptions = ray.exceptions

    def get(self, reference: Answer) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value


def test_what_an_actor_answered_before_its_node_was_lost_is_not_taken_for_its_successors(
    tmp_path: Path,
) -> None:
    """Both actors of a node are gone; the answer of one of them, that it is done, came before."""
    dead = ray.exceptions.ActorDiedError()
    calls: list[str] = []
    driver = actors._Driver.__new__(actors._Driver)
    driver._ray = Ray()
    driver._numbers = [[0], [1]]
    driver._crew_of = {0: 0, 1: 1}
    driver._arguments = (Folder(str(tmp_path)), 2, {})
    driver._actors = [Actor("old 0", calls, dead, dead), Actor("old 1", calls, 0, dead)]
    driver._live, driver._inbox, driver._restarts = [1, 1], [[], []], [0, 0]
    driver._figures = {"rounds": 0, "bytes": 0, "peak_rss_bytes": 0}
    driver._saved = float("inf")
    driver._new = lambda numbers, needs: Actor(f"new {numbers[0]}", calls, 0)  # type: ignore[method-assign]
    figures = driver.run(lambda live: None)
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


class Slow(Ray):
    """Actors with a CPU of their own find no place but for the first."""

    def __init__(self) -> None:
        self.killed: list[Any] = []

    def wait(self, pings: list[Answer], num_returns: int, timeout: float) -> Any:
        late = [ping for ping in pings if ping.value == "no place"]
        return [ping for ping in pings if ping not in late], late

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


def gathering(places: int) -> tuple[Any, Slow]:
    driver, cluster = actors._Driver.__new__(actors._Driver), Slow()
    driver._ray = cluster
    driver._numbers = [[0], [1]]
    calls: list[str] = []
    driver._actors = [Actor("first", calls, 0), Actor("second", calls, 0, ping="no place")]
    driver._new = lambda numbers, needs: Actor(f"{numbers} with {needs}", calls, 0)  # type: ignore[method-assign]
    driver._gather(lambda: places)
    return driver, cluster


def test_where_a_node_is_lost_before_its_actor_starts_the_others_make_room() -> None:
    driver, cluster = gathering(places=1)
    first, second = driver._actors
    assert len(cluster.killed) == 1
    assert second not in cluster.killed
    assert first not in cluster.killed


def test_a_cluster_that_is_busy_is_waited_for_and_then_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(actors, "_PLACE_SECONDS", 0.1)
    with pytest.raises(StageError, match="2 processes are needed at once, the cluster started 1"):
        gathering(places=2)
