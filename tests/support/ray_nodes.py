"""Nodes of a Ray cluster, as if on separate machines: started by `ray start`, used by `ray job`.

If the system allows it, each node has its own Linux namespaces: an address on a private virtual
cable, mounts, and process numbers. So it can end like a machine that loses power. Otherwise nodes
are processes of this machine, with folders and loopback addresses of their own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import faults, processes

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "d2filter", ROOT / "jobs")

_KINDS = ("--net", "--mount", "--pid", "--uts")
_UNSHARE = ("unshare", *_KINDS, "--fork", "--kill-child", "--mount-proc")
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_STORE_BYTES = 80_000_000
_START_SECONDS = 120.0


class NamespaceRights:
    """The right to make namespaces: of root, or of a user in a user namespace of its own."""

    def __init__(self) -> None:
        self._holder: subprocess.Popen[bytes] | None = None
        self.words: list[str] = []
        if os.geteuid():
            self._holder = _hold(["unshare", "--user", "--map-root-user"])
            self.words = [
                "nsenter", "-t", str(self._holder.pid), "--user", "--preserve-credentials"
            ]  # fmt: skip

    def close(self) -> None:
        """Give it up."""
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()


class Machine:
    """Namespaces for processes, held by one process that does nothing."""

    isolated = True

    def __init__(self, number: int, outside: Sequence[str]) -> None:
        self.address = f"10.77.0.{number}"
        self.name = f"node-{number}"
        self._outside = list(outside)
        self._holder = _hold([*outside, *_UNSHARE])
        self._pid = _child(self._holder.pid)
        self.run("sh", "-c", f"echo {self.name} > /proc/sys/kernel/hostname")
        # not on the cable, which goes when the other machine goes
        self.run("ip", "address", "add", f"{self.address}/32", "dev", "lo")
        self.run("ip", "link", "set", "lo", "up")

    def plug(self, other: Machine) -> None:
        """A cable to another machine."""
        link = ["ip", "link", "add", "cable", "type", "veth", "peer", "cable"]
        _run(self.on_network([*link, "netns", str(other._pid)]))
        for one, far in ((self, other), (other, self)):
            one.run("ip", "link", "set", "cable", "up")
            one.run("ip", "route", "add", far.address, "dev", "cable", "src", one.address)

    def hide(self, folder: Path) -> None:
        """Put an empty folder in place of one."""
        self.run("mount", "-t", "tmpfs", "none", folder)

    def inside(self, words: Sequence[object]) -> list[str]:
        """The command line that runs another one here."""
        return self._enter(_KINDS, words)

    def on_network(self, words: Sequence[object]) -> list[str]:
        """The same with the files of this process: a user beside the machine."""
        return self._enter(["--net"], words)

    def _enter(self, what: Sequence[str], words: Sequence[object]) -> list[str]:
        return [*self._outside, "nsenter", "-t", str(self._pid), *what, *map(str, words)]

    def run(self, *words: object) -> str:
        """Run a short command here; returns what it says. Raises CalledProcessError."""
        return _run(self.inside(words))

    def processes(self) -> list[int]:
        """All of them."""
        try:
            here = os.readlink(f"/proc/{self._pid}/ns/pid")
        except OSError:
            return []
        found = []
        for pid in processes.parents():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == here:
                    found.append(pid)
        return found

    def end(self) -> None:
        """Kill all its processes at once, like a loss of power."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._holder.wait()


class LocalMachine:
    """In place of `Machine` where namespaces are not allowed: processes of this machine."""

    isolated = False

    def __init__(self, number: int) -> None:
        self.address = f"127.0.0.{number}"
        self.name = os.uname().nodename
        self._started: list[subprocess.Popen[bytes]] = []

    def hide(self, folder: Path) -> None:
        """Nothing can be hidden here."""

    def inside(self, words: Sequence[object]) -> list[str]:
        """The command line as it is."""
        return [str(word) for word in words]

    on_network = inside

    def adopt(self, process: subprocess.Popen[bytes]) -> None:
        """Count a process, and all processes that it starts, as those of this machine."""
        self._started.append(process)

    def processes(self) -> list[int]:
        """Those that were adopted, with all that they have begun."""
        return [pid for process in self._started for pid in _below(process.pid)]

    def end(self) -> None:
        """SIGKILL to all processes."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()
        self._started.clear()


@functools.cache
def namespaces() -> bool:
    """Whether this system lets this user make all kinds that a machine needs."""
    if not all(shutil.which(name) for name in ("unshare", "nsenter", "ip", "mount")):
        return False
    outside = NamespaceRights()
    try:
        machines = [Machine(number, outside.words) for number in (1, 2)]
        machines[0].plug(machines[1])
        machines[1].hide(SOURCES[0])
        for machine in machines:
            machine.end()
    except (OSError, subprocess.CalledProcessError, TimeoutError):
        return False
    finally:
        outside.close()
    return True


class Cluster:
    """A head with a dashboard on its loopback, and a second node, one CPU each.

    Both are started in an empty folder, with a temporary folder each, without PYTHONPATH; where
    they are machines, this source tree is hidden from them, so that what they run was shipped.
    Those who know no token are turned away.
    """

    def __init__(self) -> None:
        self.isolated = namespaces()
        self._place = Path(tempfile.mkdtemp(prefix="d2f-", dir="/tmp"))  # for paths of sockets
        self._outside = NamespaceRights() if self.isolated else None
        self._port, self._dashboard, agent = (_free_port() for _ in range(3))
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        self.environment = {**kept, **token, "PATH": binaries, "RAY_USAGE_STATS_ENABLED": "0"}
        # a power loss closes no connection: Ray waits for seven minutes otherwise
        self.environment["RAY_grpc_client_keepalive_time_ms"] = "2000"
        self.environment["RAY_grpc_client_keepalive_timeout_ms"] = "3000"
        # most of the time is compiling: what this machine has compiled of these sources is shipped
        # with them, which Ray would leave out (numba knows it by their content)
        self.environment["RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"] = ".git"
        self.environment["NUMBA_OPT"] = "0"
        self.environment.pop("NUMBA_CACHE_DIR", None)
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._ship = self._place / "ship"
        for source in SOURCES:
            left_out = shutil.ignore_patterns("*.pyc", "results")
            shutil.copytree(source, self._ship / source.name, ignore=left_out)
        self._make: Any = LocalMachine
        if self._outside is not None:
            self._make = functools.partial(Machine, outside=self._outside.words)
        self._machines: dict[int, Machine | LocalMachine] = {1: self._make(1)}
        try:
            self._start(
                1, "--head", "--port", self._port,
                "--system-config", json.dumps(faults.QUICK_DEATH), "--include-dashboard", "true",
                "--dashboard-host", "127.0.0.1", "--dashboard-port", self._dashboard,
            )  # fmt: skip
            self._add(agent)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Of the head, as --address takes it."""
        return f"{self.head.address}:{self._port}"

    @property
    def head(self) -> Machine | LocalMachine:
        """Where jobs begin."""
        return self._machines[1]

    @property
    def second(self) -> Machine | LocalMachine:
        """The other node."""
        return self._machines[2]

    def revive(self) -> None:
        """A second node in place of one that was ended."""
        if not self.second.processes():
            self._add(_free_port())

    def _add(self, agent: int) -> None:
        self._machines[2] = self._make(2)
        if isinstance(self.head, Machine) and isinstance(self.second, Machine):
            self.head.plug(self.second)
        self._start(2, "--address", self.address, "--dashboard-agent-listen-port", agent)

    def _start(self, number: int, *words: object) -> None:
        machine, folder = self._machines[number], self._place / str(number)
        folder.mkdir(exist_ok=True)
        for source in SOURCES:
            machine.hide(source)
        log = folder / "start.log"
        begin = [*_RAY, "start", "--block", "--node-ip-address", machine.address, "--num-cpus", 1]
        begin += ["--object-store-memory", _STORE_BYTES, "--temp-dir", folder, *words]
        with log.open("wb") as out:
            process = subprocess.Popen(
                machine.inside(begin), stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, env=self.environment, cwd=folder,
            )  # fmt: skip
        if isinstance(machine, LocalMachine):
            machine.adopt(process)

        def started() -> bool:
            text = log.read_text(errors="replace")
            if process.poll() is not None:
                raise RuntimeError(f"node {number} does not start: {text}")
            return "Ray runtime started" in text

        processes.wait_for(started, f"the start of node {number}", _START_SECONDS)

    def submit(self, *words: object) -> subprocess.Popen[str]:
        """`ray job submit` of a command, with this source tree as it was at first; what it streams
        is in stdout.
        """
        command = [*_RAY, "job", "submit", "--address", f"http://127.0.0.1:{self._dashboard}"]
        return subprocess.Popen(
            self.head.on_network([*command, "--working-dir", self._ship, "--", *words]),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment,
            cwd=self._place,
        )  # fmt: skip

    def at_work(self, machine: Machine | LocalMachine) -> bool:
        """Whether a task runs there, or an actor."""
        return any(processes.runs_task(pid) for pid in machine.processes())

    def close(self) -> None:
        """End all."""
        for machine in self._machines.values():
            machine.end()
        if self._outside is not None:
            self._outside.close()
        shutil.rmtree(self._place, ignore_errors=True)


def _hold(words: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that ends when this one does, for then its input is closed."""
    process = subprocess.Popen(
        [*words, "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    if not process.stdout.readline():
        raise OSError(f"{' '.join(words)} is not allowed")
    return process


def _child(pid: int) -> int:
    return next(child for child, parent in processes.parents().items() if parent == pid)


def _below(pid: int) -> list[int]:
    """A process and all that it or they have begun."""
    parents = processes.parents()
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _run(words: Sequence[str]) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
