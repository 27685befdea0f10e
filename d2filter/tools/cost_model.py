"""Estimates time, memory and bytes of every step of a run from counts and measured rates.

The work of a step is counted in units that grow with the pool as its cost does. A rate is the
seconds of one unit on one CPU, plus a fixed time per task. What depends on the data (how many cells
must be probed, how short sketches can be) is in `Habits`, measured on a small pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from d2filter.algorithm import sizes
from d2filter.algorithm.knn import cells, sketch
from d2filter.algorithm.knn import in_memory as knn
from d2filter.errors import UsageError

# bytes, from what the stages hold and write (docs/files.md; bench_memory.md, bench_rank.md)
_META = 150  # of a row of metadata beside its embeddings: uid, url, caption, score
_ROW = 60  # of a catalog row beside its features
_PROCESS = 250_000_000  # a worker before it holds a sample
_RANKING = 730_000_000  # the same with the ranking's code, which holds parquet too
_SELECTING = 400_000_000  # the driver, which selects
_BLOCK_ROWS = 65536  # that are wide (float32) at a time
_EDGE_MAPPED = 100  # of a ranked sample: its edges both ways, in memory or in mapped files
_STATE = 85  # of a ranked sample: scores, queues and boundaries, over all processes
_KEPT = 24  # of a sample of the subset, in one task

_OVERHEAD = 256  # dimensions that a product costs besides its own (algorithm/knn/calibrate.py)
_FAN_OUT = 0.42  # a row goes to 1 + this · log2(P) partitions: 2.8 of 19 in bench_memory.md
_CALIBRATION = 400
_AXES_ROWS = 32768
_MEASURED = 3000

STAGES = ("embed", "catalog", "graph", "rank", "select")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The size of the pool to filter."""

    samples: int
    dimension: int
    """of a row of features: both embeddings together for image|text"""
    k: int = 1
    fraction: float = 0.3
    exact_below: int = 16384
    images: bool = False
    """whether the run starts from shards"""
    image_bytes: int = 60_000
    """of a pair in a shard"""


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
class Habits:
    """What a pool makes of the search, as a pool of `samples` was measured to."""

    samples: int
    cells: int
    probes: int
    passes: int
    sketch_dim: int
    evaluations: float
    """cost per row, as a number of distances between whole rows by products"""
    growth: float = 0.5
    """power of the pool's size by which that cost grows"""


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
    recall: float = 0.95
    """target that the habits were measured with"""
    images: float = 0.0
    """images embedded per second by one GPU, or by the CPUs of one node without GPUs; 0: not
    measured
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A fan-out, or a single task."""

    stage: str
    name: str
    units: float
    tasks: int
    threads: bool
    """whether a task uses all CPUs that it is given"""
    read: float = 0.0
    """bytes"""
    written: float = 0.0
    flops: float = 0.0
    """of matrix products"""


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


def habits_at(habits: Habits, samples: int, k: int) -> Habits:
    """The habits of the same pool with more samples: cells grow, and with them the cost of a probe.

    The number of probes stays, unless the habits are those of a sample of the pool, which is
    sparser and needs more.
    """
    count = cells.cell_count(samples, k)
    # cells hold √n rows: of a growth by the root, this is what it is
    grown = ((samples / count) / (habits.samples / habits.cells)) ** (habits.growth / 0.5)
    return Habits(
        samples=samples,
        cells=count,
        probes=habits.probes,
        passes=habits.passes,
        sketch_dim=habits.sketch_dim,
        evaluations=habits.evaluations * grown,
        growth=habits.growth,
    )


def partitions_of(pool: Pool, cluster: Cluster, h: Habits) -> tuple[int, float]:
    """How many partitions the graph is made in, and what a task of it may use, as the stage
    decides.
    """
    found = sizes.plan_partitions(
        pool.samples, _graph_row(pool, h), nodes=cluster.nodes, cpus=cluster.cpus,
        node_bytes=cluster.memory, memory=cluster.memory_per_worker,
        partitions=cluster.partitions,
    )  # fmt: skip
    return found.partitions, float(found.memory or cluster.memory)


def count(pool: Pool, h: Habits, partitions: int) -> list[Step]:
    """The steps of a run that starts from metadata, with their work."""
    n, d, k = pool.samples, pool.dimension, pool.k
    row = 2 * d
    parts = parts_of(pool)
    groups = max(1, math.ceil(n * (row + _META) / sizes.CATALOG_GROUP))
    fan = fan_out(partitions)
    exact = n <= pool.exact_below
    found = [
        Step(
            stage="catalog", name="catalog", units=n * (d + 700.0), tasks=groups, threads=False,
            read=n * (2.0 * row + _META + _ROW), written=n * 2.0 * (row + _ROW),
        )
    ]  # fmt: skip
    width, places = _widths(k, h, d)
    root = math.sqrt(h.cells)
    trained = min(n, cells.TRAINING_ROWS_A_CELL * h.cells)
    short = h.sketch_dim
    # principal axes, and how many of them find the neighbors of 400 rows
    axes = 6.0 * min(trained, _AXES_ROWS) * (d * d + 2 * _CALIBRATION * (d + _OVERHEAD))
    # units of a step that searches are multiplications of products
    scanned = float(n) * (d + _OVERHEAD) if exact else h.evaluations * (d + _OVERHEAD)
    sketched = 0.0 if exact or short == d else float(d * short)
    assigned = 0.0 if exact else 16.5 * root * (short + _OVERHEAD) + sketched
    read = float(n * row)
    graph = [
        ("train", 0.0 if exact else 27.0 * trained * root * (short + _OVERHEAD) + axes, 1, True,
         trained * row, 0.0),
        ("assign", n * assigned, parts, True, read, n * 64.0),
        ("choose", 0.0 if exact else n * (_CALIBRATION * (d + _OVERHEAD) + 2 * sketched), parts,
         True, 3 * read, 0.0),
        ("route", n * fan * d, parts, False, read, fan * n * (row + 80.0)),
        ("find", n * (scanned + fan * sketched + 4.0 * places * d), partitions, True,
         fan * n * (row + 80.0), fan * n * (16.0 * places + 8)),
        ("merge", n * fan * places, partitions, False, fan * n * 16.0 * places, n * 12.0 * width),
        ("refine", float(n * d * width * h.passes), partitions, True, h.passes * 4 * read,
         h.passes * n * 12.0 * k),
        ("finish", float(n * (k + 3)), partitions, False, n * (12.0 * width + 24),
         n * (12.0 * k + 20)),
        ("measure", float(n * _MEASURED * (d + _OVERHEAD)), parts, True, read, 0.0),
        ("judge", 1.0, 1, False, 0.0, 0.0),
    ]  # fmt: skip
    flops = {
        "assign": 2 * n * (16.5 * root * short + sketched), "measure": 2.0 * n * _MEASURED * d,
        "choose": 2.0 * n * _CALIBRATION * d, "find": 2 * n * scanned, "train": 54 * trained * root
        * short,
    }  # fmt: skip
    found += [
        Step(
            stage="graph", name=name, units=units, tasks=tasks, threads=threads, read=reads,
            written=writes, flops=flops.get(name, 0.0) if units else 0.0,
        )
        for name, units, tasks, threads, reads, writes in graph
    ]  # fmt: skip
    edges = n * (12.0 * k + 20)
    settled = [("rank_settle", k + 3, edges, 0.0)]
    if n * k > sizes.SETTLED_WHOLE:
        settled = [
            ("rank_upper", k, n * 4.0 * k, 0.0),
            ("rank_lower", k, n * 4.0 * k, 0.0),
            ("rank_near", k, edges, 0.0),
            ("rank_lists", k, edges, 0.0),
            ("rank_answers", k, n * 4.0 * k, 0.0),
        ]
    for name, weight, reads, writes in (
        *settled,
        ("rank_cut", k + 3, edges, 0.0),
        ("rank_describe", 3, n * 20.0, 0.0),
        # partitions look again when news come from others: 1.2 times at k=1, 2.5 at k=5
        ("supersteps", (k + 3) * (1 + 0.3 * k if partitions > 1 else 1), edges, n * 60.0),
        ("rank_ranges", 1, n * 24.0, 0.0),
        ("rank_merge", 1, n * 24.0, n * 8.0),
        ("rank_finish", 4, n * 60.0, n * 46.0),
    ):
        found.append(
            Step(
                stage="rank", name=name, units=float(n * weight),
                tasks=1 if name == "rank_settle" else partitions, threads=False,
                read=reads, written=writes,
            )
        )  # fmt: skip
    found.append(
        Step(
            stage="select", name="select", units=float(n), tasks=1, threads=False, read=n * 46.0,
            written=pool.fraction * n * 40,
        )
    )  # fmt: skip
    return found


def estimate(pool: Pool, cluster: Cluster, rates: Rates) -> Estimate:
    """Time, memory and bytes of a run of `pool` on `cluster` at the given rates."""
    exact = pool.samples <= pool.exact_below
    h = habits_at(rates.habits, pool.samples, pool.k)
    share = min(1.0, rates.habits.sketch_dim / rates.dimension)
    short = pool.dimension if exact else max(1, round(share * pool.dimension))
    h = Habits(
        samples=h.samples, cells=1 if exact else h.cells, probes=h.probes,
        passes=0 if exact else h.passes, sketch_dim=short, evaluations=h.evaluations,
    )  # fmt: skip
    partitions, memory = partitions_of(pool, cluster, h)
    steps = count(pool, h, partitions)
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
                memory=_memory(name, pool, h, partitions),
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
    disk += pool.samples * (2 * pool.dimension + _META) if pool.images else 0.0
    routed = pool.samples * (fan_out(partitions) - 1) * (2.0 * pool.dimension + 80)
    found = Estimate(
        partitions=partitions, parts=parts_of(pool), cells=h.cells, task_memory=memory,
        stages=tuple(stages), disk=disk, routed=routed,
    )  # fmt: skip
    return _judged(found, pool, cluster, h)


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


def parts_of(pool: Pool) -> int:
    """Parts of the catalog (stages/catalog/build.py), of files as large as their arrays."""
    return 1 + int(pool.samples * (2 * pool.dimension + _META) // sizes.CATALOG_PART)


def fan_out(partitions: int) -> float:
    """Partitions that a row goes to."""
    return 1 + _FAN_OUT * math.log2(partitions)


def _widths(k: int, h: Habits, dimension: int) -> tuple[int, int]:
    """Places of the lists that are searched, and of their shortlists."""
    width = knn.list_width(k, h.passes)
    return width, sketch.places(width, identity=h.sketch_dim >= dimension)


def _graph_row(pool: Pool, h: Habits) -> float:
    """Bytes of a row in the task that searches it."""
    _, places = _widths(pool.k, h, pool.dimension)
    return float(sizes.graph_row(2 * pool.dimension, h.sketch_dim, places))


def _memory(stage: str, pool: Pool, h: Habits, partitions: int) -> float:
    """Bytes of the largest process of a stage."""
    n, row = pool.samples, 2 * pool.dimension
    if stage == "catalog":
        part = n * row / parts_of(pool)
        group = min(n * (row + _META), sizes.CATALOG_GROUP)
        return _PROCESS + max(3.0 * part, 3.0 * group)
    if stage == "graph":
        block = 4.0 * min(n, _BLOCK_ROWS) * pool.dimension
        return sizes.SEARCHING + block + 1.1 * n / partitions * _graph_row(pool, h)
    if stage == "rank":
        return _RANKING + n / partitions * (_STATE + _EDGE_MAPPED + 20.0 * pool.k)
    return _SELECTING + pool.fraction * n * _KEPT + 60.0 * n / partitions


def _embed(pool: Pool, cluster: Cluster, rates: Rates) -> Stage:
    places = cluster.nodes * (cluster.gpus or 1)
    known = rates.images > 0
    step = Step(
        stage="embed", name="embed", units=0.0, tasks=pool.samples, threads=False,
        read=float(pool.samples) * pool.image_bytes,
        written=pool.samples * (2.0 * pool.dimension + _META),
    )  # fmt: skip
    bound = stored(step, cluster)
    computed = pool.samples / (rates.images * places) if known else 0.0
    return Stage(
        name="embed",
        seconds=max(computed, bound) if known else None,
        memory=4e9,
        read=step.read,
        written=step.written,
        flops=0.0,
        slowest="embed (storage)" if known and bound > computed else "embed",
    )


def _judged(found: Estimate, pool: Pool, cluster: Cluster, h: Habits) -> Estimate:
    """The same with what speaks against it."""
    refusals = []
    graph = next(stage for stage in found.stages if stage.name == "graph")
    if found.task_memory < 2 * sizes.SEARCHING:
        refusals.append(
            f"a task may use {_gb(found.task_memory)} and needs {_gb(2 * sizes.SEARCHING)}: give "
            f"nodes of {_gb(2 * sizes.SEARCHING * cluster.cpus)} for {cluster.cpus} CPUs, or "
            "--memory-per-worker with fewer tasks at once"
        )
    elif graph.memory > max(found.task_memory, cluster.memory / cluster.cpus):
        room = (
            max(found.task_memory, cluster.memory / cluster.cpus) - sizes.SEARCHING
        ) * sizes.SHARE
        enough = math.ceil(pool.samples * _graph_row(pool, h) / max(1.0, room))
        refusals.append(
            f"a partition of {pool.samples / found.partitions:,.0f} samples takes "
            f"{_gb(graph.memory)}, a task may use {_gb(found.task_memory)}: --partitions {enough}"
        )
    ranking = pool.samples * (_STATE + _EDGE_MAPPED)
    if pool.samples * _STATE > 0.8 * cluster.nodes * cluster.memory:
        least = math.ceil(pool.samples * _STATE / (0.8 * cluster.memory))
        refusals.append(
            f"the ranking holds {_gb(ranking)}, of which {_gb(pool.samples * _STATE)} are no "
            f"mapped files, and {cluster.nodes} nodes have {_gb(cluster.nodes * cluster.memory)}: "
            f"--nodes {least}"
        )
    if cluster.disk and found.disk > cluster.disk:
        refusals.append(
            f"the run directory grows to {_gb(found.disk)}, there are {_gb(cluster.disk)}: "
            f"--disk {_gb(1.1 * found.disk)}"
        )
    subset = _SELECTING + pool.fraction * pool.samples * _KEPT
    if subset > cluster.memory:
        refusals.append(f"select holds {_gb(subset)} in one task, a node has {_gb(cluster.memory)}")
    return Estimate(
        partitions=found.partitions, parts=found.parts, cells=found.cells,
        task_memory=found.task_memory, stages=found.stages, disk=found.disk,
        routed=found.routed, refusals=tuple(refusals),
    )  # fmt: skip


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
