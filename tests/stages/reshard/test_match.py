"""Samples that `reshard` copies, compared with the drawn truth."""

from __future__ import annotations

import itertools
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from support import kept_pools, shard_files
from support.kept_pools import Sample

from d2filter.errors import InputError, UsageError
from d2filter.formats import webdataset
from d2filter.formats.paths import FileInfo, Folder
from d2filter.stages.reshard import build as build_shards
from d2filter.stages.reshard.layout import Placing
from d2filter.stages.reshard.match import Wanted
from d2filter.tools import keep


def taken(run: Path, shards: Path, out: Path, tasks: int) -> tuple[list[tuple[str, bytes]], int]:
    """Uid and picture of each sample of the new shards, written without Ray; how many are missing.

    tasks: among which the inputs are divided.
    """
    subset = keep.load_subset(run)
    listed = webdataset.list_shards([str(shards)])
    wanted = Wanted(listed, subset, keep.load_kept(run, subset))
    state = Folder(str(out)).sub(build_shards.STATE)
    work = state.sub("work")
    bounds = np.linspace(0, len(listed), tasks + 1).astype(int).tolist()
    pairs = list(itertools.pairwise(bounds))
    work.publish_json(
        "shards.json", [[s.url, s.name, s.info.name, s.info.size, s.info.version] for s in listed]
    )
    placing = Placing(subset, shard_size=3, shuffle=None)
    new = []
    for number, (group, (first, after)) in enumerate(
        zip(wanted.publish(work, pairs), pairs, strict=True)
    ):
        build_shards.find(
            report=lambda done: None, state=state, shards=listed[first:after], first=first,
            number=number, group=group, strict=wanted.strict,
        )  # fmt: skip
        new += placing.add(*build_shards._Indexes(work, set()).get(number))
    new += placing.close()
    got = []
    for number, rows in enumerate(new):
        build_shards.write(
            report=lambda done: None, out=Folder(str(out)), number=number, rows=rows, private={}
        )
        for shard in webdataset.list_shards([str(out / f"{number:08d}.tar")]):
            got += [(s.key, s.image) for s in webdataset.read_samples(shard)]
    return got, placing.missing


@given(kept_pools.random_pools(), st.integers(1, 3))
def test_exactly_the_ranked_and_kept_samples_are_copied(
    pool: kept_pools.KeptPool, tasks: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = pool.write(Path(folder))
        got, missing = taken(out, Path(folder) / "s", Path(folder) / "new", tasks)
        assert missing == 0
        expected = [
            (f"{pool.shards[name][n].uid}-0", pool.shards[name][n].content)
            for name, n in sorted(pool.kept)
        ]
        assert got == expected


def test_of_two_samples_with_one_uid_the_ranked_one_is_copied(tmp_path: Path) -> None:
    """Another that stands first, and is as whole as far as headers tell, is not."""
    first = Sample("a", 7, True)
    second = Sample("b", 7, True)
    pool = kept_pools.KeptPool({"0.tar": [first, Sample("c", 8, True)], "1.tar": [second]})
    pool.kept = [("1.tar", 0)]
    out = pool.write(tmp_path)
    # so that the two differ
    content = (tmp_path / "s/0.tar").read_bytes()
    (tmp_path / "s/0.tar").write_bytes(content.replace(b"a picture", b"A PICTURE", 1))
    got, _ = taken(out, tmp_path / "s", tmp_path / "new", 1)
    assert got == [(f"{second.uid}-0", second.content)]


@pytest.mark.parametrize("length", [200, 230, 251])
def test_shards_may_have_long_names(tmp_path: Path, length: int) -> None:
    name = "n" * (length - 4) + ".tar"
    pool = kept_pools.KeptPool({name: [Sample("a", 1, True), Sample("b", 2, False)]}, [(name, 1)])
    got, missing = taken(pool.write(tmp_path), tmp_path / "s", tmp_path / "new", 1)
    assert [image for _, image in got] == [pool.shards[name][1].content]
    assert missing == 0


def test_members_keep_names_of_any_bytes(tmp_path: Path) -> None:
    sample = Sample("d\udce9/a", 7, True)
    odd = ["x\udcff.bin", "é.cls", "y" * 120, "z" * 200 + "\udcff"]
    files = [*sample.files, *((f"{sample.key}.{name}", name[:1].encode()) for name in odd)]
    shard_files.write(tmp_path / "s/0.tar", files)
    kept = Sample(webdataset.clean(sample.key), 7, True)
    kept_pools.write_run(tmp_path / "o", [(str(tmp_path / "s/0.tar"), kept)], [])
    taken(tmp_path / "o", tmp_path / "s", tmp_path / "new", 1)
    with tarfile.open(tmp_path / "new/00000000.tar") as archive:
        names = archive.getnames()
    assert names == [f"{sample.uid}-0.{name}" for name in ("jpg", "txt", "json", *odd)]
    stage = keep.keep(tmp_path / "o")
    dataset = wds.WebDataset(str(tmp_path / "s/0.tar"), shardshuffle=False).compose(stage)
    assert [s["__key__"] for s in dataset] == [sample.key]


def test_uids_of_the_metadata_are_followed_by_shard_and_key(tmp_path: Path) -> None:
    samples = [Sample(f"{n}", n, n == 4) for n in range(6)]
    kept_pools.KeptPool({"0.tar": samples}).write(tmp_path)
    rows = [(str(tmp_path / "s/0.tar"), Sample(f"{n}", 100 + n, True)) for n in (1, 3, 4)]
    kept_pools.write_run(tmp_path / "p", rows, [], embedded=False)
    got, missing = taken(tmp_path / "p", tmp_path / "s", tmp_path / "new", 1)
    assert got == [(f"{100 + n:032x}-0", samples[n].content) for n in (1, 3)]
    assert missing == 1  # its json tells another uid


def test_shards_that_are_not_those_of_the_run_are_refused(tmp_path: Path) -> None:
    pool = kept_pools.KeptPool({"0.tar": [Sample("a", 1, True)], "1.tar": [Sample("b", 2, True)]})
    pool.kept = [("0.tar", 0), ("1.tar", 0)]
    out = pool.write(tmp_path)
    subset = keep.load_subset(out)
    kept = keep.load_kept(out, subset)

    def wanted(*urls: str) -> Wanted:
        shards = [webdataset.Shard(url, FileInfo(url, 1, ""), url) for url in urls]
        return Wanted(shards, subset, kept)

    with pytest.raises(UsageError, match=r"none of the 2 shards \(x/5\.tar first\) has the name"):
        wanted("x/5.tar", "x/6.tar")
    with pytest.raises(UsageError, match=r"x/0\.tar and y/0\.tar both match the shard"):
        wanted("x/0.tar", "y/0.tar")
    assert "1 shards of the run were not given" in wanted("x/0.tar").not_given()
    assert wanted("x/0.tar", "x/1.tar", "x/2.tar").not_given() == ""
    (out / "subset.npy").unlink()
    with pytest.raises(InputError, match=r"subset\.npy does not exist"):
        keep.load_subset(out)
