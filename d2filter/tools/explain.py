"""Why a sample was kept or dropped: its scores, its suppressors and its neighbors.

Reads only the row groups that contain the sample and its neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from d2filter.algorithm import budget, uids
from d2filter.algorithm.greedy import auto_settings, local_kernel, messages
from d2filter.config import RankConfig
from d2filter.errors import InputError, UsageError
from d2filter.formats import kept as kept_format
from d2filter.formats import ledger, subset, tables
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import RunState
from d2filter.formats.sparse import Sparse

I64 = npt.NDArray[np.int64]
Columns = dict[str, Any]
List = tuple[I64, npt.NDArray[np.float32]]  # neighbors and squared distances

_RANKED = ("uid_hi", "uid_lo", "difficulty", "forward", "final", "rank", "suppressed_by")


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbor:
    """One entry of a sample's list."""

    uid: str
    sqdist: float
    difficulty: float
    gave: float
    """to the sample's score in the forward pass"""
    rank: int
    kept: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """One ranked sample. Scores are in units of the normalized difficulty, 0 to 1 for one sample
    alone.
    """

    uid: str
    shard: str | None
    """with `key`: which of several samples with this uid was ranked; None if unknown"""
    key: str | None
    difficulty: float
    normalized: float
    """(s − min)/(max − min)"""
    forward: float | None
    """score before the first sample was taken; None: it ranks after everything else"""
    final: float | None
    """score when it was taken"""
    rank: int
    ranked: int
    kept: bool | None
    """None: nothing was selected yet"""
    because: str
    suppressed_by: str
    """uid of the sample that took most from it; empty for none"""
    strongest: float
    """what that one took"""
    suppressor_rank: int | None
    neighbors: tuple[Neighbor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRanked:
    """A sample that was read and is not in the ranking."""

    uid: str
    entries: tuple[dict[str, Any], ...]
    """its lines in bad_samples.parquet"""


def explain(folder: Folder, uids_hex: Sequence[str]) -> list[Explained | NotRanked]:
    """Why each sample has its rank. Raises UsageError for an invalid uid, InputError for one that
    the run has not read, and RunStateError if nothing is ranked yet.
    """
    for text in uids_hex:
        if uid_format.normalized(text) is None:
            raise UsageError(f"{text!r} is not a uid: give 32 hex digits")
    uids_hex = [str(uid_format.normalized(text)) for text in uids_hex]
    run = _Run(folder)
    pairs = np.array([uid_format.from_hex(text) for text in uids_hex], np.uint64).reshape(-1, 2)
    rows = run.ranking.find_all(pairs[:, 0], pairs[:, 1])
    ranked = iter(run.explained(rows[rows >= 0]))
    return [
        next(ranked) if row >= 0 else run.left_out(text)
        for text, row in zip(uids_hex, rows.tolist(), strict=True)
    ]


def settled_of(figures: dict[str, Any], options: RankConfig) -> auto_settings.Resolved:
    """The settings that were found on the pool before a ranking, from its record."""
    gamma = figures.get("gamma", options.gamma)
    return auto_settings.Resolved(
        k=options.n_neighbors,
        gamma=0.0 if isinstance(gamma, str) else float(gamma),
        unit=figures.get("gamma_unit", 1.0),
        floor=figures.get("gamma_floor", 1.0),
    )


class _Run:
    """The files of one run."""

    def __init__(self, folder: Folder) -> None:
        state = RunState(folder)
        rank = state.require("rank")
        self._folder = folder
        self._options = RankConfig.from_options(rank["options"])
        self._scheme = self._options.scheme(settled_of(rank["stats"], self._options))
        self._width = int(rank["options"]["n_neighbors"])
        self._range = rank["stats"].get("difficulty_range")
        self._select = state.done("select")
        self._kept_first = state.require("catalog")["stats"]["score"]["kept_first"]
        self.ranking = Sparse(folder.sub("ranking"))
        self._graph = Sparse(folder.sub("graph"))

    def explained(self, rows: I64) -> list[Explained]:
        """Of some rows of the ranking; each row group is read once for all of them."""
        if not rows.size:
            return []
        suppressors = self.ranking.rows(rows, ("suppressed_by",))["suppressed_by"]
        # the edge that took most from a sample stands in its own list or in the suppressor's
        sources = np.union1d(rows, suppressors[suppressors >= 0])
        listed = self._graph.rows(sources, ("neighbors", "sqdist"))
        lists = {int(i): self._list(listed, at) for at, i in enumerate(sources)}
        ids = np.unique(np.concatenate([sources, *(lists[row][0] for row in rows.tolist())]))
        known = self.ranking.rows(ids, _RANKED)
        if self._scheme.is_local:
            # the kernel looks at both ends, so at neighbors of suppressors, too
            ends = np.unique(np.concatenate([ids, *(neighbors for neighbors, _ in lists.values())]))
            reach = local_kernel.reach(
                self._graph.rows(ends, ("sqdist",))["sqdist"][:, : self._width]
            )
            lists_of = {row: self._weighed(row, lists[row], ends, reach) for row in lists}
        else:
            lists_of = {row: sqdist for row, (_, sqdist) in lists.items()}
        at = np.searchsorted(ids, rows)
        places = kept_format.places(self._folder, known["uid_hi"][at], known["uid_lo"][at])
        out = []
        for row, suppressor in zip(rows.tolist(), suppressors.tolist(), strict=True):
            others = np.append(lists[row][0], suppressor if suppressor >= 0 else row)
            own_at, others_at = np.searchsorted(ids, row), np.searchsorted(ids, others)
            own = {name: values[own_at][None] for name, values in known.items()}
            about = {name: values[others_at] for name, values in known.items()}
            out.append(self._explained(row, suppressor, own, about, lists, lists_of, places))
        return out

    def _explained(
        self,
        row: int,
        suppressor: int,
        own: Columns,
        others: Columns,
        lists: dict[int, List],
        exponents: dict[int, npt.NDArray[np.float32]],
        places: dict[str, tuple[str, str]],
    ) -> Explained:
        """own: of the row itself; others: of its neighbors and, last, of its suppressor. places:
        shard and key by uid.
        """
        uid = uid_format.to_hex(own["uid_hi"], own["uid_lo"])[0]
        shard, key = places.get(uid, (None, None))
        neighbors, sqdist = lists[row]
        hexes = uid_format.to_hex(others["uid_hi"], others["uid_lo"])
        kept = self._kept(others)
        d2 = self._options.method == "d2"
        is_demoted = own["forward"] == messages.FLOOR
        gave = (
            self._given(others, neighbors.size, exponents[row]) if d2 else np.zeros(neighbors.size)
        )
        (own_kept,) = self._kept(own)
        strongest = 0.0
        if suppressor >= 0:
            strongest = self._taken(row, suppressor, others, lists, exponents)
        return Explained(
            uid=uid,
            shard=shard,
            key=key,
            difficulty=float(own["difficulty"][0]),
            normalized=float(self._normalized(own["difficulty"])[0]),
            forward=None if is_demoted[0] or not d2 else _unit(own["forward"][0]),
            final=None if is_demoted[0] or not d2 else _unit(own["final"][0]),
            rank=int(own["rank"][0]),
            ranked=self.ranking.total,
            kept=own_kept,
            because=self._because(own, own_kept, bool(is_demoted[0])),
            suppressed_by=hexes[-1] if suppressor >= 0 else "",
            strongest=strongest,
            suppressor_rank=int(others["rank"][-1]) if suppressor >= 0 else None,
            neighbors=tuple(
                Neighbor(
                    uid=hexes[n],
                    sqdist=float(sqdist[n]),
                    difficulty=float(others["difficulty"][n]),
                    gave=float(gave[n]),
                    rank=int(others["rank"][n]),
                    kept=kept[n],
                )
                for n in range(neighbors.size)
            ),
        )

    def left_out(self, text: str) -> NotRanked:
        entries: list[dict[str, Any]] = []
        if self._folder.exists(ledger.BAD_SAMPLES):
            with tables.open_table(self._folder, ledger.BAD_SAMPLES) as parquet:
                for number in range(parquet.num_row_groups):
                    uid = parquet.read_row_group(number, columns=["uid"]).column(0)
                    here = pc.fill_null(pc.equal(uid, text), False)
                    if pc.any(here).as_py():
                        entries += parquet.read_row_group(number).filter(here).to_pylist()
        if entries:
            return NotRanked(uid=text, entries=tuple(entries))
        raise InputError(
            f"{text} is not a sample of {self._folder.url}: neither ranked nor in "
            f"{ledger.BAD_SAMPLES}"
        )

    def _list(self, listed: Columns, at: int) -> List:
        """The neighbors that count, without paddings."""
        k = self._options.n_neighbors
        neighbors, sqdist = listed["neighbors"][at, :k], listed["sqdist"][at, :k]
        there = neighbors >= 0
        return neighbors[there], sqdist[there]

    def _weighed(self, row: int, listed: List, ids: I64, reach: Any) -> npt.NDArray[np.float32]:
        """What the kernel local makes of the distances of a list. reach: of the samples `ids`."""
        neighbors, sqdist = listed
        own = np.full(neighbors.size, reach[np.searchsorted(ids, row)], np.float32)
        theirs = reach[np.searchsorted(ids, neighbors)]
        return local_kernel.relative(sqdist, own, theirs, self._scheme.floor)

    def _normalized(self, difficulty: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        if self._range is None:
            return np.full(difficulty.size, np.nan)
        return messages.normalized(difficulty, *self._range)

    def _given(self, others: Columns, count: int, sqdist: Any) -> npt.NDArray[np.float64]:
        """w·s' of each neighbor, which is what the forward pass adds up."""
        weights = self._scheme.forward_weights(sqdist).astype(np.float64)
        scores = self._normalized(others["difficulty"][:count])
        # what ranks after everything else sends nothing
        return np.where(others["forward"][:count] == messages.FLOOR, 0.0, weights * scores)

    def _taken(
        self,
        row: int,
        suppressor: int,
        others: Columns,
        lists: dict[int, List],
        exponents: dict[int, npt.NDArray[np.float32]],
    ) -> float:
        """The message of the strongest suppressor, over the edge that it came by."""
        for source, goal in ((suppressor, row), (row, suppressor)):
            here = np.flatnonzero(lists[source][0] == goal)
            if here.size:
                weight = self._scheme.reverse_weights(exponents[source][here[:1]])
                return _unit(np.rint(float(weight[0]) * float(others["final"][-1])))
        return 0.0

    def _kept(self, rows: Columns) -> list[bool | None]:
        if self._select is None:
            return [None] * len(rows["rank"])
        if self._select["options"].get("soft") is not None:
            own = rows["uid_hi"].astype(np.uint64), rows["uid_lo"].astype(np.uint64)
            return [bool(there) for there in uids.positions(*self._subset, *own) >= 0]
        raw = budget.raw_scores(rows["difficulty"].astype(np.float32), self._kept_first)
        size, least = self._select["stats"]["budget"], self._select["options"]["min_score"]
        return [bool(k) for k in budget.kept_mask(rows["rank"], raw, size, least)]

    @cached_property
    def _subset(self) -> tuple[uids.U64, uids.U64]:
        """hi and lo of a soft selection, ascending, with its repeats."""
        chosen = subset.read(self._folder)
        return np.ascontiguousarray(chosen["f0"]), np.ascontiguousarray(chosen["f1"])

    def _because(self, own: Columns, kept: bool | None, is_demoted: bool) -> str:
        rank, total = int(own["rank"][0]) + 1, self.ranking.total
        place = f"rank {rank:,} of {total:,} (top {rank / total:.1%})"
        if is_demoted:
            place += ", after everything else: among the hardest, or a copy of a better one"
        if self._select is None or kept is None:
            return f"{place}; nothing is selected yet"
        size = self._select["stats"]["budget"]
        if kept:
            return f"kept: {place}, the budget is {size:,}"
        if rank <= size:
            least = self._select["options"]["min_score"]
            return f"dropped: {place}, but its score is below --min-score {least}"
        return f"dropped: {place}, the budget is {size:,}"


def as_json(found: Sequence[Explained | NotRanked]) -> list[dict[str, Any]]:
    """For `--json`."""
    return [asdict(one) for one in found]


def lines(one: Explained | NotRanked) -> list[str]:
    """For people."""
    if isinstance(one, NotRanked):
        out = [f"{one.uid}  not ranked"]
        for entry in one.entries:
            place = ", ".join(str(entry[n]) for n in ("shard", "key", "message") if entry[n])
            out.append(f"  {entry['status']}: {entry['reason']}" + (f" ({place})" if place else ""))
        return out
    out = [f"{one.uid}  {one.because}"]
    if one.shard is not None:
        out.append(f"  sample {one.key} of {one.shard}")
    out.append(f"  difficulty {one.difficulty:.5f}, {one.normalized:.5f} of 0 to 1")
    if one.forward is not None and one.final is not None:
        out.append(f"  after the forward pass {one.forward:.5f}, when it was taken {one.final:.5f}")
        lost = one.forward - one.final
        if one.suppressed_by:
            out.append(
                f"  {lost:.5f} were taken from it, {one.strongest:.5f} of that by "
                f"{one.suppressed_by} (rank {(one.suppressor_rank or 0) + 1:,})"
            )
        elif lost <= 0:
            out.append("  nobody took anything from it")
    out.append(f"  {'neighbor':<34}{'sqdist':>10}{'gave':>10}{'rank':>13}")
    for n in one.neighbors:
        fate = {True: "  kept", False: "  dropped", None: ""}[n.kept]
        out.append(f"  {n.uid:<34}{n.sqdist:>10.5f}{n.gave:>10.5f}{n.rank + 1:>13,}{fate}")
    return out


def _unit(fixed: Any) -> float:
    return float(fixed) / messages.ONE
