"""Threads of one process: how many to use, and loops over blocks that they share.

Any number of threads may call these functions at once, also in a forked child, which gets threads
of its own. Code that runs in these threads starts no further ones.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

_MOST = 256

_allowed = 0


class _Here(threading.local):
    inside = False


_here = _Here()


def use(count: int) -> None:
    """Let the algorithms of this process use `count` threads."""
    global _allowed
    _allowed = count


def count() -> int:
    """Threads that an algorithm may use: those given to `use`, else one a CPU. One of these threads
    may use itself alone.
    """
    return 1 if _here.inside else _allowed or os.cpu_count() or 1


def in_blocks(work: Callable[[slice], None], size: int, block: int) -> None:
    """Call work on slices of 0 … size − 1 of about `block` items, from the allowed number of
    threads.

    For loops that release the interpreter lock and call no BLAS. The calling thread works too and
    does not wait for threads that have not started, so it also works on a busy machine and from
    many threads at once.
    """
    parts = deque(slice(begin, min(begin + block, size)) for begin in range(0, size, block))

    def take() -> None:
        while parts:
            try:
                part = parts.popleft()
            except IndexError:  # another thread was faster
                return
            work(part)

    helping = [_pool().submit(take) for _ in range(min(len(parts), count()) - 1)]
    try:
        take()
    finally:
        parts.clear()
        begun = [one for one in helping if not one.cancel()]
        for one in begun:
            one.result()


def each(work: Callable[[int], None], number: int) -> None:
    """Call work(0) … work(number − 1) from the allowed number of new threads. Thread-local data
    ends with them.
    """
    threads = min(number, count())
    if threads <= 1:
        for one in range(number):
            work(one)
        return
    with ThreadPoolExecutor(threads, initializer=_enter) as pool:
        for _ in pool.map(work, range(number)):
            pass


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads are made as they are needed, and stay."""
    return ThreadPoolExecutor(_MOST, "d2filter", initializer=_enter)


def _enter() -> None:
    _here.inside = True


_blas_lock = threading.Lock()
_blas_users = 0
_blas_limit: Any = None


def _after_fork() -> None:
    """The one thread of a child is none of these, and nobody else holds the lock."""
    global _blas_lock, _blas_users
    _here.inside = False
    _pool.cache_clear()
    _blas_lock, _blas_users = threading.Lock(), 0


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread until the last caller is done.

    OpenBLAS takes the number from the thread that set one before. If another thread is the last,
    products may stay at one thread, which changes only their speed.
    """
    import threadpoolctl

    global _blas_users, _blas_limit
    with _blas_lock:
        if not _blas_users:
            _blas_limit = threadpoolctl.threadpool_limits(1, "blas")
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if not _blas_users:
                _blas_limit.restore_original_limits()
