"""Positions of samples in new shards, compared with a loop over all samples."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d2filter.formats.subset import DTYPE
from d2filter.stages.reshard.layout import Placing

UIDS = st.tuples(st.integers(0, 2), st.integers(0, 4))


def columns(samples: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array(samples, np.uint64).reshape(-1, 2)
    return pairs[:, 0].copy(), pairs[:, 1].copy()


@given(
    st.lists(UIDS, max_size=12),
    st.lists(st.lists(UIDS, max_size=8), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from([None, 0, 7]),
)
def test_a_new_shard_is_settled_as_soon_as_its_samples_are_known(
    asked: list[tuple[int, int]], indexes: list[list[tuple[int, int]]], size: int, seed: int | None
) -> None:
    subset = np.sort(np.array(asked, DTYPE))
    indexes = [[uid for uid in index if uid in asked] for index in indexes]
    placing = Placing(subset, shard_size=size, shuffle=seed)
    settled, expected = [], []
    seen: set[tuple[int, int]] = set()
    for number, index in enumerate(indexes):
        settled += placing.add(*columns(index))
        for row, uid in enumerate(index):
            if uid not in seen:
                seen.add(uid)
                expected += [(number, row, copy, *uid) for copy in range(asked.count(uid))]
        assert len(settled) == (0 if seed is not None else len(expected) // size)
    settled += placing.close()
    got = [
        [
            (*place, *uid)
            for *place, uid in zip(
                s.index.tolist(), s.row.tolist(), s.copy.tolist(), own.tolist(), strict=True
            )
        ]
        for s, own in zip(settled, placing.ids, strict=True)
    ]
    flat = [sample for shard in got for sample in shard]
    assert sorted(flat) == sorted(expected)
    if seed is None:
        assert flat == expected
    assert [len(shard) for shard in got[:-1]] == [size] * (len(got) - 1)
    gone = sorted(uid for uid in asked if uid not in seen)
    assert placing.missing == len(gone)
    assert placing.first_missing == (f"{gone[0][0]:016x}{gone[0][1]:016x}" if gone else "")
    assert placing.repeated == sum(map(len, indexes)) - len(seen)


def test_a_shuffle_does_not_depend_on_the_order_of_discovery() -> None:
    asked = [(0, n) for n in range(20)]
    subset = np.array(asked, DTYPE)
    orders = []
    for indexes in ([asked], [asked[10:], asked[:10]], [[], asked[::-1]]):
        placing = Placing(subset, shard_size=6, shuffle=3)
        for index in indexes:
            placing.add(*columns(index))
        placing.close()
        orders.append([own.tolist() for own in placing.ids])
    assert orders[0] == orders[1] == orders[2]
    assert list(itertools.chain(*orders[0])) != asked
