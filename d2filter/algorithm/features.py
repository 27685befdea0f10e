"""The features of samples: float16 vectors, exact distances between them, groups of exact copies.

From the catalog on, a sample is its float16 vector. A distance is the sum of squared differences in
float64, rounded to float32. For L2-normalized modalities all terms are multiples of 2⁻⁴⁸ and the
sum is below 2⁴, so the float64 sum is exact in any order, on any processor.

See docs/method.md#features-and-distances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, threads

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

BLOCK = 1 << 19  # values that a thread takes at a time: about a millisecond


def fix(modalities: Sequence[npt.NDArray[Any]], *, normalize: bool = True) -> F16:
    """The features of n samples: float16, shape (n, Σd), C-contiguous. See
    docs/method.md#features-and-distances.

    modalities: arrays (n, d_m), float16 or float32. Each is L2-normalized in float64 unless
    `normalize` is false. −0 becomes +0, so that equal rows have equal bits. A row that cannot be
    fixed (zero or non-finite embedding, overflow of float16) comes out with a NaN or infinity.
    """
    out = np.empty((len(modalities[0]), sum(m.shape[1] for m in modalities)), np.float16)
    column = 0
    for modality in modalities:
        width = modality.shape[1]
        # in blocks: float64 copies of a whole pool would take four times its size
        for start in range(0, len(modality), 8192):
            # row by row, whatever the order in memory: that of a sum decides its last bits
            block = modality[start : start + 8192].astype(np.float64, order="C")
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                if normalize:
                    # by a power of two, exactly: squares of extreme values would overflow or vanish
                    _, exponent = np.frexp(np.abs(block).max(axis=1))
                    block = np.ldexp(block, -exponent[:, None])
                    block /= np.sqrt((block * block).sum(axis=1))[:, None]
                out[start : start + 8192, column : column + width] = block + 0.0
        column += width
    # a tiny negative value may have rounded to -0 only now
    out += np.float16(0)
    return out


@dataclass(frozen=True, slots=True)
class Copies:
    """Rows grouped by bit-identical features; groups are numbered by their smallest row."""

    group: I64
    """(n,) group of each row"""
    first: I64
    """(g,) smallest row of each group, ascending"""
    start: I64
    """(g + 1,) offsets into `members`"""
    members: I64
    """(n,) rows of group 0, of group 1, …; ascending inside a group"""


def group_copies(rows: F16) -> Copies:
    """Find bit-identical rows of an (n, d) float16 array. Memory: ~40 bytes a row."""
    bits = np.ascontiguousarray(rows).view(np.uint16)
    key = np.empty(len(bits), np.uint64)
    _by_rows(lambda b, e: _hash_rows(bits, b, e, key), *bits.shape)
    order = np.argsort(key, kind="stable")
    leader = _leaders(bits, key, order.astype(np.int64, copy=False))
    first, group = np.unique(leader, return_inverse=True)
    start, members = bucketed(group, first.size)
    return Copies(group.astype(np.int64, copy=False), first, start, members)


def bucketed(keys: npt.NDArray[np.integer], buckets: int) -> tuple[I64, I64]:
    """Positions by key as CSR: start (buckets + 1,) and the positions, ascending in each bucket."""
    start = np.zeros(buckets + 1, np.int64)
    np.cumsum(np.bincount(keys, minlength=buckets), out=start[1:])
    return start, np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def inside_runs(sizes: npt.NDArray[np.integer]) -> I64:
    """0 … size − 1 for each run of the given sizes, one run after the other."""
    ends = np.cumsum(sizes)
    inside: I64 = np.arange(int(ends[-1]) if ends.size else 0) - np.repeat(ends - sizes, sizes)
    return inside


def to_float32(rows: F16) -> F32:
    """The same values as float32, (n, d)."""
    bits = np.ascontiguousarray(rows).view(np.uint16)
    out = np.empty(bits.shape, np.float32)
    _by_rows(lambda b, e: _decode(bits, b, e, out), *bits.shape)
    return out


def centered_into(rows: F16, which: I64, center: F32, out: F32) -> F32:
    """Write the rows at positions `which` minus `center` (d,) to `out` (w, d); squared norms (w,).

    The difference of two float16 values is rounded once; `products.relative_error` allows for it.
    """
    norms: F32 = _centered_into(rows.view(np.uint16), which, center, out)
    return norms


def squared_norms(rows: F16) -> npt.NDArray[np.float64]:
    """Squared norm of each row, (n,) float64."""
    bits = np.ascontiguousarray(rows).view(np.uint16)
    out = np.empty(len(bits), np.float64)
    _by_rows(lambda b, e: _squared_norms(bits, b, e, out), *bits.shape)
    return out


def sqdist_pairs(rows: F16, neighbors: npt.NDArray[np.integer]) -> F32:
    """Squared distances of the first n rows to their neighbors (n, k), float32; inf where −1."""
    bits = np.ascontiguousarray(rows).view(np.uint16)
    out = np.full(neighbors.shape, np.inf, np.float32)
    n, k = neighbors.shape
    _by_rows(lambda b, e: _pairs(bits, neighbors, b, e, out), n, bits.shape[1] * k)
    return out


def _by_rows(work: Callable[[int, int], None], rows: int, values: int) -> None:
    """Call work(begin, end) for blocks of rows that have so many values each."""
    block = max(1, BLOCK // max(1, values))
    threads.in_blocks(lambda some: work(some.start, some.stop), rows, block)


@compiled.intrinsic
def half(typing_context, bits):  # type: ignore[no-untyped-def]  # compiled by numba
    """float32 of a float16 given as uint16 bits, exact: by the processor where it can."""
    from llvmlite import ir
    from numba.core import types

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        triple, _, able = context.codegen().magic_tuple()
        if "+f16c" in able.split(",") or triple.startswith(("aarch64", "arm64")):
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())
        return builder.bitcast(_widened(builder, arguments[0]), ir.FloatType())

    return types.float32(types.uint16), generate


def _widened(builder: Any, bits: Any) -> Any:
    """The bits of a float32 from those of a float16, for processors that convert none. No value on
    the way is subnormal, which a program may have told the processor to take for 0.
    """
    from llvmlite import ir

    word, number = ir.IntType(32), ir.FloatType()
    wide = builder.zext(bits, word)
    sign = builder.shl(builder.and_(wide, word(0x8000)), word(16))
    kept = builder.shl(builder.and_(wide, word(0x7FFF)), word(13))
    exponent = builder.and_(kept, word(0x7C00 << 13))
    usual = builder.add(kept, word((127 - 15) << 23))
    # all exponent bits set: infinity or NaN, of float32 too
    endless = builder.add(usual, word((128 - 16) << 23))
    least = word((127 - 14) << 23)  # 2⁻¹⁴, the smallest float16 that is not subnormal
    shifted = builder.bitcast(builder.add(kept, least), number)
    small = builder.bitcast(builder.fsub(shifted, builder.bitcast(least, number)), word)
    out = builder.select(builder.icmp_unsigned("==", exponent, word(0)), small, usual)
    is_endless = builder.icmp_unsigned("==", exponent, word(0x7C00 << 13))
    return builder.or_(builder.select(is_endless, endless, out), sign)


@compiled.njit(fastmath={"reassoc"})
def sqdist_to(x, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """Float32 squared distance of a row widened to float64 to one given as uint16 bits."""
    total = np.float64(0.0)
    for c in range(x.size):
        difference = x[c] - np.float64(half(b[c]))
        total += difference * difference
    return np.float32(total)


@compiled.njit(fastmath={"reassoc", "contract"})
def about(x, b):  # type: ignore[no-untyped-def]  # compiled by numba
    """Squared distance of a row widened to float32 to one given as uint16 bits, in float32.

    At most (d + 4)·2⁻²⁴ off, relative: a sum of d terms that are not negative, in any order.
    """
    total = np.float32(0.0)
    for c in range(x.size):
        difference = x[c] - half(b[c])
        total += difference * difference
    return total


@compiled.njit()
def widen(a, out):  # type: ignore[no-untyped-def]  # compiled by numba
    """float64 of a float16 row given as uint16 bits, written to `out`."""
    for c in range(a.size):
        out[c] = np.float64(half(a[c]))


@compiled.njit(fastmath={"reassoc"})
def squared_norm(a):  # type: ignore[no-untyped-def]  # compiled by numba
    """Float64 squared norm of a float16 row given as uint16 bits."""
    total = np.float64(0.0)
    for c in range(a.size):
        value = np.float64(half(a[c]))
        total += value * value
    return total


@compiled.njit()
def _pairs(bits, neighbors, begin, end, out):  # type: ignore[no-untyped-def]  # compiled by numba
    x = np.empty(bits.shape[1], np.float64)
    for i in range(begin, end):
        widen(bits[i], x)
        for c in range(neighbors.shape[1]):
            if neighbors[i, c] >= 0:
                out[i, c] = sqdist_to(x, bits[neighbors[i, c]])


@compiled.njit()
def _squared_norms(bits, begin, end, out):  # type: ignore[no-untyped-def]  # compiled by numba
    for i in range(begin, end):
        out[i] = squared_norm(bits[i])


@compiled.njit()
def _decode(bits, begin, end, out):  # type: ignore[no-untyped-def]  # compiled by numba
    for i in range(begin, end):
        for c in range(bits.shape[1]):
            out[i, c] = half(bits[i, c])


@compiled.njit(fastmath={"reassoc"})
def _centered_into(bits, which, center, out):  # type: ignore[no-untyped-def]  # compiled by numba
    norm = np.empty(which.size, np.float32)
    for i in range(which.size):
        row = bits[which[i]]
        total = np.float32(0.0)
        for c in range(center.size):
            value = half(row[c]) - center[c]
            out[i, c] = value
            total += value * value
        norm[i] = total
    return norm


@compiled.njit()
def _hash_rows(bits, begin, end, out):  # type: ignore[no-untyped-def]  # compiled by numba
    for i in range(begin, end):
        h = np.uint64(14695981039346656037)
        for c in range(bits.shape[1]):
            h = (h ^ np.uint64(bits[i, c])) * np.uint64(1099511628211)
            h ^= h >> np.uint64(29)
        out[i] = h


@compiled.njit()
def _leaders(bits, key, order):  # type: ignore[no-untyped-def]  # compiled by numba
    """Smallest row with the same bits, per row. Runs of equal hashes are compared bit by bit."""
    n, d = bits.shape
    leader = np.arange(n)
    begin = 0
    while begin < n:
        end = begin + 1
        while end < n and key[order[end]] == key[order[begin]]:
            end += 1
        # rows of a run ascend; all but a hash collision match the first
        for t in range(begin + 1, end):
            row = order[t]
            for s in range(begin, t):
                other = order[s]
                if leader[other] != other:
                    continue
                same = True
                for c in range(d):
                    if bits[row, c] != bits[other, c]:
                        same = False
                        break
                if same:
                    leader[row] = other
                    break
        begin = end
    return leader
