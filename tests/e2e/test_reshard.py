"""New shards of the kept samples, read back with webdataset and compared byte by byte."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from support import shard_files
from support.runs import run

from d2filter.errors import StorageError
from d2filter.formats import tables, webdataset
from d2filter.formats.paths import Folder
from d2filter.formats.uid import from_hex
from d2filter.stages.reshard import build as stage
from d2filter.stages.reshard import write as write_shard
from d2filter.tools import keep

pytestmark = pytest.mark.usefixtures("cluster")

U = np.dtype("u8,u8")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards: with and without uids, members apart, other members, one sample repeated."""
    folder = tmp_path_factory.mktemp("pool")
    for number in range(4):
        files = []
        for i in range(12):
            told = {"uid": f"{number:08x}{i * 77777:024x}"} if i % 3 else {}
            files += shard_files.members(f"{number}{i:03d}", 100 * number + i, **told)
        files += [(f"{number}{i:03d}.cls.txt", b"more") for i in range(2)]
        if number == 2:
            files += shard_files.members("again", 101, uid=f"{1:08x}{77777:024x}")
        shard_files.write(folder / f"{number:05d}.tar", files)
    return folder


def members_of(folder: Path) -> dict[str, dict[str, bytes]]:
    """uid → member contents, as the plain tars hold them; the first of a repeated one."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        keys: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                stream = archive.extractfile(member)
                assert stream is not None
                keys.setdefault(key, {})[extension] = stream.read()
        for content in keys.values():
            uid = keep.uid_of(content)
            if uid is not None:
                found.setdefault(uid, content)
    return found


def chosen(pool: Path, step: int = 2) -> np.ndarray:
    every = list(members_of(pool))
    return np.sort(np.array([from_hex(u) for u in every[::step]], U))


def read_back(out: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Key and members of each sample, by webdataset's own loader."""
    urls = sorted(str(p) for p in out.glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=False, empty_check=False)
    return [(s["__key__"], {n: v for n, v in s.items() if not n.startswith("__")}) for s in dataset]


def test_kept_samples_come_back_byte_by_byte_in_the_order_of_the_input(
    pool: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "s.npy", chosen(pool))
    out = tmp_path / "o"
    words = ("reshard", "--shards", pool, "--subset", tmp_path / "s.npy", "--out-dir", out)
    assert run(*words, "--shard-size", 7) == 0
    every = members_of(pool)
    expected = list(every)[::2]
    got = read_back(out)
    assert [key for key, _ in got] == [f"{uid}-0" for uid in expected]
    for (_, content), uid in zip(got, expected, strict=True):
        assert content == every[uid]
    sizes = json.loads((out / "sizes.json").read_text())
    full, rest = divmod(len(expected), 7)
    assert list(sizes.values()) == [7] * full + [rest]
    for name, size in sizes.items():
        told = json.loads((out / name.replace(".tar", "_stats.json")).read_text())
        assert told == {"successes": size}
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["output_shard_count"], meta["output_shard_format"]) == (len(sizes), "{:08d}.tar")
    ids = np.load(out / "sample_ids.npy")
    assert ids.dtype == U
    assert ids.tolist() == [from_hex(u) for u in expected]


def snapshot(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def test_the_same_command_makes_the_same_bytes_and_another_seed_another_order(
    pool: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "s.npy", chosen(pool))
    words = ("reshard", "--shards", pool, "--subset", tmp_path / "s.npy", "--shard-size", 5)
    outs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*words, "--shuffle", seed, "--out-dir", tmp_path / name) == 0
        outs[name] = snapshot(tmp_path / name)
    assert outs["a"] == outs["b"]
    orders = {name: [key for key, _ in read_back(tmp_path / name)] for name in outs}
    assert orders["a"] != orders["c"]
    plain = [f"{uid}-0" for uid in list(members_of(pool))[::2]]
    assert sorted(orders["a"]) == sorted(orders["c"]) == sorted(plain)
    assert orders["a"] != plain


def test_repeats_mean_repeats_and_unsorted_subsets_are_sorted(pool: Path, tmp_path: Path) -> None:
    every = list(members_of(pool))
    theirs = np.array([from_hex(every[n]) for n in (30, 4, 30, 30)], U)
    np.save(tmp_path / "s.npy", theirs)
    words = ("reshard", "--shards", pool, "--subset", tmp_path / "s.npy")
    with pytest.warns(UserWarning, match="is not sorted"):
        assert run(*words, "--out-dir", tmp_path / "o") == 0
    assert [key for key, _ in read_back(tmp_path / "o")] == [
        f"{every[4]}-0", *(f"{every[30]}-{j}" for j in range(3))
    ]  # fmt: skip


def test_an_interrupted_reshard_continues_and_a_finished_one_does_nothing(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "s.npy", chosen(pool))
    words = ("reshard", "--shards", pool, "--subset", tmp_path / "s.npy", "--shard-size", 5)
    assert run(*words, "--out-dir", tmp_path / "whole") == 0
    out = tmp_path / "o"

    def cut_off(**arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage, "finish", cut_off)
        assert run(*words, "--out-dir", out) == 130
    state = out / ".d2filter"
    (state / "completions/reshard/write-000002.json").unlink()
    (out / "00000002.tar").unlink()
    before = (out / "00000001.tar").stat().st_mtime_ns
    assert run(*words, "--out-dir", out) == 0
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert (out / "00000001.tar").stat().st_mtime_ns == before
    assert not (state / "work").exists()
    assert run(*words, "--out-dir", out) == 0
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_shards_written_while_a_search_failed_are_not_written_again(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "s.npy", chosen(pool))
    words = ("reshard", "--shards", pool, "--subset", tmp_path / "s.npy", "--shard-size", 5)
    monkeypatch.setattr(stage, "BYTES_A_TASK", 1)
    assert run(*words, "--out-dir", tmp_path / "whole") == 0
    out = tmp_path / "o"

    def find(*, first: int, **arguments: Any) -> Any:
        from d2filter.errors import InputError
        from d2filter.stages.reshard import build as build_shards

        if first == 2:
            raise InputError("the third shard is out of reach")
        return build_shards.find(first=first, **arguments)

    with monkeypatch.context() as patched:
        patched.setattr(stage, "find", find)
        assert run(*words, "--out-dir", out) == 1
    assert "the third shard is out of reach" in capsys.readouterr().err
    # what the first two inputs hold was settled, and written
    early = sorted(path.name for path in out.glob("*.tar"))
    assert len(early) == 2
    before = [(out / name).stat().st_mtime_ns for name in early]
    assert run(*words, "--out-dir", out) == 0
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert [(out / name).stat().st_mtime_ns for name in early] == before


@pytest.mark.parametrize(
    "fault", [StorageError("the store does not answer"), OSError(5, "the store does not answer")]
)
def test_an_index_that_cannot_be_read_stops_no_other_task(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    fault: Exception,
) -> None:  # fmt: skip
    np.save(tmp_path / "s.npy", chosen(pool))
    words = ("reshard", "--shards", pool, "--subset", tmp_path / "s.npy", "--shard-size", 5)
    monkeypatch.setattr(stage, "BYTES_A_TASK", 1)
    plain = tables.read_table

    def unread(folder: Folder, name: str, columns: Sequence[str]) -> Any:
        if name == write_shard.index_name(1):
            raise fault
        return plain(folder, name, columns)

    out = tmp_path / "o"
    with monkeypatch.context() as patched:
        patched.setattr(tables, "read_table", unread)
        assert run(*words, "--out-dir", out) == 1
    assert "the store does not answer" in capsys.readouterr().err
    marks = {path.stem for path in (out / ".d2filter/completions/reshard").glob("*.json")}
    assert {f"find-{n:06d}-{n + 1:06d}" for n in range(4)} <= marks
    assert run(*words, "--out-dir", out) == 0


def test_a_folder_of_another_version_is_not_continued(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "s.npy", chosen(pool))
    words = ("reshard", "--shards", pool, "--subset", tmp_path / "s.npy", "--out-dir")
    with monkeypatch.context() as patched:
        patched.setattr(stage, "__version__", "0.0.1")
        assert run(*words, tmp_path / "o") == 0
    assert run(*words, tmp_path / "o") == 1
    assert "holds shards of another d2filter version: use another" in capsys.readouterr().err


def test_small_shards_are_searched_together_and_nothing_else_changes(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "s.npy", chosen(pool))
    words = ("reshard", "--shards", pool, "--subset", tmp_path / "s.npy", "--shard-size", 9)
    sizes = [path.stat().st_size for path in sorted(pool.glob("*.tar"))]
    done = {}
    for name, most in (("alone", 1), ("by two", sizes[0] + sizes[1]), ("all", sum(sizes))):
        monkeypatch.setattr(stage, "BYTES_A_TASK", most)
        assert run(*words, "--shuffle", 7, "--out-dir", tmp_path / name) == 0
        marks = tmp_path / name / ".d2filter/completions/reshard"
        done[name] = sorted(path.stem for path in marks.glob("find-*"))
    assert done["alone"] == [f"find-{n:06d}-{n + 1:06d}" for n in range(4)]
    assert done["all"] == ["find-000000-000004"]
    assert len(done["by two"]) < 4
    assert snapshot(tmp_path / "alone") == snapshot(tmp_path / "by two")
    assert snapshot(tmp_path / "alone") == snapshot(tmp_path / "all")


def test_contradictions_are_named(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "s.npy", chosen(pool))
    np.save(tmp_path / "t.npy", chosen(pool, 3))
    words = ("reshard", "--shards", pool, "--out-dir", tmp_path / "o", "--subset")
    assert run(*words, tmp_path / "s.npy") == 0
    assert run(*words, tmp_path / "t.npy", "--shard-size", 3) == 1
    assert "holds shards of another shard-size and subset" in capsys.readouterr().err
    theirs = tmp_path / "theirs"
    shard_files.write(theirs / "00000000.tar", [])
    other = ("--subset", tmp_path / "s.npy", "--out-dir", theirs)
    assert run("reshard", "--shards", pool, *other) == 1
    assert "holds shards that this command did not write" in capsys.readouterr().err
    assert run(*words, tmp_path / "s.npy", "--shard-size", 0) == 2
    assert "shard-size is 0" in capsys.readouterr().err
    assert run("reshard", "--subset", tmp_path / "s.npy", "--out-dir", tmp_path / "p") == 2
    assert "does not name its shards: give --shards" in capsys.readouterr().err


def test_samples_that_no_shard_holds_are_counted_after_everything_else_is_done(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "pool"
    broken.mkdir()
    for path in sorted(pool.glob("*.tar"))[:3]:
        (broken / path.name).write_bytes(path.read_bytes())
    cut = broken / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:30_000])
    subset = chosen(pool)
    np.save(tmp_path / "s.npy", subset)
    out = tmp_path / "o"
    words = ("reshard", "--shards", broken, "--subset", tmp_path / "s.npy", "--out-dir", out)
    assert run(*words) == 3
    error = capsys.readouterr().err
    whole = webdataset.list_shards([str(broken / f"0000{n}.tar") for n in (0, 2)])
    there = {sample.uid for shard in whole for sample in webdataset.locate_samples(shard)}
    got = [key for key, _ in read_back(out)]
    assert len(got) >= len(there & {f"{h:016x}{low:016x}" for h, low in subset.tolist()})
    assert (
        f"{len(subset) - len(got)} of the {len(subset)} samples of the subset are in none" in error
    )
    assert "1 shards could not be read whole" in error
    assert run(*words, "--max-missing", "0.9") == 0


def test_the_shards_of_a_run_need_not_be_named(tmp_path: Path) -> None:
    for number in range(2):
        files = [f for i in range(15) for f in shard_files.members(f"{i}", 40 * number + i)]
        shard_files.write(tmp_path / f"s/{number}.tar", files)
    words = ("run", "--shards", tmp_path / "s", "--out-dir", tmp_path / "r", "--fraction", "0.5")
    assert run(*words) == 0
    assert run("reshard", "--subset", tmp_path / "r", "--out-dir", tmp_path / "o") == 0
    kept = np.load(tmp_path / "r/subset.npy")
    assert sorted(key for key, _ in read_back(tmp_path / "o")) == sorted(
        f"{hi:016x}{lo:016x}-0" for hi, lo in kept.tolist()
    )


def test_a_broken_copy_does_not_replace_its_sample(tmp_path: Path) -> None:
    """The uid stands first on members without a picture, then on ones without a caption."""
    uid = f"{7:032x}"
    told = json.dumps({"uid": uid}).encode()
    files = [
        ("a.json", told), ("a.txt", b"no picture"),
        ("b.json", told), ("b.jpg", shard_files.picture(1)),
        ("c.json", told), ("c.jpg", b""), ("c.txt", b"empty picture"),
        *shard_files.members("d", 3, uid=uid),
    ]  # fmt: skip
    shard_files.write(tmp_path / "s/0.tar", files)
    np.save(tmp_path / "s.npy", np.array([from_hex(uid)], U))
    words = (
        "--shards",
        tmp_path / "s",
        "--subset",
        tmp_path / "s.npy",
        "--out-dir",
        tmp_path / "o",
    )
    assert run("reshard", *words) == 0
    ((key, content),) = read_back(tmp_path / "o")
    assert key == f"{uid}-0"
    assert content["jpg"] == shard_files.picture(3)


def test_the_samples_that_a_run_ranked_are_copied_and_streamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A truncated picture, and a copy with another caption, stand before samples of their uid."""
    picture = shard_files.picture(5)
    files = [f for i in range(12) for f in shard_files.members(f"{i}", i, uid=f"{i:032x}")]
    twins = [
        ("cut.jpg", picture[: len(picture) // 2]), ("cut.txt", b"a caption"),
        ("cut.json", json.dumps({"uid": f"{5:032x}"}).encode()),
        *shard_files.members("copy", 40, uid=f"{6:032x}"),
    ]  # fmt: skip
    shard_files.write(tmp_path / "s/0.tar", twins)
    shard_files.write(tmp_path / "s/1.tar", files)
    words = ("run", "--shards", tmp_path / "s", "--out-dir", tmp_path / "r", "--fraction", "1")
    assert run(*words, "--max-bad", "0.2") == 0
    assert run("reshard", "--subset", tmp_path / "r", "--out-dir", tmp_path / "o") == 0
    got = {key: content["jpg"] for key, content in read_back(tmp_path / "o")}
    assert len(got) == 12
    assert got[f"{5:032x}-0"] == picture
    kept = pq.read_table(tmp_path / "r/kept/part-00000.parquet").to_pylist()
    (place,) = [row for row in kept if row["uid"] == f"{6:032x}"]
    assert got[f"{6:032x}-0"] == shard_files.picture(40 if place["key"] == "copy" else 6)
    urls = [str(tmp_path / "s/0.tar"), str(tmp_path / "s/1.tar")]
    stage = keep.keep(tmp_path / "r")
    streamed = [s["jpg"] for s in wds.WebDataset(urls, shardshuffle=False).compose(stage)]
    assert sorted(streamed) == sorted(got.values())
    assert sum(stage.expected(urls).values()) == 12
    # without the run, the first one with a picture and a caption stands for a uid
    alone = ("reshard", "--shards", tmp_path / "s", "--subset", tmp_path / "r/subset.npy")
    assert run(*alone, "--out-dir", tmp_path / "p") == 0
    assert dict(read_back(tmp_path / "p"))[f"{5:032x}-0"]["jpg"] == twins[0][1]
    capsys.readouterr()
    some = ("reshard", "--subset", tmp_path / "r", "--out-dir", tmp_path / "q")
    assert run(*some, "--shards", tmp_path / "o/00000000.tar") == 2
    assert "has the name of one that was ranked" in capsys.readouterr().err


def test_members_are_streamed_and_the_tar_is_plain(pool: Path, tmp_path: Path) -> None:
    """No time, no owner: nothing but names, sizes and contents decides the bytes."""
    np.save(tmp_path / "s.npy", chosen(pool, 9))
    out = tmp_path / "o"
    assert run("reshard", "--shards", pool, "--subset", tmp_path / "s.npy", "--out-dir", out) == 0
    content = (out / "00000000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
    assert Folder(str(out)).names() == [
        "00000000.tar", "00000000_stats.json", "meta.json", "sample_ids.npy", "sizes.json"
    ]  # fmt: skip
