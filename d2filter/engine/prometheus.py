"""Reports figures of a running command at Ray's Prometheus endpoint.

ray_d2filter_samples_total{stage}   counter: samples that the tasks of a stage have processed;
                                    rate() of it is samples per second
ray_d2filter_recall{k}              gauge: measured recall@k of the graph
ray_d2filter_share_final            gauge: share of the samples whose final score is known

Each process reports its own figures. Without Ray nothing is reported.
"""

from __future__ import annotations

import functools
from typing import Any


def count_samples(stage: str, done: int) -> None:
    """Add `done` samples to the count of a stage."""
    counter = _metric("Counter", "d2filter_samples", "Samples that went through", "stage")
    if counter is not None and done > 0:
        counter.inc(done, tags={"stage": stage})


def set_recall(k: int, recall: float) -> None:
    """Report the measured recall@k of the graph."""
    gauge = _metric("Gauge", "d2filter_recall", "Measured recall of the graph", "k")
    if gauge is not None:
        gauge.set(recall, tags={"k": str(k)})


def set_share_final(share: float) -> None:
    """Report the share of the samples whose score is final."""
    gauge = _metric("Gauge", "d2filter_share_final", "Share of samples with a final score")
    if gauge is not None:
        gauge.set(share)


def _metric(kind: str, name: str, summary: str, *tags: str) -> Any:
    import ray

    return _made(kind, name, summary, tags) if ray.is_initialized() else None


@functools.cache
def _made(kind: str, name: str, summary: str, tags: tuple[str, ...]) -> Any:
    from ray.util import metrics

    return getattr(metrics, kind)(name, description=summary, tag_keys=tags)
