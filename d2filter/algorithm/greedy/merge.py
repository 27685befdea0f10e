"""The global ranking from the scores of all partitions, without collecting them in one place.

Every partition sorts its samples by key: score descending, uid ascending. A few keys of each
partition give splitters, which cut all keys into ranges of about equal size. Each range is merged
on its own. A rank is the position in the range, plus the number of keys in all better ranges.

See docs/method.md#global-order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """n keys; the better ones are those with the larger x, then with the smaller uid."""

    x: I64
    hi: uids.U64
    lo: uids.U64

    def take(self, rows: I64 | slice) -> Keys:
        """Some of them."""
        return Keys(x=self.x[rows], hi=self.hi[rows], lo=self.lo[rows])

    def best_first(self) -> I64:
        """Row numbers, (n,), best key first."""
        # ~x descends as x ascends, and cannot overflow as −x does
        return np.lexsort((self.lo, self.hi, ~self.x)).astype(np.int64, copy=False)


def joined(parts: list[Keys]) -> Keys:
    """All keys of some lists."""
    return Keys(
        x=np.concatenate([p.x for p in parts]),
        hi=np.concatenate([p.hi for p in parts]),
        lo=np.concatenate([p.lo for p in parts]),
    )


def sample(keys: Keys, count: int) -> Keys:
    """Up to `count` evenly spaced keys of a list that is sorted, best first."""
    n = keys.x.size
    return keys.take(np.unique(np.linspace(0, max(0, n - 1), min(count, n)).astype(np.int64)))


def splitters(samples: list[Keys], ranges: int) -> Keys:
    """ranges − 1 keys, best first, that cut the sampled keys into ranges of about equal size."""
    every = joined(samples)
    every = every.take(every.best_first())
    n = every.x.size
    at = np.linspace(0, n, ranges + 1).astype(np.int64)[1:-1]
    return every.take(at[at < n])


def split_at(keys: Keys, at: Keys) -> I64:
    """Where a list that is sorted, best first, is cut: offsets (ranges + 1,). A key that equals a
    splitter begins a range.
    """
    # both lists in one order: how many keys come before each splitter
    every = joined([at, keys])
    order = every.best_first()  # equal keys: the splitter comes first, as lexsort is stable
    place = np.empty(order.size, np.int64)
    place[order] = np.arange(order.size)
    count = at.x.size
    before = place[:count] - np.arange(count)
    return np.concatenate([[0], before, [keys.x.size]])


def ranks(pieces: list[Keys], first: int) -> list[I64]:
    """Ranks of the keys of one range, for each of the lists that it came from. first: that of the
    best key of the range.
    """
    every = joined(pieces)
    out = np.empty(every.x.size, np.int64)
    out[every.best_first()] = first + np.arange(out.size)
    return np.split(out, np.cumsum([p.x.size for p in pieces])[:-1])
