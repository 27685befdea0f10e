"""Jobs on a real cluster: `ray start`, `ray job submit`, submitted code, a node that dies.

The tests share one cluster and run in this order.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import processes, ray_nodes, runs

from d2filter.formats import ranking
from d2filter.formats.paths import Folder

SETTINGS = ("d2-published", "d2-auto")
PAIRS = 100


@pytest.fixture(scope="module")
def cluster() -> Iterator[ray_nodes.Cluster]:
    found = ray_nodes.Cluster()
    yield found
    found.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    code: int
    output: str
    early: bool
    """whether it was still running when its first line came"""


def demo(cluster: ray_nodes.Cluster, out: Path, *, pairs: int = PAIRS) -> subprocess.Popen[str]:
    """Submit the demo, which first prints the place of its code."""
    words = ["demo", "--set", f"out-dir={out}", f"pairs={pairs}"]
    program = "import sys, d2filter; from jobs.run import main; print(d2filter.__file__); "
    return cluster.submit("python", "-c", f"{program}sys.exit(main({words!r}))")


def finish(job: subprocess.Popen[str]) -> Job:
    """Read what a job streams until it ends."""
    assert job.stdout is not None
    output, early = "", False
    for line in job.stdout:
        output += line
        if "drawn pairs" in line:
            early = job.poll() is None
    return Job(code=job.wait(), output=output, early=early)


def ranked(out: Path) -> dict[str, list[Any]]:
    """Every sample's line of a ranking, by uid: graph ids are left out, they tell partitions."""
    found = {}
    for part in ranking.iter_columns(
        Folder(str(out / "ranking")), ["uid_hi", "uid_lo", "difficulty", "forward", "final", "rank"]
    ):
        for row in zip(*part.values(), strict=True):
            found[f"{row[0]:016x}{row[1]:016x}"] = [value.item() for value in row[2:]]
    return found


def test_a_job_is_refused_where_nodes_do_not_share_its_folder(
    cluster: ray_nodes.Cluster, tmp_path: Path
) -> None:
    """And its line and its failure reach those who submitted it; so on any machine for another
    reason."""
    cluster.second.hide(tmp_path)
    job = finish(demo(cluster, tmp_path / "o", pairs=PAIRS if cluster.isolated else 5))
    assert job.code != 0
    (line,) = {line for line in job.output.splitlines() if line.startswith("d2filter: error: ")}
    if cluster.isolated:
        assert f"{tmp_path / 'o'} is not the same folder on all nodes" in line
        assert cluster.second.address in line
        assert not (tmp_path / "o/shards").exists()
    else:
        assert "pairs is 5" in line
    # its code was shipped: the tree that it was copied from is elsewhere, and hidden
    (code,) = {line for line in job.output.splitlines() if line.endswith("d2filter/__init__.py")}
    assert "working_dir_files" in code
    assert not Path(code).is_relative_to(ray_nodes.ROOT)


@pytest.fixture(scope="module")
def whole(cluster: ray_nodes.Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """The demo, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "o"
    return out, finish(demo(cluster, out))


def test_a_submitted_job_streams_its_output_and_runs_on_both_nodes(
    cluster: ray_nodes.Cluster, whole: tuple[Path, Job]
) -> None:
    out, job = whole
    assert job.code == 0, job.output
    assert job.early
    assert "half kept, judged by the truth" in job.output
    for setting in SETTINGS:
        assert len(np.load(out / setting / "subset.npy")) == PAIRS // 2
    logs = [json.loads(line) for path in out.rglob("logs/*/*.jsonl") for line in path.open()]
    at = {line["node"] for line in logs if line["event"] == "started"}
    assert at == {cluster.head.name, cluster.second.name}


def lose_second(cluster: ray_nodes.Cluster, job: subprocess.Popen[str], marks: Path) -> None:
    """Kill the second node at work, as soon as tasks have left marks."""

    def due() -> bool:
        if job.poll() is not None:
            pytest.fail(f"over before the second node was at work: {finish(job).output}")
        return any(marks.parent.glob(marks.name)) and cluster.at_work(cluster.second)

    processes.wait_for(due, "what comes before", 240.0)
    cluster.second.end()


def test_a_job_whose_second_node_dies_gives_the_same_bits(
    cluster: ray_nodes.Cluster, whole: tuple[Path, Job], tmp_path: Path
) -> None:
    """A named run on the metadata that the demo has made, in as many partitions."""
    out, first = tmp_path / "o", whole[0] / SETTINGS[0]
    given = {"metadata-dir": first / "metadata", "arch": "tiny", "out-dir": out, "fraction": 0.5}
    given.update({"partitions": 2, "memory-per-worker": "1GB"})
    words = [f"{name}={value}" for name, value in given.items()]
    job = cluster.submit("python", "-m", "jobs.run", "datacomp_small", "--set", *words)
    lose_second(cluster, job, out / "completions/graph/route-*")
    done = finish(job)
    assert done.code == 0, done.output
    found = runs.files(out)
    same = [n for n in found if n == "subset.npy" or n.startswith(("ranking/", "graph/"))]
    assert len(same) == 1 + 2 + 2
    assert {n: found[n] for n in same} == {n: (first / n).read_bytes() for n in same}


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_demo_whose_second_node_dies_while_it_embeds_gives_the_same_bits(
    cluster: ray_nodes.Cluster, whole: tuple[Path, Job], tmp_path: Path
) -> None:
    cluster.revive()
    out = tmp_path / "o"
    job = demo(cluster, out)
    lose_second(cluster, job, out / SETTINGS[0] / "completions/embed/*")
    done = finish(job)
    assert done.code == 0, done.output
    for setting in SETTINGS:
        here, there = out / setting, whole[0] / setting
        assert (here / "subset.npy").read_bytes() == (there / "subset.npy").read_bytes()
        # in one partition where there were two
        assert ranked(here) == ranked(there)
        assert len(ranked(here)) == PAIRS
    events = [json.loads(line) for line in (out / SETTINGS[0] / "logs/driver.jsonl").open()]
    assert any(event["event"] == "task tried again" for event in events)


def test_namespaces_are_available_where_they_are_required() -> None:
    """CI requires them, so that the tests above cannot become weaker there unnoticed."""
    if os.environ.get("D2FILTER_NAMESPACES") == "1":
        assert ray_nodes.namespaces()
