"""Processes that keep one GPU from task to task, so that a model is loaded once per process.

Ray's own workers may get another GPU for each task, but a process that has used one GPU cannot
change to another. Ending the process after each task would load the model for every task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from d2filter.errors import StageError
from d2filter.formats.tables import first_line

_MAX_STARTING = (
    64  # largest number of requested processes; an autoscaler adds nodes for the pending ones
)
_MAX_FAILED_STARTS = 5  # give up after so many processes in a row that end as they start


class GpuWorkers:
    """Processes for the tasks of one fan-out. A task is given only to a process that has started,
    so that no task waits for a GPU while others are free.
    """

    def __init__(self, ray: Any, work: Callable[..., Any]) -> None:
        """work: function that a process calls with the arguments of `begin`. ray: the module."""
        self._ray = ray
        self._work = work
        self._coming: dict[Any, Any] = {}
        self._free: list[Any] = []
        self._busy: dict[Any, Any] = {}
        self._stillborn = 0

    def free(self, needs: dict[str, float], waiting: int, more: int = 0) -> int:
        """Number of processes that can take a task now. Requests more processes while tasks wait,
        and ends those that no task will need. needs: resources of a process. waiting: number of
        waiting tasks. more: number of tasks that will wait soon.

        Raises StageError if processes end as soon as they start.
        """
        if self._coming:
            ready, _ = self._ray.wait(list(self._coming), num_returns=len(self._coming), timeout=0)
            for ping in ready:
                self._arrived(ping, self._coming.pop(ping))
        made = self._ray.remote(_GpuWorker).options(max_restarts=0, **needs)
        while len(self._coming) < min(waiting - len(self._free), _MAX_STARTING):
            worker = made.remote(self._work)
            self._coming[worker.ping.remote()] = worker
        for ping in list(self._coming)[max(0, waiting + more - len(self._free)) :]:
            self._end(self._coming.pop(ping))
        while len(self._free) > waiting + more:
            self._end(self._free.pop())
        return len(self._free)

    def begin(self, *arguments: Any) -> Any:
        """Give a task to a free process; returns the reference to its result."""
        worker = self._free.pop()
        reference = worker.work.remote(*arguments)
        self._busy[reference] = worker
        return reference

    def done(self, reference: Any) -> None:
        """Mark the process of this result as free. References of other tasks are ignored."""
        if reference in self._busy:
            self._free.append(self._busy.pop(reference))

    def drop(self, reference: Any) -> bool:
        """End the process of this result; returns whether it has one."""
        worker = self._busy.pop(reference, None)
        if worker is not None:
            self._end(worker)
        return worker is not None

    def close(self) -> None:
        """End all processes."""
        for worker in (*self._coming.values(), *self._free, *self._busy.values()):
            self._end(worker)
        self._coming, self._free, self._busy = {}, [], {}

    def _arrived(self, ping: Any, worker: Any) -> None:
        try:
            self._ray.get(ping)
        except self._ray.exceptions.RayError as error:
            self._end(worker)
            self._stillborn += 1
            if self._stillborn >= _MAX_FAILED_STARTS:
                raise StageError(
                    f"GPU processes end right after their start ({first_line(error)}): see "
                    "Ray's logs on the GPU nodes"
                ) from error
            return
        self._stillborn = 0
        self._free.append(worker)

    def _end(self, worker: Any) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(worker)


class _GpuWorker:
    """A Ray actor with a GPU."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work

    def ping(self) -> None:
        """Return when the process has started."""

    def work(self, *arguments: Any) -> Any:
        """Run a task."""
        return self._work(*arguments)
