from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import shards as made
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from d2filter.errors import InputError, UsageError
from d2filter.formats import tarindex, uid, webdataset
from d2filter.formats.paths import Folder


def read(path: Path) -> list[webdataset.Sample]:
    (shard,) = webdataset.list_shards([str(path)])
    return list(webdataset.read_samples(shard))


@given(st.text("ab./", min_size=1, max_size=12).filter(lambda s: not s.endswith("/")))
def test_keys_are_cut_as_webdataset_cuts_them(name: str) -> None:
    key, extension = tarindex.split_name(name)
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


@pytest.mark.parametrize("cut", [0.2, 0.3, 0.5, 0.7])
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
    assert complete == whole[: len(complete)]
    assert [s.reason for s in got[len(complete) :]] in ([], ["cut off"])


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


@pytest.mark.parametrize(
    ("record", "keys"),
    [("size=99999999999999999999", ["a", "b"]), ("GNU.sparse.map=1,2,x", ["a"])],
)
def test_hostile_headers_lose_the_tail_only(tmp_path: Path, record: str, keys: list[str]) -> None:
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
    assert got == keys


def lost(path: Path) -> tuple[list[webdataset.Sample], str]:
    """The samples of a broken shard, and what is said of the rest."""
    got: list[webdataset.Sample] = []
    with pytest.raises(webdataset.LostTail) as caught:  # noqa: PT012  # what came before counts too
        for sample in webdataset.read_samples(webdataset.list_shards([str(path)])[0]):
            got.append(sample)
    return got, str(caught.value)


@pytest.mark.parametrize(
    ("compress", "said"),
    [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")],
)
def test_a_compressed_shard_is_named_so(
    tmp_path: Path, compress: Callable[[bytes], bytes], said: str
) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(compress(made.tar(made.members("a", 1))))
    assert lost(path) == ([], f"it is a {said} file: unpack it, shards are plain tar files")


def test_a_shard_without_members_has_no_samples(tmp_path: Path) -> None:
    assert read(made.write(tmp_path / "0.tar", [])) == []


def test_what_follows_the_end_mark_is_not_lost_silently(tmp_path: Path) -> None:
    """Two archives joined, and a header that a disk filled with zeros."""
    path = tmp_path / "0.tar"
    first, second = made.tar(made.members("a", 1)), made.tar(made.members("b", 2))
    path.write_bytes(first + second)
    got, said = lost(path)
    assert [s.key for s in got] == ["a"]
    assert "data behind the end-of-archive mark" in said
    whole = bytearray(made.tar(made.members("a", 1) + made.members("b", 2)))
    at = whole.index(b"b.txt")
    whole[at : at + 512] = bytes(512)
    path.write_bytes(whole)
    got, said = lost(path)
    assert [(s.key, s.reason) for s in got] == [("a", ""), ("b", "cut off")]
    assert "data behind the end-of-archive mark" in said


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 3, 4, 1, 5, 2]])
def test_a_sample_whose_json_was_cut_off_gets_no_other_uid(
    tmp_path: Path, order: list[int]
) -> None:
    """The json holds the uid: without it the sample would go by the id of its content."""
    told = "0123456789abcdef0123456789abcdef"
    files = made.members("a", 1, uid=told) + made.members("b", 2, uid=told[::-1])
    content = made.tar([files[i] for i in order])
    last = [files[i][0] for i in order][-1]
    path = tmp_path / "0.tar"
    path.write_bytes(content[: content.rindex(last.encode())])
    got, _ = lost(path)
    key = last[0]
    assert {s.key: s.reason for s in got} == {"a": "", "b": "", key: "cut off"}
    assert all(s.uid in (told, told[::-1], None) for s in got)


def test_members_beyond_the_limits_are_not_read(tmp_path: Path) -> None:
    """Files with holes: they claim gigabytes and take none."""
    path = tmp_path / "0.tar"
    jpg = made.picture(1)
    limits = webdataset.MAX_IMAGE_BYTES, webdataset.MAX_TEXT_BYTES, webdataset.MAX_JSON_BYTES
    with path.open("wb") as stream:
        for name, content in [
            ("a.jpg", limits[0] + 1), ("a.txt", b"x"),
            ("b.jpg", jpg), ("b.txt", limits[1] + 1),
            ("c.jpg", jpg), ("c.txt", b"x"), ("c.json", limits[2] + 1),
            ("d.jpg", jpg), ("d.txt", b"x"), ("d.npy", 1 << 33),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = content if isinstance(content, int) else len(content)
            stream.write(info.tobuf(tarfile.GNU_FORMAT))
            if isinstance(content, bytes):
                stream.write(content)
                content = len(content)
                stream.seek(-content, 1)
            stream.seek(-(-content // 512) * 512, 1)
        stream.truncate(stream.tell() + 1024)
    tracemalloc.start()
    got = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    too_large = "member too large"
    assert [(s.key, s.reason) for s in got] == [
        ("a", too_large), ("b", too_large), ("c", too_large), ("d", ""),
    ]  # fmt: skip
    assert got[0].message == f"jpg has {limits[0] + 1} bytes, at most {limits[0]} are read"


def test_links_and_devices_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    jpg = made.picture(1)
    with tarfile.open(path, "w") as stream:
        for name, kind, content in [
            ("a.jpg", tarfile.SYMTYPE, b""), ("a.txt", tarfile.REGTYPE, b"x"),
            ("b.jpg", tarfile.LNKTYPE, b""), ("b.txt", tarfile.REGTYPE, b"x"),
            ("c.jpg", tarfile.REGTYPE, jpg), ("c.txt", tarfile.CHRTYPE, b""),
            ("d.jpg", tarfile.REGTYPE, jpg), ("d.txt", tarfile.REGTYPE, b"x"),
            ("d.json", tarfile.FIFOTYPE, b""),
            ("e.jpg", tarfile.REGTYPE, jpg), ("e.txt", tarfile.REGTYPE, b"x"),
            ("e.png", tarfile.SYMTYPE, b""),
            ("folder", tarfile.DIRTYPE, b""), ("README", tarfile.SYMTYPE, b""),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", len(content)
            stream.addfile(info, io.BytesIO(content))
    odd = "no plain file"
    assert [(s.key, s.reason, s.message) for s in read(path)] == [
        ("a", odd, "jpg is a link"), ("b", odd, "jpg is a link"),
        ("c", odd, "txt is a device or pipe"), ("d", odd, "json is a device or pipe"),
        ("e", "", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("last", ["folder", "a.jpg", "link"])
def test_a_shard_that_ends_in_what_is_no_sample_is_whole(tmp_path: Path, last: str) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as stream:
        for name, content in made.members("a", 1):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            stream.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo(last)
        info.type = tarfile.SYMTYPE if last == "link" else tarfile.DIRTYPE
        stream.addfile(info)
    assert [(s.key, s.reason) for s in read(path)] == [("a", "")]


def test_a_sparse_member_is_not_taken_for_its_content(tmp_path: Path) -> None:
    records = {"GNU.sparse.map": "0,1,9,1", "GNU.sparse.size": "100"}
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as stream:
        for name, headers in (("a.jpg", records), ("a.txt", {}), ("b.jpg", {}), ("b.txt", {})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 2, headers
            stream.addfile(info, io.BytesIO(b"xy"))
    got = [(s.key, s.reason, s.message) for s in read(path)]
    assert got == [("a", "no plain file", "jpg is a sparse file"), ("b", "", "")]


def test_names_that_lead_elsewhere_are_only_names(tmp_path: Path) -> None:
    keys = ["../../up", "/etc/absolute", "x" * 300, "deep/" * 30_000 + "down", "a\nb", "~"]
    files = [
        (f"{key}{suffix}", content)
        for i, key in enumerate(keys)
        for suffix, content in ((".jpg", made.picture(i)), (".txt", b"x"))
    ]
    path = made.write(tmp_path / "inside/deeper/0.tar", files)
    before = sorted(tmp_path.rglob("*"))
    expected = [tarindex.split_name(f"{key}.jpg")[0] for key in keys]
    assert [(s.key, s.reason) for s in read(path)] == [(key, "") for key in expected]
    assert expected[:4] == keys[:4]
    assert sorted(tmp_path.rglob("*")) == before


def header(kind: bytes, size: int, name: str = "a.jpg") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(kind: bytes, **records: str) -> bytes:
    content = b""
    for name, value in records.items():
        line = f" {name}={value}\n".encode()
        length = len(line) + len(str(len(line)))
        content += str(length + (len(str(length)) > len(str(len(line))))).encode() + line
    return header(kind, len(content)) + content + b"\0" * (-len(content) % 512)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (header(tarfile.GNUTYPE_LONGNAME, 1 << 40), "header of more than 1048576 bytes"),
        (header(tarfile.XHDTYPE, 1 << 33), "header of more than 1048576 bytes"),
        (header(tarfile.GNUTYPE_LONGNAME, -512), "header of more than 1048576 bytes"),
        (header(tarfile.REGTYPE, -1024), "points backwards"),
        (header(tarfile.REGTYPE, -512), "points backwards"),
        (header(tarfile.GNUTYPE_LONGNAME, 0) * 3000, "recursion"),
        (pax(tarfile.XHDTYPE, size="-1024"), ""),
        (pax(tarfile.XHDTYPE, comment="9" * 300_000), "number of more than 256 digits"),
        (pax(tarfile.XGLTYPE, path="x.jpg"), "a global header"),
        (pax(tarfile.XGLTYPE, **{f"k{i}": "" for i in range(200)}), "a global header"),
    ],
)
def test_headers_that_loop_or_swell_lose_the_tail(
    tmp_path: Path, hostile: bytes, said: str
) -> None:
    path = tmp_path / "0.tar"
    content = made.tar(made.members("a", 1))
    after = content.rstrip(b"\0")
    after += b"\0" * (-len(after) % 512)
    path.write_bytes(after + hostile + content)
    tracemalloc.start()
    got, message = lost(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (got[0].key, got[0].reason) == ("a", "")
    assert said in message
    assert peak < 20_000_000


def test_a_shard_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    made.write(tmp_path / os.fsdecode(b"\xff.tar"), [])
    with pytest.raises(InputError, match=r"dcff\.tar has a name that is no UTF-8"):
        webdataset.list_shards([str(tmp_path)])


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
