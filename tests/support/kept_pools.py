"""Shards with repeated uids, and run directories that keep some of their samples: the input of
`reshard` and `keep`.

No stage runs: the ranking is drawn at random, and the code of `select` writes kept/. `KeptPool`
knows which samples are kept, so tests compare with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from d2filter.formats import subset
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from support import shard_files

U = np.dtype("u8,u8")
PICTURE = b"a picture, of which nobody decodes a byte"


@dataclass(frozen=True)
class Sample:
    """One sample of a shard."""

    key: str
    number: int
    """determines picture and caption: samples with the same number are copies"""
    has_uid: bool
    """whether its json contains its uid; a hash of the content is its uid otherwise"""
    kind: str = "whole"
    """whole, or what is wrong with it"""

    @property
    def content(self) -> bytes:
        return PICTURE + b"%d" % self.number

    @property
    def uid(self) -> str:
        if self.has_uid:
            return f"{self.number:032x}"
        return uid_format.content_uid(self.content, f"caption {self.number}")

    @property
    def files(self) -> list[tuple[str, bytes]]:
        meta = {"uid": self.uid} if self.has_uid else {"other": 1}
        members = {
            "jpg": self.content,
            "txt": f"caption {self.number}".encode(),
            "json": json.dumps(meta).encode(),
        }
        members.update(BROKEN.get(self.kind, {}))
        return [
            (f"{self.key}.{ext}", members[ext]) for ext in members if members[ext] is not ABSENT
        ]


ABSENT = b"(no such member)"
BROKEN: dict[str, dict[str, bytes]] = {
    "no picture": {"jpg": ABSENT},
    "empty picture": {"jpg": b""},
    "a gif": {"jpg": ABSENT, "gif": b"GIF89a"},
    "no caption": {"txt": ABSENT},
    "list caption": {"txt": ABSENT, "json": b'{"uid": "%032x", "caption": ["a", "b"]}' % 3},
    "blank caption": {"txt": b" \n"},
    "caption of bytes": {"txt": b"\xff\xfe\x00"},
    "broken json": {"json": b"{"},
    "list for json": {"json": b"[1]"},
    "deep json": {"json": b"[" * 100_000},
}


@dataclass
class KeptPool:
    """Shards, and the samples of them that a run keeps."""

    shards: dict[str, list[Sample]]
    kept: list[tuple[str, int]] = field(default_factory=list)
    """(shard, index in the shard) of each kept sample"""

    def write(self, folder: Path, embedded: bool = True) -> Path:
        """Write shards to folder/s and a run directory to folder/o; returns the run directory."""
        for name, samples in self.shards.items():
            files = [file for sample in samples for file in sample.files]
            shard_files.write(folder / "s" / name, files)
        rows = [(str(folder / "s" / name), self.shards[name][n]) for name, n in self.kept]
        write_run(folder / "o", rows, [str(folder / "s" / name) for name in self.shards], embedded)
        return folder / "o"

    def expected(self, names: list[str] | None = None) -> list[tuple[str, str, bytes]]:
        """(shard, key, picture) of each kept sample, in the order of the shards."""
        return [
            (name, self.shards[name][n].key, self.shards[name][n].content)
            for name, n in sorted(self.kept)
            if names is None or name in names
        ]


def write_run(
    out: Path, rows: list[tuple[str, Sample]], shards: list[str], embedded: bool = True
) -> None:
    """Write subset.npy, kept/ and the completion marker of the catalog, as a run does."""
    pairs = np.array([uid_format.from_hex(sample.uid) for _, sample in rows], U).reshape(-1)
    folder = Folder(str(out))
    subset.publish(folder, pairs["f0"].copy(), pairs["f1"].copy())
    table = pa.table(
        {
            "shard": pa.array([shard for shard, _ in rows], pa.string()),
            "key": pa.array([sample.key for _, sample in rows], pa.string()),
            "uid": pa.array([sample.uid for _, sample in rows], pa.string()),
            "rank": pa.array(range(len(rows)), pa.int64()),
        }
    ).sort_by([(c, "ascending") for c in ("shard", "key", "uid")])
    subset.publish_kept(folder, table, shards)
    folder.publish_json("completions/catalog.json", {"upstream": "embed" if embedded else ""})


@st.composite
def random_pools(draw: st.DrawFn) -> KeptPool:
    """Up to three shards. Keys repeat in other shards, and whole samples in the same one."""
    shards: dict[str, list[Sample]] = {}
    for number in range(draw(st.integers(1, 3))):
        samples = []
        for place in range(draw(st.integers(1, 6))):
            kind = draw(st.sampled_from(["whole"] * 6 + list(BROKEN)))
            samples.append(Sample(f"d/{place}", draw(st.integers(1, 5)), draw(st.booleans()), kind))
        # webdataset takes members side by side for one sample: a key comes again after another
        first = samples[0]
        again = draw(st.integers(1, 5))
        if len(samples) > 1 and first.kind == "whole" and again != first.number:
            samples.append(Sample(first.key, again, draw(st.booleans())))
        shards[f"{number:05d}.tar"] = samples
    pool = KeptPool(shards)
    found: dict[str, list[tuple[str, int]]] = {}
    for name, samples in shards.items():
        for n, sample in enumerate(samples):
            if sample.kind == "whole":
                found.setdefault(sample.uid, []).append((name, n))
    for places in found.values():
        # any one of the copies may have been ranked, and it is kept or not
        if draw(st.integers(0, 3)):
            pool.kept.append(draw(st.sampled_from(places)))
    return pool
