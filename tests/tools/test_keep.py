"""Samples of a subset, streamed from the original shards."""

from __future__ import annotations

import doctest
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shards as made
import torch
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

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
            files += made.members(f"{number}{i:03d}", 20 * number + i, **told)
        made.write(folder / f"{number:08d}.tar", files)
    urls = sorted(str(p) for p in folder.glob("*.tar"))
    found = [
        s.uid for shard in webdataset.list_shards(urls) for s in webdataset.read_samples(shard)
    ]
    return urls, [told for told in found if told is not None]


def stream(urls: list[str], stage: Any) -> Any:
    return wds.WebDataset(urls, shardshuffle=False).compose(stage)


def test_what_comes_out_is_the_subset_in_the_order_of_the_shards(
    pool: tuple[list[str], list[str]],
) -> None:
    urls, every = pool
    chosen = every[3:30:4]
    subset = np.sort(np.array([from_hex(u) for u in chosen], U))
    stage = d2filter.keep(subset)
    got = list(stream(urls, stage))
    assert [keep.uid_of(sample) for sample in got] == chosen
    assert len(stage) == len(chosen)
    assert got[0]["jpg"] == made.picture(3)
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


def test_a_run_directory_tells_how_many_to_expect(tmp_path: Path) -> None:
    np.save(tmp_path / "subset.npy", np.array([(0, 1)], U))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/sizes.json").write_text(json.dumps({"0.tar": 7, "s3://b/1.tar": 2}))
    stage = d2filter.keep(tmp_path)
    urls = ["/data/0.tar", "s3://b/1.tar", "/data/2.tar"]
    assert stage.expected(urls) == dict(zip(urls, (7, 2, 0), strict=True))
    with pytest.raises(RunStateError, match=r"OUT/kept/sizes\.json"):
        d2filter.keep(np.array([(0, 1)], U)).expected(urls)


@pytest.mark.parametrize(
    "sample",
    [{"json": b"{}"}, {"json": b"broken", "txt": b"x"}, {"jpg": np.zeros(3), "txt": "decoded"}],
)
def test_samples_that_cannot_be_told_apart_say_where_the_stage_belongs(sample: Any) -> None:
    stage = d2filter.keep(np.array([(0, 1)], U))
    with pytest.raises(InputError, match=r"'k' has no uid .* put keep\(\) before decode\(\)"):
        list(stage([{"__key__": "k", **sample}]))


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
    told = meta.get("uid") if isinstance(meta, dict) else None
    expected = told if told == "0a" * 16 else uid.content_uid(b"a picture", "a caption")
    assert keep.uid_of(sample) == expected
    mine = np.array([uid.from_hex(expected)], U)
    assert list(d2filter.keep(mine)([sample])) == [sample]
    others = np.array([uid.from_hex(u) for u in ("0a" * 16, "0b" * 16) if u != expected], U)
    assert list(d2filter.keep(others)([sample])) == []


@pytest.mark.parametrize("told", ["0A" * 16, "0a" * 15, "0a" * 17, "0a" * 15 + "0g", "é" * 16])
def test_what_is_no_uid_is_not_taken_for_one(told: str) -> None:
    content = json.dumps({"uid": told}, ensure_ascii=False).encode()
    sample = {"json": content, "jpg": b"a picture", "txt": b"a caption"}
    assert keep.uid_of(sample) == uid.content_uid(b"a picture", "a caption")
    mine = np.array([uid.from_hex(keep.uid_of(sample))], U)
    assert list(d2filter.keep(mine)([sample])) == [sample]


def test_what_is_no_subset(tmp_path: Path) -> None:
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
        patched.setattr(uids, "_BUCKET_ROWS", rows)
        starts, shift = uids.buckets(pairs)
    for hi, lo in [*held, (0, 0), (2, 2), (3, 2**64 - 1), (2**64 - 1, 2**64 - 1)]:
        digits = f"{hi:016x}{lo:016x}".encode()
        assert uids.occurrences(pairs, starts, shift, digits) == held.count((hi, lo))
        for other in (digits[1:], digits + b"0", digits[:-1] + b"g", digits[:-1] + b"/", b""):
            assert uids.occurrences(pairs, starts, shift, other) == -1


def test_the_examples_in_the_docstrings() -> None:
    result = doctest.testmod(keep)
    assert result.failed == 0
    assert result.attempted >= 6
