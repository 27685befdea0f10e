"""Samples read from tar shards, whole, damaged and unusual ones."""

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
from uuid import UUID

import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import shard_files

from d2filter.errors import InputError
from d2filter.formats import tarindex, uid, webdataset


def read(path: Path) -> list[webdataset.Sample]:
    (shard,) = webdataset.list_shards([str(path)])
    return list(webdataset.read_samples(shard))


@given(st.text("ab./", min_size=1, max_size=12).filter(lambda s: not s.endswith("/")))
def test_keys_are_cut_as_webdataset_cuts_them(name: str) -> None:
    key, extension = tarindex.split_name(name)
    theirs = wds.tariterators.base_plus_ext(name)
    if theirs[0]:
        assert (key, extension) == (theirs[0], theirs[1].lower())
    else:
        assert key == ""


FOLDERS = st.sampled_from(["", "./", "d/", "a.b/", "a.b/c/", "__MACOSX/", "__meta__/", "/", "../"])
BASES = st.sampled_from(
    [
        *("1.jpg", "1.txt", "1.json", "2.JPG", "2.b.jpg", "._1.jpg", "._1.txt", "._2.b.jpg"),
        *(
            "README",
            "README.md",
            ".DS_Store",
            ".jpg",
            ".txt",
            "_",
            "__x__",
            "__x__.jpg",
            "Thumbs.db",
        ),
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(FOLDERS, BASES).map("".join), max_size=12, unique_by=str.lower))
def test_samples_are_those_of_webdataset(tmp_path: Path, names: list[str]) -> None:
    """Whatever webdataset leaves out is no sample here, neither good nor bad; and of what a Mac
    hides in folders, which webdataset takes for samples without picture and caption, nothing.
    """
    path = shard_files.write(tmp_path / "0.tar", [(name, b"x") for name in names])
    with path.open("rb") as stream:
        files = wds.tariterators.tar_file_expander([{"url": "0.tar", "stream": stream}])
        theirs = list(wds.tariterators.group_by_keys(files))
    usual = set(webdataset.IMAGE_SUFFIXES) | {"txt", "json"}
    expected = {
        sample["__key__"]
        for sample in theirs
        if not sample["__key__"].endswith("/") or usual & sample.keys()
    }
    with path.open("rb") as stream:
        keys, broken = tarindex.read(stream, webdataset.IMAGE_SUFFIXES)
    assert not broken
    assert {key.name for key in keys} == expected


def test_a_tar_made_on_a_mac_has_the_samples_of_its_pictures(tmp_path: Path) -> None:
    files = []
    for i in range(3):
        for name, content in shard_files.members(f"pool/{i}", i):
            folder, _, base = name.rpartition("/")
            files += [(f"{folder}/._{base}", b"\0\5\x16\7" * 40), (name, content)]
    noise = [("._pool", b"\0\5\x16\7"), ("pool/.DS_Store", b"Bud1"), ("README", b"hello")]
    noise += [("__MACOSX/._pool", b"\0"), ("__MACOSX/pool/._0.jpg", b"\0")]
    got = read(shard_files.write(tmp_path / "0.tar", noise + files))
    assert [(s.key, s.reason) for s in got] == [(f"pool/{i}", "") for i in range(3)]
    # and one that breaks off loses what it loses without them
    content = shard_files.tar(noise + files)
    (tmp_path / "0.tar").write_bytes(content[: content.rindex(b"pool/2.txt") - 5])
    got, _ = lost(tmp_path / "0.tar")
    assert [(s.key, s.reason) for s in got] == [
        ("pool/0", ""), ("pool/1", ""), ("pool/2", "cut off")
    ]  # fmt: skip


def test_pictures_whose_names_hold_dots_are_counted(tmp_path: Path) -> None:
    """All of them have the key `photo`: 20 samples are lost, not one."""
    files = []
    for i in range(20):
        files += [(f"d/photo.{i:05d}.{e}", b"x") for e in ("jpg", "txt", "json")]
    files += [*shard_files.members("whole", 1), ("whole.mask.png", b"x"), ("left.0.npy", b"x")]
    got = read(shard_files.write(tmp_path / "0.tar", files))
    bad = [s for s in got if s.reason == "dot in the name"]
    assert [s.key for s in bad] == [f"d/photo.{i:05d}" for i in range(20)]
    assert bad[0].message == (
        "a key ends at the first dot, so 00000.jpg belongs to d/photo: rename it without that dot"
    )
    assert [(s.key, s.reason) for s in got[20:]] == [("whole", ""), ("left", "no image")]
    located = list(webdataset.locate_samples(webdataset.shard_at(f"{tmp_path}/0.tar")))
    assert [one.uid for one in located] == [got[20].uid]


def test_uids_are_accepted_in_every_spelling(tmp_path: Path) -> None:
    plain = "0123456789abcdef0123456789abcdef"
    spelled = [plain, plain.upper(), str(UUID(plain)), str(UUID(plain)).upper(), "x", 7, "", None]
    files = [f for i, told in enumerate(spelled) for f in shard_files.members(f"{i}", i, uid=told)]
    path = shard_files.write(tmp_path / "0.tar", files)
    got = read(path)
    assert [s.uid for s in got[:4]] == [plain] * 4
    assert [s.uid for s in got[4:]] == [
        uid.content_uid(shard_files.picture(i), shard_files.caption(i)) for i in range(4, 8)
    ]
    # a uid that is not there is no uid that is replaced
    assert [s.replaced for s in got] == [False] * 4 + [True] * 3 + [False]
    located = webdataset.locate_samples(webdataset.shard_at(str(path)))
    assert [one.uid for one in located] == [s.uid for s in got]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PAR1" + bytes(600), "it is a parquet file, not a tar: a folder of metadata goes with"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "fetch it with `git lfs"),
        (b"\n <!DOCTYPE HTML><html>" + bytes(600), "it is an HTML page, not a tar: a server may"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML text"),
        (b"\x04\x22\x4d\x18" + bytes(600), "it is an lz4 file: unpack it, shards are plain tar"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "it is a zstd file: unpack it, shards are plain tar"),
        (b"PK\x03\x04" + bytes(600), "it is a zip file: unpack it, shards are plain tar files"),
        (
            shard_files.picture(1),
            "it is a JPEG picture, not a tar: `d2filter pack` makes shards of a",
        ),
    ],
)
def test_a_file_that_is_not_a_shard_is_named_by_its_type(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    got, message = lost(path)
    assert not got
    assert said in message
    with pytest.raises(webdataset.LostTail, match=r"^it is an?"):
        list(webdataset.locate_samples(webdataset.shard_at(str(path))))


@pytest.mark.parametrize("name", ["BZh9.jpg", "PAR1.jpg", "GIF8.jpg", '{"a.jpg', "PK\3\4.jpg"])
def test_a_tar_is_recognized_for_any_name_of_its_first_member(tmp_path: Path, name: str) -> None:
    stem = name.removesuffix(".jpg")
    files = [(name, shard_files.picture(1)), (f"{stem}.txt", b"x")]
    assert [s.reason for s in read(shard_files.write(tmp_path / "0.tar", files))] == [""]


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    """Opening it would wait for ever."""
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(InputError, match="is not a regular file"):
        read(tmp_path / "0.tar")


def test_descriptions_of_errors_are_the_same_in_every_run() -> None:
    class Odd(Exception):
        pass

    told = [
        webdataset.describe(
            Odd(f"cannot read {stream!r}\nat 7, {len!r}, {test_a_pipe_is_no_shard!r}")
        )
        for stream in (io.BytesIO(), io.BytesIO())
    ]
    assert told[0] == told[1]
    assert "0x" not in told[0]
    assert told[0].startswith("Odd: cannot read the file at 7, <built-in function len>, ")
    assert len(webdataset.describe(Odd("x" * 9999))) == 300


def test_clean_samples_are_read_completely(tmp_path: Path) -> None:
    told = "0123456789abcdef0123456789abcdef"
    files = shard_files.members("a", 1, uid=told) + shard_files.members("dir/b", 2, uid="NOT A UID")
    first, second = read(shard_files.write(tmp_path / "0.tar", files))
    assert (first.key, first.uid, first.reason) == ("a", told, "")
    assert first.image == shard_files.picture(1)
    assert first.caption == shard_files.caption(1)
    assert second.key == "dir/b"
    assert second.uid == uid.content_uid(shard_files.picture(2), shard_files.caption(2))


def test_members_of_a_key_may_lie_apart(tmp_path: Path) -> None:
    a, b = shard_files.members("a", 1), shard_files.members("b", 2)
    files = [a[0], b[0], b[1], a[2], a[1], b[2]]
    got = read(shard_files.write(tmp_path / "0.tar", files))
    assert [(s.key, s.caption) for s in got] == [
        ("a", shard_files.caption(1)),
        ("b", shard_files.caption(2)),
    ]


def test_a_repeated_key_is_another_sample(tmp_path: Path) -> None:
    files = shard_files.members("a", 1) + shard_files.members("a", 2)
    got = read(shard_files.write(tmp_path / "0.tar", files))
    assert [s.caption for s in got] == [shard_files.caption(1), shard_files.caption(2)]


def test_unusable_samples_carry_their_reason(tmp_path: Path) -> None:
    jpg = shard_files.picture(1)
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
    got = {s.key: s for s in read(shard_files.write(tmp_path / "0.tar", files))}
    assert {key: s.reason for key, s in got.items() if s.reason} == {
        "a": "no image", "b": "no caption", "c": "empty caption", "d": "broken json",
        "e": "broken json", "f": "caption is no UTF-8", "g": "empty image", "h": "no caption",
    }  # fmt: skip
    assert "i" not in got
    assert got["j"].caption == "from json"
    assert got["k"].caption == "héllo 🐸"


@pytest.mark.parametrize("cut", [0.2, 0.3, 0.5, 0.7])
def test_a_truncated_shard_gives_the_samples_before_the_cut(tmp_path: Path, cut: float) -> None:
    files = [f for i in range(8) for f in shard_files.members(f"{i}", i)]
    path = shard_files.write(tmp_path / "0.tar", files)
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
def test_a_file_that_is_no_tar_is_a_lost_shard(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    with pytest.raises(webdataset.LostTail) as caught:
        read(path)
    assert said in str(caught.value) or "cut off" in str(caught.value)


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    path = shard_files.write(
        tmp_path / "0.tar", shard_files.members("a", 1) + shard_files.members("b", 2)
    )
    content = bytearray(path.read_bytes())
    at = content.rindex(b"b.jpg")
    content[at : at + 200] = b"\xaa" * 200
    path.write_bytes(content)
    with pytest.raises(webdataset.LostTail, match="damaged header at byte"):
        read(path)


def test_text_that_utf8_cannot_hold_is_bad_or_spelled_out(tmp_path: Path) -> None:
    jpg = shard_files.picture(1)
    files = [
        ("q\udcff.jpg", jpg), ("q\udcff.txt", b"fine"),
        ("r.jpg", jpg), ("r.json", b'{"caption": "\\ud800 x"}'),
        ("s\udcff.txt", b"no picture"),
    ]  # fmt: skip
    got = read(shard_files.write(tmp_path / "0.tar", files))
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
    [(gzip.compress, "a gzip"), (bz2.compress, "a bzip2"), (lzma.compress, "an xz")],
)
def test_a_compressed_shard_is_lost_with_this_reason(
    tmp_path: Path, compress: Callable[[bytes], bytes], said: str
) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(compress(shard_files.tar(shard_files.members("a", 1))))
    assert lost(path) == ([], f"it is {said} file: unpack it, shards are plain tar files")


def test_a_shard_without_members_has_no_samples(tmp_path: Path) -> None:
    assert read(shard_files.write(tmp_path / "0.tar", [])) == []


def test_content_after_the_end_mark_is_reported(tmp_path: Path) -> None:
    """Two archives joined, and a header that a disk filled with zeros."""
    path = tmp_path / "0.tar"
    first, second = (
        shard_files.tar(shard_files.members("a", 1)),
        shard_files.tar(shard_files.members("b", 2)),
    )
    path.write_bytes(first + second)
    got, said = lost(path)
    assert [s.key for s in got] == ["a"]
    assert "data behind the end-of-archive mark" in said
    whole = bytearray(shard_files.tar(shard_files.members("a", 1) + shard_files.members("b", 2)))
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
    files = shard_files.members("a", 1, uid=told) + shard_files.members("b", 2, uid=told[::-1])
    content = shard_files.tar([files[i] for i in order])
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
    jpg = shard_files.picture(1)
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
    jpg = shard_files.picture(1)
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
def test_a_shard_whose_last_member_belongs_to_no_sample_is_complete(
    tmp_path: Path, last: str
) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as stream:
        for name, content in shard_files.members("a", 1):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            stream.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo(last)
        info.type = tarfile.SYMTYPE if last == "link" else tarfile.DIRTYPE
        stream.addfile(info)
    assert [(s.key, s.reason) for s in read(path)] == [("a", "")]


def test_a_sparse_member_is_not_read_as_plain_content(tmp_path: Path) -> None:
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
        for suffix, content in ((".jpg", shard_files.picture(i)), (".txt", b"x"))
    ]
    path = shard_files.write(tmp_path / "inside/deeper/0.tar", files)
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
    content = shard_files.tar(shard_files.members("a", 1))
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
