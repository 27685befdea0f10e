"""Runs on storage that fails: broken connections, a server that is gone, a full disk.

An S3 server runs on loopback, behind a proxy that breaks connections on request.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import pools, shard_files
from support.flaky_proxy import KINDS, FlakyProxy
from support.runs import stats

from d2filter.errors import StorageError
from d2filter.formats import retry
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder, checksum

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

OPTIONS = ("--n-neighbors", "3")
ANSWERED_IN = 800  # seconds; pytest's own limit is stricter where the test is ordinary
OUTPUTS = ("subset.npy", "graph", "ranking")

SERVER = """
import sys
from werkzeug.serving import WSGIRequestHandler
from moto.server import ThreadedMotoServer
WSGIRequestHandler.disable_nagle_algorithm = True
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

# many commands over one Ray, for a start takes seconds; its workers inherit this environment
COMMANDS = """
import contextlib, io, json, os, sys
from d2filter.cli.main import main
import ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000,
         log_to_driver=False, logging_level="ERROR")
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Commands:
    """A process that runs d2filter's commands one by one."""

    def __init__(self, environment: Mapping[str, str], *before: str) -> None:
        self._process = subprocess.Popen(
            [*before, sys.executable, "-c", COMMANDS],
            env={**_without_proxies(), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, *words: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(w) for w in words]) + "\n")
        self._process.stdin.flush()
        code, out, err = self._answer()
        return code, out, err

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _answer(self) -> Any:
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], ANSWERED_IN)
        if not ready:
            self._process.kill()  # or the next command would take this one's answer for its own
        assert ready, "no answer in time"
        return json.loads(stdout.readline())


def _without_proxies() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return {**kept, "NO_PROXY": "*", "no_proxy": "*"}


def credentials(endpoint: str) -> dict[str, str]:
    """The environment of those that speak to the server; botocore's own retries are off, so that
    what is tried again is tried again by us.
    """
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


GONE = ("--metadata-dir", "--shards")


@pytest.fixture(scope="module", autouse=True)
def gone(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mapping[str, tuple[subprocess.Popen[str], Path]]]:
    """Commands for a server that is not there; they try again while the other tests go on."""
    started = {}
    for what in GONE:
        out = tmp_path_factory.mktemp("gone") / "out"
        words = ["run", what, "s3://pool/in", "--out-dir", str(out)]
        process = subprocess.Popen(
            [sys.executable, "-m", "d2filter", *words],
            # nothing listens on port 1
            env={**_without_proxies(), **credentials("http://127.0.0.1:1")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started[what] = (process, out)
    yield started
    for process, _ in started.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def proxy() -> Iterator[FlakyProxy]:
    """An S3 server with a bucket `pool`, behind a proxy that does no harm yet."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline())
        with FlakyProxy(f"http://127.0.0.1:{port}", seed=1) as flaky:
            yield flaky
    finally:
        server.stdin.close()
        server.stdout.close()
        server.wait(30)


@pytest.fixture(scope="module")
def bucket(proxy: FlakyProxy) -> Any:
    """s3fs on that server, with an empty bucket."""
    fs = s3fs.S3FileSystem(
        key="test", secret="test", endpoint_url=proxy.url, use_listings_cache=False
    )
    fs.mkdir("pool")
    return fs


@pytest.fixture(scope="module")
def commands(proxy: FlakyProxy, bucket: Any) -> Iterator[Commands]:
    """Commands that find the server through their environment, and so do their workers."""
    started = Commands(credentials(proxy.url))
    yield started
    started.close()


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage") / "metadata"
    return pools.write(folder, pools.make(1500, 24, seed=3), files=2)


@pytest.fixture(scope="module")
def expected(metadata: Path, commands: Commands) -> Path:
    """A run on a local disk, with nothing in its way."""
    out = metadata.parent / "out"
    code, _, err = commands.run("run", "--metadata-dir", metadata, "--out-dir", out, *OPTIONS)
    assert code == 0, err
    return out


def same_outputs(out: Path, expected: Path) -> None:
    for name in OUTPUTS:
        place = expected / name
        files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
        assert files
        for path in files:
            inside = path.relative_to(expected)
            assert (out / inside).read_bytes() == path.read_bytes(), inside
    assert stats(out)["samples"] == stats(expected)["samples"]


def one_line(err: str) -> str:
    """The only line of stderr."""
    (line,) = err.splitlines()
    assert line.startswith("d2filter: error: ")
    assert "Traceback" not in line
    return line


def run_on_flaky_s3(
    commands: Commands, proxy: FlakyProxy, bucket: Any, metadata: Path, where: str, rate: float
) -> None:
    """Copy the metadata to the server and run there while it fails now and then."""
    bucket.put(f"{metadata}/", f"{where}/metadata", recursive=True)
    proxy.faults.clear()
    proxy.rate = rate
    try:
        code, _, err = commands.run(*words_of(where))
    finally:
        proxy.rate = 0
    assert code == 0, err


def words_of(where: str) -> tuple[str, ...]:
    source, out = f"s3://{where}/metadata", f"s3://{where}/out"
    return ("run", "--metadata-dir", source, "--out-dir", out, *OPTIONS)


@pytest.fixture(scope="module")
def on_s3(commands: Commands, proxy: FlakyProxy, bucket: Any, metadata: Path) -> Counter[str]:
    """A run at pool/run of metadata on the same server; the faults that it met."""
    run_on_flaky_s3(commands, proxy, bucket, metadata, "pool/run", 0.1)
    return Counter(proxy.faults)


def test_a_run_on_s3_that_breaks_off_and_answers_500_has_the_bits_of_a_local_one(
    on_s3: Counter[str], bucket: Any, expected: Path, tmp_path: Path
) -> None:
    assert min(on_s3[kind] for kind in KINDS) >= 1, on_s3
    assert on_s3.total() >= 20
    bucket.get("pool/run/out/", f"{tmp_path}/out", recursive=True)
    same_outputs(tmp_path / "out", expected)


def test_a_run_on_s3_is_resumed_and_verified(
    on_s3: Counter[str], commands: Commands, bucket: Any
) -> None:
    def written() -> dict[str, Any]:
        found = bucket.find("pool/run/out", detail=True)
        made = tuple(f"pool/run/out/{part}/" for part in ("catalog", "graph", "ranking"))
        return {n: i["LastModified"] for n, i in found.items() if n.startswith(made)}

    before = written()
    code, out, err = commands.run(*words_of("pool/run"))
    assert code == 0, err
    done = [line.split()[0] for line in out.splitlines() if "done before" in line]
    assert done == ["catalog", "graph", "rank", "select", "report"]
    assert before
    assert written() == before
    code, out, err = commands.run("verify", "s3://pool/run/out")
    assert code == 0, out + err


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_fails_every_fifth_time_loses_nothing(
    commands: Commands,
    proxy: FlakyProxy,
    bucket: Any,
    metadata: Path,
    expected: Path,
    tmp_path: Path,
    seed: int,
) -> None:
    run_on_flaky_s3(commands, proxy, bucket, metadata, f"pool/often-{seed}", 0.2)
    assert min(proxy.faults[kind] for kind in KINDS) >= 10, proxy.faults
    bucket.get(f"pool/often-{seed}/out/", f"{tmp_path}/out", recursive=True)
    same_outputs(tmp_path / "out", expected)


def test_shards_on_s3_are_read_completely_from_a_server_that_breaks_connections(
    commands: Commands, proxy: FlakyProxy, bucket: Any, tmp_path: Path
) -> None:
    expected = set()
    for number in range(2):
        files = []
        for i in range(20):
            files += shard_files.members(f"{number}{i:04d}", seed := 100 * number + i)
            content, caption = shard_files.picture(seed), shard_files.caption(seed)
            expected.add(uid_format.content_uid(content, caption))
        shard_files.write(tmp_path / f"shards/{number:05d}.tar", files)
    bucket.put(f"{tmp_path}/shards/", "pool/shards", recursive=True)
    proxy.faults.clear()
    proxy.rate = 0.25
    try:
        code, _, err = commands.run(
            "embed", "--shards", "s3://pool/shards/{00000..00001}.tar", "--out-dir",
            "s3://pool/embedded", "--batch-size", "32",
        )  # fmt: skip
    finally:
        proxy.rate = 0
    assert code == 0, err
    assert proxy.faults["cut"] > 0, proxy.faults
    bucket.get("pool/embedded/", f"{tmp_path}/out", recursive=True)
    # ids made of the content: they are right when every byte is
    tables = [pq.read_table(path) for path in (tmp_path / "out/metadata").glob("*.parquet")]
    assert {u for table in tables for u in table.column("uid").to_pylist()} == expected
    assert stats(tmp_path / "out")["samples"]["read"] == len(expected) == 40


def test_an_upload_in_parts_that_fails_leaves_the_object_of_before(
    proxy: FlakyProxy, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in credentials(proxy.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: 5 << 20)
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    folder = Folder("s3://pool/parts")
    before, after = (np.random.default_rng(i).bytes(11 << 20) for i in range(2))

    def put(content: bytes) -> None:
        with folder.publish("a.bin") as path:
            path.write_bytes(content)

    try:
        put(before)
        proxy.faults.clear()
        proxy.rate, proxy.in_a_row, proxy.only = 1, 1000, "partNumber=2"
        with pytest.raises(StorageError, match=r"a\.bin could not be written in 6 tries"):
            put(after)
        assert proxy.faults.total() >= 6
        proxy.rate = 0
        assert bucket.cat_file("pool/parts/a.bin") == before
        assert folder.names() == ["a.bin"]
        put(after)
        assert checksum(folder, "a.bin")[0] == len(after)
        assert bucket.cat_file("pool/parts/a.bin") == after
    finally:
        proxy.rate, proxy.in_a_row, proxy.only = 0, 3, ""
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("what", GONE)
def test_a_store_that_does_not_answer_fails_with_one_line(
    gone: Mapping[str, tuple[subprocess.Popen[str], Path]], what: str
) -> None:
    process, out = gone[what]
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    line = one_line(err)
    assert re.search(r"s3://pool/in could not be [\w ]+ in \d tries", line), line
    assert "run the same command again" in line
    assert not (out / "completions").exists()


def _mounts_are_permitted() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    )
    return tried.returncode == 0


@pytest.mark.skipif(not _mounts_are_permitted(), reason="no mount namespace: unshare -rm fails")
def test_a_full_or_read_only_disk_fails_with_one_line_and_the_same_command_continues(
    metadata: Path, expected: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = Commands({}, "unshare", "-rm")

    def mount(*words: str) -> None:
        # in the mount namespace of the commands; seen from here through /proc
        subprocess.run(
            [
                "nsenter",
                "-t",
                str(inside.pid),
                "-U",
                "-m",
                "--preserve-credentials",
                "mount",
                *words,
            ],
            check=True,
        )

    try:
        mount("-t", "tmpfs", "-o", "size=350k", "none", str(disk))
        seen = Path(f"/proc/{inside.pid}/root{disk}")
        words = ("run", "--metadata-dir", metadata, "--out-dir", disk / "out", *OPTIONS)
        code, _, err = inside.run(*words)
        assert code == 1
        line = one_line(err)
        assert "No space left on device; make room and run the same command again" in line
        assert str(disk / "out") in line
        assert not list(seen.rglob(".tmp-*"))
        for path in seen.rglob("*.json"):
            json.loads(path.read_text())
        assert not (seen / "out/subset.npy").exists()

        mount("-o", "remount,size=30m,ro", str(disk))
        code, _, err = inside.run(*words)
        assert code == 1
        assert "Read-only file system; make it writable and run the same command" in one_line(err)

        mount("-o", "remount,rw", str(disk))
        code, _, err = inside.run(*words)
        assert code == 0, err
        same_outputs(seen / "out", expected)
    finally:
        inside.close()
