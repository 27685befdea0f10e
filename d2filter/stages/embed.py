"""Stage embed: shards → metadata, one task per shard. Threads decode images while the model runs.

See docs/files.md#metadata.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from d2filter.algorithm import sizes
from d2filter.config import EmbedConfig
from d2filter.engine.stage_run import StageRun, Totals
from d2filter.engine.task import Figures, Report, Task, assigned_cpus, assigned_gpu
from d2filter.errors import InputError, UsageError
from d2filter.formats import ledger, metadata, shardlist, webdataset
from d2filter.formats.paths import Checksums, Folder
from d2filter.formats.runstate import Plan
from d2filter.models import clip
from d2filter.stages import decode
from d2filter.stages.decode import Ready

# a context is some 77 tokens, and the time of tokenizers is quadratic in the length of a word
_LONGEST_CAPTION = 4096
# counts of samples that are embedded, and may not be what they seem
_COUNTS = ("alpha", "one_color", "uids_replaced")


def build(
    steps: StageRun,
    shards: Sequence[webdataset.Shard],
    config: EmbedConfig,
    plan: Plan,
    left_out: dict[str, int],
) -> Figures:
    """Embed all shards into OUT/metadata; returns the stage's figures. left_out: what lies beside
    the shards, for the figures.

    A shard that an earlier attempt embedded in the same way, and that did not change, is kept.
    """
    rehearsed = _rehearse(steps, config)
    tasks = [
        Task(
            name=shard.name,
            run=embed_shard,
            arguments={"out": steps.out, "shard": shard, "config": config},
            fingerprint=plan.fingerprint_of(part),
        )
        for shard, part in zip(shards, plan.inputs, strict=True)
    ]
    done = steps.run(
        "embed", tasks, share_node=True, on_gpu=rehearsed["device"] == "cuda",
        memory=rehearsed["peak_rss_bytes"]
        + sizes.beside_model(config.batch_size, config.max_pixels),
    )  # fmt: skip
    reasons: Counter[str] = sum((Counter(figures["reasons"]) for figures in done), Counter())
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
        **{name: sum(figures[name] for figures in done) for name in _COUNTS},
        "left_out": left_out,
        "alerts": [f"not read, beside the shards: {shardlist.counted_by_kind(left_out)}"]
        if left_out
        else [],
        "device": sorted({figures["device"] for figures in done}),
    }


def _rehearse(steps: StageRun, config: EmbedConfig) -> Figures:
    """Run `check_model` once on the kind of worker that will embed shards, so that a missing model
    is one error and not one per shard; returns its figures.

    Raises UsageError if GPUs are required and torch finds none there.
    """
    runner = steps.runner
    kind = "gpu" if runner.uses_gpus() else "cpu"
    task = Task(name=f"model-{kind}", run=check_model, arguments={"config": config})
    rehearsal = replace(steps, stage="embed-model", memory=0, totals=Totals())
    (figures,) = rehearsal.run("model", [task], on_gpu=True)
    if runner.device == "cuda" and figures["device"] != "cuda":
        raise UsageError(
            "device is cuda, but torch finds no GPU on a node where Ray counts one: install a "
            "torch with CUDA there, or use --device auto"
        )
    return figures


def check_model(*, report: Report, config: EmbedConfig) -> Figures:
    """Task: load the model in the worker, which keeps it, and run one batch. The peak of memory is
    what a task needs beside its images.
    """
    model = _load(config)
    clip.use_threads(assigned_cpus())
    clip.rehearse(model, config.batch_size)
    return {"device": model.device}


def _load(config: EmbedConfig) -> clip.Clip:
    return clip.load(config.model, config.pretrained, config.precision, assigned_gpu())


def embed_shard(
    *, report: Report, out: Folder, shard: webdataset.Shard, config: EmbedConfig
) -> Figures:
    """Task: decode and embed one shard, write its pair and its ledger part."""
    model = _load(config)
    cpus = assigned_cpus()
    clip.use_threads(cpus)
    rows: list[dict[str, Any]] = []
    images: list[np.ndarray[Any, Any]] = []
    texts: list[np.ndarray[Any, Any]] = []
    entries: list[ledger.Entry] = []
    batch: list[Ready] = []
    counts: Counter[str] = Counter()
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
            with ThreadPoolExecutor(max(4, 2 * cpus), "decode") as pool:
                samples = webdataset.read_samples(shard)
                for item in decode.decoded(pool, samples, model, config):
                    if isinstance(item, Ready):
                        batch.append(item)
                        flags = (item.alpha, item.one_color, item.sample.replaced)
                        counts.update(dict(zip(_COUNTS, flags, strict=True)))
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
        **{name: counts[name] for name in _COUNTS},
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


def _tokenizable(caption: str) -> str:
    """The part of a caption that the model can use."""
    if len(caption) <= _LONGEST_CAPTION:
        return caption
    return " ".join(caption.split())[:_LONGEST_CAPTION]


def _row(ready: Ready, shard: webdataset.Shard) -> dict[str, Any]:
    meta = ready.sample.meta
    url, sha256 = meta.get("url"), meta.get("sha256")
    known = isinstance(sha256, str) and webdataset.encodable(sha256)
    return {
        "uid": ready.sample.uid,
        "url": webdataset.clean(url) if isinstance(url, str) else None,
        "text": ready.sample.caption,
        "original_width": _size(meta.get("original_width"), ready.width),
        "original_height": _size(meta.get("original_height"), ready.height),
        "sha256": sha256 if known else ready.sha256,
        "key": ready.sample.key,
        "shard": shard.address,
    }


def _size(given: object, decoded: int) -> int:
    """The size from the json, if it is a sensible number, else the size of the stored image."""
    return given if type(given) is int and 0 < given < 2**31 else decoded


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
