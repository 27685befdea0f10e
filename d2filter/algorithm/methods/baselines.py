"""The two simplest rankings to compare with: random order, and highest score first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids


def by_score(
    difficulty: npt.NDArray[np.float32], hi: uids.U64, lo: uids.U64
) -> npt.NDArray[np.int64]:
    """Row numbers, shape (n,) int64, highest difficulty first, ties by ascending uid.

    difficulty: (n,) float32 without NaN. With the CLIP score as difficulty this is DataComp's
    "CLIP score" filter.
    """
    return np.lexsort((lo, hi, -difficulty.astype(np.float64))).astype(np.int64, copy=False)


def at_random(hi: uids.U64, lo: uids.U64, *, seed: int = 0) -> npt.NDArray[np.int64]:
    """Row numbers, shape (n,) int64, in the order of a seeded hash of the uid."""
    key = uids.hashed(hi, lo, salt=uids.SALT_RANDOM_BASELINE, seed=seed)
    return np.lexsort((lo, hi, key)).astype(np.int64, copy=False)
