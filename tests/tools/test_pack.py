"""`d2filter pack`: shards from a folder of pictures and captions."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path

import pytest
import webdataset as wds
from support import shard_files

from d2filter.cli.main import main
from d2filter.formats import uid
from d2filter.formats.paths import Folder
from d2filter.tools import pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine pictures to pack, and one of each kind that is skipped."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    for i in range(7):
        (root / f"{i}.jpg").write_bytes(shard_files.picture(i))
        (root / f"{i}.txt").write_text(shard_files.caption(i))
    (root / "deep/a.png").write_bytes(shard_files.black_png_with_alpha())
    (root / "deep/a.txt").write_text("Une étoile.\nde.utf8=Ein Stern.\n", "utf-8")
    (root / "deep/b.WEBP").write_bytes(shard_files.picture(9, "WEBP"))
    (root / "deep/b.json").write_text('{"caption": "from json", "url": "https://example.org/b"}')
    (root / "drawing.svg").write_text("<svg/>")
    (root / "drawing.txt").write_text("A drawing.")
    (root / "bare.svg").write_text("<svg/>")
    (root / "alone.jpg").write_bytes(shard_files.picture(20))
    (root / "broken.jpg").write_bytes(b"\xff\xd8 no")
    (root / "broken.txt").write_text("x")
    (root / "nothing.jpg").write_bytes(b"")
    (root / "nothing.txt").write_text("x")
    (root / "silent.jpg").write_bytes(shard_files.picture(21))
    (root / "silent.txt").write_text(" \n")
    (root / "latin.jpg").write_bytes(shard_files.picture(22))
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "orphan.txt").write_text("nobody")
    (root / "sound.ogg").write_bytes(b"x")
    (root / "README").write_text("x")
    return root


def test_everything_is_packed_or_has_a_reason(folder: Path, tmp_path: Path) -> None:
    out = Folder(str(tmp_path / "out"))
    packed = pack.pack(folder, out, shard_size=4)
    assert (packed.samples, packed.shards, packed.long_captions) == (9, 3, 1)
    assert packed.skipped == {
        "captioned image of a type that CLIP training does not read (.svg)": 1,
        "image without a caption of a type that CLIP training does not read (.svg)": 1,
        "image without a caption": 1,
        "broken image (of no known kind)": 1,
        "empty file": 1,
        "empty caption": 1,
        "caption (.txt) is no UTF-8": 1,
        "caption (.txt) without an image": 1,
        "no image (.ogg)": 1,
        "no image (no extension)": 1,
    }
    with open(tmp_path / "out/skipped.csv", newline="") as stream:
        listed = list(csv.DictReader(stream))
    assert len(listed) == 10
    assert {row["path"] for row in listed} >= {"sound.ogg", "drawing.svg"}


def test_webdataset_reads_packed_shards(folder: Path, tmp_path: Path) -> None:
    pack.pack(folder, Folder(str(tmp_path / "out")), shard_size=4)
    urls = sorted(str(p) for p in (tmp_path / "out").glob("*.tar"))
    assert [Path(u).name for u in urls] == ["00000.tar", "00001.tar", "00002.tar"]
    got = list(wds.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in got] == [
        "000000000", "000000001", "000000002", "000000003",
        "000010000", "000010001", "000010002", "000010003", "000020000",
    ]  # fmt: skip
    by_caption = {s["txt"].decode(): s for s in got}
    assert by_caption["Une étoile."]["png"] == (folder / "deep/a.png").read_bytes()
    assert by_caption["from json"]["webp"] == (folder / "deep/b.WEBP").read_bytes()
    for i in range(7):
        sample = by_caption[shard_files.caption(i)]
        meta = json.loads(sample["json"])
        assert sample["jpg"] == (folder / f"{i}.jpg").read_bytes()
        assert meta["uid"] == uid.content_uid(sample["jpg"], shard_files.caption(i))
        assert meta["sha256"] == hashlib.sha256(sample["jpg"]).hexdigest()
        assert (meta["width"], meta["original_height"], meta["status"]) == (64, 64, "success")
    stats = [json.loads(p.read_text()) for p in sorted((tmp_path / "out").glob("*_stats.json"))]
    assert [s["successes"] for s in stats] == [4, 4, 1]


def test_the_same_folder_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack.pack(folder, Folder(str(tmp_path / name)))
    one, two = (sorted((tmp_path / n).iterdir()) for n in ("one", "two"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_a_caption_keeps_all_its_lines(folder: Path, tmp_path: Path) -> None:
    pack.pack(folder, Folder(str(tmp_path / "out")), caption_lines="all")
    got = wds.WebDataset(str(tmp_path / "out/00000.tar"), shardshuffle=False)
    assert "Une étoile. de.utf8=Ein Stern." in [s["txt"].decode() for s in got]


def test_unusable_queries_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*words: object) -> tuple[int, str]:
        code = main(["pack", *(str(w) for w in words)])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return code, lines[0]

    out = tmp_path / "out"
    assert fail(tmp_path / "none", "--shards", out)[0] == 2
    assert "shard-size is 0" in fail(folder, "--shards", out, "--shard-size", 0)[1]
    empty = tmp_path / "empty"
    empty.mkdir()
    code, line = fail(empty, "--shards", out)
    assert (code, "has no captioned image to pack" in line) == (1, True)
    assert not list(out.glob("*.tar"))
    assert main(["pack", str(folder), "--shards", str(out)]) == 0
    assert "next: d2filter run --shards" in capsys.readouterr().out
    code, line = fail(folder, "--shards", out)
    assert (code, "holds .tar files already" in line) == (1, True)


def one(root: Path, name: str, **sidecars: bytes) -> None:
    (root / name).write_bytes(shard_files.picture(len(name)))
    for suffix, content in sidecars.items():
        (root / f"{Path(name).stem}.{suffix}").write_bytes(content)


def captions(out: Path) -> list[str]:
    return sorted(
        s["txt"].decode() for s in wds.WebDataset(str(out / "00000.tar"), shardshuffle=False)
    )


def test_suffixes_are_accepted_in_either_case(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    one(root, "A.JPG", TXT=b"upper")
    one(root, "b.jpg", TXT=b"mixed one")
    one(root, "C.Jpg", txt=b"mixed two")
    packed = pack.pack(root, Folder(str(tmp_path / "out")))
    assert captions(tmp_path / "out") == ["mixed one", "mixed two", "upper"]
    assert packed.skipped == {}


def test_a_txt_goes_before_any_json(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    one(root, "a.jpg", txt=b"good", json=b"[1, 2]")
    one(root, "bb.jpg", txt=b"fine", json=b"{")
    one(root, "ccc.jpg", json=b'{"caption": 5}')
    one(root, "dddd.jpg", json=b'{"caption": "\\ud800"}')
    one(root, "eeeee.jpg", txt=b"told", json=b'{"url": "http://x/\\udc80"}')
    packed = pack.pack(root, Folder(str(tmp_path / "out")))
    assert captions(tmp_path / "out") == ["fine", "good", "told"]
    assert packed.skipped == {
        "caption (.json) holds no text": 1, "caption (.json) is no UTF-8": 1
    }  # fmt: skip


def test_nothing_below_the_folder_is_lost_silently(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    one(root, "a.jpg", txt=b"good")
    (root / "loop").symlink_to(root)
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(root / "pipe.jpg")
    bad = os.fsencode(root) + b"/caf\xe9.jpg"
    Path(os.fsdecode(bad)).write_bytes(shard_files.picture(4))
    packed = pack.pack(root, Folder(str(tmp_path / "out")))
    assert packed.skipped == {
        "link to a folder (not followed)": 1,
        "link that leads nowhere": 1,
        "no regular file": 1,
        "image without a caption": 1,
    }
    assert "caf\\udce9.jpg" in (tmp_path / "out/skipped.csv").read_text()


def test_unreadable_files_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    one(root, "a.jpg", txt=b"good")
    one(root, "bb.jpg", txt=b"denied")
    plain = Path.read_bytes

    def refusing(self: Path) -> bytes:
        if self.name == "bb.jpg":
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self)

    # the tests may run as root, whom no permission stops
    monkeypatch.setattr(Path, "read_bytes", refusing)
    packed = pack.pack(root, Folder(str(tmp_path / "out")))
    assert packed.skipped == {"file that cannot be read (Permission denied)": 1}


def test_an_interrupted_pack_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(6):
        one(root, f"{'x' * (i + 1)}.jpg", txt=b"caption")
    out = Folder(str(tmp_path / "out"))
    plain = Path.read_bytes

    def stopping(path: Path) -> bytes:
        if path.stem == "xxxxx":
            raise KeyboardInterrupt
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(root, out, shard_size=2)
    assert out.names(".tar")
    monkeypatch.setattr(Path, "read_bytes", plain)
    assert pack.pack(root, out, shard_size=3).shards == 2
    assert out.names(".tar") == ["00000.tar", "00001.tar"]
    assert not out.exists("pack-unfinished.json")


def test_no_decoder_but_those_of_pictures_is_started(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    one(root, "a.jpg", txt=b"good")
    (root / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    (root / "eps.txt").write_text("PostScript under another name")
    packed = pack.pack(root, Folder(str(tmp_path / "out")))
    assert packed.skipped == {"no image that is read: a PostScript file": 1}
