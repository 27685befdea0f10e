"""Runs on web servers give the same results as on local files, and store no passwords of URLs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import pools, shard_files
from support.web_server import WebServer

from d2filter.cli import main as cli

pytestmark = pytest.mark.usefixtures("cluster")

SECRET = "s3cret"
SIGNED = f"X-Amz-Credential=me&X-Amz-Signature={SECRET}%2F{SECRET}"
SILENT: dict[str, Any] = {
    "head": False, "lengths": False, "ranges": False, "etags": False, "times": False, "index": 404,
}  # fmt: skip
OPTIONS = ("--n-neighbors", "3", "--fraction", "0.5", "--batch-size", "16")


def run(*words: object, code: int = 0) -> None:
    assert cli.main([str(word) for word in words]) == code


def pairs(folder: Path) -> dict[str, bytes]:
    return {f"m/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Two shards of 30 samples, two of them bad, by path on a server."""
    found = {}
    for number in range(2):
        members = [(f"{number}bad.txt", b"no picture")]
        for i in range(30):
            members += shard_files.members(f"{number}{i:04d}", 100 * number + i)
        found[f"p/{number:05d}.tar"] = shard_files.tar(members)
    return found


@pytest.fixture(scope="module")
def local(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """A run of the same shards on a disk."""
    home = tmp_path_factory.mktemp("local")
    for name, content in files.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(content)
    run("run", "--shards", home / "p", "--out-dir", home / "out", "--max-bad", "0.1", *OPTIONS)
    return home / "out"


def uids(out: Path) -> set[tuple[str, str]]:
    tables = [pq.read_table(path) for path in (out / "metadata").glob("*.parquet")]
    return {(row["uid"], row["key"]) for table in tables for row in table.to_pylist()}


def kept_shards(out: Path) -> set[str]:
    tables = [pq.read_table(path) for path in (out / "kept").glob("*.parquet")]
    return {shard for table in tables for shard in table.column("shard").to_pylist()}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "p"),
        (SILENT, "p/{00000..00001}.tar"),
        ({"query": SIGNED, "head": False, "index": 403, "missing": 403}, "p/{00000..00001}.tar"),
    ],
    ids=["index", "silent", "signed"],
)
def test_shards_on_a_web_server_give_the_subset_of_local_ones(
    options: dict[str, Any],
    what: str,
    files: dict[str, bytes],
    local: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with WebServer(dict(files), **options) as web:
        words = ("--out-dir", out, "--max-bad", "0.1", *OPTIONS)
        run("run", "--shards", web.url(what), *words)
        assert uids(out) == uids(local)
        assert (out / "subset.npy").read_bytes() == (local / "subset.npy").read_bytes()
        assert kept_shards(out) == {f"http://{web.host}/{name}" for name in files}
        capfd.readouterr()
        run("run", "--shards", web.url(what), *words)
        assert "embed     done before" in capfd.readouterr().out
        # other pictures under the same name, and in as many bytes
        name = "p/00001.tar"
        web.files[name] = web.files[name].replace(b"10007.", b"1xx07.")
        web.changed += 1
        assert len(web.files[name]) == len(files[name])
        run("run", "--shards", web.url(what), *words, code=1)
        assert "input file 00001 has changed" in capfd.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{}, {**SILENT, "index": 200}, {"login": f"me:{SECRET}"}],
    ids=["all", "silent", "login"],
)
def test_metadata_replaced_behind_a_web_server_is_noticed(
    options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pool = pools.make(600, 8, seed=1)
    content = pairs(pools.write(tmp_path / "a", pool, files=2))
    other = pairs(pools.write(tmp_path / "b", {**pool, "img": pool["img"][::-1]}, files=2))
    run("run", "--metadata-dir", tmp_path / "a", "--out-dir", tmp_path / "local", *OPTIONS[:4])
    with WebServer({**content, "m/note.txt": b"is told of"}, **options) as web:
        words = ("--metadata-dir", web.url("m"), "--out-dir", tmp_path / "out", *OPTIONS[:4])
        run("run", *words)
        subset = (tmp_path / "out/subset.npy").read_bytes()
        assert subset == (tmp_path / "local/subset.npy").read_bytes()
        run("run", *words)
        assert "catalog   done before" in capfd.readouterr().out
        run("verify", tmp_path / "out")
        if not web.login:
            run("verify", tmp_path / "out", "--deep")
        web.files["m/00001.npz"] = other["m/00001.npz"]
        web.changed += 1
        assert len(web.files["m/00001.npz"]) == len(content["m/00001.npz"])
        run("run", *words, code=1)
        assert "input file 00001.npz has changed" in capfd.readouterr().err
        # logins are not recorded: the input cannot be looked at again
        run("verify", tmp_path / "out", code=0 if web.login else 1)
        told = "" if web.login else "input file 00001.npz has changed since"
        assert told in capfd.readouterr().out
    nowhere(SECRET, tmp_path / "out")


def nowhere(secret: str, *folders: Path) -> None:
    """No file has a secret in its name or content, as bytes or as a text of a parquet file."""
    seen = 0
    for folder in folders:
        for path in folder.rglob("*"):
            assert secret not in path.name
            if not path.is_file():
                continue
            seen += 1
            assert secret.encode() not in path.read_bytes(), path
            if path.suffix == ".parquet":
                for column in pq.read_table(path).columns:
                    if pa.types.is_string(column.type):
                        assert not any(secret in (text or "") for text in column.to_pylist()), path
    assert seen > 20


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize(
    "options",
    [{"query": SIGNED, "index": 403}, {"login": f"me:{SECRET}"}],
    ids=["signed", "login"],
)
def test_passwords_and_signatures_are_in_no_file_of_a_run_and_in_nothing_that_is_printed(
    options: dict[str, Any],
    files: dict[str, bytes],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    broken = {**files, "p/00002.tar": files["p/00001.tar"][:30_000]}
    with WebServer(broken, **options) as web:
        pattern = web.url("p/{00000..00002}.tar")
        words = ("--shards", pattern, "--out-dir", out, *OPTIONS)
        run("run", *words, code=3)  # lost shards
        run("status", out)
        run("status", out, "--json")
        run("reshard", "--subset", out, "--shards", pattern, "--out-dir", new, "--shard-size", 7)
        assert json.loads((new / "meta.json").read_text())["missing"] == 0
        run("report", out, "--shards", pattern)
        bad = pq.read_table(out / "bad_samples.parquet").to_pylist()
        run("explain", out, next(row["uid"] for row in bad if row["uid"]))
        run("verify", out)
        # failures of all kinds
        run("run", "--shards", web.url("p/9.tar"), "--out-dir", tmp_path / "x", code=1)
        run("run", "--metadata-dir", web.url("p"), "--out-dir", tmp_path / "x", code=1)
        run("run", "--shards", pattern, "--out-dir", web.url("out"), code=2)
        web.fails = [400] * 9
        run("run", *words, "--overwrite", "embed", code=1)
        web.fails = []
        # the recorded addresses let nobody in
        assert cli.main(["reshard", "--subset", str(out), "--out-dir", str(tmp_path / "y")]) == 1
        web.files["p/00001.tar"] = b"other"
        assert cli.main([str(w) for w in ("run", *words, "--overwrite", "embed")]) == 3
    nowhere(SECRET, tmp_path)
    told = capfd.readouterr()
    assert SECRET not in told.out + told.err
    assert f"http://{web.host}/p/00002.tar: " in told.err
    assert "Traceback" not in told.err


def test_a_sharded_column_of_other_tools_is_recorded_without_passwords(tmp_path: Path) -> None:
    pool = pools.make(300, 8, seed=2)
    shard = [f"https://me:{SECRET}@host/{n % 3}.tar?sig={SECRET}" for n in range(300)]
    columns = {"shard": [*shard[:-1], None], "key": [f"{n:05d}" for n in range(300)]}
    pools.write(tmp_path / "m", pool, columns=columns)
    out = tmp_path / "out"
    run("run", "--metadata-dir", tmp_path / "m", "--out-dir", out, *OPTIONS[:4])
    nowhere(SECRET, out)
    assert kept_shards(out) >= {f"https://host/{n}.tar" for n in range(3)}
    sizes = json.loads((out / "kept/sizes.json").read_text())
    assert set(sizes) == {f"{n}.tar" for n in range(3)}


def test_shards_with_names_as_long_as_file_systems_allow(tmp_path: Path) -> None:
    names = []
    for n, letter in enumerate("xü雪👩"):
        names.append(f"{letter * ((255 - len('0.tar')) // len(letter.encode()))}{n}.tar")
        files = [m for i in range(8) for m in shard_files.members(f"{n}{i}", 10 * n + i)]
        shard_files.write(tmp_path / "p" / names[-1], [*files, (f"{n}bad.txt", b"no picture")])
    out, new = tmp_path / "out", tmp_path / "new"
    run("run", "--shards", tmp_path / "p", "--out-dir", out, "--max-bad", "0.5", *OPTIONS)
    run("verify", out, "--deep")
    assert kept_shards(out) == {str(tmp_path / "p" / name) for name in names}
    run("reshard", "--subset", out, "--out-dir", new)
    assert len(np.load(new / "sample_ids.npy")) == 16
