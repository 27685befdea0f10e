"""Arrays that `d2filter.rank` accepts, and those that it refuses with one line."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import d2filter
from d2filter import arrays
from d2filter.errors import D2FilterError, InputError, UsageError

ROWS = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float16).astype(np.float32)
SCORES = np.random.default_rng(1).integers(0, 99, 12)


class Column:
    """A column of a data frame, as pandas and Polars give it out."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def to_numpy(self) -> Any:
        return self.values


def objects(rows: Any) -> np.ndarray:
    out = np.empty(len(rows), object)
    for at, row in enumerate(rows):
        out[at] = row
    return out


def arrow(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


@pytest.mark.parametrize(
    "rows",
    [
        ROWS.tolist(),
        tuple(ROWS),
        [ROWS],
        ROWS.astype(np.float64),
        ROWS.astype(np.longdouble),
        np.asfortranarray(ROWS),
        torch.tensor(ROWS),
        torch.tensor(ROWS, requires_grad=True),
        torch.tensor(ROWS, dtype=torch.float16),
        [torch.tensor(row) for row in ROWS],
        Column(ROWS),
        Column(objects(ROWS)),
        Column(objects(ROWS.tolist())),
        [Column(objects(ROWS))],
        arrow(ROWS),
        pa.array(ROWS.tolist()),
        pa.chunked_array([arrow(ROWS[:5]), arrow(ROWS[5:])]),
        arrow(np.concatenate([ROWS[:3], ROWS]))[3:],
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_of_any_kind_are_ranked_alike(rows: Any) -> None:
    expected = d2filter.rank(ROWS, SCORES.astype(np.float32), n_neighbors=2)
    found = d2filter.rank(rows, SCORES, n_neighbors=2)
    assert found.final.tolist() == expected.final.tolist()
    assert found.neighbors.tolist() == expected.neighbors.tolist()


@pytest.mark.parametrize(
    "scores",
    [
        SCORES.tolist(),
        SCORES.astype(np.uint8),
        torch.tensor(SCORES),
        torch.tensor(SCORES, dtype=torch.float32, requires_grad=True),
        torch.tensor(SCORES, dtype=torch.bfloat16),
        pa.array(SCORES),
        pa.chunked_array([SCORES[:2], SCORES[2:]]),
        Column(SCORES),
        objects(SCORES.tolist()),
        objects([Decimal(int(s)) for s in SCORES]),
    ],
    ids=lambda scores: type(scores).__name__,
)
def test_scores_of_any_array_type_are_accepted(scores: Any) -> None:
    assert arrays.difficulty(scores).tolist() == SCORES.tolist()


def test_bfloat16_integers_and_several_modalities_are_accepted() -> None:
    half = torch.tensor(ROWS).bfloat16()
    expected = d2filter.rank(half.float().numpy(), SCORES)
    assert d2filter.rank(half, SCORES).final.tolist() == expected.final.tolist()
    whole = (ROWS * 50).astype(np.int8)
    expected = d2filter.rank(whole.astype(np.float32), SCORES)
    assert d2filter.rank(whole, SCORES).final.tolist() == expected.final.tolist()
    expected = d2filter.rank([ROWS, ROWS[:, ::-1]], SCORES)
    pair = torch.tensor(ROWS), arrow(np.ascontiguousarray(ROWS[:, ::-1]))
    assert d2filter.rank(pair, SCORES).final.tolist() == expected.final.tolist()
    labels = ["a", "b"] * 6
    expected = d2filter.rank(ROWS, SCORES, groups=labels)
    for groups in (pa.array(labels), Column(np.array(labels)), torch.tensor([0, 1] * 6)):
        found = d2filter.rank(ROWS, SCORES, groups=groups)
        assert found.rank.tolist() == expected.rank.tolist()
    uids = [f"{i:032x}" for i in range(12)]
    expected = d2filter.rank(ROWS, SCORES, uids_hex=uids)
    for given_ids in (pa.array(uids), np.array(uids), Column(objects(uids))):
        assert d2filter.rank(ROWS, SCORES, uids_hex=given_ids).rank.tolist() == (
            expected.rank.tolist()
        )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROWS.astype(complex), "embeddings has dtype complex128"),
        (ROWS.astype(str), "embeddings has dtype"),
        ("rows", "embeddings has dtype"),
        (None, "embeddings"),
        (ROWS[0], r"embeddings has shape \(4,\)"),
        ([[1.0, 2.0], [1.0]], "row 1 has length 1, row 0 has 2"),
        (Column(objects([[1.0, 2.0], [1.0]])), "row 1 has length 1, row 0 has 2"),
        (pa.array([[1.0], None, [2.0]]), "1 rows are missing, the first is row 1"),
        (pa.array([[1.0], [1.0, 2.0]]), "row 1 has length 2, row 0 has 1"),
        (np.ma.masked_array(ROWS, ROWS > 1), "some values are masked"),
        (Column(objects([None] * 12)), "embeddings"),
        (torch.eye(12).to_sparse(), "embeddings"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_values_that_are_not_rows_fail_with_one_line(rows: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as failed:
        d2filter.rank(rows, SCORES)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([2**24, 2**24 + 1], r"rows 0 and 1 become the same.*pass scores - scores.min\(\)"),
        ([0, 2**30, 2**30 + 1], "rows 1 and 2 become the same.*pass floats"),
        ([2**63 + 2, 2**63 + 1], "the same float32 value"),
        ([1.7e9, 1.7e9 + 5], "the same float32 value"),
        ([1e-60, 2e-60], "the same float32 value"),
        ([0.0, 1e39], "score is beyond .* first in row 1"),
        ([0.0, math.nan], "score is not finite in 1 rows, first in row 1"),
        ([0, None], "score is not finite in 1 rows, first in row 1"),
        (["0.5", "0.6"], "scores has dtype"),
        ([2**70, 1], "more than 64 bits"),
        ([[1.0], [2.0]], r"scores has shape \(2, 1\)"),
        (pa.array([1.0, None]), "score is not finite in 1 rows, first in row 1"),
    ],
    ids=str,
)
def test_scores_that_cannot_be_ranked_fail_with_one_line(scores: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as failed:
        d2filter.rank(ROWS[: len(scores)], scores)
    assert "\n" not in str(failed.value)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_integer_scores_keep_their_order_or_are_refused(values: list[int]) -> None:
    try:
        found = arrays.difficulty(values)
    except InputError:
        return
    for a, x in zip(values, found, strict=True):
        for b, y in zip(values, found, strict=True):
            assert (a < b) == (x < y)


def test_float_scores_that_lose_little_in_float32_are_accepted() -> None:
    scores = np.random.default_rng(0).random(200_000)
    assert np.unique(scores.astype(np.float32)).size < np.unique(scores).size
    assert (arrays.difficulty(scores) == scores.astype(np.float32)).all()


def test_a_pool_with_fewer_than_k_other_samples_has_shorter_lists() -> None:
    all_of_them = d2filter.rank(ROWS, SCORES, n_neighbors=11)
    for k in (12, 10**6, 10**30, np.int64(2**62)):
        found = d2filter.rank(ROWS, SCORES, n_neighbors=k)
        assert found.neighbors.shape == (12, 11)
        assert found.final.tolist() == all_of_them.final.tolist()
    alone = d2filter.rank(ROWS[:1], SCORES[:1], n_neighbors=10**9)
    assert alone.neighbors.tolist() == [[-1]]
    grouped = d2filter.rank(ROWS, SCORES, n_neighbors=10**9, groups=[0] * 5 + [1] * 7)
    assert (grouped.neighbors >= 0).sum(axis=1).tolist() == [4] * 5 + [6] * 7


def test_a_gamma_that_overflows_in_its_unit_is_refused() -> None:
    near = ROWS.copy()
    near[:] = near[0]
    near[::2, 0] *= np.float32(1.01)
    with pytest.raises(UsageError, match=r"gamma 1e\+307 is too large"):
        d2filter.rank(near, SCORES, gamma=1e307, kernel="rbf", gamma_scale="median", n_neighbors=8)
    assert d2filter.rank(
        near, SCORES, gamma=1e307, kernel="rbf", n_neighbors=8, collapse_copies=None
    ).final.min() > -(2**62)


ODD = st.one_of(
    st.sampled_from(
        [0, 1, 3, -1, 10**9, 10**30, 10**400, -(10**30), True, None, "1", "x", 1j, [1]]
    ),
    st.sampled_from([0.5, 1e-320, 1e38, 1e300, -1e300, math.nan, math.inf, -math.inf]),
    st.sampled_from([np.float32(0.5), np.int64(2), Decimal("0.3"), Decimal("1e-400")]),
    st.floats(),
    st.integers(),
)
RANKING = ["n_neighbors", "gamma", "gamma_forward", "cut_hardest", "collapse_copies"]
RANKING += ["target_recall", "seed", "exact_below"]


@settings(max_examples=60)
@given(
    st.dictionaries(st.sampled_from(RANKING), ODD, max_size=3),
    st.dictionaries(st.sampled_from(["fraction", "size", "min_score"]), ODD, max_size=2),
    st.sampled_from(["none", "median"]),
)
def test_any_numbers_give_a_ranking_or_an_error_of_one_line(
    options: dict[str, Any], selection: dict[str, Any], scale: str
) -> None:
    try:
        found = d2filter.rank(ROWS, SCORES, gamma_scale=scale, **options)
        assert sorted(found.rank.tolist()) == list(range(12))
        rows = found.select(**selection)
    except D2FilterError:
        return
    assert len(rows) <= 12
