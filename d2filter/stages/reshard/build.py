"""Command reshard: shards + subset → new shards of the kept samples, copied byte by byte.

The steps are find (one task per group of input shards), write (one per new shard) and finish.
Nothing is decoded. The first pass reads tar headers and json members and records where the members
of kept samples are. The second pass copies these byte ranges into a new shard, as soon as `placing`
knows its samples. Names and contents depend on the input, the subset, the shard size and the seed,
not on the number of workers.

If the subset is a run directory that knows its shards, samples are taken by shard and key, so that
the sample that was ranked is copied. Otherwise the first sample with the uid, an image and a
caption is taken.

OUT/.d2filter/     completions, logs and, until all is written, work/ with index-*.parquet

See docs/files.md#reshard-folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter import __version__
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Report, Task, marker
from d2filter.errors import InputError, RunStateError, TooManyBadError, UsageError
from d2filter.formats import lock, tables, tarwriter, webdataset
from d2filter.formats import subset as subset_format
from d2filter.formats.kept import Kept
from d2filter.formats.paths import FileInfo, Folder, remove_leftovers
from d2filter.formats.runstate import digest
from d2filter.stages.reshard import write as write_shard
from d2filter.stages.reshard.layout import PlacedSamples, Placing
from d2filter.stages.reshard.match import Searched, Wanted

U64 = npt.NDArray[np.uint64]

STATE = ".d2filter"
_WORK = "work"
_PLAN = "config.json"
_READERS = 16  # of indexes
_SHARDS = "shards.json"
_CPUS_A_TASK = 0.5  # it waits for the disk half of the time
# most input shards of a task that finds, and their bytes where it has several; some web servers
# tell no sizes
_SHARDS_A_TASK = 64
BYTES_A_TASK = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardConfig:
    """Options of the new shards."""

    shard_size: int = 10_000
    """samples in a shard; the last one has fewer"""
    shuffle: int | None = None
    """seed of the order; None: that of the input"""
    max_missing: float = 0.0
    """share of the subset that may be missing from the shards"""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UsageError(f"shard-size is {self.shard_size}, allowed is a whole number from 1")
        if not 0 <= self.max_missing <= 1:
            raise UsageError(f"max-missing is {self.max_missing}, allowed is 0 to 1")


def reshard(
    runner: Runner,
    out: Folder,
    shards: Sequence[webdataset.Shard],
    subset: npt.NDArray[np.void],
    config: ReshardConfig,
    kept: Kept | None = None,
) -> Figures:
    """Write the new shards. subset: (n,) of (u8, u8), ascending. runner: of OUT/.d2filter.

    kept: shard and key of the samples of the subset; None: samples go by uid. Raises UsageError
    when `shards` are not those of `kept`, RunStateError when OUT holds something else, LockedError
    while another command writes there, and TooManyBadError, after everything else is done, when
    more of the subset than max_missing is in none of the shards.
    """
    wanted = Wanted(shards, subset, kept)
    plan = _plan(shards, wanted, config)
    fingerprint = digest(plan)
    _require_room(out, plan)  # before anything is created there
    with lock.hold(out.sub(STATE), "reshard") as state:
        _require_room(out, plan)
        state.publish_json(_PLAN, plan)
        runner.folder, own = state, Folder(out.url, state.owner)
        remove_leftovers(own, "")
        figures: Figures | None = state.read_json(marker("reshard", "finish"))
        if figures is None or figures["fingerprint"] != fingerprint:
            steps = StageRun(runner, "reshard", fingerprint)
            figures = _make(steps, own, shards, wanted, config)
        state.remove(_WORK)
        remove_leftovers(own, "", own=True)
    share = figures["missing"] / max(1, len(subset))
    if share > config.max_missing:
        lost = figures["lost_shards"]
        raise TooManyBadError(
            f"finished, but {figures['missing']:,} of the {len(subset):,} samples of the subset "
            f"are in none of the shards (first {figures['first_missing']})"
            + (f"; {len(lost)} shards could not be read whole ({lost[0]})" if lost else "")
            + wanted.not_given()
            + f": give all shards, or raise --max-missing from {config.max_missing}"
        )
    return figures


def _make(
    steps: StageRun,
    out: Folder,
    shards: Sequence[webdataset.Shard],
    wanted: Wanted,
    config: ReshardConfig,
) -> Figures:
    """Search the inputs, and write each new shard as soon as its samples are known."""
    state = out.sub(STATE)
    work = state.sub(_WORK)
    subset = wanted.subset
    bounds = list(itertools.pairwise(_bounds(shards)))
    groups = wanted.publish(work, bounds)
    listed = [[s.address, s.name, s.info.name, s.info.size, s.info.version] for s in shards]
    work.publish_json(_SHARDS, listed)
    finding = [
        Task(
            name=f"find-{first:06d}-{after:06d}",
            run=find,
            arguments={
                "state": state, "shards": shards[first:after], "first": first, "number": number,
                "group": group, "strict": wanted.strict,
            },
        )
        for number, ((first, after), group) in enumerate(zip(bounds, groups, strict=True))
    ]  # fmt: skip
    number_of = {task.name: number for number, task in enumerate(finding)}
    there = {name.removesuffix(".json") for name in state.sub("completions/reshard").names()}
    indexes = _Indexes(work, {number_of[name] for name in there & number_of.keys()})
    placing = Placing(subset, shard_size=config.shard_size, shuffle=config.shuffle)
    numbers = itertools.count()
    searched: set[int] = set()
    placed = 0

    plain = all(shard.url == shard.address for shard in shards)
    edges = _bounds(shards)

    def private(rows: PlacedSamples) -> dict[int, str]:
        """URLs of a new shard's inputs by number, where they are more than is recorded of them."""
        if plain:
            return {}
        inputs = (range(*edges[index : index + 2]) for index in np.unique(rows.index).tolist())
        return {n: shards[n].url for n in itertools.chain(*inputs)}

    def then(name: str, figures: Figures) -> list[Task]:
        """What can be written after a search: indexes are placed in their order."""
        nonlocal placed
        if name not in number_of:
            return []
        searched.add(number_of[name])
        settled = []
        while placed in searched:
            settled += placing.add(*indexes.get(placed))
            placed += 1
            if placed == len(finding):
                settled += placing.close()
        return [
            Task(
                name=f"write-{number:06d}",
                run=write,
                arguments={
                    "out": out, "number": number, "rows": rows, "private": private(rows),
                },
            )
            for rows, number in zip(settled, numbers, strict=False)
        ]  # fmt: skip

    # a sample of the subset counts when it is found, and when it is written
    with indexes:
        done = steps.run("reshard", finding, total=2 * len(subset), cpus=_CPUS_A_TASK, then=then)
    found, written = done[: len(finding)], done[len(finding) :]
    finishing = Task(
        name="finish",
        run=finish,
        arguments={
            "out": out,
            "ids": placing.ids,
            "config": config,
            "inputs": len(shards),
            "figures": {
                "missing": placing.missing,
                "first_missing": placing.first_missing,
                "repeated": placing.repeated,
                "bytes": sum(one["bytes"] for one in written),
                "lost_shards": [lost for one in found for lost in one["lost"]],
            },
        },
    )
    return steps.in_driver(finishing, skip=False)


class _Indexes:
    """uids that each index holds, in order. Those of an earlier attempt are needed all at once:
    some are read ahead, for an object store takes its time for each.
    """

    def __init__(self, work: Folder, there: set[int]) -> None:
        self._work = work
        self._there = there
        self._pool = ThreadPoolExecutor(_READERS)
        self._ahead: dict[int, Future[list[U64]]] = {}

    def get(self, number: int) -> list[U64]:
        """hi and lo, once."""
        for one in (number, *range(number + 1, number + 2 * _READERS)):
            if one not in self._ahead and (one == number or one in self._there):
                self._ahead[one] = self._pool.submit(self._read, one)
        return self._ahead.pop(number).result()

    def _read(self, number: int) -> list[U64]:
        table = tables.read_table(self._work, write_shard.index_name(number), ["uid_hi", "uid_lo"])
        return [column.to_numpy() for column in table.columns]

    def __enter__(self) -> _Indexes:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _plan(
    shards: Sequence[webdataset.Shard], wanted: Wanted, config: ReshardConfig
) -> dict[str, Any]:
    """What the new shards depend on."""
    return {
        "d2filter version": __version__,
        "shard_size": config.shard_size,
        "shuffle": config.shuffle,
        "subset": wanted.digest(),
        "shards": digest([[s.name, s.info.size, s.info.version] for s in shards]),
    }


def _require_room(out: Folder, plan: dict[str, Any]) -> None:
    """Raise RunStateError unless OUT is empty, or holds shards of the same plan."""
    before = out.sub(STATE).read_json(_PLAN)
    if before is None and out.names(".tar"):
        raise RunStateError(
            f"{out.url} holds shards that this command did not write: give an empty folder as "
            "--out-dir"
        )
    if before is not None and before != plan:
        changed = [name for name in plan if plan[name] != before.get(name)]
        raise RunStateError(
            f"{out.url} holds shards of another {' and '.join(changed).replace('_', '-')}: use "
            "another --out-dir, or empty that one"
        )


def _read_shards(work: Folder, private: Mapping[int, str]) -> list[webdataset.Shard]:
    """In a file: with each of many tasks the list would fill the object store. private: URLs with
    logins and signatures, which are in no file.
    """
    return [
        webdataset.Shard(private.get(number, url), FileInfo(*info), name)
        for number, (url, name, *info) in enumerate(work.read_json(_SHARDS))
    ]


def _bounds(shards: Sequence[webdataset.Shard]) -> list[int]:
    """Where the shards of one task end and those of the next start; small shards share a task."""
    bounds, held = [0], 0
    for number, shard in enumerate(shards):
        held += max(shard.info.size, BYTES_A_TASK // _SHARDS_A_TASK)
        if held > BYTES_A_TASK and number > bounds[-1]:
            bounds.append(number)
            held = shard.info.size
    return [*bounds, len(shards)]


def find(
    *, report: Report, state: Folder, shards: Sequence[webdataset.Shard], first: int, number: int,
    group: int | None = None, strict: bool = True,
) -> Figures:  # fmt: skip
    """Task: where the members of kept samples lie in some shards, of which `first` is the number of
    the first, and `number` that of their index. group, strict: see `match.Searched`. Figures:
    kept, lost.
    """
    work = state.sub(_WORK)
    searched = Searched(work, group, strict)
    kept: list[tuple[int, int, int, list[bytes], list[int], list[int]]] = []
    lost = []
    for place, shard in enumerate(shards, first):
        if not searched.anything(place):
            continue
        found: list[webdataset.Located] = []
        try:
            found.extend(webdataset.locate_samples(shard, searched.keys(place)))
        except webdataset.LostTail as error:
            lost.append(f"{shard.address}: {error}")
        chosen = searched.choose(place, found)
        for n, (hi, lo) in chosen:
            members = found[n].members
            offsets = [member.offset for member in members.values()]
            sizes = [member.size for member in members.values()]
            extensions = [name.encode("utf-8", "surrogateescape") for name in members]
            kept.append((place, hi, lo, extensions, offsets, sizes))
        report(len(chosen))
    columns = list(zip(*kept, strict=True)) or [()] * len(write_shard.INDEX)
    table = pa.table(
        [pa.array(c, kind.type) for c, kind in zip(columns, write_shard.INDEX, strict=True)],
        schema=write_shard.INDEX,
    )
    with work.publish(write_shard.index_name(number)) as path:
        pq.write_table(table, path, compression="zstd")
    return {"kept": len(kept), "lost": lost}


def write(
    *,
    report: Report,
    out: Folder,
    number: int,
    rows: PlacedSamples,
    private: Mapping[int, str] | None = None,
) -> Figures:
    """Task: one new shard. private: see `_read_shards`."""
    work = out.sub(STATE).sub(_WORK)
    return {
        "bytes": write_shard.fill(
            out, number, work, _read_shards(work, private or {}), rows, report
        )
    }


def finish(
    *,
    report: Report,
    out: Folder,
    ids: Sequence[npt.NDArray[np.void]],
    config: ReshardConfig,
    figures: Figures,
    inputs: int,
) -> Figures:
    """Task of the driver: write the files beside the shards that trainers read."""
    samples = sum(len(own) for own in ids)
    counted = sum(out.read_json(f"{n:08d}_stats.json")["successes"] for n in range(len(ids)))
    if counted != samples:
        raise InputError(f"{out.url}: the shards hold {counted} samples, expected {samples}")
    with out.publish("sample_ids.npy") as path, path.open("wb") as stream:
        np.save(stream, np.concatenate([np.empty(0, subset_format.DTYPE), *ids]))
    sizes = {tarwriter.shard_name(number): len(own) for number, own in enumerate(ids)}
    out.publish_json("sizes.json", sizes)
    out.publish_json(
        "meta.json",
        {
            "output_shard_count": len(ids),
            "output_shard_format": tarwriter.SHARD_FORMAT,
            "output_shard_size": config.shard_size,
            "shuffle": config.shuffle,
            "input_shard_count": inputs,
            "samples": samples,
            **{n: figures[n] for n in ("missing", "repeated", "bytes")},
        },
    )
    return {**figures, "samples": samples}
