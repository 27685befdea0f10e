"""The greedy in partitions gives the same result for late, repeated or reordered states."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.graph_strategies import Case, graphs

from d2filter.algorithm.greedy import merge, messages, ranker, schemes
from d2filter.algorithm.greedy import supersteps as kernel

SCHEMES = [
    schemes.Scheme(kernel=kernel, forward=forward, reverse=reverse, gamma_reverse=0.5, floor=0.25)
    for kernel in schemes.KERNELS
    for forward in schemes.FORWARD
    for reverse in schemes.REVERSE
]


@pytest.fixture(autouse=True)
def narrow_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many buckets even where there is hardly anything to put into them."""
    monkeypatch.setattr(kernel, "IN_A_BUCKET", 2)


def symmetric(case: Case) -> Case:
    """One distance a pair, as between real samples: that of its first edge."""
    n, k = case.neighbors.shape
    known: dict[tuple[int, int], np.float32] = {}
    sqdist = case.sqdist.copy()
    for i in range(n):
        for c in range(k):
            j = int(case.neighbors[i, c])
            if j >= 0:
                pair = (min(i, j), max(i, j))
                sqdist[i, c] = known.setdefault(pair, case.sqdist[i, c])
    return Case(case.uid, case.x, case.neighbors, sqdist, case.weights)


def naive(
    case: Case,
    difficulty: np.ndarray,
    scheme: schemes.Scheme,
    both_ways: bool,
    is_demoted: np.ndarray | None = None,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """forward, final, order and suppressed_by, one sample after the other. late: samples without
    edges, that come last.
    """
    n, k = case.neighbors.shape
    is_demoted = np.zeros(n, bool) if is_demoted is None else is_demoted
    lists: list[dict[int, float]] = [{} for _ in range(n)]
    for i in range(n):
        for c in range(k):
            j = int(case.neighbors[i, c])
            if j >= 0 and not is_demoted[i] and not is_demoted[j]:
                lists[i][j] = float(case.sqdist[i, c])
                if both_ways:
                    lists[j][i] = float(case.sqdist[i, c])
    earnest = difficulty[~is_demoted]
    low, high = (float(earnest.min()), float(earnest.max())) if earnest.size else (0.0, 0.0)
    score = [1.0 if low == high else (float(d) - low) / (high - low) for d in difficulty]

    def sigma(i: int) -> float:
        there = [d for d in case.sqdist[i].tolist() if np.isfinite(d)]
        return max(there[-1] if there else 0.0, scheme.floor)

    def weight(i: int, j: int, sqdist: float, gamma: float) -> float:
        d = {
            "rbf": lambda: sqdist,
            "exp": lambda: float(np.sqrt(sqdist)),
            "local": lambda: float(np.float32(sqdist * sqdist / (sigma(i) * sigma(j)))),
        }[scheme.kernel]()
        return float(np.float32(np.exp(-gamma * d)))

    one = 2.0**40
    forward = []
    for i in range(n):
        own = round(score[i] * one)
        sums = sum(
            round(weight(i, j, d, scheme.gamma_forward) * score[j] * one)
            for j, d in lists[i].items()
        )
        forward.append(
            {"sum": own + sums, "product": round(score[i] * float(sums)), "none": own}[
                scheme.forward
            ]
        )
    width = max(1, *(len(row) for row in lists)) if n > 1 else max(1, len(lists[0]))
    neighbors = [list(row) + [-1] * (width - len(row)) for row in lists]
    weights = [
        [
            {
                "weighted": weight(i, j, d, scheme.gamma_reverse),
                "absolute": 1.0,
                "none": 0.0,
            }[scheme.reverse]
            for j, d in row.items()
        ]
        + [0.0] * (width - len(row))
        for i, row in enumerate(lists)
    ]
    forward = [-(2**62) if is_demoted[i] else x for i, x in enumerate(forward)]
    order, final, by = oracle.greedy(forward, case.uid, neighbors, weights)
    return forward, final, order, by


class Pool:
    """A case in partitions: graph ids are rows sorted by (partition, uid)."""

    def __init__(
        self,
        case: Case,
        difficulty: np.ndarray,
        home: np.ndarray,
        parts: int,
        is_demoted: np.ndarray | None = None,
    ) -> None:
        self.row = np.argsort(home, kind="stable")
        graph_id = np.argsort(self.row)
        self.starts = np.searchsorted(home[self.row], np.arange(parts + 1)).astype(np.int64)
        lists = np.where(case.neighbors >= 0, graph_id[case.neighbors], -1)[self.row]
        self.partitions = []
        self.rows = []
        for p in range(parts):
            some = self.row[self.starts[p] : self.starts[p + 1]]
            rows = ranker.PartitionRows(
                hi=case.hi[some],
                lo=case.lo[some],
                difficulty=difficulty[some],
                neighbors=lists[self.starts[p] : self.starts[p + 1]],
                sqdist=case.sqdist[some],
            )
            self.rows.append(rows)
            some_demoted = None if is_demoted is None else is_demoted[some]
            self.partitions.append(ranker.RankingPartition(rows, self.starts, p, some_demoted))

    def start_ranking(self, scheme: schemes.Scheme, both_ways: bool) -> None:
        for p, one in enumerate(self.partitions):
            cut = one.leaving_edges()
            for q, other in enumerate(self.partitions):
                if q != p:
                    other.add_edges(*cut.to(q))
        low = min(one.range()[0] for one in self.partitions)
        high = max(one.range()[1] for one in self.partitions)
        halos = []
        for one in self.partitions:
            ids = one.halo()
            owner = np.searchsorted(self.starts, ids, side="right") - 1
            known = [
                self.partitions[q].halo_data(ids[owner == q]) for q in range(len(self.partitions))
            ]
            halos.append(
                ranker.HaloSamples(
                    ids=ids,
                    hi=np.concatenate([k.hi for k in known]),
                    lo=np.concatenate([k.lo for k in known]),
                    difficulty=np.concatenate([k.difficulty for k in known]),
                    is_demoted=np.concatenate([k.is_demoted for k in known]),
                    reach=np.concatenate([k.reach for k in known]),
                )
            )
        for one, halo in zip(self.partitions, halos, strict=True):
            one.start_ranking(scheme, low, high, halo, both_ways=both_ways)

    def result(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """forward, final, order and suppressed_by by row of the case."""
        n = self.row.size
        forward, final, by = (np.empty(n, np.int64) for _ in range(3))
        keys = []
        for p, one in enumerate(self.partitions):
            some = self.row[self.starts[p] : self.starts[p + 1]]
            out = one.outcome()
            forward[some], final[some] = out.forward, out.final
            by[some] = np.where(out.suppressed_by >= 0, self.row[out.suppressed_by], -1)
            rows = self.rows[p]
            keys.append(merge.Keys(x=out.final, hi=rows.hi, lo=rows.lo))
        rank = np.empty(n, np.int64)
        rank[self.row] = np.concatenate(merged(keys))
        return forward.tolist(), final.tolist(), np.argsort(rank).tolist(), by.tolist()


def merged(keys: list[merge.Keys], ranges: int = 3) -> list[np.ndarray]:
    """Ranks of the keys of each partition, by ranges as the stage does it."""
    orders = [k.best_first() for k in keys]
    best = [k.take(o) for k, o in zip(keys, orders, strict=True)]
    at = merge.splitters([merge.sample(k, 4) for k in best], ranges)
    cuts = [merge.split_at(k, at) for k in best]
    out = [np.empty(k.x.size, np.int64) for k in keys]
    first = 0
    for r in range(at.x.size + 1):
        pieces = [k.take(slice(c[r], c[r + 1])) for k, c in zip(best, cuts, strict=True)]
        for p, ranks in enumerate(merge.ranks(pieces, first)):
            out[p][orders[p][cuts[p][r] : cuts[p][r + 1]]] = ranks
        first += sum(piece.x.size for piece in pieces)
    return out


def supersteps(partitions: list[ranker.RankingPartition], most: int = 10_000) -> int:
    """Everything arrives, once and in order."""
    for step in range(most):
        for one in partitions:
            one.advance()
        if not any(one.live() for one in partitions):
            return step + 1
        for p, one in enumerate(partitions):
            for q, other in enumerate(partitions):
                if q != p:
                    other.receive_states(one.states_for(q))
    raise AssertionError(f"not final after {most} supersteps")


def homes(n: int, parts: int, rng: np.random.Generator, locality: bool) -> np.ndarray:
    """Random homes, or runs of rows; some partitions may stay empty."""
    if locality:
        return np.sort(rng.integers(0, parts, n))
    return rng.integers(0, parts, n)


@settings(max_examples=200, deadline=None)
@given(
    case=graphs(),
    parts=st.sampled_from([1, 2, 5, 16]),
    scheme=st.sampled_from(SCHEMES),
    both_ways=st.booleans(),
    locality=st.booleans(),
    share_demoted=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 2**32),
)
def test_any_partitions_and_any_scheme_equal_the_sequential_definition(
    case: Case,
    parts: int,
    scheme: schemes.Scheme,
    both_ways: bool,
    locality: bool,
    share_demoted: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    case = symmetric(case)
    n = len(case.uid)
    difficulty = rng.integers(0, 5, n).astype(np.float32) / np.float32(rng.integers(1, 4))
    is_demoted = rng.random(n) < share_demoted
    is_demoted[rng.integers(n)] = False  # the share that is cut is always below 1
    pool = Pool(case, difficulty, homes(n, parts, rng, locality), parts, is_demoted)
    pool.start_ranking(scheme, both_ways)
    supersteps(pool.partitions)
    assert pool.result() == naive(case, difficulty, scheme, both_ways, is_demoted)


@settings(max_examples=200, deadline=None)
@given(
    case=graphs(), parts=st.sampled_from([2, 3, 5]), both_ways=st.booleans(),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_states_may_arrive_late_twice_or_out_of_order_and_partitions_may_restart(
    case: Case, parts: int, both_ways: bool, seed: int
) -> None:
    """Every message waits in a pool from which any is delivered, some twice; a partition goes back
    to an older snapshot of its own alone, and everything is sent to it again.
    """
    rng = np.random.default_rng(seed)
    case = symmetric(case)
    n = len(case.uid)
    difficulty = rng.random(n).astype(np.float32)
    pool = Pool(case, difficulty, rng.integers(0, parts, n), parts)
    scheme = schemes.Scheme(gamma_reverse=0.1)
    pool.start_ranking(scheme, both_ways)
    partitions = pool.partitions
    saved = [one.snapshot() for one in partitions]
    wire: list[tuple[int, ranker.States]] = []
    for _ in range(60):
        p = int(rng.integers(0, parts))
        partitions[p].advance()
        for q in range(parts):
            if q != p:
                wire.append((q, partitions[p].states_for(q)))
        for _ in range(int(rng.integers(0, 4))):
            if wire:
                at = int(rng.integers(0, len(wire)))
                q, states = wire[at]
                partitions[q].receive_states(states)
                if rng.random() < 0.7:
                    wire.pop(at)
        if rng.random() < 0.2:
            saved[p] = partitions[p].snapshot()
        if rng.random() < 0.15:
            partitions[p].restore(saved[p])
            for q in range(parts):
                if q != p:
                    wire.append((p, partitions[q].states_for(p, everything=True)))
    for q, states in wire:
        partitions[q].receive_states(states)
    supersteps(partitions)
    assert pool.result() == naive(case, difficulty, scheme, both_ways)


@pytest.mark.parametrize("parts", [1, 2, 16])
def test_a_long_descending_chain_over_partitions_ends(parts: int) -> None:
    """Each sample waits for the one before: the worst case for rounds and supersteps."""
    n = 600
    neighbors = np.append(np.arange(1, n), -1)[:, None]
    sqdist = np.full((n, 1), 6.0, np.float32)
    sqdist[-1] = np.inf
    case = Case(list(range(n)), np.zeros(n, np.int64), neighbors, sqdist, sqdist)
    difficulty = np.arange(n, 0, -1).astype(np.float32)
    pool = Pool(case, difficulty, np.arange(n) % parts, parts)
    scheme = schemes.Scheme()
    pool.start_ranking(scheme, False)
    supersteps(pool.partitions)
    assert pool.result() == naive(case, difficulty, scheme, False)


def test_a_hub_with_thousands_of_in_edges_from_everywhere() -> None:
    n, parts = 4000, 5
    rng = np.random.default_rng(0)
    neighbors = np.zeros((n, 1), np.int64)
    neighbors[0, 0] = -1
    sqdist = rng.random((n, 1)).astype(np.float32)
    sqdist[0] = np.inf
    case = Case(list(range(n)), np.zeros(n, np.int64), neighbors, sqdist, sqdist)
    difficulty = rng.random(n).astype(np.float32)
    for both_ways in (False, True):
        pool = Pool(case, difficulty, rng.integers(0, parts, n), parts)
        scheme = schemes.Scheme()
        pool.start_ranking(scheme, both_ways)
        supersteps(pool.partitions)
        assert pool.result() == naive(case, difficulty, scheme, both_ways)


def test_a_hub_whose_score_falls_often_takes_no_quadratic_time() -> None:
    """20,000 better samples wait for another partition, the hub for them, and 100,000 worse ones
    for the hub. Then the better ones lower it one by one.
    """
    better, worse = 20_000, 100_000
    m = better + worse + 2
    hub, far = m - 2, m - 1
    lists = [[hub, far]] * better + [[hub]] * worse + [[], []]
    start = np.cumsum([0, *map(len, lists)])
    target = np.array([j for one in lists for j in one], np.int32)
    own = np.ones(m, np.bool_)
    own[far] = False
    graph = kernel.make_graph(own, start, target, np.full(target.size, 1e-6, np.float32))
    x = np.empty(m, np.int64)
    x[:better] = 2**41 + np.arange(better) * 2**20
    x[better:hub] = 2**40 - np.arange(worse) * 2**10
    x[hub], x[far] = 2**41 - 1, kernel.UNKNOWN
    seconds = []
    for _ in range(2):  # the first time it is compiled
        one = kernel.Partition(graph, x)
        one.advance()
        assert one.live() == m - 1
        one.receive(np.array([far]), np.array([5]), np.array([True]))
        started = time.perf_counter()
        one.advance()
        seconds.append(time.perf_counter() - started)
        assert one.live() == 0
    # a look at all that wait after each of thousands of buckets would be 10⁹ steps
    assert seconds[1] < 1


def test_only_changed_states_are_sent() -> None:
    rng = np.random.default_rng(1)
    n, parts = 3000, 4
    neighbors = rng.integers(0, n, (n, 3))
    neighbors[neighbors == np.arange(n)[:, None]] = -1
    neighbors = -np.sort(-neighbors, axis=1)
    neighbors[:, 1:][neighbors[:, 1:] == neighbors[:, :-1]] = -1
    neighbors = -np.sort(-neighbors, axis=1)
    sqdist = np.where(neighbors >= 0, 0.5, np.inf).astype(np.float32)
    case = Case(list(range(n)), np.zeros(n, np.int64), neighbors, sqdist, sqdist)
    pool = Pool(case, rng.random(n).astype(np.float32), rng.integers(0, parts, n), parts)
    pool.start_ranking(schemes.Scheme(), False)
    one = pool.partitions[0]
    first = one.states_for(1)
    assert first.ids.size > 100
    assert one.states_for(1).ids.size == 0
    assert one.states_for(1, everything=True).ids.tolist() == first.ids.tolist()
    one.advance()
    # nothing is known of the others yet: whoever has an edge to them waits
    assert one.states_for(1).ids.size == 0
    for p in (1, 2, 3):
        one.receive_states(pool.partitions[p].states_for(0))
    one.advance()
    again = one.states_for(1)
    assert 0 < again.ids.size < first.ids.size
    before = dict(zip(first.ids.tolist(), zip(first.x, first.final, strict=True), strict=True))
    now = zip(again.x, again.final, strict=True)
    for i, state in zip(again.ids.tolist(), now, strict=True):
        assert state != before[i]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    ranges=st.integers(1, 9),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**32),
)
def test_merged_ranges_are_one_sort_of_all_keys(
    sizes: list[int], ranges: int, levels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    keys = [
        merge.Keys(
            x=rng.integers(-levels, levels, size) * 2**50,
            hi=rng.integers(0, 3, size).astype(np.uint64),
            lo=rng.permutation(10_000)[:size].astype(np.uint64) * 7 + np.uint64(p),
        )
        for p, size in enumerate(sizes)
    ]
    every = merge.joined(keys)
    expected = sorted(
        range(every.x.size),
        key=lambda r: (-int(every.x[r]), int(every.hi[r]), int(every.lo[r])),
    )
    found = np.concatenate(merged(keys, ranges)) if sizes else np.empty(0)
    assert np.argsort(found).tolist() == expected


def test_scores_saturate_over_partitions_too() -> None:
    """Halo senders far above, an own sample just above the floor."""
    own = np.array([True, False, False])
    start = np.array([0, 0, 1, 2])
    graph = kernel.make_graph(own, start, np.array([0, 0], np.int32), np.ones(2, np.float32))
    one = kernel.Partition(graph, np.array([-(2**62) + 5, kernel.UNKNOWN, kernel.UNKNOWN]))
    assert one.advance() == 1
    assert one.live() == 1
    most = 2**62 - 1
    one.receive(np.array([2]), np.array([most]), np.array([True]))
    one.advance()
    assert one.live() == 1
    one.receive(np.array([1, 2]), np.array([most, most]), np.array([True, True]))
    one.advance()
    assert one.live() == 0
    assert one.x[0] == messages.FLOOR
    assert one.suppressed_by()[0] == 1
