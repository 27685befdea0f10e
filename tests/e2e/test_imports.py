"""Runs never import code from the folder in which they are started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import pools, runs

import d2filter

PACKAGE = Path(d2filter.__file__).parent
SCRIPT = Path(sys.executable).with_name("d2filter")
WORDS = ("run", "--no-report", "--partitions", "2")

# leaves a mark where it is imported, and fails like a module that is not what it seems
DECOY = """
import os
with open({mark!r}, "a") as stream:
    stream.write(__name__ + "\\n")
raise RuntimeError("a decoy was imported")
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pools.write(tmp_path_factory.mktemp("pool") / "m", pools.make(300, 8), files=3)


@pytest.fixture(scope="module")
def right(pool: Path, cluster: None) -> bytes:
    """The subset of a run of this process."""
    out = pool.parent / "right"
    assert runs.run(*WORDS, "--metadata-dir", pool, "--out-dir", out) == 0
    return (out / "subset.npy").read_bytes()


def run(
    program: list[object], pool: Path, cwd: Path, out: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    words = [*WORDS, "--metadata-dir", pool, "--out-dir", out]
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    return subprocess.run(
        [str(word) for word in (*program, *words)], cwd=cwd, env={**kept, **environment},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def decoys(folder: Path, *names: str) -> Path:
    """A folder of decoys, and the file that tells which of them were imported."""
    folder.mkdir(exist_ok=True)
    mark = folder / "imported.txt"
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(DECOY.format(mark=str(mark)))
    return mark


RAN = "the clone ran"
FILES = ("numba.py", "faiss.py", "json.py", "numpy/__init__.py", "tqdm.py", "pickle.py")


def test_python_m_takes_packages_from_where_they_are_installed(
    pool: Path, right: bytes, tmp_path: Path
) -> None:
    mark = decoys(tmp_path / "here", *FILES)
    done = run([sys.executable, "-m", "d2filter"], pool, tmp_path / "here", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert not mark.exists(), mark.read_text()
    assert (tmp_path / "o/subset.npy").read_bytes() == right


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Another d2filter, whose tasks fail at once."""
    folder = tmp_path / "clone"
    shutil.copytree(PACKAGE, folder / "d2filter", ignore=shutil.ignore_patterns("__pycache__"))
    worker = folder / "d2filter/engine/task.py"
    call = "figures = task.run("
    text = worker.read_text()
    assert call in text
    worker.write_text(text.replace(call, f"raise ValueError({RAN!r})\n        {call}"))
    return folder


def test_the_installed_one_takes_nothing_from_the_current_folder(
    pool: Path, right: bytes, clone: Path, tmp_path: Path
) -> None:
    """Which is a clone, with files in it that are named like packages."""
    mark = decoys(clone, *FILES)
    done = run([SCRIPT], pool, clone, tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert not mark.exists(), mark.read_text()
    assert (tmp_path / "o/subset.npy").read_bytes() == right


@pytest.mark.parametrize("how", ["python -m", "PYTHONPATH"])
def test_a_requested_clone_runs_on_all_nodes(
    pool: Path, clone: Path, tmp_path: Path, how: str
) -> None:
    if how == "PYTHONPATH":
        done = run([SCRIPT], pool, tmp_path, tmp_path / "o", PYTHONPATH=str(clone))
    else:
        done = run([sys.executable, "-m", "d2filter"], pool, clone, tmp_path / "o")
    assert done.returncode == 1
    assert RAN in done.stderr


@pytest.mark.parametrize("kind", ["changed", "older", "no package"])
def test_workers_with_another_d2filter_are_refused_in_one_line_with_both_places(
    pool: Path, clone: Path, tmp_path: Path, kind: str
) -> None:
    """As on a cluster whose nodes have another version installed."""
    if kind == "older":
        (clone / "d2filter/engine/same_code.py").unlink()
    if kind == "no package":
        shutil.rmtree(clone / "d2filter")
        (clone / "d2filter").mkdir()
        (clone / "d2filter/__init__.py").write_text("raise ImportError('no d2filter here')\n")
    program = (
        "import os; from d2filter.cli.main import entry\n"
        f"os.environ['PYTHONPATH'] = {str(clone)!r}\n"  # of the nodes, not of this process
        "entry()"
    )
    done = run([sys.executable, "-c", program], pool, tmp_path, tmp_path / "o")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "has another d2filter than this process" in line
    assert str(PACKAGE) in line
    assert (str(clone / "d2filter") in line) == (kind != "no package")
    assert RAN not in line
    assert not (tmp_path / "o/subset.npy").exists()
