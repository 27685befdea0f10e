"""Checks of option values that several configurations use."""

from __future__ import annotations

import math
from typing import Any

from d2filter.errors import UsageError


def at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}, allowed is a whole number of at least {least}")


def whole(name: str, value: Any) -> None:
    if not isinstance(value, int):
        raise UsageError(f"{name} is {value!r}, allowed is a whole number")


def finite(value: Any) -> bool:
    """Whether `value` is a finite number that fits into a float. Notebooks may pass any type."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False
