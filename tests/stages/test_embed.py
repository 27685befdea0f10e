"""How pictures are decoded beside the model: ahead, but not without bounds."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shards as made
from PIL import Image

from d2filter.config import EmbedConfig
from d2filter.errors import UsageError
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import Plan
from d2filter.formats.webdataset import LostTail, Sample, list_shards
from d2filter.models.clip import Clip
from d2filter.stages import embed


def decoded(
    samples: Iterator[Sample], transform: Any = lambda picture: 0, side: int = 0
) -> Iterator[Any]:
    model = Clip(model=None, transform=transform, tokenize=str, device="cpu", dtype=None)  # type: ignore[arg-type]
    with ThreadPoolExecutor(4) as pool:
        yield from embed._decoded(pool, samples, model, 8, side)


@pytest.mark.parametrize(("bound", "ahead"), [(1 << 30, 17), (10_000, 9)])
def test_encoded_pictures_wait_within_bounds(
    monkeypatch: pytest.MonkeyPatch, bound: int, ahead: int
) -> None:
    monkeypatch.setattr(embed, "_AHEAD_BYTES", bound)
    picture = made.picture(1).ljust(1250, b"\0")[:1250]
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


def test_the_next_batch_is_made_ready_while_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than two wait: the model is slower than what comes before it."""
    from d2filter.models import clip

    files: list[tuple[str, bytes]] = []
    for i in range(21):
        files += made.members(f"{i:03d}", i)
    made.write(tmp_path / "0.tar", files)
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
def test_fast_decoding_keeps_the_side_that_was_asked_for(
    size: tuple[int, int], kind: str, seen: tuple[int, int]
) -> None:
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, kind)
    sample = Sample(key="a", image=stream.getvalue(), caption="x")
    got: list[Any] = []
    (ready,) = decoded(iter([sample]), lambda picture: got.append(picture.size), side=400)
    assert got == [seen]
    assert (ready.width, ready.height) == size


def test_fast_decoding_leaves_embeddings_near_and_is_another_making(tmp_path: Path) -> None:
    picture = Image.open(io.BytesIO(made.picture(3))).convert("RGB").resize((900, 700))
    stream = io.BytesIO()
    picture.save(stream, "JPEG")
    made.write(tmp_path / "0.tar", [("a.jpg", stream.getvalue()), ("a.txt", b"a red star")])
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

    made.write(tmp_path / "0.tar", made.members("a", 1) + made.members("b", 2))
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


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_LARGE_PIXELS", 30 * 30)
    inside: dict[str, set[int]] = {"small": set(), "large": set()}
    together = {"small": 0, "large": 0}

    def transform(picture: Image.Image) -> int:
        kind = "large" if picture.size[0] > 30 else "small"
        here = threading.get_ident()
        inside[kind].add(here)
        time.sleep(0.02)
        together[kind] = max(together[kind], len(inside[kind]))
        inside[kind].discard(here)
        return 0

    def png(size: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (size, size)).save(stream, "PNG")
        return stream.getvalue()

    pictures = [png(40)] * 12 + [png(20)] * 12
    samples = (Sample(key=str(i), image=p, caption="x") for i, p in enumerate(pictures))
    assert len(list(decoded(samples, transform))) == 24
    assert together["large"] == 1
    assert together["small"] > 1


def test_what_waits_for_its_batch_holds_no_encoded_picture() -> None:
    picture = made.picture(1)
    (ready,) = decoded(iter([Sample(key="a", image=picture, caption="x")]))
    assert ready.sample.image == b""
    assert embed._row(ready, shard())["sha256"] == hashlib.sha256(picture).hexdigest()


def shard() -> Any:
    from d2filter.formats.paths import FileInfo
    from d2filter.formats.webdataset import Shard

    return Shard("s/0.tar", FileInfo("0.tar", 0, ""), "0")


def test_sizes_that_a_json_tells_must_be_sensible() -> None:
    assert [embed._size(told, 7) for told in (640, "640", 0, -1, True, 2**31, 6.5, None)] == [
        640, 7, 7, 7, 7, 7, 7, 7
    ]  # fmt: skip


class Rehearsed:
    """A runner that notes what is asked of it; the rehearsal took 3 GB on some device."""

    def __init__(self, device: str, found: str) -> None:
        self.device = device
        self._found = found
        self.asked: dict[str, Any] = {}

    def uses_gpus(self) -> bool:
        return self.device != "cpu"

    def map(self, stage: str, tasks: list[Any], **options: Any) -> list[dict[str, Any]]:
        self.asked[stage] = options
        figures = {"device": self._found, "peak_rss_bytes": 3_000_000_000}
        return [{**figures, "read": 1, "reasons": {}, "lost": ""} for _ in tasks]


def build(runner: Any, batch_size: int) -> None:
    config = EmbedConfig(shards=("s",), batch_size=batch_size)
    one = shard()
    plan = Plan(stage="embed", options={}, upstream="", inputs=(one.info,))
    embed.build(runner, Folder("memory://embed/o"), [one], config, plan)


@pytest.mark.parametrize(
    ("device", "found", "on_gpu"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("cpu", "cpu", False), ("cuda", "cuda", True)],
)
def test_shards_run_where_the_rehearsal_ran_and_ask_for_the_memory_that_it_took(
    device: str, found: str, on_gpu: bool
) -> None:
    """A GPU that torch cannot use is left to others, and the CPUs are shared."""
    runner = Rehearsed(device, found)
    build(runner, 64)
    asked = runner.asked["embed"]
    assert (asked["on_gpu"], asked["share_node"]) == (on_gpu, True)
    assert runner.asked["embed-model"]["on_gpu"]
    # two batches of files of 1 MB, and five of tensors of 336 × 336
    assert asked["memory"] == 3_000_000_000 + 128 * 2**20 + 5 * 64 * 3 * 336 * 336 * 4
    build(runner, 100_000)
    assert (
        runner.asked["embed"]["memory"] < 3_000_000_000 + (512 << 20) + 500_000 * 3 * 336 * 337 * 4
    )


def test_a_torch_without_cuda_is_told_to_those_who_must_have_it() -> None:
    runner = Rehearsed("cuda", "cpu")
    with pytest.raises(UsageError, match="device is cuda, and torch sees none on a node"):
        build(runner, 64)
    assert "embed" not in runner.asked
