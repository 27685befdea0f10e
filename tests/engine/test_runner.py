"""Tasks on Ray: results, failures, retries after a killed worker, progress and logs."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from d2filter.engine import fanout, progress
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Task
from d2filter.errors import InputError, StageError
from d2filter.formats import logs
from d2filter.formats.paths import Folder

pytestmark = pytest.mark.usefixtures("cluster")


def write(report: Any, out: Folder, name: str) -> dict[str, Any]:
    with out.publish(f"{name}.txt") as path:
        path.write_text(name)
    report(3)
    return {"name": name, "tries": len(list(Path(out.url).glob(f"{name}.txt")))}


def refuse(report: Any, out: Folder, name: str) -> dict[str, Any]:
    attempts = Path(out.url, f"{name}.attempts")
    attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
    raise InputError(f"{name} is broken")


def stumble(report: Any) -> dict[str, Any]:
    raise ZeroDivisionError("a fault of ours")


def die_always(report: Any, out: Folder, name: str) -> dict[str, Any]:
    with Path(out.url, f"{name}.attempts").open("a") as stream:
        stream.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def die_once(report: Any, out: Folder) -> dict[str, Any]:
    mark = Path(out.url, "died")
    if not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return {"survived": True}


def tasks(out: Folder, run: Any, *names: str) -> list[Task]:
    return [Task(name=n, run=run, arguments={"out": out, "name": n}) for n in names]


@pytest.fixture
def out(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


def test_results_come_in_order_and_finished_tasks_do_not_run_again(out: Folder) -> None:
    runner = Runner(out)
    first = StageRun(runner, "s", "1").run("s", tasks(out, write, "b", "a"))
    assert [f["name"] for f in first] == ["b", "a"]
    assert all(f["peak_rss_bytes"] > 1e6 for f in first)
    Path(out.url, "a.txt").unlink()
    again = StageRun(runner, "s", "1").run("s", tasks(out, write, "b", "a", "c"))
    assert [f["name"] for f in again] == ["b", "a", "c"]
    assert not out.exists("a.txt"), "a published task ran again"
    StageRun(runner, "s", "2").run("s", tasks(out, write, "a"))
    assert out.exists("a.txt"), "another fingerprint must run"


def test_one_failure_does_not_stop_the_others_and_is_not_retried(out: Folder) -> None:
    mixed = [*tasks(out, refuse, "x"), *tasks(out, write, "y", "z")]
    with pytest.raises(InputError, match="x is broken"):
        StageRun(Runner(out), "s", "1").run("s", mixed)
    assert out.names(".txt") == ["y.txt", "z.txt"]
    assert Path(out.url, "x.attempts").read_text() == "x"
    assert not out.exists("completions/s/x.json")


def test_tasks_that_a_finished_task_adds_run_before_the_waiting_ones(
    out: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the first ones calls for another, which calls for a third."""
    monkeypatch.setattr(fanout, "TASKS_AHEAD", 0)  # one at a time
    told: list[str] = []

    def then(name: str, figures: dict[str, Any]) -> list[Task]:
        assert figures["name"] == name
        told.append(name)
        return tasks(out, write, f"{name}x") if len(name) < 3 else []

    def names() -> list[str]:
        found = StageRun(Runner(out), "s", "1").run("x", tasks(out, write, "a", "b"), then=then)
        return [figures["name"] for figures in found]

    expected = ["a", "b", "ax", "axx", "bx", "bxx"]
    assert names() == expected
    assert told == ["a", "ax", "axx", "b", "bx", "bxx"]
    # a rerun that finds some of them done asks for the others only
    (Path(out.url) / "completions/s/bx.json").unlink()
    made = {name: os.stat(f"{out.url}/{name}.txt").st_mtime_ns for name in expected}
    told.clear()
    assert sorted(names()) == sorted(expected)
    assert sorted(told) == sorted(expected)
    again = {name: os.stat(f"{out.url}/{name}.txt").st_mtime_ns for name in expected}
    assert [name for name in expected if made[name] != again[name]] == ["bx"]


def test_a_failed_task_adds_no_tasks(out: Folder) -> None:
    def then(name: str, figures: dict[str, Any]) -> list[Task]:
        return tasks(out, write, f"{name}x") if len(name) < 2 else []

    first = [*tasks(out, refuse, "a"), *tasks(out, write, "b")]
    with pytest.raises(InputError, match="a is broken"):
        StageRun(Runner(out), "s", "1").run("x", first, then=then)
    assert sorted(p.stem for p in Path(out.url).glob("*.txt")) == ["b", "bx"]


def test_several_failures_are_all_named(out: Folder) -> None:
    mixed = [*tasks(out, refuse, "p", "q"), *tasks(out, write, "y")]
    with pytest.raises(StageError, match=r"2 tasks failed, 1 are done.*p is broken; q is broken"):
        StageRun(Runner(out), "s", "1").run("s", mixed)


def test_a_fault_of_ours_keeps_its_traceback_in_the_logs(out: Folder) -> None:
    with pytest.raises(StageError, match=r"ZeroDivisionError: a fault of ours .traceback in"):
        StageRun(Runner(out), "s", "1").run("s", [Task(name="t", run=stumble, arguments={})])
    started, failed = logs.read(out, "logs/s/t.jsonl")
    assert started["event"] == "started"
    assert "in stumble" in failed["traceback"]


def test_a_task_of_a_killed_worker_is_tried_again_after_a_pause_and_the_loss_is_printed_at_once(
    out: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fanout, "FIRST_PAUSE", 0.5)
    task = Task(name="t", run=die_once, arguments={"out": out})
    begun = time.monotonic()
    (figures,) = StageRun(Runner(out), "s", "1").run("s", [task])
    assert figures["survived"]
    assert time.monotonic() - begun > 0.5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("d2filter: s task t is tried again in 0.5 s, attempt 2 of 5: its worker")
    (again,) = [e for e in logs.read(out, logs.DRIVER) if e["event"] == "task tried again"]
    assert (again["stage"], again["task"], again["attempt"], again["pause"]) == ("s", "t", 2, 0.5)
    attempts = [e["attempt"] for e in logs.read(out, "logs/s/t.jsonl") if e["event"] == "started"]
    assert attempts == [1, 2]


def test_a_task_whose_worker_always_dies_is_given_up_and_the_others_finish(
    out: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fanout, "ATTEMPTS", 3)
    mixed = [*tasks(out, die_always, "d"), *tasks(out, write, "y", "z")]
    with pytest.raises(StageError, match=r"s task d: its worker died 3 times \("):
        StageRun(Runner(out), "s", "1").run("s", mixed)
    assert out.names(".txt") == ["y.txt", "z.txt"]
    assert Path(out.url, "d.attempts").read_text() == "xxx"
    (failed,) = [e for e in logs.read(out, logs.DRIVER) if e["event"] == "task failed"]
    assert failed["task"] == "d"


def test_a_lost_counter_costs_the_bar_and_nothing_else(
    out: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    started = fanout.start_counter

    def dead(module: Any) -> Any:
        counter = started(module)
        ray.kill(counter)
        return counter

    monkeypatch.setattr(fanout, "start_counter", dead)
    runner = Runner(out, show_progress=True)
    found = StageRun(runner, "s", "1").run("s", tasks(out, write, "a", "b"), total=6)
    assert [f["name"] for f in found] == ["a", "b"]


class FewerNodes:
    """Ray, as a driver sees it after the nodes that it had counted on are gone."""

    def __init__(self, ray: Any, nodes: list[dict[str, Any]]) -> None:
        self._ray = ray
        self._nodes = nodes

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ray, name)


def fan_out(out: Folder, ray: Any, asked: list[dict[str, float]]) -> fanout.FanOut:
    bar = progress.progress_bar("s", None, False)
    return fanout.FanOut(ray, out, "s", "1", lambda: asked.pop(0), bar)


def test_tasks_that_no_node_can_take_any_more_request_less(
    out: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of 99 CPUs was lost while tasks for it were waiting."""
    monkeypatch.setattr(fanout, "LOOK_SECONDS", 0.1)
    ray = FewerNodes(Runner(out).ray(), [{"Alive": True, "Resources": {"CPU": 2.0}}])
    work = fan_out(out, ray, [{"num_cpus": 99}, {"num_cpus": 1}])
    assert [o.error for o in work.run(tasks(out, write, "a", "b"))] == [None, None]
    assert out.names(".txt") == ["a.txt", "b.txt"]


def test_waiting_for_a_cluster_without_nodes_has_a_time_limit(
    out: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fanout, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(fanout, "PLACE_SECONDS", 0.3)
    ray = FewerNodes(Runner(out).ray(), [{"Alive": False, "Resources": {"CPU": 99.0}}])
    work = fan_out(out, ray, [{"num_cpus": 99}] * 20)
    with pytest.raises(StageError, match=r"no node of the cluster could take a task \(cpus 99\)"):
        work.run(tasks(out, write, "a"))
    assert "s: no node of the cluster can take a task (cpus 99)" in capsys.readouterr().err


def test_on_a_cluster_without_nodes_a_task_requests_one_cpu(
    out: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FewerNodes(Runner(out).ray(), [])
    monkeypatch.setattr(Runner, "ray", lambda runner: ray)
    monkeypatch.setattr(fanout, "LOOK_SECONDS", 0.1)
    steps = StageRun(Runner(out), "s", "1", memory=1, share_node=True)
    found = steps.run("s", tasks(out, write, "a"))
    assert [f["name"] for f in found] == ["a"]


def test_logs_contain_the_node_the_arguments_and_the_outcome_of_a_task(out: Folder) -> None:
    StageRun(Runner(out), "s", "1").run("writing", tasks(out, write, "a"), total=3)
    started, finished = logs.read(out, "logs/s/a.jsonl")
    assert (started["event"], started["attempt"]) == ("started", 1)
    assert started["arguments"] == {"out": out.url, "name": "a"}
    assert started["node"]
    assert (finished["event"], finished["samples"]) == ("finished", 3)
    assert finished["figures"] == {"name": "a", "tries": 1}
    (step,) = logs.read(out, logs.DRIVER)
    assert (step["label"], step["tasks"], step["left"]) == ("writing", 1, 1)


def test_a_driver_has_the_cpus_of_its_machine() -> None:
    """Ray, which runs here, knows what it gave to tasks only."""
    from d2filter.engine import task

    assert task.assigned_cpus() == (os.cpu_count() or 1)
    assert not task.assigned_gpu()


def test_progress_shows_counts(out: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    runner = Runner(out, show_progress=True)
    StageRun(runner, "s", "1").run("reading", tasks(out, write, "a", "b"), total=6)
    assert "reading" in capsys.readouterr().err
    StageRun(Runner(out, show_progress=None), "s", "1").run("x", tasks(out, write, "d"))
    assert capsys.readouterr().err == "", "no bar away from a terminal"


def idle(report: Any) -> dict[str, Any]:
    time.sleep(3)
    return {}


def test_the_clock_of_a_bar_goes_on_while_nothing_is_done(
    out: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.1)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    runner = Runner(out, show_progress=True)
    StageRun(runner, "s", "1").run("s", [Task(name="t", run=idle, arguments={})], total=9)
    clocks = set(re.findall(r"\b\d\d:\d\d\b", shown.getvalue()))
    assert len(clocks) >= 3, shown.getvalue()


def test_a_bar_that_is_closed_prints_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.001)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    for _ in range(20):
        bar = progress.progress_bar("s", 3, True)
        time.sleep(0.003)
        bar.close()
        size = len(shown.getvalue())
        time.sleep(0.003)
        assert len(shown.getvalue()) == size


def test_a_line_beside_a_bar_is_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    bar = progress.progress_bar("s", 3, True)
    progress.tell("something happened")
    bar.close()
    assert re.search(r"(^|[\r\n])d2filter: something happened\n", shown.getvalue())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ray.exceptions.OutOfMemoryError(
                "Task was killed due to the node running low on memory.\nMemory on the node (IP: "
                "10.0.0.1, ID: 5f) where the task (task ID: 1, name=run_task) was running was "
                "30.50GB / 32.00GB (0.953), which exceeds the memory usage threshold of 0.95."
            ),
            "killed because its node ran low on memory, 30.50GB of 32.00GB were in use",
        ),
        (ray.exceptions.OutOfMemoryError("words of another version"), "ran low on memory"),
        (ray.exceptions.WorkerCrashedError(), "where memory is short the system kills processes"),
        (ray.exceptions.ActorDiedError(), "actor died"),
    ],
)
def test_the_reason_of_a_loss_is_one_line(error: Exception, said: str) -> None:
    reason = fanout.reason_of(error)
    assert said in reason
    assert "\n" not in reason


KILLED_FOR_MEMORY = """
import sys
from d2filter.formats.paths import Folder
from d2filter.engine import fanout
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Task

def work(report):
    import time
    time.sleep(60)

fanout.FIRST_PAUSE, fanout.ATTEMPTS = 0.1, 2
runner = Runner(Folder(sys.argv[1]))
try:
    StageRun(runner, "s", "1").run("s", [Task(name="t", run=work, arguments={})])
finally:
    runner.close()
"""


def test_a_worker_that_ray_kills_for_memory_is_reported_with_the_memory_figures(
    out: Folder,
) -> None:
    """In a Ray of its own, which takes a hundredth of this machine's memory for too much."""
    limit = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED_FOR_MEMORY, out.url], env={**os.environ, **limit},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    low = r"killed because its node ran low on memory, [\d.]+GB of [\d.]+GB were in use"
    first, *_, last = done.stderr.splitlines()
    assert re.fullmatch(
        rf"d2filter: s task t is tried again in 0.1 s, attempt 2 of 2: its worker died \({low}\)",
        first,
    )
    assert re.search(
        rf"s task t: its worker died 2 times \({low}\): raise --memory-per-worker", last
    )


def test_processes_are_as_many_as_cpus_and_memory_hold(
    out: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "memory": 10e9}},
        {"Alive": True, "Resources": {"CPU": 2.0, "memory": 100e9}},
        {"Alive": False, "Resources": {"CPU": 64.0, "memory": 1e12}},
        {"Alive": True, "Resources": {}},
    ]

    class Ray:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            return nodes

    monkeypatch.setattr(Runner, "ray", lambda runner: Ray)
    runner = Runner(out)
    assert runner.processes(100, 0) == 10
    assert runner.processes(3, 0) == 3
    assert runner.processes(100, 3_000_000_000) == 3 + 2
    assert runner.processes(100, 10**13) == 1
