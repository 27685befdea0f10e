"""The output of `status` for runs that are running, have failed, or are finished."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import pools

from d2filter.cli.main import main
from d2filter.formats import logs
from d2filter.formats.paths import Folder
from d2filter.tools import status

pytestmark = pytest.mark.usefixtures("cluster")


def status_of(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    """Lines for people, and the same for programs."""
    capsys.readouterr()
    assert main(["status", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["status", str(out), "--json"]) == 0
    return lines, json.loads(capsys.readouterr().out)


def test_status_follows_a_run_from_its_first_failure_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2filter.algorithm import sizes

    monkeypatch.setattr(sizes, "CATALOG_GROUP", 1)
    folder = pools.write(tmp_path / "m", pools.make(300, 8), files=3)
    whole = (folder / "00001.npz").read_bytes()
    (folder / "00001.npz").write_bytes(whole[:-40])
    out = tmp_path / "o"
    words = ["run", "--metadata-dir", str(folder), "--out-dir", str(out)]
    assert main(words) == 1
    lines, found = status_of(out, capsys)
    assert [(s["stage"], s["state"]) for s in found["stages"]] == [
        ("catalog", "failed"), ("graph", "waiting"), ("rank", "waiting"), ("select", "waiting")
    ]  # fmt: skip
    first = found["stages"][0]
    assert (first["tasks_done"], first["tasks_left"], first["samples"]) == (2, 1, 200)
    assert "00001.npz is not a readable npz" in first["failed"][0]
    assert found["next"] == "catalog"
    assert any(line.startswith("catalog failed: ") and "00001.npz" in line for line in lines)
    assert any(line.startswith("next: catalog; last line of its log") for line in lines)
    (folder / "00001.npz").write_bytes(whole)
    os.utime(folder / "00001.npz", (1, 1))
    assert main(words) == 0
    lines, found = status_of(out, capsys)
    assert {s["state"] for s in found["stages"]} == {"done"}
    assert found["next"] == found["error"] == ""
    assert lines[-1] == "finished"
    assert "samples: 300 read, 300 ranked, 90 kept, 210 pruned" in lines
    assert all(s["failed"] == [] for s in found["stages"])


def test_a_stage_under_way_counts_tasks_and_samples_a_second(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    logs.append(folder, logs.DRIVER, "run", stages=["catalog", "graph"])
    logs.append(folder, logs.DRIVER, "stage started", stage="catalog")
    logs.append(folder, logs.DRIVER, "tasks", stage="catalog", label="catalog", tasks=9, left=7)
    for number, second in enumerate((10, 20, 40)):
        record = {
            "fingerprint": "",
            "samples": 1000,
            "finished": f"2200-01-01T00:00:{second}+00:00",
        }
        folder.publish_json(f"completions/catalog/read-{number:05d}.json", record)
    text = (tmp_path / logs.DRIVER).read_text().splitlines()
    step = {**json.loads(text[-1]), "time": "2200-01-01T00:00:00+00:00"}
    (tmp_path / logs.DRIVER).write_text("\n".join([*text[:-1], json.dumps(step), '{"cut off']))
    found = status.read(folder)
    (stage, waiting) = found.stages
    assert (stage.state, stage.tasks_done, stage.tasks_left) == ("begun", 5, 4)
    assert (stage.samples, stage.seconds, stage.rate) == (3000, 40.0, 75.0)
    assert waiting.state == "waiting"
    later = datetime(2200, 1, 1, 0, 5, tzinfo=timezone.utc)
    assert "last line of its log 5 min ago" in status.lines(found, later)[-1]


def test_a_folder_that_is_not_a_run_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(tmp_path / "none")]) == 1
    assert "is not a run directory: no command has started there" in capsys.readouterr().err


def snapshot(folder: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
    }


def test_a_dry_run_prints_what_a_run_would_do_and_changes_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pools.write(tmp_path / "m", pools.make(300, 8), files=3)
    out = tmp_path / "o"
    words = ["run", "--metadata-dir", str(folder), "--out-dir", str(out)]

    def dry(*more: str) -> list[str]:
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert main([*words, *more, "--dry-run"]) == 0
        assert snapshot(tmp_path) == before
        *lines, last = capsys.readouterr().out.splitlines()
        assert last == "nothing was changed (--dry-run)"
        return lines

    size = sum(p.stat().st_size for p in folder.iterdir()) / 1000
    assert dry() == [
        f"catalog   to do: 3 pairs of metadata files, {size:.3g} kB",
        "graph     to do", "rank      to do", "select    to do",
    ]  # fmt: skip
    assert not out.exists()
    assert main(words) == 0
    done = [f"{stage:<9} done before" for stage in ("catalog", "graph", "rank", "select")]
    assert dry() == done
    assert dry("--fraction", "0.2") == [*done[:3], "select    to do"]
    assert dry("--overwrite", "graph") == [
        done[0], "graph     to do: --overwrite", "rank      to do", "select    to do"
    ]  # fmt: skip
    # a contradiction is one, and a copy of the input with another time is none
    capsys.readouterr()
    assert main([*words, "--gamma", "2", "--dry-run"]) == 1
    assert "gamma was 'auto' and is 2.0" in capsys.readouterr().err
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert dry() == done
    assert main(words) == 0
    assert capsys.readouterr().out.count("done before") == 4
    # interrupted: what a task has published is not done again
    (out / "completions/graph.json").unlink()
    assert dry()[1].startswith("graph     to do: ")
    assert dry()[1].endswith(" tasks of it are done")
    # rows in another order: the footer of a parquet file is the same, its content is not
    first = folder / "00001.parquet"
    whole = first.read_bytes()
    table = pq.read_table(first)
    pq.write_table(table.take(np.arange(table.num_rows)[::-1]), first)
    assert main([*words, "--dry-run"]) == 1
    assert "input file 00001.parquet has changed" in capsys.readouterr().err
    first.write_bytes(whole)
    with np.load(folder / "00000.npz") as arrays:
        held = {name: arrays[name][::-1] for name in arrays.files}
    np.savez(folder / "00000.npz", **held)
    assert main([*words, "--dry-run"]) == 1
    assert "input file 00000.npz has changed" in capsys.readouterr().err


def test_a_stage_that_cannot_continue_is_shown_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pools.write(tmp_path / "m", pools.make(300, 8))
    words = ["run", "--metadata-dir", str(folder), "--out-dir", str(tmp_path / "o")]
    assert main([*words, "--n-neighbors", "2"]) == 0
    (tmp_path / "o/completions/graph.json").unlink()
    capsys.readouterr()
    assert main([*words, "--n-neighbors", "3"]) == 0
    assert "graph     begins again: n_neighbors was 2 and is 3" in capsys.readouterr().out


def test_each_retry_is_shown_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Folder(str(tmp_path))
    logs.append(out, logs.DRIVER, "run", stages=["rank"])
    logs.append(out, logs.DRIVER, "stage started", stage="rank")
    logs.append(out, logs.DRIVER, "task tried again", stage="rank", task="0", reason="no memory")
    lines, found = status_of(tmp_path, capsys)
    assert any(line.startswith("rank tried again: 0 at ") for line in lines)
    assert any(line.endswith(": no memory") for line in lines)
    for number in range(7):
        found_settings = {"partitions": f"partitions {number}", "reason": f"reason {number}"}
        logs.append(out, logs.DRIVER, "worker lost", stage="rank", **found_settings)
    lines, found = status_of(tmp_path, capsys)
    assert found["stages"][0]["tried_again"] == 8
    assert len(found["stages"][0]["retries"]) == 8
    shown = [line for line in lines if line.startswith("rank tried again: ")]
    assert [line.rpartition(": ")[2] for line in shown] == [f"reason {n}" for n in range(2, 7)]
