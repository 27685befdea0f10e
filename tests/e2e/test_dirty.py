"""A run on shards and a run on metadata that contain nearly every kind of fault.

Each fault has a test of its own, here or in the tests of its reader. These tests show that faults
together affect no other samples: every sample read is ranked, bad or a duplicate, and every
unreadable file is named.
"""

from __future__ import annotations

import decimal
import gzip
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from support import pools, shard_files
from support.runs import run, stats

from d2filter.formats import uid as uid_format
from d2filter.tools import scenes

pytestmark = pytest.mark.usefixtures("cluster")

UID = "0123456789abcdef" * 2


def scene(seed: int) -> Image.Image:
    return scenes.draw(scenes.random_scene(np.random.default_rng(seed)))


def deep_png(picture: Image.Image) -> bytes:
    """16 bits a channel, which PIL reads and does not write."""
    wide, high = picture.size
    rows = np.asarray(picture.convert("RGB")).astype(">u2") * 257
    raw = b"".join(b"\0" + row.tobytes() for row in rows.astype(">u2"))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", wide, high, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims this size."""
    content = bytearray(shard_files.black_png_with_alpha())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def rotated() -> bytes:
    """A picture that its EXIF data tells to turn by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return shard_files.encoded(scene(21), "JPEG", exif=exif, quality=95)


def animated(kind: str) -> bytes:
    return shard_files.encoded(
        scene(20).convert("RGB"), kind, save_all=True, append_images=[scene(22), scene(23)]
    )


# pictures that are embedded, and the one that the model must see
PICTURES = {
    "cmyk.jpg": shard_files.picture(11, "JPEG", "CMYK"),
    "palette.png": shard_files.picture(12, "PNG", "P"),
    "alpha.png": shard_files.picture(13, "PNG", "RGBA"),
    "gray-alpha.png": shard_files.picture(14, "PNG", "LA"),
    "one-bit.png": shard_files.picture(15, "PNG", "1"),
    "deep.png": deep_png(scene(16)),
    "gif.jpg": animated("GIF"),
    "apng.png": animated("PNG"),
    "animated.webp": shard_files.encoded(
        scene(20), "WEBP", save_all=True, append_images=[scene(22), scene(23)], lossless=True
    ),
    "turned.jpg": rotated(),
    "avif.jpg": shard_files.encoded(scene(24), "AVIF"),
    "tiff.png": shard_files.encoded(scene(25), "TIFF"),
}
SEEN = {"gif.jpg": scene(20), "apng.png": scene(20), "animated.webp": scene(20)}
# what is bad, and why
JPG = shard_files.picture(30)
BAD = {
    "cut-picture": ({"jpg": JPG[:300], "txt": b"x"}, "broken image"),
    "bomb": ({"png": claiming(60_000, 60_000), "txt": b"x"}, "too many pixels"),
    "large": ({"png": claiming(10_000, 9_000), "txt": b"x"}, "too many pixels"),
    "no-width": ({"png": claiming(0, 20), "txt": b"x"}, "broken image"),
    "a-line": ({"png": shard_files.png(Image.new("L", (1, 60_000))), "txt": b"x"}, "broken image"),
    "noise": ({"jpg": bytes(range(256)) * 8, "txt": b"x"}, "broken image"),
    "postscript": ({"png": b"%!PS-Adobe-3.0 EPSF-3.0\n", "txt": b"x"}, "unread format"),
    "jp2": ({"jpg": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "txt": b"x"}, "unread format"),
    "zero-bytes": ({"jpg": b"", "txt": b"x"}, "empty image"),
    "no-picture": ({"txt": b"x", "json": b"{}"}, "no image"),
    "gif-by-name": ({"gif": PICTURES["gif.jpg"], "txt": b"x"}, "no image"),
    "no-caption": ({"jpg": JPG, "json": b'{"url": "x"}'}, "no caption"),
    "number-caption": ({"jpg": JPG, "json": b'{"caption": 5}'}, "no caption"),
    "empty-caption": ({"jpg": JPG, "txt": b" \n\t"}, "empty caption"),
    "latin-caption": ({"jpg": JPG, "txt": "é".encode("latin-1")}, "caption is no UTF-8"),
    "surrogate": ({"jpg": JPG, "json": b'{"caption": "\\ud800"}'}, "caption is no UTF-8"),
    "half-json": ({"jpg": JPG, "txt": b"x", "json": b'{"a":'}, "broken json"),
    "deep-json": ({"jpg": JPG, "txt": b"x", "json": b"[" * 99_999}, "broken json"),
    "list-json": ({"jpg": JPG, "txt": b"x", "json": b"[]"}, "broken json"),
    "long-caption": ({"jpg": JPG, "txt": b"x" * (1 << 20) + b"y"}, "member too large"),
    "long-json": ({"jpg": JPG, "txt": b"x", "json": b" " * (1 << 24) + b"{}"}, "member too large"),
}
# names that lead elsewhere, or are long; a key may be any text
NAMES = [
    "../../up",
    "/etc/passwd",
    "deep/" * 2000 + "down",
    "k" * 5000,
    "new\nline",
    "b\udcff",
    "✓",
]


# tokenizers take hours for a word of this length
WORD = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), 300_000))


def dirty(folder: Path) -> None:
    files = [f for i in range(20) for f in shard_files.members(f"good{i}", 100 + i)]
    files += [("one-word.jpg", shard_files.picture(31)), ("one-word.txt", WORD.encode())]
    for name, content in PICTURES.items():
        files += [(name, content), (name.split(".")[0] + ".txt", f"picture {name}".encode())]
    for key, (members, _) in BAD.items():
        files += [(f"{key}.{extension}", content) for extension, content in members.items()]
    for i, name in enumerate(NAMES):
        files += shard_files.members(name, 200 + i)
    files += shard_files.members("twice", 300) + shard_files.members("twice", 301)
    files += shard_files.members("same-content", 302) + shard_files.members("same-content", 302)
    told = [shard_files.members(f"told{i}", 310 + i, uid=UID) for i in range(2)]
    odd = shard_files.members("odd-uid", 320, uid=str(UUID(UID)).upper())
    odd += shard_files.members("no-uid", 321, uid=7)
    # members of no sample, and samples that a dot in their names makes one
    none = [("._good0.jpg", b"\0\5\x16\7"), ("d/._good0.txt", b"\0"), ("d/.DS_Store", b"Bud1")]
    none += [("README", b"x"), ("__meta__/a.jpg", b"x")]
    dots = [(f"dot.{i}.{extension}", b"x") for i in range(3) for extension in ("jpg", "txt")]
    shard_files.write(folder / "00000.tar", none + files + told[0] + told[1] + odd + dots)
    # members of a key that lie apart; the uid of shard 0 once more; links and devices
    apart = [shard_files.members(f"apart{i}", 400 + i) for i in range(4)]
    shuffled = [apart[i][j] for j in range(3) for i in (2, 0, 3, 1)]
    shard_files.write(folder / "00001.tar", shuffled + shard_files.members("told2", 312, uid=UID))
    with tarfile.open(folder / "00001.tar", "a") as archive:
        for key, kind in (("link", tarfile.SYMTYPE), ("device", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(f"{key}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
            info = tarfile.TarInfo(f"{key}.txt")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    shard_files.write(folder / "00002.tar", [])
    # and files of which a part, or all, cannot be read
    cut = shard_files.tar([f for i in range(6) for f in shard_files.members(f"cut{i}", 500 + i)])
    (folder / "00003.tar").write_bytes(cut[: cut.index(b"cut4.txt")])
    (folder / "00004.tar").write_bytes(b"this is no tar file" * 100)
    (folder / "00005.tar").write_bytes(gzip.compress(cut))
    joined = [
        shard_files.tar(shard_files.members(key, seed))
        for key, seed in (("first", 600), ("second", 601))
    ]
    (folder / "00006.tar").write_bytes(b"".join(joined))
    (folder / "00007.tar").write_bytes(b"")
    (folder / "00008.tar.gz").write_bytes(gzip.compress(cut))
    (folder / "00009.TAR").write_bytes(b"PAR1" + bytes(600))
    (folder / "00000_stats.json").write_text("{}")
    (folder / "more").mkdir()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    folder = tmp_path_factory.mktemp("dirty")
    (folder / "s").mkdir()
    dirty(folder / "s")
    before = sorted(folder.rglob("*"))
    words = ("run", "--shards", folder / "s", "--max-bad", "1", "--batch-size", 32)
    # 3: shards were lost
    assert run(*words, "--out-dir", folder / "o") == 3
    assert sorted(p for p in folder.rglob("*") if folder / "o" not in (p, *p.parents)) == before
    return folder


def test_every_sample_of_dirty_shards_is_accounted_for(finished: Path) -> None:
    out = finished / "o"
    good = 21 + len(PICTURES) + len(NAMES) + 2 + 1 + 1 + 1 + 4 + 4 + 1
    bad, duplicate = len(BAD) + 2 + 1 + 3, 1 + 3
    samples = stats(out)["samples"]
    assert (samples["ranked"], samples["bad"], samples["duplicate"]) == (good, bad, duplicate)
    assert samples["read"] == good + bad + duplicate
    assert run("verify", out) == 0


def test_each_bad_sample_has_its_key_and_reason(finished: Path) -> None:
    listed = pq.read_table(finished / "o/bad_samples.parquet").to_pylist()
    got = {b["key"]: b["reason"] for b in listed if b["status"] == "bad"}
    expected = {key: reason for key, (_, reason) in BAD.items()}
    odd = {"link": "no plain file", "device": "no plain file", "cut4": "cut off"}
    odd |= {f"dot.{i}": "dot in the name" for i in range(3)}
    assert got == expected | odd
    assert {b["reason"] for b in listed if b["status"] == "duplicate"} == {"repeated uid"}
    assert [b["uid"] for b in listed if b["uid"] == UID] == [UID] * 3
    messages = {b["key"]: b["message"] for b in listed}
    assert "DecompressionBomb" in messages["bomb"]
    assert "10000 × 9000 has 90000000 pixels" in messages["large"]
    assert "it is a JPEG 2000 picture" in messages["jp2"]
    assert "longer than 1000 : 1" in messages["a-line"]
    assert "txt has 1048577 bytes" in messages["long-caption"]


def test_each_incomplete_shard_is_named(finished: Path) -> None:
    lost = stats(finished / "o")["lost_shards"]
    assert [Path(line.split(": ")[0]).name for line in lost] == [
        "00003.tar", "00004.tar", "00005.tar", "00006.tar", "00007.tar", "00008.tar.gz", "00009.TAR"
    ]  # fmt: skip
    said = ["cut off", "header", "gzip file", "data behind the end", "empty", "gzip", "parquet"]
    assert all(words in line for words, line in zip(said, lost, strict=True))


def test_alerts_about_the_shards_are_in_the_figures(finished: Path) -> None:
    figures = json.loads((finished / "o/completions/embed.json").read_text())["stats"]
    assert figures["left_out"] == {".json": 1, "folders": 1}
    # of the pictures, alpha.png and gray-alpha.png are opaque
    assert (figures["alpha"], figures["one_color"], figures["uids_replaced"]) == (0, 0, 1)


def test_keys_are_kept_as_they_are(finished: Path) -> None:
    table = pq.read_table(finished / "o/metadata/00000.parquet").to_pydict()
    keys = set(table["key"])
    assert {name.replace("\udcff", "\\udcff") for name in NAMES} <= keys
    assert table["text"][table["key"].index("one-word")] == WORD
    row = table["key"].index("odd-uid")
    assert table["uid"][row] == UID
    row = table["key"].index("no-uid")
    assert table["uid"][row] == uid_format.content_uid(
        shard_files.picture(321), shard_files.caption(321)
    )
    apart = pq.read_table(finished / "o/metadata/00001.parquet").to_pydict()
    texts = dict(zip(apart["key"], apart["text"], strict=True))
    assert texts == {
        **{f"apart{i}": shard_files.caption(400 + i) for i in range(4)},
        "told2": shard_files.caption(312),
    }  # fmt: skip


def test_unusual_pictures_are_preprocessed_like_in_open_clip(finished: Path) -> None:
    """As its trainer decodes them: the first frame, as RGB, and nothing turned by EXIF."""
    import open_clip
    import torch

    from d2filter.models import tiny

    tiny.register()
    model, _, transform = open_clip.create_model_and_transforms(
        tiny.MODEL_NAME, pretrained=str(tiny.WEIGHTS)
    )
    model.eval()

    def embedded(picture: Image.Image) -> np.ndarray:
        with torch.inference_mode():
            return model.encode_image(transform(picture)[None], normalize=True)[0].numpy()

    keys = pq.read_table(finished / "o/metadata/00000.parquet").column("key").to_pylist()
    with np.load(finished / "o/metadata/00000.npz") as arrays:
        image = dict(zip(keys, arrays["tiny_img"].astype(np.float32), strict=True))
    for name, content in PICTURES.items():
        key = name.split(".")[0]
        theirs = embedded(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.abs(image[key] - theirs).max() < 2e-3, name
        if name in SEEN:
            assert image[key] @ embedded(SEEN[name]) > 0.98, name
            assert image[key] @ embedded(scene(22)) < 0.98, name
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(PICTURES["turned.jpg"])))
    assert np.abs(image["turned"] - embedded(upright)).max() > 2e-2
    assert image["deep"] @ embedded(scene(16)) > 0.999


def test_dirty_metadata_in_any_split_gives_one_pool(tmp_path: Path) -> None:
    """Pairs that differ in all that may differ, with bad rows in each."""
    folder = tmp_path / "m"
    folder.mkdir()
    pool = pools.make(360, 8, copies=0)
    uids, seen = pool["uid"], set()
    broken = pa.array([b"\xff\xfe", b"ok", None] * 12, pa.binary())
    raw = pa.StringArray.from_buffers(36, *broken.buffers()[1:], broken.buffers()[0])
    numbers = np.linspace(0.25, 0.75, 36)
    hundredths = [decimal.Decimal(round(100 * x)) / 100 for x in numbers.tolist()]
    scores = [
        pa.array(numbers.astype(np.float16)), pa.array(numbers.astype(np.float32)),
        pa.array(numbers), pa.array(hundredths),
        pa.array(range(36)), pa.array([str(x) for x in numbers]),
        pa.array([f"{x:.2f}" for x in numbers]).dictionary_encode(), pa.array([True, False] * 18),
        pa.array([None if i % 12 == 0 else x for i, x in enumerate(numbers)]),
        pa.array(numbers.astype(np.float32)),
    ]  # fmt: skip
    kinds = ["string", "large_string", "binary", "large_binary", "dictionary"] * 2
    for number, (score, kind) in enumerate(zip(scores, kinds, strict=True)):
        rows = slice(36 * number, 36 * number + 36)
        texts = list(uids[rows])
        texts[3], texts[4], texts[5] = "x" * 100_000, texts[4].upper(), None
        texts[6] = texts[7]  # within a shard
        texts[8] = uids[8]  # and across shards
        seen |= {known for text in texts if (known := uid_format.normalized(text))}
        column = pa.array(texts, pa.string())
        column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
        key = [raw, pa.array(range(36)), pa.array(["k" * 100_000] + ["k"] * 35)][number % 3]
        place = pa.array([f"s/{number}.tar"] * 36)
        place = place.dictionary_encode() if number % 2 else place
        table = {"uid": column, "mine": score, "key": key, "shard": place}
        group = [36, 7][number % 2]
        pq.write_table(pa.table(table), folder / f"{number}.parquet", row_group_size=group)
        save = [np.savez, np.savez_compressed][number % 2]
        wide = [np.float16, np.float32, np.float64, ">f4"][number % 4]
        save(
            folder / f"{number}.npz",
            l14_img=np.asfortranarray(pool["img"][rows].astype(wide)),
            l14_txt=pool["txt"][rows].astype(wide),
        )
    pq.write_table(pa.table({"uid": pa.nulls(0), "mine": pa.nulls(0)}), folder / "empty.parquet")
    np.savez(folder / "empty.npz", l14_img=np.empty((0, 8)), l14_txt=np.empty((0, 8)))
    out = tmp_path / "o"
    words = ("run", "--metadata-dir", folder, "--score-column", "mine", "--out-dir", out)
    assert run(*words, "--max-bad", "0.5") == 0
    samples = stats(out)["samples"]
    assert samples["read"] == 360
    assert (samples["bad"], samples["duplicate"]) == (10 * 2 + 3, 10 + 9)
    assert samples["ranked"] == len(seen) - 3
    listed = pq.read_table(out / "bad_samples.parquet").to_pylist()
    reasons = [b["reason"] for b in listed]
    assert {r: reasons.count(r) for r in set(reasons)} == {
        "malformed uid": 20, "score is NaN": 3, "repeated uid": 19
    }  # fmt: skip
    assert max(len(b["uid"] or "") for b in listed) == 300
    assert {b["shard"] for b in listed} == {f"s/{number}.tar" for number in range(10)}
    assert run("verify", out) == 0


def test_only_empty_tables_make_no_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"uid": pa.array([], pa.string())}), tmp_path / "0.parquet")
    np.savez(tmp_path / "0.npz", l14_img=np.empty((0, 8)), l14_txt=np.empty((0, 8)))
    capsys.readouterr()
    assert run("run", "--metadata-dir", tmp_path, "--out-dir", tmp_path / "o") == 1
    error = capsys.readouterr().err
    assert "none of 0 rows is a valid sample (no rows)" in error
    assert len(error.splitlines()) == 1
