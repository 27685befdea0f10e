"""Records of a run directory if a process dies between two changes of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from d2filter.formats.paths import FileInfo, Folder, checksum
from d2filter.formats.runstate import STAGES, Plan, RunState


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files are published here, and no machine loses its power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Died(BaseException):
    """What no code catches, like a SIGKILL."""


def dying(patch: pytest.MonkeyPatch, allowed: int) -> None:
    """Die before the change after so many removals and publications."""
    left = [allowed]

    def or_die(whole: object) -> object:
        def change(self: Folder, *more: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Died
            return whole(self, *more)  # type: ignore[operator]

        return change

    patch.setattr(Folder, "remove", or_die(Folder.remove))
    patch.setattr(Folder, "publish", or_die(Folder.publish))


def publish_tasks(folder: Folder, count: int) -> None:
    """What the tasks of a graph that is split into `count` parts leave."""
    for number in range(count):
        folder.publish_json(f"graph/part-{number:05d}.parquet", count)
        folder.publish_json(f"completions/graph/group-{number:05d}.json", count)


def outputs(folder: Folder) -> dict[str, int]:
    return {name: folder.read_json(f"graph/{name}") for name in folder.sub("graph").names()}


@pytest.mark.parametrize("then", [2, 5])
def test_a_death_while_the_split_changes_leaves_no_file_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: int
) -> None:
    """Five parts, changed to two by a process that dies; the next wants two, or five again."""
    deaths = 0
    for allowed in range(50):
        folder = Folder(str(tmp_path / f"{allowed}"))
        state = RunState(folder)
        state.set_task_split("graph", {"partitions": 5})
        publish_tasks(folder, 5)
        with monkeypatch.context() as patch:
            dying(patch, allowed)
            try:
                state.set_task_split("graph", {"partitions": 2})
                break
            except Died:
                deaths += 1
        state.set_task_split("graph", {"partitions": then})
        markers = folder.sub("completions/graph").names()
        there = outputs(folder)
        if then == 2:
            assert markers == []
            assert there == {}
        # a marker stands for a file of its own split
        for marker in markers:
            assert there[marker.replace("group", "part").replace("json", "parquet")] == then
    assert deaths >= 4


def finish(state: RunState, stage: str, upstream: str) -> Plan:
    plan = Plan(stage=stage, options={}, upstream=upstream)
    state.begin(plan)
    state.folder.publish_json(f"completions/{stage}/task.json", 1)
    home = {"rank": "ranking", "embed": "metadata", "select": "kept"}.get(stage, stage)
    state.folder.publish_json(f"{home}/part-00000.parquet", 1)
    state.finish(plan, seconds=0.0, peak_rss_bytes=0, stats={})
    return plan


@pytest.mark.parametrize("stage", STAGES)
def test_a_death_while_a_stage_is_cleared_leaves_no_record_without_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    homes = dict(zip(STAGES, ("metadata", "catalog", "graph", "ranking", "kept"), strict=True))
    deaths = 0
    for allowed in range(80):
        state = RunState(Folder(str(tmp_path / f"{allowed}")))
        plans: dict[str, Plan] = {}
        for name in STAGES:
            before = STAGES[max(0, STAGES.index(name) - 1)]
            upstream = plans[before].fingerprint if plans else ""
            plans[name] = finish(state, name, upstream)
        with monkeypatch.context() as patch:
            dying(patch, allowed)
            try:
                state.clear_from(stage)
                break
            except Died:
                deaths += 1
        for name in STAGES:
            files = state.folder.sub(homes[name]).names()
            if state.done(name) is not None:
                assert files, (name, allowed)
            elif state.begun(plans[name]):
                # it would go on: what its markers stand for is there
                assert files or not state.folder.sub(f"completions/{name}").names()
            state.begin(plans[name])
            if state.folder.sub(f"completions/{name}").names():
                assert state.folder.sub(homes[name]).names(), (name, allowed)
    assert deaths >= 5


@pytest.mark.parametrize("stage", ["embed", "graph"])
def test_a_death_during_the_repair_of_a_stage_does_not_hide_the_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The next that heals makes the damaged part again, and of independent parts no other."""
    inputs = [FileInfo(name=f"{n}", size=1, version="1") for n in range(2)]
    deaths = 0
    for allowed in range(80):
        state = RunState(Folder(str(tmp_path / f"{allowed}")))
        plan = Plan(stage=stage, options={}, upstream="", independent=stage == "embed")
        plan = replace(plan, inputs=inputs) if plan.independent else plan
        home = state.home(stage)
        state.begin(plan)
        sums = {}
        for part in inputs:
            home.publish_json(f"{part.name}.npz", 1)
            sums[f"{part.name}.npz"] = told = checksum(home, f"{part.name}.npz")
            state.folder.publish_json(
                f"completions/{stage}/{part.name}.json", {"checksums": {f"{part.name}.npz": told}}
            )
        state.finish(plan, seconds=0.0, peak_rss_bytes=0, stats={"checksums": sums})
        home.publish_json("1.npz", 2)  # of the same size
        with monkeypatch.context() as patch:
            dying(patch, allowed)
            try:
                assert state.heal(plan)
                break
            except Died:
                deaths += 1
        state.heal(plan)
        assert not state.is_current(plan)
        state.begin(plan)
        left = state.folder.sub(f"completions/{stage}").names()
        assert left == (["0.json"] if plan.independent else []), allowed
    assert deaths >= 3


def test_every_stage_has_its_files() -> None:
    from d2filter.formats import runstate
    from d2filter.stages import registry

    assert tuple(registry.STAGES) == runstate.STAGES
    for stage in runstate.STAGES:
        assert runstate._outputs(stage)
