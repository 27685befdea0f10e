"""Runs the tasks of a stage on Ray: fan-out, progress, resume, and failures that cannot be missed.

A task is a module-level function and its arguments. It writes its outputs, returns a small dict of
figures, and the runner publishes that dict as completions/<stage>/<task>.json: the marker that a
rerun looks for. Ray restarts a task whose worker died; an exception of ours is not tried again. A
task that fails does not stop the others; at the end the stage fails and names every failed task.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from d2filter.errors import D2FilterError, InputError, StageError, UsageError
from d2filter.formats.paths import Folder

Report = Callable[[int], None]

_OBJECT_STORE_BYTES = 200_000_000  # figures and counters only: samples travel through files
_CRASH_RETRIES = 3
_REPORT_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit of work: `run(report=…, **arguments)` → figures."""

    name: str
    run: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]
    fingerprint: str = ""
    """of this task alone; empty: that of the stage"""


@dataclass(slots=True)
class Runner:
    """Starts Ray at the first fan-out and stops what it started."""

    folder: Folder
    address: str = ""
    show_progress: bool | None = None
    """None: only on a terminal"""
    _owns_ray: bool = field(default=False, init=False)

    def map(
        self,
        stage: str,
        tasks: Sequence[Task],
        *,
        fingerprint: str,
        label: str,
        total: int | None = None,
        share_node: bool = False,
        on_gpu: bool = False,
        memory: int = 0,
    ) -> list[dict[str, Any]]:
        """Figures of all tasks, in their order; those that a former run published are not run.

        label: what the progress bar shows. total: samples expected, when known. share_node:
        fewer tasks than CPUs get the others' too. on_gpu:
        each task gets a GPU where the cluster has any, and else shares the node. memory: bytes that
        each task asks Ray for, so that no node starts more of them than it can hold; 0 for none.
        Raises the task's own error when all failures are the same, StageError otherwise.
        """
        results: dict[str, dict[str, Any]] = {}
        for task in tasks:
            marker = self.folder.read_json(_marker(stage, task.name))
            if marker is not None and marker["fingerprint"] == (task.fingerprint or fingerprint):
                results[task.name] = marker
        waiting = [task for task in tasks if task.name not in results]
        if waiting:
            ray = self.ray()
            gpus = 1 if on_gpu and ray.cluster_resources().get("GPU", 0) >= 1 else 0
            cpus = 1
            if (on_gpu or share_node) and not gpus:
                cpus = max(1, _largest_node(ray) // len(waiting))
            options = {"num_cpus": cpus, "num_gpus": gpus}
            if memory:
                options["memory"] = min(memory, _node_bytes(ray))
            results.update(self._fan_out(ray, stage, waiting, fingerprint, label, total, options))
        return [results[task.name] for task in tasks]

    def here(
        self, stage: str, task: Task, *, fingerprint: str, skip: bool = False
    ) -> dict[str, Any]:
        """Run one small task in this process, recorded like any other; skip: unless it was done."""
        marker = self.folder.read_json(_marker(stage, task.name)) if skip else None
        if marker is not None and marker["fingerprint"] == fingerprint:
            found: dict[str, Any] = marker
            return found
        outcome = _execute(self.folder, stage, task, fingerprint, lambda done: None)
        return _figures(self.folder, stage, [outcome])[task.name]

    def resources(self) -> tuple[int, int, int]:
        """CPUs of the largest node, number of nodes, and the least memory of a node in bytes."""
        ray = self.ray()
        alive = [node for node in ray.nodes() if node["Alive"]]
        return _largest_node(ray), len(alive), _node_bytes(ray)

    def processes(self, most: int, memory: int) -> int:
        """How many processes of one CPU can run at once, at least one and at most `most`. memory:
        bytes that each needs, 0 for unknown.
        """
        places = 0
        for node in self.ray().nodes():
            if node["Alive"]:
                cpus = int(node["Resources"].get("CPU", 0))
                there = int(node["Resources"].get("memory", 0))
                places += min(cpus, there // memory) if memory else cpus
        return max(1, min(most, places))

    def close(self) -> None:
        """Stop Ray if this runner started it."""
        if self._owns_ray:
            import ray

            ray.shutdown()
            self._owns_ray = False

    def _fan_out(
        self,
        ray: Any,
        stage: str,
        tasks: Sequence[Task],
        fingerprint: str,
        label: str,
        total: int | None,
        options: dict[str, Any],
    ) -> dict[str, dict[str, Any]]:
        remote = ray.remote(_execute_remotely).options(max_retries=_CRASH_RETRIES, **options)
        bar = progress_bar(label, total, self.show_progress)
        counter = None if bar.disable else ray.remote(_Counter).options(num_cpus=0).remote()
        names = {}
        outcomes: list[_Outcome] = []
        try:
            for task in tasks:
                reference = remote.remote(self.folder, stage, task, fingerprint, counter)
                names[reference] = task.name
            pending = list(names)
            while pending:
                ready, pending = ray.wait(pending, timeout=_REPORT_SECONDS)
                outcomes += [_fetch(ray, reference, names[reference]) for reference in ready]
                if counter is not None:
                    bar.update(ray.get(counter.total.remote()) - bar.n)
        finally:
            if counter is not None:
                ray.kill(counter)
            bar.close()
        return _figures(self.folder, stage, outcomes)

    def ray(self) -> Any:
        """The ray module, connected to the cluster, or to one started in this process."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if ray.is_initialized():
            return ray
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        # a submitted job finds its cluster in RAY_ADDRESS; else never join one by accident
        address = self.address or os.environ.get("RAY_ADDRESS", "")
        if not address:
            options.update(
                address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES
            )
        try:
            if address:
                _knock(address)
                options.update(address=address)
            ray.init(**options)
        except (OSError, ValueError, RuntimeError) as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            if not address:
                raise StageError(f"Ray does not start on this machine: {text}") from error
            raise UsageError(
                f"no Ray cluster answers at {address} (--address or RAY_ADDRESS): {text}"
            ) from error
        self._owns_ray = True
        return ray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What came of a task: figures, or what went wrong."""

    name: str
    figures: dict[str, Any] | None = None
    error: D2FilterError | None = None
    trace: str = ""


class _Counter:
    """Actor that adds up what tasks report, for the progress bar."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, done: int) -> None:
        self._total += done

    def total(self) -> int:
        return self._total


def _execute_remotely(
    folder: Folder, stage: str, task: Task, fingerprint: str, counter: Any
) -> _Outcome:
    held = 0
    last = time.monotonic()

    def report(done: int) -> None:
        nonlocal held, last
        held += done
        now = time.monotonic()
        if counter is not None and now - last > _REPORT_SECONDS / 2:
            counter.add.remote(held)
            held, last = 0, now

    outcome = _execute(folder, stage, task, fingerprint, report)
    if counter is not None and held:
        counter.add.remote(held)
    return outcome


def _execute(folder: Folder, stage: str, task: Task, fingerprint: str, report: Report) -> _Outcome:
    started = time.monotonic()
    _give_back_memory()
    reset_peak_rss()
    try:
        figures = task.run(report=report, **task.arguments)
        record = {
            "fingerprint": task.fingerprint or fingerprint,
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            **figures,
        }
        folder.publish_json(_marker(stage, task.name), record)
    except D2FilterError as error:
        return _Outcome(name=task.name, error=error)
    except OSError as error:
        # disk full, permission denied, a broken connection: the place and the system's own words
        place = f" ({error.filename})" if error.filename else ""
        reason = error.strerror or str(error) or type(error).__name__
        return _Outcome(
            name=task.name,
            error=InputError(f"{stage} task {task.name}: {reason}{place}"),
            trace=traceback.format_exc(),
        )
    except Exception as error:
        # a fault of ours: reported whole, never retried, never silent
        return _Outcome(
            name=task.name,
            error=StageError(
                f"{stage} task {task.name}: {type(error).__name__}: {error} "
                f"(traceback in {folder.where('logs')})"
            ),
            trace=traceback.format_exc(),
        )
    return _Outcome(name=task.name, figures=record)


def _fetch(ray: Any, reference: Any, name: str) -> _Outcome:
    try:
        outcome: _Outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        text = str(error).strip().splitlines()[0]
        return _Outcome(name=name, error=StageError(f"task {name}: {text}"))
    return outcome


def _figures(folder: Folder, stage: str, outcomes: Sequence[_Outcome]) -> dict[str, dict[str, Any]]:
    """Figures by task name. When any task failed: tracebacks to logs/, one line to the caller."""
    failed = sorted((o for o in outcomes if o.error is not None), key=lambda o: o.name)
    for outcome in failed:
        if outcome.trace:
            # the error itself must reach the user even when the disk that caused it is full
            with (
                contextlib.suppress(OSError),
                folder.publish(f"logs/{stage}-{outcome.name}.traceback.txt") as path,
            ):
                path.write_text(outcome.trace, "utf-8")
    if failed and failed[0].error and len({str(o.error) for o in failed}) == 1:
        raise failed[0].error  # one failure, or the same one everywhere
    if failed:
        shown = "; ".join(str(o.error) for o in failed[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise StageError(
            f"{stage}: {len(failed)} tasks failed, {len(outcomes) - len(failed)} are done and "
            f"kept: {shown}{more}"
        )
    return {o.name: o.figures for o in outcomes if o.figures is not None}


def _knock(address: str) -> None:
    """Raise OSError at once when nothing listens at host:port; Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _marker(stage: str, task: str) -> str:
    return f"completions/{stage}/{task}.json"


def progress_bar(label: str, total: int | None, show: bool | None) -> Any:
    """A bar of samples done; show: None for only on a terminal."""
    disable = None if show is None else not show
    return tqdm(
        desc=f"{label:<9}",
        total=total,
        unit=" samples",
        unit_scale=True,
        dynamic_ncols=True,
        disable=disable,
    )


def _largest_node(ray: Any) -> int:
    """CPUs of the largest node that is alive."""
    return max(1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]))


def _node_bytes(ray: Any) -> int:
    """Memory that Ray hands out on the smallest node that is alive, in bytes."""
    return min(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])


def assigned_cpus() -> int:
    """CPUs that Ray gave the running task; outside of a task those of this machine."""
    import ray

    assigned: dict[str, float] = {}
    if ray.is_initialized():
        context: Any = ray.get_runtime_context()
        assigned = context.get_assigned_resources()
    return max(1, int(assigned.get("CPU", os.cpu_count() or 1)))


def _give_back_memory() -> None:
    """What earlier tasks have freed in this process goes back to the system, where its C library
    can do that: allocators keep it, half a GB of it beside the next task.
    """
    import pyarrow

    pyarrow.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak_rss() -> None:
    """Start the peak anew: a Ray worker runs many tasks in one process."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        return  # not permitted in some containers: the peak is then that of the worker's life


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since the last reset."""
    try:
        with open("/proc/self/status") as stream:
            for line in stream:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
