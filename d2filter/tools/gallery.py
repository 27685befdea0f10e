"""The report's pictures: samples worth a look, and thumbnails of them out of the shards."""

from __future__ import annotations

import base64
import contextlib
import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.errors import StorageError
from d2filter.formats import tables, webdataset
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.sparse import Sparse
from d2filter.tools.measures import Measures

I64 = npt.NDArray[np.int64]
Say = Callable[[str], None]

THUMBNAIL = 144  # pixels of the longer side
_QUALITY = 80
_IN_GROUP = 5  # dropped ones beside the kept one
_MOST_PIXELS = 1 << 26
_CAPTION = 240  # characters
_ELSEWHERE = (
    "No pictures of shards on other machines: `d2filter report OUT --gallery N` fetches them"
)
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
    says: str
    groups: tuple[tuple[Shown, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What a sample looks like."""

    jpeg: bytes = field(repr=False)
    caption: str

    @property
    def url(self) -> str:
        """As a data: URL."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode('ascii')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Album:
    """Pictures by uid, and what could not be had."""

    pictures: dict[str, Picture]
    troubles: tuple[str, ...]


def choose(folder: Folder, m: Measures, each: int) -> list[Gallery]:
    """The galleries of a run, of up to `each` groups; those without a sample are left out."""
    people = _People(folder, m)
    score = m.score
    galleries = [
        Gallery(
            title="Most suppressed groups",
            says="A kept sample, framed, and dropped ones from whose scores it took more than any "
            "other.",
            groups=tuple(people.suppressed(max(1, each // 2))),
        ),
        Gallery(
            title="Ranked first",
            says="What goes in first.",
            groups=tuple((one,) for one in people.shown(m.first.id[:each])),
        ),
        Gallery(
            title="Ranked last",
            says="What goes in last.",
            groups=tuple((one,) for one in people.shown(m.last.id[-each:][::-1])),
        ),
    ]
    if m.method != score:
        gained = m.own.kept & ~m.by_score.kept
        lost = m.by_score.kept & ~m.own.kept
        galleries += [
            Gallery(
                title=f"Kept by {m.method}, not by {score} alone",
                says="Chosen by a hash among all of them.",
                groups=tuple((one,) for one in people.shown(_some(m, gained, each))),
            ),
            Gallery(
                title=f"Kept by {score} alone, not by {m.method}",
                says="Beside each the sample that took most from its score, where there is one.",
                groups=tuple(people.with_suppressors(_some(m, lost, each))),
            ),
        ]
    return [one for one in galleries if one.groups]


def look_up(
    folder: Folder, galleries: Sequence[Gallery], shards: Sequence[str], fetch: bool, say: Say
) -> Album:
    """Thumbnails of all samples of some galleries, from the shards that the catalog names.

    shards: patterns to search by uid instead. fetch: read shards on other machines too. The names
    of shards come from metadata that anybody may have made: they are looked up as they are, and
    nothing but this machine's disks is read unasked.
    """
    wanted = {one.uid for gallery in galleries for group in gallery.groups for one in group}
    album = _Album()
    if shards:
        for shard in webdataset.list_shards(shards):
            album.read(shard, wanted)
            if wanted <= album.pictures.keys():
                break
        album.miss(wanted)
        return album.closed()
    places = _places(folder, wanted)
    if not places:
        why = "the run does not know the shards of its samples: `d2filter report OUT --shards …`"
        return Album(pictures={}, troubles=(f"No pictures: {why}",))
    say(f"report    reading {len(wanted):,} pictures from {len(places):,} shards")
    silent: set[str] = set()  # folders whose storage did not answer: asking costs a minute each
    for url in sorted(places):
        home = url.rpartition("/")[0]
        mine = places[url]
        if home in silent:
            album.trouble(f"pictures in other shards of {home} were not tried")
            continue
        try:
            here = Folder(home or ".").local is not None
            if here or fetch:
                album.read(webdataset.shard_at(url), set(mine.values()), mine)
            else:
                album.trouble(_ELSEWHERE)
        except Exception as error:  # whatever a file system's client raises on a name like that
            album.trouble(f"{len(mine)} pictures: {shortened(error)}")
            silent |= {home} if isinstance(error, StorageError) else set()
    if _ELSEWHERE not in album.troubles:
        album.miss(wanted)
    return album.closed()


class _People:
    """Samples of a run by graph id."""

    def __init__(self, folder: Folder, m: Measures) -> None:
        self._m = m
        self._ranking = Sparse(folder.sub("ranking"))
        self._graph = Sparse(folder.sub("graph"))

    def shown(self, ids: I64, sqdist: Iterable[float | None] | None = None) -> list[Shown]:
        """What is told of each."""
        if not ids.size:
            return []
        rows = self._ranking.rows(ids, _COLUMNS)
        raw = self._m.rule.raw(rows["difficulty"])
        kept = self._m.rule.kept(rows["rank"], rows["difficulty"])
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


class _Album:
    """An album that is being filled."""

    def __init__(self) -> None:
        self.pictures: dict[str, Picture] = {}
        self.troubles: list[str] = []

    def trouble(self, text: str) -> None:
        self.troubles.append(text)

    def read(
        self, shard: webdataset.Shard, wanted: set[str], keys: dict[str, str] | None = None
    ) -> None:
        """Add the wanted pictures of a shard. keys: the uids of samples by key, where the run knows
        them: it may call them otherwise than the shard does.
        """
        # what is missing after a break is counted by `miss`
        with contextlib.suppress(webdataset.LostTail):
            for sample in webdataset.read_samples(shard, keys):
                uid = sample.uid if keys is None else keys[sample.key]
                # of a key that comes again the one with the uid
                if uid in wanted and (uid not in self.pictures or uid == sample.uid):
                    self._add(str(uid), sample)

    def _add(self, uid: str, sample: webdataset.Sample) -> None:
        jpeg = b"" if sample.reason else thumbnail(sample.image)
        if not jpeg:
            return
        text = " ".join(sample.caption.split())
        caption = text if len(text) <= _CAPTION else text[: _CAPTION - 1] + "…"
        self.pictures[uid] = Picture(jpeg=jpeg, caption=caption)

    def miss(self, wanted: set[str]) -> None:
        """Note those that were not found."""
        gone = len(wanted - self.pictures.keys())
        if gone:
            self.trouble(f"{gone} pictures were not found in the shards, or cannot be decoded")

    def closed(self) -> Album:
        return Album(pictures=self.pictures, troubles=tuple(dict.fromkeys(self.troubles)))


def shortened(error: Exception) -> str:
    """An error on one line."""
    return webdataset.clean((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def thumbnail(image: bytes) -> bytes:
    """A small JPEG of a picture; empty for what cannot be decoded, or is too large to be."""
    from PIL import Image

    try:
        with (
            warnings.catch_warnings(),
            Image.open(io.BytesIO(image), formats=webdataset.IMAGE_FORMATS) as picture,
        ):
            warnings.simplefilter("ignore")
            if picture.width * picture.height > _MOST_PIXELS:
                return b""
            picture.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = picture.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            stream = io.BytesIO()
            small.save(stream, "JPEG", quality=_QUALITY)
            return stream.getvalue()
    except Exception:  # decoders raise nearly anything on hostile bytes
        return b""


def _some(m: Measures, mask: npt.NDArray[np.bool_], most: int) -> I64:
    """Graph ids of up to `most` drawn samples, by a hash of the uid."""
    rows = np.flatnonzero(mask)
    hi, lo = m.drawn.hi[rows], m.drawn.lo[rows]
    chosen = uids.hash_sample(hi, lo, most, salt=uids.SALT_REPORT, seed=1)
    ids: I64 = m.drawn.id[rows[chosen]]
    return ids


def _places(folder: Folder, wanted: set[str]) -> dict[str, dict[str, str]]:
    """Uids of the wanted samples by key, by shard, where the catalog knows it."""
    halves = np.array([uid_format.from_hex(uid) for uid in sorted(wanted)], np.uint64)
    hi, lo = halves.T
    found: dict[str, dict[str, str]] = defaultdict(dict)
    home = folder.sub("catalog")
    for name in home.names(".parquet"):
        with tables.open_table(home, name) as parquet:
            for number in range(parquet.num_row_groups):
                bounds = parquet.metadata.row_group(number).column(0).statistics
                if bounds is None or not ((hi >= bounds.min) & (hi <= bounds.max)).any():
                    continue
                table = parquet.read_row_group(number, columns=["uid_hi", "uid_lo", "shard", "key"])
                rows = uids.positions(
                    table.column("uid_hi").to_numpy(), table.column("uid_lo").to_numpy(), hi, lo
                )
                chosen: Any = table.take(rows[rows >= 0]).to_pydict()
                ids = uid_format.to_hex(hi[rows >= 0], lo[rows >= 0])
                for uid, shard, key in zip(ids, chosen["shard"], chosen["key"], strict=True):
                    if shard is not None and key is not None:
                        found[shard][key] = uid
    return dict(found)
