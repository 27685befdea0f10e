"""Estimates the share of image-text pairs that match no better than random pairs.

For a pool with the arrays `hi`, `lo` and `features`:

    rows = features[mismatched.sampled(hi, lo)]
    share = mismatched.wrong_share({"pairs": mismatched.judged(rows)})
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids

F64 = npt.NDArray[np.float64]

SAMPLE = 1 << 14
"""number of pairs on which the share is estimated; its standard error is then below 0.01"""
LEAST = 100
"""fewest pairs for an estimate"""


def sampled(hi: uids.U64, lo: uids.U64) -> npt.NDArray[np.int64]:
    """Rows to estimate the share on: up to SAMPLE, chosen by a hash of the uid."""
    return uids.hash_sample(hi, lo, SAMPLE, salt=uids.SALT_PAIRS)


def judged(rows: npt.NDArray[np.floating]) -> dict[str, int]:
    """Number of compared pairs, and how many of them match no better than random pairs; empty for
    fewer than LEAST pairs.

    rows: (m, d), an image and a text embedding of d/2 each.
    """
    if len(rows) < LEAST:
        return {}
    width = rows.shape[1] // 2
    found = like_random(rows[:, :width], rows[:, width:])
    return {"looked_at": len(rows), "like_random": found}


def like_random(image: npt.NDArray[np.floating], text: npt.NDArray[np.floating]) -> int:
    """How many of m pairs match no better than random pairs: twice the number of pairs whose cosine
    is at most the median cosine of random pairs, at most m.

    image, text: (m, d), m ≥ 2; row i of both is one pair; the order must not depend on the content.
    The cosine of a wrong pair is below that median with probability 1/2. A right pair that the
    model cannot recognize counts too, because a filter that uses this model cannot recognize it
    either.
    """
    own = _cosines(image, text)
    made = np.sort(_cosines(image, np.roll(text, 1, axis=0)))
    below = int(np.count_nonzero(own <= made[(made.size - 1) // 2]))
    return min(own.size, 2 * below)


def wrong_share(figures: Mapping[str, Any]) -> Fraction | None:
    """Share of pairs that match no better than random pairs, from the figures of a catalog; None if
    it was not measured.
    """
    looked_at = figures.get("pairs", {}).get("looked_at", 0)
    return Fraction(figures["pairs"]["like_random"], looked_at) if looked_at else None


def _cosines(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> F64:
    left, right = a.astype(np.float64), b.astype(np.float64)
    lengths = np.sqrt((left * left).sum(axis=1) * (right * right).sum(axis=1))
    found: F64 = (left * right).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
    return found
