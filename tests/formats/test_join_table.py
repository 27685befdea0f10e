"""Tables by uid that are split into buckets on disk."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2filter.errors import InputError
from d2filter.formats import join_table
from d2filter.formats.paths import Folder


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32), n=st.integers(0, 60), blocks=st.integers(1, 4),
    buckets=st.integers(1, 5), tasks=st.integers(1, 5),
)  # fmt: skip
def test_a_table_equals_a_dictionary_for_any_number_of_buckets(
    seed: int,
    n: int,
    blocks: int,
    buckets: int,
    tasks: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rng = np.random.default_rng(seed)
    hi = rng.integers(0, 4, n).astype(np.uint64) << np.uint64(62)
    lo = rng.integers(0, 12, n).astype(np.uint64)
    values = (lo.astype(np.float32) + hi.astype(np.float32)) / 7
    values[lo == 3] = np.nan  # a repeated uid may have no value twice
    folder = Folder(str(tmp_path_factory.mktemp("joined")))
    cut = [
        (hi[rows], lo[rows], [values[rows], -values[rows]])
        for rows in np.array_split(np.arange(n), blocks)
    ]
    bounds = [at * buckets // tasks for at in range(tasks + 1)]
    rows = sum(
        join_table.gather(folder, "t", cut, "a table", ["v", "w"], buckets, first, end)
        for first, end in itertools.pairwise(bounds)
    )
    known = {(int(a), int(b)): float(v) for a, b, v in zip(hi, lo, values, strict=True)}
    assert rows == len(known)
    join_table.publish(folder, "t", buckets=buckets, columns=["v", "w"], rows=rows)
    table = join_table.read(folder, "t")
    asked_hi = np.repeat(np.arange(4, dtype=np.uint64) << np.uint64(62), 14)
    asked_lo = np.tile(np.arange(14, dtype=np.uint64), 4)
    there, found = table.find(asked_hi, asked_lo)
    for at, uid in enumerate(zip(asked_hi.tolist(), asked_lo.tolist(), strict=True)):
        assert there[at] == (uid in known)
        expected = np.float32(known.get(uid, np.nan))
        assert np.array_equal(found["v"][at], expected, equal_nan=True)
        assert np.array_equal(found["w"][at], -expected, equal_nan=True)


def test_a_table_in_an_object_store_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder("memory://joined-once")
    one = np.ones(1, np.uint64)
    for value in (0.5, 0.25):
        join_table.gather(
            folder, "t", [(one, one, [np.full(1, value, np.float32)])], "t", ["v"], 1, 0, 1
        )
        join_table.publish(folder, "t", buckets=1, columns=["v"], rows=1)
        table = join_table.read(folder, "t")
        assert table.find(one, one)[1]["v"].tolist() == [value]
        with monkeypatch.context() as patch:
            patch.setattr(join_table, "read_array", None)  # would fail if anything were read
            assert table.find(one, one)[1]["v"].tolist() == [value]


def test_a_uid_with_two_values_is_refused(tmp_path: Path) -> None:
    hi, lo = np.array([1, 0, 1], np.uint64), np.array([5, 5, 5], np.uint64)
    block = (hi, lo, [np.array([0.5, 0.5, 0.75], np.float32)])
    with pytest.raises(InputError) as error:
        join_table.gather(Folder(str(tmp_path)), "t", [block], "score-file x", ["dfn"], 3, 0, 3)
    said = str(error.value)
    assert "score-file x: uid 00000000000000010000000000000005 has 0.5 and 0.75" in said
    assert "column dfn" in said
