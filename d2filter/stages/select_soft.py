"""Soft selection (`select --soft`): repeats samples by score (`algorithm/soft.py`).

D2 uses the final score, so that near-copies share the repeats that one of them would get. Other
methods use the difficulty. Demoted samples and samples below --min-score get no repeats. With
classes, each class gets as many repeats in all as it has samples among the first B ranks, which is
its share without `--soft`; a class in which no sample may be repeated gets none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import budget, soft
from d2filter.algorithm.greedy import messages
from d2filter.config import SelectConfig
from d2filter.errors import UsageError

I64 = npt.NDArray[np.int64]

COLUMNS = ("uid_hi", "uid_lo", "difficulty", "forward", "final", "rank")
"""columns of the ranking that are read"""


def times(
    columns: Mapping[str, npt.NDArray[Any]],
    config: SelectConfig,
    kept_first: str,
    method: str,
    sizes: Sequence[int],
    group: I64 | None = None,
) -> list[I64]:
    """Copies of each sample of a ranking, (n,) int64, for each of `sizes`.

    columns: COLUMNS of the whole ranking, (n,) each, in any order of rows. sizes: total numbers of
    samples, with repeats. group: (n,) classes. Memory: about 60 bytes per sample, with classes 100.
    Raises UsageError if no sample has a score of at least `min_score`.
    """
    assert config.soft is not None
    difficulty = columns["difficulty"].astype(np.float32)
    among = columns["forward"] != messages.FLOOR
    if config.min_score is not None:
        raw = budget.raw_scores(difficulty, kept_first)
        among &= budget.kept_mask(columns["rank"], raw, len(among), config.min_score)
    rows = np.flatnonzero(among)
    if not rows.size:
        raise UsageError(f"no sample has a score of at least min-score {config.min_score}")
    # how far a score is below 0 does not matter: better neighbors represent the sample
    score = np.maximum(columns["final"][rows], 0) if method == "d2" else difficulty[rows]
    hi, lo = columns["uid_hi"][rows].astype(np.uint64), columns["uid_lo"][rows].astype(np.uint64)
    found = []
    for size in sizes:
        out = np.zeros(among.size, np.int64)
        if group is None:
            out[rows] = soft.copies(score, hi, lo, size, config.soft)
        else:
            quota = np.bincount(group[columns["rank"] < size], minlength=int(group.max()) + 1)
            out[rows] = soft.copies_by_class(score, hi, lo, group[rows], quota, config.soft)
        found.append(out)
    return found
