"""Commands in an existing run directory: nothing is lost or stale, and no two runs share it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import pools, shard_files
from support.runs import copy_of, run

from d2filter.cli import main as cli
from d2filter.cli import options
from d2filter.errors import D2FilterError
from d2filter.formats import content_hash, lock
from d2filter.formats.paths import Folder

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """A folder with metadata `m` and its finished run `o`."""
    folder = tmp_path_factory.mktemp("run")
    pools.write(folder / "m", pools.make(400, 8), files=2)
    assert run("run", "--metadata-dir", folder / "m", "--out-dir", folder / "o") == 0
    return folder


def state(out: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of each file but logs."""
    return {
        path.relative_to(out).as_posix(): (
            hashlib.blake2b(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
        )
        for path in out.rglob("*")
        if path.is_file() and "logs" not in path.parts
    }  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("--fraction", "0.0001"),
        ("--fraction", "0.3,0.0001"),
        ("--fraction", "0.3,7"),
        ("--fraction", "0"),
        ("--budget", "0"),
    ],
)
def test_an_impossible_budget_is_refused_before_anything_runs(
    finished: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    out = copy_of(finished / "o", tmp_path)
    before = state(out)
    assert run("select", "--out-dir", out, *words) == 2
    assert run("run", "--metadata-dir", finished / "m", "--out-dir", out, *words) == 2
    assert state(out) == before


def test_an_equal_selection_touches_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(finished / "o", tmp_path)
    before = state(out)
    assert run("select", "--out-dir", out) == 0
    assert "select    done before" in capsys.readouterr().out
    after = state(out)
    assert {n: v for n, v in after.items() if n not in ("config.json", "stats.json")} == {
        n: v for n, v in before.items() if n not in ("config.json", "stats.json")
    }
    # what somebody removed is made again
    (out / "subset.npy").unlink()
    assert run("select", "--out-dir", out) == 0
    assert state(out)["subset.npy"][0] == before["subset.npy"][0]
    assert run("select", "--out-dir", out, "--overwrite", "select") == 0
    assert state(out)["subset.npy"][1] != after["subset.npy"][1]


def test_a_selection_that_dies_leaves_the_old_one_or_the_new_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is the last file that it published."""
    columns = {"shard": ["a.tar"] * 400, "key": [f"{i:04d}" for i in range(400)]}
    metadata = pools.write(tmp_path / "m", pools.make(400, 8), columns=columns)
    whole = tmp_path / "w"
    assert run("run", "--metadata-dir", metadata, "--out-dir", whole, "--fraction", "0.3,0.4") == 0
    old = (whole / "subset.npy").read_bytes()
    publish = Folder.publish
    seen = set()
    for allowed in range(20):
        out = Path(shutil.copytree(whole, tmp_path / f"o{allowed}"))
        left = [allowed]

        def dying(self: Folder, name: str, checksums: Any = None, left: list[int] = left) -> Any:
            if lock.LOCK not in name:
                left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return publish(self, name, checksums)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "publish", dying)
            code = run("select", "--out-dir", out, "--fraction", "0.1")
        there = (out / "subset.npy").read_bytes()
        if code == 0:
            break
        assert code == 130
        seen.add(there)
        assert there == old or len(np.load(out / "subset.npy")) == 40
        assert (out / "kept/part-00000.parquet").exists()
        assert run("select", "--out-dir", out, "--fraction", "0.1") == 0
        assert len(np.load(out / "subset.npy")) == 40
        assert not (out / "subsets").exists()
        assert run("verify", out) == 0
    else:
        pytest.fail("it never ends")
    assert old in seen
    assert len(seen) == 2, "no death between the new subset and the end"


@pytest.mark.usefixtures("reports")
def test_a_report_is_written_again_for_another_subset(finished: Path, tmp_path: Path) -> None:
    out = copy_of(finished / "o", tmp_path)
    assert run("run", "--metadata-dir", finished / "m", "--out-dir", out) == 0
    first = (out / "report.html").read_bytes()
    assert run("select", "--out-dir", out, "--fraction", "0.2") == 0
    second = (out / "report.html").read_bytes()
    assert second != first
    note = json.loads((out / "completions/report.json").read_text())
    record = json.loads((out / "completions/select.json").read_text())
    assert note["select"] == record["fingerprint"]


def test_a_run_without_a_report_gets_none_from_select(finished: Path, tmp_path: Path) -> None:
    out = copy_of(finished / "o", tmp_path)
    assert run("select", "--out-dir", out, "--fraction", "0.2") == 0
    assert not (out / "report.html").exists()


def test_overwrite_builds_the_stages_again(tmp_path: Path) -> None:
    """A damaged file of the same size is made again, with all after it."""
    content = [m for i in range(12) for m in shard_files.members(f"{i:04d}", i)]
    shard_files.write(tmp_path / "s/00000.tar", content)
    words = ("run", "--shards", tmp_path / "s", "--out-dir", tmp_path / "o", "--max-bad", 1)
    assert run(*words) == 0
    pair = tmp_path / "o/metadata/00000.npz"
    whole = pair.read_bytes()
    pair.write_bytes(whole[:-200] + bytes(100) + whole[-100:])
    assert run("verify", tmp_path / "o") == 1
    assert run(*words, "--overwrite", "embed") == 0
    with np.load(pair) as found:
        assert all(np.isfinite(found[name]).all() for name in found.files)
    assert run("verify", tmp_path / "o") == 0


def test_heal_rebuilds_exactly_what_is_damaged_or_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        content = [
            m for i in range(6) for m in shard_files.members(f"{number}{i:03d}", 9 * number + i)
        ]
        shard_files.write(tmp_path / f"s/{number}.tar", content)
    out = tmp_path / "o"
    words = ("run", "--shards", tmp_path / "s", "--out-dir", out, "--max-bad", 1)
    assert run(*words) == 0
    subset = (out / "subset.npy").read_bytes()
    whole = state(out)
    assert run(*words, "--heal") == 0
    assert {n: v for n, v in state(out).items() if n.startswith(("metadata/", "graph/"))} == {
        n: v for n, v in whole.items() if n.startswith(("metadata/", "graph/"))
    }
    damaged = out / "metadata/1.npz"
    content_of_it = damaged.read_bytes()
    damaged.write_bytes(content_of_it[:-200] + bytes(100) + content_of_it[-100:])
    assert run(*words, "--heal") == 0
    assert "embed     is healed" in capsys.readouterr().out
    assert damaged.read_bytes() == content_of_it
    for name in ("metadata/0.npz", "metadata/2.npz"):
        assert state(out)[name] == whole[name], "a whole shard was embedded again"
    for name in ("subset.npy", "ranking/part-00000.parquet", "graph/part-00000.parquet"):
        path = out / name
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert run("verify", out) == 1
        assert run(*words, "--heal") == 0
        assert run("verify", out) == 0
    assert (out / "subset.npy").read_bytes() == subset
    more = [m for i in range(6) for m in shard_files.members(f"new{i:03d}", 99 + i)]
    shard_files.write(tmp_path / "s/1.tar", more)
    assert run(*words) == 1
    assert "--heal embeds only what changed" in capsys.readouterr().err
    assert run(*words, "--heal") == 0
    assert state(out)["metadata/0.npz"] == whole["metadata/0.npz"]
    assert run("verify", out, "--deep") == 0
    assert run(*words, "--heal", "--dry-run") == 2
    # other options are refused as ever, and nothing is removed for them
    before = state(out)
    damaged.write_bytes(damaged.read_bytes() + b"x")
    assert run(*words, "--heal", "--alpha", "white") == 1
    assert "alpha was 'drop' and is 'white'" in capsys.readouterr().err
    assert state(out).keys() == before.keys()
    assert state(out)["subset.npy"] == before["subset.npy"]


@pytest.mark.parametrize("when", ["parquet", "npz"])
def test_metadata_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    folder = pools.write(tmp_path / "m", pools.make(300, 8, seed=1), files=2)
    other = pools.write(tmp_path / "n", pools.make(300, 8, seed=2), files=2)
    words = ("run", "--metadata-dir", folder, "--out-dir", tmp_path / "o")
    whole, calls = content_hash.of, []

    def replaced(source: Folder, name: str) -> str:
        """After the first look at a file, it is replaced by another of the same size and time."""
        found = whole(source, name)
        if name.endswith(when) and not calls:
            calls.append(name)
            path = folder / name
            before = path.stat()
            (other / name).replace(path)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return found

    with monkeypatch.context() as patch:
        import ray

        from d2filter.stages.catalog import build as build_catalog

        # in this process: a task's own would not be seen by the test
        patch.setattr(content_hash, "of", replaced)
        with pytest.raises(D2FilterError, match="changed while it was read"):
            build_catalog.read_group(
                report=lambda done: None, out=Folder(str(tmp_path / "o")),
                source=Folder(str(folder)), names=["00000", "00001"], run_name="00000",
                config=options.run_config(
                    cli.parse([str(word) for word in words])
                ).catalog,
            )  # fmt: skip
        assert ray.is_initialized()
    assert calls


@pytest.mark.parametrize("words", [("--overwrite", "catalog"), ("--heal",)])
def test_a_catalog_is_not_built_again_without_its_metadata(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    out = copy_of(finished / "o", tmp_path)
    before = state(out)
    for command in ("graph", "run"):
        assert run(command, "--out-dir", out, *words) == 2
        assert "give --metadata-dir" in capsys.readouterr().err
    assert state(out) == before


def test_wrong_paths_create_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ("run", "--metadata-dir", tmp_path / "typo"),
        ("run", "--shards", tmp_path / "typo/{000..009}.tar"),
        ("embed", "--shards", tmp_path / "typo"),
        ("graph", "--metadata-dir", tmp_path / "typo"),
        ("run",),
        ("rank",),
        ("select",),
    ):
        assert run(*words, "--out-dir", tmp_path / "new") in (1, 2), words
        assert list(tmp_path.iterdir()) == [], words
        assert len(capsys.readouterr().err.splitlines()) == 1, words


@pytest.mark.parametrize("inside", ["", "metadata", "other/place"])
def test_metadata_inside_the_run_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inside: str
) -> None:
    out = tmp_path / "o"
    folder = pools.write(out / inside, pools.make(100, 8))
    (tmp_path / "link").symlink_to(out)
    before = state(tmp_path)
    for given, into in ((folder, out), (folder, tmp_path / "link")):
        assert run("run", "--metadata-dir", given, "--out-dir", into) == 2
        assert "lies in the run directory" in capsys.readouterr().err
    assert state(tmp_path) == before


def test_the_output_of_embed_may_be_given_as_metadata(tmp_path: Path) -> None:
    shard_files.write(
        tmp_path / "s/0.tar", [m for i in range(9) for m in shard_files.members(f"{i}", i)]
    )
    out = tmp_path / "o"
    assert run("embed", "--shards", tmp_path / "s", "--out-dir", out, "--max-bad", 1) == 0
    again = ("--metadata-dir", out / "metadata", "--arch", "tiny", "--max-bad", 1)
    assert run("run", *again, "--out-dir", out) == 0
    assert run("run", *again, "--out-dir", tmp_path / "other") == 0


# a run that holds its lock until somebody ends it
_SLOW = """
import sys, time
from d2filter.cli import main as cli
from d2filter.stages import pipeline
pipeline.Pipeline._run_stage = lambda self, *more: (print("held", flush=True), time.sleep(600))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def under_way(finished: Path, tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    out = copy_of(finished / "o", tmp_path)
    words = ["run", "--metadata-dir", finished / "m", "--out-dir", out]
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield out, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_one_command_at_a_time_writes_to_a_run_directory(
    finished: Path,
    under_way: tuple[Path, subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, process = under_way
    before = state(out)
    for words in (
        ("run", "--metadata-dir", finished / "m", "--fraction", 0.2),
        ("select", "--fraction", 0.2),
        ("rank", "--gamma", 2, "--overwrite", "rank"),
    ):
        began = time.monotonic()
        assert run(*words, "--out-dir", out) == 1
        assert time.monotonic() - began < 5
        (line,) = capsys.readouterr().err.splitlines()
        assert f"in use by `d2filter run` (process {process.pid} on " in line
    assert state(out) == before
    # those that only read still do
    assert run("status", out) == 0
    assert f"process {process.pid}" in capsys.readouterr().out
    assert run("verify", out) == 0
    assert run("run", "--metadata-dir", finished / "m", "--out-dir", out, "--dry-run") == 0
    # a dead one is replaced at once
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run("select", "--out-dir", out, "--fraction", 0.2) == 0
    assert len(np.load(out / "subset.npy")) == 80
    assert not (out / lock.LOCK).exists()


def test_more_neighbors_than_other_samples_give_no_longer_lists(tmp_path: Path) -> None:
    folder = pools.write(tmp_path / "m", pools.make(40, 8))
    subsets = []
    for k in (39, 1_000_000):
        out = tmp_path / f"{k}"
        assert run("run", "--metadata-dir", folder, "--out-dir", out, "--n-neighbors", k) == 0
        assert run("verify", out) == 0
        assert sum(p.stat().st_size for p in (out / "graph").iterdir()) < 1_000_000
        subsets.append((out / "subset.npy").read_bytes())
    assert subsets[0] == subsets[1]
