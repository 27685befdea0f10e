"""How far a run is, from the files that its tasks and its driver have written.

Works while the run goes on, after it failed, and on any machine that sees the run directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from d2filter.errors import RunStateError
from d2filter.formats import lock, logs
from d2filter.formats.paths import Folder, read_jsons
from d2filter.formats.runstate import STAGES, RunState

Event = dict[str, Any]

_SHOWN = 5  # failed tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One stage."""

    stage: str
    state: str
    """done, failed, begun or waiting"""
    tasks_done: int = 0
    tasks_left: int = 0
    """of the fan-outs that were begun; later ones are not known yet"""
    step: str = ""
    """the fan-out that is under way"""
    samples: int = 0
    """that went through, of the whole stage or of the step under way"""
    seconds: float = 0.0
    failed: tuple[str, ...] = ()
    """tasks that failed in the last attempt, and why"""
    tried_again: int = 0
    """tasks whose worker died, in the last attempt"""
    retries: tuple[str, ...] = ()
    """each of them, and why"""

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A whole run."""

    out: str
    stages: tuple[StageStatus, ...]
    next: str
    """stage that the same command would continue with; empty if there is none"""
    error: str
    """what the last attempt ended with, if it failed"""
    last_sign: str
    """UTC time of the last line of the driver's log"""
    samples: dict[str, int]
    lost_shards: tuple[str, ...]
    writer: str = ""
    """the command that holds the lock of the run directory"""
    alive: bool | None = None
    """whether it runs; None if only its own machine could determine this"""


def read(folder: Folder) -> Status:
    """The status of a run directory. Raises RunStateError when it is none."""
    state = RunState(folder)
    records = {stage: state.done(stage) for stage in STAGES}
    events = logs.read(folder, logs.DRIVER)
    if not events and not any(records.values()):
        raise RunStateError(f"{folder.url} is not a run directory: no command has started there")
    planned = _last_command(events)
    shown = tuple(s for s in STAGES if records[s] is not None or s in planned)
    stages = tuple(_stage(state, stage, records[stage], events) for stage in shown)
    left = [s for s in stages if s.state != "done"]
    stats = folder.read_json("stats.json") or {}
    holder = lock.read(folder)
    return Status(
        out=folder.url,
        stages=stages,
        next=left[0].stage if left else "",
        error=_last_error(events),
        last_sign=events[-1]["time"] if events else "",
        samples=stats.get("samples", {}),
        lost_shards=tuple(stats.get("lost_shards", ())),
        writer=str(holder) if holder else "",
        alive=lock.alive_here(holder) if holder else False,
    )


def as_json(status: Status) -> dict[str, Any]:
    """For `--json`."""
    stages = [{**asdict(s), "rate": round(s.rate, 1)} for s in status.stages]
    return {**asdict(status), "stages": stages}


def lines(status: Status, now: datetime | None = None) -> list[str]:
    """For people."""
    out = [f"{'stage':<9}{'state':<9}{'tasks':>16}{'samples':>15}{'seconds':>10}{'a second':>11}"]
    for s in status.stages:
        of = f"{s.tasks_done:,} of {s.tasks_done + s.tasks_left:,}" if s.state != "waiting" else ""
        out.append(
            f"{s.stage:<9}{s.state:<9}{of:>16}"
            + (f"{s.samples:>15,}{s.seconds:>10.1f}{s.rate:>11,.0f}" if s.samples else "")
            + (f"  {s.step}" if s.step else "")
        )
    samples = status.samples
    if samples.get("read"):
        counted = (f"{count:,} {name}" for name, count in samples.items() if count)
        out.append(f"samples: {', '.join(counted)}")
    if status.lost_shards:
        out.append(f"{len(status.lost_shards)} shards could not be read whole, see stats.json")
    for s in status.stages:
        if s.tried_again:
            out.append(f"{s.stage}: {s.tried_again} times a worker died and its task was repeated")
            # the last ones tell what goes on now
            out += [f"{s.stage} tried again: {text}" for text in s.retries[-_SHOWN:]]
        out += [f"{s.stage} failed: {text}" for text in s.failed[:_SHOWN]]
        if len(s.failed) > _SHOWN:
            out.append(f"{s.stage}: and {len(s.failed) - _SHOWN} more, in {logs.DRIVER}")
    if status.error and status.next:
        out.append(f"ended with: {status.error}")
    out.append(_ending(status, now or datetime.now(timezone.utc)))
    return out


def _ending(status: Status, now: datetime) -> str:
    """The last lines: what is running, and what comes next."""
    if status.alive:
        return f"running: {status.writer}"
    if not status.next:
        return "finished"
    since = _since(status.last_sign, now)
    where = f"next: {status.next}; last line of its log {since} ago"
    if status.alive is None:
        return f"{where}, by {status.writer}. If it does not run any more, the same command goes on"
    return f"{where}. Nothing runs: the same command goes on from here"


def _stage(
    state: RunState, stage: str, record: dict[str, Any] | None, events: Sequence[Event]
) -> StageStatus:
    mine = _since_started(events, stage)
    failed = tuple(str(e["error"]) for e in mine if e["event"] == "task failed")
    retries = tuple(
        f"{e.get('task') or e.get('partitions', '')} at {e['time']}: {e.get('reason', '')}"
        for e in mine
        if e["event"] in ("task tried again", "worker lost")
    )
    again: dict[str, Any] = {"tried_again": len(retries), "retries": retries}
    marks = state.folder.sub(f"completions/{stage}")
    if record is not None:
        figures = record["stats"].get("samples", {})
        ranked = state.done("catalog") or record
        samples = figures.get("read") or ranked["stats"]["samples"].get("ranked", 0)
        done = max(1, len(marks.names(".json")))
        return StageStatus(
            stage=stage, state="done", tasks_done=done, samples=samples,
            seconds=record["seconds"], **again,
        )  # fmt: skip
    steps = [e for e in mine if e["event"] == "tasks"]
    if not mine:
        return StageStatus(stage=stage, state="waiting")
    since = mine[0]["time"]
    ended = any(e["event"] == "stage failed" for e in mine)
    if not steps:
        return StageStatus(
            stage=stage, state="failed" if ended else "begun", failed=failed, **again
        )
    # of the step under way those that finished after it began
    step = steps[-1]
    fresh = [r for r in _markers(marks) if r.get("finished", "") >= step["time"]]
    new = min(len(fresh), step["left"])
    before = sum(e["tasks"] for e in steps[:-1]) + step["tasks"] - step["left"]
    last = max((r["finished"] for r in fresh), default=since)
    return StageStatus(
        stage=stage,
        state="failed" if ended else "begun",
        tasks_done=before + new,
        tasks_left=step["left"] - new,
        step=step["label"],
        samples=sum(r.get("samples", 0) for r in fresh),
        seconds=max(_seconds(step["time"], last), 1.0) if fresh else 0.0,
        failed=failed,
        **again,
    )


def _markers(folder: Folder) -> list[dict[str, Any]]:
    records = read_jsons(folder, folder.names(".json")).values()
    return [r for r in records if isinstance(r, dict) and "finished" in r]


def _since_started(events: Sequence[Event], stage: str) -> list[Event]:
    """The events of a stage since it was last begun."""
    mine = [e for e in events if e.get("stage") == stage]
    starts = [i for i, e in enumerate(mine) if e["event"] == "stage started"]
    return mine[starts[-1] :] if starts else []


def _last_command(events: Sequence[Event]) -> Sequence[str]:
    commands = [e["stages"] for e in events if e["event"] == "run"]
    return commands[-1] if commands else ()


def _last_error(events: Sequence[Event]) -> str:
    """Of the last command, if it failed."""
    for event in reversed(events):
        if event["event"] == "run":
            return ""
        if event["event"] == "stage failed":
            return str(event["error"])
    return ""


def _seconds(begin: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def _since(stamp: str, now: datetime) -> str:
    if not stamp:
        return "a long time"
    seconds = max(0.0, (now - datetime.fromisoformat(stamp)).total_seconds())
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
