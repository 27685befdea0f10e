"""Trains on a subset without copying it: a webdataset stage that yields only kept samples.

    stage = d2filter.keep("OUT")
    dataset = wds.WebDataset(urls).compose(stage).decode("pil")
    length = sum(stage.expected(urls).values())

If the subset is a run directory whose metadata names shards, samples are matched by shard and key,
so that of several samples with one uid only the ranked one is yielded. Otherwise they are matched
by uid. The lookup tables are memory maps, which all workers of a machine share.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.errors import InputError, RunStateError
from d2filter.formats import braces, loader_samples, webdataset
from d2filter.formats import kept as kept_format
from d2filter.formats import subset as subset_format
from d2filter.formats.addresses import file_name
from d2filter.formats.kept import Kept
from d2filter.formats.loader_samples import Sample, uid_of
from d2filter.formats.paths import Folder, absolute, place_of
from d2filter.formats.rows import mapped
from d2filter.formats.shardnames import ShardNames, shown
from d2filter.text import redacted
from d2filter.tools import provenance

Subset = npt.NDArray[np.void]

__all__ = ["Keep", "keep", "load_kept", "load_subset", "uid_of"]

KEYS_HELD = 250_000  # in memory, some 60 MB: loaders that mix shards go to and fro among them


def load_subset(subset: str | os.PathLike[str] | Subset) -> Subset:
    """A subset as (n,) of (u8, u8), ascending: the uids to keep, in the format of DataComp's
    resharder.

    subset: a run directory, a .npy file at any fsspec URL, or such an array. An unsorted subset of
    another tool is sorted, with a warning; repeats stay. Raises InputError if it is no subset.

    >>> import numpy as np
    >>> load_subset(np.array([(1, 7), (1, 9)], "u8,u8")).tolist()
    [(1, 7), (1, 9)]
    """
    if isinstance(subset, np.ndarray):
        held: Subset = subset
        what = "the subset"
        if held.dtype != subset_format.DTYPE or held.ndim != 1:
            raise InputError(
                f"a subset has dtype {held.dtype} and shape {held.shape}, expected a "
                "one-dimensional array of (u8, u8)"
            )
    else:
        folder, name = _place(subset)
        held, what = subset_format.read(folder, name), folder.where(name)
    hi, lo = held["f0"], held["f1"]
    if uids.falls(hi, lo).any():
        warnings.warn(f"{what} is not sorted by uid: this process sorts a copy", stacklevel=2)
        held = held[uids.ascending(hi, lo)]
    return held


def load_kept(subset: str | os.PathLike[str] | Subset, held: Subset) -> Kept | None:
    """Shard and key of the samples of a subset, where it is given as a run directory that knows
    them; None: samples go by uid. held: the same subset, loaded.
    """
    if isinstance(subset, np.ndarray):
        return None
    if os.fspath(subset).endswith(".npy"):
        return None
    folder, _ = _place(subset)
    return kept_format.read(folder, held)


def keep(subset: str | os.PathLike[str] | Subset) -> Keep:
    """A stage for `wds.WebDataset(urls).compose(…)` that yields only samples of the subset.

    subset: as for `load_subset`. Put the stage before `decode`: it needs a sample's json, or its
    image and caption, as bytes. Samples that no run would rank (no image, no caption, broken json)
    are dropped.

    *A run directory whose metadata names shards* (as metadata from `embed` does) keeps by shard and
    key: a sample is yielded if its `__key__` is kept in the shard that its `__url__` names, and it
    has the uid that was ranked there. Copies and damaged versions of a kept sample are dropped, so
    that the number of samples is what `expected` returns. A shard may have moved since: it is
    recognized by its file name, and by as many of its folders as needed (see `ShardNames`). No
    sample of an unknown shard is yielded, with a warning. A sample without `__url__` is matched by
    uid, with a warning. Only two samples of one shard with the same key and the same uid cannot be
    told apart.

    *A .npy file or an array* keeps by uid. A uid that the subset repeats is yielded as often, and
    so is each sample with this uid in the shards. Use `keep("OUT/subset.npy")` for shards that were
    renamed or packed again. Repeats of a soft selection are adjacent in both cases.

    >>> import numpy as np
    >>> stage = keep(np.array([(0, 1)], "u8,u8"))
    >>> pair = {"jpg": b"a picture", "txt": b"a caption"}
    >>> samples = [{"__key__": k, "json": b'{"uid": "%032x"}' % n, **pair}
    ...            for n, k in enumerate("ab")]
    >>> [sample["__key__"] for sample in stage(samples)]
    ['b']
    """
    held = load_subset(subset)
    source = "" if isinstance(subset, np.ndarray) else absolute(os.fspath(subset))
    return Keep(held, load_kept(subset, held), source)


class Keep:
    """See `keep`. Picklable: workers of a DataLoader that are forked share the memory maps."""

    def __init__(self, subset: Subset, kept: Kept | None = None, source: str = "") -> None:
        """subset: ascending. kept: shard and key of its samples. source: where both come from."""
        pairs = subset_format.pairs(subset) if kept is None else kept.loose
        self._hold(len(subset), pairs, kept, source)

    def _hold(
        self, size: int, pairs: npt.NDArray[np.uint64], kept: Kept | None, source: str
    ) -> None:
        self._size, self._source = size, source
        self._kept = None if kept is None else kept.mapped()
        self._uids = _Uids(pairs)
        self._all: _Uids | None = None
        self._others: ShardNames | None = None
        self._shards: OrderedDict[str, dict[str, bytes]] = OrderedDict()
        self._held = 0
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        pairs = np.array(self._uids.pairs)
        return {"size": self._size, "pairs": pairs, "kept": self._kept, "source": self._source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._hold(**state)

    def __len__(self) -> int:
        return self._size

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples of the subset, in their order. Raises InputError for a sample whose uid
        depends on an image or caption that is decoded already.
        """
        if self._kept is not None:
            yield from self._by_place(samples, self._kept)
            return
        for sample in samples:
            yield from _repeated(sample, self._uids.count(sample))

    def _by_place(self, samples: Iterable[Sample], kept: Kept) -> Iterator[Sample]:
        url: Any = None
        keys: dict[str, bytes] = {}
        for sample in samples:
            if sample.get("__url__") != url:
                url = sample.get("__url__")
                keys = self._keys(url, kept) if isinstance(url, str) else {}
            key = sample.get("__key__")
            wanted = keys.get(key) if isinstance(key, str) else None
            if wanted is None and isinstance(key, str) and not key.isascii():
                wanted = keys.get(webdataset.clean(key))  # as runs spell what is no UTF-8
            if wanted is not None:
                if loader_samples.has_uid(sample, wanted, kept.embedded):
                    yield from _repeated(sample, _times(sample, wanted))
            elif not isinstance(url, str):
                yield from _repeated(sample, self._without_url(kept).count(sample))
            elif len(self._uids):
                yield from _repeated(sample, self._uids.count(sample))

    def _keys(self, url: str, kept: Kept) -> dict[str, bytes]:
        """The uids of the kept samples of a shard, by key."""
        found = self._shards.get(url)
        if found is None:
            number = kept.find(url)
            if number < 0 and not self._is_known(url, kept):
                self._warn("shard", self._unknown(url) + ": nothing of it is kept")
            found = kept.of_shard(number).by_key() if number >= 0 else {}
            self._shards[url] = found
            self._held += 1 + len(found)
            while self._held > KEYS_HELD and len(self._shards) > 1:
                self._held -= 1 + len(self._shards.popitem(last=False)[1])
        else:
            self._shards.move_to_end(url)
        return found

    def _without_url(self, kept: Kept) -> _Uids:
        """All uids, for samples that do not name their shard."""
        self._warn("url", "samples have no __url__: they are kept by uid, copies of one included")
        if self._all is None:
            rows = np.stack([kept.rows.hi, kept.rows.lo], axis=1)
            pairs = np.concatenate([rows, kept.loose])
            self._all = _Uids(pairs[uids.ascending(pairs[:, 0], pairs[:, 1])])
        return self._all

    def _warn(self, kind: str, text: str) -> None:
        """Warn once per kind of problem, because a warning for every shard would be ignored."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=5)

    def _unknown(self, url: str) -> str:
        return (
            f"shard {shown(url)} is not one of the shards that {redacted(self._source)} ranked "
            "(give them by their old names; match renamed or repacked shards by uid: "
            f"d2filter.keep('{redacted(self._source)}/{subset_format.SUBSET}'))"
        )

    def expected(self, urls: str | os.PathLike[str] | Iterable[str]) -> dict[str, int]:
        """How many samples come out of each shard: for epoch lengths.

        urls: what `wds.WebDataset` takes: shards in a list, or in a string with braces and `::`.
        Raises RunStateError when the subset's run knows of no shards, and InputError for a shard
        that it has not ranked.
        """
        if self._kept is None:
            raise RunStateError(
                "the number of samples that a shard keeps is known only if the metadata of the run "
                "names shards: use d2filter.keep('OUT') of a run directory with OUT/kept"
            )
        found = {}
        for url in _expanded(urls):
            number = self._kept.find(url)
            if number < 0 and not self._is_known(url, self._kept):
                raise InputError(self._unknown(url))
            found[url] = self._kept.counts[number] if number >= 0 else 0
        return found

    def _is_known(self, url: str, kept: Kept) -> bool:
        """Whether the run has read a shard of which it keeps nothing."""
        if self._others is None:
            read = provenance.shards(Folder(self._source)).values() if kept.embedded else ()
            self._others = ShardNames(list({**kept.empty, **dict.fromkeys(read)}))
        return self._others.find(url) >= 0


def _repeated(sample: Sample, count: int) -> Iterator[Sample]:
    """A sample as often as it is kept, each a dictionary of its own."""
    if count:
        yield sample
        if count > 1:
            yield from (dict(sample) for _ in range(count - 1))


def _times(sample: Sample, wanted: bytes) -> int:
    """How often a sample is kept that has one of the uids of its key."""
    if len(wanted) == 32:
        return 1
    each = [wanted[at : at + 32] for at in range(0, len(wanted), 32)]
    if each.count(each[0]) == len(each):
        return len(each)
    uid = loader_samples.uid_of(sample)
    return max(1, each.count((uid or "").encode()))


class _Uids:
    """Uids, in memory that forked workers share."""

    def __init__(self, pairs: npt.NDArray[np.uint64]) -> None:
        """pairs: (n, 2) of hi and lo, ascending."""
        self.pairs = _shared(pairs)
        starts, self._shift = uids.buckets(self.pairs)
        self._starts = _shared(starts)

    def __len__(self) -> int:
        return len(self.pairs)

    def count(self, sample: Sample) -> int:
        """How often the uid of a sample is among them; 0 for a sample that is none."""
        digits = loader_samples.plain_uid(sample.get("json"))
        count = -1
        if digits is not None:
            count = uids.occurrences(self.pairs, self._starts, self._shift, digits)
        if count == 0 or (count > 0 and loader_samples.is_whole(sample)):
            return int(count)
        uid = loader_samples.uid_of(sample)
        if uid is None:
            return 0
        return int(uids.occurrences(self.pairs, self._starts, self._shift, uid.encode()))


def _expanded(urls: str | os.PathLike[str] | Iterable[str]) -> Iterator[str]:
    """Shards by name, as webdataset expands them."""
    if not isinstance(urls, str | os.PathLike):
        yield from urls
        return
    for pattern in os.fspath(urls).split("::"):
        try:
            yield from braces.expand(pattern)
        except ValueError as error:
            raise InputError(f"{pattern!r} has unbalanced braces: give shards by name") from error


def _shared(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same in a file: forked workers share its pages. Compiled code is called faster with a
    plain array than with a map.
    """
    return mapped(array).view(np.ndarray)


def _place(subset: str | os.PathLike[str]) -> tuple[Folder, str]:
    """Folder and name of a subset file; of a run directory those of its subset."""
    url = absolute(os.fspath(subset))
    if file_name(url).endswith(".npy"):
        return place_of(url)
    return Folder(url), subset_format.SUBSET
