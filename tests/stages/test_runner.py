from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from d2filter.errors import InputError, StageError
from d2filter.formats.paths import Folder
from d2filter.stages.runner import Runner, Task

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


def test_results_come_in_order_and_are_not_made_twice(out: Folder) -> None:
    runner = Runner(out)
    first = runner.map("s", tasks(out, write, "b", "a"), fingerprint="1", label="s")
    assert [f["name"] for f in first] == ["b", "a"]
    assert all(f["peak_rss_bytes"] > 1e6 for f in first)
    Path(out.url, "a.txt").unlink()
    again = runner.map("s", tasks(out, write, "b", "a", "c"), fingerprint="1", label="s")
    assert [f["name"] for f in again] == ["b", "a", "c"]
    assert not out.exists("a.txt"), "a published task ran again"
    runner.map("s", tasks(out, write, "a"), fingerprint="2", label="s")
    assert out.exists("a.txt"), "another fingerprint must run"


def test_one_failure_does_not_stop_the_others_and_is_not_retried(out: Folder) -> None:
    mixed = [*tasks(out, refuse, "x"), *tasks(out, write, "y", "z")]
    with pytest.raises(InputError, match="x is broken"):
        Runner(out).map("s", mixed, fingerprint="1", label="s")
    assert out.names(".txt") == ["y.txt", "z.txt"]
    assert Path(out.url, "x.attempts").read_text() == "x"
    assert not out.exists("completions/s/x.json")


def test_several_failures_are_all_named(out: Folder) -> None:
    mixed = [*tasks(out, refuse, "p", "q"), *tasks(out, write, "y")]
    with pytest.raises(StageError, match=r"2 tasks failed, 1 are done.*p is broken; q is broken"):
        Runner(out).map("s", mixed, fingerprint="1", label="s")


def test_a_fault_of_ours_keeps_its_traceback_in_the_logs(out: Folder) -> None:
    with pytest.raises(StageError, match=r"ZeroDivisionError: a fault of ours .traceback in"):
        Runner(out).map(
            "s", [Task(name="t", run=stumble, arguments={})], fingerprint="1", label="s"
        )
    text = Path(out.url, "logs/s-t.traceback.txt").read_text()
    assert "stumble" in text


def test_a_killed_worker_is_tried_again(out: Folder) -> None:
    task = Task(name="t", run=die_once, arguments={"out": out})
    (figures,) = Runner(out).map("s", [task], fingerprint="1", label="s")
    assert figures["survived"]


def test_progress_shows_counts(out: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    runner = Runner(out, show_progress=True)
    runner.map("s", tasks(out, write, "a", "b"), fingerprint="1", label="reading", total=6)
    assert "reading" in capsys.readouterr().err
    Runner(out, show_progress=None).map("s", tasks(out, write, "d"), fingerprint="1", label="x")
    assert capsys.readouterr().err == "", "no bar away from a terminal"


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
