"""Compiled loops: numba is imported at the first call, no cache folder is needed, any processor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import d2filter
from d2filter.algorithm import compiled

PACKAGE = Path(d2filter.__file__).parent
HEAVY = "numba", "llvmlite", "ray", "torch", "faiss", "open_clip"

LOADED = f"""
import sys
before = set(sys.modules)
from d2filter.cli import main as cli
try:
    code = cli.main(sys.argv[1:]) if len(sys.argv) > 1 else 0
except SystemExit as error:
    code = error.code
heavy = [name for name in {HEAVY} if name in sys.modules]
print(heavy, file=sys.stderr)
sys.exit(bool(heavy))
"""


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--version",
        "--help",
        "run --help",
        "select --help",
        "plan --help",
        "status {folder}",
        "status {folder}/missing",
        "run --gamma -1 --out-dir {folder} --metadata-dir {folder}",
    ],
)
def test_commands_that_compute_nothing_load_no_heavy_packages(tmp_path: Path, words: str) -> None:
    (tmp_path / "config.json").write_text('{"stages": {}}')
    arguments = [word.format(folder=tmp_path) for word in words.split()]
    done = python(LOADED, *arguments)
    assert done.returncode == 0, done.stderr


def test_the_package_and_every_loop_are_imported_without_numba() -> None:
    names = ["d2filter.api", *(dotted(path) for path in modules())]
    code = "import sys\n" + "\n".join(f"import {name}" for name in names)
    done = python(code + f"\nassert not [m for m in {HEAVY} if m in sys.modules], sys.modules")
    assert done.returncode == 0, done.stderr


def modules() -> list[Path]:
    return [p for p in (PACKAGE / "algorithm").rglob("*.py") if p.stem != "__init__"]


def dotted(path: Path) -> str:
    return ".".join(("d2filter", *path.relative_to(PACKAGE).with_suffix("").parts))


NORMS = """
import sys, numpy as np
from d2filter.algorithm import features
assert features.squared_norms(np.ones((3, 2), np.float16)).tolist() == [2.0] * 3
made = features._squared_norms.made
print(sum(made.stats.cache_hits.values()))
"""


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A copy of the package in a folder where no user can write, not even root."""
    copy = tmp_path / "place" / "d2filter"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [copy, *(p for p in copy.rglob("*") if p.is_dir())]:
        (folder / "__pycache__").touch()
    return copy.parent


def nowhere(place: Path, temporary: Path) -> dict[str, str]:
    hidden = {"HOME": "/dev/null/home", "XDG_CACHE_HOME": "/dev/null/cache"}
    return {"PYTHONPATH": str(place), "TMPDIR": str(temporary), **hidden}


def test_without_a_place_beside_the_package_the_cache_is_in_a_private_folder(
    unwritable: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    for hits in ("0", "1"):
        done = python(NORMS, **nowhere(unwritable, temporary))
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [hits]
    (folder,) = temporary.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    # torn by a power cut: compiled again, and mended
    for torn in folder.rglob("*.nb?"):
        torn.write_bytes(torn.read_bytes()[:7])
    for hits in ("0", "1"):
        done = python(NORMS, **nowhere(unwritable, temporary))
        assert (done.returncode, done.stdout.split()) == (0, [hits]), done.stderr


def test_a_loop_whose_source_changed_is_compiled_again(unwritable: Path, tmp_path: Path) -> None:
    """A compiled loop contains the loops of other files that it calls."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    for hits in ("0", "1"):
        done = python(NORMS, **nowhere(unwritable, temporary))
        assert done.stdout.split() == [hits], done.stderr
    with (unwritable / "d2filter" / "algorithm" / "knn" / "exact_lists.py").open("a") as stream:
        stream.write("# another line\n")
    assert python(NORMS, **nowhere(unwritable, temporary)).stdout.split() == ["0"]


def test_a_folder_that_others_can_write_is_never_read(unwritable: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    folder = temporary / f"d2filter-numba-{os.getuid()}"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    done = python(NORMS, **nowhere(unwritable, temporary))
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())


def test_only_an_own_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = compiled._private_folder.__wrapped__
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"d2filter-numba-{os.getuid()}"
    assert find() == find() == str(folder)
    folder.chmod(0o750)
    assert find() is None
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert find() is None
    folder.unlink()
    folder.touch(mode=0o600)
    assert find() is None
    folder.unlink()
    owner = os.getuid() + 1
    (tmp_path / f"d2filter-numba-{owner}").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: owner)
    assert find() is None
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/tmp")
    assert find() is None


def test_a_full_disk_costs_a_compilation_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    monkeypatch.setattr(caching.IndexDataCacheFile, "flush", full)
    monkeypatch.setattr(caching.IndexDataCacheFile, "load", full)

    @compiled.njit()
    def twice(x):  # type: ignore[no-untyped-def]
        return x + x

    assert twice(3) == 6
    assert twice(1.5) == 3.0


PORTABLE = """
import hashlib, numpy as np, d2filter
from d2filter.algorithm import features
halves = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(np.float16)[:, None]
wide, expected = features.to_float32(halves), halves.astype(np.float32)
numbers = ~np.isnan(expected)
assert (np.isnan(wide) == ~numbers).all()
assert (wide.view(np.uint32) == expected.view(np.uint32))[numbers].all()
rng = np.random.default_rng(0)
rows = rng.normal(size=(1500, 24)).astype(np.float32) * 10.0 ** rng.integers(-4, 2, (1500, 1))
digest = hashlib.sha256()
for normalize in (True, False):
    found = d2filter.rank(
        rows, rng.random(1500), n_neighbors=4, exact_below=100, normalize=normalize
    )
    for one in (found.final, found.neighbors, found.sqdist, found.rank):
        digest.update(one.tobytes())
print(digest.hexdigest())
"""


def test_a_processor_without_conversion_of_halves_gives_the_same_bits() -> None:
    plain = python(PORTABLE)
    assert plain.returncode == 0, plain.stderr
    generic = python(PORTABLE, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert generic.returncode == 0, generic.stderr
    assert generic.stdout == plain.stdout


def test_halves_are_exact_where_subnormal_numbers_count_as_zero() -> None:
    """As torch.set_flush_denormal makes them."""
    code = """
import torch, numpy as np
from d2filter.algorithm import features
bits = np.array([[1], [0x8001], [0x3ff], [0x400]], np.uint16)
expected = bits.view(np.float16).astype(np.float64)[:, 0]
assert torch.set_flush_denormal(True)
wide = features.to_float32(bits.view(np.float16))
assert (wide[:, 0].astype(np.float64) == expected).all(), wide
"""
    done = python(code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert done.returncode == 0, done.stderr


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **variables}
    return subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning", "-c", code, *arguments],
        env=environment, capture_output=True, text=True, timeout=250, cwd="/",
    )  # fmt: skip
