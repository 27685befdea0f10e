"""The list of shards from folders, patterns and addresses, and their unique names."""

from __future__ import annotations

import itertools
import os
import time
import tracemalloc
from pathlib import Path

import braceexpand
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import shard_files

from d2filter.errors import InputError, UsageError
from d2filter.formats import braces, shardlist, webdataset
from d2filter.formats.paths import Folder


def test_a_shard_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    shard_files.write(tmp_path / os.fsdecode(b"\xff.tar"), [])
    with pytest.raises(InputError, match=r"dcff\.tar has a name that is not UTF-8"):
        webdataset.list_shards([str(tmp_path)])


def test_names_with_brackets_are_literal_if_they_exist(tmp_path: Path) -> None:
    for folder in ("my [sh] 1", "plain {x}"):
        shard_files.write(tmp_path / folder / "0.tar", [])
        assert len(webdataset.list_shards([str(tmp_path / folder)])) == 1
        assert len(webdataset.list_shards([str(tmp_path / folder / "0.tar")])) == 1


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(30):
        shard_files.write(tmp_path / f"{i:02d}.tar", [])
    listed = []
    plain = Folder.files

    def counting(self: Folder, suffix: str = "") -> list:
        listed.append(self.url)
        return plain(self, suffix)

    monkeypatch.setattr(Folder, "files", counting)
    found = webdataset.list_shards([f"{tmp_path}/{{00..19}}.tar", f"{tmp_path}/2*.tar"])
    assert len(found) == 30
    assert listed == [str(tmp_path)]


def test_patterns_list_the_matching_files(tmp_path: Path) -> None:
    for name in ("00", "01", "02", "10"):
        shard_files.write(tmp_path / f"{name}.tar", [])
    (tmp_path / "01_stats.json").write_text("{}")

    def names(*patterns: str) -> list[str]:
        return [s.name for s in webdataset.list_shards([f"{tmp_path}/{p}" for p in patterns])]

    assert names("") == ["00", "01", "02", "10"]
    assert names("{00..02}.tar") == ["00", "01", "02"]
    assert names("0*.tar") == ["00", "01", "02"]
    assert names("10.tar", "00.tar", "10.tar") == ["00", "10"]
    with pytest.raises(InputError, match=r"03\.tar does not exist"):
        names("{02..03}.tar")
    with pytest.raises(UsageError, match="no shards match"):
        names("9*.tar")
    with pytest.raises(UsageError, match="braces are unbalanced"):
        names("{00..02.tar")


def test_shards_of_one_name_in_two_folders_are_distinguished(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        shard_files.write(tmp_path / folder / "0.tar", [])
    got = webdataset.list_shards([str(tmp_path / "x"), str(tmp_path / "y")])
    assert len({s.name for s in got}) == 2


def empty(path: Path) -> str:
    return str(shard_files.write(path, []))


def test_no_two_shards_of_a_run_have_one_name() -> None:
    """Neither to file systems that ignore case or compose accents."""
    twice = ["/a/0.tar", "/b/0.tar"]
    marked = shardlist.unique_names(twice)
    assert [len(name) for name in marked] == [2 + 32] * 2  # 128 bits
    cases = [
        twice,
        # a third is called like the mark of the first
        [*twice, f"/c/{marked[0]}.tar"],
        [*twice, f"/c/{marked[0].upper()}.tar", f"/d/{marked[1]}.TAR"],
        ["/a/x.tar", "/a/X.tar", "/b/x.TAR"],
        ["/a/\u00e9.tar", "/a/e\u0301.tar", "/a/E\u0301.tar", "/a/straße.tar", "/a/STRASSE.tar"],
        ["/a/.tar", "/a/.hidden.tar", "/a/tasks.tar", "/a/a b\n.tar"],
        [f"/a/{'x' * 228}{i}.tar" for i in range(3)] + [f"/a/{'雪' * 80}{i}.tar" for i in range(3)],
        ["/a/0.tar", "/a/0.tar.gz", "/a/0.tgz", "/a/0"],
        ["https://h/get?file=a/0.tar", "https://h/get?file=b/0.tar", "https://h/1.tar?sig=a/d"],
    ]
    for urls in cases:
        names = shardlist.unique_names(urls)
        assert len({shardlist._folded(name) for name in names}) == len(urls), urls
        assert all(0 < len(name.encode()) <= 96 and name[0] != "." for name in names)
        assert "tasks" not in names
        # the order of the others does not matter
        assert shardlist.unique_names(urls[::-1]) == names[::-1]
    assert shardlist.unique_names(cases[-1])[2] == "1"
    assert shardlist.unique_names(["/a/0.tar", "/a/0.tar.gz"]) == ["0", "0.tar.gz"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.text("aA0-.\u00e9", max_size=4)).map("/".join),
        unique=True,
        max_size=12,
    )
)
def test_names_are_unique_for_any_urls(urls: list[str]) -> None:
    names = shardlist.unique_names(urls)
    assert len({shardlist._folded(name) for name in names}) == len(urls)


def test_names_that_still_collide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collision of hashes, which nobody can make on purpose."""
    monkeypatch.setattr(shardlist, "marked_name", lambda base, url: f"{base}-0")
    with pytest.raises(InputError, match=r"shards /a/0\.tar and /b/0\.tar would get the same name"):
        shardlist.unique_names(["/a/0.tar", "/b/0.tar"])


def test_other_files_in_a_folder_of_shards_are_counted(tmp_path: Path) -> None:
    for name in ("00000.tar", "00001.tar.gz", "00002.TAR", "00003.tgz", "00004.tar.zst"):
        empty(tmp_path / name)
    for name in ("00000_stats.json", "00001_stats.json", "README", "a.with-a-long-ending", ".x"):
        (tmp_path / name).write_text("{}")
    for name in ("more", "even", ".hidden"):
        (tmp_path / name).mkdir()
    found = shardlist.find_shards([str(tmp_path)])
    assert [s.name for s in found.shards] == [
        "00000", "00001.tar.gz", "00002", "00003.tgz", "00004.tar.zst"
    ]  # fmt: skip
    assert [s.compressed for s in found.shards] == [False, True, False, True, True]
    assert found.left_out == {".json": 2, "folders": 2, "without a suffix": 2}
    assert shardlist.counted_by_kind(found.left_out) == "2 .json, 2 folders, 2 without a suffix"
    # the same folder twice, and its files by name, are counted once
    again = shardlist.find_shards([str(tmp_path), f"{tmp_path}/00000.tar", str(tmp_path)])
    assert again.left_out == found.left_out
    # a wildcard that matches more than shards
    found = shardlist.find_shards([f"{tmp_path}/0*"])
    assert len(found.shards) == 5
    assert found.left_out == {".json": 2}


def test_files_that_a_wildcard_names_need_no_suffix(tmp_path: Path) -> None:
    empty(tmp_path / "part-0")
    assert [s.name for s in webdataset.list_shards([f"{tmp_path}/part-*"])] == ["part-0"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("1.jpg", "1.txt"), r"holds no shards but pictures \(1 \.jpg, 1 \.txt\): `d2filter pack "),
        (("1.TIFF", "2.png"), "`d2filter pack .* --shards OUT` makes shards"),
        (("1.parquet", "1.npz"), r"holds no shards but metadata .*give it as --metadata-dir"),
        (("class/1.jpg",), r"holds no shards \(1 folders\).*`d2filter pack`"),
        (("notes.txt",), r"holds no shards \(1 \.txt\)"),
        ((), "no shards match"),
    ],
)
def test_a_folder_without_shards_is_refused_with_its_content(
    tmp_path: Path, names: tuple[str, ...], said: str
) -> None:
    (tmp_path / "s").mkdir()
    for name in names:
        (tmp_path / "s" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "s" / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=said):
        webdataset.list_shards([str(tmp_path / "s")])


def test_each_name_of_a_pattern_must_match(tmp_path: Path) -> None:
    empty(tmp_path / "a/0.tar")
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match=r"no shards match '.*/b'"):
        webdataset.list_shards([f"{tmp_path}/{{a,b}}"])
    with pytest.raises(UsageError, match=r"no shards match '.*/b/\*\.tar'"):
        webdataset.list_shards([f"{tmp_path}/{{a,b}}/*.tar"])


PIECES = ["{", "}", ",", "..", "a", "b", "0", "1", "-", "\\", "{0..3}", "{a..d}", "{09..11}"]
PIECES += ["{3..-1..2}", "{z..A..7}", "{a..a}", "{C..A}", "{b..Y}", "{-01..1}", "{5..1..0}"]


@given(st.lists(st.sampled_from(PIECES), max_size=5).map("".join))
def test_braces_are_those_of_braceexpand(pattern: str) -> None:
    try:
        expected = list(itertools.islice(braceexpand.braceexpand(pattern), 5000))
    except braceexpand.UnbalancedBracesError:
        with pytest.raises(ValueError, match="braces are unbalanced"):
            braces.expand(pattern)
        return
    assert list(itertools.islice(braces.expand(pattern), 5000)) == expected


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "pattern",
    ["{00000..30000000}.tar", "{0..1}{0000..999999999999999}.tar", "{00000..30000000}*.tar",
     "{00000..30000000}.tar::{00000..30000000}.tar", "{{00000..30000000},x}.tar"],
)  # fmt: skip
def test_the_first_missing_name_of_a_pattern_ends_it(tmp_path: Path, pattern: str) -> None:
    for i in range(3):
        empty(tmp_path / f"{i:05d}.tar")
        empty(tmp_path / f"0{i:04d}.tar")
    webdataset.list_shards([str(tmp_path)])  # what is imported once
    tracemalloc.start()
    begun = time.monotonic()
    with pytest.raises(
        (InputError, UsageError), match=r"0000[0-9]+.*does not exist|no shards match"
    ) as caught:
        webdataset.list_shards([f"{tmp_path}/{pattern}"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - begun < 5
    assert peak < 3_000_000


def test_braces_nested_too_deep_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nested too deep"):
        webdataset.list_shards([f"{tmp_path}/" + "{a," * 5000 + "}" * 5000])


def test_patterns_are_split_at_double_colons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As open_clip splits --train-data; the first part was made absolute with the whole."""
    for name in ("a/0.tar", "a/1.tar", "b/2.tar"):
        empty(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    got = webdataset.list_shards([f"{tmp_path}/a/{{0..1}}.tar::b/2.tar"])
    assert [s.url for s in got] == [f"{tmp_path}/{n}" for n in ("a/0.tar", "a/1.tar", "b/2.tar")]
    for pattern in (f"{tmp_path}/a/0.tar::", f"{tmp_path}/a/0.tar::::b/2.tar", "::b/2.tar"):
        with pytest.raises(UsageError, match="has an empty part beside '::'"):
            webdataset.list_shards([pattern])
    assert shardlist._parts("simplecache::s3://a/0.tar::s3://b/1.tar") == [
        "simplecache::s3://a/0.tar", "s3://b/1.tar"
    ]  # fmt: skip
    assert shardlist._parts("zip://0.tar::s3://a/0.zip") == ["zip://0.tar::s3://a/0.zip"]


def test_a_local_name_with_double_colons_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path = empty(tmp_path / "x::y/0.tar")
    for pattern in (path, str(tmp_path / "x::y"), f"{tmp_path}/x::y/{{0..0}}.tar"):
        try:
            (shard,) = webdataset.list_shards([pattern])
            assert list(webdataset.read_samples(shard)) == []
        except (UsageError, InputError) as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017  # either will do
