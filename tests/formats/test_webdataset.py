from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import shards as made
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from d2filter.errors import InputError, UsageError
from d2filter.formats import uid, webdataset
from d2filter.formats.paths import Folder


def read(path: Path) -> list[webdataset.Sample]:
    (shard,) = webdataset.list_shards([str(path)])
    return list(webdataset.read_samples(shard))


@given(st.text("ab./", min_size=1, max_size=12).filter(lambda s: not s.endswith("/")))
def test_keys_are_cut_as_webdataset_cuts_them(name: str) -> None:
    key, extension = webdataset.split_name(name)
    theirs = wds.tariterators.base_plus_ext(name)
    if theirs[0]:
        assert (key, extension) == (theirs[0], theirs[1].lower())


def test_clean_samples_are_read_whole(tmp_path: Path) -> None:
    told = "0123456789abcdef0123456789abcdef"
    files = made.members("a", 1, uid=told) + made.members("dir/b", 2, uid="NOT A UID")
    first, second = read(made.write(tmp_path / "0.tar", files))
    assert (first.key, first.uid, first.reason) == ("a", told, "")
    assert first.image == made.picture(1)
    assert first.caption == made.caption(1)
    assert second.key == "dir/b"
    assert second.uid == uid.content_uid(made.picture(2), made.caption(2))


def test_members_of_a_key_may_lie_apart(tmp_path: Path) -> None:
    a, b = made.members("a", 1), made.members("b", 2)
    files = [a[0], b[0], b[1], a[2], a[1], b[2]]
    got = read(made.write(tmp_path / "0.tar", files))
    assert [(s.key, s.caption) for s in got] == [("a", made.caption(1)), ("b", made.caption(2))]


def test_a_key_that_comes_again_is_another_sample(tmp_path: Path) -> None:
    files = made.members("a", 1) + made.members("a", 2)
    got = read(made.write(tmp_path / "0.tar", files))
    assert [s.caption for s in got] == [made.caption(1), made.caption(2)]


def test_unusable_samples_carry_their_reason(tmp_path: Path) -> None:
    jpg = made.picture(1)
    files = [
        ("a.txt", b"no picture"),
        ("b.jpg", jpg),
        ("c.jpg", jpg), ("c.txt", b" \n"),
        ("d.jpg", jpg), ("d.json", b"{"),
        ("e.jpg", jpg), ("e.json", b"[]"),
        ("f.jpg", jpg), ("f.txt", b"\xff\xfe\x00"),
        ("g.jpg", b""), ("g.txt", b"x"),
        ("h.jpg", jpg), ("h.json", json.dumps({"caption": 7}).encode()),
        ("i", b"?"),
        ("j.jpg", jpg), ("j.json", json.dumps({"caption": "from json"}).encode()),
        ("k.JPG", jpg), ("k.txt", "héllo 🐸".encode()),
    ]  # fmt: skip
    got = {s.key: s for s in read(made.write(tmp_path / "0.tar", files))}
    assert {key: s.reason for key, s in got.items() if s.reason} == {
        "a": "no image", "b": "no caption", "c": "empty caption", "d": "broken json",
        "e": "broken json", "f": "caption is no UTF-8", "g": "empty image", "h": "no caption",
        "i": "no image",
    }  # fmt: skip
    assert got["j"].caption == "from json"
    assert got["k"].caption == "héllo 🐸"


@pytest.mark.parametrize("cut", [0.1, 0.3, 0.5, 0.7])
def test_a_truncated_shard_gives_what_came_before(tmp_path: Path, cut: float) -> None:
    files = [f for i in range(8) for f in made.members(f"{i}", i)]
    path = made.write(tmp_path / "0.tar", files)
    whole = read(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    (shard,) = webdataset.list_shards([str(path)])
    got = []
    with pytest.raises(webdataset.LostTail):  # noqa: PT012  # what came before is the point
        for sample in webdataset.read_samples(shard):
            got.append(sample)
    complete = [s for s in got if not s.reason]
    assert complete
    assert [(s.key, s.image) for s in complete] == [(s.key, s.image) for s in whole][
        : len(complete)
    ]
    assert len(got) - len(complete) <= 1


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"not a tar" * 200, "header"), (b"\0" * 100, "header")],
)
def test_what_is_no_tar_is_lost_whole(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    with pytest.raises(webdataset.LostTail) as caught:
        read(path)
    assert said in str(caught.value) or "cut off" in str(caught.value)


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    path = made.write(tmp_path / "0.tar", made.members("a", 1) + made.members("b", 2))
    content = bytearray(path.read_bytes())
    at = content.rindex(b"b.jpg")
    content[at : at + 200] = b"\xaa" * 200
    path.write_bytes(content)
    with pytest.raises(webdataset.LostTail, match="damaged header at byte"):
        read(path)


def test_text_that_utf8_cannot_hold_is_bad_or_spelled_out(tmp_path: Path) -> None:
    jpg = made.picture(1)
    files = [
        ("q\udcff.jpg", jpg), ("q\udcff.txt", b"fine"),
        ("r.jpg", jpg), ("r.json", b'{"caption": "\\ud800 x"}'),
        ("s\udcff.txt", b"no picture"),
    ]  # fmt: skip
    got = read(made.write(tmp_path / "0.tar", files))
    assert [(s.key, s.reason) for s in got] == [
        ("q\\udcff", ""), ("r", "caption is no UTF-8"), ("s\\udcff", "no image"),
    ]  # fmt: skip
    for sample in got:
        (sample.key + sample.message).encode()


@pytest.mark.parametrize("record", ["size=99999999999999999999", "GNU.sparse.map=1,2,x"])
def test_hostile_headers_lose_the_tail_only(tmp_path: Path, record: str) -> None:
    line = f" {record}\n"
    header = f"{len(line) + 2}{line}".encode()
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for i, name in enumerate(["a.txt", "b.txt"]):
            info = tarfile.TarInfo(name)
            info.size = 1
            if i == 1:
                extended = tarfile.TarInfo("pax")
                extended.type, extended.size = tarfile.XHDTYPE, len(header)
                archive.addfile(extended, io.BytesIO(header))
            archive.addfile(info, io.BytesIO(b"x"))
    got = []
    with pytest.raises(webdataset.LostTail):  # noqa: PT012  # what came before is the point
        for sample in webdataset.read_samples(webdataset.list_shards([str(path)])[0]):
            got.append(sample.key)
    assert got == ["a"]


def test_names_with_brackets_are_taken_literally_where_they_exist(tmp_path: Path) -> None:
    for folder in ("my [sh] 1", "plain {x}"):
        made.write(tmp_path / folder / "0.tar", [])
        assert len(webdataset.list_shards([str(tmp_path / folder)])) == 1
        assert len(webdataset.list_shards([str(tmp_path / folder / "0.tar")])) == 1


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(30):
        made.write(tmp_path / f"{i:02d}.tar", [])
    listed = []
    plain = Folder.files

    def counting(self: Folder, suffix: str = "") -> list:
        listed.append(self.url)
        return plain(self, suffix)

    monkeypatch.setattr(Folder, "files", counting)
    found = webdataset.list_shards([f"{tmp_path}/{{00..19}}.tar", f"{tmp_path}/2*.tar"])
    assert len(found) == 30
    assert listed == [str(tmp_path)]


def test_patterns(tmp_path: Path) -> None:
    for name in ("00", "01", "02", "10"):
        made.write(tmp_path / f"{name}.tar", [])
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
    with pytest.raises(UsageError, match="unbalanced braces"):
        names("{00..02.tar")


def test_shards_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        made.write(tmp_path / folder / "0.tar", [])
    got = webdataset.list_shards([str(tmp_path / "x"), str(tmp_path / "y")])
    assert len({s.name for s in got}) == 2
