"""Each kind of unusable input: one line, the right exit code, and no files with final names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import pools

from d2filter.cli.main import main

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pools.write(tmp_path / "m", pools.make(60, 4), files=2)


def fail(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("d2filter: error: ")
    assert "Traceback" not in captured.out
    return code, lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fraction", "0"], "fraction is 0, allowed is a number above 0 and at most 1"),
        (["--fraction", "1.5"], "fraction is 1.5"),
        (["--fraction", "many"], "fraction is many"),
        (["--fraction", "0.3", "--budget", "5"], "fraction and budget are both given"),
        (["--budget", "0"], "budget is 0, allowed is a whole number of at least 1"),
        (["--n-neighbors", "0"], "n-neighbors is 0, allowed is a whole number of at least 1"),
        (["--n-neighbors", "two"], "invalid int value: 'two'"),
        (["--gamma", "-1"], "gamma is -1.0, allowed is a finite number of at least 0"),
        (["--gamma", "nan"], "gamma is nan"),
        (["--min-score", "nan"], "min-score is nan"),
        (["--target-recall", "2"], "target-recall is 2.0"),
        (["--max-bad", "7"], "max-bad is 7.0"),
        (["--feature-type", "sound"], "feature-type is 'sound', allowed are 'image|text'"),
        (["--fractoin", "0.3"], "unrecognized arguments: --fractoin (did you mean --fraction?)"),
        (["--partition=2"], "unrecognized arguments: --partition=2 (did you mean --partitions?)"),
        (["-gamma", "2"], "unrecognized arguments: -gamma (did you mean --gamma?)"),
        (["--xyzzy"], "unrecognized arguments: --xyzzy (see `d2filter run --help`)"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_unusable_options_exit_with_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    out = tmp_path / "o"
    code, line = fail(capsys, "run", "--metadata-dir", folder, "--out-dir", out, *words)
    assert code == 2
    assert said in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "'rnu' is not a command (did you mean run?), allowed are embed, graph, rank, "),
        (["tea"], "'tea' is not a command, allowed are embed, "),
        (["--verison"], "unrecognized arguments: --verison (did you mean --version?)"),
        # before the option that is missing because this one is misspelled
        (["run", "--out_dri", "o"], "unrecognized arguments: --out-dri (did you mean --out-dir?)"),
        (["verify", "o", "--depe"], "unrecognized arguments: --depe (did you mean --deep?)"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_misspelled_name_gets_the_nearest_one(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, line = fail(capsys, *words)
    assert code == 2
    assert said in line


def test_a_misspelled_name_in_a_file_gets_the_nearest_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("n-neighbours: 2\n")
    words = ("run", "--metadata-dir", folder, "--out-dir", tmp_path / "o", "--config", config)
    code, line = fail(capsys, *words)
    assert code == 2
    assert "unknown option 'n-neighbours' (did you mean n_neighbors?), allowed are" in line


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def rewrite(folder: Path, **arrays: np.ndarray) -> None:
    np.savez(folder / "00001.npz", **arrays)


def change_rows(folder: Path) -> None:
    one = np.ones((7, 4), np.float16)
    rewrite(folder, l14_img=one, l14_txt=one)


def change_width(folder: Path) -> None:
    one = np.ones((30, 5), np.float16)
    rewrite(folder, l14_img=one, l14_txt=one)


def pickle(folder: Path) -> None:
    objects = np.array([{}] * 30, dtype=object)
    np.savez(folder / "00001.npz", l14_img=objects, l14_txt=objects)


def number_uids(folder: Path) -> None:
    pq.write_table(pa.table({"uid": list(range(30))}), folder / "00001.parquet")


def drop_uids(folder: Path) -> None:
    pq.write_table(pa.table({"url": ["x"] * 30}), folder / "00001.parquet")


def corrupt_deflate(folder: Path) -> None:
    one = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float16)
    np.savez_compressed(folder / "00001.npz", l14_img=one, l14_txt=one)
    content = bytearray((folder / "00001.npz").read_bytes())
    content[100:140] = b"\xff" * 40
    (folder / "00001.npz").write_bytes(content)


def uid_twice(folder: Path) -> None:
    column = pa.array(["0" * 32] * 30)
    table = pa.Table.from_arrays([column, column], names=["uid", "uid"])
    pq.write_table(table, folder / "00001.parquet")


def list_shards(folder: Path) -> None:
    table = pa.table({"uid": [f"{i:032x}" for i in range(30)], "shard": [["a"]] * 30})
    pq.write_table(table, folder / "00001.parquet")


def dangle(folder: Path) -> None:
    (folder / "00001.npz").unlink()
    (folder / "00001.npz").symlink_to("gone.npz")


def all_bad(folder: Path) -> None:
    for name in ("00000", "00001"):
        pq.write_table(pa.table({"uid": ["bad"] * 30}), folder / f"{name}.parquet")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "00001.npz").unlink(), "00001.parquet has no 00001.npz beside it"),
        (lambda f: (f / "00001.parquet").unlink(), "00001.npz has no 00001.parquet beside it"),
        (lambda f: [p.unlink() for p in f.iterdir()], "holds no .parquet file"),
        (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "does not exist"),
        (lambda f: truncate(f / "00001.parquet"), "00001.parquet is not a readable parquet"),
        (lambda f: truncate(f / "00001.npz"), "00001.npz is not a readable npz"),
        (lambda f: (f / "00001.npz").write_bytes(b""), "00001.npz is not a readable npz"),
        (lambda f: (f / "00001.parquet").write_bytes(b""), "00001.parquet is not a readable"),
        (change_rows, "00001.parquet has 30 rows and l14_img of 00001.npz has 7"),
        (change_width, "dimension"),
        (pickle, "00001.npz is not a readable npz file of plain arrays"),
        (corrupt_deflate, "00001.npz is not a readable npz"),
        (uid_twice, "00001.parquet"),
        (list_shards, "00001.parquet: column shard must hold plain values"),
        (dangle, "00001.npz does not exist"),
        (number_uids, "00001.parquet: column uid must hold strings"),
        (drop_uids, "00001.parquet has no column uid; it has url"),
        (all_bad, "none of 60 rows is a valid sample (60 malformed uid)"),
        (lambda f: rewrite(f, b32_img=np.ones((30, 4)), b32_txt=np.ones((30, 4))), "--arch b32"),
        (lambda f: rewrite(f, l14_img=np.ones(30), l14_txt=np.ones(30)), "has shape (30,)"),
    ],
)
def test_unusable_metadata_exits_with_1(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    damage(folder)
    out = tmp_path / "o"
    code, line = fail(capsys, "run", "--metadata-dir", folder, "--out-dir", out)
    assert code == 1
    assert said in line
    for name in ("subset.npy", "graph", "ranking", "stats.json", "catalog/part-00000.parquet"):
        assert not (out / name).exists()


def test_unknown_columns_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("run", "--metadata-dir", folder, "--out-dir", tmp_path / "o")
    code, line = fail(capsys, *words, "--arch", "h14")
    assert code == 1
    assert "has no h14_img and no h14_txt" in line
    assert "try --arch l14" in line
    code, line = fail(capsys, *words, "--score-column", "beauty")
    assert code == 1
    assert "has no column 'beauty'; it has uid" in line


def test_a_stage_without_its_predecessor_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, needed in (("rank", "graph"), ("select", "rank"), ("verify", "graph")):
        where = [tmp_path] if command == "verify" else ["--out-dir", tmp_path]
        code, line = fail(capsys, command, *where)
        assert code == 1
        assert f"run `d2filter {needed}` first" in line or "stats.json does not exist" in line
    code, line = fail(capsys, "graph", "--out-dir", tmp_path)
    assert code == 2
    assert "give --metadata-dir" in line


def test_an_address_without_ray_fails_with_one_line(folder: Path, tmp_path: Path) -> None:
    # in a process of its own: this one is connected to a Ray already
    words = ["run", "--metadata-dir", str(folder), "--out-dir", str(tmp_path / "o")]
    done = subprocess.run(
        [sys.executable, "-m", "d2filter", *words, "--address", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stderr.splitlines()[-1]
    # a submitted job finds its cluster in the environment
    done = subprocess.run(
        [sys.executable, "-m", "d2filter", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
    )
    assert done.returncode == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stderr.splitlines()[-1]


def test_a_read_only_folder_fails_with_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = fail(capsys, "run", "--metadata-dir", folder, "--out-dir", "/proc/d2filter")
    assert code == 1
    assert "/proc/d2filter" in line


def test_uids_that_are_no_text_are_bad_not_fatal(tmp_path: Path, folder: Path) -> None:
    uids = pa.array([b"\xff" * 32, *(f"{i:032x}".encode() for i in range(29))], pa.binary())
    broken = pa.StringArray.from_buffers(30, *uids.buffers()[1:])
    pq.write_table(pa.table({"uid": broken}), folder / "00001.parquet")
    words = ("run", "--metadata-dir", folder, "--max-bad", "1", "--out-dir", tmp_path / "o")
    assert main([str(w) for w in words]) == 0
    bad = pq.read_table(tmp_path / "o/bad_samples.parquet").to_pylist()
    assert [b["reason"] for b in bad] == ["malformed uid"]


def test_a_budget_that_keeps_nothing_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("run", "--metadata-dir", folder, "--out-dir", tmp_path / "o", "--fraction", "0.01")
    code, line = fail(capsys, *words)
    assert code == 2
    assert "fraction 0.01 of 60 ranked samples is less than one" in line


def test_without_faiss_both_extras_are_named(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "from d2filter.algorithm.knn import products\n"
        "products.load_faiss()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "d2filter[cpu]" in done.stderr
    assert "d2filter[gpu]" in done.stderr
