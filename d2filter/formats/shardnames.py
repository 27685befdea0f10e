"""Finds the shard of a run that a URL names, even if the shard has moved.

A run records the address that a shard was given with. A trainer may use another address for it: a
copy, another mount, a pipe.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from urllib.parse import unquote

from d2filter.errors import InputError
from d2filter.formats.webdataset import clean
from d2filter.text import redacted

_SHOWN = 2
_PIPE = "pipe:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_IN_QUERY = re.compile(r"=([^=&#]+\.tar)(?:[&#]|$)", re.IGNORECASE)  # get?file=a/0.tar


class ShardNames:
    """The shards of a run, looked up by URL.

    A URL names the shard with the same address, otherwise the one with the same file name. Of
    several, it names the one whose path shares the most folders at its end: `/mnt/b/0.tar` is
    `s3://pool/b/0.tar` rather than `s3://pool/a/0.tar`.

    >>> names = ShardNames(["s3://pool/a/0.tar", "s3://pool/b/0.tar", "s3://pool/a/1.tar"])
    >>> names.find("/mnt/b/0.tar"), names.find("pipe:aws s3 cp s3://x/1.tar -"), names.find("2.tar")
    (1, 2, -1)
    """

    def __init__(self, names: Sequence[str]) -> None:
        """names: distinct, as the run has them."""
        self._names = names
        self._exact = {name: number for number, name in enumerate(names)}
        self._alike: dict[str, list[tuple[list[str], int]]] = defaultdict(list)
        for number, name in enumerate(names):
            path = _path(name)
            self._alike[path[-1]].append((path, number))

    def find(self, url: str) -> int:
        """Number of the shard that a URL names, −1 for none. Raises InputError for a URL that may
        name several.
        """
        exact = self._exact.get(clean(url))
        if exact is not None:
            return exact
        path = _path(url)
        alike = self._alike.get(path[-1])
        if not alike:
            return -1
        common = [_common(path, other) for other, _ in alike]
        best = [number for (_, number), c in zip(alike, common, strict=True) if c == max(common)]
        if len(best) > 1:
            several = " or ".join(self._names[number] for number in best[:_SHOWN])
            raise InputError(
                f"shard {shown(url)} may be the shard {several} of the run: give shards with the "
                "folders in which they differ"
            )
        return best[0]


def shown(url: str) -> str:
    """A shard's URL for a message: of a command only what it reads, and no login or signature."""
    url = clean(url)
    return redacted(_piped(url.removeprefix(_PIPE)) if url.startswith(_PIPE) else url)


def _path(url: str) -> list[str]:
    """Folders and file name of a shard, without what may differ between two names of one: scheme,
    query, the suffix .tar.
    """
    url = clean(url)
    if url.startswith(_PIPE):
        url = _piped(url.removeprefix(_PIPE))
    url = url.rpartition("::")[2] if "://" in url else url  # of chained file systems the innermost
    found = _SCHEME.match(url)
    if found:
        url, _, query = url[found.end() :].partition("?")
        url = url.partition("#")[0]
        named = _IN_QUERY.search(query)
        if named and not url.lower().endswith(".tar"):
            url = unquote(named[1])
    else:
        url = os.path.normpath(url.removeprefix("file:"))
    parts = [part for part in url.split("/") if part not in ("", ".")] or [url]
    base = parts[-1]
    if base.lower().endswith(".tar"):
        parts[-1] = base[: -len(".tar")]
    return parts


def _piped(command: str) -> str:
    """What a shell command reads: its last word that holds `.tar`."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    words = words or [command]
    return next((word for word in reversed(words) if ".tar" in word.lower()), words[0])


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts two paths end in alike."""
    count = 0
    for a, b in _backwards(one, other):
        if a != b:
            break
        count += 1
    return count


def _backwards(one: Sequence[str], other: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(reversed(one), reversed(other), strict=False)
