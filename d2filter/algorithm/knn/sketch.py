"""Sketches: short projections of the features, which make a matrix product cheaper.

A sketch is the projection on the first principal axes of a training sample. Cells, centroids and
products use sketches; the nearest samples by sketch are the shortlist, and exact distances between
the features choose the neighbors from it.

A sketch must not depend on how many rows are projected together. So features, mean and axes are
rounded to integers that are small enough for every sum of products to be exact in float32. Rows
that are too large for that are summed in float64, with the same value.

See docs/method.md#sketches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, features, threads
from d2filter.algorithm.knn import products, search

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

SHORTLIST = 32  # places of a shortlist, at least; twice those of the list where that is more

_GRID = 8192  # the norm of a typical row in integers
_AXIS = 1024  # that of an axis
_SCALE = 2.0**-12  # of the projection: a typical row comes out at 2048
_EXACT = 2**24  # sums of products up to it are exact in float32
_STEP = 32  # axes are a multiple of it
LOOKED_AT = 32768  # rows of the sample
JUDGED = 400  # of which the sketches must find the neighbors
ENOUGH = 0.98  # share of them, with shortlists of half the length: the pool is denser
_NEIGHBORS = 5
_BLOCK = 2048  # what one block holds stays in the cache
_STEP_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """Projection of (·, d) rows to (·, d') sketches; without axes rows are their own sketches."""

    mean: F32
    """(d,) integers"""
    axes: F32
    """(d, d') integers; d' = 0 where projecting does not pay"""
    grid: float
    """what rows are multiplied with before they are rounded; a power of two"""

    @property
    def identity(self) -> bool:
        """Whether rows are their own sketches."""
        return not self.axes.shape[1]

    @property
    def share(self) -> float:
        """Cost of a product with sketches, in those with rows."""
        return 1.0 if self.identity else self.axes.shape[1] / self.axes.shape[0]

    def places(self, width: int) -> int:
        """Length of the shortlists from which lists of `width` places are made."""
        return places(width, identity=self.identity)

    def apply(self, rows: F16) -> F16:
        """Sketches of rows, (n, d'); the rows themselves (not a copy) for the identity."""
        if self.identity:
            return rows
        out = np.empty((len(rows), self.axes.shape[1]), np.float16)
        most = _EXACT / _length(self.axes)

        def work(number: int) -> None:
            some = slice(number * _BLOCK, (number + 1) * _BLOCK)
            block = np.ascontiguousarray(rows[some]).view(np.uint16)
            whole, large = _to_grid(block, self.grid, self.mean, most)
            projected = whole @ self.axes
            if large.any():
                projected[large] = whole[large].astype(np.float64) @ self.axes.astype(np.float64)
            projected *= _SCALE
            # of rows far longer than any in the sample: finite is all that they must be
            np.clip(projected, -60000, 60000, out=projected)
            projected += 0.0  # -0 becomes +0: equal sketches have equal bits
            out[some] = projected

        products.each(work, -(-len(rows) // _BLOCK))
        return out


def places(width: int, *, identity: bool) -> int:
    """`Sketch.places` of any sketch."""
    return width if identity else max(SHORTLIST, 2 * width)


def none(dim: int) -> Sketch:
    """Rows are their own sketches."""
    return Sketch(mean=np.zeros(dim, np.float32), axes=np.zeros((dim, 0), np.float32), grid=1.0)


def train(sample: F16, least: int = 0) -> Sketch:
    """As few axes as find 98% of the five nearest of 400 rows of the sample by shortlist.

    sample: (m, d), in an order independent of files. least: fewer axes than these are not tried.
    The identity where half the dimensions do not suffice, or there are too few rows or dimensions
    for a projection to pay.
    """
    sample = np.ascontiguousarray(sample[:: max(1, -(-len(sample) // LOOKED_AT))])
    m, dim = sample.shape
    most = dim // 2 // _STEP * _STEP
    typical = float(np.sqrt(np.median(features.squared_norms(sample)))) if m else 0.0
    if most < max(_STEP, least) or m < 4 * dim or typical <= 0:
        return none(dim)
    grid = _GRID / 2.0 ** float(np.ceil(np.log2(typical)))
    bits = sample.view(np.uint16)
    whole, large = _to_grid(bits, grid, np.zeros(dim, np.float32), _EXACT / _AXIS)
    mean = np.rint(whole[~large].astype(np.float64).mean(axis=0))
    # sums of integers are exact; one thread, so that the axes are the same from any number of them
    spread = np.zeros((dim, dim))
    with threads.one_blas_thread():
        for begin in range(0, m, _STEP_ROWS):
            some = slice(begin, begin + _STEP_ROWS)
            wide = whole[some][~large[some]] - mean
            spread += wide.T @ wide
        _, axes = np.linalg.eigh(spread)
    axes = axes[:, ::-1][:, :most]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(most)])
    largest = Sketch(
        mean=mean.astype(np.float32), axes=np.rint(axes * _AXIS).astype(np.float32), grid=grid
    )
    number = _fewest_axes(sample, largest.apply(sample), least)
    if not number:
        return none(dim)
    return Sketch(mean=largest.mean, axes=np.ascontiguousarray(largest.axes[:, :number]), grid=grid)


def _fewest_axes(sample: F16, sketches: F16, least: int) -> int:
    """Columns of the sketches that are enough, 0 when all of them are not."""
    positions = np.arange(len(sample), dtype=np.int64)
    judged = positions[:: -(-positions.size // JUDGED)]
    total = positions.size
    truth = search.search_all(sample, positions, sample[judged], judged, _NEIGHBORS, total)

    def enough(steps: int) -> bool:
        some = np.ascontiguousarray(sketches[:, : steps * _STEP])
        found = search.search_all(some, positions, some[judged], judged, SHORTLIST // 2, total)
        return bool(truth.share_in(found.catalog_rows).mean() >= ENOUGH)

    low, high = max(1, -(-least // _STEP)), sketches.shape[1] // _STEP
    if not enough(high):
        return 0
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low * _STEP


def _length(axes: F32) -> float:
    """The longest axis, in integers."""
    return float(np.sqrt((axes.astype(np.float64) ** 2).sum(axis=0).max()))


@compiled.njit(fastmath={"reassoc"})
def _to_grid(bits, grid, mean, most):  # type: ignore[no-untyped-def]  # compiled by numba
    """Rows minus the mean as integers in float32, (n, d), and which are longer than `most`."""
    n, d = bits.shape
    out = np.empty((n, d), np.float32)
    large = np.empty(n, np.bool_)
    for i in range(n):
        total = np.float64(0.0)
        for c in range(d):
            value = np.rint(features.half(bits[i, c]) * np.float32(grid)) - mean[c]
            out[i, c] = value
            total += np.float64(value) * np.float64(value)
        large[i] = total > most * most
    return out, large
