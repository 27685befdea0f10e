"""Runs the supersteps of a ranking: Ray actors hold the partitions and exchange states.

The driver holds only counters and references; states travel from actor to actor. At intervals the
actors publish snapshots of all partitions. If an actor dies, a new one restores the snapshots of
its partitions, and the others send it all their states again. If the driver dies, the next run
starts from the last snapshots.

See docs/method.md#ranking-in-partitions.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from d2filter.engine import prometheus, same_code
from d2filter.engine.fanout import reason_of
from d2filter.engine.progress import progress_bar, tell
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Report
from d2filter.errors import D2FilterError, StageError, StorageError
from d2filter.formats import logs
from d2filter.formats.paths import Folder
from d2filter.formats.tables import first_line
from d2filter.stages.rank.partition_actor import PartitionActor, Setup

SAVE_SECONDS = 120.0  # between snapshots
RESTARTS = 10  # largest number of restarts of one actor
_LOOK_SECONDS = 5.0  # between checks of the cluster
PLACE_SECONDS = 600.0  # time limit for the cluster to start all actors


def run(*, report: Report, steps: StageRun, parts: int, setup: Setup, total: int) -> Figures:
    """Task of the driver: rank all partitions. Figures: supersteps, rounds, bytes, restarts, peak
    memory of an actor.

    Raises StageError if a partition fails too often, or if no score can become final any more.
    """
    runner, memory = steps.runner, steps.memory
    ray = runner.ray()
    crews = runner.processes(parts, memory)
    numbers = [list(range(parts))[actor_index::crews] for actor_index in range(crews)]
    bar = progress_bar("supersteps", total, runner.show_progress)
    needs = {"num_cpus": 1}
    if memory:
        needs["memory"] = min(memory, runner.resources()[2])
    driver = Driver(
        ray, numbers, needs, (steps.out, parts, setup), lambda: runner.processes(parts, memory)
    )
    try:

        def show(live: int) -> None:
            bar.update(total - live - bar.n)
            prometheus.set_share_final(1 - live / total)

        figures = driver.run(show)
    finally:
        driver.close()
        bar.close()
    return figures


def rank_single_partition(*, report: Report, out: Folder, setup: Setup) -> Figures:
    """Task: rank a graph of one partition. Figures as those of `run`."""
    actor = PartitionActor([0], out, 1, setup, same_code.own())
    step = actor.step([])
    actor.finish()
    report(actor.size())
    return {"supersteps": 1, "rounds": step.rounds, "bytes": 0, "restarts": 0}


class Driver:
    """Calls the actors, passes references between them, and replaces actors that died."""

    def __init__(
        self,
        ray: Any,
        numbers: list[list[int]],
        needs: Figures,
        arguments: tuple[Any, ...],
        places: Callable[[], int],
    ) -> None:
        """places: how many processes the cluster has room for now."""
        self._ray = ray
        self._remote = ray.remote(PartitionActor)
        self._numbers = numbers
        self._crew_of = {p: a for a, some in enumerate(numbers) for p in some}
        self._arguments = arguments
        self._actors: list[Any] = [self.start_actor(some, needs) for some in numbers]
        self._live = [1] * len(numbers)
        self._inbox: list[list[Any]] = [[] for _ in numbers]
        self._restarts = [0] * len(numbers)
        self._figures: Figures = {"rounds": 0, "bytes": 0, "peak_rss_bytes": 0}
        self._saved = time.monotonic()
        self._gather(places)

    def _gather(self, places: Callable[[], int]) -> None:
        """Wait until all actors have started. Raises StageError if the cluster has no room for
        them, because Ray would wait forever.
        """
        waiting = {actor.ping.remote(): a for a, actor in enumerate(self._actors)}
        moved: set[int] = set()
        until = time.monotonic() + PLACE_SECONDS
        while waiting:
            there, unanswered = self._ray.wait(
                list(waiting), num_returns=len(waiting), timeout=_LOOK_SECONDS
            )
            for ping in there:
                del waiting[ping]
            if unanswered and places() < len(self._actors):
                # a node was lost after the CPUs were counted: start without a CPU, like `_replace`
                for ping in unanswered:
                    a = waiting[ping]
                    if a not in moved:
                        del waiting[ping]
                        moved.add(a)
                        self._ray.kill(self._actors[a])
                        self._actors[a] = self.start_actor(self._numbers[a], {"num_cpus": 0})
                        waiting[self._actors[a].ping.remote()] = a
            elif unanswered and time.monotonic() > until:
                raise StageError(
                    f"rank: {len(self._actors)} processes are needed at once, the cluster started "
                    f"{len(self._actors) - len(unanswered)} in {PLACE_SECONDS:.0f} s: free its "
                    "CPUs and run again"
                )

    def run(self, report: Callable[[int], None]) -> Figures:
        """Run supersteps until all scores are final and written. report: called with the number of
        samples that are not final.
        """
        supersteps = 0
        written: set[int] = set()
        while len(written) < len(self._actors):
            news = self.superstep()
            supersteps += 1
            report(sum(self._live))
            if any(self._live):
                if not news:
                    raise StageError(
                        f"rank: {sum(self._live)} samples wait for one another: a bug of "
                        "d2filter, please report it with the graph"
                    )
                self._save()
                continue
            left = sorted(set(range(len(self._actors))) - written)
            written |= {a for a, done in self._call(left, "finish").items() if done}
        return {**self._figures, "supersteps": supersteps, "restarts": sum(self._restarts)}

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            # another error must not hide the one that led here
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)

    def superstep(self) -> bool:
        """One superstep of all actors that have live samples: they receive states, advance, and
        send states. Returns whether anything changed.
        """
        inbox, self._inbox = self._inbox, [[] for _ in self._actors]
        # actors without live samples need no more states
        running = {
            a: (actor, actor.step.remote(inbox[a]))
            for a, actor in enumerate(self._actors)
            if self._live[a]
        }
        news = False
        for a, (actor, reference) in running.items():
            if self._actors[a] is not actor:
                # replaced meanwhile: the new actor has not done the step of the old one
                news = True
                continue
            step = self._result(a, reference)
            if step is None:
                news = True
                continue
            news |= step.news
            self._live[a] = step.live
            self._figures["rounds"] = max(self._figures["rounds"], step.rounds)
            self._figures["bytes"] += step.bytes
            self._figures["peak_rss_bytes"] = max(self._figures["peak_rss_bytes"], step.peak)
            for peer, states in step.sent.items():
                self._inbox[self._crew_of[peer]].append(states)
        return news

    def _save(self) -> None:
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._call(range(len(self._actors)), "save")
            self._saved = time.monotonic()

    def _call(self, crews: Sequence[int], method: str) -> dict[int, Any]:
        """Call a method of some actors; returns the results, None for actors that were replaced."""
        running = {a: getattr(self._actors[a], method).remote() for a in crews}
        return {a: self._result(a, reference) for a, reference in running.items()}

    def _result(self, a: int, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, D2FilterError):
                raise error.cause from error
            if not isinstance(error.cause, errors.RayError):
                reason = f"{type(error.cause).__name__}: {first_line(error.cause)}"
                raise StageError(f"rank: {self._partitions_of(a)}: {reason}") from error
            self._replace(a, error)
        except errors.RayError as error:
            # the actor is gone, or another one that had sent states to it
            self._replace(a, error)
        return None

    def _replace(self, a: int, error: BaseException) -> None:
        """Replace all actors that died by new ones, which restore the last snapshots. The others
        send them, and this actor, all states again. If this actor lives, it sends all its states
        again too.
        """
        gone = [b for b in range(len(self._actors)) if not self._alive(b)]
        for b in {a, *gone}:
            self._restarts[b] += 1
        if self._restarts[a] > RESTARTS:
            raise StageError(
                f"rank: the worker of {self._partitions_of(a)} failed {self._restarts[a]} times: "
                f"{first_line(error)}; give the ranking more memory or more nodes"
            ) from error
        reason = reason_of(error)
        here = "; ".join(self._partitions_of(b) for b in gone or [a])
        event = f"the worker of {here} died and is started again"
        tell(f"rank: {event if gone else f'states for {here} are sent again'} ({reason})")
        event_name = "worker lost" if gone else "states lost"
        lost = {"partitions": here, "restarts": max(self._restarts[b] for b in gone or [a])}
        with contextlib.suppress(OSError, StorageError):
            logs.append(
                self._arguments[0], logs.DRIVER, event_name, stage="rank", **lost,
                reason=reason,
            )  # fmt: skip
        for b in gone:
            # without a CPU of its own: if a node was lost, there may be none
            self._actors[b] = self.start_actor(self._numbers[b], {"num_cpus": 0})
            self._live[b] = 1
        for b in {a, *gone}:
            for c, other in enumerate(self._actors):
                if c != b:
                    self._inbox[b] += [other.everything_for.remote(p) for p in self._numbers[b]]
        for c, numbers in enumerate(self._numbers):
            if c != a and a not in gone:
                self._inbox[c] += [self._actors[a].everything_for.remote(p) for p in numbers]

    def start_actor(self, numbers: list[int], needs: Figures) -> Any:
        """Start an actor for some partitions; needs: the resources that it requests from Ray."""
        made = self._remote.options(max_restarts=0, **needs)
        return made.remote(numbers, *self._arguments, same_code.own())

    def _alive(self, a: int) -> bool:
        try:
            self._ray.get(self._actors[a].ping.remote())
        except self._ray.exceptions.RayError:
            return False
        return True

    def _partitions_of(self, a: int) -> str:
        numbers = self._numbers[a]
        shown = ", ".join(str(p) for p in numbers[:4])
        more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
        return f"partition{'' if len(numbers) == 1 else 's'} {shown}{more}"
