"""Submits tasks to a Ray cluster that may lose workers and nodes, and collects their outcomes.

If a worker is killed, runs out of memory or loses its node, its task is tried again after a pause
that doubles each time. An error that the task itself raises is final, because it would occur again.
Other tasks continue in both cases. Ray's own retries are off, because they have no pause.

Tasks that need a GPU run in processes that keep their GPU and its model from task to task, see
`gpu_workers`.
"""

from __future__ import annotations

import contextlib
import heapq
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from d2filter.engine import same_code
from d2filter.engine.gpu_workers import GpuWorkers
from d2filter.engine.progress import tell
from d2filter.engine.task import Outcome, Task, execute
from d2filter.errors import StageError, StorageError
from d2filter.formats import logs
from d2filter.formats.paths import Folder
from d2filter.formats.tables import first_line

Needs = dict[str, float]
Then = Callable[[Outcome], Sequence[Task]]

ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds; all pauses before the last attempt are 15 seconds
_REPORT_SECONDS = 0.25
LOOK_SECONDS = 5.0  # between checks of the cluster
PLACE_SECONDS = 600.0  # time limit for the cluster to bring nodes back
_IN_FLIGHT = 1024  # largest number of submitted tasks: Ray slows down with many
TASKS_AHEAD = 2  # submitted tasks per task that can run, if finished tasks add urgent ones


class FanOut:
    """The tasks of one fan-out of a stage."""

    def __init__(
        self,
        ray: Any,
        folder: Folder,
        stage: str,
        fingerprint: str,
        needs: Callable[[], Needs],
        bar: Any,
        token: str = "",
    ) -> None:
        """needs: returns the resources of a task on the cluster at the moment. bar: progress bar.
        token: what a task must find in the run directory, see `shared_folder`.
        """
        self._ray = ray
        self._folder = folder
        self._stage = stage
        self._fingerprint = fingerprint
        self._needs = needs
        self._asked = needs()
        self._bar = bar
        self._token = token
        self._counter = None if bar.disable else start_counter(ray)
        same_code.by_value(ray, GpuWorkers.__module__)
        self._remote = ray.remote(same_code.run_task)
        self._gpu_workers = GpuWorkers(ray, same_code.run_task)
        self._waiting: deque[Task] = deque()
        self._later: list[tuple[float, str, Task]] = []
        self._running: dict[Any, Task] = {}
        self._attempts: Counter[str] = Counter()
        self._looked = time.monotonic()
        self._without_place: float | None = None
        self._then: Then | None = None

    def run(self, tasks: Sequence[Task], then: Then | None = None) -> list[Outcome]:
        """Run tasks; returns all outcomes in the order of arrival. then: returns the tasks that can
        start after a finished one; they run before the waiting ones. Raises StageError if the
        cluster is gone or no node can take a task.
        """
        self._waiting.extend(tasks)
        self._then = then
        outcomes: list[Outcome] = []
        try:
            while self._waiting or self._later or self._running:
                self._submit()
                outcomes += self._finished()
                self._show()
                self._look()
        except self._ray.exceptions.RayError as error:
            raise StageError(
                f"{self._stage}: the Ray cluster stopped answering ({first_line(error)}): "
                "run the same command again when it answers; finished tasks are kept"
            ) from error
        finally:
            self._gpu_workers.close()
            if self._counter is not None:
                with contextlib.suppress(self._ray.exceptions.RayError):
                    self._ray.kill(self._counter)
        return outcomes

    def _submit(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            # tried again first, because other tasks may depend on it
            self._waiting.appendleft(heapq.heappop(self._later)[2])
        on_gpu_workers = self._asked.get("num_gpus", 0) > 0
        free = self._most_in_flight() - len(self._running)
        if on_gpu_workers:
            free = self._gpu_workers.free(self._asked, len(self._waiting), more=len(self._later))
        call = self._remote.options(max_retries=0, **self._asked).remote
        for _ in range(min(free, len(self._waiting))):
            task = self._waiting.popleft()
            attempt = self._attempts[task.name] + 1
            arguments = (self._folder, self._stage, task, self._fingerprint, attempt, self._token)
            packed = self._ray.cloudpickle.dumps((execute, arguments))
            begin = self._gpu_workers.begin if on_gpu_workers else call
            self._running[begin(same_code.own().digest, packed, self._counter)] = task

    def _most_in_flight(self) -> int:
        if self._then is None:
            return _IN_FLIGHT
        # Ray starts tasks in the order of submission: submit few, so that urgent ones start soon
        cpus = self._ray.cluster_resources().get("CPU", 1)
        return max(1, min(_IN_FLIGHT, int(TASKS_AHEAD * cpus / self._asked.get("num_cpus", 1))))

    def _finished(self) -> list[Outcome]:
        if not self._running:
            time.sleep(_REPORT_SECONDS)
            return []
        running = list(self._running)
        # wait for all or for the time limit; if few are submitted, wait for one, to submit the next
        some = len(running) if self._then is None else 1
        ready, left = self._ray.wait(running, num_returns=some, timeout=_REPORT_SECONDS)
        if self._then is not None and left:
            ready += self._ray.wait(left, num_returns=len(left), timeout=0)[0]
        found = [self._outcome(reference) for reference in ready]
        outcomes = [outcome for outcome in found if outcome is not None]
        if self._then is not None:
            more = [task for outcome in outcomes for task in self._then(outcome)]
            self._waiting.extendleft(reversed(more))
        return outcomes

    def _outcome(self, reference: Any) -> Outcome | None:
        """The outcome of a task, or None if it will be tried again."""
        task = self._running.pop(reference)
        errors = self._ray.exceptions
        what = f"{self._stage} task {task.name}"
        try:
            outcome: Outcome | str = self._ray.get(reference)
            self._gpu_workers.done(reference)
            if isinstance(outcome, str):
                return Outcome(name=task.name, error=same_code.different(outcome, same_code.own()))
        except errors.RayTaskError as error:
            self._gpu_workers.done(reference)
            # the task did not start: the worker cannot import a module that the driver can
            cause = getattr(error, "cause", None) or error
            return Outcome(
                name=task.name,
                error=StageError(f"{what}: {type(cause).__name__}: {first_line(cause)}"),
            )
        except errors.RayError as error:
            self._gpu_workers.drop(reference)
            self._attempts[task.name] += 1
            tried, reason = self._attempts[task.name], reason_of(error)
            if tried >= ATTEMPTS:
                return Outcome(
                    name=task.name,
                    error=StageError(
                        f"{what}: its worker died {tried} times ({reason}): raise "
                        "--memory-per-worker, or check whether one input file crashes it, and run "
                        "the same command again"
                    ),
                )
            pause = FIRST_PAUSE * 2 ** (tried - 1)
            tell(
                f"{what} is tried again in {pause:g} s, attempt {tried + 1} of {ATTEMPTS}: "
                f"its worker died ({reason})"
            )
            self._log(
                "task tried again", task=task.name, attempt=tried + 1, pause=pause, reason=reason
            )
            heapq.heappush(self._later, (time.monotonic() + pause, task.name, task))
            return None
        return outcome

    def _show(self) -> None:
        if self._counter is None:
            return
        try:
            done = self._ray.get(self._counter.total.remote())
        except self._ray.exceptions.RayError:
            self._counter = None  # its node was lost: go on without progress
            return
        # the counter includes the samples of lost attempts
        most = self._bar.total if self._bar.total is not None else done
        self._bar.update(max(0, min(done, most) - self._bar.n))

    def _look(self) -> None:
        """If no node can take a task any more, request fewer resources, or wait for nodes to
        return.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if self._placeable():
            self._without_place = None
            return
        before, self._asked = self._asked, self._needs()
        if self._placeable():
            if self._asked != before:
                for reference, task in self._running.items():
                    if not self._gpu_workers.drop(reference):
                        self._ray.cancel(reference)
                    self._waiting.append(task)
                self._running.clear()
                self._gpu_workers.close()
            return
        if self._without_place is None:
            self._without_place = now
            tell(
                f"{self._stage}: no node of the cluster can take a task ({_named(self._asked)}), "
                f"waiting up to {PLACE_SECONDS:.0f} s for one"
            )
            self._log("waiting for a node", **self._asked)
        elif now - self._without_place > PLACE_SECONDS:
            raise StageError(
                f"{self._stage}: for {PLACE_SECONDS:.0f} s no node of the cluster could take a "
                f"task ({_named(self._asked)}): add nodes and run the same command again"
            )

    def _log(self, event: str, **more: Any) -> None:
        # a full disk must not end the other tasks
        with contextlib.suppress(OSError, StorageError):
            logs.append(self._folder, logs.DRIVER, event, stage=self._stage, **more)

    def _placeable(self) -> bool:
        wanted = {
            "CPU": self._asked.get("num_cpus", 0),
            "GPU": self._asked.get("num_gpus", 0),
            "memory": self._asked.get("memory", 0),
        }
        return any(
            node["Alive"] and all(node["Resources"].get(n, 0) >= v for n, v in wanted.items())
            for node in self._ray.nodes()
        )


def reason_of(error: BaseException) -> str:
    """Why Ray lost a worker, as one line."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "running low on memory" in text:
        found = re.search(r"was ([\d.]+ ?\w+)(?: used)? ?/ ?([\d.]+ ?\w+)", text)
        used = f", {found[1]} of {found[2]} were in use" if found else ""
        return f"killed because its node ran low on memory{used}"
    if type(error).__name__ == "WorkerCrashedError":
        return "where memory is short the system kills processes, see dmesg"
    return first_line(error)


def _named(needs: Needs) -> str:
    return ", ".join(f"{name.removeprefix('num_')} {value:g}" for name, value in needs.items())


class _Counter:
    """Actor that counts the samples that tasks report, for the progress bar."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, done: int) -> None:
        self._total += done

    def total(self) -> int:
        return self._total


def start_counter(ray: Any) -> Any:
    """Start the counter on the driver's node, so that no other lost node ends it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    place = NodeAffinitySchedulingStrategy(node_id=here, soft=True)
    return ray.remote(_Counter).options(num_cpus=0, scheduling_strategy=place).remote()
