"""The one place where faiss is loaded and its matrix products are called."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.errors import DependencyError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

UNIT_ROUNDOFF = 2.0**-24


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
    """Let numba and, where it is installed, faiss use `count` threads of this process."""
    import numba

    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set at run time
    numba.set_num_threads(min(count, most))
    try:
        load_faiss().omp_set_num_threads(count)
    except DependencyError:
        return  # ranking needs none; the graph stage will say so


def nearest(queries: F32, rows: F32, k: int) -> tuple[F32, I64]:
    """Squared distances (q, k) float32 ascending and row numbers (q, k) int64, −1 pads.

    queries: (q, d), rows: (n, d), both float32. The distances are those of a matrix product:
    its error is bounded by `relative_error`.
    """
    distance, index = load_faiss().knn(queries, rows, k)
    return distance, index


def relative_error(dim: int) -> float:
    """c such that ‖x‖² + ‖y‖² − 2x·y in float32 is off by at most c·(‖x‖ + ‖y‖)².

    Every one of the three sums of `dim` products is off by at most (dim + 2)·u·‖x‖‖y‖ (Higham,
    Accuracy and Stability, §3.1); the last three operations and the rounding of the exact distance
    add a few u more.
    """
    return (dim + 8) * UNIT_ROUNDOFF
