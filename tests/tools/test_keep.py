"""Samples of a subset, streamed from the original shards."""

from __future__ import annotations

import contextlib
import doctest
import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from support import kept_pools, shard_files
from support.kept_pools import Sample

import d2filter
from d2filter.algorithm import uids
from d2filter.errors import InputError, RunStateError
from d2filter.formats import uid, webdataset
from d2filter.formats.uid import from_hex
from d2filter.tools import keep

U = np.dtype("u8,u8")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Two shards: samples with a uid in their json, and some without."""
    folder = tmp_path_factory.mktemp("keep")
    for number in range(2):
        files = []
        for i in range(20):
            told = {"uid": f"{number * 20 + i:032x}"} if i % 2 else {}
            files += shard_files.members(f"{number}{i:03d}", 20 * number + i, **told)
        shard_files.write(folder / f"{number:08d}.tar", files)
    urls = sorted(str(p) for p in folder.glob("*.tar"))
    found = [
        s.uid for shard in webdataset.list_shards(urls) for s in webdataset.read_samples(shard)
    ]
    return urls, [told for told in found if told is not None]


def stream(urls: list[str], stage: Any) -> Any:
    return wds.WebDataset(urls, shardshuffle=False).compose(stage)


def test_the_stream_is_the_subset_in_the_order_of_the_shards(
    pool: tuple[list[str], list[str]],
) -> None:
    urls, every = pool
    chosen = every[3:30:4]
    subset = np.sort(np.array([from_hex(u) for u in chosen], U))
    stage = d2filter.keep(subset)
    got = list(stream(urls, stage))
    assert [keep.uid_of(sample) for sample in got] == chosen
    assert len(stage) == len(chosen)
    assert got[0]["jpg"] == shard_files.picture(3)
    again = pickle.loads(pickle.dumps(stage))
    assert [s["__key__"] for s in stream(urls, again)] == [s["__key__"] for s in got]


def test_workers_of_a_loader_share_it(pool: tuple[list[str], list[str]]) -> None:
    urls, every = pool
    subset = np.sort(np.array([from_hex(u) for u in every[::3]], U))
    dataset = stream(urls, d2filter.keep(subset)).to_tuple("__key__")
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn"
    )
    assert len({key for (key,) in loader}) == len(every[::3])


def test_repeats_mean_repeats_and_unsorted_subsets_are_sorted_with_a_warning(
    pool: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    urls, every = pool
    chosen = np.array([from_hex(every[n]) for n in (9, 2, 9, 9)], U)
    np.save(tmp_path / "theirs.npy", chosen)
    with pytest.warns(UserWarning, match=r"theirs\.npy is not sorted"):
        stage = d2filter.keep(tmp_path / "theirs.npy")
    got = [keep.uid_of(sample) for sample in stream(urls, stage)]
    assert got == [every[2], every[9], every[9], every[9]]


def test_a_run_directory_gives_the_expected_number_of_samples(tmp_path: Path) -> None:
    rows = [(f"s3://b/{n % 2}.tar", Sample(f"{n}", n, True)) for n in range(7)]
    kept_pools.write_run(tmp_path / "o", rows, ["s3://b/none.tar"])
    stage = d2filter.keep(tmp_path / "o")
    told = {"0.tar": 4, "pipe:aws s3 cp s3://b/1.tar -": 3, "/mnt/none.tar": 0}
    assert stage.expected(told) == told
    assert stage.expected(iter(told)) == told
    assert stage.expected("x/{0..1}.tar::y/none.tar") == dict(
        zip(["x/0.tar", "x/1.tar", "y/none.tar"], (4, 3, 0), strict=True)
    )
    assert pickle.loads(pickle.dumps(stage)).expected(told) == told
    with pytest.raises(InputError, match=r"shard x/2\.tar is not one of the shards that .* ranked"):
        stage.expected("x/{0..30000000}.tar")
    with pytest.raises(InputError, match="unbalanced braces"):
        stage.expected("x/{0..1.tar")
    with pytest.raises(RunStateError, match="OUT/kept"):
        d2filter.keep(np.array([(0, 1)], U)).expected("x/{0..1}.tar")


@given(kept_pools.random_pools(), st.booleans())
def test_exactly_the_ranked_and_kept_samples_come_out_as_many_as_expected(
    kept_pool: kept_pools.KeptPool, moved: bool
) -> None:
    """Copies, broken twins and samples that share a key stay in the shards."""
    with tempfile.TemporaryDirectory() as folder:
        out = kept_pool.write(Path(folder))
        home = Path(folder) / "s"
        if moved:
            home = home.rename(Path(folder) / "elsewhere")
        stage = d2filter.keep(out)
        assert len(stage) == len(kept_pool.kept)
        for name in kept_pool.shards:
            url = str(home / name)
            got = [
                (Path(s["__url__"]).name, s["__key__"], s["jpg"])
                for s in wds.WebDataset(url, shardshuffle=False, empty_check=False).compose(stage)
            ]
            assert got == kept_pool.expected([name])
            assert stage.expected(url) == {url: len(got)}
        urls = [str(home / name) for name in kept_pool.shards]
        both = wds.WebDataset(urls * 2, shardshuffle=False, empty_check=False).compose(stage)
        assert len(list(both)) == 2 * len(kept_pool.kept)  # the next epoch is the same


def test_uids_of_the_metadata_are_followed_by_shard_and_key(tmp_path: Path) -> None:
    """Metadata may have its own uids: then a sample without one in its json is known by its place.

    One that tells another uid is another sample.
    """
    samples = [Sample(f"{n}", n, n == 4) for n in range(6)]
    kept_pool = kept_pools.KeptPool({"0.tar": samples})
    kept_pool.write(tmp_path)
    rows = [(str(tmp_path / "s/0.tar"), Sample(f"{n}", 100 + n, True)) for n in (1, 3, 4)]
    kept_pools.write_run(tmp_path / "p", rows, [], embedded=False)
    stage = d2filter.keep(tmp_path / "p")
    urls = [str(tmp_path / "s/0.tar")]
    assert [s["__key__"] for s in stream(urls, stage)] == ["1", "3"]
    kept_pools.write_run(tmp_path / "q", rows, [], embedded=True)
    assert list(stream(urls, d2filter.keep(tmp_path / "q"))) == []


def test_mixed_samples_of_several_shards_are_filtered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few of them have their keys in memory."""
    rows = [(f"{n % 7}.tar", Sample(f"{n}", n, True)) for n in range(70)]
    kept_pools.write_run(tmp_path / "o", rows[::2], [f"{n}.tar" for n in range(7)])
    samples = [
        {"__url__": url, "__key__": m.key, "jpg": b"x", "txt": b"x", "json": m.files[2][1]}
        for url, m in rows
    ]
    for most in (1, 20, 250_000):
        monkeypatch.setattr(keep, "KEYS_HELD", most)
        stage = d2filter.keep(tmp_path / "o")
        assert list(stage(samples * 2)) == samples[::2] * 2
        assert len(stage._shards) == {1: 1, 20: 3, 250_000: 7}[most]


def test_a_shard_that_was_not_ranked_keeps_nothing_and_warns_once(tmp_path: Path) -> None:
    kept_pool = kept_pools.KeptPool({"0.tar": [Sample("a", 1, True)]}, [("0.tar", 0)])
    out = kept_pool.write(tmp_path)
    for name in ("1.tar", "2.tar"):
        shutil.copy(tmp_path / "s/0.tar", tmp_path / name)
    stage = d2filter.keep(out)
    urls = [str(tmp_path / name) for name in ("1.tar", "s/0.tar", "2.tar")]
    with pytest.warns(UserWarning, match=r"1\.tar is not one of the shards") as warned:
        assert [s["__url__"] for s in stream(urls, stage)] == [urls[1]]
    assert len([w for w in warned if "not one of the shards" in str(w.message)]) == 1
    by_uid = d2filter.keep(out / "subset.npy")  # as the message says
    assert len(list(stream(urls, by_uid))) == 3


def test_samples_without_a_url_go_by_uid(tmp_path: Path) -> None:
    kept_pool = kept_pools.KeptPool(
        {"0.tar": [Sample("a", 1, True), Sample("b", 2, True)]}, [("0.tar", 0)]
    )
    stage = d2filter.keep(kept_pool.write(tmp_path))
    samples = [
        {"__key__": s.key, "jpg": s.content, "txt": b"x", "json": s.files[2][1]}
        for s in kept_pool.shards["0.tar"]
    ]
    with pytest.warns(UserWarning, match="no __url__"):
        assert [s["__key__"] for s in stage(samples)] == ["a"]


def test_samples_of_which_the_run_knows_no_shard_or_key_go_by_uid(tmp_path: Path) -> None:
    samples = [Sample(f"{n}", n, True) for n in range(5)]
    kept_pool = kept_pools.KeptPool({"0.tar": samples}, [("0.tar", n) for n in (0, 1, 2)])
    out = kept_pool.write(tmp_path)
    table = pq.read_table(out / "kept/part-00000.parquet")
    keyless = pa.array([None, *table.column("key").to_pylist()[1:]], pa.string())
    shorter = table.set_column(1, "key", keyless).slice(0, 2)
    pq.write_table(shorter, out / "kept/part-00000.parquet")
    got = [s["__key__"] for s in stream([str(tmp_path / "s/0.tar")], d2filter.keep(out))]
    assert got == ["0", "1", "2"]


def test_lists_of_another_subset_are_refused(tmp_path: Path) -> None:
    kept_pool = kept_pools.KeptPool(
        {"0.tar": [Sample("a", 1, True), Sample("b", 2, True)]}, [("0.tar", 0)]
    )
    out = kept_pool.write(tmp_path)
    np.save(out / "subset.npy", np.array([(0, 2)], U))
    with pytest.raises(InputError, match="list different samples"):
        d2filter.keep(out)


def test_shards_with_equal_names_are_distinguished_by_their_folders(tmp_path: Path) -> None:
    rows = [(f"s3://pool/{x}/0.tar", Sample("k", n, True)) for n, x in enumerate("ab")]
    kept_pools.write_run(tmp_path / "o", rows, [])
    stage = d2filter.keep(tmp_path / "o")
    meta = [b'{"uid": "%032x"}' % n for n in range(2)]
    parts = {"__key__": "k", "jpg": b"x", "txt": b"x"}
    samples = [{**parts, "__url__": f"/mnt/{x}/0.tar", "json": m} for x in "ab" for m in meta]
    assert list(stage(samples)) == [samples[0], samples[3]]
    with pytest.raises(InputError, match=r"0\.tar may be the shard s3://pool/a/0\.tar or s3"):
        stage.expected("/mnt/0.tar")


MEMBERS = st.binary(max_size=40) | st.sampled_from(
    [b"{}", b"[" * 100_000, b"[1]", b'{"uid": 3}', b'{"uid": "\\ud800", "caption": "\\ud800"}',
     b'{"caption": ["a"]}', b'{"caption": "a"}', b'{"uid": "%032x"}' % 1, b"\xff\xfe\x00", b""]
)  # fmt: skip
DECODED = st.sampled_from([[1], "text", {"caption": "a"}, {"uid": f"{1:032x}"}, 3.5])


@given(
    st.dictionaries(
        st.sampled_from(["jpg", "png", "gif", "txt", "json", "cls", "__url__"]),
        MEMBERS | DECODED,
    )
    | st.dictionaries(st.sampled_from(["jpg", "webp", "txt", "json", "npy"]), MEMBERS),
    st.sampled_from(["k", "._k", "d/._k", "k\udce9", "", None, 3]),
)
def test_no_sample_ends_the_training_but_one_that_is_decoded(sample: Any, key: Any) -> None:
    """Kept is what `embed` would have ranked under a uid of the subset; nothing else, in peace."""
    sample = {"__key__": key, **sample}
    mine = np.array([(0, 1)], U)
    files = [(f"k.{ext}", value) for ext, value in sample.items() if not ext.startswith("__")]
    got = []
    if any(not isinstance(value, bytes) for _, value in files):
        with contextlib.suppress(InputError):
            got = list(d2filter.keep(mine)([sample]))
    else:
        got = list(d2filter.keep(mine)([sample]))
        with tempfile.TemporaryDirectory() as folder:
            shard_files.write(Path(folder) / "0.tar", files)
            (shard,) = webdataset.list_shards([folder])
            read = [s.uid for s in webdataset.read_samples(shard) if not s.reason]
        assert len(got) == read.count(f"{1:032x}")


@pytest.mark.parametrize(
    "sample",
    [{"json": b"{}"}, {"json": b"broken", "txt": b"x"}, {"gif": b"x", "txt": b"x"}, {"jpg": b"x"}],
)
def test_samples_that_no_run_can_rank_are_dropped(sample: Any) -> None:
    stage = d2filter.keep(np.array([(0, 1)], U))
    assert list(stage([{"__key__": "k", **sample}])) == []


@pytest.mark.parametrize(
    "sample",
    [
        {"jpg": np.zeros(3), "txt": "decoded"},
        {"jpg": b"x", "txt": np.zeros(3), "json": b"{}"},
        {"jpg": np.zeros(3), "json": {"caption": "decoded"}},
    ],
)
def test_samples_that_are_decoded_say_where_the_stage_belongs(sample: Any) -> None:
    stage = d2filter.keep(np.array([(0, 1)], U))
    with pytest.raises(InputError, match=r"'k' has no uid .* put keep\(\) before decode\(\)"):
        list(stage([{"__key__": "k", **sample}]))
    told = {**sample, "json": {"uid": f"{1:032x}", "caption": "x"}}
    assert list(stage([told])) == [told]  # its uid is there


@given(
    st.recursive(
        st.none() | st.text('"uid:{} ,\\0a', max_size=40) | st.just("0a" * 16),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["uid", '"uid"', "x", "{"]), inner, max_size=3)
        ),
    ),
    st.sampled_from([None, 1]),
)
def test_the_uid_of_any_json_is_that_of_its_top(meta: Any, indent: int | None) -> None:
    content = json.dumps(meta, indent=indent).encode()
    sample = {"json": content, "jpg": b"a picture", "txt": b"a caption"}
    if not isinstance(meta, dict):  # what `embed` calls a broken json
        assert keep.uid_of(sample) is None
        assert list(d2filter.keep(np.zeros(1, U))([sample])) == []
        return
    told = meta.get("uid")
    expected = told if told == "0a" * 16 else uid.content_uid(b"a picture", "a caption")
    assert keep.uid_of(sample) == expected
    mine = np.array([uid.from_hex(expected)], U)
    assert list(d2filter.keep(mine)([sample])) == [sample]
    others = np.array([uid.from_hex(u) for u in ("0a" * 16, "0b" * 16) if u != expected], U)
    assert list(d2filter.keep(others)([sample])) == []


@pytest.mark.parametrize(
    "told",
    ["0A" * 16, "0a0a0a0a-0a0a-0a0a-0a0a-0a0a0a0a0a0a", "0A0a0a0a-0a0a-0a0a-0a0a-0a0a0a0a0a0A"],
)
@pytest.mark.parametrize("by_uid", [True, False])
def test_all_spellings_of_a_uid_are_equal(told: str, by_uid: bool, tmp_path: Path) -> None:
    number = int("0a" * 16, 16)
    kept_pools.write_run(tmp_path / "o", [("0.tar", Sample("k", number, True))], [])
    stage = d2filter.keep(tmp_path / ("o/subset.npy" if by_uid else "o"))
    meta = json.dumps({"uid": told}).encode()
    sample = {"__url__": "0.tar", "__key__": "k", "json": meta, "jpg": b"x", "txt": b"x"}
    assert list(stage([sample])) == [sample]


@pytest.mark.parametrize("told", ["0a" * 15, "0a" * 17, "0a" * 15 + "0g", "é" * 16])
def test_malformed_uids_are_replaced_by_a_hash_of_the_content(told: str) -> None:
    content = json.dumps({"uid": told}, ensure_ascii=False).encode()
    sample = {"json": content, "jpg": b"a picture", "txt": b"a caption"}
    expected = uid.content_uid(b"a picture", "a caption")
    assert keep.uid_of(sample) == expected
    mine = np.array([uid.from_hex(expected)], U)
    assert list(d2filter.keep(mine)([sample])) == [sample]


def test_files_that_are_not_a_subset_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"a\.npy has dtype float64 and shape \(3, 2\)"):
        d2filter.load_subset(tmp_path / "a.npy")
    with pytest.raises(InputError, match=r"a subset has dtype float64 and shape \(3, 2\)"):
        d2filter.load_subset(np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"none\.npy does not exist"):
        d2filter.load_subset(tmp_path / "none.npy")


HALVES = st.integers(0, 2**64 - 1) | st.integers(0, 3)


@given(st.lists(st.tuples(HALVES, HALVES)), st.sampled_from([1, 3, 256]))
def test_occurrences_are_those_of_a_list(held: list[tuple[int, int]], rows: int) -> None:
    pairs = np.array(sorted(held), np.uint64).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(uids, "BUCKET_ROWS", rows)
        starts, shift = uids.buckets(pairs)
    for hi, lo in [*held, (0, 0), (2, 2), (3, 2**64 - 1), (2**64 - 1, 2**64 - 1)]:
        digits = f"{hi:016x}{lo:016x}".encode()
        assert uids.occurrences(pairs, starts, shift, digits) == held.count((hi, lo))
        for other in (digits[1:], digits + b"0", digits[:-1] + b"g", digits[:-1] + b"/", b""):
            assert uids.occurrences(pairs, starts, shift, other) == -1


def test_the_examples_in_the_docstrings_work() -> None:
    result = doctest.testmod(keep)
    assert result.failed == 0
    assert result.attempted >= 6


def test_of_two_samples_of_one_key_each_comes_as_often_as_its_uid_is_kept() -> None:
    one, two = ("1" * 32).encode(), ("2" * 32).encode()
    whole = {"jpg": b"a picture", "txt": b"a caption"}
    for own, times in ((one, 2), (two, 1)):
        sample = {"json": b'{"uid": "%s"}' % own, **whole}
        assert keep._times(sample, one + two + one) == times
        assert keep._times(sample, own * 3) == 3
        assert keep._times(sample, own) == 1
