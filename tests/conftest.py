"""One small Ray for the whole test run; commands that would start Ray use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from d2filter.cli import main as cli

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray ends workers that idle for a second where there are more of them than CPUs; the next command
# would start others, import everything again, and load the model again
os.environ.setdefault("RAY_num_workers_soft_limit", "8")
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "3600000")
# Ray gives way to other programs, here to other tests: those that wait for a task would time out
os.environ.setdefault("RAY_worker_niceness", "0")

# compiled functions are slow the first time; shared machines are slow at times
hypothesis.settings.register_profile("d2filter", deadline=None, print_blob=True)
hypothesis.settings.load_profile("d2filter")

# files that take longest, longest first: one that begins late would keep one process busy when the
# others have nothing left (xdist goes by the number of tests, and these have few; see --dist and
# --no-loadscope-reorder in pyproject.toml)
LONGEST = (
    "e2e/test_kill_points.py",
    "e2e/test_faults.py",
    "e2e/test_cluster.py",
    "e2e/test_partitions.py",
    "e2e/test_ending.py",
    "e2e/test_ranking.py",
    "e2e/test_web.py",
    "e2e/test_clip_scores.py",
    "e2e/test_reshard.py",
    "e2e/test_groups.py",
    "e2e/test_run.py",
    "e2e/test_shards.py",
    "tools/test_demo.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        # nobody reads logs of workers here, and no machine is to be added: these would take a tenth
        # of the time of a CPU
        for name in ("start_log_monitor", "start_monitor"):
            patch.setattr(f"ray._private.node.Node.{name}", lambda node: None, raising=False)
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80_000_000,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield
    ray.shutdown()


_write_report = cli._write_report


@pytest.fixture(scope="session", autouse=True)
def few_reports() -> Iterator[None]:
    """Runs write no report: a few hundred of them would take minutes. `reports` tests them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_write_report", lambda work: None)
        yield


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test write their report."""
    monkeypatch.setattr(cli, "_write_report", _write_report)
