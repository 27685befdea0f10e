"""Runs a command in this process, and reads what it wrote to its run directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from d2filter.cli import main as cli
from d2filter.engine.stage_run import StageRun
from d2filter.formats import ranking
from d2filter.formats.paths import Folder


def run(*words: object) -> int:
    """Exit code of `d2filter WORDS...`. Words are converted to text, so paths and numbers are
    allowed. The command uses the Ray of the fixture `cluster`.
    """
    return cli.main([str(word) for word in words])


def interrupt(monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """End the driver when it comes to the step of this label."""
    original = StageRun.run

    def stop(self: StageRun, label: str, tasks: Any, **more: Any) -> Any:
        if label == before:
            raise KeyboardInterrupt
        return original(self, label, tasks, **more)

    monkeypatch.setattr(StageRun, "run", stop)


def graph_difficulties(metadata: Path, out: Path, *words: object) -> dict[str, float]:
    """Run `graph` on a folder of metadata, which must succeed; the difficulties of its catalog."""
    assert run("graph", "--metadata-dir", metadata, "--out-dir", out, *words) == 0
    return difficulties(out)


def copy_of(out: Path, folder: Path) -> Path:
    """A copy of a run directory inside a folder, for tests that change the directory."""
    return Path(shutil.copytree(out, folder / out.name))


def stats(out: Path) -> dict[str, Any]:
    """The content of stats.json."""
    found: dict[str, Any] = json.loads((out / "stats.json").read_text())
    return found


def difficulties(out: Path) -> dict[str, float]:
    """The difficulty of each sample of the catalog, by uid as 32 hex digits."""
    found = {}
    for path in sorted((out / "catalog").glob("part-*.parquet")):
        table = pq.read_table(path).to_pydict()
        rows = zip(table["uid_hi"], table["uid_lo"], table["difficulty"], strict=True)
        found.update({f"{hi:016x}{lo:016x}": value for hi, lo, value in rows})
    return found


def ranking_columns(out: Path) -> dict[str, np.ndarray]:
    """All columns of ranking/ in order of graph id."""
    parts = list(ranking.iter_columns(Folder(str(out)).sub("ranking")))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def ranking_by_uid(out: Path) -> dict[str, np.ndarray]:
    """All columns of ranking/ in ascending order of uid.

    Graph ids depend on the partitions. So the column `suppressed_by` is replaced by the uid of the
    suppressor, `by_uid_hi` and `by_uid_lo`, which are 0 where there is none.
    """
    columns = ranking_columns(out)
    by = columns.pop("suppressed_by")
    for half in ("uid_hi", "uid_lo"):
        columns[f"by_{half}"] = np.where(by >= 0, columns[half][by], 0)
    order = np.lexsort((columns["uid_lo"], columns["uid_hi"]))
    return {name: values[order] for name, values in columns.items()}


def same_columns(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two tables have the same columns with the same values."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def files(out: Path) -> dict[str, bytes]:
    """Content of all files of a run by name, without logs. Files with seconds, or with the place
    of the run, count as empty.
    """
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        # those of new shards are in a folder of their own: .d2filter/completions, .d2filter/logs
        place = name.removeprefix(".d2filter/")
        if path.is_file() and not place.startswith("logs/"):
            timed = name in ("stats.json", "report.html") or place.startswith("completions/")
            found[name] = b"" if timed else path.read_bytes()
    return found


def unpublished(out: Path) -> list[Path]:
    """Temporary files of a run."""
    return [path for path in files_below(out) if path.name.startswith(".tmp-")]


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder, while other processes write and remove some."""
    for place, _, names in os.walk(folder):
        for name in names:
            yield Path(place, name)
