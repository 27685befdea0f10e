"""The one place where faiss is loaded, and where products run on a CPU or on a GPU.

Products only propose: they improve the heap of each query with what lies in one cell. Their
distances may be off by `relative_error`; what they propose is then measured exactly, so the path
chosen here cannot change a list.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from d2filter.algorithm import features
from d2filter.errors import DependencyError

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

UNIT_ROUNDOFF = 2.0**-24

_QUERIES = 4096  # rows of one product on a CPU: with _MEMBERS it bounds the product to 64 MB
_MEMBERS = 4096
_STRIP = 16  # values of a product that are compared at once with what a heap still takes
_GPU_BYTES = 2**31  # of one block on a GPU: queries, members and faiss's own tiles

_threads = 0


@cache
def load_faiss() -> Any:
    """The faiss module. Raises DependencyError that names both extras when there is none."""
    try:
        import faiss
    except ImportError as error:
        raise DependencyError(
            "faiss is not installed and the graph needs it: pip install 'd2filter[cpu]', "
            "or 'd2filter[gpu]' on a machine with an NVIDIA GPU"
        ) from error
    return faiss


def use_threads(count: int) -> None:
    """Let the searches, numba and faiss use `count` threads of this process."""
    global _threads
    _threads = count
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set at run time
    numba.set_num_threads(min(count, most))
    try:
        load_faiss().omp_set_num_threads(count)
    except DependencyError:
        return  # ranking needs none; the graph stage will say so


def threads() -> int:
    """Threads that a search may use: those given to `use_threads`, else one a CPU."""
    return _threads or os.cpu_count() or 1


def each(work: Callable[[int], None], count: int) -> None:
    """Call work(0) … work(count − 1) from as many threads as allowed, BLAS in one thread each.

    Products and compiled loops release the interpreter, and a thread that has its own products
    never waits for others between two small ones.
    """
    import threadpoolctl

    if not count:
        return
    with threadpoolctl.threadpool_limits(1, "blas"):
        _touch_buffers(min(count, threads()))
        # faiss's GPU resources serve one thread at a time
        if min(count, threads()) <= 1 or gpus():
            for number in range(count):
                work(number)
            return
        # numba's own threads are counted by calling thread: none beside ours
        with ThreadPoolExecutor(
            min(count, threads()), initializer=numba.set_num_threads, initargs=(1,)
        ) as pool:
            for _ in pool.map(work, range(count)):
                pass


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
    """Whether the faiss of this installation knows GPUs at all: what to ask a cluster for."""
    try:
        return hasattr(load_faiss(), "knn_gpu")
    except DependencyError:
        return False  # the workers will say so


def improve_inplace(
    queries: F16, askers: I64, members: F16, which: I64, names: I64, center: F32, heaps: Heaps
) -> None:
    """Offer the members of one cell to the queries that ask for it.

    queries: (q, d); askers: positions in it. members: (m, d); which: positions in it; names: what
    the heaps are to call them. center: (d,) float32, a point near both: products of differences to
    it are the more exact the nearer it is.
    """
    if gpus():
        _improve_on_gpu_inplace(queries, askers, members, which, names, heaps)
        return
    for begin in range(0, which.size, _MEMBERS):
        part = slice(begin, begin + _MEMBERS)
        y, y_norm = features.centered(members, which[part], center)
        for start in range(0, askers.size, _QUERIES):
            block = askers[start : start + _QUERIES]
            x, x_norm = features.centered(queries, block, center)
            _scan_inplace(
                x @ y.T, x_norm, y_norm, block, names[part], heaps.near, heaps.ids, heaps.reach
            )


class Heaps:
    """The nearest found so far of q queries, as max-heaps of f places."""

    __slots__ = ("ids", "near", "reach")

    def __init__(self, queries: int, places: int) -> None:
        self.near: F32 = np.full((queries, places), np.inf, np.float32)
        """(q, f) approximate squared distances, the largest first; inf where free"""
        self.ids: I64 = np.full((queries, places), -1, np.int64)
        """(q, f) members, −1 where free"""
        self.reach: F32 = np.zeros(queries, np.float32)
        """(q,) largest squared norm that a query had in a product: what the error bound needs"""


def gpu_block(members: int, dim: int, places: int) -> int:
    """Queries of one `knn_gpu` call so that it stays within _GPU_BYTES."""
    free = _GPU_BYTES - 2 * dim * members
    return max(256, free // (2 * dim + 12 * places + 4 * min(members, 65536)))


def _improve_on_gpu_inplace(
    queries: F16, askers: I64, members: F16, which: I64, names: I64, heaps: Heaps
) -> None:
    """faiss.knn_gpu on float16 rows as they are: products of float16 are exact in float32."""
    places = min(heaps.ids.shape[1], which.size)
    rows_at_once = max(places, _GPU_BYTES // (8 * members.shape[1]))
    for begin in range(0, which.size, rows_at_once):
        part = slice(begin, begin + rows_at_once)
        y = np.ascontiguousarray(members[which[part]])
        wanted = min(places, len(y))
        step = gpu_block(len(y), members.shape[1], wanted)
        for start in range(0, askers.size, step):
            block = askers[start : start + step]
            x = np.ascontiguousarray(queries[block])
            distance, index = load_faiss().knn_gpu(_gpu_resources(), x, y, wanted)
            norm = features.squared_norms(x).astype(np.float32)
            _offer_inplace(
                distance, index, norm, block, names[part], heaps.near, heaps.ids, heaps.reach
            )


@cache
def _gpu_resources() -> Any:
    return load_faiss().StandardGpuResources()


@numba.njit(cache=True, nogil=True)
def _replace_top(near, ids, distance, number):  # type: ignore[no-untyped-def]
    """Put a nearer member in place of the farthest of a max-heap."""
    size = near.size
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and near[child + 1] > near[child]:
            child += 1
        if near[child] <= distance:
            break
        near[at] = near[child]
        ids[at] = ids[child]
        at = child
    near[at] = distance
    ids[at] = number


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "reassoc", "contract"})
def _scan_inplace(product, x_norm, y_norm, askers, which, near, ids, reach):  # type: ignore[no-untyped-def]
    """Offer ‖x‖² + ‖y‖² − 2x·y to the heaps, strip by strip."""
    count, members = product.shape
    whole = members // _STRIP * _STRIP
    for a in range(count):
        q = askers[a]
        row = product[a]
        heap = near[q]
        names = ids[q]
        own = x_norm[a]
        reach[q] = max(reach[q], own)
        for begin in range(0, whole, _STRIP):
            strip = row[begin : begin + _STRIP]
            norms = y_norm[begin : begin + _STRIP]
            least = np.float32(np.inf)
            for b in range(_STRIP):  # of fixed length: compiled to vectors
                d = norms[b] - np.float32(2.0) * strip[b]
                least = d if d < least else least
            if least + own < heap[0]:
                for b in range(_STRIP):
                    d = norms[b] - np.float32(2.0) * strip[b] + own
                    if d < heap[0]:
                        _replace_top(heap, names, d, which[begin + b])
        for b in range(whole, members):
            d = y_norm[b] - np.float32(2.0) * row[b] + own
            if d < heap[0]:
                _replace_top(heap, names, d, which[b])


@numba.njit(cache=True, nogil=True)
def _offer_inplace(distance, index, x_norm, askers, which, near, ids, reach):  # type: ignore[no-untyped-def]
    """Offer lists of nearest members to the heaps."""
    for a in range(askers.size):
        q = askers[a]
        reach[q] = max(reach[q], x_norm[a])
        for t in range(index.shape[1]):
            if index[a, t] >= 0 and distance[a, t] < near[q, 0]:
                _replace_top(near[q], ids[q], distance[a, t], which[index[a, t]])
