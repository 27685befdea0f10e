"""How commands end if Ray cannot start, a signal arrives, or stdout has no reader."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support import pools

KEPT = "run the same command again, it keeps what is done"

# a command whose tasks take minutes
LONG = """
import sys
from d2filter.cli import main as cli
from d2filter.formats.paths import Folder
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Task

def work(report):
    import time
    time.sleep(300)

def command(arguments):
    runner = Runner(Folder(sys.argv[1]))
    try:
        runner.ray()
        print("up", flush=True)
        tasks = [Task(name=name, run=work, arguments={}) for name in "ab"]
        StageRun(runner, "s", "1").run("s", tasks)
    finally:
        runner.close()

class Arguments:
    handler = staticmethod(command)

cli.parse = lambda words: Arguments
cli.entry()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """Ray's temporary folder: a short path, by which its processes are known."""
    folder = Path(tempfile.mkdtemp(prefix="d2f-", dir="/tmp"))
    yield folder
    for pid in processes(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """A test run under nohup, or in the background of a script, ignores these signals, and so would
    the commands that it starts. A handler is not inherited.
    """
    before = {
        number: signal.signal(number, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_IGN
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def environment(**more: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, **more}


def processes(place: Path) -> list[int]:
    """Those that were started with this folder in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"RAY_TMPDIR={place}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def start(place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LONG, str(place / "o")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=environment(RAY_TMPDIR=str(place)),
    )  # fmt: skip


def wait_for_tasks(place: Path) -> None:
    deadline = time.monotonic() + 120
    while len(list((place / "o").glob("logs/s/*.jsonl"))) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def end(job: subprocess.Popen[str], place: Path, code: int, said: str) -> None:
    _, err = job.communicate(timeout=120)
    assert job.returncode == code, err
    assert err.splitlines() == [f"d2filter: interrupted{said}; {KEPT}"]
    wait_until_gone(place)


def wait_until_gone(place: Path) -> None:
    deadline = time.monotonic() + 60  # seconds, on a machine that does much else
    while processes(place):
        assert time.monotonic() < deadline, "processes of Ray are left"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("numbers", "group", "code", "said"),
    [
        ([signal.SIGTERM], False, 143, " by SIGTERM"),
        # of a terminal that goes away, which tells all of its processes
        ([signal.SIGHUP], True, 129, " by SIGHUP"),
        # somebody who is not patient
        ([signal.SIGINT] * 5, True, 130, ""),
        ([signal.SIGINT, signal.SIGHUP, signal.SIGINT], True, 130, ""),
    ],
)
def test_a_signal_ends_a_command_in_order_and_all_of_ray(
    place: Path, numbers: Sequence[signal.Signals], group: bool, code: int, said: str
) -> None:
    job = start(place)
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    wait_for_tasks(place)
    for number in numbers:
        (os.killpg if group else os.kill)(job.pid, number)
        time.sleep(0.3)
    end(job, place, code, said)


def test_a_sigterm_while_ray_ends_leaves_nothing(place: Path) -> None:
    """Ray resets its handler before it is done: the process may be gone at once."""
    job = start(place)
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    wait_for_tasks(place)
    os.kill(job.pid, signal.SIGINT)
    while job.poll() is None:
        os.killpg(job.pid, signal.SIGTERM)
        time.sleep(0.2)
    assert job.returncode in (130, -signal.SIGTERM)
    wait_until_gone(place)


def test_a_signal_while_ray_starts_leaves_nothing(place: Path) -> None:
    job = start(place)
    deadline = time.monotonic() + 120
    while len(processes(place)) < 2:  # Ray's first one
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(job.pid, number)
        time.sleep(0.2)
    end(job, place, 130, "")


def test_a_command_that_ignores_hang_ups_goes_on(place: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        job = start(place)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert job.stdout is not None
    assert job.stdout.readline() == "up\n"
    os.kill(job.pid, signal.SIGHUP)
    time.sleep(1)
    assert job.poll() is None
    os.kill(job.pid, signal.SIGTERM)
    end(job, place, 143, " by SIGTERM")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pools.write(tmp_path_factory.mktemp("pool") / "m", pools.make(60, 4))


def run(
    pool: Path, out: Path, before: Sequence[str] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "d2filter", "graph", "--metadata-dir", pool, "--out-dir", out]
    return subprocess.run(
        [*before, *map(str, words)], env=environment(**more), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_a_temporary_folder_that_ray_cannot_use_is_named_with_the_remedy(
    pool: Path, tmp_path: Path
) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    line = refused(run(pool, tmp_path / "o", TMPDIR=str(deep)), 1)
    assert f"too long for sockets, {deep}: set RAY_TMPDIR to another folder, such as /tmp" in line
    accented = tmp_path / "Téléchargements"
    accented.mkdir()
    line = refused(run(pool, tmp_path / "o", TMPDIR=str(accented)), 1)
    assert f"{accented} has characters that are not ASCII: set RAY_TMPDIR" in line
    # the remedy is one
    done = run(pool, tmp_path / "o", TMPDIR=str(accented), RAY_TMPDIR="/tmp")
    assert done.returncode == 0, done.stderr


def test_shared_memory_that_cannot_be_written_is_named(pool: Path, tmp_path: Path) -> None:
    alone = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    mount = "mount -t tmpfs -o ro none /dev/shm"
    if subprocess.run([*alone, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system makes no namespace of mounts")
    shell = [*alone, "sh", "-c", f'{mount} && exec "$@"', "sh"]
    line = refused(run(pool, tmp_path / "o", shell), 1)
    assert "/dev/shm cannot be written" in line
    assert "mount a tmpfs" in line


@pytest.mark.parametrize("by", ["RAY_ADDRESS", "--address"])
def test_the_address_of_a_dashboard_is_none_of_a_cluster(
    pool: Path, tmp_path: Path, by: str
) -> None:
    address = "http://127.0.0.1:8265"
    if by == "RAY_ADDRESS":
        done = run(pool, tmp_path / "o", RAY_ADDRESS=address)
    else:
        config = tmp_path / "c.yaml"
        config.write_text(f"address: {address}\n")
        done = subprocess.run(
            [sys.executable, "-m", "d2filter", "graph", "--metadata-dir", pool, "--out-dir",
             tmp_path / "o", "--config", config],
            env=environment(), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    line = refused(done, 2)
    assert f"{by} is {address}: that is the dashboard's address" in line
    assert "HOST:6379" in line


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def d2filter(*words: object, **more: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "d2filter", *map(str, words)], env=environment(**more),
        capture_output=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["run", "--metadata-dir", "größe", "--out-dir", "größe"],
        ["run", "--fräction", "0.3"],
        ["größe"],
        ["status", os.fsdecode(b"\xff\xfe")],
    ],
)
def test_a_terminal_of_ascii_gets_escapes(tmp_path: Path, words: list[str]) -> None:
    done = d2filter(*words, **ASCII, TMPDIR=str(tmp_path))
    assert done.returncode == (0 if "--help" in words else done.returncode)
    assert done.returncode in (0, 1, 2), done.stderr
    assert b"Traceback" not in done.stderr
    assert b"UnicodeEncodeError" not in done.stderr
    assert (done.stdout + done.stderr).isascii()
    assert len(done.stderr.splitlines()) == (0 if "--help" in words else 1)


def test_a_reader_that_goes_away_ends_a_command_quietly() -> None:
    for words in (["run", "--help"], ["plan", "--samples", "1000000"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-m", "d2filter", *words], stdout=write, stderr=subprocess.PIPE,
            env=environment(PYTHONUNBUFFERED=""), timeout=120,
        )  # fmt: skip
        os.close(write)
        assert done.stderr == b""
        # argparse takes no notice of what it cannot print
        assert done.returncode in (128 + signal.SIGPIPE, 0 if "--help" in words else None)


def test_a_full_disk_behind_stdout_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "d2filter", "plan", "--samples", "1000000"], stdout=full,
            stderr=subprocess.PIPE, env=environment(), timeout=120,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == b"d2filter: error: No space left on device\n"
