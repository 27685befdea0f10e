"""Fixtures for all tests: one small Ray, which commands use instead of starting their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from d2filter.cli import commands

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray ends workers that are idle for a second if there are more of them than CPUs; the next command
# would have to start new ones, import everything again, and load the model again
os.environ.setdefault("RAY_num_workers_soft_limit", "8")
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "3600000")
# Ray lowers the priority of its workers; beside other tests, waiting tests would time out
os.environ.setdefault("RAY_worker_niceness", "0")

# compiled functions are slow the first time; shared machines are slow at times
hypothesis.settings.register_profile("d2filter", deadline=None, print_blob=True)
hypothesis.settings.load_profile("d2filter")

# the slowest files, slowest first: a slow file that starts late would keep one process busy while
# the others have finished (xdist orders files by their number of tests, and these have few; see
# --dist and --no-loadscope-reorder in pyproject.toml)
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
    "e2e/test_imports.py",
    "tools/test_report.py",
    "e2e/test_groups.py",
    "e2e/test_run.py",
    "e2e/test_run_directory.py",
    "e2e/test_shards.py",
    "e2e/test_storage.py",
    "stages/test_embed.py",
    "engine/test_runner.py",
    "engine/test_shared_folder.py",
    "algorithm/greedy/test_supersteps.py",
    "algorithm/knn/test_sketch.py",
    "algorithm/test_compiled.py",
    "formats/test_fuzz.py",
    "tools/test_demo.py",
    "e2e/test_methods.py",
    "e2e/test_scores.py",
    "tools/test_advise.py",
    "tools/test_alerts.py",
    "tools/test_page.py",
    "tools/test_explain.py",
    "tools/test_plan.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the slowest files first."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        # without monitors of worker logs and of new machines, which would use a tenth of a CPU
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


_write_report = commands.write_report


@pytest.fixture(scope="session", autouse=True)
def few_reports() -> Iterator[None]:
    """Runs write no report, because a few hundred reports take minutes. `reports` turns them on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "write_report", lambda work: None)
        yield


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test write a report."""
    monkeypatch.setattr(commands, "write_report", _write_report)
