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
from d2filter.engine.task import Task, execute
from d2filter.formats import metadata
from d2filter.formats.paths import Folder
from d2filter.stages.catalog import build as build_catalog
from d2filter.stages.graph import by_class as graph_by_class

NODE = 4_000_000_000
ROW = 4_000_000  # bytes, so that a small pool is a large one


class Here(Runner):
    """Runs tasks in this process, on a node of NODE bytes and four CPUs; notes what they ask."""

    asked: ClassVar[dict[str, tuple[int, int]]] = {}

    def resources(self) -> tuple[int, int, int]:
        return 4, 1, NODE

    def map(  # type: ignore[override]
        self, stage: str, tasks: list[Task], *, fingerprint: str, label: str, memory: int = 0,
        **more: Any,
    ) -> list[dict[str, Any]]:  # fmt: skip
        self.asked[label] = (len(tasks), memory)
        found = [
            execute(self.folder, stage, task, fingerprint, lambda done: None) for task in tasks
        ]
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
    build_catalog.build(runner, out, source, pairs, classed, "f")
    figures = graph_by_class.build(runner, out, config, "f")
    tasks, memory = runner.asked["group"]
    assert tasks == figures["partitions"] == (partitions or tasks) > 1
    rows = max(figures["partition_rows"])
    assert rows >= largest
    # no more at once than fit, unless one alone is too large
    at_once = max(1, NODE // memory)
    assert at_once == 1 or at_once * (sizes.SEARCHING + rows * ROW) <= NODE
    assert memory >= sizes.task_memory(rows, ROW)
