"""The process that holds some partitions of a ranking: a Ray actor, called by `actors`.

See docs/method.md#ranking-in-partitions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from d2filter.algorithm import by_class
from d2filter.algorithm.greedy import merge, messages, ranker, schemes
from d2filter.algorithm.greedy.supersteps import Snapshot
from d2filter.algorithm.knn import products
from d2filter.engine import same_code
from d2filter.engine.task import assigned_cpus, peak_rss_bytes
from d2filter.errors import StageError
from d2filter.formats import graph
from d2filter.formats.paths import Folder
from d2filter.formats.rows import mapped, read_array, read_columns, write_columns
from d2filter.stages.graph import by_class as graph_by_class
from d2filter.stages.rank.auto_settings import WORK, Resolved, demoted_rows

SAMPLED = 1024  # keys of a partition from which splitters are chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all partitions of a ranking have in common."""

    resolved: Resolved
    scheme: schemes.Scheme
    both_ways: bool
    """whether neighbors by either end of an edge exchange messages"""
    budgets: str
    fingerprint: str
    """of the stage"""
    low: float
    """extremes of difficulty in the whole pool"""
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an actor did in a superstep."""

    live: int
    """samples that are not final"""
    news: bool = False
    """whether anything changed"""
    rounds: int = 0
    """of the partitions, since the actor started"""
    sent: dict[int, Any]
    """references to states, by the partition that they are for"""
    bytes: int = 0
    peak: int = 0


class PartitionActor:
    """A process that holds some partitions.

    If it holds several, it maps their edges from files, so that the system can take the memory of a
    partition that does not advance at the moment.
    """

    def __init__(
        self, numbers: list[int], out: Folder, parts: int, setup: Setup, driver: same_code.Sources
    ) -> None:
        self._driver = driver
        self._numbers = numbers
        self._out = out
        self._parts = parts
        self._setup = setup
        self._shares: dict[int, ranker.RankingPartition] = {}
        self._rounds = 0

    def ping(self) -> None:
        """Return while the process lives."""

    def step(self, heard: list[Any]) -> Step:
        """One superstep. heard: references to states of other processes. They are fetched one by
        one, because all of them need not fit into the object store.
        """
        import ray

        first = not self._shares
        partitions = self._loaded()
        for reference in heard:
            number, states = ray.get(reference)
            partitions[number].receive_states(states)
            del states
        news = first
        # without states of the others, samples with edges to them could only wait
        if not first or self._parts == 1:
            self._rounds += 1
            for one in partitions.values():
                news |= one.advance() > 0
        for one in partitions.values():
            for peer, other in partitions.items():
                if other is not one:
                    states = one.states_for(peer)
                    other.receive_states(states)
                    news |= states.ids.size > 0
        sent, size = {}, 0
        for peer in range(self._parts):
            if peer not in partitions:
                states = ranker.joined([one.states_for(peer) for one in partitions.values()])
                if states.ids.size:
                    sent[peer] = ray.put((peer, states))
                    size += states.nbytes
        return Step(
            live=sum(one.live() for one in partitions.values()),
            news=news or bool(sent),
            rounds=self._rounds,
            sent=sent,
            bytes=size,
            peak=peak_rss_bytes(),
        )

    def size(self) -> int:
        """Number of samples in these partitions."""
        return sum(one.size for one in self._loaded().values())

    def everything_for(self, peer: int) -> tuple[int, ranker.States]:
        """All states that partition `peer` needs from this actor, after it was restarted."""
        partitions = self._loaded().values()
        return peer, ranker.joined([one.states_for(peer, everything=True) for one in partitions])

    def save(self) -> bool:
        """Publish a snapshot of each partition."""
        work = self._out.sub(WORK)
        for number, one in self._loaded().items():
            snapshot = one.snapshot()
            state = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
            with work.publish(self._state(number)) as path, path.open("wb") as stream:
                np.savez(stream, **state)
        return True

    def finish(self) -> bool:
        """Write the scores, and the keys best first."""
        work = self._out.sub(WORK)
        for number, one in self._loaded().items():
            if one.live():
                raise StageError(
                    f"rank: {one.live()} scores of partition {number} are not final: a fault of "
                    "d2filter, please report it"
                )
            outcome = one.outcome()
            # rows ascend by uid, so a stable sort is (x descending, uid ascending)
            order = np.argsort(~outcome.final, kind="stable")
            sooner = outcome.final
            if graph.has_groups(self._out.sub("graph")):
                sooner = self._turns(number, order, outcome)
                order = np.argsort(~sooner, kind="stable")
            uid = graph.read_columns(self._out.sub("graph"), number, "uid_hi", "uid_lo")
            best = merge.Keys(x=sooner[order], hi=uid["uid_hi"][order], lo=uid["uid_lo"][order])
            write_columns(
                work, f"scores-{number:05d}", forward=outcome.forward, final=outcome.final,
                suppressed_by=outcome.suppressed_by, order=order,
            )  # fmt: skip
            for stem, keys in (("best", best), ("sampled", merge.sample(best, SAMPLED))):
                write_columns(work, f"{stem}-{number:05d}", x=keys.x, hi=keys.hi, lo=keys.lo)
        return True

    def _turns(self, number: int, order: Any, outcome: ranker.Outcome) -> Any:
        """Sort keys of a graph with classes (`by_class.turns`); a partition has whole classes."""
        group = graph.read_columns(self._out.sub("graph"), number, "group")["group"]
        # only demoted samples have this forward score
        is_demoted = outcome.forward == messages.FLOOR
        phase = by_class.phases(graph_by_class.class_sizes(self._out))
        return by_class.turns(order, group, is_demoted, self._setup.budgets, phase)

    def _loaded(self) -> dict[int, ranker.RankingPartition]:
        if not self._shares:
            same_code.require_same(self._driver)
            products.use_threads(assigned_cpus())
            # all partitions or none: after an error while loading, the next call loads them again
            self._shares = {number: self._load(number) for number in self._numbers}
        return self._shares

    def _load(self, number: int) -> ranker.RankingPartition:
        one = read_partition(self._out, number, self._setup.resolved)
        work = self._out.sub(WORK)
        for peer in range(self._parts):
            if peer != number:
                cut = read_cut(work, peer, number, "source", "target", "sqdist")
                one.add_edges(cut["source"], cut["target"], cut["sqdist"])
        setup = self._setup
        one.start_ranking(
            setup.scheme, setup.low, setup.high, self._known(one, number),
            both_ways=setup.both_ways,
            keep=mapped if len(self._numbers) > 1 else lambda array: array,
        )  # fmt: skip
        if work.exists(self._state(number)):
            with work.reading(self._state(number)) as stream:
                one.restore(Snapshot(**np.load(stream)))
        return one

    def _state(self, number: int) -> str:
        """The file of a snapshot. Its name contains the fingerprint, because an actor of an
        abandoned run may still write.
        """
        return f"state-{self._setup.fingerprint[:16]}-{number:05d}.npz"

    def _known(self, one: ranker.RankingPartition, number: int) -> ranker.HaloSamples:
        """The data of halo samples in order of graph id, that is partition after partition."""
        work = self._out.sub(WORK)
        parts = [one.halo_data(np.empty(0, np.int64))]
        for peer in range(self._parts):
            if peer != number:
                start = read_array(work, f"known-{peer:05d}.start.npy")
                some = slice(int(start[number]), int(start[number + 1]))
                names = [field.name for field in fields(ranker.HaloSamples)]
                parts.append(
                    ranker.HaloSamples(**read_columns(work, f"known-{peer:05d}", *names, rows=some))
                )
        return ranker.HaloSamples(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(ranker.HaloSamples)
            }
        )


def read_partition(
    out: Folder, number: int, resolved: Resolved, *, lists: bool = True
) -> ranker.RankingPartition:
    """One partition, without data of other partitions. lists: whether to read its neighbors; if
    not, the task `cut` must have run before.
    """
    part = graph.read_part(out.sub("graph"), number, lists=lists)
    columns = {field.name: getattr(part, field.name) for field in fields(ranker.PartitionRows)}
    if part.neighbors.shape[1] > resolved.k:
        columns["neighbors"] = np.ascontiguousarray(part.neighbors[:, : resolved.k])
        columns["sqdist"] = np.ascontiguousarray(part.sqdist[:, : resolved.k])
    is_demoted = demoted_rows(out, number, part.difficulty, resolved)
    reach = None if lists else read_array(out.sub(WORK), f"reach-{number:05d}.npy")
    starts = graph.starts(out.sub("graph"))
    return ranker.RankingPartition(
        ranker.PartitionRows(**columns), starts, number, is_demoted, reach
    )


def read_cut(work: Folder, source: int, target: int, *names: str) -> dict[str, Any]:
    """Columns of the cut edges from one partition to another."""
    start = read_array(work, f"cut-{source:05d}.start.npy")
    some = slice(int(start[target]), int(start[target + 1]))
    return read_columns(work, f"cut-{source:05d}", *names, rows=some)
