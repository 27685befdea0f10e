"""Resources of tasks (GPUs, CPUs beside a GPU, memory), and the check of the shared folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from d2filter import config
from d2filter.engine import fanout, gpu_workers, runner, shared_folder, stage_run
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Task
from d2filter.errors import StageError, UsageError
from d2filter.formats.paths import Folder
from d2filter.models import clip

# a Ray of its own, which takes two GPUs for granted: Ray only counts them
ON_GPUS = """
import json, os, signal, sys, time
from pathlib import Path
import ray
from d2filter.formats.paths import Folder
from d2filter.engine import fanout
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Task, assigned_cpus, assigned_gpu

out = Folder(sys.argv[1])
fanout.FIRST_PAUSE = 0.1
ray.init(address="local", num_cpus=5, num_gpus=2, include_dashboard=False,
         object_store_memory=80_000_000, log_to_driver=False, logging_level="ERROR")

def look(report, name):
    died = Path(out.url, "died")
    if name == "3" and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if name in ("0", "1"):
        # each waits for the other: one process could do all before the second has started
        Path(out.url, "began" + name).touch()
        end = time.monotonic() + 60
        while not Path(out.url, "began" + "10"[int(name)]).exists() and time.monotonic() < end:
            time.sleep(0.05)
    time.sleep(0.2)
    return {"process": os.getpid(), "sees": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "gpu": assigned_gpu(), "cpus": assigned_cpus()}

tasks = [Task(name=str(n), run=look, arguments={"name": str(n)}) for n in range(12)]
found = StageRun(Runner(out), "s", "1").run("x", tasks, on_gpu=True)
end = time.monotonic() + 20
while ray.available_resources().get("GPU") != 2 and time.monotonic() < end:
    time.sleep(0.1)
left = ray.available_resources().get("GPU")
Path(out.url, "said.json").write_text(json.dumps({"tasks": found, "left": left}))
"""


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("o")
    done = subprocess.run(
        [sys.executable, "-c", ON_GPUS, str(out)],
        capture_output=True, text=True, timeout=240,
        env={k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((out / "said.json").read_text())
    return {**found, "out": out}


def test_each_gpu_has_one_process_that_keeps_it_with_half_the_cpus(on_gpus: dict[str, Any]) -> None:
    tasks = on_gpus["tasks"]
    assert len(tasks) == 12
    held = {(task["process"], task["sees"]) for task in tasks}
    # two, and perhaps a third in place of the one that was killed
    assert len(held) == len({process for process, _ in held}) <= 3
    assert {task["sees"] for task in tasks} == {"0", "1"}
    assert all(task["gpu"] and task["cpus"] == 2 for task in tasks)


def test_a_killed_process_of_a_gpu_is_replaced_and_none_is_left(on_gpus: dict[str, Any]) -> None:
    assert Path(on_gpus["out"], "died").exists()
    assert Path(on_gpus["out"], "completions/s/3.json").exists()
    assert on_gpus["left"] == 2


class Cluster:
    """Ray as a driver sees it: nodes, and nothing that could run."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        self._nodes = nodes

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self._nodes]


class Asked(Exception):  # no error: what a fan-out would have asked for
    pass


def asked(
    monkeypatch: pytest.MonkeyPatch, ray: Cluster, out: Path, tasks: int = 100, **options: Any
) -> dict[str, float]:
    """What a fan-out asks for each task of a cluster."""

    def fan_out(ray: Any, folder: Any, stage: str, print_: str, needs: Any, *more: Any) -> Any:
        raise Asked(needs())

    monkeypatch.setattr(Runner, "ray", lambda self: ray)
    monkeypatch.setattr(stage_run, "FanOut", fan_out)
    device = options.pop("device", "auto")
    many = [Task(name=str(n), run=len, arguments={}) for n in range(tasks)]
    with pytest.raises(Asked) as caught:
        StageRun(Runner(Folder(str(out)), device=device), "s", "1").run("x", many, **options)
    found: dict[str, float] = caught.value.args[0]
    return found


GPUS = {"CPU": 96.0, "GPU": 8.0, "memory": 500e9}
MANY = {"CPU": 64.0, "memory": 256e9}


@pytest.mark.parametrize(
    ("nodes", "options", "needs"),
    [
        # twelve CPUs decode beside each GPU
        ((GPUS, MANY), {"on_gpu": True}, {"num_gpus": 1, "num_cpus": 12}),
        # where GPUs have fewer CPUs, or none to spare, all GPUs are used all the same
        ((GPUS, {"CPU": 4.0, "GPU": 4.0}), {"on_gpu": True}, {"num_gpus": 1, "num_cpus": 1}),
        (({"CPU": 1.0, "GPU": 2.0},), {"on_gpu": True}, {"num_gpus": 1, "num_cpus": 1}),
        ((GPUS,), {"on_gpu": True, "device": "cpu"}, {"num_gpus": 0, "num_cpus": 1}),
        # a cluster that has none yet may bring one
        ((MANY,), {"on_gpu": True, "device": "cuda"}, {"num_gpus": 1, "num_cpus": 1}),
        ((MANY,), {"on_gpu": True}, {"num_gpus": 0, "num_cpus": 1}),
        ((MANY,), {"on_gpu": True, "tasks": 16}, {"num_gpus": 0, "num_cpus": 4}),
        ((MANY,), {"tasks": 16}, {"num_gpus": 0, "num_cpus": 1}),
        # no more than its memory holds, and no CPU is idle for that
        (
            (MANY, {"CPU": 8.0, "memory": 32e9}),
            {"on_gpu": True, "memory": 8_000_000_000},
            {"num_gpus": 0, "num_cpus": 2, "memory": 8_000_000_000},
        ),
        # never more than a node has: it would wait without end
        ((MANY, {"CPU": 2.0, "memory": 4e9}), {"memory": 10**10}, {"num_cpus": 1, "memory": 4e9}),
    ],
)
def test_the_cpus_and_gpus_of_a_task_follow_from_the_nodes(
    nodes: tuple[dict[str, float], ...],
    options: dict[str, Any],
    needs: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert asked(monkeypatch, Cluster(*nodes), tmp_path, **options) == {"num_gpus": 0, **needs}


@pytest.mark.usefixtures("cluster")
def test_tasks_that_need_a_gpu_wait_for_one_until_a_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(fanout, "PLACE_SECONDS", 0.3)
    task = Task(name="t", run=len, arguments={})
    steps = StageRun(Runner(Folder(str(tmp_path)), device="cuda"), "s", "1")
    with pytest.raises(StageError, match=r"no node .* could take a task \(cpus 1, gpus 1\)"):
        steps.run("x", [task], on_gpu=True)


def test_on_this_machine_alone_they_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "ray", lambda self: Cluster(MANY))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    alone = Runner(Folder(str(tmp_path)), device="cuda")
    alone._owns_ray = True
    with pytest.raises(UsageError, match="device is cuda, and Ray finds no GPU on this machine"):
        alone.uses_gpus()
    joined = Runner(Folder(str(tmp_path)), address="head:6379", device="cuda")
    joined._owns_ray = True
    assert joined.uses_gpus()


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match="device is 'tpu', allowed are auto, cpu, cuda"):
        config.RunConfig(out_dir="o", device="tpu")


def test_a_model_is_on_the_gpu_only_where_the_task_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    made = []

    def create(*names: Any, device: str, **more: Any) -> Any:
        made.append(device)
        raise RuntimeError("enough")

    monkeypatch.setattr("open_clip.create_model_and_transforms", create)
    clip.load.cache_clear()  # other tests of this process have loaded it
    for here, on_gpu in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        with pytest.raises(Exception, match="enough"):
            clip.load(config.BUNDLED_MODEL, "", "fp32", on_gpu)
    assert made == ["cuda", "cpu", "cpu"]


def test_a_batch_too_large_for_the_gpu_fails_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def encode(self: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(clip.Clip, "encode", encode)
    model = clip.load(config.BUNDLED_MODEL, "", "fp32")
    with pytest.raises(Exception, match=r"^batch-size 512 does not fit into the memory of the GPU"):
        clip.rehearse(model, 512)


def test_a_token_of_another_run_is_not_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_folder, "PAUSES", (0.0, 0.01))
    out = Folder(str(tmp_path))
    assert shared_folder.not_shared(out, "") is None
    assert "cannot see what was written" in str(shared_folder.not_shared(out, "1234"))
    before = shared_folder.write_token(out)
    assert shared_folder.not_shared(out, before) is None
    shared_folder.write_token(out)
    assert shared_folder.not_shared(out, before) is not None
    (tmp_path / shared_folder.TOKEN_FILE).write_text("{")
    assert shared_folder.not_shared(out, before) is not None


def test_an_object_store_is_the_same_from_everywhere() -> None:
    store = Folder("memory://placement/out")
    assert shared_folder.write_token(store) == ""
    assert store.names() == []


@pytest.mark.parametrize("own", ["", "5000"])
def test_a_cluster_that_refuses_the_driver_fails_with_one_line_and_keepalives_are_set(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, str] = {"RAY_grpc_client_keepalive_time_ms": own} if own else {}

    def init(**options: Any) -> None:
        seen.update({k: v for k, v in os.environ.items() if k in runner._KEEPALIVE})
        raise ray.exceptions.AuthenticationError("InvalidAuthToken: it is missing\nsee there")

    seen: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", {**os.environ, **told})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UsageError, match=r"^no Ray cluster answers at ray://x .*InvalidAuth.*$"):
        Runner(Folder(str(tmp_path)), address="ray://x").ray()
    assert seen == {**runner._KEEPALIVE, **told}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("cluster")
def test_tasks_on_a_new_node_with_another_folder_fail_with_one_line(
    tmp_path: Path,
) -> None:
    out = Folder(str(tmp_path))
    several = Runner(out, address="a:1")
    several._owns_ray = True
    several.ray()
    several._owns_ray = False
    (tmp_path / shared_folder.TOKEN_FILE).write_text('"what another node has there"')
    many = [Task(name=name, run=done, arguments={}) for name in "ab"]
    with pytest.raises(UsageError, match="is not the same folder on all nodes"):
        StageRun(several, "s", "1").run("x", many)
    assert not out.exists("completions/s/a.json")


def done(report: Any) -> dict[str, Any]:
    return {}


def test_gpu_processes_that_never_start_are_given_up() -> None:
    class Stillborn:
        exceptions = ray.exceptions
        ended = 0

        def remote(self, *which: Any) -> Any:
            return self

        def options(self, **needs: float) -> Any:
            return self

        @property
        def ping(self) -> Any:
            return type("Ping", (), {"remote": staticmethod(object)})

        def wait(self, pings: list[Any], **how: float) -> Any:
            return pings, []

        def get(self, ping: Any) -> Any:
            raise ray.exceptions.RayActorError

        def kill(self, worker: Any) -> None:
            self.ended += 1

    cluster = Stillborn()
    some = gpu_workers.GpuWorkers(cluster, len)
    for _ in range(5):
        assert some.free({"num_gpus": 1}, 1) == 0
    with pytest.raises(StageError, match="GPU processes end right after their start"):
        some.free({"num_gpus": 1}, 1)
    assert cluster.ended == 5
