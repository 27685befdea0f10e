"""Parses and computes sums of scores: `0.7*clip_score+0.3*column`, `rank(el2n)-rank(column)`.

    score = [sign] term {sign term}      term = [weight *] (name | rank(name))

A name is a computed score or a column. A name with characters other than letters, digits, `_` and
`.` needs double quotes. Values are used as they are. `rank` replaces them by their percentile rank
in the pool (the share of samples with a lower value, plus half of those with the same value), for
scores with different scales.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.errors import UsageError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Keys = tuple[I64, I64]
"""distinct keys of values (`quantile.distinct`), ascending, and how many values have each"""

_PLAIN = re.compile(r"[^\W\d][\w.]*")
_TERM = re.compile(
    r"\s*(?P<sign>[+-]?)\s*"
    r"(?:(?P<weight>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*\*\s*)?"
    r"(?P<rank>rank\s*\(\s*)?"
    r'(?P<name>[^\W\d][\w.]*|"[^"]+")\s*(?P<end>\)?)\s*'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One summand."""

    name: str
    """name of a computed score or a column"""
    weight: float = 1.0
    ranked: bool = False
    """whether the term uses percentile ranks instead of values"""

    def __str__(self) -> str:
        name = self.name if _PLAIN.fullmatch(self.name) else f'"{self.name}"'
        factor = f"rank({name})" if self.ranked else name
        size = abs(self.weight)
        return factor if size == 1 else f"{size!r}".removesuffix(".0") + f"*{factor}"


def parse(text: str) -> tuple[Term, ...]:
    """The terms of a score, in their order. Raises UsageError with the position of an error."""
    terms: list[Term] = []
    at = 0
    while at < len(text) or not terms:
        found = _TERM.match(text, at)
        if found is None or bool(found["rank"]) != bool(found["end"]):
            raise _unreadable(text, at)
        if terms and not found["sign"]:
            raise _unreadable(text, at)
        weight = float(found["weight"] or 1) * (-1 if found["sign"] == "-" else 1)
        if not math.isfinite(weight):
            raise _unreadable(text, at)
        name = found["name"].strip('"')
        terms.append(Term(name=name, weight=weight, ranked=bool(found["rank"])))
        at = found.end()
    return tuple(terms)


def _unreadable(text: str, at: int) -> UsageError:
    return UsageError(
        f"score is {text!r}, unreadable from {text[at:] or 'its end'!r} on: allowed are a name, or "
        "terms such as 0.7*clip_score+0.3*column-rank(el2n)"
    )


def canonical(terms: Sequence[Term]) -> str:
    """The terms as text that `parse` accepts; equal terms give equal text."""
    signs = ["-" if math.copysign(1, term.weight) < 0 else "+" for term in terms]
    return "".join(map("".join, zip(signs, map(str, terms), strict=True))).removeprefix("+")


def combined(terms: Sequence[Term], values: Sequence[npt.NDArray[Any]]) -> F32:
    """Σ_t weight_t · value_t, (n,) float32: summed in float64 in the order of the terms, rounded
    once.

    values: (n,) floats of each term, percentile ranks where a term is ranked. The sum is not finite
    where a value is not finite or the sum overflows float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = terms[0].weight * values[0].astype(np.float64)
        for term, value in zip(terms[1:], values[1:], strict=True):
            total += term.weight * value.astype(np.float64)
        rounded: F32 = total.astype(np.float32)
    return rounded


def merged(parts: Iterable[Keys]) -> Keys:
    """Distinct keys of several parts; counts of equal keys are added. Parts of similar size are
    merged first, so that no key is sorted more than log2(parts) times.
    """
    stack: list[Keys] = []
    for part in parts:
        stack.append(part)
        while len(stack) > 1 and stack[-2][0].size <= 2 * stack[-1][0].size:
            stack[-2:] = [_joined(stack[-2], stack[-1])]
    while len(stack) > 1:
        stack[-2:] = [_joined(stack[-2], stack[-1])]
    return stack[0] if stack else (np.empty(0, np.int64), np.empty(0, np.int64))


def _joined(a: Keys, b: Keys) -> Keys:
    key, at = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    count = np.zeros(key.size, np.int64)
    np.add.at(count, at.reshape(-1), np.concatenate([a[1], b[1]]))
    return key, count


def percentile(keys: I64, pool: Keys, below: I64, n: int) -> F64:
    """Percentile ranks (b + e/2)/n of values, (m,) float64 in (0, 1): of the n values of the pool,
    b are lower and e are equal.

    keys: (m,) keys of the values. pool: keys of the pool, or a range of them that contains all
    `keys`. below: (k,) number of values of the pool below each key of `pool`.
    """
    at = np.searchsorted(pool[0], keys)
    ranks: F64 = (2 * below[at] + pool[1][at]) / np.float64(2 * n)
    return ranks
