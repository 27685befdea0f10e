"""Each score, compared with its formula computed one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.algorithm import uids
from d2filter.algorithm.scores import registry as scores
from d2filter.algorithm.scores import training_dynamics
from d2filter.stages.catalog import pool_scores

LOG_SCORES = [name for name, score in scores.SCORES.items() if score.needs == "log"]
INF = math.inf


def cosine(a: Any, b: Any) -> float:
    x, y = [float(v) for v in a], [float(v) for v in b]
    norms = math.sqrt(math.fsum(v * v for v in x)) * math.sqrt(math.fsum(v * v for v in y))
    return math.fsum(v * w for v, w in zip(x, y, strict=True)) / norms if norms else math.nan


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


@st.composite
def embeddings(draw: st.DrawFn, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of rows of one width; some rows of the second are copies of the first's."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, t, d = draw(st.integers(least, 9)), draw(st.integers(1, 9)), draw(st.integers(2, 7))
    kind = draw(st.sampled_from([np.float16, np.float32]))
    scale = draw(st.sampled_from([1e-3, 1.0, 50.0]))
    x = (rng.standard_normal((n, d)) * scale).astype(kind)
    y = (rng.standard_normal((t, d)) * scale).astype(kind)
    if draw(st.booleans()):
        y[: min(n, t) // 2] = x[: min(n, t) // 2]
    return x, y


@st.composite
def logs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with ties, sure predictions and zeros; labels of all classes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, e, c = draw(st.integers(1, 8)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["smooth", "sure", "ties"]))
    if kind == "smooth":
        p = training_dynamics.softmax(3 * rng.standard_normal((n, e, c)))
    elif kind == "sure":
        p = np.eye(c)[rng.integers(0, c, (n, e))]
    else:
        p = rng.integers(0, 3, (n, e, c)) + 1e-9
        p = p / p.sum(axis=2, keepdims=True)
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    return p.astype(dtype), rng.integers(0, c, n).astype(draw(st.sampled_from([np.int8, np.int64])))


# --- embeddings ------------------------------------------------------------------------------


@given(embeddings(), st.sampled_from([0.001, 0.01, 0.07, 1.0, 30.0]))
def test_negclip_loss_is_the_formula(rows: tuple[np.ndarray, np.ndarray], tau: float) -> None:
    image = rows[0]
    text = np.resize(rows[1], image.shape)
    got = scores.negclip_loss(image, text, temperature=tau)
    n = len(image)
    s = [[cosine(image[i], text[j]) for j in range(n)] for i in range(n)]
    for i in range(n):
        along = log_sum_exp([s[i][j] / tau for j in range(n)])
        down = log_sum_exp([s[j][i] / tau for j in range(n)])
        assert got[i] == pytest.approx(s[i][i] - tau / 2 * (along + down), rel=1e-12, abs=1e-12)
    assert got.dtype == np.float64


@given(embeddings(least=2), st.integers(0, 2**32), st.integers(1, 20))
def test_negclip_loss_is_of_a_set(
    rows: tuple[np.ndarray, np.ndarray], seed: int, block: int
) -> None:
    image = rows[0]
    text = np.resize(rows[1], image.shape)
    once = scores.negclip_loss(image, text)
    turn = np.random.default_rng(seed).permutation(len(image))
    np.testing.assert_allclose(
        scores.negclip_loss(image[turn], text[turn]), once[turn], rtol=1e-12, atol=1e-12
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_dynamics, "BLOCK", block)
        np.testing.assert_allclose(scores.negclip_loss(image, text), once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_a_bad_pair_is_not_in_the_batch(bad: float) -> None:
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((2, 12, 5)).astype(np.float32)
    good = np.ones(12, bool)
    image[3], text[7] = bad, bad
    good[[3, 7]] = False
    got = scores.negclip_loss(image, text)
    assert np.isnan(got[~good]).all()
    assert got[good].tolist() == scores.negclip_loss(image[good], text[good]).tolist()
    assert np.isnan(scores.negclip_loss(image[[3]], text[[3]])).all()
    assert scores.negclip_loss(image[:0], text[:0]).shape == (0,)


def test_a_pair_similar_to_all_pairs_gets_a_lower_score_than_its_clip_score() -> None:
    hub = np.ones(16)
    image = np.vstack([np.eye(16)[:4] + 0.3, [hub]])
    text = np.vstack([np.eye(16)[:4] + 0.3, [hub]])
    plain, less = scores.clip_score(image, text), scores.negclip_loss(image, text, temperature=0.1)
    assert (plain > 0.999).all()
    assert np.argmin(less) == 4


@given(
    st.lists(st.integers(0, 2**128 - 1), min_size=1, max_size=30, unique=True),
    st.sampled_from([1, 2, 3, 1000, 2**31 - 1]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 3),
)
def test_a_batch_is_drawn_by_the_uid_alone(
    numbers: list[int], batches: int, round: int, seed: int
) -> None:
    def draw(chosen: list[int]) -> list[int]:
        hi = np.array([u >> 64 for u in chosen], np.uint64)
        lo = np.array([u % 2**64 for u in chosen], np.uint64)
        got = scores.batch_of(hi, lo, batches=batches, round=round, seed=seed)
        h = uids.hashed(hi, lo, salt=5 + round * 2**32, seed=seed)
        assert got.dtype == np.int64
        assert got.tolist() == [(int(v) >> 32) * batches // 2**32 for v in h]
        return got.tolist()

    assert draw(numbers)[::-1] == draw(numbers[::-1])


def test_batches_are_even_and_rounds_are_independent() -> None:
    hi, lo = np.zeros(40_000, np.uint64), np.arange(40_000, dtype=np.uint64)
    drawn = [
        scores.batch_of(hi, lo, batches=20, round=round, seed=seed)
        for round, seed in ((0, 0), (1, 0), (2, 0), (0, 1))
    ]
    for batch in drawn:
        sizes = np.bincount(batch, minlength=20)
        # five standard deviations of a binomial of 40,000 and 1/20
        assert sizes.size == 20
        assert np.abs(sizes - 2000).max() < 218
    for a in range(4):
        for b in range(a):
            assert abs(np.mean(drawn[a] == drawn[b]) - 1 / 20) < 0.006


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_batches_for_rounds_half_up(n: int, size: int) -> None:
    assert scores.batches_for(n, size) == max(1, math.floor(Fraction(n, size) + Fraction(1, 2)))


@given(embeddings(), st.sampled_from([0.5, 1, 2, 3.5, 400, INF]))
def test_norm_sim_is_the_formula(rows: tuple[np.ndarray, np.ndarray], p: float) -> None:
    image, target = rows
    got = scores.norm_sim(image, target, p=p)
    assert got.dtype == np.float32
    for i, row in enumerate(image):
        all_of = [cosine(row, t) for t in target]
        if p == INF:
            want = max(all_of)
        else:
            top = max(abs(v) for v in all_of)
            want = top * math.fsum((abs(v) / top) ** p for v in all_of) ** (1 / p)
        assert got[i] == pytest.approx(want, rel=2e-7, abs=1e-12)


@given(embeddings())
def test_prototypicality_is_the_formula(rows: tuple[np.ndarray, np.ndarray]) -> None:
    samples, centroids = rows
    got = scores.prototypicality(samples, centroids)
    assert got.dtype == np.float32
    for i, row in enumerate(samples.tolist()):
        assert got[i] == np.float32(min(math.dist(row, c) for c in centroids.tolist()))


def test_nothing_like_the_target_is_zero_without_a_warning() -> None:
    image, target = np.eye(3, dtype=np.float32)[:1], np.eye(3, dtype=np.float32)[1:]
    assert scores.norm_sim(image, target, p=2).tolist() == [0.0]
    assert scores.norm_sim(image, -image).tolist() == [-1.0], "the nearest is signed"


def test_high_powers_of_small_cosines_do_not_vanish() -> None:
    image = np.array([[1.0, 10.0]], np.float32)
    target = np.array([[1.0, 0.0]] * 4, np.float32)
    want = 101**-0.5 * 4 ** (1 / 400)
    assert scores.norm_sim(image, target, p=400)[0] == pytest.approx(want, rel=1e-6)


REFERENCED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "norm_sim": scores.norm_sim,
    "norm_sim p=2": lambda x, y: scores.norm_sim(x, y, p=2),
    "norm_sim p=2.5": lambda x, y: scores.norm_sim(x, y, p=2.5),
    "prototypicality": scores.prototypicality,
}


@pytest.mark.parametrize("name", REFERENCED)
@pytest.mark.parametrize("width", [3, 37, 512])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_a_row_has_the_same_bits_alone_and_among_others(name: str, width: int, kind: Any) -> None:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((1003, width)).astype(kind)
    y = rng.standard_normal((71, width)).astype(kind)
    f = REFERENCED[name]
    whole = bits(f(x, y))
    for size in (1, 7, 100, 1000):
        parts = [f(x[i : i + size], y) for i in range(0, len(x), size)]
        assert (bits(np.concatenate(parts)) == whole).all()
    turn = rng.permutation(len(x))
    assert (bits(f(x[turn], y)) == whole[turn]).all()
    assert (bits(f(np.asfortranarray(x), np.asfortranarray(y))) == whole).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_dynamics, "BLOCK", 5000)
        assert (bits(f(x, y)) == whole).all()
    if "p=" not in name:
        assert (bits(f(x, y[::-1])) == whole).all(), "the order of the references counts"


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("width", [1, 37, 512])
def test_products_have_the_same_float64_bits_in_any_shape(squared: bool, width: int) -> None:
    rng = np.random.default_rng(width)
    x, y = rng.standard_normal((70, width)), rng.standard_normal((130, width))
    # rounded to float32, sums of another order would nearly always agree
    whole = scores.pairwise(x, y, squared).view(np.uint64)
    for rows in (slice(0, 1), slice(31, 33), slice(5, 69)):
        for others in (slice(0, 1), slice(63, 65), slice(1, 130), slice(3, 7)):
            part = scores.pairwise(x[rows].copy(), y[others].copy(), squared)
            assert (part.view(np.uint64) == whole[rows, others]).all()


@pytest.mark.parametrize("name", REFERENCED)
def test_bad_rows_are_nan_and_change_no_other_row(name: str) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((9, 4)).astype(np.float16), rng.standard_normal((5, 4))
    f = REFERENCED[name]
    want = f(x, y)
    x[2, 1], x[4, 0], x[5], x[8] = np.nan, np.inf, -np.inf, 0
    got = f(x, y)
    bad = [2, 4, 5] if name == "prototypicality" else [2, 4, 5, 8]
    assert np.flatnonzero(np.isnan(got)).tolist() == bad
    same = [0, 1, 3, 6, 7]
    assert got[same].tolist() == want[same].tolist()
    if name == "prototypicality":
        assert got[8] == np.float32(np.sqrt((y * y).sum(axis=1)).min()), "the origin is a point"
    assert f(x[:0], y).shape == (0,)


# --- training logs ---------------------------------------------------------------------------


def naive(name: str, p: list[list[float]], y: int) -> float:
    """One sample's score: p[epoch][class]."""
    epochs = len(p)
    gap = [q[y] - max([v for c, v in enumerate(q) if c != y], default=0.0) for q in p]
    mean = math.fsum(q[y] for q in p) / epochs
    if name == "forgetting":
        right = [g > 0 for g in gap]
        if not any(right):
            return epochs
        return sum(right[t] and not right[t + 1] for t in range(epochs - 1))
    if name == "el2n":
        length = [math.hypot(*(v - (c == y) for c, v in enumerate(q))) for q in p]
        return math.fsum(length) / epochs
    if name == "margin":
        return math.fsum(gap) / epochs
    if name == "entropy":
        return -math.fsum(v * math.log(v) for v in p[-1] if v > 0)
    assert name == "variance"
    return math.fsum((q[y] - mean) ** 2 for q in p) / epochs


@pytest.mark.parametrize("name", LOG_SCORES)
@given(log=logs())
def test_a_score_of_a_log_is_the_formula(name: str, log: tuple[np.ndarray, np.ndarray]) -> None:
    p, y = log
    before = p.copy()
    got = scores.function_of(name)(p, y)
    assert got.dtype == np.float32
    want = [naive(name, p[i].tolist(), int(y[i])) for i in range(len(y))]
    np.testing.assert_allclose(got, np.array(want), rtol=1e-6, atol=1e-12)
    assert (p == before).all(), "the caller's log was modified"


def test_forgetting_counts_match_a_count_by_hand() -> None:
    def log_of(words: list[str]) -> np.ndarray:
        one = {"r": [0.7, 0.3], "w": [0.3, 0.7], "t": [0.5, 0.5]}
        return np.array([[one[letter] for letter in word] for word in words])

    words = ["rrrr", "wrrr", "rwrw", "rwww", "wwww", "rtrr", "tttt"]
    got = training_dynamics.forgetting(log_of(words), np.zeros(len(words), np.int64))
    assert got.tolist() == [0, 0, 2, 1, 4, 1, 4]


@pytest.mark.parametrize("name", LOG_SCORES)
@pytest.mark.parametrize(("epochs", "classes"), [(1, 3), (5, 1), (7, 10), (30, 33)])
def test_a_sample_of_a_log_has_the_same_bits_alone(name: str, epochs: int, classes: int) -> None:
    rng = np.random.default_rng(epochs)
    p = training_dynamics.softmax(2 * rng.standard_normal((501, epochs, classes))).astype(
        np.float32
    )
    y = rng.integers(0, classes, 501)
    f = scores.function_of(name)
    whole = bits(f(p, y))
    for size in (1, 7, 100):
        parts = [f(p[i : i + size], y[i : i + size]) for i in range(0, 501, size)]
        assert (bits(np.concatenate(parts)) == whole).all()
    turn = rng.permutation(501)
    assert (bits(f(p[turn], y[turn])) == whole[turn]).all()
    assert (bits(f(np.asfortranarray(p), y)) == whole).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_dynamics, "BLOCK", 1000)
        assert (bits(f(p, y)) == whole).all()


@pytest.mark.parametrize("name", LOG_SCORES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_sample_of_a_log_is_nan_alone(name: str, bad: float) -> None:
    p = np.full((5, 4, 3), 1 / 3)
    y = np.array([0, 1, 2, 0, 1])
    p[1, 0, 2] = bad
    p[3, 3, 0] = bad
    got = scores.function_of(name)(p, y)
    assert np.isnan(got).tolist() == [False, True, False, True, False]


def test_a_sure_prediction_has_no_entropy_and_a_negative_value_none_at_all() -> None:
    p = np.array([[[1.0, 0.0]], [[1.2, -0.2]]])
    got = training_dynamics.entropy(p, np.array([0, 0]))
    assert bits(got)[0] == 0, "−0 differs in its bits"
    assert np.isnan(got[1])


@given(logs(), st.sampled_from([0.0, 5.0, 1e4, -1e4]))
def test_softmax_is_the_formula(log: tuple[np.ndarray, np.ndarray], shift: float) -> None:
    logits = np.log(log[0].astype(np.float64) + 1e-3) * 7
    got = training_dynamics.softmax(logits + shift)
    assert got.dtype == np.float64
    for z, q in zip(
        logits.reshape(-1, logits.shape[2]), got.reshape(-1, got.shape[2]), strict=True
    ):
        total = math.fsum(math.exp(v) for v in z)
        np.testing.assert_allclose(q, [math.exp(v) / total for v in z], rtol=1e-9, atol=1e-300)


def test_softmax_of_extreme_logits_is_finite() -> None:
    rows = np.array([[1e308, -1e308], [-np.inf, 3], [np.nan, 1], [np.inf, 1], [-np.inf, -np.inf]])
    before = rows.copy()
    got = training_dynamics.softmax(rows)
    assert got[:2].tolist() == [[1, 0], [0, 1]]
    assert np.isnan(got[2:]).all(axis=1).all()
    np.testing.assert_array_equal(rows, before)


# --- the table -------------------------------------------------------------------------------


def test_the_table_names_functions_that_are_there() -> None:
    for name, score in scores.SCORES.items():
        assert score.name == name
        function = getattr(training_dynamics if score.needs == "log" else scores, name)
        assert score.compute is (None if score.needs == "pool" else function)
        assert "\n" not in score.summary
        assert (score.meaning == "easier") == (score.kept_first == "low")
    of_pool = {name for name, score in scores.SCORES.items() if score.needs == "pool"}
    assert of_pool == set(pool_scores.POOL_SCORES)


def first_of(name: str, values: np.ndarray) -> int:
    return int(np.argmax(scores.difficulty(values, scores.SCORES[name].kept_first)))


@pytest.mark.parametrize("name", LOG_SCORES)
def test_the_hard_sample_goes_first(name: str) -> None:
    easy = [[0.9, 0.1, 0.0], [0.95, 0.05, 0.0], [0.99, 0.01, 0.0]]
    hard = [[0.6, 0.2, 0.2], [0.1, 0.5, 0.4], [0.4, 0.45, 0.15]]
    p = np.array([easy, hard, easy])
    assert first_of(name, scores.function_of(name)(p, np.zeros(3, np.int64))) == 1


def test_the_better_pair_goes_first() -> None:
    image = np.eye(4, dtype=np.float32)[:3]
    text = image[[1, 0, 2]]
    assert first_of("clip_score", scores.clip_score(image, text)) == 2
    assert first_of("negclip_loss", scores.negclip_loss(image, text)) == 2
    assert first_of("norm_sim", scores.norm_sim(image, image[2:] + 0.1)) == 2
    assert first_of("prototypicality", scores.prototypicality(image, image[:2] + 0.1)) == 2


def test_difficulty_copies_scores_and_turns_their_sign() -> None:
    values = np.array([1.5, -0.0, 0.0, -2, np.nan], np.float32)
    high, low = scores.difficulty(values, "high"), scores.difficulty(values, "low")
    np.testing.assert_array_equal(high, [1.5, 0, 0, -2, np.nan])
    np.testing.assert_array_equal(low, [-1.5, 0, 0, 2, np.nan])
    assert high.dtype == low.dtype == np.float32
    assert not np.signbit(high[1:3]).any()
    assert not np.signbit(low[1:3]).any()
    assert not np.shares_memory(high, values)


LOG = np.full((2, 3, 4), 0.25)
ROWS = np.ones((2, 3), np.float32)
IDS = np.zeros(1, np.uint64)
BROKEN = np.array([[1, 1, 1], [np.nan, 1, 1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.difficulty(ROWS, "best"), r"kept_first is 'best': .* 'high' or 'low'"),
        (lambda: scores.negclip_loss(ROWS, ROWS[:1]), r"image has shape \(2, 3\) and text \(1, 3"),
        (lambda: scores.negclip_loss(ROWS, ROWS, temperature=0), r"temperature is 0: "),
        (lambda: scores.batches_for(5, 0), r"batch size is 0: "),
        (lambda: scores.batch_of(IDS, IDS, batches=0, round=0), r"batches is 0: "),
        (lambda: scores.batch_of(IDS, IDS, batches=2**31, round=0), r"batches is 2147483648: "),
        (lambda: scores.batch_of(IDS, IDS, batches=2, round=-1), r"round is -1: "),
        (lambda: scores.norm_sim(ROWS, ROWS, p=0), r"p is 0: it must be positive"),
        (lambda: scores.norm_sim(ROWS, ROWS, p=math.nan), r"p is nan: "),
        (lambda: scores.norm_sim(ROWS, ROWS[:0]), r"there is no target"),
        (lambda: scores.norm_sim(ROWS, ROWS[:, :2]), r"the targets have shape \(2, 2\), the sam"),
        (lambda: scores.norm_sim(ROWS, 0 * ROWS), r"2 targets are zero or not finite, the first "),
        (lambda: scores.prototypicality(ROWS, BROKEN), r"1 centroids are not finite, .* row 1"),
        (
            lambda: training_dynamics.margin(LOG, np.array([0, 4])),
            r"label 4 in row 1 .* class from 0 to 3",
        ),
        (lambda: training_dynamics.margin(LOG, np.array([-1, 0])), r"label -1 in row 0 "),
        (lambda: training_dynamics.margin(LOG, np.array([0.0, 1.0])), r"dtype float64"),
        (lambda: training_dynamics.margin(LOG, np.array([0])), r"label shape \(1,\)"),
        (lambda: training_dynamics.margin(LOG[:, :0], np.array([0, 0])), r"one epoch or more"),
        (
            lambda: training_dynamics.margin(LOG[0], np.array([0, 0, 0])),
            r"probabilities has shape \(3, 4\)",
        ),
    ],
)
def test_impossible_options_of_a_score_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def bits(values: np.ndarray) -> np.ndarray:
    assert values.dtype == np.float32
    return values.view(np.uint32)
