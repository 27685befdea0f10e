"""How many samples a budget keeps, and which: the first ranks of one ranking."""

from __future__ import annotations

from decimal import ROUND_FLOOR, Context, Decimal, InvalidOperation

import numpy as np
import numpy.typing as npt

from d2filter.errors import UsageError


def parse_fraction(value: str | float | Decimal) -> Decimal:
    """`value` as an exact decimal in (0, 1]; a float means what it prints (0.3 is 0.3).

    Raises UsageError for anything else.
    """
    try:
        fraction = Decimal(str(value))
    except InvalidOperation:
        fraction = Decimal("NaN")
    if not (fraction.is_finite() and 0 < fraction <= 1):
        raise UsageError(
            f"fraction is {value}, allowed is a number above 0 and at most 1: "
            "--fraction 0.3 keeps 30% of the ranked samples"
        )
    return fraction


def budget_of(ranked: int, *, fraction: Decimal | None = None, budget: int | None = None) -> int:
    """Number of samples to keep: floor(fraction · ranked), or `budget` capped at `ranked`.

    Raises UsageError when that is none.
    """
    if budget is not None:
        return min(budget, ranked)
    if fraction is None:
        raise UsageError("neither fraction nor budget is given: give one of them")
    size = floor_of(fraction, ranked)
    if size == 0:
        raise UsageError(
            f"fraction {fraction} of {ranked} ranked samples is less than one: "
            "raise --fraction, or name a --budget"
        )
    return size


def floor_of(share: Decimal, n: int) -> int:
    """floor(share · n), exactly."""
    # default precision rounds products beyond 28 digits; an exact floor needs them all
    exact = Context(prec=len(share.as_tuple().digits) + len(str(n)) + 2)
    return int(exact.multiply(share, n).to_integral_value(rounding=ROUND_FLOOR))


def raw_scores(difficulty: npt.NDArray[np.float32], kept_first: str) -> npt.NDArray[np.float32]:
    """Scores as they were before low ones were turned to go first, (n,) float32."""
    return -difficulty if kept_first == "low" else difficulty


def kept_mask(
    rank: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    size: int,
    min_score: float | None = None,
) -> npt.NDArray[np.bool_]:
    """True for the rows among the first `size` ranks, shape (n,) bool.

    rank: (n,) int64, 0 = first. scores: (n,) float32, `raw_scores`. `min_score` then drops rows of
    lower scores from that prefix, whichever end of the scores goes first; it never lets later ranks
    move up.
    """
    kept = rank < size
    if min_score is not None:
        # in float32, as scores are stored: 0.7 must keep a score of 0.7
        with np.errstate(over="ignore"):  # beyond float32 lies what none, or all, of them reach
            kept &= scores >= np.float32(min_score)
    return kept
