"""Prepares inputs beside the metadata for the catalog: training logs, score files, subsets.

They are read once, before the tasks that read metadata join them by uid (`formats/join_table.py`).

catalog/outside/log-NAME.*     hi, lo, value of a training log's score
catalog/outside/scores-00000.* buckets of the score file, and within-00000.* of the subset
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Report, Task
from d2filter.formats import join_table, side_inputs, traininglog
from d2filter.formats.paths import Folder
from d2filter.formats.reading import CatalogConfig
from d2filter.formats.rows import read_columns, write_columns

FOLDER = "outside"
_TASK_ROWS = 16_000_000  # rows of the buckets that a task makes


def cuts(config: CatalogConfig, memory: int) -> dict[str, list[int]]:
    """Buckets and tasks of each table. memory: bytes that a task may use, 0 for the usual."""
    found = {}
    for table in side_inputs.tables_of(config):
        most = memory // (4 * join_table.ROW_BYTES) if memory else _TASK_ROWS
        buckets = 1 + table.rows // min(join_table.BUCKET_ROWS, most)
        found[table.name] = [buckets, min(buckets, 1 + table.rows // most)]
    return found


def prepare(steps: StageRun, config: CatalogConfig, cut: Mapping[str, list[int]]) -> dict[str, int]:
    """Make all of it; returns how many uids each table has. cut: that of `cuts`."""
    home = _home(steps.out)
    logs = [
        Task(
            name=f"log-{name}",
            run=score_log,
            arguments={"out": steps.out, "config": config, "name": name},
        )
        for name in config.logged
    ]
    if logs:
        steps.run("log", logs)
    rows = {}
    for table in side_inputs.tables_of(config):
        name, (buckets, parts) = table.name, cut[table.name]
        bounds = [number * buckets // parts for number in range(parts + 1)]
        gathered = steps.each(
            name,
            gather,
            [{"first": first, "end": end} for first, end in pairwise(bounds)],
            {"config": config, "name": name, "buckets": buckets},
        )
        rows[name] = sum(f["uids"] for f in gathered)
        join_table.publish(home, name, buckets=buckets, columns=table.columns, rows=rows[name])
    return rows


def score_log(*, report: Report, out: Folder, config: CatalogConfig, name: str) -> Figures:
    """Task: one score of all samples of a training log. Figures: how many."""
    found = traininglog.score(config.training_log, name)
    write_columns(_home(out), f"log-{name}", hi=found.hi, lo=found.lo, value=found.value)
    report(found.hi.size)
    return {"logged": int(found.hi.size)}


def gather(
    *, report: Report, out: Folder, config: CatalogConfig, name: str, buckets: int, first: int,
    end: int,
) -> Figures:  # fmt: skip
    """Task: some buckets of a table. Figures: the uids that they hold."""
    (table,) = [table for table in side_inputs.tables_of(config) if table.name == name]
    found = join_table.gather(
        _home(out), name, table.blocks(), table.what, table.columns, buckets, first, end
    )
    report(found)
    return {"uids": found}


def ready(out: Folder, config: CatalogConfig) -> side_inputs.Outside:
    """All of it, for a task that reads metadata."""
    logs = {
        name: traininglog.Scored(**read_columns(_home(out), f"log-{name}", "hi", "lo", "value"))
        for name in config.logged
    }
    return side_inputs.ready(config, _home(out), logs)


def alerts(rows: Mapping[str, int], ranked: int) -> list[str]:
    """Alerts about tables with more uids than ranked samples; each sample has a row in them."""
    names = {side_inputs.SCORES: "score file", side_inputs.WITHIN: "subset"}
    return [
        f"{uids - ranked:,} of the {uids:,} uids of the {names[name]} belong to no ranked sample"
        for name, uids in rows.items()
        if uids > ranked
    ]


def tidy(out: Folder) -> None:
    """Remove what only reading needs."""
    out.sub("catalog").remove(FOLDER)


def _home(out: Folder) -> Folder:
    return out.sub("catalog").sub(FOLDER)
