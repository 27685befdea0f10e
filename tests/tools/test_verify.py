"""Every check of `verify` finds its fault, which a test plants in a finished run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import pools
from support.runs import copy_of

from d2filter.cli.main import main
from d2filter.formats.paths import Folder

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    pool = pools.make(300, 6, copies=0.5)
    columns = {"shard": ["a.tar"] * 300, "key": [str(i) for i in range(300)]}
    pools.write(folder / "m", pool, columns=columns)
    words = ["run", "--metadata-dir", str(folder / "m"), "--n-neighbors", "3"]
    assert main([*words, "--out-dir", str(folder / "o")]) == 0
    assert main(["verify", str(folder / "o")]) == 0
    return folder / "o"


def edit(out: Path, name: str, column: str, change: Callable[[Any], None]) -> None:
    path = out / name / "part-00000.parquet"
    table = pq.read_table(path)
    index = table.column_names.index(column)
    kind = table.column(column).type
    if pa.types.is_fixed_size_list(kind):
        values = np.stack(table.column(column).to_pylist())
        change(values)
        flat = pa.array(values.ravel(), kind.value_type)
        array = pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    else:
        values = table.column(column).to_numpy().copy()
        change(values)
        array = pa.array(values, kind)
    pq.write_table(table.set_column(index, column, array), path)


def swap(values: np.ndarray) -> None:
    values[[3, 4]] = values[[4, 3]]


def put(at: Any, value: Any) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[at] = value

    return change


def subset(out: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(out / "subset.npy", change(np.load(out / "subset.npy")))


def samples(out: Path, name: str, value: int) -> None:
    stats = json.loads((out / "stats.json").read_text())
    stats["samples"][name] = value
    (out / "stats.json").write_text(json.dumps(stats))


def zero_features(out: Path) -> None:
    path = out / "catalog/part-00000.npy"
    np.save(path, np.zeros_like(np.load(path)))


def turn_ties(neighbors: np.ndarray) -> None:
    """The pool's copies make lists that begin with two neighbors at distance 0."""
    neighbors[:, [0, 1]] = neighbors[:, [1, 0]]


def kept(out: Path, column: str, value: object) -> None:
    path = out / "kept/part-00000.parquet"
    table = pq.read_table(path)
    index = table.column_names.index(column)
    field = table.schema.field(column)
    filled = pa.array([value] * table.num_rows, field.type)
    pq.write_table(table.set_column(index, field, filled), path)


BREACHES: list[tuple[Callable[[Path], None], str]] = [
    (lambda o: samples(o, "read", 301), "read is not ranked + bad + duplicate"),
    (lambda o: samples(o, "pruned", 1), "ranked is not kept + pruned"),
    (lambda o: samples(o, "bad", 1), "lists 0 bad, stats.json has 1"),
    (lambda o: edit(o, "graph", "uid_lo", swap), "rows differ in uid_lo"),
    (lambda o: edit(o, "graph", "difficulty", put(0, 9)), "rows differ in difficulty"),
    (lambda o: edit(o, "graph", "neighbors", put((0, 0), 300)), "neighbors out of range"),
    (lambda o: edit(o, "graph", "neighbors", put((5, 1), 5)), "samples list themselves"),
    (
        lambda o: edit(o, "graph", "neighbors", put((5, 2), -1)),
        "do not end in the paddings they need",
    ),
    (lambda o: edit(o, "graph", "neighbors", put((5, 0), -1)), "a padding before a neighbor"),
    (lambda o: edit(o, "graph", "neighbors", put(5, 7)), "name a neighbor twice"),
    (lambda o: edit(o, "graph", "sqdist", put((5, 0), 3.9)), "sqdist falls inside a list"),
    (lambda o: edit(o, "graph", "sqdist", put((5, 0), np.nan)), "sqdist is NaN"),
    (lambda o: edit(o, "graph", "sqdist", put((5, 2), np.inf)), "of a neighbor is infinite"),
    (lambda o: edit(o, "ranking", "rank", put(0, 300)), "ranks out of range"),
    (lambda o: edit(o, "ranking", "rank", put(slice(2), 5)), "ranks are missing or repeated"),
    (lambda o: edit(o, "ranking", "rank", swap), "final scores rise with rank"),
    (lambda o: edit(o, "ranking", "forward", put(0, 1)), "forward scores are not those"),
    (lambda o: edit(o, "ranking", "final", put(0, 2**45)), "are not forward minus the messages"),
    (lambda o: edit(o, "ranking", "suppressed_by", put(0, 300)), "1 samples name another suppr"),
    (lambda o: edit(o, "ranking", "suppressed_by", put(slice(None), -1)), "another suppressor"),
    (lambda o: edit(o, "catalog", "uid_lo", put(0, 5)), "differ in uid_lo between graph and cat"),
    (lambda o: edit(o, "catalog", "difficulty", put(0, 9)), "differ in difficulty between graph"),
    (zero_features, "sqdist are not those of the features"),
    (lambda o: edit(o, "graph", "neighbors", turn_ties), "equals are not in ring order"),
    (lambda o: (o / "index/centroids.npy").unlink(), "centroids.npy"),
    (lambda o: np.save(o / "index/centroids.npy", np.zeros((3, 2))), "centroids have shape (3, 2)"),
    (lambda o: (o / "catalog/part-00000.parquet").write_bytes(b"PAR1"), "not a readable parquet"),
    (lambda o: (o / "index/cells.parquet").write_bytes(b"PAR1"), "not a readable parquet"),
    (lambda o: (o / "bad_samples.parquet").write_bytes(b"PAR1"), "not a readable parquet"),
    (lambda o: (o / "stats.json").write_text("{"), "stats.json is not valid JSON"),
    (lambda o: shutil.rmtree(o / "kept"), "kept/ lists 0 samples, 90 of the subset"),
    (lambda o: kept(o, "shard", "b.tar"), "kept/ differs from the subset in column shard"),
    (lambda o: kept(o, "rank", 0), "kept/ differs from the subset in column rank"),
    (lambda o: subset(o, lambda s: s[::-1]), "unsorted or repeated"),
    (lambda o: subset(o, lambda s: np.append(s[:1], s)), "unsorted or repeated"),
    (lambda o: subset(o, lambda s: s[1:]), "has 89 entries, the ranking's prefix 90"),
    (lambda o: (o / "kept/sizes.json").write_text('{"a.tar": 3}'), "sizes.json counts 3"),
]


@pytest.mark.parametrize(("damage", "said"), BREACHES, ids=[said for _, said in BREACHES])
def test_every_damage_is_found(
    sound: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    out = copy_of(sound, tmp_path)
    damage(out)
    assert main(["verify", str(out)]) == 1
    captured = capsys.readouterr()
    # a breach is listed; a file that cannot be read is an error of one line
    assert said in captured.out + captured.err
    assert len(captured.err.splitlines()) == 1


def test_another_subset_of_the_same_size_is_found(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(sound, tmp_path)
    ranking = pq.read_table(out / "ranking/part-00000.parquet").to_pydict()
    worst = int(np.argmax(ranking["rank"]))

    def change(s: np.ndarray) -> np.ndarray:
        s[0] = (ranking["uid_hi"][worst], ranking["uid_lo"][worst])
        return np.sort(s)

    subset(out, change)
    assert main(["verify", str(out)]) == 1
    assert "are not the ranking's prefix" in capsys.readouterr().out


def breaches(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What `verify` finds wrong."""
    capsys.readouterr()
    code = main(["verify", *words])
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if not line.startswith("ok ")]
    assert bool(found) == bool(code)
    return found


def test_changed_bytes_are_found_even_if_their_values_are_valid(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(sound, tmp_path)
    part = out / "graph/part-00000.parquet"
    # the same table in other bytes
    pq.write_table(pq.read_table(part), part, compression="none")
    title, first = breaches(capsys, str(out))
    assert "files hold the bytes that were published" in title
    assert "part-00000.parquet is not what graph wrote" in first


def test_a_stage_built_from_another_predecessor_is_found(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(sound, tmp_path)
    path = out / "completions/rank.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "upstream": "0" * 32}))
    assert "rank was made from another graph" in breaches(capsys, str(out))[1]
    shutil.copy(sound / "completions/rank.json", path)
    config = json.loads((out / "config.json").read_text())
    config["stages"]["graph"]["fingerprint"] = "1" * 32
    (out / "config.json").write_text(json.dumps(config))
    assert "config.json has other fingerprints" in breaches(capsys, str(out))[1]


def change_one_value(folder: Path, name: str) -> None:
    with np.load(folder / name) as arrays:
        held = {key: arrays[key] for key in arrays.files}
    held["l14_img"][7, 2] += np.float16(1)
    np.savez(folder / name, **held)


def test_an_input_that_changed_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen by its sums, and where even size and time are as before by reading it again."""
    folder = pools.write(tmp_path / "m", pools.make(60, 6), files=2)
    out = str(tmp_path / "o")
    assert main(["run", "--metadata-dir", str(folder), "--out-dir", out]) == 0
    assert breaches(capsys, out, "--deep") == []
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert breaches(capsys, out, "--deep") == [], "another time is no change"
    change_one_value(folder, "00001.npz")
    _, said = breaches(capsys, out)
    assert "input file 00001.npz has changed since the catalog was made" in said
    record = Path(out, "completions/catalog.json")
    held = json.loads(record.read_text())
    now = next(f for f in Folder(str(folder)).files() if f.name == "00001.npz")
    held["inputs"]["00001.npz"] = [now.size, now.version]
    record.write_text(json.dumps(held))
    assert breaches(capsys, out) == []
    found = breaches(capsys, out, "--deep")
    assert "00001: 1 rows are not in the catalog as they are here, row 7 first" in found[1]
    assert "1 samples of the catalog are not in the metadata any more" in found[2]
    for path in folder.glob("*.parquet"):
        path.unlink()
    assert "holds no .parquet file" in breaches(capsys, out)[1]
