"""Training on a subset without copying it: a webdataset stage that lets kept samples through.

    stage = d2filter.keep("OUT")
    dataset = wds.WebDataset(urls).compose(stage).decode("pil")
    length = sum(stage.expected(urls).values())

The stage looks a sample's uid up in the sorted subset, which lies in a memory map that all workers
of a machine share.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.errors import InputError, RunStateError
from d2filter.formats import subset as subset_format
from d2filter.formats import uid as uid_format
from d2filter.formats import webdataset
from d2filter.formats.paths import Folder, absolute
from d2filter.formats.rows import mapped

Subset = npt.NDArray[np.void]

_KEY = b'"uid"'
_MARK = b'"uid": "'  # as json.dumps writes it
_MARK_TO_END = len(_MARK) + 32
_BACKSLASH = 92


def load_subset(subset: str | os.PathLike[str] | Subset) -> Subset:
    """A subset as (n,) of (u8, u8), ascending: the uids to keep, as DataComp's resharder has them.

    subset: a run directory, a .npy file at any fsspec URL, or such an array. Unsorted ones, of
    other tools, are sorted, with a warning; repeats stay. Raises InputError for what is no subset.

    >>> import numpy as np
    >>> load_subset(np.array([(1, 7), (1, 9)], "u8,u8")).tolist()
    [(1, 7), (1, 9)]
    """
    if isinstance(subset, np.ndarray):
        held: Subset = subset
        what = "the subset"
        if held.dtype != subset_format.DTYPE or held.ndim != 1:
            raise InputError(
                f"a subset has dtype {held.dtype} and shape {held.shape}, needed is a "
                "one-dimensional array of (u8, u8)"
            )
    else:
        folder, name = _place(subset)
        held, what = subset_format.read(folder, name), folder.where(name)
    hi, lo = held["f0"], held["f1"]
    if uids.falls(hi, lo).any():
        warnings.warn(f"{what} is not sorted: it is sorted now", stacklevel=2)
        held = held[uids.ascending(hi, lo)]
    return held


def keep(subset: str | os.PathLike[str] | Subset) -> Keep:
    """A stage for `wds.WebDataset(urls).compose(…)` that yields only samples of the subset.

    subset: as for `load_subset`; of a run directory `expected` knows the number in each shard. Put
    it before `decode`: it needs a sample's json, or its picture and caption, as bytes. A uid that
    the subset repeats is yielded as often. One that the shards repeat is let through each time:
    copies of which the run ranked one come out as copies, more than `expected` says.

    >>> import numpy as np
    >>> stage = keep(np.array([(0, 1)], "u8,u8"))
    >>> samples = [{"__key__": k, "json": b'{"uid": "%032x"}' % n} for n, k in enumerate("ab")]
    >>> [sample["__key__"] for sample in stage(samples)]
    ['b']
    """
    held = load_subset(subset)
    sizes: dict[str, int] = {}
    if not isinstance(subset, np.ndarray):
        folder, name = _place(subset)
        if name == subset_format.SUBSET:
            sizes = folder.read_json("kept/sizes.json") or {}
    return Keep(held, sizes)


class Keep:
    """See `keep`. Picklable: workers of a DataLoader that are forked share the memory map."""

    def __init__(self, subset: Subset, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        self._hold(subset_format.pairs(subset))

    def _hold(self, pairs: npt.NDArray[np.uint64]) -> None:
        self._pairs = _shared(pairs)
        starts, self._shift = uids.buckets(self._pairs)
        self._starts = _shared(starts)

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        pairs, starts, shift = self._pairs, self._starts, self._shift
        for sample in samples:
            digits = _plain_uid(sample.get("json"))
            count = -1 if digits is None else uids.occurrences(pairs, starts, shift, digits)
            if count < 0:
                count = uids.occurrences(pairs, starts, shift, uid_of(sample).encode())
            if count:
                yield sample
                if count > 1:
                    yield from (dict(sample) for _ in range(count - 1))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getstate__(self) -> dict[str, Any]:
        return {"pairs": np.array(self._pairs), "sizes": self._sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._sizes = state["sizes"]
        self._hold(state["pairs"])

    def expected(self, urls: Iterable[str]) -> dict[str, int]:
        """How many samples come out of each shard: for epoch lengths.

        Raises RunStateError when the subset's run knows of no shards.
        """
        if not self._sizes:
            raise RunStateError(
                "how many samples a shard keeps is known of run directories whose metadata names "
                "shards: d2filter.keep('OUT'), with OUT/kept/sizes.json"
            )
        found = {}
        for url in urls:
            base = PurePosixPath(url).name
            found[url] = self._sizes.get(url, self._sizes.get(base, 0))
        return found


def uid_of(sample: dict[str, Any]) -> str:
    """The uid of a webdataset sample, by the rule of `d2filter embed`: that of its json, else of
    its content. Raises InputError where neither is there as bytes.
    """
    meta = sample.get("json")
    if isinstance(meta, bytes | bytearray):
        try:
            meta = json.loads(meta)
        except ValueError:
            meta = None
    told = meta.get("uid") if isinstance(meta, dict) else None
    if uid_format.is_uid(told):
        assert isinstance(told, str)
        return told
    image = next((sample[e] for e in webdataset.IMAGE_SUFFIXES if e in sample), None)
    caption = sample.get("txt", meta.get("caption") if isinstance(meta, dict) else None)
    if isinstance(caption, bytes | bytearray):
        caption = caption.decode("utf-8-sig", "replace")
    if not isinstance(image, bytes) or not isinstance(caption, str):
        raise InputError(
            f"sample {sample.get('__key__')!r} has no uid in its json, and no picture and caption "
            "as bytes to make it from: put keep() before decode()"
        )
    return uid_format.content_uid(image, caption)


def _plain_uid(meta: object) -> bytes | None:
    """What stands as uid in a json written as most are, without parsing it; None where one must.

    In an object without others inside, this is its key and no other. Ten times as fast as parsing,
    and nothing else that is done with a sample takes as long.
    """
    if type(meta) is not bytes:
        return None
    at = meta.find(_MARK)
    end = at + _MARK_TO_END
    if (
        at < 1
        or meta[end : end + 1] != b'"'
        or meta[at - 1] == _BACKSLASH
        or meta[:1] != b"{"
        or meta.count(b"{") != 1
        or meta.count(_KEY) != 1
    ):
        return None
    return meta[end - 32 : end]


def _shared(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same in a file: forked workers share its pages. Compiled code is called faster with a
    plain array than with a map.
    """
    return mapped(array).view(np.ndarray)


def _place(subset: str | os.PathLike[str]) -> tuple[Folder, str]:
    """Folder and name of a subset file; of a run directory those of its subset."""
    url = absolute(os.fspath(subset))
    if url.endswith(".npy"):
        parent, _, name = url.rpartition("/")
        return Folder(parent or "/"), name
    return Folder(url), subset_format.SUBSET
