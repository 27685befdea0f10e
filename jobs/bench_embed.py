"""Benchmark: images per second of `embed` and of its parts, compared with the bare model.

    python -m jobs.bench_embed --results jobs/results/bench_embed.md

Measured are decoding, decoding with the model's own transform, the bare model on ready tensors, and
the task `embed_shard` from a shard on disk to a published pair. They take turns within one process,
because other programs use the machine too. ViT-B-32 has random weights, which take the same time as
trained ones. --device cuda runs the same parts with one GPU; --variants adds variants of the bare
model.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2filter.config import BUNDLED_MODEL, PRECISIONS, EmbedConfig
from d2filter.engine.task import assigned_cpus
from d2filter.formats import webdataset
from d2filter.formats.paths import Folder
from d2filter.models import clip
from d2filter.stages import embed
from d2filter.tools import scenes
from jobs.bench import made_by

DECODE, TRANSFORM, BARE, WHOLE = "decode", "decode + transform", "bare model", "end to end"
FAST = "end to end, --fast-decode"
# `draft` lets the JPEG decoder give 1/2, 1/4 or 1/8 of the size, at least so many times the input
DRAFTS = {"the same, draft ≥ 2 ×": 2, "the same, draft ≥ 1 ×": 1}
# (side of the grid in pixels, gray levels): what a lens and a sensor leave beside the drawn shapes
_NOISE = ((1, 2.0), (4, 7.0), (16, 16.0))
_QUALITY = 85
_DISTINCT = 16  # pictures of a size; a shard repeats them under other keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One model, and on what it is measured."""

    name: str
    model: str
    pretrained: str = ""
    precision: str = "fp32"
    sizes: tuple[tuple[int, int], ...] = ((640, 480), (1600, 1200))
    """of the pictures"""
    samples: int = 64
    """of a shard"""
    batch_size: int = 16
    turns: int = 3
    variants: bool = False
    """measure channels-last and torch.compile too"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """The parts on pictures of one size, turn by turn."""

    size: tuple[int, int]
    kilobytes: float
    """of a picture, on average"""
    samples: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """seconds of all CPUs: what neighbors on the machine change least"""
    drafts: dict[str, tuple[float, float]] = field(default_factory=dict)
    """of each draft: cosine to the plain embedding, (mean, least)"""

    def rate(self, part: str) -> float:
        """Median images a second."""
        return self.samples / statistics.median(self.seconds[part])

    def share(
        self, others: Sequence[str], slowest: bool = False, whole: str = WHOLE
    ) -> list[float]:
        """End to end as a share of what `others` allow, one value a turn: of their sum, as on the
        same processors, or of the slowest of them, as on processors of their own.
        """
        limit = max if slowest else sum
        theirs = zip(*(self.seconds[part] for part in others), strict=True)
        return [limit(t) / own for t, own in zip(theirs, self.seconds[whole], strict=True)]


def main() -> None:
    """Measure both models, write the results file."""
    parser = argparse.ArgumentParser(description="Time embed against its own model.")
    parser.add_argument("--results", default="jobs/results/bench_embed.md")
    parser.add_argument("--threads", type=int, default=0, help="CPUs of the task; 0: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64, help="of a shard")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--variants", action="store_true")
    arguments = parser.parse_args()
    common = {
        name: getattr(arguments, name)
        for name in ("precision", "batch_size", "samples", "turns", "variants")
    }
    with tempfile.TemporaryDirectory() as root:
        settings = [
            Setting(
                name="ViT-B-32, random weights",
                model="ViT-B-32",
                pretrained=random_weights(Path(root, "weights.pt"), "ViT-B-32"),
                **common,
            ),
            Setting(name="the bundled model", model=BUNDLED_MODEL, **common),
        ]
        lines = _report(_as_task(settings, Path(root), arguments), settings, arguments)
    Path(arguments.results).write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def _as_task(
    settings: Sequence[Setting], root: Path, arguments: argparse.Namespace
) -> list[list[Timing]]:
    """`measure` of each setting, in a task of Ray's with the CPUs and the GPU of `embed`'s own."""
    import ray

    cpus = arguments.threads or os.cpu_count() or 1
    gpus = 1 if arguments.device == "cuda" else 0
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        task = ray.remote(num_cpus=cpus, num_gpus=gpus)(measure)
        return [ray.get(task.remote(one, root / str(i))) for i, one in enumerate(settings)]
    finally:
        ray.shutdown()


def random_weights(path: Path, model: str) -> str:
    """The path of a file of weights that nobody has trained, written there."""
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model(model).state_dict(), path)
    return str(path)


def measure(setting: Setting, root: Path) -> list[Timing]:
    """All parts on each size of pictures, turn by turn. Files are made under `root`."""
    import torch

    root.mkdir(parents=True)
    # once, for its shapes are those of all sizes
    config = EmbedConfig(
        shards=(str(root),),
        model=setting.model,
        pretrained=setting.pretrained,
        precision=setting.precision,
        batch_size=setting.batch_size,
    )
    embed.check_model(report=_nobody, config=config)
    model = embed._load(config)
    cpus = assigned_cpus()
    timings, parts = [], []
    for width, height in setting.sizes:
        pictures = [picture(seed, width, height) for seed in range(min(setting.samples, _DISTINCT))]
        pictures = [pictures[i % len(pictures)] for i in range(setting.samples)]
        captions = [_caption(i) for i in range(setting.samples)]
        shard = write_shard(root / f"{width}.tar", pictures, captions)
        timing = Timing(
            size=(width, height),
            kilobytes=statistics.fmean(len(p) for p in pictures) / 1e3,
            samples=setting.samples,
        )
        timing.drafts.update(_moved(model, pictures[:_DISTINCT]))
        timings.append(timing)
        parts.append(_parts(model, config, shard, pictures, captions, cpus, root))
        if setting.variants and len(parts) == 1:  # a forward pass does not know the pictures' size
            parts[-1].update(_variants(model, pictures, captions, setting.batch_size))
    with ThreadPoolExecutor(cpus) as pool:  # its threads start, and code is loaded
        list(pool.map(lambda _: _decoded(pictures[0]), range(cpus)))
    for _ in range(setting.turns):
        for timing, runs in zip(timings, parts, strict=True):
            for name, run in runs.items():
                torch.set_num_threads(cpus)
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                timing.cpu.setdefault(name, []).append(time.process_time() - cpu)
                timing.seconds.setdefault(name, []).append(time.perf_counter() - wall)
    return timings


def _parts(
    model: clip.Clip,
    config: EmbedConfig,
    shard: webdataset.Shard,
    pictures: list[bytes],
    captions: list[str],
    cpus: int,
    root: Path,
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    side = _side(model)

    def by_threads(work: Callable[[bytes], object]) -> Callable[[], object]:
        def run() -> None:
            with ThreadPoolExecutor(cpus) as pool:
                for _ in pool.map(work, pictures):
                    pass

        return run

    runs: dict[str, Callable[[], object]] = {
        DECODE: by_threads(_decoded),
        TRANSFORM: by_threads(partial(_transformed, model)),
    }
    for name, times in DRAFTS.items():
        runs[name] = by_threads(partial(_drafted, model, times * side))
    runs[BARE] = _bare(model, model.model, pictures, captions, config.batch_size)
    out = Folder(str(root / "out"))
    fast = replace(config, fast_decode=True)
    runs[WHOLE] = lambda: embed.embed_shard(report=_nobody, out=out, shard=shard, config=config)
    runs[FAST] = lambda: embed.embed_shard(report=_nobody, out=out, shard=shard, config=fast)
    return runs


def _bare(
    model: clip.Clip, network: Any, pictures: list[bytes], captions: list[str], batch_size: int
) -> Callable[[], object]:
    """Both towers on tensors that lie ready where the model is."""
    import torch

    ready = torch.stack([_transformed(model, p) for p in pictures])
    images = torch.split(ready.to(model.device, model.dtype), batch_size)
    texts = torch.split(model.tokenize(captions).to(model.device), batch_size)

    def run() -> None:
        with torch.inference_mode():
            for image, text in zip(images, texts, strict=True):
                network.encode_image(image).cpu()  # waits for a GPU
                network.encode_text(text).cpu()

    return run


def _variants(
    model: clip.Clip, pictures: list[bytes], captions: list[str], batch_size: int
) -> dict[str, Callable[[], object]]:
    """Other ways to run the same network; they have compiled what they compile."""
    import copy

    import torch

    network: Any = copy.deepcopy(model.model)
    network.to(memory_format=torch.channels_last)
    compiled: Any = copy.deepcopy(model.model)
    compiled.encode_image = torch.compile(compiled.encode_image)
    compiled.encode_text = torch.compile(compiled.encode_text)
    runs = {
        f"{BARE}, channels-last": _bare(model, network, pictures, captions, batch_size),
        f"{BARE}, torch.compile": _bare(model, compiled, pictures, captions, batch_size),
    }
    for run in runs.values():
        run()
    return runs


def _moved(model: clip.Clip, pictures: list[bytes]) -> dict[str, tuple[float, float]]:
    """How far `draft` moves embeddings: mean and least cosine to the plain ones."""

    def embedded(tensors: list[Any]) -> Any:
        batch = model.prepare(tensors, [""] * len(tensors), len(tensors))
        rows = model.encode(batch)[0].astype(np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # float16 had rounded them

    side = _side(model)
    plain = embedded([_transformed(model, p) for p in pictures])
    out = {}
    for name, times in DRAFTS.items():
        cosine = (plain * embedded([_drafted(model, times * side, p) for p in pictures])).sum(
            axis=1
        )
        out[name] = (float(cosine.mean()), float(cosine.min()))
    return out


def _decoded(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _transformed(model: clip.Clip, content: bytes) -> Any:
    return model.transform(Image.open(io.BytesIO(content)))


def _drafted(model: clip.Clip, side: int, content: bytes) -> Any:
    """The same, decoded at the least of a JPEG's own sizes with a short side of `side` or more."""
    image = Image.open(io.BytesIO(content))
    short = min(image.size)
    if short > side:
        image.draft(None, (image.width * side // short, image.height * side // short))
    return model.transform(image)


def _side(model: clip.Clip) -> int:
    return int(model.transform(Image.new("RGB", (64, 64))).shape[-1])


def picture(seed: int, width: int, height: int) -> bytes:
    """A JPEG of a drawn scene under noise of several scales, which takes as many bytes as a
    photograph of that size.
    """
    rng = np.random.default_rng(seed)
    # drawing has a price that grows with the area; its edges need no more than this
    drawn = scenes.draw(scenes.random_scene(rng), max(16, max(width, height) // 2))
    canvas = np.asarray(drawn.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    for grid, levels in _NOISE:
        shape = (-(-height // grid), -(-width // grid), 3)
        noise = np.clip(128 + levels * rng.standard_normal(shape, np.float32), 0, 255)
        image = Image.fromarray(noise.astype(np.uint8))
        canvas = canvas + np.asarray(image.resize((width, height)), np.float32) - 128
    stream = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()


def _caption(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return scenes.caption(scenes.random_scene(rng), rng)


def write_shard(path: Path, pictures: list[bytes], captions: list[str]) -> webdataset.Shard:
    """A tar with a jpg and a txt of each sample."""
    with tarfile.open(path, "w") as archive:
        for i, (image, caption) in enumerate(zip(pictures, captions, strict=True)):
            for extension, content in (("jpg", image), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{i:06d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    (shard,) = webdataset.list_shards([str(path)])
    return shard


def _nobody(done: int) -> None:
    """Progress that nobody watches."""


def _report(
    measured: list[list[Timing]], settings: Sequence[Setting], arguments: argparse.Namespace
) -> list[str]:
    first = settings[0]
    cpus = arguments.threads or os.cpu_count()
    options = f"A task of {cpus} CPUs on {arguments.device}, {first.precision}"
    lines = [
        "# Embedding, against the bare model",
        "",
        f"{made_by('jobs.bench_embed')} {options}; shards of {first.samples} samples, batches of "
        f"{first.batch_size}, medians of {first.turns} turns of all parts. The machine is shared: "
        "read the ratios, which are taken turn by turn, and the CPU time.",
        "",
        "Pictures are drawn scenes under noise of several scales, saved as JPEG. The bare model is "
        "both towers on tensors that lie ready; end to end is the task `embed_shard`, from the "
        "shard on disk to the published pair. What embeddings of random weights do under `draft` "
        "tells little: read the bundled model's.",
    ]
    for setting, timings in zip(settings, measured, strict=True):
        lines += ["", f"## {setting.name}", ""]
        lines += ["| picture | part | images/s | CPU ms an image |", "|---|---|---|---|"]
        for t in timings:
            kind = f"{t.size[0]} × {t.size[1]}, {t.kilobytes:.0f} kB"
            for part in t.seconds:
                cpu = 1e3 * statistics.median(t.cpu[part]) / t.samples
                lines.append(f"| {kind} | {part} | {t.rate(part):,.1f} | {cpu:.1f} |")
        lines += ["", "| picture | end to end by the bare model | by the slower of transform and "]
        lines[-1] += "model | by both, one after the other | in CPU time, by the bare model |"
        lines[-1] += " the same with --fast-decode, by the bare model |"
        lines.append("|---|---|---|---|---|---|")
        for t in timings:
            both = [TRANSFORM, BARE]
            spent = [b / w for b, w in zip(t.cpu[BARE], t.cpu[WHOLE], strict=True)]
            fast = t.share([BARE], whole=FAST)
            cells = [t.share([BARE]), t.share(both, slowest=True), t.share(both), spent, fast]
            lines.append(f"| {t.size[0]} × {t.size[1]} | {' | '.join(map(_shares, cells))} |")
        lines += ["", "| picture | JPEG `draft` | cosine to the plain embedding, mean | least |"]
        lines.append("|---|---|---|---|")
        for t in timings:
            for name, (mean, least) in t.drafts.items():
                size = f"{t.size[0]} × {t.size[1]}"
                lines.append(f"| {size} | {name.split(', ')[1]} | {mean:.5f} | {least:.5f} |")
    return lines


def _shares(values: list[float]) -> str:
    return f"{statistics.median(values):.0%} ({min(values):.0%} to {max(values):.0%})"


if __name__ == "__main__":
    main()
