"""A sample of a finished run, chosen by a hash of the uid, and counts over all ranked samples.

Reads the ranking and the graph one row group at a time. Memory: the features of the chosen samples,
the uids of one catalog part, and a byte for each ranked sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import budget, features, uids
from d2filter.algorithm.greedy import messages
from d2filter.algorithm.measures import coverage
from d2filter.formats import catalog, ranking, tables
from d2filter.formats.paths import Folder
from d2filter.formats.rows import PartedArray

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SAMPLE = 100_000
"""ranked samples that measures are made on, where there are more"""
_MARGIN = 1.2  # of the hash's bound: about as many as wanted must lie below it
_COLUMNS = ("uid_hi", "uid_lo", "difficulty", "forward", "final", "rank", "suppressed_by")
_LISTS = ("neighbors", "sqdist")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What the run keeps of its ranking."""

    size: int
    min_score: float | None
    kept_first: str
    """the end of the score that goes first: high or low"""
    pairs: uids.U64 | None = None
    """(n, 2) uids of a soft selection, ascending, with its repeats; None: a prefix is kept"""

    def kept(self, rank: I64, difficulty: F32, hi: uids.U64, lo: uids.U64) -> Bools:
        """Which samples are kept, (n,); difficulty: as it is ranked."""
        if self.pairs is not None:
            there: Bools = uids.positions(self.pairs[:, 0], self.pairs[:, 1], hi, lo) >= 0
            return there
        return budget.kept_mask(rank, self.raw(difficulty), self.size, self.min_score)

    def raw(self, difficulty: F32) -> F32:
        """Difficulty as the metadata had it, (n,)."""
        return budget.raw_scores(difficulty, self.kept_first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The first or last samples of a ranking, best first, (m,) each."""

    id: I64
    """graph ids"""
    rank: I64


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """m samples, by ascending uid, (m,) each."""

    id: I64
    """graph ids"""
    hi: uids.U64
    lo: uids.U64
    difficulty: F32
    """as it is ranked: high goes first"""
    rank: I64
    """in the whole ranking"""
    lost: F64
    """sum of received messages, in units of the normalized difficulty; 0 for demoted samples"""
    suppressed_by: I64
    """graph id, −1 for none"""
    spacing: F32
    """distance to the farthest neighbor in the list"""
    kept: Bools
    neighbors: I64
    """(m, k) places among the m of those in its list; −1 for others"""
    sqdist: F32
    """(m, k)"""
    features: features.F16 = field(repr=False)


def rows_of(folder: Folder) -> Iterator[tuple[int, dict[str, Array]]]:
    """The ranking and the lists of its graph, a row group at a time, each with the graph id of its
    first row.
    """
    start = 0
    for name in folder.sub("ranking").names(".parquet"):
        with (
            tables.open_table(folder.sub("ranking"), name) as ranking,
            tables.open_table(folder.sub("graph"), name) as lists,
        ):
            # both are written with the same row groups
            for number in range(ranking.num_row_groups):
                table = ranking.read_row_group(number, columns=list(_COLUMNS))
                rows = {column: tables.to_array(table.column(column)) for column in _COLUMNS}
                near = lists.read_row_group(number, columns=list(_LISTS))
                rows |= {column: tables.to_array(near.column(column)) for column in _LISTS}
                yield start, rows
                start += table.num_rows


def kept_ids(folder: Folder, ranked: int, rule: Rule) -> Bools:
    """Which samples of the whole pool are kept, by graph id, (ranked,) bool."""
    kept = np.zeros(ranked, np.bool_)
    start = 0
    columns = ("rank", "difficulty", "uid_hi", "uid_lo")
    for part in ranking.iter_columns(folder.sub("ranking"), columns):
        size = part["rank"].size
        kept[start : start + size] = rule.kept(
            part["rank"].astype(np.int64),
            part["difficulty"].astype(np.float32),
            part["uid_hi"].astype(np.uint64),
            part["uid_lo"].astype(np.uint64),
        )
        start += size
    return kept


def read(
    folder: Folder, ranked: int, ends: int, kept: Bools
) -> tuple[dict[str, Array], Bools, tuple[int, int], Ends, Ends]:
    """Columns of the drawn samples by ascending uid; for the kept ones which entries of their lists
    are kept, (kept, k); copies at distance 0; and the ends of the ranking. kept: (ranked,) by graph
    id.
    """
    exact = exact_kept = 0
    bound = min(1.0, _MARGIN * SAMPLE / ranked) if ranked > SAMPLE else 1.0
    below = np.uint64(min(2**64 - 1, int(bound * 2**64)))
    parts: list[dict[str, Array]] = []
    outer: list[tuple[I64, I64]] = []
    for start, rows in rows_of(folder):
        rank = rows["rank"]
        at = np.flatnonzero((rank < ends) | (rank >= ranked - ends))
        outer.append((start + at, rank[at]))
        same = (rows["sqdist"] == 0) & (rows["neighbors"] >= 0)
        own = kept[start : start + rank.size]
        exact += int(same.any(axis=1).sum())
        exact_kept += int((same & kept[rows["neighbors"]]).any(axis=1)[own].sum())
        key = uids.hashed(rows["uid_hi"], rows["uid_lo"], salt=uids.SALT_REPORT)
        chosen = np.flatnonzero(key <= below)
        some = {name: values[chosen] for name, values in rows.items()}
        is_demoted = some["forward"] == messages.FLOOR
        lost = (some["forward"] - some["final"]).astype(np.float64) / messages.ONE
        parts.append(
            {
                "id": start + chosen,
                "hi": some["uid_hi"],
                "lo": some["uid_lo"],
                "difficulty": some["difficulty"],
                "rank": some["rank"],
                "lost": np.where(is_demoted | (some["suppressed_by"] < 0), 0.0, lost),
                "suppressed_by": some["suppressed_by"],
                "spacing": coverage.spacing(some["sqdist"]),
                "kept": kept[start + chosen],
                "neighbors": some["neighbors"],
                "sqdist": some["sqdist"],
            }
        )
    pool = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    keep = uids.hash_sample(pool["hi"], pool["lo"], SAMPLE, salt=uids.SALT_REPORT)
    ids, ranks = (np.concatenate(column) for column in zip(*outer, strict=True))
    order = np.argsort(ranks)
    first, last = order[:ends], order[max(0, order.size - ends) :]
    drawn = {name: values[keep] for name, values in pool.items()}
    lists = drawn["neighbors"]
    among = ((lists >= 0) & kept[lists])[drawn["kept"]]
    drawn["neighbors"] = _places(drawn["id"], lists)
    return (
        drawn,
        among,
        (exact, exact_kept),
        Ends(id=ids[first], rank=ranks[first]),
        Ends(id=ids[last], rank=ranks[last]),
    )


def _places(ids: I64, wanted: I64) -> I64:
    """Where each wanted graph id stands among distinct ones, same shape; −1 where it does not."""
    order = np.argsort(ids)
    at = np.minimum(np.searchsorted(ids[order], wanted), ids.size - 1)
    return np.where(ids[order][at] == wanted, order[at], -1)


def features_of(folder: Folder, hi: uids.U64, lo: uids.U64) -> features.F16:
    """Features of ascending uids; the catalog ascends by uid too."""
    home = folder.sub("catalog")
    layout: PartedArray = catalog.layout(home)
    found = []
    for number in range(len(layout.starts) - 1):
        part_hi, part_lo, _ = catalog.read_ids(home, number)
        rows = uids.positions(part_hi, part_lo, hi, lo)
        found.append(layout.part(number)[rows[rows >= 0]])
    return np.concatenate(found)
