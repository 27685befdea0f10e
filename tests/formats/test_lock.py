"""The lock of a run directory: at most one living owner, locally and on an object store."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pytest

from d2filter.errors import InputError, LockedError
from d2filter.formats import lock
from d2filter.formats.paths import LOCK, Folder, Owner, remove_leftovers

# a process that takes the lock, says so, and waits for its end
_HOLDER = """
import sys, time
from d2filter.formats import lock
from d2filter.formats.paths import Folder
with lock.hold(Folder(sys.argv[1]), "run", beat=0.1):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    """A run directory on this machine, and one on an object store."""
    if request.param == "local":
        yield Folder(str(tmp_path / "out"))
        return
    yield Folder(f"memory://{tmp_path.name}")
    fsspec.filesystem("memory").store.clear()


def elsewhere(folder: Folder, **more: object) -> lock.Holder:
    """An owner on another machine, according to its lock.json."""
    with lock.hold(folder, "run"):
        mine = lock.read(folder)
    assert mine is not None
    there = replace(mine, token="f" * 32, machine="another", host="node7", **more)
    folder.publish_json(LOCK, asdict(there))
    return there


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_owner_is_refused_at_once_in_one_line(folder: Folder) -> None:
    with lock.hold(folder, "run"):
        began = time.monotonic()
        with (
            pytest.raises(LockedError, match=r"in use by `d2filter run` \(process") as caught,
            lock.hold(folder, "select"),
        ):
            pytest.fail("two owners")
        assert time.monotonic() - began < 1
        assert str(os.getpid()) in str(caught.value)
        assert "\n" not in str(caught.value)
    with lock.hold(folder, "select"):
        pass
    assert lock.read(folder) is None


def test_a_killed_owner_is_replaced_at_once(tmp_path: Path, started: subprocess.Popen[str]) -> None:
    folder = Folder(str(tmp_path / "out"))
    with pytest.raises(LockedError, match=str(started.pid)), lock.hold(folder, "rank"):
        pytest.fail("two owners")
    started.kill()
    started.wait()
    with lock.hold(folder, "rank"):
        found = lock.read(folder)
        assert found is not None
        assert found.pid == os.getpid()


def test_a_reused_process_id_is_not_the_owner(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    there = elsewhere(folder)
    with lock.hold(Folder(str(tmp_path / "other")), "run"):
        mine = lock.read(Folder(str(tmp_path / "other")))
    assert mine is not None
    assert lock.alive_here(mine)
    assert lock.alive_here(replace(mine, born="1")) is False
    assert lock.alive_here(there) is None


def test_an_owner_whose_process_is_hidden_is_judged_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc may hide the processes of other users."""
    folder = Folder(str(tmp_path))
    with lock.hold(folder, "run"):
        holder = lock.read(folder)
        assert holder is not None
        monkeypatch.setattr(lock, "birth_of", lambda pid: "")
        assert lock.alive_here(holder) is None
        assert lock.alive_here(replace(holder, pid=2**22 + 1)) is False


def test_a_file_that_is_not_a_lock_is_refused_and_not_replaced(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    (tmp_path / LOCK).write_text('{"other": 1}')
    with pytest.raises(InputError, match="is not a lock"), lock.hold(folder, "run"):
        pytest.fail("it was taken")
    assert (tmp_path / LOCK).read_text() == '{"other": 1}'


def test_a_lock_that_is_away_for_a_moment_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems replace a file by removing it first."""
    folder = Folder("memory://away")
    with lock.hold(folder, "run", beat=0.1) as owned:
        found = fsspec.filesystem("memory").cat("/away/lock.json")
        fsspec.filesystem("memory").rm("/away/lock.json")
        back = threading.Timer(0.3, fsspec.filesystem("memory").pipe, ("/away/lock.json", found))
        back.start()
        owned.publish_json("a.json", 1)
        back.join()
        time.sleep(1.0)
        later = lock.read(folder)
        assert later is not None
        assert later.beat >= 1, "the heart has stopped"
    assert lock.read(folder) is None


def test_a_living_owner_on_another_machine_is_recognized_by_its_heartbeat(folder: Folder) -> None:
    there = elsewhere(folder)
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.2):
            count += 1
            folder.publish_json(LOCK, asdict(replace(there, beat=count)))

    heart = threading.Thread(target=beat)
    heart.start()
    said: list[str] = []
    try:
        with (
            pytest.raises(LockedError, match="on node7"),
            lock.hold(folder, "rank", say=said.append, stale=2.0),
        ):
            pytest.fail("two owners")
    finally:
        ended.set()
        heart.join()
    assert len(said) == 1
    assert "checking" in said[0]


def test_an_owner_without_heartbeats_on_another_machine_is_replaced(folder: Folder) -> None:
    elsewhere(folder)
    began = time.monotonic()
    with lock.hold(folder, "rank", stale=1.0) as owned:
        assert time.monotonic() - began >= 1.0
        owned.publish_json("a.json", 1)


def test_an_owner_that_was_replaced_writes_and_removes_nothing_more(folder: Folder) -> None:
    with lock.hold(folder, "run", beat=0.05) as owned:
        owned.sub("graph").publish_json("a.json", 1)
        elsewhere_lock = asdict(replace(lock.read(folder), token="f" * 32))  # type: ignore[type-var]
        folder.publish_json(LOCK, elsewhere_lock)
        for write in (
            lambda: owned.sub("graph").publish_json("b.json", 2),
            lambda: owned.publish_json("c.json", 2),
            lambda: owned.remove("graph"),
        ):
            with pytest.raises(LockedError, match="taken over"):
                write()
    assert folder.read_json("graph/a.json") == 1
    assert folder.sub("graph").names() == ["a.json"]
    assert folder.read_json(LOCK)["token"] == "f" * 32, "the lock of another is not removed"


def test_tasks_that_outlive_the_owner_write_nothing(folder: Folder) -> None:
    with lock.hold(folder, "run") as owned:
        pass
    with pytest.raises(LockedError):
        owned.publish_json("a.json", 1)


def test_the_owner_counts_its_heartbeats(folder: Folder) -> None:
    with lock.hold(folder, "run", beat=0.05):
        time.sleep(0.5)
        found = lock.read(folder)
    assert found is not None
    assert found.beat >= 2


def test_files_that_a_living_owner_writes_are_not_removed(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    dead = folder.owned_by(Owner(folder.url, "a" * 32))
    mine = folder.owned_by(Owner(folder.url, "b" * 32))
    folder.publish_json(LOCK, {"token": "b" * 32})

    def unpublished(of: Folder, name: str) -> Path:
        publication = of.publish(name)
        path = publication.__enter__()
        path.touch()
        open_ones.append(publication)
        return path

    open_ones: list[object] = []
    killed = unpublished(dead, "x/graph.parquet")
    living = unpublished(mine, "x/rank.parquet")
    beside = unpublished(folder, "x/report.html")
    forgotten = unpublished(folder, "old.html")
    os.utime(forgotten, (time.time() - 7200,) * 2)
    remove_leftovers(mine, "")
    assert [p.exists() for p in (killed, living, beside, forgotten)] == [False, True, True, False]
    remove_leftovers(mine, "", own=True)
    assert [p.exists() for p in (living, beside)] == [False, True]
