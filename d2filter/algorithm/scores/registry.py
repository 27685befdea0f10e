"""Scores that can be a sample's difficulty: one function each, and a table of all.

Scores from embeddings are here, those from a training log in `training_dynamics.py`. The table at
the end states what a high value means and which end is kept first. `difficulty` turns the sign if
needed, so that higher goes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, threads, uids
from d2filter.algorithm.scores import training_dynamics
from d2filter.algorithm.scores.training_dynamics import blocks

Floats = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def clip_score(image: npt.NDArray[Any], text: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """CLIP score: cosine of image and text embedding, shape (n,) float32.

    image, text: (n, d) float16 or float32. Products are summed in float64. A zero or non-finite
    embedding gives NaN (the catalog counts such a sample as bad). The bits do not depend on the
    order in memory.
    """
    # row by row: sums along memory have other last bits where it holds columns
    a, b = (np.asarray(rows, np.float64, order="C") for rows in (image, text))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        cosine = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.asarray(cosine, np.float32)


def negclip_loss(image: Floats, text: Floats, *, temperature: float = 0.01) -> F64:
    """Negative CLIP loss of each pair within one batch, shape (b,) float64 (arXiv 2405.19547).

    s_ii − (τ/2)·[log Σ_j e^{s_ij/τ} + log Σ_j e^{s_ji/τ}], s_ij = cosine of image i and text j,
    τ = `temperature`: the CLIP score less what the pair would score by being alike to everything.

    image, text: (b, d) float16 or float32. A pair with a zero or non-finite embedding gets NaN, and
    the others get what they would get without it. A batch is a set (`batch_of`) whose sums run in
    the order of its rows: callers sort it by uid to get the same bits again. Memory: 16·b·d bytes
    and about 130 MB. Raises ValueError for shapes that differ and a temperature that is not
    positive.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"image has shape {image.shape} and text {text.shape}: expected (pairs, d) for both"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be positive and finite")
    a, b = _unit(image), _unit(text)
    good = np.flatnonzero(np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1))
    a, b = a[good], b[good]
    n = good.size
    own, along = np.empty(n), np.empty(n)
    # sums down the columns are carried from block to block, relative to the largest value so far
    top, total = np.full(n, -np.inf), np.zeros(n)
    for start, stop in blocks(n, n):
        s = pairwise(a[start:stop], b, False) / temperature
        own[start:stop] = s[np.arange(stop - start), np.arange(start, stop)]
        largest = s.max(axis=1)
        along[start:stop] = largest + np.log(np.exp(s - largest[:, None]).sum(axis=1))
        raised = np.maximum(top, s.max(axis=0))
        total = total * np.exp(top - raised) + np.exp(s - raised).sum(axis=0)
        top = raised
    out = np.full(len(image), np.nan)
    out[good] = temperature * (own - (along + (top + np.log(total))) / 2)
    return out


def batches_for(n: int, size: int) -> int:
    """Number of batches of about `size` samples in a pool of `n`: n/size, half up, at least 1."""
    if size < 1:
        raise ValueError(f"batch size is {size}: it must be 1 or more")
    return max(1, (2 * n + size) // (2 * size))


def batch_of(hi: uids.U64, lo: uids.U64, *, batches: int, round: int, seed: int = 0) -> I64:
    """Batch of each sample, (n,) int64 in [0, batches), in random batching number `round`.

    floor(h·batches / 2³²) with h the high 32 bits of a hash of the uid: no sample's batch depends
    on the others or on their order. Sizes vary like those of n balls thrown into `batches` boxes.
    Raises ValueError for batches outside 1 to 2³¹ − 1 or a round outside 0 to 2³² − 1.
    """
    if not 1 <= batches < 2**31:
        raise ValueError(f"batches is {batches}: it must be from 1 to {2**31 - 1}")
    if not 0 <= round < 2**32:
        raise ValueError(f"round is {round}: it must be from 0 to {2**32 - 1}")
    # the rounds' salts lie above those of all other purposes
    h = uids.hashed(hi, lo, salt=uids.SALT_BATCH + (round << 32), seed=seed)
    batch: I64 = (((h >> np.uint64(32)) * np.uint64(batches)) >> np.uint64(32)).astype(np.int64)
    return batch


def norm_sim(image: Floats, target: Floats, *, p: float = math.inf) -> F32:
    """NormSim: how near a sample is to a target set, shape (n,) float32 (arXiv 2405.19547).

    max_t cos(f_i, f_t) for p = ∞, otherwise (Σ_t |cos(f_i, f_t)|^p)^{1/p}.

    image: (n, d), target: (t, d), float16 or float32; computed in float64. A zero or non-finite
    row gives NaN. The value of a row has the same bits whatever other rows are in the call; for
    p = ∞ whatever the order of the targets, too. Memory: 8·t·d bytes and about 130 MB. Raises
    ValueError for p ≤ 0 and for targets that are none, zero, not finite or of another width.
    """
    if not p > 0:
        raise ValueError(f"p is {p}: it must be positive, or inf for the nearest target")
    _check_reference("target", image, target)
    wanted = _unit(target)
    _refuse_rows("target", wanted, "zero or not finite")
    out = np.empty(len(image), np.float32)
    for start, stop in blocks(len(image), max(wanted.shape)):
        out[start:stop] = _p_norm(pairwise(_unit(image[start:stop]), wanted, False), p)
    return out


def prototypicality(rows: Floats, centroids: Floats) -> F32:
    """Euclidean distance to the nearest centroid, (n,) float32 (Sorscher et al. 2022).

    min_c ‖v_i − μ_c‖₂. Far from every centroid is untypical, hence hard. The rows are taken as
    they are: normalize them first where the centroids are those of normalized rows.

    rows: (n, d), centroids: (c, d), float16 or float32; computed in float64. A non-finite row
    gives NaN; a zero row is a point like any other. The value of a row has the same bits whatever
    other rows are in the call, and whatever the order of the centroids. Memory: 8·c·d bytes and
    about 70 MB. Raises ValueError for centroids that are none, not finite or of another width.
    """
    _check_reference("centroid", rows, centroids)
    centers = np.array(centroids, np.float64, order="C")
    _refuse_rows("centroid", centers, "not finite")
    out = np.empty(len(rows), np.float32)
    for start, stop in blocks(len(rows), max(centers.shape)):
        block = np.array(rows[start:stop], np.float64, order="C")
        block[~np.isfinite(block)] = np.nan
        with np.errstate(over="ignore"):
            out[start:stop] = np.sqrt(pairwise(block, centers, True).min(axis=1))
    return out


def difficulty(values: Floats, kept_first: str) -> F32:
    """The values as a difficulty, float32, same shape: negated for "low", so higher goes first.

    Raises ValueError unless `kept_first` is "high" or "low".
    """
    if kept_first not in ("high", "low"):
        raise ValueError(f"kept_first is {kept_first!r}: it must be 'high' or 'low'")
    wide = np.asarray(values, np.float64)
    # adding to 0 leaves no −0, which would sort like 0 and differ in its bits
    turned: F32 = (0.0 + wide if kept_first == "high" else 0.0 - wide).astype(np.float32)
    return turned


def _unit(rows: Floats) -> F64:
    """Rows of length 1, a C-contiguous float64 copy; a zero or non-finite row holds a NaN."""
    wide = np.array(rows, np.float64, order="C")
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        wide /= np.sqrt((wide * wide).sum(axis=1))[:, None]
    return wide


def _p_norm(cosine: F64, p: float) -> F64:
    if math.isinf(p):
        nearest: F64 = cosine.max(axis=1)
        return nearest
    size = np.abs(cosine)
    top = size.max(axis=1)
    # relative to the largest, as high powers of small numbers vanish
    size /= np.where(top == 0, 1, top)[:, None]
    norm: F64 = top * (size**p).sum(axis=1) ** (1 / p)
    return norm


def _check_reference(name: str, rows: Floats, reference: Floats) -> None:
    if reference.ndim != 2 or rows.ndim != 2 or rows.shape[1] != reference.shape[1]:
        raise ValueError(
            f"the {name}s have shape {reference.shape}, the samples {rows.shape}: "
            "expected two axes, and equal widths"
        )
    if len(reference) == 0:
        raise ValueError(f"there is no {name}: give one or more")


def _refuse_rows(name: str, reference: F64, what: str) -> None:
    rows = np.flatnonzero(~np.isfinite(reference).all(axis=1))
    if rows.size:
        raise ValueError(f"{rows.size} {name}s are {what}, the first in row {rows[0]}: drop them")


def pairwise(x: F64, y: F64, squared: bool) -> F64:
    """Products, or squared distances, of all rows of x (m, d) and y (t, d): (m, t) float64."""
    out = np.empty((len(x), len(y)), np.float64)
    # y goes by once for 32 rows of x
    threads.in_blocks(lambda some: _pairs(x[some], y, squared, out[some]), len(x), 32)
    return out


@compiled.njit()
def _pairs(x, y, squared, out):  # type: ignore[no-untyped-def]  # compiled by numba
    # tiles of y that stay in the cache while the rows of x go by
    for tile in range(0, len(y), 64):
        for i in range(len(x)):
            for j in range(tile, min(tile + 64, len(y))):
                out[i, j] = _sqdist(x[i], y[j]) if squared else _dot(x[i], y[j])


@compiled.njit(fastmath={"reassoc"})
def _dot(a, b):  # type: ignore[no-untyped-def]  # compiled by numba
    total = np.float64(0.0)
    for c in range(a.size):
        total += a[c] * b[c]
    return total


@compiled.njit(fastmath={"reassoc"})
def _sqdist(a, b):  # type: ignore[no-untyped-def]  # compiled by numba
    total = np.float64(0.0)
    for c in range(a.size):
        difference = a[c] - b[c]
        total += difference * difference
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score and its meaning."""

    name: str
    kept_first: Literal["high", "low"]
    """the end that is kept first"""
    meaning: Literal["better", "harder", "easier"]
    """what a high value means for a sample"""
    needs: Literal["pair", "target", "pool", "log"]
    """image and text embedding | a target set | the whole pool | a training log"""
    summary: str
    """one line for --help"""
    compute: Callable[[Any, Any], npt.NDArray[Any]] | None = None
    """(n,) values from the two arrays that it needs: image and text (n, d) | image (n, d) and
    target (t, d) | probabilities (n, epochs, classes) and label (n,). None: the pool computes it,
    see `POOL_SCORES` in stages/catalog/pool_scores.py"""
    both_halves: bool = False
    """whether the features must be an image and a text half; of scores that need the pool"""


_ALL = (
    Score(
        name="clip_score",
        kept_first="high",
        meaning="better",
        needs="pair",
        summary="cosine of image and text embedding",
        compute=clip_score,
    ),
    Score(
        name="negclip_loss",
        kept_first="high",
        meaning="better",
        needs="pool",
        summary="CLIP score less half the log-sum-exp of the image's and of the text's cosines in "
        "random batches",
        both_halves=True,
    ),
    Score(
        name="norm_sim",
        kept_first="high",
        meaning="better",
        needs="target",
        summary="largest cosine of the image to a target set",
        compute=norm_sim,
    ),
    Score(
        name="prototypicality",
        kept_first="high",
        meaning="harder",
        needs="pool",
        summary="distance to the nearest centroid of the pool",
    ),
    Score(
        name="forgetting",
        kept_first="high",
        meaning="harder",
        needs="log",
        summary="times right at an epoch and wrong at the next; never right counts as all epochs",
        compute=training_dynamics.forgetting,
    ),
    Score(
        name="el2n",
        kept_first="high",
        meaning="harder",
        needs="log",
        summary="mean over epochs of the length of (probabilities - one-hot label)",
        compute=training_dynamics.el2n,
    ),
    Score(
        name="margin",
        kept_first="low",
        meaning="easier",
        needs="log",
        summary="mean over epochs of the label's probability less the largest other one",
        compute=training_dynamics.margin,
    ),
    Score(
        name="entropy",
        kept_first="high",
        meaning="harder",
        needs="log",
        summary="-sum of p log p over the classes at the last epoch",
        compute=training_dynamics.entropy,
    ),
    Score(
        name="variance",
        kept_first="high",
        meaning="harder",
        needs="log",
        summary="variance over epochs of the label's probability",
        compute=training_dynamics.variance,
    ),
)

SCORES: dict[str, Score] = {score.name: score for score in _ALL}


def function_of(name: str) -> Callable[[Any, Any], npt.NDArray[Any]]:
    """The function that computes a score from two arrays, see `Score.compute`.

    Raises ValueError for a score that nothing, or only the whole pool, computes.
    """
    function = SCORES[name].compute
    if function is None:
        raise ValueError(f"nothing here computes the score {name!r}")
    return function
