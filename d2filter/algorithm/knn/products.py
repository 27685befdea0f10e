"""Matrix products for the neighbor search, on CPU or GPU. The only module that loads faiss.

A product gives approximate distances, with an error of at most `relative_error`. Its results are
only proposals, which `search` then measures exactly. CPU and GPU therefore give the same lists.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled, features, threads
from d2filter.errors import DependencyError

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

UNIT_ROUNDOFF = 2.0**-24

QUERIES = 1024  # rows of one product on a CPU: with MEMBERS it bounds the product to 16 MB
MEMBERS = 4096
_STRIP = 16  # values of a product that are compared at once with what a list still takes
GPU_BYTES = 2**31  # of one block on a GPU: queries, members and faiss's own tiles

_threads = 0
_forked = False


@cache
def load_faiss() -> Any:
    """The faiss module, with the threads that `use_threads` allowed. Raises DependencyError that
    names both extras when there is none.
    """
    try:
        import faiss
    except ImportError as error:
        raise DependencyError(
            "faiss is not installed and the graph needs it: pip install 'd2filter[cpu]', "
            "or 'd2filter[gpu]' on a machine with an NVIDIA GPU"
        ) from error
    if _threads:
        faiss.omp_set_num_threads(_threads)
    os.register_at_fork(after_in_child=_faiss_alone)
    return faiss


def _faiss_alone() -> None:
    """OpenMP's threads stay behind in the parent; the child of a fork would wait for ever."""
    global _forked
    _forked = True
    load_faiss().omp_set_num_threads(1)


def use_threads(count: int) -> None:
    """Let the algorithms and faiss use `count` threads of this process."""
    global _threads
    _threads = count
    threads.use(count)
    # ranking needs no faiss: it is told when it is loaded
    if load_faiss.cache_info().currsize:
        load_faiss().omp_set_num_threads(1 if _forked else count)


def each(work: Callable[[int], None], count: int) -> None:
    """Call work(0) … work(count − 1) from the allowed number of threads, each with one BLAS thread.

    Products and compiled loops release the interpreter lock, so a thread with products of its own
    never waits for the others between two small ones.
    """
    if not count:
        return
    with threads.one_blas_thread():
        _touch_buffers(min(count, threads.count()))
        # faiss's GPU resources serve one thread at a time
        if gpus():
            for number in range(count):
                work(number)
        else:
            threads.each(work, count)


@cache
def _touch_buffers(count: int) -> None:
    """One large product in each of `count` threads at once, once a process.

    OpenBLAS packs into buffers that it maps lazily. Where the first products are small ones the
    buffers can end up in small pages, and every later product runs at a quarter of its speed.
    """
    square = np.ones((1024, 1024), np.float32)
    with ThreadPoolExecutor(count) as pool:
        for _ in pool.map(lambda _: square @ square, range(count)):
            pass


def relative_error(dim: int) -> float:
    """c such that ‖x‖² + ‖y‖² − 2x·y in float32 is off by at most c·(‖x‖ + ‖y‖)².

    Every one of the three sums of `dim` products is off by at most (dim + 2)·u·‖x‖‖y‖ (Higham,
    Accuracy and Stability, §3.1); the subtraction of a center, the last three operations and the
    rounding of the exact distance add a few u more.
    """
    return (dim + 16) * UNIT_ROUNDOFF


def gpus() -> int:
    """GPUs that faiss can use in this process."""
    faiss = load_faiss()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "knn_gpu") else 0


def may_use_gpus() -> bool:
    """Whether the installed faiss supports GPUs: if not, none are requested from Ray."""
    try:
        return hasattr(load_faiss(), "knn_gpu")
    except DependencyError:
        return False  # the workers will say so


def improve_inplace(
    queries: F16, askers: I64, members: F16, which: I64, names: I64, center: F32, held: Nearest
) -> None:
    """Compare the members of one cell with the queries that probe it, and update `held` with the
    nearest.

    queries: (q, d); askers: positions in it. members: (m, d); which: positions in it; names: the
    ids that the lists get for them. center: (d,) float32, a point near both; products are computed
    on differences to it, which are more exact the nearer it is.
    """
    if gpus():
        _improve_on_gpu_inplace(queries, askers, members, which, names, held)
        return
    for begin in range(0, which.size, MEMBERS):
        part = slice(begin, begin + MEMBERS)
        y = _scratch.take("members", which[part].size, center.size)
        y_norm = features.centered_into(members, which[part], center, y)
        for start in range(0, askers.size, QUERIES):
            block = askers[start : start + QUERIES]
            x = _scratch.take("queries", block.size, center.size)
            x_norm = features.centered_into(queries, block, center, x)
            product = _scratch.take("product", block.size, len(y))
            np.matmul(x, y.T, out=product)
            _scan_inplace(
                product, x_norm, y_norm, block, names[part], held.near, held.ids, held.reach
            )


class _Scratch(threading.local):
    """Buffers of a thread that serve again: new pages for every product took a third of its time.

    They go with the thread, or stay as large as the largest product of the calling one.
    """

    def __init__(self) -> None:
        self._held: dict[str, F32] = {}

    def take(self, name: str, rows: int, columns: int) -> F32:
        """An uninitialized (rows, columns) array, valid until the same name is taken again."""
        size = rows * columns
        if name not in self._held or self._held[name].size < size:
            self._held[name] = np.empty(size, np.float32)
        return self._held[name][:size].reshape(rows, columns)


_scratch = _Scratch()


class Nearest:
    """The nearest found so far of q queries."""

    __slots__ = ("ids", "near", "reach")

    def __init__(self, queries: int, places: int) -> None:
        self.near: F32 = np.full((queries, places), np.inf, np.float32)
        """(q, f) approximate squared distances, ascending; inf where free"""
        self.ids: I64 = np.full((queries, places), -1, np.int64)
        """(q, f) members, −1 where free"""
        self.reach: F32 = np.zeros(queries, np.float32)
        """(q,) largest squared norm that a query had in a product: what the error bound needs"""


def gpu_block(members: int, dim: int, places: int) -> int:
    """Queries of one `knn_gpu` call so that it stays within GPU_BYTES."""
    free = GPU_BYTES - 4 * dim * members
    return max(256, free // (4 * dim + 12 * places + 4 * min(members, 65536)))


def _improve_on_gpu_inplace(
    queries: F16, askers: I64, members: F16, which: I64, names: I64, held: Nearest
) -> None:
    """faiss.knn_gpu on float32 rows. With float16 rows its distances were off by up to five times
    what `relative_error` allows, and no faster (jobs/results/bench_gpu.md).
    """
    places = min(held.ids.shape[1], which.size)
    rows_at_once = max(places, GPU_BYTES // (8 * members.shape[1]))
    for begin in range(0, which.size, rows_at_once):
        part = slice(begin, begin + rows_at_once)
        y = members[which[part]].astype(np.float32)
        wanted = min(places, len(y))
        step = gpu_block(len(y), members.shape[1], wanted)
        for start in range(0, askers.size, step):
            block = askers[start : start + step]
            x = np.ascontiguousarray(queries[block])
            distance, index = load_faiss().knn_gpu(
                _gpu_resources(), x.astype(np.float32), y, wanted
            )
            norm = features.squared_norms(x).astype(np.float32)
            _offer_inplace(
                distance, index, norm, block, names[part], held.near, held.ids, held.reach
            )


@cache
def _gpu_resources() -> Any:
    return load_faiss().StandardGpuResources()


@compiled.intrinsic
def _nearer(typing_context, product, norms, begin, bar):  # type: ignore[no-untyped-def]
    """Bits of the _STRIP places from `begin` on where ‖y‖² − 2x·y is below `bar`."""
    from llvmlite import ir
    from numba.core import types

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        vector = ir.VectorType(ir.FloatType(), _STRIP)

        def strip(number: int) -> Any:
            array = context.make_array(signature.args[number])(context, builder, arguments[number])
            place = builder.bitcast(builder.gep(array.data, [arguments[2]]), vector.as_pointer())
            return builder.load(place, align=4)

        first = builder.insert_element(
            ir.Constant(vector, ir.Undefined), arguments[3], ir.Constant(ir.IntType(32), 0)
        )
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), _STRIP), [0] * _STRIP)
        bars = builder.shuffle_vector(first, first, everywhere)
        two = ir.Constant(vector, [2.0] * _STRIP)
        distance = builder.fsub(strip(1), builder.fmul(two, strip(0)))
        below = builder.fcmp_ordered("<", distance, bars)
        return builder.zext(builder.bitcast(below, ir.IntType(_STRIP)), ir.IntType(32))

    return types.uint32(product, norms, types.int64, types.float32), generate


@compiled.intrinsic
def _lowest_bit(typing_context, bits):  # type: ignore[no-untyped-def]
    """Number of the lowest bit that is set; there must be one."""
    from llvmlite import ir
    from numba.core import types

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.zext(
            builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1)), ir.IntType(64)
        )

    return types.int64(types.uint32), generate


@compiled.njit()
def _insert(near, ids, distance, number):  # type: ignore[no-untyped-def]
    """Put a member into a list that is sorted by distance; the last one falls out."""
    at = near.size - 1
    while at > 0 and near[at - 1] > distance:
        near[at] = near[at - 1]
        ids[at] = ids[at - 1]
        at -= 1
    near[at] = distance
    ids[at] = number


@compiled.njit(fastmath={"nnan", "nsz", "contract"})
def _scan_inplace(product, x_norm, y_norm, askers, which, near, ids, reach):  # type: ignore[no-untyped-def]
    """Offer ‖x‖² + ‖y‖² − 2x·y to the lists; most strips have nothing that is near enough."""
    count, members = product.shape
    last = near.shape[1] - 1
    whole = members // _STRIP * _STRIP
    for a in range(count):
        q = askers[a]
        row = product[a]
        own = x_norm[a]
        reach[q] = max(reach[q], own)
        for begin in range(0, whole, _STRIP):
            bits = _nearer(row, y_norm, begin, near[q, last] - own)
            while bits:
                b = begin + _lowest_bit(bits)
                bits &= bits - np.uint32(1)
                d = y_norm[b] - np.float32(2.0) * row[b] + own
                if d < near[q, last]:
                    _insert(near[q], ids[q], d, which[b])
        for b in range(whole, members):
            d = y_norm[b] - np.float32(2.0) * row[b] + own
            if d < near[q, last]:
                _insert(near[q], ids[q], d, which[b])


@compiled.njit()
def _offer_inplace(distance, index, x_norm, askers, which, near, ids, reach):  # type: ignore[no-untyped-def]
    """Offer lists of nearest members to the lists held."""
    last = near.shape[1] - 1
    for a in range(askers.size):
        q = askers[a]
        reach[q] = max(reach[q], x_norm[a])
        for t in range(index.shape[1]):
            if index[a, t] >= 0 and distance[a, t] < near[q, last]:
                _insert(near[q], ids[q], distance[a, t], which[index[a, t]])
