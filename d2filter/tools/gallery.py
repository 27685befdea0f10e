"""Chooses the samples of the report's galleries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.sparse import Sparse
from d2filter.tools.measures import Measures

I64 = npt.NDArray[np.int64]

_IN_GROUP = 5  # dropped ones beside the kept one
_COLUMNS = ("uid_hi", "uid_lo", "difficulty", "rank", "suppressed_by")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One sample of a gallery."""

    id: int
    """graph id"""
    uid: str
    rank: int
    score: float
    kept: bool
    sqdist: float | None = None
    """to the one that leads its group"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Samples side by side; those of a group belong together."""

    title: str
    summary: str
    groups: tuple[tuple[Shown, ...], ...]


def choose(folder: Folder, m: Measures, each: int) -> list[Gallery]:
    """The galleries of a run, of up to `each` groups; those without a sample are left out."""
    people = _People(folder, m)
    score = m.score
    galleries = [
        Gallery(
            title="Most suppressed groups",
            summary="A kept sample, framed, and dropped ones from whose scores it took more than "
            "any other.",
            groups=tuple(people.suppressed(max(1, each // 2))),
        ),
        Gallery(
            title="Ranked first",
            summary="What goes in first.",
            groups=tuple((one,) for one in people.shown(m.first.id[:each])),
        ),
        Gallery(
            title="Ranked last",
            summary="What goes in last.",
            groups=tuple((one,) for one in people.shown(m.last.id[-each:][::-1])),
        ),
    ]
    if m.method != score:
        gained = m.own.kept & ~m.by_score.kept
        lost = m.by_score.kept & ~m.own.kept
        galleries += [
            Gallery(
                title=f"Kept by {m.method}, not by {score} alone",
                summary="Chosen by a hash among all of them.",
                groups=tuple((one,) for one in people.shown(_some(m, gained, each))),
            ),
            Gallery(
                title=f"Kept by {score} alone, not by {m.method}",
                summary="Beside each the sample that took most from its score, where there is one.",
                groups=tuple(people.with_suppressors(_some(m, lost, each))),
            ),
        ]
    return [one for one in galleries if one.groups]


class _People:
    """Samples of a run by graph id."""

    def __init__(self, folder: Folder, m: Measures) -> None:
        self._m = m
        self._ranking = Sparse(folder.sub("ranking"))
        self._graph = Sparse(folder.sub("graph"))

    def shown(self, ids: I64, sqdist: Iterable[float | None] | None = None) -> list[Shown]:
        """The facts shown about each sample."""
        if not ids.size:
            return []
        rows = self._ranking.rows(ids, _COLUMNS)
        raw = self._m.rule.raw(rows["difficulty"])
        kept = self._m.rule.kept(*(rows[n] for n in ("rank", "difficulty", "uid_hi", "uid_lo")))
        hexes = uid_format.to_hex(rows["uid_hi"], rows["uid_lo"])
        far = list(sqdist) if sqdist is not None else [None] * ids.size
        return [
            Shown(
                id=int(ids[i]),
                uid=hexes[i],
                rank=int(rows["rank"][i]),
                score=float(raw[i]),
                kept=bool(kept[i]),
                sqdist=far[i],
            )
            for i in range(ids.size)
        ]

    def suppressed(self, most: int) -> list[tuple[Shown, ...]]:
        """Kept samples, by what they took from dropped ones, with those."""
        drawn = self._m.drawn
        victims = np.flatnonzero((drawn.suppressed_by >= 0) & ~drawn.kept)
        by, at = np.unique(drawn.suppressed_by[victims], return_inverse=True)
        taken = np.bincount(at, drawn.lost[victims], by.size)
        groups: list[tuple[Shown, ...]] = []
        for number in np.argsort(-taken, kind="stable")[: 4 * most].tolist():
            (lead,) = self.shown(by[number : number + 1])
            if not lead.kept:
                continue
            groups.append((lead, *self._taken_from(lead, drawn.id[victims[at == number]])))
            if len(groups) == most:
                break
        return groups

    def _taken_from(self, lead: Shown, known: I64) -> list[Shown]:
        """Dropped samples from which `lead` took most, near ones first. known: some of them."""
        listed = self._graph.rows(np.array([lead.id]), ("neighbors", "sqdist"))
        neighbors, sqdist = listed["neighbors"][0].tolist(), listed["sqdist"][0].tolist()
        near: dict[int, float] = dict(zip(neighbors, sqdist, strict=True))
        ids = np.array(sorted({i for i in near if i >= 0} | set(known.tolist())), np.int64)
        by = self._ranking.rows(ids, ("suppressed_by",))["suppressed_by"]
        ids = ids[by == lead.id]
        found = self.shown(ids, [near.get(i) for i in ids.tolist()])
        dropped = [one for one in found if not one.kept]
        dropped.sort(key=lambda one: (one.sqdist is None, one.sqdist, one.uid))
        return dropped[:_IN_GROUP]

    def with_suppressors(self, ids: I64) -> list[tuple[Shown, ...]]:
        """Each sample, and the one that took most from its score."""
        if not ids.size:
            return []
        by = self._ranking.rows(ids, ("suppressed_by",))["suppressed_by"]
        others = iter(self.shown(by[by >= 0]))
        return [
            (one, next(others)) if other >= 0 else (one,)
            for one, other in zip(self.shown(ids), by.tolist(), strict=True)
        ]


def _some(m: Measures, mask: npt.NDArray[np.bool_], most: int) -> I64:
    """Graph ids of up to `most` drawn samples, by a hash of the uid."""
    rows = np.flatnonzero(mask)
    hi, lo = m.drawn.hi[rows], m.drawn.lo[rows]
    chosen = uids.hash_sample(hi, lo, most, salt=uids.SALT_REPORT, seed=1)
    ids: I64 = m.drawn.id[rows[chosen]]
    return ids
