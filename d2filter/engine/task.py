"""Runs one task in a worker: calls its function, logs, measures memory, writes the marker.

A task is a module-level function with arguments. It writes its outputs and returns a small dict of
figures. The dict is published last, as the completion marker completions/<stage>/<task>.json. A
task with a valid marker is not run again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from d2filter.engine import prometheus, shared_folder
from d2filter.errors import D2FilterError, StageError, StorageError
from d2filter.formats import logs
from d2filter.formats.paths import Folder

Report = Callable[[int], None]
Figures = dict[str, Any]
"""what a task returns, and its marker contains; JSON can hold it"""
Kind = TypeVar("Kind")

_REPORT_SECONDS = 0.125  # at least, between two reports of progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit of work: `run(report=…, **arguments)` → figures."""

    name: str
    run: Callable[..., Figures]
    arguments: dict[str, Any]
    fingerprint: str = ""
    """fingerprint of this task; empty: that of the stage"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a task: figures, or an error."""

    name: str
    figures: Figures | None = None
    error: D2FilterError | None = None


def marker(stage: str, task: str) -> str:
    """Name of the completion marker of a task. The file contains the task's figures."""
    return f"completions/{stage}/{task}.json"


def figures_as(kind: type[Kind], figures: Mapping[str, Any]) -> Kind:
    """The figures that are fields of a dataclass, as one; figures may contain others."""
    return kind(**{field.name: figures[field.name] for field in fields(kind)})  # type: ignore[arg-type]  # a dataclass


def execute(
    folder: Folder,
    stage: str,
    task: Task,
    fingerprint: str,
    attempt: int = 1,
    token: str = "",
    counter: Any = None,
) -> Outcome:
    """Run a task and publish its marker. Returns errors of the task in the outcome.

    token: content that the token file of the run directory must have, empty for any, see
    `shared_folder`. counter: Ray actor that counts samples for the progress bar, None for no bar.
    """
    blind = shared_folder.not_shared(folder, token)
    if blind is not None:
        return Outcome(name=task.name, error=blind)
    started = time.monotonic()
    samples = reported = 0
    last = started
    log = logs.TaskLog(folder, logs.of_task(stage, task.name))

    def count(done: int) -> None:
        nonlocal samples, reported, last
        samples += done
        prometheus.count_samples(stage, done)
        now = time.monotonic()
        if counter is not None and now - last > _REPORT_SECONDS:
            counter.add.remote(samples - reported)
            reported, last = samples, now

    _give_back_memory()
    reset_peak_rss()
    try:
        log.line("started", attempt=attempt, **logs.where(), arguments=logs.plain(task.arguments))
        figures = task.run(report=count, **task.arguments)
        own = {
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "samples": samples,
        }
        log.line("finished", **own, figures=logs.plain(figures))
        log.close()
        record = {
            "fingerprint": task.fingerprint or fingerprint,
            "finished": logs.now(),
            **own,
            **figures,
        }
        folder.publish_json(marker(stage, task.name), record)
    except Exception as error:
        failure = in_one_line(error, f"{stage} task {task.name}", folder.where(log.name))
        # the error must reach the user even if it was caused by a full disk
        with contextlib.suppress(OSError, StorageError):
            whole = {} if error is failure else {"traceback": traceback.format_exc()}
            log.line("failed", error=str(failure), **whole)
            log.close()
        return Outcome(name=task.name, error=failure)
    finally:
        if counter is not None and samples > reported:
            counter.add.remote(samples - reported)
    return Outcome(name=task.name, figures=record)


def in_one_line(error: Exception, what: str, log: str) -> D2FilterError:
    """Convert any error of a task to an error with a one-line message. log: file with the
    traceback; empty if there is none.
    """
    if isinstance(error, D2FilterError):
        return error
    if isinstance(error, OSError):
        # the file and the message of the operating system
        place = f" ({error.filename})" if error.filename else ""
        reason = error.strerror or str(error) or type(error).__name__
        return StorageError(f"{what}: {reason}{place}")
    # a fault of d2filter: reported, and not tried again
    text = (str(error).strip() or "no message").splitlines()[0]
    where = f" (traceback in {log})" if log else ""
    return StageError(f"{what}: {type(error).__name__}: {text}{where}")


def assigned_cpus() -> int:
    """CPUs that Ray assigned to the running task; outside of a task those of this machine."""
    return max(1, int(_assigned().get("CPU", os.cpu_count() or 1)))


def assigned_gpu() -> bool:
    """Whether Ray assigned a GPU to the running task."""
    return _assigned().get("GPU", 0) > 0


def _assigned() -> dict[str, float]:
    """Resources that Ray assigned to the running task, by name; empty outside of a task."""
    import ray

    if not ray.is_initialized():
        return {}
    context: Any = ray.get_runtime_context()
    try:
        assigned: dict[str, float] = context.get_assigned_resources()
    except AssertionError:  # Ray raises it in a driver
        return {}
    return assigned


def _give_back_memory() -> None:
    """Return memory that earlier tasks have freed to the system, if the C library can. Otherwise
    allocators keep up to half a GB of it while the next task runs.
    """
    import pyarrow

    pyarrow.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak_rss() -> None:
    """Reset the measured peak of memory, because a Ray worker runs many tasks in one process."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        return  # some containers forbid it: the peak then includes earlier tasks of the worker


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
