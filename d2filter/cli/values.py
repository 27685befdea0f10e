"""Converts the texts of option values, for argparse and for YAML files.

Each function raises argparse.ArgumentTypeError that names the text and what is allowed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from d2filter import config


def share(text: str, allowed: str = "allowed is") -> Decimal:
    """A decimal number such as 0.4. allowed: begin of the message."""
    try:
        return Decimal(text)
    except InvalidOperation:
        raise argparse.ArgumentTypeError(f"{text!r}, {allowed} a number such as 0.4") from None


def share_or_auto(text: str) -> Decimal | str:
    """A decimal number, or `auto`."""
    return text if text == config.AUTO else share(text, "allowed are auto and")


def partitions(text: str) -> int:
    """A number of partitions; 0 for `auto`."""
    if text == "auto":
        return 0
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, allowed are auto and whole numbers from 1")
    return int(text)


def size(text: str) -> int:
    """Bytes from a text such as 1GB."""
    try:
        return config.parse_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, allowed is a size: 1GB, 800MiB, 2e9") from None


def count(text: str) -> int:
    """A whole number such as 12800000, 12.8e6 or 12.8M."""
    word = text.strip().replace(",", "").replace("_", "")
    times = {"k": 10**3, "m": 10**6, "b": 10**9}.get(word[-1:].lower(), 1)
    try:
        value = Decimal(word if times == 1 else word[:-1]) * times
        whole = value.is_finite() and 1 <= value <= 10**15 and value == int(value)
    except InvalidOperation:
        whole = False
    if not whole:
        raise argparse.ArgumentTypeError(
            f"{text!r}, allowed is a whole number: 12800000, 12.8e6 or 12.8M (K, M, B)"
        )
    return int(value)


def comma_separated(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A function that converts a list of values, separated by commas."""

    def values(text: str) -> list[Any]:
        try:
            return [convert(word.strip()) for word in text.split(",")]
        except (ValueError, InvalidOperation, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(
                f"{text!r}, allowed are values separated by commas"
            ) from None

    return values


def copies(text: str) -> float | str | None:
    """A squared distance, `auto`, or None for `none`."""
    if text in ("none", "auto"):
        return None if text == "none" else text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}, allowed are auto, none and a squared distance such as 0.01"
        ) from None


def number_or_auto(text: str) -> float | str:
    """A number, or `auto`."""
    if text == config.AUTO:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, allowed are a number and auto") from None


CONVERTERS: dict[str, Callable[[str], Any]] = {
    "text": str,
    "texts": str,
    "whole number": int,
    "number": float,
    "share": share,
    "auto or share": share_or_auto,
    "auto or number": number_or_auto,
    "copies": copies,
    "bytes": size,
    "partitions": partitions,
}
"""function that converts the text of a value, by `options.Kind`"""
