"""The greedy on a whole graph and its certificate, compared with the sequential definition."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from support import greedy_in_one_piece as greedy
from support import oracle
from support.graph_strategies import Case, graphs

from d2filter.algorithm.greedy import certificate, halo, in_memory, messages, schemes


@settings(max_examples=400)
@given(graphs())
def test_equals_the_sequential_oracle(case: Case) -> None:
    before = case.x.copy()
    chosen = greedy.select_all(case.x, case.neighbors, case.weights)
    order, final, by = oracle.greedy(
        case.x.tolist(), case.uid, case.neighbors.tolist(), case.weights.tolist()
    )
    assert np.argsort(chosen.rank).tolist() == order
    assert chosen.final.tolist() == final
    assert chosen.suppressed_by.tolist() == by
    assert (case.x == before).all(), "the caller's scores were modified"


@settings(max_examples=100)
@given(graphs())
def test_narrow_row_numbers_change_nothing(case: Case) -> None:
    wide = greedy.select_all(case.x, case.neighbors, case.weights)
    narrow = greedy.select_all(case.x, case.neighbors.astype(np.int32), case.weights)
    assert (wide.rank == narrow.rank).all()
    assert (wide.final == narrow.final).all()


@settings(max_examples=200)
@given(graphs())
def test_the_order_of_rows_changes_nothing(case: Case) -> None:
    n = len(case.uid)
    difficulty = (case.x % 997).astype(np.float32)
    shuffle = np.random.default_rng(n).permutation(n)
    place = np.argsort(shuffle)

    def rank(rows: np.ndarray, lists: np.ndarray) -> in_memory.RankedGraph:
        return in_memory.rank_graph(
            case.hi[rows],
            case.lo[rows],
            difficulty[rows],
            lists,
            case.sqdist[rows],
            scheme=schemes.Scheme(gamma_forward=0.5, gamma_reverse=2.0),
        )

    plain = rank(np.arange(n), case.neighbors)
    moved_lists = np.where(case.neighbors >= 0, place[case.neighbors], -1)[shuffle]
    moved = rank(shuffle, moved_lists)
    assert (moved.rank[place] == plain.rank).all()
    assert (moved.final[place] == plain.final).all()
    assert (moved.forward[place] == plain.forward).all()
    by = moved.suppressed_by[place]
    assert (np.where(by >= 0, shuffle[by], -1) == plain.suppressed_by).all()


def test_saturates_instead_of_overflowing() -> None:
    senders = 5
    x = np.array([-(2**62) + 1] + [2**62 - 1] * senders, np.int64)
    neighbors = np.array([[-1]] + [[0]] * senders)
    weights = np.ones((senders + 1, 1), np.float32)
    chosen = greedy.select_all(x, neighbors, weights)
    assert chosen.final[0] == messages.FLOOR
    assert chosen.suppressed_by[0] == 1


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(lambda rng, n: rng.random(n), id="even"),
        pytest.param(lambda rng, n: np.ones(n), id="constant"),
        pytest.param(lambda rng, n: rng.integers(0, 3, n) / 2, id="ties"),
        pytest.param(lambda rng, n: rng.pareto(0.3, n).clip(0, 2**20), id="outliers"),
        pytest.param(lambda rng, n: np.where(rng.random(n) < 0.5, 1e-9, 1.0), id="two-levels"),
        pytest.param(lambda rng, n: rng.normal(size=n), id="half-negative"),
    ],
)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
def test_any_distribution_of_scores_is_the_sequential_greedy(scores: Any, gamma: float) -> None:
    """Thousands of buckets; the certificate is the oracle."""
    n, k = 30_000, 4
    rng = np.random.default_rng(7)
    neighbors = (np.arange(n)[:, None] + 1 + rng.integers(0, 40, (n, k)).cumsum(axis=1)) % n
    neighbors[:, 1:][neighbors[:, 1:] == neighbors[:, :-1]] = -1
    weights = np.exp(-gamma * np.sort(rng.random((n, k)), axis=1)).astype(np.float32)
    x = (scores(rng, n) * messages.ONE).astype(np.int64)
    chosen = greedy.select_all(x, neighbors, weights)
    source, column = np.nonzero(neighbors >= 0)
    found = certificate.breaches(
        forward=x,
        final=chosen.final,
        rank=chosen.rank,
        precedence=np.arange(n),
        edges=(source, neighbors[source, column], weights[source, column]),
        suppressed_by=chosen.suppressed_by,
    )
    assert found == (0, 0, 0)
    order = np.argsort(chosen.rank)
    assert (np.diff(chosen.final[order]) <= 0).all()


def test_the_forward_sum_of_a_hub_of_millions_saturates() -> None:
    edges = 2**22
    start = np.array([0, edges, edges], np.int64)
    target = np.ones(edges, np.int32)
    found = messages.gather(np.ones(2), start, target, np.ones(edges, np.float32))
    assert found.tolist() == [messages.CEILING, 0]
    chosen = greedy.select_all(
        schemes.Scheme().forward_scores(np.ones(2), found),
        np.array([[1], [-1]]),
        np.ones((2, 1), np.float32),
    )
    assert chosen.final.tolist() == [messages.CEILING + messages.ONE, messages.FLOOR // 2]


def test_a_long_descending_chain_ends() -> None:
    n = 20_000
    x = np.arange(n, 0, -1).astype(np.int64) * 2**30
    neighbors = np.append(np.arange(1, n), -1)[:, None]
    chosen = greedy.select_all(x, neighbors, np.full((n, 1), 1e-3, np.float32))
    assert sorted(chosen.rank.tolist()) == list(range(n))
    assert chosen.rank[0] == 0


def test_a_hub_with_many_in_edges_takes_no_quadratic_time() -> None:
    n = 200_000
    rng = np.random.default_rng(0)
    x = rng.integers(1, 2**40, n)
    neighbors = np.zeros((n, 1), np.int64)
    neighbors[0, 0] = -1
    weights = np.full((n, 1), 0.5, np.float32)
    greedy.select_all(x[:10], neighbors[:10], weights[:10])  # compile
    started = time.perf_counter()
    chosen = greedy.select_all(x, neighbors, weights)
    # a second look at every in-edge for every message would be 4·10¹⁰ steps
    assert time.perf_counter() - started < 5
    order = np.argsort(-x[1:], kind="stable") + 1
    assert (np.argsort(chosen.rank)[: n // 4] == [i for i in order if i][: n // 4]).all()


@settings(max_examples=200)
@given(graphs())
def test_the_certificate_accepts_the_greedy_and_nothing_else(case: Case) -> None:
    n = len(case.uid)
    chosen = greedy.select_all(case.x, case.neighbors, case.weights)
    rows = np.arange(n)
    source, column = np.nonzero(case.neighbors >= 0)

    def check(**changed: np.ndarray) -> tuple[int, int, int]:
        parts = {name: getattr(chosen, name) for name in ("final", "rank", "suppressed_by")}
        return certificate.breaches(
            forward=case.x,
            precedence=rows,
            edges=(source, case.neighbors[source, column], case.weights[source, column]),
            **{**parts, **changed},
        )

    assert check() == (0, 0, 0)
    off = chosen.final.copy()
    off[n // 2] -= 1
    assert check(final=off) != (0, 0, 0)
    other = chosen.suppressed_by.copy()
    other[n // 2] = -1 if other[n // 2] >= 0 else 0
    assert check(suppressed_by=other) == (0, 0, 1)


def test_the_certificate_finds_a_sample_that_was_selected_too_late() -> None:
    # 0 → 1 with weight 1: the greedy takes 1 (the better one) first and nothing is lowered
    forward = np.array([10, 20], np.int64)
    edge = (np.array([0]), np.array([1]), np.ones(1, np.float32))
    # consistent with its own order (0 first lowers 1 to 10), sorted by key, and yet not greedy
    final, rank = np.array([10, 10], np.int64), np.array([0, 1], np.int64)
    by = np.array([-1, 0])
    found = certificate.breaches(forward, final, rank, np.arange(2), edge, by)
    assert found == (0, 1, 0)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0, 50.0])
def test_forward_pass_equals_the_oracle(gamma: float) -> None:
    rng = np.random.default_rng(3)
    n, k = 60, 4
    neighbors = np.stack([rng.choice(np.delete(np.arange(n), i), k, False) for i in range(n)])
    neighbors[5, 2:] = -1
    sqdist = np.sort(rng.random((n, k)).astype(np.float32), axis=1)
    sqdist[neighbors < 0] = np.inf
    difficulty = rng.normal(size=n).astype(np.float32)
    source, target, distance = halo.whole(neighbors, sqdist, both_ways=False)
    start = np.searchsorted(source, np.arange(n + 1))
    scores = messages.normalized(difficulty)
    scheme = schemes.Scheme(gamma_forward=gamma)
    gathered = messages.gather(scores, start, target, scheme.forward_weights(distance))
    x = scheme.forward_scores(scores, gathered)
    expected = oracle.forward(difficulty.tolist(), neighbors.tolist(), sqdist, gamma)
    assert x.tolist() == expected


def test_constant_difficulty_is_one_for_all() -> None:
    assert messages.normalized(np.full(3, 7.0, np.float32)).tolist() == [1.0, 1.0, 1.0]
