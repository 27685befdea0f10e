"""The examples of docs/extending.md work: each touches one file, and the command line knows it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import pools

import d2filter

DOC = Path(__file__).parents[1] / "docs" / "extending.md"
N = 120


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with every block of the page appended to the file that it names."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(Path(d2filter.__file__).parent, folder / "d2filter")
    blocks = re.findall(r"```python\n# (d2filter/\S+\.py)\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(blocks) == len({name for name, _ in blocks}) == 3
    for name, code in blocks:
        with (folder / name).open("a") as stream:
            stream.write(f"\n\n{code}")
    return folder


def run(extended: Path, *words: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(extended)}
    done = subprocess.run(
        [sys.executable, "-m", "d2filter", *map(str, words)], cwd=extended, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_score_a_method_and_an_output_are_one_entry_each(extended: Path, tmp_path: Path) -> None:
    pool = pools.make(N, 8)
    metadata = pools.write(tmp_path / "m", pool)
    out = tmp_path / "o"
    words = ("--metadata-dir", metadata, "--out-dir", out, "--n-neighbors", 3, "--no-report")
    words = (*words, "--score", "l1_agreement", "--method", "middle_first", "--fraction", "0.25")
    run(extended, "run", *words)
    # the score is in the catalog, the method in the ranking, the output in the run directory
    part = pq.read_table(out / "ranking" / "part-00000.parquet")
    difficulty = part.column("difficulty").to_numpy()
    uids = [
        f"{hi:016x}{lo:016x}"
        for hi, lo in zip(part["uid_hi"].to_pylist(), part["uid_lo"].to_pylist(), strict=True)
    ]
    row = {uid: number for number, uid in enumerate(pool["uid"])}
    image, text = (pool[name].astype(np.float64) for name in ("img", "txt"))
    wanted = -np.abs(image - text).sum(axis=1)[[row[uid] for uid in uids]]
    np.testing.assert_allclose(difficulty, wanted, rtol=1e-6)
    rank = part.column("rank").to_numpy()
    far = np.abs(difficulty - np.median(difficulty))
    assert (np.diff(far[np.argsort(rank)]) >= 0).all()
    kept = [f"{hi:016x}{lo:016x}" for hi, lo in np.load(out / "subset.npy").tolist()]
    assert (out / "uids.txt").read_text().split() == kept
    assert len(kept) == N // 4
    assert "middle_first" in run(extended, "rank", "--help")
    run(extended, "verify", out)
    # another budget replaces the output, and verify reads it
    run(extended, "select", "--out-dir", out, "--fraction", "0.5")
    assert len((out / "uids.txt").read_text().split()) == N // 2
    (out / "uids.txt").write_text("0\n")
    with pytest.raises(AssertionError):
        run(extended, "verify", out)
