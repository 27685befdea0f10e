"""Scores from a training log: how a network judged each sample, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

# float64 values that are held at once: 32 MB, a few times over for what is computed of them
BLOCK = 2**22


def softmax(logits: Floats) -> F64:
    """e^{z_c} / Σ_c e^{z_c} over the last axis, same shape, float64.

    Relative to the largest logit, so that nothing overflows. NaN where that is not finite.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        z = np.array(logits, np.float64, order="C")
        z -= z.max(axis=-1, keepdims=True)
        np.exp(z, out=z)
        z /= z.sum(axis=-1, keepdims=True)
    return z


def forgetting(probabilities: Floats, label: npt.NDArray[Any]) -> F32:
    """Forgetting events, (n,) float32 (Toneva et al. 2019): how often what was right went wrong.

    Number of epochs t with the sample right at t and wrong at t + 1. One that was never right gets
    e, the number of epochs, more than any that was learned. Right means that its class is more
    probable than every other; a tie is wrong, so that the numbering of the classes cannot matter.

    probabilities: (n, e, c) floats, after each epoch; logits give the same. label: (n,) integers.
    A sample with a non-finite value gets NaN. Each value depends on its own sample alone, bit for
    bit. Raises ValueError for shapes that do not fit and labels outside 0 to c − 1.
    """

    def events(p: F64, y: I64) -> F64:
        right = _margins(p, y) > 0
        lost = (right[:, :-1] & ~right[:, 1:]).sum(axis=1)
        count: F64 = np.where(right.any(axis=1), lost, p.shape[1]).astype(np.float64)
        return count

    return _each_sample(probabilities, label, events)


def el2n(probabilities: Floats, label: npt.NDArray[Any]) -> F32:
    """Length of the error, (n,) float32: mean over epochs of ‖p − onehot(y)‖₂ (Paul et al. 2021).

    The paper takes one early epoch and averages over networks: give it those as the epochs.
    Arguments, NaN and errors as for `forgetting`, but probabilities only.
    """

    def error(p: F64, y: I64) -> F64:
        p = p.copy()
        p[np.arange(len(p)), :, y] -= 1
        length = np.sqrt((p * p).sum(axis=2))
        mean: F64 = length.mean(axis=1)
        return mean

    return _each_sample(probabilities, label, error)


def margin(probabilities: Floats, label: npt.NDArray[Any]) -> F32:
    """Area under the margin, (n,) float32: mean over epochs of p_y − max_{c≠y} p_c.

    Pleiss et al. 2020, who take logits; these may be given instead. The lowest are the likeliest
    to be labeled wrongly. The maximum over no other class is 0.
    Arguments, NaN and errors as for `forgetting`.
    """
    return _each_sample(probabilities, label, lambda p, y: _margins(p, y).mean(axis=1))


def entropy(probabilities: Floats, label: npt.NDArray[Any]) -> F32:
    """Entropy of the last epoch's prediction in nats, (n,) float32: −Σ_c p_c·log p_c.

    0·log 0 is 0; a negative value gives NaN. The label is checked and not used.
    Arguments, NaN and errors as for `forgetting`, but probabilities only.
    """

    def of_last(p: F64, y: I64) -> F64:
        last = np.ascontiguousarray(p[:, -1])
        # subtracted from 0, as a minus sign would make −0 of a sure prediction
        left: F64 = 0 - np.where(last == 0, 0, last * np.log(last)).sum(axis=1)
        return left

    return _each_sample(probabilities, label, of_last)


def variance(probabilities: Floats, label: npt.NDArray[Any]) -> F32:
    """Variance over epochs of p_y, (n,) float32: (1/e)·Σ_t (p_y(t) − mean)².

    Its root is the variability of Swayamdipta et al. 2020, which sorts the same.
    Arguments, NaN and errors as for `forgetting`, but probabilities only.
    """
    return _each_sample(probabilities, label, lambda p, y: _own(p, y).var(axis=1))


def _each_sample(
    probabilities: Floats, label: npt.NDArray[Any], score: Callable[[F64, I64], F64]
) -> F32:
    p, y = np.asarray(probabilities), np.asarray(label)
    if p.ndim != 3 or p.shape[1] == 0 or y.shape != p.shape[:1] or y.dtype.kind not in "iu":
        raise ValueError(
            f"probabilities has shape {p.shape}, label shape {y.shape} and dtype {y.dtype}: "
            "expected (samples, epochs, classes) with one epoch or more, and (samples,) integers"
        )
    n, epochs, classes = p.shape
    outside = np.flatnonzero((y < 0) | (y >= classes))
    if outside.size:
        raise ValueError(
            f"label {y[outside[0]]} in row {outside[0]} is not a class from 0 to {classes - 1}: "
            "number the classes as the last axis of the log does"
        )
    y = y.astype(np.int64)
    out = np.empty(n, np.float32)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for start, stop in blocks(n, epochs * classes):
            block = np.array(p[start:stop], np.float64, order="C")
            values = score(block, y[start:stop])
            values[~np.isfinite(block).all(axis=(1, 2))] = np.nan
            out[start:stop] = values
    return out


def _own(p: F64, y: I64) -> F64:
    """p_y by epoch, (m, e)."""
    return np.ascontiguousarray(np.take_along_axis(p, y[:, None, None], axis=2)[:, :, 0])


def _margins(p: F64, y: I64) -> F64:
    """p_y − max_{c≠y} p_c by epoch, (m, e)."""
    own = _own(p, y)
    if p.shape[2] == 1:
        return own
    others = p.copy()
    others[np.arange(len(p)), :, y] = -np.inf
    left: F64 = own - others.max(axis=2)
    return left


def blocks(n: int, width: int) -> list[tuple[int, int]]:
    """Ranges of rows that hold about BLOCK values of `width` a row."""
    step = max(1, BLOCK // max(1, width))
    return [(start, min(start + step, n)) for start in range(0, n, step)]
