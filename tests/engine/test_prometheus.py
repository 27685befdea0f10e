"""Figures of a run at the endpoint that Prometheus reads."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support import pools

from d2filter.cli.main import main


def scraped(node: dict[str, object]) -> str:
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return ""


def value(text: str, name: str, tag: str = "") -> float | None:
    found = re.search(rf"^ray_{name}\{{[^}}]*{re.escape(tag)}[^}}]*\}} (\S+)$", text, re.MULTILINE)
    return None if found is None else float(found[1])


@pytest.mark.usefixtures("cluster")
def test_samples_recall_and_final_scores_are_at_the_nodes_endpoint(tmp_path: Path) -> None:
    import ray

    pools.write(tmp_path / "m", pools.make(300, 6))
    words = ["run", "--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    assert main([*words, "--n-neighbors", "2", "--partitions", "2"]) == 0
    (node,) = (node for node in ray.nodes() if node["Alive"])
    until = time.monotonic() + 60  # processes tell their node now and then
    while True:
        text = scraped(node)
        final = value(text, "d2filter_share_final")
        recall = value(text, "d2filter_recall", 'k="2"')
        samples = value(text, "d2filter_samples_total", 'stage="catalog"')
        if None not in (final, recall, samples) or time.monotonic() > until:
            break
        time.sleep(1)
    assert final == 1.0
    assert recall is not None
    assert 0.9 < recall <= 1.0
    assert samples is not None
    assert samples >= 300  # other tests of this process may have read some too
