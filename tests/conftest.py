"""One small Ray for the whole test run; commands that would start Ray use it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

from d2filter import cli

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

# compiled functions are slow the first time; shared machines are slow at times
hypothesis.settings.register_profile("d2filter", deadline=None, print_blob=True)
hypothesis.settings.load_profile("d2filter")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    import ray

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
