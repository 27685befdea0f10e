"""Reads thumbnails for the report's galleries from the shards."""

from __future__ import annotations

import base64
import contextlib
import io
import stat
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from d2filter.errors import InputError, StorageError
from d2filter.formats import kept, webdataset
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import RunState
from d2filter.formats.shardnames import ShardNames
from d2filter.text import printable, scrubbed
from d2filter.tools.gallery import Gallery

Say = Callable[[str], None]

THUMBNAIL = 144  # pixels of the longer side
_QUALITY = 80
MOST_PIXELS = 1 << 26
_CAPTION = 240  # characters


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


def look_up(
    folder: Folder,
    galleries: Sequence[Gallery],
    shards: Sequence[str],
    is_requested: bool,
    say: Say,
) -> Album:
    """Thumbnails of all samples of some galleries, from the shards that the catalog names.

    shards: patterns of other shards to search; those with the name of a shard of the run are
    searched by key, others by uid. is_requested: the user requested images, wherever they are.
    Otherwise only shards are opened that were inputs of the run and are on this machine, because
    metadata from strangers may name any file.
    """
    wanted = {one.uid for gallery in galleries for group in gallery.groups for one in group}
    album = _Filling()
    places = places_of(folder, wanted)
    if shards:
        _look_into(webdataset.list_shards(shards), places, wanted, album)
        album.miss(wanted)
        return album.closed()
    if not places:
        why = "the run does not know the shards of its samples: `d2filter report OUT --shards …`"
        return Album(pictures={}, troubles=(f"No pictures: {why}",))
    # shards that a run has embedded are those that it was given
    given = bool(RunState(folder).require("catalog")["upstream"])
    closed = {} if is_requested or given else places
    if closed:
        album.trouble(
            f"{_count(closed):,} pictures lie in {len(closed):,} shards that only the metadata "
            "names, which are opened only on request: `d2filter report OUT --shards …`"
        )
    opened = {url: keys for url, keys in places.items() if url not in closed}
    if opened:
        say(f"report    reading {_count(opened):,} pictures from {len(opened):,} shards")
    skipped = _read_all(opened, is_requested, album)
    album.miss(wanted - skipped - {uid for keys in closed.values() for uid in keys.values()})
    return album.closed()


def _count(places: dict[str, dict[str, str]]) -> int:
    return sum(map(len, places.values()))


def _look_into(
    shards: Sequence[webdataset.Shard],
    places: dict[str, dict[str, str]],
    wanted: set[str],
    album: _Filling,
) -> None:
    """Shards of the run by key, wherever they lie now; then the others by uid."""
    known = ShardNames(list(places))
    others = []
    for shard in shards:
        try:
            number = known.find(shard.url)
        except InputError as error:
            album.trouble(shortened(error))
            continue
        if number < 0:
            others.append(shard)
            continue
        keys = list(places.values())[number]
        album.read(shard, set(keys.values()), keys)
    for shard in others:
        if wanted <= album.pictures.keys():
            break
        album.read(shard, wanted)


def _read_all(places: dict[str, dict[str, str]], is_requested: bool, album: _Filling) -> set[str]:
    """Images of shards by name; returns the uids of those that are elsewhere and were not
    requested. Names may be any string; they are looked up literally.
    """
    skipped: set[str] = set()
    far = 0
    silent: set[str] = set()  # folders whose storage did not answer: asking costs a minute each
    for url in sorted(places):
        home = url.rpartition("/")[0]
        mine = places[url]
        if home in silent:
            album.trouble(f"pictures in other shards of {home} were not tried")
            continue
        try:
            here = Folder(home or ".").local
            if here is None and not is_requested:
                skipped |= set(mine.values())
                far += 1
                continue
            if here is not None and not _is_file(here / url.rpartition("/")[2]):
                raise InputError(f"{url} is not a regular file")
            album.read(webdataset.shard_at(url), set(mine.values()), mine)
        except Exception as error:  # whatever a file system's client raises on a name like that
            album.trouble(f"{len(mine)} pictures: {shortened(error)}")
            silent |= {home} if isinstance(error, StorageError) else set()
    if far:
        album.trouble(
            f"{len(skipped):,} pictures lie in {far:,} shards on other machines: "
            "`d2filter report OUT --gallery N` fetches them"
        )
    return skipped


def _is_file(path: Path) -> bool:
    """Whether the path can be opened safely: a pipe waits forever, a device never ends. True if
    nothing is there, which other code reports.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


class _Filling:
    """An album that is being filled."""

    def __init__(self) -> None:
        self.pictures: dict[str, Picture] = {}
        self.troubles: list[str] = []

    def trouble(self, text: str) -> None:
        self.troubles.append(printable(scrubbed(text)))

    def read(
        self, shard: webdataset.Shard, wanted: set[str], keys: dict[str, str] | None = None
    ) -> None:
        """Add the wanted pictures of a shard. keys: the uids of samples by key, where the run knows
        them: it may call them otherwise than the shard does.
        """
        # what is missing after a break is counted by `miss`
        with contextlib.suppress(webdataset.LostTail):
            for sample in webdataset.read_samples(shard, keys):
                uid = sample.uid if keys is None else keys.get(sample.key)
                # of a key that comes again the one with the uid
                if uid in wanted and (uid not in self.pictures or (keys and uid == sample.uid)):
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
            if picture.width * picture.height > MOST_PIXELS:
                return b""
            picture.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = picture.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            stream = io.BytesIO()
            small.save(stream, "JPEG", quality=_QUALITY)
            return stream.getvalue()
    except Exception:  # decoders raise nearly anything on hostile bytes
        return b""


def places_of(folder: Folder, wanted: set[str]) -> dict[str, dict[str, str]]:
    """Uids of the wanted samples by key, by shard, where the catalog knows it."""
    halves = np.array([uid_format.from_hex(uid) for uid in sorted(wanted)], np.uint64)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for uid, (shard, key) in kept.places(folder, halves[:, 0], halves[:, 1]).items():
        found[shard][key] = uid
    return dict(found)
