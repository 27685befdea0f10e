"""Kills processes of a run on purpose: several raylets and a driver on this machine.

A fault fires at a point of the run's progress, not at a time: when a number of completion markers
or snapshots are published and a process of the fault's kind is running. Processes are found in
/proc, which is fast enough to catch a task of some milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support import processes, runs

KINDS = ("worker", "raylet", "writer", "actor", "driver", "publisher")

# many small tasks, and a snapshot after every superstep, from which what was lost goes on
SMALL_TASKS = """
from d2filter.algorithm import sizes
from d2filter.stages.rank import actors
sizes.CATALOG_GROUP, sizes.CATALOG_PART, actors.SAVE_SECONDS = 1, 150_000, 0.0
"""
_ENTER = "\nfrom d2filter.cli.main import entry\nentry()\n"

_STORE_BYTES = 80_000_000
QUICK_DEATH = {  # a raylet without a pulse is given up after some seconds, not a minute
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 5,
}
_POLL_SECONDS = 0.02
_WATCH_SECONDS = 0.001  # while a victim is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One SIGKILL: worker (of a task), actor (of the ranking), raylet (of a worker node), driver;
    writer and publisher are a worker and a driver that hold a file which is not published yet.

    Or an absence: a node hangs, is given up, and goes on when the run is over.
    """

    kind: str
    after: int
    """published completion markers; snapshots of partitions where an actor is to die"""
    pick: int = 0
    """which of several victims"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """A fault that fired."""

    kind: str
    title: str
    marks: int
    snapshots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a command ended, and the faults that fired."""

    code: int
    stderr: str
    """stderr of the last driver"""
    killed: tuple[Killed, ...]

    @property
    def kinds(self) -> set[str]:
        """Kinds of process that were killed."""
        return {one.kind for one in self.killed}


def draw(seed: int, attempt: int = 0, *, marks: int, snapshots: int) -> list[Fault]:
    """The schedule of a seed: faults of two kinds that the seed gives, and perhaps another.

    attempt: another schedule of the same seed. marks, snapshots: those of an undisturbed run.
    """
    rng = np.random.default_rng([seed, attempt])
    kinds = [*kinds_of(seed), *rng.choice(KINDS, rng.integers(0, 2))]
    # the last tenth is left, or the run may be over before a victim is found
    ends = {kind: max(1, 9 * (snapshots if kind == "actor" else marks) // 10) for kind in KINDS}
    return [
        Fault(
            kind=str(kind),
            after=int(rng.integers(ends[kind])),
            pick=int(rng.integers(1 << 30)),
        )
        for kind in kinds
    ]


def kinds_of(seed: int) -> list[str]:
    """Kinds that every schedule of a seed kills; three seeds in a row have all kinds."""
    return [KINDS[(seed + turn) % len(KINDS)] for turn in (0, len(KINDS) // 2)]


class Machines:
    """A Ray cluster: a head without CPUs, to which drivers connect, and other nodes.

    Nothing in this process is connected to it, so a Ray of this process is not disturbed.
    """

    def __init__(self, nodes: int = 2, cpus: int = 1) -> None:
        """nodes: besides the head; cpus: of each."""
        # apart from other clusters: whoever starts Ray without an address would join the latest
        self._place = tempfile.mkdtemp(prefix="d2f-", dir="/tmp")  # paths of sockets must be short
        self._nodes, self._cpus = nodes, cpus
        self._absent: list[tuple[Any, list[int]]] = []
        self._start()

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        with self._apart():
            self._cluster = Cluster()
            self._cluster.add_node(
                num_cpus=0,
                object_store_memory=_STORE_BYTES,
                include_dashboard=False,
                no_monitor=True,
                include_log_monitor=False,
                _system_config=QUICK_DEATH,
            )
            self._workers = [self._add() for _ in range(self._nodes)]
            self._cluster.wait_for_nodes()

    def _add(self) -> Any:
        return self._cluster.add_node(
            wait=False,
            num_cpus=self._cpus,
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
        )

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = self._place
        try:
            yield
        finally:
            del os.environ["RAY_TMPDIR"]
            if before is not None:
                os.environ["RAY_TMPDIR"] = before

    @property
    def address(self) -> str:
        """What --address takes."""
        return str(self._cluster.address)

    def at_work(self, node: int | None = None) -> list[int]:
        """Pids of worker processes that run a task or are an actor, ascending."""
        nodes = self._workers if node is None else [self._workers[node]]
        raylets = {_pid(node, "raylet") for node in nodes}
        found = [pid for pid, parent in processes.parents().items() if parent in raylets]
        return sorted(pid for pid in found if processes.runs_task(pid))

    def kill_node(self, pick: int) -> str | None:
        """Kill the raylet of a node that runs tasks, and add a node in its place. Returns the title
        of one of its tasks; None if no node runs any.
        """
        return self._replace(pick, self._kill)

    def freeze_node(self, pick: int) -> str | None:
        """Like `kill_node`, but raylet and workers are only stopped, until `wait_until_idle`."""
        return self._replace(pick, self._halt)

    def _replace(self, pick: int, end: Callable[[Any], None]) -> str | None:
        for turn in range(self._nodes):
            number = (pick + turn) % self._nodes
            working = self.at_work(number)
            if working:
                title = processes.title_of(working[0])
                end(self._workers[number])
                with self._apart():
                    self._workers[number] = self._add()
                return title
        return None

    def _kill(self, node: Any) -> None:
        os.kill(_pid(node, "raylet"), signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def _halt(self, node: Any) -> None:
        raylet = _pid(node, "raylet")
        pids = [raylet, *(pid for pid, parent in processes.parents().items() if parent == raylet)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self._absent.append((node, pids))

    def _resume(self) -> None:
        """Those that stood still go on, until they find that they were given up."""
        absent, self._absent = self._absent, []
        for _, pids in absent:
            # workers first: they may do what they were about to
            for pid in reversed(pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        for node, pids in absent:
            processes.wait_for(
                lambda pids=pids: not any(processes.runs_task(pid) for pid in pids),
                "a lost node",
            )
            self._cluster.remove_node(node, allow_graceful=False)

    def kill_head(self) -> None:
        """Kill the head: its raylet, and the server that knows all nodes, tasks and actors."""
        for kind in ("gcs_server", "raylet"):
            os.kill(_pid(self._cluster.head_node, kind), signal.SIGKILL)

    def restart(self) -> None:
        """Start a new cluster in place of one whose head was lost."""
        self._stop()
        self._start()

    def close(self) -> None:
        """End all processes."""
        for _, pids in self._absent:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._stop()
        # agents of a dead raylet write to their logs until they notice
        for _ in range(50):
            shutil.rmtree(self._place, ignore_errors=True)
            if not os.path.exists(self._place):
                break
            time.sleep(0.1)

    def _stop(self) -> None:
        # not Cluster.shutdown: it resets what a Ray of this process uses
        for node in self._cluster.list_all_nodes():
            self._cluster.remove_node(node, allow_graceful=False)

    def wait_until_idle(self) -> None:
        """Wait until no task of a dead driver or of a lost node runs, and all nodes are there."""
        self._resume()
        processes.wait_for(lambda: not self.at_work(), "a worker")
        self._cluster.wait_for_nodes()


@dataclass(slots=True)
class Command:
    """A d2filter command in a process of its own, on a cluster, that can be killed and repeated."""

    machines: Machines
    words: Sequence[object]
    out: Path
    before: str = SMALL_TASKS
    """what the driver runs first"""
    environment: dict[str, str] = field(default_factory=dict)
    _driver: subprocess.Popen[bytes] | None = None
    _states: dict[str, int] = field(default_factory=dict)
    _snapshots: int = 0

    def start(self) -> None:
        """Start the driver, or start it again."""
        words = [*self.words, "--out-dir", self.out, "--address", self.machines.address]
        with self._stderr.open("wb") as stderr:
            self._driver = subprocess.Popen(
                [sys.executable, "-c", self.before + _ENTER, *(str(word) for word in words)],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, **self.environment},
            )

    def wait(
        self, step: Callable[[], bool] = lambda: False, *, seconds: float = 120.0
    ) -> tuple[int, str]:
        """Wait until the driver ends; returns its exit code and stderr. `step` is called meanwhile,
        again after a millisecond if it returns True. Raises TimeoutError after so many seconds
        without a new marker or snapshot. If anything is raised, the driver is killed.
        """
        assert self._driver is not None
        seen, since = self.progress(), time.monotonic()
        try:
            while self._driver.poll() is None:
                soon = step()
                now = self.progress()
                if now != seen:
                    seen, since = now, time.monotonic()
                if time.monotonic() - since > seconds:
                    raise TimeoutError(f"nothing happens after {seen}: {self._stderr.read_text()}")
                time.sleep(_WATCH_SECONDS if soon else _POLL_SECONDS)
        except BaseException:
            self.kill()
            raise
        return self._driver.returncode, self._stderr.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Of the driver."""
        assert self._driver is not None
        return self._driver.pid

    def kill(self) -> None:
        """SIGKILL to the driver."""
        assert self._driver is not None
        self._driver.kill()
        self._driver.wait()

    def progress(self) -> tuple[int, int]:
        """Number of completion markers that exist, and of snapshots so far."""
        for path in runs.files_below(self.out / "ranking-work"):
            if path.name.startswith("state-"):
                with contextlib.suppress(FileNotFoundError):
                    stamp = path.stat().st_mtime_ns
                    self._snapshots += self._states.get(path.name) != stamp
                    self._states[path.name] = stamp
        completions = self.out / "completions"
        marks = [
            p for p in runs.files_below(completions) if p.parent != completions and p.name[0] != "."
        ]
        return len(marks), self._snapshots

    def run_with_faults(self, faults: Sequence[Fault] = ()) -> RunResult:
        """Run to the end while the faults fire."""
        waiting = list(faults)
        killed: list[Killed] = []

        def strike() -> bool:
            """Whether a fault waits for a victim."""
            if not waiting:
                return False
            marks, snapshots = self.progress()
            due = [f for f in waiting if f.after <= (snapshots if f.kind == "actor" else marks)]
            for fault in due:
                title = self._strike(fault)
                if title is not None:
                    waiting.remove(fault)
                    killed.append(
                        Killed(kind=fault.kind, title=title, marks=marks, snapshots=snapshots)
                    )
                    return False
            return bool(due)

        self.start()
        code, stderr = self.wait(strike)
        return RunResult(code=code, stderr=stderr, killed=tuple(killed))

    def _strike(self, fault: Fault) -> str | None:
        """Kill a victim; returns its title, or None when there is none just now."""
        if fault.kind == "driver":
            self.kill()
            self.start()
            return "driver"
        if fault.kind == "raylet":
            return self.machines.kill_node(fault.pick)
        if fault.kind == "absence":
            return self.machines.freeze_node(fault.pick)
        if fault.kind in ("writer", "publisher") and not runs.unpublished(self.out):
            return None
        if fault.kind == "publisher":
            assert self._driver is not None
            if not _killed_while(self._writes, self._driver.pid):
                return None
            self._driver.wait()
            self.start()
            return "driver"
        wanted = {"worker": _runs_task, "actor": _is_actor, "writer": self._writes}[fault.kind]
        pids = self.machines.at_work()
        for turn in range(len(pids)):
            pid = pids[(fault.pick + turn) % len(pids)]
            title = processes.title_of(pid)
            if _killed_while(wanted, pid):
                return title
        return None

    def _writes(self, pid: int) -> bool:
        """Whether a process holds a file that is not yet published."""
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    held = os.readlink(link)
                    if "/.tmp-" in held and held.startswith(str(self.out)):
                        return True
        return False

    @property
    def _stderr(self) -> Path:
        return self.out.with_name(f"{self.out.name}.stderr")


def _killed_while(wanted: Callable[[int], bool], pid: int) -> bool:
    """Kill a process if it meets a condition. It is stopped first, so that it cannot change."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        if wanted(pid):
            os.kill(pid, signal.SIGKILL)
            return True
        os.kill(pid, signal.SIGCONT)
    return False


def _runs_task(pid: int) -> bool:
    title = processes.title_of(pid)
    return processes.works(title) and "PartitionActor" not in title


def _is_actor(pid: int) -> bool:
    return "PartitionActor" in processes.title_of(pid)


def _pid(node: Any, kind: str) -> int:
    return int(node.all_processes[kind][0].process.pid)
