"""Sums of scores: parsing, percentile ranks, and addition in float64."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.algorithm import quantile
from d2filter.algorithm.scores import terms
from d2filter.algorithm.scores.terms import Term
from d2filter.errors import UsageError

names = st.sampled_from(["a", "clip_score", "rank", "x.y", "a column", "dfn-score", "é"])
weights = st.one_of(
    st.sampled_from([1.0, -1.0, 0.7, -2.0, 0.0]),
    st.floats(-1e30, 1e30, allow_nan=False, allow_infinity=False),
)
some_terms = st.lists(
    st.builds(Term, name=names, weight=weights, ranked=st.booleans()), min_size=1, max_size=4
)


@given(some_terms)
def test_the_canonical_text_of_terms_parses_to_the_same_terms(given_terms: list[Term]) -> None:
    text = terms.canonical(given_terms)
    assert terms.parse(text) == tuple(given_terms)
    assert terms.canonical(terms.parse(re.sub(r"(?<!e)\+", " +  ", text))) == terms.canonical(
        terms.parse(text)
    )


def test_terms_are_read_as_they_are_written() -> None:
    assert terms.parse("0.7*clip_score + .3*rank( el2n )-x") == (
        Term(name="clip_score", weight=0.7),
        Term(name="el2n", weight=0.3, ranked=True),
        Term(name="x", weight=-1.0),
    )
    assert terms.canonical(terms.parse(" 0.70*a - 2.0*b ")) == "0.7*a-2*b"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b",
        "3*",
        "rank(a",
        "a)",
        "*a",
        "a++b",
        "0.7 clip",
        "1e999*a",
        "a*0.7",
        "a+",
        '"a',
    ],
)
def test_other_text_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(UsageError, match="unreadable from"):
        terms.parse(text)


@given(some_terms, st.integers(0, 2**32), st.integers(1, 30))
def test_a_sum_is_that_of_python_floats(given_terms: list[Term], seed: int, n: int) -> None:
    values = np.random.default_rng(seed).standard_normal((len(given_terms), n)).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = []
        for row in range(n):
            total = given_terms[0].weight * float(values[0, row])
            for term, column in zip(given_terms[1:], values[1:], strict=True):
                total = total + term.weight * float(column[row])
            expected.append(np.float64(total).astype(np.float32))
    assert terms.combined(given_terms, list(values)).tolist() == [float(v) for v in expected]


@given(
    st.lists(st.lists(st.sampled_from([-2.5, -0.0, 0.0, 1e-30, 0.3, 7.0])), min_size=1, max_size=7),
    st.integers(0, 2**32),
)
def test_percentile_ranks_do_not_depend_on_the_parts(parts: list[list[float]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [np.array(part, np.float32) for part in parts]
    arrays[0] = np.concatenate([arrays[0], rng.standard_normal(9).astype(np.float32)])
    whole = np.concatenate(arrays)
    key, count = terms.merged(quantile.distinct(part) for part in arrays)
    below = np.cumsum(count) - count
    found = terms.percentile(quantile.keys(whole), (key, count), below, whole.size)
    lower = (whole[None, :] < whole[:, None]).sum(axis=1)
    same = (whole[None, :] == whole[:, None]).sum(axis=1)
    assert found.tolist() == ((2 * lower + same) / (2 * whole.size)).tolist()
    one_key, one_count = quantile.distinct(whole)
    assert (key.tolist(), count.tolist()) == (one_key.tolist(), one_count.tolist())
    order = rng.permutation(len(arrays))
    again = terms.merged(quantile.distinct(arrays[at]) for at in order)
    assert again[0].tolist() == key.tolist()
