"""New shards of raw members, as DataComp's train.py and open_clip read them (DESIGN §6).

00000000.tar, 00000001.tar, …   keys {uid}-{j}: j counts the copies of a uid that a subset repeats
00000000_stats.json             {"successes": n}, written after its tar
sizes.json                      {"00000000.tar": n}
meta.json                       output_shard_count, output_shard_format, and what they were made of
sample_ids.npy                  (n,) (u8, u8), the uids in the order of the shards
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from typing import NamedTuple

from d2filter.formats.paths import Folder

SHARD_FORMAT = "{:08d}.tar"
_BUFFER = 1 << 20


class Content(NamedTuple):
    """One member to write."""

    name: str
    content: bytes


def shard_name(number: int) -> str:
    """File of one shard."""
    return SHARD_FORMAT.format(number)


def publish_shard(folder: Folder, number: int, members: Iterable[Content], samples: int) -> None:
    """Write one shard, then its stats. The same members make the same bytes, on any machine."""
    with folder.publish(shard_name(number)) as path, path.open("wb", _BUFFER) as stream:
        for name, content in members:
            # TarInfo's own defaults: no owner, no time
            info = tarfile.TarInfo(name)
            info.size = len(content)
            # headers by tarfile; its addfile copies contents in small pieces
            stream.write(info.tobuf())
            stream.write(content)
            stream.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
        stream.write(bytes(-stream.tell() % tarfile.RECORDSIZE))
    folder.publish_json(f"{number:08d}_stats.json", {"successes": samples})
