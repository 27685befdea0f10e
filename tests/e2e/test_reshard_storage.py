"""New shards on an object store: the requests that are sent, and failures, which change nothing.

The tasks run in this process, because the tests are about the server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import shard_files
from support.flaky_proxy import FlakyProxy

from d2filter.formats import retry, tarwriter, webdataset
from d2filter.formats.paths import Folder
from d2filter.stages.reshard import build as stage
from d2filter.stages.reshard.layout import PlacedSamples, Placing
from d2filter.stages.reshard.match import Wanted

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")

SHARDS = 4
SAMPLES = 30  # a shard
PICTURE = 40_000  # bytes


@pytest.fixture(scope="module")
def proxy() -> Iterator[FlakyProxy]:
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with (
        FlakyProxy(f"http://127.0.0.1:{server.get_host_and_port()[1]}", seed=2) as flaky,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setenv("AWS_ENDPOINT_URL", flaky.url)
        patched.setenv("AWS_ACCESS_KEY_ID", "test")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patched.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem(use_listings_cache=False).mkdir("pool")
        yield flaky
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        files = []
        for i in range(SAMPLES):
            told = json.dumps({"uid": f"{number:016x}{i:016x}"}).encode()
            files += [(f"{i}.jpg", rng.bytes(PICTURE)), (f"{i}.txt", b"x"), (f"{i}.json", told)]
        shard_files.write(folder / f"{number}.tar", files)
    return folder


def prepared(shards: list[webdataset.Shard], out: Folder) -> list[PlacedSamples]:
    """All but the writing, of every second sample: what the new shards are made of."""
    pairs = [(number, i) for number in range(SHARDS) for i in range(0, SAMPLES, 2)]
    subset = np.array(pairs, np.dtype("u8,u8"))
    state = out.sub(stage.STATE)
    Wanted(shards, subset, None).publish(state.sub("work"), [(0, len(shards))])
    listed = [[s.url, s.name, s.info.name, s.info.size, s.info.version] for s in shards]
    state.publish_json("work/shards.json", listed)
    placing = Placing(subset, shard_size=25, shuffle=3)
    for number, shard in enumerate(shards):
        stage.find(
            report=lambda done: None, state=state, shards=[shard], first=number, number=number
        )
        own = np.array([pair for pair in pairs if pair[0] == number], np.uint64)
        placing.add(own[:, 0], own[:, 1])
    return placing.close()


def written(out: Folder, new: list[PlacedSamples]) -> list[bytes]:
    for number, rows in enumerate(new):
        stage.write(report=lambda done: None, out=out, number=number, rows=rows, private={})
    contents = []
    for number in range(len(new)):
        with out.reading(f"{number:08d}.tar") as stream:
            contents.append(stream.read())
    return contents


def test_only_kept_samples_are_requested_and_a_failing_server_changes_nothing(
    pool: Path, proxy: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = webdataset.list_shards([str(pool)])
    here = Folder(str(tmp_path))
    new = prepared(local, here)
    assert len(new) == 3
    expected = written(here, new)
    for path in pool.glob("*.tar"):
        s3fs.S3FileSystem().put_file(str(path), f"pool/in/{path.name}")
    shards = webdataset.list_shards(["s3://pool/in"])
    out = Folder("s3://pool/out")
    new = prepared(shards, out)
    proxy.ranges.clear()
    monkeypatch.setattr(tarwriter, "APART_ELSEWHERE", 1100)
    for number, rows in enumerate(new):
        stage.write(report=lambda done: None, out=out, number=number, rows=rows, private={})
    ranges = [size for path, size in proxy.ranges if path.startswith("/pool/in/")]
    # at one go a picture, its caption and its json, with the headers between them
    most = PICTURE + 2048 + 1024
    assert len(ranges) == SHARDS * SAMPLES / 2
    assert PICTURE < min(ranges) <= max(ranges) <= most
    proxy.rate = 0.2
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    try:
        assert written(out, new) == expected
    finally:
        proxy.rate = 0
    assert proxy.faults["cut"] > 0, proxy.faults
