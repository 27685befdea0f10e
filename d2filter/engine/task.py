"""Runs one task in a worker: function, log, memory measurement, completion marker.

A task is a module-level function with arguments. It writes its outputs and returns a small dict of
figures. The dict is published last, as completions/<stage>/<task>.json; a rerun skips a task with
this marker.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from d2filter.engine import prometheus
from d2filter.errors import D2FilterError, StageError, StorageError
from d2filter.formats import logs
from d2filter.formats.paths import Checksums, Folder

Report = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit of work: `run(report=…, **arguments)` → figures."""

    name: str
    run: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]
    fingerprint: str = ""
    """of this task alone; empty: that of the stage"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a task: figures, or an error."""

    name: str
    figures: dict[str, Any] | None = None
    error: D2FilterError | None = None


def marker(stage: str, task: str) -> str:
    """The completion marker of a task: it contains the task's figures."""
    return f"completions/{stage}/{task}.json"


def execute(
    folder: Folder, stage: str, task: Task, fingerprint: str, report: Report, attempt: int = 1
) -> Outcome:
    """Run a task and publish its marker. Whatever it raises comes back in the outcome."""
    started = time.monotonic()
    samples = 0
    log = logs.TaskLog(folder, logs.of_task(stage, task.name))

    def count(done: int) -> None:
        nonlocal samples
        samples += done
        prometheus.count_samples(stage, done)
        report(done)

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
        # the error itself must reach the user even when the disk that caused it is full
        with contextlib.suppress(OSError, StorageError):
            whole = {} if error is failure else {"traceback": traceback.format_exc()}
            log.line("failed", error=str(failure), **whole)
            log.close()
        return Outcome(name=task.name, error=failure)
    return Outcome(name=task.name, figures=record)


def checksums_of(figures: Sequence[dict[str, Any]]) -> Checksums:
    """The checksums of the files that some tasks have published."""
    return {name: digest for one in figures for name, digest in one.get("checksums", {}).items()}


def in_one_line(error: Exception, what: str, log: str) -> D2FilterError:
    """One line for anything that a task can raise. log: where its traceback is, if anywhere."""
    if isinstance(error, D2FilterError):
        return error
    if isinstance(error, OSError):
        # the place and the system's own words
        place = f" ({error.filename})" if error.filename else ""
        reason = error.strerror or str(error) or type(error).__name__
        return StorageError(f"{what}: {reason}{place}")
    # a fault of ours: reported whole, never retried, never silent
    text = (str(error).strip() or "no message").splitlines()[0]
    where = f" (traceback in {log})" if log else ""
    return StageError(f"{what}: {type(error).__name__}: {text}{where}")


def assigned_cpus() -> int:
    """CPUs that Ray gave the running task; outside of a task those of this machine."""
    return max(1, int(_assigned().get("CPU", os.cpu_count() or 1)))


def assigned_gpu() -> bool:
    """Whether Ray gave the running task a GPU."""
    return _assigned().get("GPU", 0) > 0


def _assigned() -> dict[str, float]:
    """What Ray gave the running task; nothing outside of a task."""
    import ray

    if not ray.is_initialized():
        return {}
    context: Any = ray.get_runtime_context()
    try:
        assigned: dict[str, float] = context.get_assigned_resources()
    except AssertionError:  # what Ray says to a driver
        return {}
    return assigned


def _give_back_memory() -> None:
    """Return memory that earlier tasks have freed to the system, if the C library can. Allocators
    keep up to half a GB of it, beside the next task's own.
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
