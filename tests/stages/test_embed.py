"""Pictures are decoded in advance while the model runs, up to a limit."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import shard_files

from d2filter.algorithm import sizes as memory_of
from d2filter.config import EmbedConfig
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.errors import UsageError
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import Plan
from d2filter.formats.webdataset import LostTail, Sample, list_shards, shard_at
from d2filter.models.clip import Clip
from d2filter.stages import decode, embed


def first_pixel(picture: Image.Image) -> Any:
    """A transform that loads a picture and takes next to nothing of it."""
    return np.asarray(picture.convert("RGB").crop((0, 0, 2, 1))).transpose(2, 0, 1)


def decoded(samples: Iterator[Sample], transform: Any = first_pixel, **options: Any) -> Any:
    """What comes of samples in batches of 8. transform: PIL image → (3, height, width)."""
    network = SimpleNamespace(visual=SimpleNamespace(image_size=200))
    model = Clip(model=network, transform=transform, tokenize=str, device="cpu", dtype=None)  # type: ignore[arg-type]
    config = EmbedConfig(shards=("s",), batch_size=8, **options)
    with ThreadPoolExecutor(4) as pool:
        yield from decode.decoded(pool, samples, model, config)


def sample(content: bytes, key: str = "a") -> Sample:
    return Sample(key=key, image=content, caption="x")


@pytest.mark.parametrize(("bound", "ahead"), [(1 << 30, 17), (10_000, 9)])
def test_encoded_pictures_wait_within_bounds(
    monkeypatch: pytest.MonkeyPatch, bound: int, ahead: int
) -> None:
    monkeypatch.setattr(memory_of, "PICTURES_AHEAD", bound)
    picture = shard_files.picture(1).ljust(1250, b"\0")[:1250]
    begun = 0
    most = 0

    def samples() -> Iterator[Sample]:
        nonlocal begun
        for i in range(60):
            begun += 1
            yield Sample(key=str(i), image=picture, caption="x")
        raise LostTail("cut off")

    done = []
    with pytest.raises(LostTail):  # noqa: PT012  # what comes before is the point
        for item in decoded(samples()):
            most = max(most, begun - len(done))
            done.append(item.key if isinstance(item, Sample) else item.sample.key)
    assert done == [str(i) for i in range(60)]
    assert most == ahead


def test_the_next_batch_is_decoded_while_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than two wait: the model is slower than what comes before it."""
    from d2filter.models import clip

    files: list[tuple[str, bytes]] = []
    for i in range(21):
        files += shard_files.members(f"{i:03d}", i)
    shard_files.write(tmp_path / "0.tar", files)
    (shard,) = list_shards([str(tmp_path / "0.tar")])
    config = EmbedConfig(shards=(str(tmp_path),), batch_size=4)
    model = embed._load(config)
    plain, prepare = model.encode, model.prepare
    ready, done, ahead = threading.Semaphore(0), 0, []

    def slow(self: Any, batch: clip.Batch) -> Any:
        nonlocal done
        if done < 5:  # of six
            assert ready.acquire(timeout=20), "the batch after this one is not made ready"
        result = plain(batch)
        done += 1
        return result

    def noted(self: Any, *arguments: Any) -> clip.Batch:
        batch = prepare(*arguments)
        ahead.append(len(ahead) - done)
        if len(ahead) > 1:
            ready.release()
        return batch

    monkeypatch.setattr(clip.Clip, "encode", slow)
    monkeypatch.setattr(clip.Clip, "prepare", noted)
    out = Folder(str(tmp_path / "o"))
    embed.embed_shard(report=lambda done: None, out=out, shard=shard, config=config)
    monkeypatch.undo()
    assert len(ahead) == 6
    assert max(ahead) <= 3
    again = Folder(str(tmp_path / "p"))
    embed.embed_shard(report=lambda done: None, out=again, shard=shard, config=config)
    with (
        np.load(tmp_path / "o/metadata/0.npz") as one,
        np.load(tmp_path / "p/metadata/0.npz") as two,
    ):
        assert all((one[name] == two[name]).all() for name in two.files)


@pytest.mark.parametrize(
    ("size", "kind", "seen"),
    [
        ((1600, 1200), "JPEG", (800, 600)),  # 400 is between a quarter and a half
        ((1200, 1600), "JPEG", (600, 800)),
        ((900, 390), "JPEG", (900, 390)),
        ((1600, 1200), "PNG", (1600, 1200)),
    ],
)
def test_fast_decoding_keeps_the_requested_side(
    size: tuple[int, int], kind: str, seen: tuple[int, int]
) -> None:
    got: list[Any] = []

    def transform(picture: Image.Image) -> Any:
        got.append(picture.size)
        return first_pixel(picture)

    one = sample(shard_files.encoded(Image.new("RGB", size, "red"), kind))
    (ready,) = decoded(iter([one]), transform, fast_decode=True)  # of 200 pixels: keeps 400
    assert got == [seen]
    assert (ready.width, ready.height) == size


def test_fast_decoding_changes_embeddings_little_and_changes_the_fingerprint(
    tmp_path: Path,
) -> None:
    picture = Image.open(io.BytesIO(shard_files.picture(3))).convert("RGB").resize((900, 700))
    stream = io.BytesIO()
    picture.save(stream, "JPEG")
    shard_files.write(tmp_path / "0.tar", [("a.jpg", stream.getvalue()), ("a.txt", b"a red star")])
    (shard,) = list_shards([str(tmp_path / "0.tar")])
    rows = []
    for fast in (False, True):
        config = EmbedConfig(shards=(str(tmp_path),), batch_size=1, fast_decode=fast)
        out = Folder(str(tmp_path / f"o{fast}"))
        embed.embed_shard(report=lambda done: None, out=out, shard=shard, config=config)
        with np.load(tmp_path / f"o{fast}/metadata/0.npz") as arrays:
            rows.append(arrays["tiny_img"][0].astype(np.float64))
    assert (rows[0] != rows[1]).any()
    assert rows[0] @ rows[1] > 0.999


def test_a_model_that_fails_ends_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2filter.models import clip

    shard_files.write(tmp_path / "0.tar", shard_files.members("a", 1) + shard_files.members("b", 2))
    (shard,) = list_shards([str(tmp_path / "0.tar")])

    def fail(self: Any, batch: clip.Batch) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(clip.Clip, "encode", fail)
    config = EmbedConfig(shards=(str(tmp_path),), batch_size=1)
    with pytest.raises(RuntimeError, match="no such kernel"):
        embed.embed_shard(
            report=lambda done: None, out=Folder(str(tmp_path / "o")), shard=shard, config=config
        )
    assert not (tmp_path / "o/metadata").exists()


def test_pictures_in_memory_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they take no more than the largest that is allowed; that one comes alone."""
    config = EmbedConfig(shards=("s",), max_pixels=40 * 40)
    most = memory_of.decoded_pictures(config.max_pixels)
    assert most == 40 * 40 * 20
    inside: dict[int, int] = {}
    sums, counts = [], []

    def transform(picture: Image.Image) -> Any:
        inside[threading.get_ident()] = picture.width * picture.height * 20
        time.sleep(0.02)
        sums.append(sum(inside.values()))
        counts.append(len(inside))
        del inside[threading.get_ident()]
        return first_pixel(picture)

    monkeypatch.setattr(decode, "BYTES_A_PIXEL", {})
    sizes = [40] * 6 + [20] * 24 + [40] * 6
    samples = [
        sample(shard_files.png(Image.new("RGB", (size, size))), str(i))
        for i, size in enumerate(sizes)
    ]
    got = list(decoded(iter(samples), transform, max_pixels=40 * 40))
    assert [item.sample.key for item in got] == [str(i) for i in range(36)]
    assert max(sums) <= most
    assert max(counts) == 4


PEAK = """
import sys
from concurrent.futures import ThreadPoolExecutor
import torchvision.transforms as T
from PIL import Image
from d2filter.algorithm import sizes as memory_of
from d2filter.config import EmbedConfig
from d2filter.formats.webdataset import Sample
from d2filter.models.clip import Clip
from d2filter.engine import task
from d2filter.stages import decode

shrink = T.Compose([T.Resize(64), T.CenterCrop(64), T.ToTensor()])
model = Clip(None, shrink, str, "cpu", None)
config = EmbedConfig(shards=("s",), max_pixels=int(sys.argv[1]))

def run(content):
    samples = [Sample(key=str(i), image=content, caption="x") for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(decode.decoded(pool, iter(samples), model, config))
    assert all(isinstance(item, decode.Ready) for item in got), got

with open(sys.argv[2], "rb") as small:
    run(small.read())
for path in sys.argv[3:]:
    content = open(path, "rb").read()
    task.reset_peak_rss()
    before = task.peak_rss_bytes()
    run(content)
    print(task.peak_rss_bytes() - before)
"""


def test_decoding_takes_no_more_memory_than_the_task_requests(tmp_path: Path) -> None:
    """Four of the largest pictures that are allowed, by four threads."""
    wide, high = size = (2700, 2000)
    deep = np.arange(wide * high, dtype=np.uint32).astype(np.uint16).reshape(high, wide)
    layered = Image.new("RGBA", size, (9, 8, 7, 6))
    kinds = {
        "small": shard_files.picture(1),
        "gray16.png": shard_files.encoded(Image.fromarray(deep), "PNG", compress_level=1),
        "rgba.png": shard_files.encoded(layered, "PNG", compress_level=1),
        "progressive.jpg": shard_files.encoded(
            layered.convert("RGB"), "JPEG", progressive=True, subsampling=0
        ),
        "rgba.webp": shard_files.encoded(layered, "WEBP", method=0),
        "rgba.tiff": shard_files.encoded(layered, "TIFF", compression="tiff_lzw"),
        "rgba.avif": shard_files.encoded(layered, "AVIF", speed=10),
    }
    for name, content in kinds.items():
        (tmp_path / name).write_bytes(content)
    words = [
        sys.executable,
        "-c",
        PEAK,
        str(wide * high),
        *(str(tmp_path / name) for name in kinds),
    ]
    # what the C library keeps for later allocations is not what a picture takes
    setting = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=200, env=setting, check=False
    )
    assert done.returncode == 0, done.stderr
    asked = memory_of.decoded_pictures(wide * high)
    peaks = dict(zip(list(kinds)[1:], map(int, done.stdout.split()), strict=True))
    assert all(wide * high < peak <= asked for peak in peaks.values()), (peaks, asked)


def test_pictures_with_too_many_pixels_are_bad_and_say_so() -> None:
    from d2filter import config

    assert config.MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    large, fair = Image.new("L", (101, 100)), Image.new("L", (100, 100))
    contents = [
        shard_files.png(large),
        shard_files.png(fair),
        shard_files.encoded(large, "WEBP"),
        shard_files.encoded(large, "TIFF"),
    ]
    contents.append(shard_files.png(Image.new("L", (300, 300))))  # which Pillow refuses by itself
    got = list(decoded((sample(c, str(i)) for i, c in enumerate(contents)), max_pixels=10_000))
    assert [getattr(item, "reason", "") for item in got] == [
        "too many pixels", "", "too many pixels", "too many pixels", "too many pixels"
    ]  # fmt: skip
    assert got[0].message == ("101 × 100 has 10100 pixels, at most 10000 are read (--max-pixels)")
    assert "--max-pixels" in got[4].message
    assert config.MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    # a limit above Pillow's own holds too
    assert isinstance(next(decoded(iter([sample(contents[0])]), max_pixels=10**12)), decode.Ready)


def test_a_tile_of_a_small_tiff_may_not_be_large() -> None:
    """It is decoded whole: 16 pixels would take gigabytes."""
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 322: 30_000, 323: 30_000, 324: 200, 325: 256}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(400)
    (got,) = decoded(iter([sample(content)]))
    assert (got.reason, got.message) == (
        "too many pixels",
        "a tile of the picture has 900000000 pixels, at most 89478485 are read (--max-pixels)",
    )


@pytest.mark.parametrize(
    ("begin", "reason", "said"),
    [
        (b"\0\0\0\x0cjP  \r\n\x87\n", "unread format", "it is a JPEG 2000 picture; JPEG, PNG,"),
        (b"\0\0\0\x20ftypheic", "unread format", "it is a HEIC picture; "),
        (b"8BPS", "unread format", "it is a PSD picture; "),
        (b"%!PS-Adobe", "unread format", "it is a PostScript file; "),
        (b"<!doctype html><title>404", "unread format", "it is an HTML page; "),
        (b"\x89PNG\r\n\x1a\n", "broken image", "it begins like a PNG picture and is none"),
        (
            b"\1\2\3\4\5\6\7\x08\x09",
            "broken image",
            "begins with the bytes 01 02 03 04 05 06 07 08",
        ),
    ],
)
def test_a_file_of_an_unsupported_format_is_bad_and_its_format_is_named(
    begin: bytes, reason: str, said: str
) -> None:
    (got,) = decoded(iter([sample(begin + bytes(100))]))
    assert got.reason == reason
    assert said in got.message
    assert "0x" not in got.message


@pytest.mark.parametrize("kind", ["AVIF", "TIFF", "JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats_are_read_by_their_content(kind: str) -> None:
    picture = Image.open(io.BytesIO(shard_files.picture(1)))
    (got,) = decoded(iter([sample(shard_files.encoded(picture, kind))]))
    assert (got.width, got.height) == picture.size


def translucent(mode: str) -> Image.Image:
    """A square picture of a mode, with what lies below transparent pixels in another color."""
    base = Image.open(io.BytesIO(shard_files.picture(4))).convert("RGB").resize((300, 300))
    mask = Image.new("L", base.size, 255)
    mask.paste(0, (60, 40, 250, 200))
    mask.paste(99, (10, 210, 200, 290))
    base.paste((255, 0, 180), (60, 40, 250, 200))
    if mode == "P+":
        palette = base.quantize(32)
        palette.info["transparency"] = bytes([0, 60, 120] + [255] * 29)
        return palette
    layered = base.convert("RGBA")
    layered.putalpha(mask)
    return layered.convert(mode) if mode in ("RGBA", "LA") else base.convert(mode)


MODES = {
    "RGBA": "PNG",
    "LA": "PNG",
    "P+": "PNG",
    "P": "PNG",
    "1": "PNG",
    "L": "PNG",
    "CMYK": "JPEG",
}


@pytest.mark.parametrize("mode", MODES)
def test_pictures_are_preprocessed_like_in_open_clips_training(mode: str) -> None:
    """webdataset's decoder as open_clip's trainer calls it, then the transform for training, with
    the whole picture in place of a part by chance.
    """
    import open_clip
    import torch
    import webdataset as wds

    content = shard_files.encoded(translucent(mode), MODES[mode])
    whole = open_clip.transform.AugmentationCfg(scale=(1.0, 1.0))
    train = open_clip.image_transform(64, is_train=True, aug_cfg=whole)
    extension = "jpg" if MODES[mode] == "JPEG" else "png"
    stage = wds.decode("pilrgb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's, of palettes
        (theirs,) = stage(iter([{"__key__": "a", extension: content}]))
    plain = open_clip.image_transform(64, is_train=False)
    (ours,) = decoded(iter([sample(content)]), plain)
    assert torch.equal(train(theirs[extension]), ours.tensor)
    assert ours.alpha == (mode in ("RGBA", "LA", "P+"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P+"])
@pytest.mark.parametrize(("alpha", "value"), [("white", 255), ("black", 0)])
def test_transparent_pictures_are_put_on_a_ground(mode: str, alpha: str, value: int) -> None:
    seen: list[Any] = []

    def transform(picture: Image.Image) -> Any:
        seen.append(np.asarray(picture.convert("RGB")).astype(int))
        return first_pixel(picture)

    picture = translucent(mode)
    (got,) = decoded(iter([sample(shard_files.encoded(picture, "PNG"))]), transform, alpha=alpha)
    assert got.alpha
    layered = np.asarray(picture.convert("RGBA")).astype(float)
    share = layered[..., 3:] / 255
    expected = share * layered[..., :3] + (1 - share) * value
    assert np.abs(seen[0] - expected).max() <= 1
    if mode != "P+":
        assert (seen[0][50:190, 70:240] == value).all()


def test_opaque_pictures_have_no_alpha_in_any_mode() -> None:
    opaque = Image.open(io.BytesIO(shard_files.picture(1))).convert("RGBA")
    (got,) = decoded(iter([sample(shard_files.png(opaque))]))
    assert not got.alpha
    # 16 bits of gray with a transparent value: Pillow cannot layer it
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    (got,) = decoded(iter([sample(shard_files.encoded(deep, "PNG", transparency=0))]))
    assert isinstance(got, decode.Ready)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_of_16_bits_is_scaled_in_parts_like_at_once(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(decode, "GRAY_PIXELS", 1000)
    values = np.random.default_rng(0).integers(0, 65536, (77, 90), dtype=np.uint16)
    seen: list[Any] = []

    def transform(picture: Image.Image) -> Any:
        seen.append(np.asarray(picture))
        return first_pixel(picture)

    list(decoded(iter([sample(shard_files.encoded(Image.fromarray(values), kind))]), transform))
    assert (seen[0] == values // 257).all()
    wide = Image.fromarray(values.astype(np.int32) * 3 - 40_000)
    whole = (np.asarray(wide).astype(np.float64) / 257).clip(0, 255).astype("u1")
    assert (np.asarray(decode._eight_bit(wide)) == whole).all()


def test_pictures_of_one_color_are_counted() -> None:
    import open_clip

    transform = open_clip.image_transform(32, is_train=False)
    spot = Image.new("RGB", (64, 64), "white")
    spot.paste("black", (30, 30, 40, 40))
    flat = [Image.new("RGBA", (50, 40), (9, 9, 9, 0)), Image.new("L", (70, 70), 255), spot]
    samples = [sample(shard_files.png(picture)) for picture in flat]
    assert [got.one_color for got in decoded(iter(samples), transform)] == [True, True, False]


REPEAT = """
import sys
from pathlib import Path
from d2filter.algorithm import sizes as memory_of
from d2filter.config import EmbedConfig
from d2filter.formats.paths import Folder
from d2filter.formats.webdataset import shard_at
from d2filter.stages import decode, embed

shard, out = sys.argv[1:]
config = EmbedConfig(shards=(shard,), batch_size=4)
embed.embed_shard(report=lambda done: None, out=Folder(out), shard=shard_at(shard), config=config)
"""


def test_the_ledger_of_a_dirty_shard_is_the_same_in_every_run(tmp_path: Path) -> None:
    """To the last byte: messages hold no addresses, and no order of threads."""
    jpg = shard_files.picture(1)
    bad = {
        "noise": bytes(range(256)), "cut": jpg[:300], "html": b"<html>", "gif": b"GIF89a",
        "jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "tiff": b"II*\0" + bytes(50),
        "webp": b"RIFF....WEBPVP8 ", "bmp": b"BM" + bytes(60), "png": b"\x89PNG\r\n\x1a\n",
        "avif": b"\0\0\0\x20ftypavif" + bytes(40),
    }  # fmt: skip
    files = shard_files.members("whole", 1)
    for key, content in bad.items():
        files += [(f"{key}.jpg", content), (f"{key}.txt", b"x")]
    for key, text in (("half", b'{"a":'), ("list", b"[]"), ("deep", b"[" * 99_999)):
        files += [(f"{key}.jpg", jpg), (f"{key}.json", text)]
    files += [("latin.jpg", jpg), ("latin.txt", b"\xff"), ("a.b.jpg", jpg), ("c.txt", b"x")]
    path = shard_files.write(tmp_path / "0.tar", files)
    # in another process, whose addresses differ, and in this one
    words = [sys.executable, "-c", REPEAT, str(path), str(tmp_path / "o")]
    subprocess.run(words, check=True, timeout=120)
    embed.embed_shard(
        report=lambda done: None, out=Folder(str(tmp_path / "p")),
        shard=shard_at(str(path)), config=EmbedConfig(shards=(str(path),), batch_size=4),
    )  # fmt: skip
    one, two = (tmp_path / out / "ledger/embed/0.parquet" for out in ("o", "p"))
    assert one.read_bytes() == two.read_bytes()
    told = pq.read_table(one).to_pylist()
    assert len(told) == len(bad) + 6
    assert not [entry for entry in told if re.search("0x[0-9a-f]{6}", entry["message"])]


def test_a_decoded_sample_that_waits_for_its_batch_holds_no_encoded_picture() -> None:
    picture = shard_files.picture(1)
    (ready,) = decoded(iter([sample(picture)]))
    assert ready.sample.image == b""
    assert embed._row(ready, shard())["sha256"] == hashlib.sha256(picture).hexdigest()


def shard() -> Any:
    from d2filter.formats.paths import FileInfo
    from d2filter.formats.webdataset import Shard

    return Shard("s/0.tar", FileInfo("0.tar", 0, ""), "0")


def test_picture_sizes_of_a_json_must_be_plausible() -> None:
    assert [embed._size(told, 7) for told in (640, "640", 0, -1, True, 2**31, 6.5, None)] == [
        640, 7, 7, 7, 7, 7, 7, 7
    ]  # fmt: skip


class Cluster(Runner):
    def uses_gpus(self) -> bool:
        return self.device != "cpu"


class Rehearsed(StageRun):
    """Notes what tasks request; the rehearsal took 3 GB on some device."""

    asked: ClassVar[dict[str, Any]] = {}
    found: ClassVar[str] = ""

    def run(self, label: str, tasks: Any, **options: Any) -> list[dict[str, Any]]:
        self.asked[self.stage] = options
        figures = {"device": self.found, "peak_rss_bytes": 3_000_000_000}
        counts = {"alpha": 2, "one_color": 3, "uids_replaced": 4}
        return [{**figures, **counts, "read": 1, "reasons": {}, "lost": ""} for _ in tasks]


def rehearsed(device: str, found: str) -> Rehearsed:
    Rehearsed.asked.clear()
    Rehearsed.found = found
    return Rehearsed(Cluster(Folder("memory://embed/o"), device=device), "embed", "f")


def build(steps: StageRun, batch_size: int) -> dict[str, Any]:
    config = EmbedConfig(shards=("s",), batch_size=batch_size)
    one = shard()
    plan = Plan(stage="embed", options={}, upstream="", inputs=(one.info, one.info))
    return embed.build(steps, [one, one], config, plan, {".json": 5})


@pytest.mark.parametrize(
    ("device", "found", "on_gpu"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("cpu", "cpu", False), ("cuda", "cuda", True)],
)
def test_shards_run_on_the_device_of_the_rehearsal_and_request_the_memory_that_it_took(
    device: str, found: str, on_gpu: bool
) -> None:
    """A GPU that torch cannot use is left to others, and the CPUs are shared."""
    steps = rehearsed(device, found)
    build(steps, 64)
    asked = steps.asked["embed"]
    assert (asked["on_gpu"], asked["share_node"]) == (on_gpu, True)
    assert steps.asked["embed-model"]["on_gpu"]
    # two batches of files of 1 MB, five of tensors of 336 × 336, and the largest picture
    model, decoding = 3_000_000_000, 20 * Image.MAX_IMAGE_PIXELS
    assert asked["memory"] == model + decoding + 128 * 2**20 + 5 * 64 * 3 * 336 * 336 * 4
    build(steps, 100_000)
    assert (
        steps.asked["embed"]["memory"]
        < model + decoding + (512 << 20) + 500_000 * 3 * 336 * 337 * 4
    )


def test_alerts_about_a_pool_are_in_the_figures() -> None:
    figures = build(rehearsed("cpu", "cpu"), 64)
    counts = {name: figures[name] for name in ("alpha", "one_color", "uids_replaced", "left_out")}
    assert counts == {"alpha": 4, "one_color": 6, "uids_replaced": 8, "left_out": {".json": 5}}
    assert figures["alerts"] == ["not read, beside the shards: 5 .json"]


def test_a_torch_without_cuda_is_an_error_if_a_gpu_is_required() -> None:
    steps = rehearsed("cuda", "cpu")
    with pytest.raises(UsageError, match="device is cuda, but torch finds no GPU on a node"):
        build(steps, 64)
    assert "embed" not in steps.asked
