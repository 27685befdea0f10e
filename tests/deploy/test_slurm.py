"""The Slurm script, with stand-ins for `srun` and `scontrol` that act on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/slurm/d2filter.sbatch"
SCRIPTS = Path(sysconfig.get_path("scripts"))

# one process a task, which a signal to srun reaches, as with Slurm's own
SRUN = """#!/bin/bash
tasks=1
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    echo "$1" >> "$STAND_IN/srun.$$"
    shift
done
echo "$*" >> "$STAND_IN/srun.$$"
for ((i = 0; i < tasks; i++)); do "$@" & pids+=($!); done
trap 'kill "${pids[@]}" 2>/dev/null' TERM
code=0
for pid in "${pids[@]}" "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""

SCONTROL = """#!/bin/bash
[[ $1 == show && $2 == hostnames ]] || exit 1
echo "$3" | tr , '\\n'
"""

# a head listens, other nodes join it, until they are ended
RAY = """#!{python}
import os, signal, socket, sys, time
there = os.environ["STAND_IN"]
if os.path.exists(f"{{there}}/no-head"):
    sys.exit("ray: no")
options = dict(w[2:].split("=", 1) for w in sys.argv[2:] if "=" in w)
if "--head" in sys.argv:
    sock = socket.create_server((options["node-ip-address"], int(options["port"])))
open(f"{{there}}/node.{{os.getpid()}}", "w").write(os.environ["RAY_AUTH_TOKEN"])
def end(*_):
    os.remove(f"{{there}}/node.{{os.getpid()}}")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
while True:
    time.sleep(60)
"""

RAY_MODULE = """
import os
def init(**options): pass
def nodes():
    return [{"Alive": True} for name in os.listdir(os.environ["STAND_IN"]) if "node." in name]
"""

RUN = """
import json, os, sys, time
there = os.environ["STAND_IN"]
told = {"words": sys.argv[1:], "address": os.environ["RAY_ADDRESS"],
        "token": os.environ["RAY_AUTH_TOKEN"], "path": os.environ["PYTHONPATH"],
        "nodes": [open(f"{there}/{n}").read() for n in os.listdir(there) if "node." in n]}
json.dump(told, open(f"{there}/told.json", "w"))
time.sleep(60 if "wait" in sys.argv else 0)
sys.exit(3 if "bad" in sys.argv else 0)
"""

Start = Callable[..., subprocess.Popen[str]]


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose only run tells what it was started with."""
    folder = tmp_path / "clone"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs/__init__.py").touch()
    (folder / "jobs/run.py").write_text(RUN)
    return folder


@pytest.fixture
def start(tmp_path: Path, clone: Path) -> Iterator[Start]:
    """Starts the script as Slurm would on the first of some nodes; ends what a failed test left."""
    jobs: list[subprocess.Popen[str]] = []
    tools = tmp_path / "bin"
    tools.mkdir()
    executable(tools / "srun", SRUN)
    executable(tools / "scontrol", SCONTROL)

    def begin(
        *words: str, nodes: str = "n1,n2,n3", real_ray: bool = False, **extra: str
    ) -> subprocess.Popen[str]:
        if not real_ray:
            executable(tools / "ray", RAY.format(python=sys.executable))
            (clone / "ray.py").write_text(RAY_MODULE)
        count = str(len(nodes.split(",")))
        slurm = {
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_JOB_NUM_NODES": count,
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_CPUS_ON_NODE": "1",
            "D2FILTER_HEAD_IP": "127.0.0.1",
            "STAND_IN": str(tmp_path),
            "PATH": f"{tools}:{SCRIPTS}:/usr/bin:/bin",
        }
        job = subprocess.Popen(
            ["bash", SCRIPT, *words], cwd=clone, env={**os.environ, **slurm, **extra},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        jobs.append(job)
        return job

    yield begin
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def steps(folder: Path) -> list[list[str]]:
    """Words of each srun, oldest first."""
    files = sorted(folder.glob("srun.*"), key=lambda path: path.stat().st_ctime_ns)
    return [path.read_text().splitlines() for path in files]


def recorded(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "told.json").read_text()))


def temporary(folder: Path) -> Path:
    """Ray's temporary folder on each node."""
    (made, *_) = steps(folder)
    return Path(made[-1].split()[-1])


def test_shellcheck_and_bash_find_nothing() -> None:
    found = subprocess.run(
        [SCRIPTS / "shellcheck", "--shell=bash", SCRIPT], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (0, "")
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


def test_directives_stand_before_the_first_command_and_take_whole_nodes() -> None:
    lines = SCRIPT.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    found = [line.split()[1:] for line in lines[:first] if line.startswith("#SBATCH")]
    assert all(len(words) == 1 for words in found)
    options = dict(word[0].removeprefix("--").partition("=")[::2] for word in found)
    assert int(options["nodes"]) >= 2
    assert (options["ntasks-per-node"], options["exclusive"], options["mem"]) == ("1", "", "0")
    assert re.fullmatch(r"B:TERM@\d+", options["signal"])  # B: to the script, which tells the run
    assert {"requeue", "time", "output"} <= options.keys()
    assert "gpus-per-node" not in options  # refused where there are none


@pytest.mark.parametrize(("word", "code"), [("good", 0), ("bad", 3)])
def test_the_job_ends_with_the_code_of_the_run_and_no_node_stays(
    start: Start, tmp_path: Path, clone: Path, word: str, code: int
) -> None:
    job = start(word, "--set", "out-dir=/a b")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == code, output
    seen = recorded(tmp_path)
    assert seen["words"] == [word, "--set", "out-dir=/a b"]
    assert seen["path"].split(":")[0] == str(clone)
    # the run began with all nodes there, and one secret for all
    assert seen["nodes"] == [seen["token"]] * 3
    assert re.fullmatch(r"[0-9a-f]{64}", seen["token"])
    made, head, others, *after = steps(tmp_path)
    assert "--ntasks=3" in made
    assert made[-1].split()[-2:-1] == ["make-temp"]
    assert {"--nodes=1", "--nodelist=n1"} <= set(head)
    assert {"--nodes=2", "--ntasks=2", "--nodelist=n2,n3"} <= set(others)
    port = re.search(r"--port=(\d+)", head[-1])
    assert port
    assert not 10002 <= int(port[1]) <= 19999  # of Ray's workers
    assert f"--address=127.0.0.1:{port[1]}" in others[-1]
    assert seen["address"] == f"127.0.0.1:{port[1]}"
    # after a failure, logs stay
    assert [step[-1].split()[:2] for step in after] == ([["rm", "-rf"]] if code == 0 else [])
    assert list(tmp_path.glob("node.*")) == []


def test_the_words_for_nodes_are_options_of_ray_start(
    start: Start, tmp_path: Path, started_ray: Callable[[list[str]], dict[str, Any]]
) -> None:
    start("good").communicate(timeout=60)
    head, others = (started_ray(step[-1].split()[2:]) for step in steps(tmp_path)[1:3])
    assert (head["head"], others["head"]) == (True, False)
    assert (head["block"], head["num_cpus"]) == (True, 1)


@pytest.mark.parametrize("taken", ["another user's", "link"])
def test_the_temporary_folder_is_new_and_private_and_cannot_be_created_by_others_first(
    start: Start, tmp_path: Path, taken: str
) -> None:
    job = start("bad")
    output, _ = job.communicate(timeout=60)
    folder = temporary(tmp_path)
    assert re.fullmatch(r"/tmp/ray-\w{10}", str(folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert f"logs stay in {folder}" in output
    folder.rmdir()
    # somebody was there first
    other = tmp_path / "other"
    other.mkdir()
    if taken == "link":
        seize = f"ln -s {other} $1"
    elif os.geteuid() == 0:
        seize = "mkdir $1 && chown 65534 $1"
    else:
        pytest.skip("gives no folder to another user")
    executable(tmp_path / "bin/mktemp", f'#!/bin/bash\nset -- {tmp_path}/t\n{seize}\necho "$1"\n')
    for step in tmp_path.glob("srun.*"):
        step.unlink()
    job = start("good")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "is a link, or belongs to another user" in output
    assert "d2filter.sbatch: error: no temporary folder" in output
    assert len(steps(tmp_path)) == 1, "no node was started"


def test_one_node_is_enough(start: Start, tmp_path: Path) -> None:
    job = start("good", nodes="n1")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    assert len(recorded(tmp_path)["nodes"]) == 1


def test_a_signal_before_the_time_is_over_reaches_the_run_and_ends_the_nodes(
    start: Start, tmp_path: Path
) -> None:
    job = start("wait")
    deadline = time.monotonic() + 60
    while not (tmp_path / "told.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    began = time.monotonic()
    os.kill(job.pid, signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode == 143
    assert time.monotonic() - began < 20  # the run would have slept for 60
    assert list(tmp_path.glob("node.*")) == []


def test_a_head_that_does_not_start_is_an_error_at_once(start: Start, tmp_path: Path) -> None:
    (tmp_path / "no-head").touch()
    job = start("good")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "d2filter.sbatch: error: Ray did not start on n1" in output
    assert not (tmp_path / "told.json").exists()


def test_nodes_that_do_not_join_are_an_error(start: Start, tmp_path: Path, clone: Path) -> None:
    (clone / "ray.py").write_text("def init(**_): pass\ndef nodes(): return [{'Alive': True}]\n")
    executable(tmp_path / "bin/ray", RAY.format(python=sys.executable))
    job = start("good", real_ray=True, D2FILTER_WAIT="2")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "1 of 3 nodes after 2 s" in output
    assert "d2filter.sbatch: error: not all of n1 n2 n3 joined" in output
    assert list(tmp_path.glob("node.*")) == []


def test_a_job_without_a_name_or_outside_a_clone_fails_with_the_remedy(
    start: Start, clone: Path
) -> None:
    job = start()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert output.startswith("usage: sbatch")
    (clone / "jobs/run.py").unlink()
    job = start("good")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "submit from a clone" in output


REAL_RUN = """
import ray, sys
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
def where():
    import time
    time.sleep(2)
    return ray.get_runtime_context().get_node_id()
found = set(ray.get([where.options(scheduling_strategy="SPREAD").remote() for _ in range(4)]))
print(f"{len(found)} nodes worked, {ray.cluster_resources()['CPU']:g} CPUs")
sys.exit(4)
"""


@pytest.mark.nightly  # two nodes of Ray, half a minute
def test_a_real_ray_comes_up_on_two_nodes_and_goes(
    start: Start, tmp_path: Path, clone: Path
) -> None:
    (clone / "jobs/run.py").write_text(REAL_RUN)
    job = start("real", nodes="n1,n2", real_ray=True)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 4, output
    assert "2 nodes worked, 2 CPUs" in output
    folder = temporary(tmp_path)
    left = subprocess.run(["pgrep", "-f", f"{folder}/"], capture_output=True)
    assert left.returncode == 1  # found none
    assert folder.exists()  # with the logs of what failed
    shutil.rmtree(folder)
