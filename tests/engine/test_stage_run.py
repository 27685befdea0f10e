"""What a `StageRun` calls tasks, adds up and skips. Tasks run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Task, execute
from d2filter.formats.paths import Folder


class Here(StageRun):
    """Takes the place of Ray: runs the tasks that `run` would submit."""

    def run(self, label: str, tasks: Any, **options: Any) -> list[Figures]:
        for task in tasks:
            outcome = execute(
                self.out, self.stage, task, self.fingerprint_of(label, options.get("variant"))
            )
            assert outcome.error is None
        # all of them are finished: this finds their markers
        return super().run(label, tasks, **options)


def write(report: Any, out: Folder, number: int, word: str = "") -> Figures:
    out.publish_json(f"{number}.json", word)
    report(5)
    return {"word": word, "checksums": {f"{number}.json": [number, word]}}


@pytest.fixture
def steps(tmp_path: Path) -> StageRun:
    return Here(Runner(Folder(str(tmp_path))), "s", "f")


def test_tasks_have_the_names_and_arguments_of_their_step(steps: StageRun) -> None:
    numbers = [{"number": 7}, {"number": 8}]
    found = steps.each("find", write, numbers, {"word": "x"})
    assert [figures["word"] for figures in found] == ["x", "x"]
    steps.each("find", write, numbers, name="find-again")
    steps.alone("judge", write, {"number": 1})
    steps.alone("judge", write, {"number": 1}, name="judge-3")
    assert steps.out.sub("completions/s").names() == [
        "find-00000.json", "find-00001.json", "find-again-00000.json", "find-again-00001.json",
        "judge-3.json", "judge.json",
    ]  # fmt: skip
    assert steps.out.read_json("8.json") == ""


def test_seconds_memory_and_checksums_are_added_up_also_of_tasks_that_are_skipped(
    steps: StageRun,
) -> None:
    def record(name: str, seconds: float, peak: int) -> None:
        marker = f"completions/s/{name}.json"
        known = steps.out.read_json(marker)
        steps.out.publish_json(marker, {**known, "seconds": seconds, "peak_rss_bytes": peak})

    numbers = [{"number": 0}, {"number": 1}]
    steps.each("find", write, numbers)
    record("find-00000", 1.5, 10)
    record("find-00001", 2.25, 30)
    again = StageRun(steps.runner, "s", "f")
    again.each("find", write, numbers)
    assert again.totals.seconds == {"find": 2.25}
    assert again.totals.peak_rss_bytes == 30
    assert again.totals.checksums == {"0.json": [0, ""], "1.json": [1, ""]}
    again.each("find", write, numbers)
    assert again.totals.seconds == {"find": 4.5}, "a step that is repeated counts each time"


def test_a_task_of_the_driver_counts_the_steps_that_it_runs_once(steps: StageRun) -> None:
    def choose(report: Any, steps: StageRun) -> Figures:
        steps.alone("choose", write, {"number": 3}, name="choose-00")
        steps.totals.seconds["choose"] += 1000.0
        return {}

    task = Task(name="choose", run=choose, arguments={"steps": steps})
    steps.totals.seconds["choose"] = 2.0
    figures = steps.in_driver(task, label="choose", skip=True)
    assert steps.totals.seconds["choose"] == round(2.0 + figures["seconds"], 3)
    steps.in_driver(Task(name="layout", run=choose, arguments={"steps": steps}), skip=False)
    assert "layout" not in steps.totals.seconds
    assert "" not in steps.totals.seconds


def test_a_task_of_the_driver_runs_again_only_when_asked_or_changed(steps: StageRun) -> None:
    calls = []

    def count(report: Any) -> Figures:
        calls.append(1)
        return {"count": len(calls)}

    task = Task(name="layout", run=count, arguments={})
    assert steps.in_driver(task, variant=3, skip=True)["count"] == 1
    assert steps.in_driver(task, variant=3, skip=True)["count"] == 1
    assert steps.in_driver(task, variant=4, skip=True)["count"] == 2
    assert steps.in_driver(task, variant=4, skip=False)["count"] == 3


def test_a_variant_and_what_was_chosen_change_the_fingerprint_of_a_step(steps: StageRun) -> None:
    assert steps.fingerprint_of("find", None) == "f"
    plain = steps.fingerprint_of("find", 3)
    assert plain != steps.fingerprint_of("find", 4)
    assert plain != steps.fingerprint_of("route", 3)
    steps.chosen = ("cells",)
    assert plain != steps.fingerprint_of("find", 3)
    assert steps.fingerprint_of("find", None) == "f"
