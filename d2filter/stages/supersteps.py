"""The supersteps of a ranking: an actor a partition, states between them (DESIGN §3).

The driver holds counters and references; states travel from actor to actor. A partition publishes a
snapshot of its state now and then. When an actor dies, a new one goes on from the last snapshot of
that partition alone, and the others send it all states that it has edges with once more; when the
driver dies, the next run begins with the last snapshot of each.
"""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import numpy as np

from d2filter.algorithm import merge, share
from d2filter.algorithm.supersteps import Snapshot
from d2filter.errors import StageError
from d2filter.formats import graph
from d2filter.formats.paths import Folder
from d2filter.formats.rows import read_array, read_columns, write_columns
from d2filter.stages.runner import Report, Runner, peak_rss_bytes, progress_bar

Figures = dict[str, Any]

WORK = "ranking-work"
SAMPLED = 1024  # keys of a partition that choose the splitters

_SAVE_SECONDS = 120.0  # between snapshots
_RESTARTS = 10  # of one partition
_STATE_BYTES = 17  # of one sample on its way: id, score, final


def run(
    runner: Runner,
    out: Folder,
    parts: int,
    *,
    made: Figures,
    total: int,
    memory: int,
) -> Figures:
    """Rank all partitions. Figures: supersteps, rounds, bytes, restarts, seconds, peak memory.

    made: scheme, both_ways, and low and high, the extremes of difficulty in the whole pool. Raises
    StageError when a partition fails for good, or when nothing moves any more.
    """
    started = time.monotonic()
    ray = runner.ray()
    cpus = float(ray.cluster_resources().get("CPU", 1))
    # more partitions than CPUs must all be there at once: they take turns
    options: Figures = {"num_cpus": min(1.0, int(1000 * cpus / parts) / 1000), "max_restarts": 0}
    if memory:
        options["memory"] = memory
    bar = progress_bar("rank", total, runner.show_progress)
    driver = _Driver(ray, options, (out, parts, made), parts)
    try:
        figures = driver.run(lambda live: bar.update(total - live - bar.n))
    finally:
        driver.close()
        bar.close()
    return {**figures, "seconds": round(time.monotonic() - started, 3)}


def alone(*, report: Report, out: Folder, made: Figures) -> Figures:
    """Task: rank a graph of one partition. Figures as those of `run`."""
    actor = _Actor(0, out, 1, made)
    step = actor.step()
    actor.finish()
    report(actor.size())
    return {"supersteps": 1, "rounds": step["rounds"], "bytes": 0, "restarts": 0}


class _Driver:
    """Calls the actors, carries references between them, replaces the dead."""

    def __init__(self, ray: Any, options: Figures, arguments: tuple[Any, ...], parts: int) -> None:
        self._ray = ray
        self._remote = ray.remote(_Actor).options(**options)
        self._arguments = arguments
        self._actors: list[Any] = [self._remote.remote(p, *arguments) for p in range(parts)]
        self._live: list[int] = []
        self._inbox: list[list[Any]] = [[] for _ in range(parts)]
        self._restarts = [0] * parts
        self._figures: Figures = {"rounds": 0, "bytes": 0, "peak_rss_bytes": 0}
        self._saved = time.monotonic()

    def run(self, report: Any) -> Figures:
        """Until all scores are final and written."""
        self._live = [1] * len(self._actors)
        supersteps = 0
        written: set[int] = set()
        while len(written) < len(self._actors):
            news = self._superstep()
            supersteps += 1
            report(sum(self._live))
            if any(self._live):
                if not news:
                    raise StageError(
                        f"rank: {sum(self._live)} samples wait for one another: a fault of "
                        "d2filter, please report it with the graph"
                    )
                self._save()
                continue
            for p in set(range(len(self._actors))) - written:
                if self._call(p, "finish") is not None:
                    written.add(p)
        return {**self._figures, "supersteps": supersteps, "restarts": sum(self._restarts)}

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            self._ray.kill(actor)

    def _superstep(self) -> bool:
        """States in, local fixpoint, states out. Returns whether anything happened."""
        inbox, self._inbox = self._inbox, [[] for _ in self._actors]
        # those that are done only had to be told while they were not
        running = {
            p: actor.step.remote(*inbox[p]) for p, actor in enumerate(self._actors) if self._live[p]
        }
        news = False
        for p, reference in running.items():
            step = self._result(p, reference)
            if step is None:
                news = True
                continue
            news |= bool(step["sent"]) or step["live"] < self._live[p]
            self._live[p] = step["live"]
            self._note(step)
            for peer, states in step["sent"].items():
                self._inbox[peer].append(states)
        return news

    def _save(self) -> None:
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            for p in range(len(self._actors)):
                self._call(p, "save")
            self._saved = time.monotonic()

    def _call(self, p: int, method: str) -> Any:
        """What a method of one partition returns; None when the partition had to be replaced."""
        return self._result(p, getattr(self._actors[p], method).remote())

    def _result(self, p: int, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            if not isinstance(error.cause, errors.RayError):
                raise StageError(f"rank: partition {p}: {error.cause}") from error
        except errors.RayError:
            pass  # the actor is gone, or what it was sent by another that is gone
        self._replace(p)
        return None

    def _replace(self, p: int) -> None:
        """A new actor from the last snapshot, unless the old one lives; all is sent to it again."""
        errors = self._ray.exceptions
        try:
            self._ray.get(self._actors[p].ping.remote())
        except errors.RayError as error:
            self._restarts[p] += 1
            if self._restarts[p] > _RESTARTS:
                raise StageError(
                    f"rank: partition {p} died {self._restarts[p]} times: "
                    f"{str(error).splitlines()[0]}; more partitions need less memory each"
                ) from error
            self._actors[p] = self._remote.remote(p, *self._arguments)
            self._live[p] = 1
        self._inbox[p] += [
            actor.everything_for.remote(p) for q, actor in enumerate(self._actors) if q != p
        ]

    def _note(self, step: Figures) -> None:
        self._figures["rounds"] = max(self._figures["rounds"], step["rounds"])
        self._figures["bytes"] += step["bytes"]
        self._figures["peak_rss_bytes"] = max(self._figures["peak_rss_bytes"], step["peak"])


class _Actor:
    """One partition in a process of its own."""

    def __init__(self, number: int, out: Folder, parts: int, made: Figures) -> None:
        self._number = number
        self._out = out
        self._parts = parts
        self._made = made
        self._share: share.Share | None = None
        self._rounds = 0

    def ping(self) -> None:
        """Answers while the process lives."""

    def step(self, *heard: share.States) -> Figures:
        """One superstep. Returns what is left, and references to the states for each partition."""
        import ray

        one = self._loaded()
        for states in heard:
            one.hear_states(states)
        self._rounds += one.advance()
        sent, size = {}, 0
        for peer in range(self._parts):
            if peer != self._number:
                states = one.states_for(peer)
                if states.ids.size:
                    sent[peer] = ray.put(states)
                    size += states.ids.size * _STATE_BYTES
        return {
            "live": one.live(),
            "rounds": self._rounds,
            "sent": sent,
            "bytes": size,
            "peak": peak_rss_bytes(),
        }

    def size(self) -> int:
        """Samples of this partition."""
        return self._loaded().size

    def everything_for(self, peer: int) -> share.States:
        """All states that a partition has edges with: it has forgotten them."""
        return self._loaded().states_for(peer, everything=True)

    def save(self) -> bool:
        """Publish a snapshot."""
        snapshot = self._loaded().snapshot()
        state = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
        with self._out.sub(WORK).publish(_state(self._number)) as path, path.open("wb") as stream:
            np.savez(stream, **state)
        return True

    def finish(self) -> bool:
        """Write the scores, and the keys best first."""
        one = self._loaded()
        outcome = one.outcome()
        own = merge.Keys(x=outcome.final, hi=one.rows.hi, lo=one.rows.lo)
        order = own.best_first()
        best = own.take(order)
        sampled = merge.sample(best, SAMPLED)
        work = self._out.sub(WORK)
        write_columns(
            work, f"scores-{self._number:05d}", forward=outcome.forward, final=outcome.final,
            suppressed_by=outcome.suppressed_by, order=order,
        )  # fmt: skip
        for stem, keys in (("best", best), ("sampled", sampled)):
            write_columns(work, f"{stem}-{self._number:05d}", x=keys.x, hi=keys.hi, lo=keys.lo)
        return True

    def _loaded(self) -> share.Share:
        if self._share is None:
            one = read_share(self._out, self._number)
            work = self._out.sub(WORK)
            for peer in range(self._parts):
                if peer != self._number:
                    cut = read_cut(work, peer, self._number, "source", "target", "sqdist")
                    one.hear_edges(cut["source"], cut["target"], cut["sqdist"])
            made = self._made
            one.begin(
                made["scheme"], made["low"], made["high"], self._halo(one),
                both_ways=made["both_ways"],
            )  # fmt: skip
            if work.exists(_state(self._number)):
                with work.reading(_state(self._number)) as stream:
                    one.restore(Snapshot(**np.load(stream)))
            self._share = one
        return self._share

    def _halo(self, one: share.Share) -> share.Known:
        """What is known of the samples elsewhere, by graph id: partition after partition."""
        work = self._out.sub(WORK)
        parts = []
        for peer in range(self._parts):
            start = read_array(work, f"known-{peer:05d}.start.npy")
            some = slice(int(start[self._number]), int(start[self._number + 1]))
            names = ("ids", "hi", "lo", "difficulty")
            if peer != self._number:
                parts.append(read_columns(work, f"known-{peer:05d}", *names, rows=some))
        if not parts:
            return one.describe(np.empty(0, np.int64))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if not np.array_equal(joined["ids"], one.halo()):
            raise StageError(f"partition {self._number} was told of other samples than it knows")
        return share.Known(hi=joined["hi"], lo=joined["lo"], difficulty=joined["difficulty"])


def read_rows(out: Folder, number: int) -> share.Rows:
    """One part of the graph."""
    part = graph.read_part(out.sub("graph"), graph.part_name(number))
    return share.Rows(
        hi=part.hi,
        lo=part.lo,
        difficulty=part.difficulty,
        neighbors=part.neighbors,
        sqdist=part.sqdist,
    )


def read_share(out: Folder, number: int) -> share.Share:
    """One partition, before it has heard of the others."""
    return share.Share(read_rows(out, number), graph.starts(out.sub("graph")), number)


def read_cut(work: Folder, source: int, target: int, *names: str) -> dict[str, Any]:
    """Columns of the edges that lead from one partition into another."""
    start = read_array(work, f"cut-{source:05d}.start.npy")
    some = slice(int(start[target]), int(start[target + 1]))
    return read_columns(work, f"cut-{source:05d}", *names, rows=some)


def _state(number: int) -> str:
    return f"state-{number:05d}.npz"
