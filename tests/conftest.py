"""One small Ray for the whole test run; commands that would start Ray use it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

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
