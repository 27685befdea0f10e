"""Estimates time, memory and bytes of a run from counts of its work and measured rates.

A rate is the seconds of one unit of work on one CPU, plus a fixed time per task. The work of each
step is counted in `plan_steps.py`; memory follows from the figures that the stages use too,
`algorithm/sizes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from d2filter.algorithm import sizes
from d2filter.config import BATCH_SIZE, MAX_PIXELS
from d2filter.errors import UsageError
from d2filter.formats.runstate import STAGES
from d2filter.tools import plan_steps
from d2filter.tools.plan_steps import Habits, Pool, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where it runs: nodes of one kind."""

    nodes: int = 1
    cpus: int = 2
    gpus: int = 0
    memory: int = 16_000_000_000
    """bytes of a node"""
    disk: int = 0
    """bytes that the run directory may take; 0: unknown"""
    storage: int = 0
    """bytes per second that a node reads and writes; 0: no limit"""
    memory_per_worker: int = 0
    """bytes that a task may use; 0: the node's share"""
    partitions: int = 0
    """0: as few as memory allows"""

    @property
    def slots(self) -> int:
        """CPUs of all nodes."""
        return self.nodes * self.cpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Cost of a step."""

    fixed: float
    """seconds of a task before its first unit"""
    unit: float
    """seconds of a CPU for one unit"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Costs of all steps on one machine."""

    machine: str
    dimension: int
    """of the rows that they were measured with"""
    steps: dict[str, Rate]
    habits: Habits
    k: int = 0
    """number of neighbors that they were measured with; 0: unknown"""
    recall: float = 0.95
    """target that the habits were measured with"""
    images: float = 0.0
    """images embedded per second by one GPU, or by the CPUs of one node without GPUs; 0: not
    measured
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The estimate of a stage."""

    name: str
    seconds: float | None
    """None: not determined by any measurement"""
    memory: float
    """bytes of its largest process"""
    read: float
    written: float
    flops: float
    slowest: str
    """the step that takes longest, and whether it waits for storage"""
    alone: float = 0.0
    """seconds in which one task works and other nodes wait"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A whole run."""

    partitions: int
    parts: int
    """of the catalog"""
    cells: int
    task_memory: float
    """bytes that a task of the graph may use"""
    stages: tuple[Stage, ...]
    disk: float
    """bytes of the run directory at its fullest"""
    routed: float
    """bytes that go from one partition's files to another's"""
    refusals: tuple[str, ...] = field(default=())
    """why it cannot work, and what would"""

    @property
    def seconds(self) -> float:
        """Of all stages that are known."""
        return sum(stage.seconds or 0.0 for stage in self.stages)


def partitions_of(pool: Pool, cluster: Cluster, h: Habits) -> tuple[int, float]:
    """How many partitions the graph is made in, and what a task of it may use, as the stage
    decides.
    """
    found = sizes.plan_partitions(
        pool.samples, plan_steps.graph_row(pool, h), nodes=cluster.nodes, cpus=cluster.cpus,
        node_bytes=cluster.memory, memory=cluster.memory_per_worker,
        partitions=cluster.partitions, row_bytes=pool.row_bytes,
    )  # fmt: skip
    return found.partitions, float(found.memory or cluster.memory)


def estimate(pool: Pool, cluster: Cluster, rates: Rates) -> Estimate:
    """Time, memory and bytes of a run of `pool` on `cluster` at the given rates."""
    h = plan_steps.habits_at(rates.habits, pool.samples, pool.k)
    share = min(1.0, rates.habits.sketch_dim / rates.dimension)
    h = replace(h, sketch_dim=max(1, round(share * pool.dimension)))
    if pool.is_exact:
        h = replace(h, cells=1, passes=0, sketch_dim=pool.dimension)
    partitions, memory = partitions_of(pool, cluster, h)
    steps = plan_steps.count(pool, h, partitions, cluster.memory_per_worker)
    stages = []
    if pool.images:
        stages.append(_embed(pool, cluster, rates))
    for name in STAGES[1:]:
        mine = [step for step in steps if step.stage == name]
        taken = {step.name: seconds(step, cluster, rates) for step in mine}
        idle = sum(taken[step.name] for step in mine if step.tasks == 1)
        rest = rates.steps.get(f"{name}_rest", Rate(fixed=0.0, unit=0.0)).fixed
        slowest = max(mine, key=lambda step: taken[step.name])
        waits = 0 < taken[slowest.name] <= stored(slowest, cluster)
        stages.append(
            Stage(
                name=name,
                seconds=sum(taken.values()) + rest,
                memory=_memory(name, pool, cluster, h, partitions),
                read=sum(step.read for step in mine),
                written=sum(step.written for step in mine),
                flops=sum(step.flops for step in mine),
                slowest=slowest.name + (" (storage)" if waits else ""),
                alone=idle if cluster.nodes > 1 else 0.0,
            )
        )
    by_name = {step.name: step for step in steps}
    kept = by_name["catalog"].written / 2 + by_name["finish"].written
    passing = sum(by_name[n].written for n in ("assign", "route", "find", "merge", "refine"))
    ranked = by_name["rank_finish"].written + by_name["supersteps"].written
    disk = kept + max(passing, ranked, by_name["catalog"].written / 2)
    disk += pool.metadata_bytes if pool.images else 0.0
    away = pool.samples * (plan_steps.fan_out(partitions) - 1)
    found = Estimate(
        partitions=partitions, parts=plan_steps.parts_of(pool, cluster.memory_per_worker),
        cells=h.cells, task_memory=memory, stages=tuple(stages), disk=disk,
        routed=away * (pool.row_bytes + sizes.ROUTED_ROW),
    )  # fmt: skip
    return replace(found, refusals=tuple(_refusals(found, pool, cluster, h)))


def seconds(step: Step, cluster: Cluster, rates: Rates) -> float:
    """Wall seconds of a step: its tasks in as many waves as the CPUs need, or the transfer of its
    bytes if storage is slower.
    """
    return max(_computed(step, cluster, rates), stored(step, cluster))


def stored(step: Step, cluster: Cluster) -> float:
    """Wall seconds in which the nodes that are at it read and write a step's bytes; 0 for storage
    that keeps up.
    """
    if not cluster.storage:
        return 0.0
    return (step.read + step.written) / (cluster.storage * min(cluster.nodes, step.tasks))


def _computed(step: Step, cluster: Cluster, rates: Rates) -> float:
    rate = rates.steps.get(step.name)
    if rate is None:
        return 0.0
    at_once = min(step.tasks, cluster.slots)
    waves = math.ceil(step.tasks / at_once)
    cpus = min(cluster.slots, step.tasks * cluster.cpus) if step.threads else at_once
    # the last wave may be short of tasks
    uneven = waves * at_once / step.tasks
    return waves * rate.fixed + rate.unit * step.units / cpus * uneven


def _memory(stage: str, pool: Pool, cluster: Cluster, h: Habits, partitions: int) -> float:
    """Bytes of the largest process of a stage."""
    n, limit = pool.samples, cluster.memory_per_worker
    if stage == "catalog":
        part = n * pool.row_bytes / plan_steps.parts_of(pool, limit)
        return sizes.catalog_task(part, min(pool.metadata_bytes, sizes.catalog_group(limit)))
    if stage == "graph":
        return sizes.graph_task(n, partitions, plan_steps.graph_row(pool, h), pool.row_bytes)
    if stage == "rank":
        return sizes.rank_task(n / partitions, pool.k)
    return sizes.select_task(pool.fraction * n, n / partitions)


def _embed(pool: Pool, cluster: Cluster, rates: Rates) -> Stage:
    places = cluster.nodes * (cluster.gpus or 1)
    known = rates.images > 0
    step = Step(
        stage="embed", name="embed", units=0.0, tasks=pool.samples, threads=False,
        read=float(pool.samples) * pool.image_bytes,
        written=float(pool.metadata_bytes),
    )  # fmt: skip
    bound = stored(step, cluster)
    computed = pool.samples / (rates.images * places) if known else 0.0
    return Stage(
        name="embed",
        seconds=max(computed, bound) if known else None,
        memory=sizes.MODEL + sizes.beside_model(BATCH_SIZE, MAX_PIXELS),
        read=step.read,
        written=step.written,
        flops=0.0,
        slowest="embed (storage)" if known and bound > computed else "embed",
    )


def _refusals(found: Estimate, pool: Pool, cluster: Cluster, h: Habits) -> Iterator[str]:
    """Why the run cannot work, and what would."""
    graph = next(stage for stage in found.stages if stage.name == "graph")
    row = plan_steps.graph_row(pool, h)
    # a node never runs more tasks than it has CPUs
    room = max(min(found.task_memory, cluster.memory), cluster.memory / cluster.cpus)
    least = sizes.least_graph_task(pool.samples, row, pool.row_bytes)
    if room < least:
        option = "--memory" if cluster.memory < least else "--memory-per-worker"
        yield (
            f"a task may use {_gb(room)} and needs {_gb(least)}: {option} {_gb(1.1 * least)}, "
            "with fewer tasks at once"
        )
    elif graph.memory > room:
        enough = sizes.partitions_within(room, pool.samples, row, pool.row_bytes)
        yield (
            f"a partition of {pool.samples / found.partitions:,.0f} samples takes "
            f"{_gb(graph.memory)}, a task may use {_gb(room)}: --partitions {enough}"
        )
    state = pool.samples * sizes.RANKED_STATE
    if state > 0.8 * cluster.nodes * cluster.memory:
        mapped = pool.samples * sizes.RANKED_EDGES
        yield (
            f"the ranking holds {_gb(state + mapped)}, of which {_gb(state)} are no "
            f"mapped files, and {cluster.nodes} nodes have {_gb(cluster.nodes * cluster.memory)}: "
            f"--nodes {math.ceil(state / (0.8 * cluster.memory))}"
        )
    if cluster.disk and found.disk > cluster.disk:
        yield (
            f"the run directory grows to {_gb(found.disk)}, there are {_gb(cluster.disk)}: "
            f"--disk {_gb(1.1 * found.disk)}"
        )
    subset = sizes.select_task(pool.fraction * pool.samples, 0)
    if subset > cluster.memory:
        yield f"select holds {_gb(subset)} in one task, a node has {_gb(cluster.memory)}"


def fit(small: Sequence[tuple[Step, float]], large: Sequence[tuple[Step, float]], cpus: int) -> (
    dict[str, Rate]
):  # fmt: skip
    """Rates from the steps of two pools and the seconds that they took on `cpus` CPUs.

    Raises UsageError when the pools are of one size.
    """
    before = {step.name: (step, taken) for step, taken in small}
    # the first step is of all rows, whatever the others do
    if large[0][0].units <= before[large[0][0].name][0].units:
        raise UsageError("the second pool of a calibration must be larger than the first")
    rates = {}
    for step, taken in large:
        if step.units == 0:
            continue
        # a pool so small that all is compared with all has other steps, and more work in some
        earlier, first = before.get(step.name, (step, taken))
        more = step.units - earlier.units
        unit = max(0.0, taken - first) / more if more > 0 else taken / step.units
        if not unit:  # too little to be seen beside what starts it
            unit = 0.1 * taken / step.units
        fixed = max(0.0, taken - unit * step.units)
        used = min(cpus, step.tasks * cpus) if step.threads else 1
        rates[step.name] = Rate(fixed=fixed, unit=unit * used)
    return rates


def _gb(size: float) -> str:
    if size < 1e9:
        return f"{size / 1e6:.0f}MB"
    return f"{size / 1e9:,.1f}GB" if size < 1e12 else f"{size / 1e12:,.2f}TB"
