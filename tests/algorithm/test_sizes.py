"""Memory of rows, and the number of partitions that follows from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.algorithm import sizes

GB = 10**9


def test_a_pool_that_fits_a_node_has_one_partition_and_a_larger_one_as_many_as_it_needs() -> None:
    one = sizes.plan_partitions(10**6, 1000, nodes=1, cpus=4, node_bytes=8 * GB)
    assert one == sizes.PartitionPlan(partitions=1, memory=0)
    assert sizes.plan_partitions(10**6, 1000, nodes=3, cpus=4, node_bytes=8 * GB).partitions == 3
    many = sizes.plan_partitions(10**7, 1000, nodes=1, cpus=4, node_bytes=8 * GB)
    assert many.memory == 2 * GB
    assert many.partitions == 13


@given(
    st.integers(1, 10**9), st.integers(100, 10_000), st.integers(1, 64), st.integers(1, 64),
    st.integers(2 * GB, 512 * GB), st.sampled_from([0, GB, 8 * GB]),
)  # fmt: skip
def test_tasks_of_one_node_never_request_less_memory_than_they_hold(
    rows: int, row: int, nodes: int, cpus: int, node_bytes: int, memory: int
) -> None:
    cut = sizes.plan_partitions(
        rows, row, nodes=nodes, cpus=cpus, node_bytes=node_bytes, memory=memory
    )
    taken = sizes.task_memory(rows / cut.partitions, row)
    assert taken <= (cut.memory or node_bytes) + 1


@pytest.mark.parametrize("wanted", [2, 3, 50])
def test_requested_partitions_request_the_memory_that_they_hold(wanted: int) -> None:
    cut = sizes.plan_partitions(10**7, 1000, nodes=1, cpus=4, node_bytes=16 * GB, partitions=wanted)
    assert cut.partitions == wanted
    held = sizes.task_memory(10**7 / wanted, 1000)
    assert cut.memory == max(2 * sizes.SEARCHING, min(held, 16 * GB))
    # not so many at once that they hold more than the node
    at_once = max(1, 16 * GB // cut.memory)
    assert at_once * held <= 16 * GB or at_once == 1
