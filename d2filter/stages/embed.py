"""Shards → metadata: one shard a task, decoded by threads beside the model (DESIGN §6)."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np

from d2filter.config import EmbedConfig
from d2filter.errors import InputError, UsageError
from d2filter.formats import ledger, metadata, webdataset
from d2filter.formats.paths import Checksums, Folder
from d2filter.formats.runstate import Plan
from d2filter.models import clip
from d2filter.stages.runner import Runner
from d2filter.stages.worker import Report, Task, assigned_cpus, assigned_gpu, checksums_of

_LONGEST_RATIO = 1000  # the transform scales the short side up: 1 × 60,000 would take gigabytes
_LARGE_PIXELS = 1 << 24  # of such pictures one at a time is decoded, or threads would add up
_DRAFT_TIMES = 2  # cosines to plain embeddings of 0.9999 on average (jobs/bench_embed.py)
_PICTURE_BYTES = 1 << 20  # of a file, more than most
_TENSOR_BYTES = 3 * 336 * 336 * 4  # of the largest common input
_AHEAD_BYTES = 512 << 20  # of encoded pictures that wait for a thread
# a context is some 77 tokens, and the time of tokenizers is quadratic in the length of a word
_LONGEST_CAPTION = 4096


def build(
    runner: Runner,
    out: Folder,
    shards: Sequence[webdataset.Shard],
    config: EmbedConfig,
    plan: Plan,
) -> dict[str, Any]:
    """Embed all shards into OUT/metadata; returns the stage's figures.

    A shard that an earlier attempt embedded in the same way, and that did not change, is kept.
    """
    fingerprint = plan.fingerprint
    rehearsed = _rehearse(runner, config, fingerprint)
    tasks = [
        Task(
            name=shard.name,
            run=embed_shard,
            arguments={"out": out, "shard": shard, "config": config},
            fingerprint=plan.fingerprint_of(part),
        )
        for shard, part in zip(shards, plan.inputs, strict=True)
    ]
    done = runner.map(
        "embed", tasks, fingerprint=fingerprint, label="embed", share_node=True,
        on_gpu=rehearsed["device"] == "cuda",
        memory=rehearsed["peak_rss_bytes"] + _beside_the_model(config.batch_size),
    )  # fmt: skip
    reasons = sum((Counter(figures["reasons"]) for figures in done), Counter())
    read = sum(figures["read"] for figures in done)
    lost = [figures["lost"] for figures in done if figures["lost"]]
    if read == sum(reasons.values()):
        what = [f"{count} {reason}" for reason, count in reasons.most_common(3)] + lost[:1]
        raise InputError(
            f"none of {read} samples in {len(shards)} shards can be embedded "
            f"({', '.join(what) or 'the shards are empty'})"
        )
    return {
        "samples": {"read": read, "bad": sum(reasons.values())},
        "bad_reasons": dict(reasons.most_common()),
        "lost_shards": lost,
        "shards": len(shards),
        "checksums": checksums_of(done),
        "device": sorted({figures["device"] for figures in done}),
        "peak_rss": max(figures["peak_rss_bytes"] for figures in done),
    }


def _rehearse(runner: Runner, config: EmbedConfig, fingerprint: str) -> dict[str, Any]:
    """Figures of `check_model` where shards will be embedded: once, before all of them would find
    out one by one that the model cannot be had. Raises UsageError when it must run on GPUs and
    torch sees none there.
    """
    kind = "gpu" if runner.uses_gpus() else "cpu"
    task = Task(name=f"model-{kind}", run=check_model, arguments={"config": config})
    (figures,) = runner.map(
        "embed-model", [task], fingerprint=fingerprint, label="model", on_gpu=True
    )
    if runner.device == "cuda" and figures["device"] != "cuda":
        raise UsageError(
            "device is cuda, and torch sees none on a node that Ray counts a GPU of: install a "
            "torch with CUDA there, or take --device auto"
        )
    return figures


def check_model(*, report: Report, config: EmbedConfig) -> dict[str, Any]:
    """Task: load the model where shards will be embedded, and run one batch; the worker keeps it.
    Its peak of memory is what a task needs beside its pictures.
    """
    model = _load(config)
    clip.use_threads(assigned_cpus())
    clip.rehearse(model, config.batch_size)
    return {"device": model.device}


def _beside_the_model(batch_size: int) -> int:
    """Bytes of pictures that are decoded ahead: two batches, as files and then as tensors, and
    three that the model has or is to have.
    """
    return min(2 * batch_size * _PICTURE_BYTES, _AHEAD_BYTES) + 5 * batch_size * _TENSOR_BYTES


def _load(config: EmbedConfig) -> clip.Clip:
    return clip.load(config.model, config.pretrained, config.precision, assigned_gpu())


def embed_shard(
    *, report: Report, out: Folder, shard: webdataset.Shard, config: EmbedConfig
) -> dict[str, Any]:
    """Task: decode and embed one shard, write its pair and its ledger part."""
    model = _load(config)
    cpus = assigned_cpus()
    clip.use_threads(cpus)
    rows: list[dict[str, Any]] = []
    images: list[np.ndarray[Any, Any]] = []
    texts: list[np.ndarray[Any, Any]] = []
    entries: list[ledger.Entry] = []
    batch: list[_Ready] = []
    lost = ""

    def keep(embedded: Future[tuple[clip.F16, clip.F16]]) -> None:
        image, text = embedded.result()
        images.append(image)
        texts.append(text)
        report(len(image))

    # the model runs beside this thread, which makes the next batch ready meanwhile
    with ThreadPoolExecutor(1, "model") as runs:
        line = _Line(runs, keep)

        def flush() -> None:
            tensors = [ready.tensor for ready in batch]
            captions = [_tokenizable(ready.sample.caption) for ready in batch]
            rows.extend(_row(ready, shard) for ready in batch)
            batch.clear()
            line.add(model.encode, model.prepare(tensors, captions, config.batch_size))

        try:
            # decoding releases the interpreter lock and waits for no device: two threads a CPU
            with warnings.catch_warnings(), ThreadPoolExecutor(max(4, 2 * cpus), "decode") as pool:
                # once for all threads: a large picture is not hostile, and PIL warns of palettes
                warnings.simplefilter("ignore")
                samples = webdataset.read_samples(shard)
                side = _DRAFT_TIMES * model.side if config.fast_decode else 0
                for item in _decoded(pool, samples, model, config.batch_size, side):
                    if isinstance(item, _Ready):
                        batch.append(item)
                    else:
                        entries.append(_entry(item, shard))
                        report(1)
                    if len(batch) == config.batch_size:
                        flush()
        except webdataset.LostTail as error:
            lost = f"{shard.address}: {error}"
        if batch:
            flush()
        line.finish()
    folder = out.sub("metadata")
    sums: Checksums = {}
    if not rows:
        # an earlier version of this shard may have left a pair
        folder.remove(f"{shard.name}.parquet")
        folder.remove(f"{shard.name}.npz")
    else:
        sums = metadata.publish_pair(
            folder,
            shard.name,
            config.resolved_arch,
            rows,
            np.concatenate(images),
            np.concatenate(texts),
        )
    ledger.publish_entries(out, "embed", shard.name, entries)
    return {
        "read": len(rows) + len(entries),
        "reasons": dict(Counter(entry.reason for entry in entries)),
        "lost": lost,
        "device": model.device,
        "url": shard.address,
        "checksums": sums,
    }


class _Line:
    """Calls that wait for one thread: their results come in order, and at most two wait."""

    def __init__(self, runs: ThreadPoolExecutor, keep: Callable[[Future[Any]], None]) -> None:
        self._runs = runs
        self._keep = keep
        self._waiting: deque[Future[Any]] = deque()

    def add(self, run: Callable[[Any], Any], argument: Any) -> None:
        """Raises what an earlier call raised."""
        while len(self._waiting) > 1:
            self._keep(self._waiting.popleft())
        self._waiting.append(self._runs.submit(run, argument))

    def finish(self) -> None:
        """Wait for all of them."""
        while self._waiting:
            self._keep(self._waiting.popleft())


@dataclass(frozen=True, slots=True)
class _Ready:
    """A sample whose picture is decoded and transformed; the encoded one is let go."""

    sample: webdataset.Sample
    sha256: str
    """of the encoded picture"""
    tensor: Any
    width: int
    height: int


def _decoded(
    pool: ThreadPoolExecutor,
    samples: Iterator[webdataset.Sample],
    model: clip.Clip,
    batch_size: int,
    side: int = 0,
) -> Iterator[_Ready | webdataset.Sample]:
    """Samples in order, decoded ahead by at most two batches; unusable ones as they are. side: that
    JPEGs must keep when they are decoded at a part of their size; 0 for all of it.

    The samples before a LostTail are handed out before it is raised.
    """
    waiting: deque[tuple[int, Future[_Ready | webdataset.Sample]]] = deque()
    ahead = 0
    one_large = Lock()
    lost: webdataset.LostTail | None = None
    try:
        for sample in samples:
            size = len(sample.image)
            waiting.append((size, pool.submit(_decode, sample, model, one_large, side)))
            ahead += size
            while len(waiting) > 2 * batch_size or ahead > _AHEAD_BYTES:
                size, future = waiting.popleft()
                ahead -= size
                yield future.result()
    except webdataset.LostTail as error:
        lost = error
    while waiting:
        yield waiting.popleft()[1].result()
    if lost is not None:
        raise lost


def _decode(
    sample: webdataset.Sample, model: clip.Clip, one_large: Lock, side: int
) -> _Ready | webdataset.Sample:
    """The first frame, as open_clip's own transform sees it: it does not turn by EXIF."""
    from PIL import Image

    if sample.reason:
        return sample
    try:
        with Image.open(io.BytesIO(sample.image), formats=webdataset.IMAGE_FORMATS) as picture:
            width, height = picture.size
            if max(width, height) > _LONGEST_RATIO * min(width, height):
                raise ValueError(f"{width} × {height} is longer than {_LONGEST_RATIO} : 1")
            shorter = min(width, height)
            if shorter > side > 0:
                # the least of its own sizes that holds this one; of JPEGs alone
                picture.draft(None, (width * side // shorter, height * side // shorter))
            with one_large if width * height > _LARGE_PIXELS else nullcontext():
                tensor = model.transform(_eight_bit(picture))
        sha256 = hashlib.sha256(sample.image).hexdigest()
        return _Ready(replace(sample, image=b""), sha256, tensor, width, height)
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        return webdataset.Sample(
            key=sample.key,
            uid=sample.uid,
            reason="broken image",
            message=webdataset.clean(f"{type(error).__name__}: {error}")[:300],
        )


def _eight_bit(picture: Any) -> Any:
    """16-bit gray scaled to 8 bits; PIL's own conversion cuts everything above 255 to white."""
    from PIL import Image

    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray((np.asarray(picture).astype(np.float64) / 257).clip(0, 255).astype("u1"))


def _tokenizable(caption: str) -> str:
    """What the model can see of a caption."""
    if len(caption) <= _LONGEST_CAPTION:
        return caption
    return " ".join(caption.split())[:_LONGEST_CAPTION]


def _row(ready: _Ready, shard: webdataset.Shard) -> dict[str, Any]:
    meta = ready.sample.meta
    url, sha256 = meta.get("url"), meta.get("sha256")
    told = isinstance(sha256, str) and webdataset.encodable(sha256)
    return {
        "uid": ready.sample.uid,
        "url": webdataset.clean(url) if isinstance(url, str) else None,
        "text": ready.sample.caption,
        "original_width": _size(meta.get("original_width"), ready.width),
        "original_height": _size(meta.get("original_height"), ready.height),
        "sha256": sha256 if told else ready.sha256,
        "key": ready.sample.key,
        "shard": shard.address,
    }


def _size(told: object, decoded: int) -> int:
    """What the json says, when it is a sensible number, else the size of the stored picture."""
    return told if type(told) is int and 0 < told < 2**31 else decoded


def _entry(sample: webdataset.Sample, shard: webdataset.Shard) -> ledger.Entry:
    return ledger.Entry(
        stage="embed",
        status="bad",
        reason=sample.reason,
        message=sample.message,
        shard=shard.address,
        key=sample.key,
        uid=sample.uid,
    )
