"""Expands brace patterns lazily: `{00000..30000000}` takes no memory before it is iterated.

The syntax is that of the package braceexpand, which webdataset and open_clip use, but which makes
all names of a range before it returns the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_INTEGERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", re.ASCII)
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ESCAPED = re.compile(r"\\(.)")


def expand(pattern: str) -> Iterator[str]:
    r"""The names of a pattern, in order. A backslash takes the next character literally.

    Raises ValueError, before the first name, for braces that are unbalanced or nested too deep.

    >>> list(expand("{a,b}{08..10}"))
    ['a08', 'a09', 'a10', 'b08', 'b09', 'b10']
    """
    try:
        found = _pattern(pattern)
    except RecursionError as error:
        raise ValueError(f"braces are nested too deep: {pattern[:40]!r}…") from error
    return (_ESCAPED.sub(r"\1", name) for name in found)


@dataclass(frozen=True, slots=True)
class _Product:
    """All choices of one text from each part, the last part fastest."""

    parts: list[Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        if not self.parts:
            yield ""
            return
        last = len(self.parts) - 1
        begun: list[Iterator[str]] = [iter(self.parts[0])]
        prefix = [""]
        while begun:
            text = next(begun[-1], None)
            if text is None:
                begun.pop()
                prefix.pop()
            elif len(begun) - 1 == last:
                yield prefix[-1] + text
            else:
                prefix.append(prefix[-1] + text)
                begun.append(iter(self.parts[len(begun)]))


@dataclass(frozen=True, slots=True)
class _Either:
    """The texts of each part in turn."""

    parts: list[_Product]

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            yield from part


@dataclass(frozen=True, slots=True)
class _Numbers:
    """A range of whole numbers, padded with zeros to a width."""

    values: range
    width: int

    def __iter__(self) -> Iterator[str]:
        return (f"{value:0{self.width}d}" for value in self.values)


def _pattern(text: str) -> _Product:
    parts: list[Iterable[str]] = []
    start = depth = at = 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        if text[at] == "{":
            if depth == 0 and at > start:
                parts.append((text[start:at],))
                start = at
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                inner = text[start + 1 : at]
                choice = _choice(inner)
                # braces that hold no choice are themselves
                parts += [("{",), _pattern(inner), ("}",)] if choice is None else [choice]
                start = at + 1
        at += 1
    if depth != 0:
        raise ValueError(f"braces are unbalanced: {text!r}")
    if start < at:
        parts.append((text[start:],))
    return _Product(parts)


def _choice(text: str) -> Iterable[str] | None:
    numbers = _INTEGERS.fullmatch(text)
    if numbers:
        first, last = numbers[1], numbers[2]
        padded = any(n.startswith(("0", "-0")) and n not in ("0", "-0") for n in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return _Numbers(_range(int(first), int(last), numbers[3]), width)
    letters = _LETTERS.fullmatch(text)
    if letters:
        ends = (_ALPHABET.index(letters[1]), _ALPHABET.index(letters[2]))
        return [_ALPHABET[n] for n in _range(*ends, letters[3])]
    return _sequence(text)


def _range(first: int, last: int, step: str | None) -> range:
    by = int(step or 1) or 1
    return range(first, last + 1, by) if first < last else range(first, last - 1, -by)


def _sequence(text: str) -> _Either | None:
    parts: list[_Product] = []
    start = depth = at = 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
        elif text[at] == "," and depth == 0:
            parts.append(_pattern(text[start:at]))
            start = at + 1
        at += 1
    if depth != 0 or not parts:
        return None
    parts.append(_pattern(text[start:]))
    return _Either(parts)
