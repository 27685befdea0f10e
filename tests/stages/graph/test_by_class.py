"""Memory that tasks of the graph of classes request."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from support import pools

from d2filter.algorithm import sizes
from d2filter.config import RunConfig
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Task, execute
from d2filter.formats import metadata
from d2filter.formats.paths import Folder
from d2filter.stages.catalog import build as build_catalog
from d2filter.stages.graph import by_class as graph_by_class

NODE = 4_000_000_000
ROW = 4_000_000  # bytes, so that a small pool is a large one


class Here(Runner):
    """A cluster of one node of NODE bytes and four CPUs."""

    def resources(self) -> tuple[int, int, int]:
        return 4, 1, NODE


class StepsHere(StageRun):
    """Runs tasks in this process; notes how many there are and the memory that they request."""

    asked: ClassVar[dict[str, tuple[int, int]]] = {}

    def run(  # type: ignore[override]
        self, label: str, tasks: list[Task], *, memory: int | None = None, **more: Any
    ) -> list[dict[str, Any]]:
        self.asked[label] = (len(tasks), self.memory if memory is None else memory)
        found = [execute(self.out, self.stage, task, self.fingerprint) for task in tasks]
        for outcome in found:
            if outcome.error is not None:
                raise outcome.error
        return [outcome.figures or {} for outcome in found]


@pytest.mark.parametrize(("largest", "partitions"), [(25, 0), (25, 3), (700, 0)])
def test_parts_of_classes_never_take_more_together_than_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, partitions: int
) -> None:
    n = 1000
    pool = pools.make(n, 4)
    small = np.arange(n - largest) % 39
    labels = ["big"] * largest + [f"c{number}" for number in small]
    source = Folder(str(pools.write(tmp_path / "m", pool, columns={"label": labels})))
    out = Folder(str(tmp_path / "o"))
    config = RunConfig(out_dir=out.url, partitions=partitions)
    runner = Here(out)
    classed = type(config.catalog)(group_column="label")
    monkeypatch.setattr(sizes, "class_row", lambda row, k: ROW)
    pairs, _ = metadata.list_pairs(source)
    build_catalog.build(StepsHere(runner, "catalog", "f"), source, pairs, classed)
    figures = graph_by_class.build(StepsHere(runner, "graph", "f"), config)
    tasks, memory = StepsHere.asked["group"]
    assert tasks == figures["partitions"] == (partitions or tasks) > 1
    rows = max(figures["partition_rows"])
    assert rows >= largest
    # no more at once than fit, unless one alone is too large
    at_once = max(1, NODE // memory)
    assert at_once == 1 or at_once * (sizes.SEARCHING + rows * ROW) <= NODE
    assert memory >= sizes.task_memory(rows, ROW)
