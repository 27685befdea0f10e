"""Estimates the share of image-text pairs that match no better than random pairs.

rows = features[pairs.sampled(hi, lo)]
share = pairs.wrong_share({"pairs": pairs.judged(rows)})
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
"""pairs that are looked at; the standard error of the share is below 0.01 then"""
LEAST = 100
"""with fewer, nothing is said"""


def sampled(hi: uids.U64, lo: uids.U64) -> npt.NDArray[np.int64]:
    """Rows that are looked at: up to SAMPLE, chosen by a hash of the uid."""
    return uids.hash_sample(hi, lo, SAMPLE, salt=uids.SALT_PAIRS)


def judged(rows: npt.NDArray[np.floating]) -> dict[str, int]:
    """How many of m pairs were looked at, and how many are like random ones; nothing for fewer than
    LEAST. rows: (m, d), an image and a text embedding of d/2 each.
    """
    if len(rows) < LEAST:
        return {}
    width = rows.shape[1] // 2
    found = like_random(rows[:, :width], rows[:, width:])
    return {"looked_at": len(rows), "like_random": found}


def like_random(image: npt.NDArray[np.floating], text: npt.NDArray[np.floating]) -> int:
    """How many of m pairs match no better than random ones: twice those whose cosine is at most the
    median cosine of pairs that were made at random, m at most.

    image, text: (m, d), m ≥ 2, row i of both is one pair, in an order that has nothing to do with
    their content. A wrong pair lies below that median with probability 1/2. A right one lies there
    where the model cannot tell: it counts, too, for no filter by this model can know better.
    """
    own = _cosines(image, text)
    made = np.sort(_cosines(image, np.roll(text, 1, axis=0)))
    below = int(np.count_nonzero(own <= made[(made.size - 1) // 2]))
    return min(own.size, 2 * below)


def wrong_share(figures: Mapping[str, Any]) -> Fraction | None:
    """The share of such pairs, from the figures of a catalog; None where it is not known."""
    looked_at = figures.get("pairs", {}).get("looked_at", 0)
    return Fraction(figures["pairs"]["like_random"], looked_at) if looked_at else None


def _cosines(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> F64:
    left, right = a.astype(np.float64), b.astype(np.float64)
    lengths = np.sqrt((left * left).sum(axis=1) * (right * right).sum(axis=1))
    found: F64 = (left * right).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
    return found
