"""Runs the tasks of one stage: skips finished tasks, submits the rest, adds up what they took.

If a task fails, the others continue. At the end the stage fails and names every failed task.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2filter.engine.fanout import FanOut
from d2filter.engine.progress import progress_bar
from d2filter.engine.runner import Runner
from d2filter.engine.task import Figures, Outcome, Task, execute, in_one_line, marker
from d2filter.errors import D2FilterError, StageError, StorageError
from d2filter.formats import logs
from d2filter.formats.paths import Checksums, Folder, read_jsons
from d2filter.formats.runstate import digest

TaskFunction = Callable[..., Figures]
Follow = Callable[[str, Figures], Sequence[Task]]


@dataclass(slots=True)
class Totals:
    """What the tasks of a stage took, those of earlier attempts included, and what they wrote."""

    seconds: dict[str, float] = field(default_factory=dict)
    """of the longest task of each step, by label"""
    peak_rss_bytes: int = 0
    """largest memory of a task"""
    checksums: Checksums = field(default_factory=dict)
    """of all published files of the stage"""


@dataclass(slots=True)
class StageRun:
    """The tasks of one stage in one run directory. A step is a call of `each`, `alone`, `run` or
    `in_driver`; it returns when all of its tasks are finished.
    """

    runner: Runner
    stage: str
    fingerprint: str
    """of the stage; a task whose marker has it is not run again"""
    memory: int = 0
    """bytes that each task requests, so that no node starts more tasks than it can hold; 0: none"""
    share_node: bool = False
    """whether tasks share the CPUs of a node, if there are fewer tasks than CPUs"""
    chosen: tuple[object, ...] = ()
    """choices of the stage that are part of the fingerprint of steps with a variant"""
    totals: Totals = field(default_factory=Totals)

    @property
    def out(self) -> Folder:
        """The run directory; tasks of `each` and `alone` get it as `out`."""
        return self.runner.folder

    def each(
        self,
        label: str,
        run: TaskFunction,
        arguments: Sequence[Mapping[str, Any]],
        same: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        **options: Any,
    ) -> list[Figures]:
        """Run one task for each of `arguments`; returns their figures in that order.

        same: arguments that all tasks get. name: the tasks are NAME-00000, NAME-00001 and so on;
        empty: the label. options: those of `run`.
        """
        tasks = [
            Task(
                name=f"{name or label}-{number:05d}",
                run=run,
                arguments={"out": self.out, **own, **(same or {})},
            )
            for number, own in enumerate(arguments)
        ]
        return self.run(label, tasks, **options)

    def alone(
        self,
        label: str,
        run: TaskFunction,
        arguments: Mapping[str, Any],
        *,
        name: str = "",
        **options: Any,
    ) -> Figures:
        """Run one task; returns its figures. name: of the task; empty: the label."""
        task = Task(name=name or label, run=run, arguments={"out": self.out, **arguments})
        return self.run(label, [task], **options)[0]

    def run(
        self,
        label: str,
        tasks: Sequence[Task],
        *,
        variant: object = None,
        total: int | None = None,
        on_gpu: bool = False,
        share_node: bool | None = None,
        memory: int | None = None,
        cpus: float = 1,
        then: Follow | None = None,
    ) -> list[Figures]:
        """Run tasks; returns their figures in the order of the tasks. Tasks that an earlier run has
        finished do not run again.

        label: name of the step, on the progress bar and in `totals`. variant: what tells the step
        from one with the same task names in an earlier attempt, such as the number of partitions;
        it is part of the fingerprint of the tasks. None: they have that of the stage. total:
        expected samples, if known. on_gpu: each task gets a GPU, if the runner uses GPUs, and its
        share of the CPUs; else it shares the node. share_node, memory: None for those of the stage.
        cpus: CPUs of each task, at least; less than 1 for tasks that wait for disks. then: called
        with name and figures of each finished task, in the order of arrival; returns tasks that can
        start now. They run before the waiting ones, and their figures come last, in the order in
        which `then` returned them. An error in `then` is raised when all other tasks are done.

        Raises the task's own error if all failures are the same, StageError otherwise.
        """
        fingerprint = self.fingerprint_of(label, variant)
        # one listing: a request for each marker on an object store can take as long as a stage
        there = set(self.out.sub(f"completions/{self.stage}").names(".json"))
        every = [task.name for task in tasks]
        results = self._done_before(there, tasks, fingerprint)
        broken: list[D2FilterError] = []

        def following(name: str, figures: Figures) -> list[Task]:
            try:
                more = list(then(name, figures)) if then is not None and not broken else []
            except (D2FilterError, OSError) as error:
                # the error must not stop running tasks
                broken.append(in_one_line(error, f"{self.stage}, after {name}", ""))
                self._log_failed([(name, broken[-1])])
                return []
            every.extend(task.name for task in more)
            known = self._done_before(there, more, fingerprint)
            results.update(known)
            return [
                fresh
                for task in more
                for fresh in (
                    following(task.name, known[task.name]) if task.name in known else [task]
                )
            ]

        def after(outcome: Outcome) -> list[Task]:
            return [] if outcome.figures is None else following(outcome.name, outcome.figures)

        left = [task for task in tasks if task.name not in results]
        done = [task.name for task in tasks if task.name in results]
        waiting = [fresh for name in done for fresh in following(name, results[name])] + left
        logs.append(
            self.out, logs.DRIVER, "tasks", stage=self.stage, label=label, tasks=len(tasks),
            left=len(waiting), total=total,
        )  # fmt: skip
        if waiting:
            ray = self.runner.ray()
            bar = progress_bar(label, total, self.runner.show_progress)

            needs = functools.partial(
                self.runner.needs,
                len(waiting),
                cpus=cpus,
                share_node=self.share_node if share_node is None else share_node,
                on_gpu=on_gpu,
                memory=self.memory if memory is None else memory,
            )
            try:
                outcomes = FanOut(
                    ray, self.out, self.stage, fingerprint, needs, bar, self.runner.token or ""
                ).run(waiting, after if then is not None else None)
            finally:
                bar.close()
            results.update(self._figures(outcomes))
        if broken:
            raise broken[0]
        found = [results[name] for name in every]
        self._add(label, max((figures["seconds"] for figures in found), default=0.0), found)
        return found

    def in_driver(
        self, task: Task, *, skip: bool, label: str = "", variant: object = None
    ) -> Figures:
        """Run one small task in this process, with log and marker like any other task; returns its
        figures. label: name of the step in `totals`, whose seconds then include those of the steps
        that the task itself runs; empty: its seconds are not counted. skip: do not run it if an
        earlier run has finished it.
        """
        before = self.totals.seconds.get(label, 0.0)
        fingerprint = self.fingerprint_of(label or task.name, variant)
        found = self.out.read_json(marker(self.stage, task.name)) if skip else None
        figures: Figures | None = found
        if figures is None or figures["fingerprint"] != fingerprint:
            outcome = execute(self.out, self.stage, task, fingerprint)
            figures = self._figures([outcome])[task.name]
        if label:
            self.totals.seconds[label] = before
        self._add(label, figures["seconds"], [figures])
        return figures

    def fingerprint_of(self, label: str, variant: object) -> str:
        """The fingerprint of the tasks of a step, see `run`."""
        if variant is None:
            return self.fingerprint
        return digest([self.fingerprint, *self.chosen, label, variant])

    def _add(self, label: str, seconds: float, figures: Sequence[Figures]) -> None:
        totals = self.totals
        if label:
            totals.seconds[label] = round(totals.seconds.get(label, 0.0) + seconds, 3)
        for one in figures:
            totals.peak_rss_bytes = max(totals.peak_rss_bytes, one["peak_rss_bytes"])
            totals.checksums.update(one.get("checksums", {}))

    def _done_before(
        self, there: Container[str], tasks: Sequence[Task], fingerprint: str
    ) -> dict[str, Figures]:
        """Figures of the tasks that are finished with the same fingerprint. there: names of all
        markers of the stage.
        """
        names = {f"{task.name}.json": task for task in tasks if f"{task.name}.json" in there}
        records = read_jsons(self.out.sub(f"completions/{self.stage}"), list(names))
        return {
            names[name].name: record
            for name, record in records.items()
            if record["fingerprint"] == (names[name].fingerprint or fingerprint)
        }

    def _figures(self, outcomes: Sequence[Outcome]) -> dict[str, Figures]:
        """Figures by task name. If tasks failed, logs each error and raises one line."""
        failed = sorted((o for o in outcomes if o.error is not None), key=lambda o: o.name)
        self._log_failed([(o.name, o.error) for o in failed])
        if failed and failed[0].error and len({str(o.error) for o in failed}) == 1:
            raise failed[0].error  # one failed task, or the same error in all
        if failed:
            shown = "; ".join(str(o.error) for o in failed[:3])
            more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
            raise StageError(
                f"{self.stage}: {len(failed)} tasks failed, {len(outcomes) - len(failed)} are done "
                f"and kept: {shown}{more} (all in {self.out.where(logs.DRIVER)})"
            )
        return {o.name: o.figures for o in outcomes if o.figures is not None}

    def _log_failed(self, failed: Sequence[tuple[str, Exception | None]]) -> None:
        # if the disk is full, the error must still reach the user
        with contextlib.suppress(OSError, StorageError):
            records = [
                {"stage": self.stage, "task": name, "error": str(error)} for name, error in failed
            ]
            logs.append_all(self.out, logs.DRIVER, "task failed", records)
