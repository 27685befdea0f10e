"""Train the bundled tiny CLIP on scenes that this script draws, and measure it.

    python -m jobs.train_tiny_clip --out d2filter/models/tiny --seed 0

It writes `weights.safetensors` and `figures.json`, and needs two cores, 2 GB of memory and no
network. The number of steps is fixed, so a slower machine takes longer and trains as much.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from d2filter.models import tiny
from d2filter.tools import scenes

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All that a training run depends on."""

    seed: int = 0
    """Seeds weights, pool, order and augmentation; held-out scenes take another stream."""
    pool: int = 51_200
    """Scenes that are drawn for training."""
    captions: int = 4
    """Captions per scene; every pass over the pool reads another one."""
    steps: int = 800
    """Optimizer steps: with these figures, four passes over the pool."""
    batch: int = 256
    """Pairs per step; each is contrasted with all others of the step."""
    learning_rate: float = 2e-3
    """Peak of the schedule: linear warm-up, then a cosine down to zero."""
    warmup: int = 80
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """AdamW's, on matrices only."""
    held_out: int = 1_000
    """Pairs that the figures are measured on."""
    threads: int = 2
    """torch threads, and processes that draw."""


def tiny_clip(seed: int = 0) -> TrainConfig:
    """The run whose weights are bundled."""
    return TrainConfig(seed=seed)


# --- data -----------------------------------------------------------------------------------


def compressed(image: Image.Image, quality: int) -> Image.Image:
    """The image after a round trip through JPEG, as every reader of a dataset sees it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def stream(rng: np.random.Generator, *, held_out: bool) -> Iterator[scenes.Scene]:
    """Endless scenes whose attributes are kept for measuring, or endless others."""
    while True:
        scene = scenes.random_scene(rng)
        if scenes.held_out(scene) == held_out:
            yield scene


def _draw_chunk(job: tuple[int, int, int, int]) -> Arrays:
    """`count` scenes: uint8 pictures [count, side, side, 3], int16 tokens [count, captions, L]."""
    seed, chunk, count, captions = job
    tiny.register()
    tokenize = open_clip.get_tokenizer(tiny.MODEL_NAME)
    side = open_clip.get_model_config(tiny.MODEL_NAME)["vision_cfg"]["image_size"]
    rng = np.random.default_rng([seed, 0, chunk])
    pictures = np.empty((count, side, side, 3), np.uint8)
    texts = []
    for row, scene in zip(range(count), stream(rng, held_out=False), strict=False):
        picture = scenes.draw(scene, side)
        pictures[row] = np.asarray(compressed(picture, int(rng.integers(75, 96))))
        texts += [scenes.caption(scene, rng) for _ in range(captions)]
    tokens = tokenize(texts).numpy().astype(np.int16)
    return pictures, tokens.reshape(count, captions, -1)


def draw_pool(config: TrainConfig, folder: Path, chunk: int = 1_000) -> Arrays:
    """The training pool, drawn by several processes; the pictures are mapped from `folder`.

    Chunks have seeds of their own, so the number of processes does not change the pool.
    """
    jobs = [
        (config.seed, i, min(chunk, config.pool - start), config.captions)
        for i, start in enumerate(range(0, config.pool, chunk))
    ]
    pictures = None
    tokens = []
    # "spawn": torch has threads by now, and a fork would inherit their locks.
    with multiprocessing.get_context("spawn").Pool(config.threads) as workers:
        results = tqdm(workers.imap(_draw_chunk, jobs), "draw", len(jobs), disable=None)
        for i, (drawn, read) in enumerate(results):
            if pictures is None:
                pictures = np.lib.format.open_memmap(
                    folder / "pictures.npy", "w+", np.uint8, (config.pool, *drawn.shape[1:])
                )
            pictures[i * chunk : i * chunk + len(drawn)] = drawn
            tokens.append(read)
    if pictures is None:
        raise ValueError(f"pool must be > 0, not {config.pool}")
    return pictures, np.concatenate(tokens)


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Near-copies of pictures, float32 [B, 3, H, W] in 0..1: crops and changes of color.

    It is what `scenes.jitter` does to one picture, so that near-copies embed near each other.
    """
    count = len(pictures)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator)

    # A third stays uncropped: what is embedded later mostly is.
    keep = torch.where(uniform(0, 1) < 1 / 3, 1.0, uniform(0.9, 1.0)).view(-1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = keep
    theta[:, 0, 2] = (1 - keep) * uniform(-1, 1).view(-1)
    theta[:, 1, 2] = (1 - keep) * uniform(-1, 1).view(-1)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    out = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    out = out * uniform(0.9, 1.1)
    mean = out.mean(dim=(1, 2, 3), keepdim=True)
    out = mean + (out - mean) * uniform(0.9, 1.1)
    gray = out.mean(dim=1, keepdim=True)
    return (gray + (out - gray) * uniform(0.9, 1.1)).clamp_(0, 1)


# --- training -------------------------------------------------------------------------------


def encode_text_cropped(model: Any, tokens: Tensor, parts: int = 4) -> Tensor:
    """`model.encode_text`, without computing the padding; float32 [B, embed_dim], normalized.

    The mask is causal, so positions after the end of a text cannot change its embedding: sorted
    by length and cut to the longest of each part, the batch needs a third less work.
    """
    lengths = tokens.argmax(dim=1) + 1  # the end token has the largest id
    order = lengths.argsort()
    out = []
    for part in order.chunk(parts):
        size = int(lengths[part].max())
        x = model.token_embedding(tokens[part, :size]) + model.positional_embedding[:size]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:size, :size]))
        x = x[torch.arange(len(part)), lengths[part] - 1] @ model.text_projection
        out.append(F.normalize(x, dim=-1))
    return torch.cat(out)[order.argsort()]


def train(
    config: TrainConfig, pictures: npt.NDArray[np.uint8], tokens: npt.NDArray[np.int16]
) -> Any:
    """The trained model, in evaluation mode."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    model = new_model()
    # What open_clip normalizes with where a config names nothing else.
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    # Measured: convolutions as narrow as these take a third less time in this layout.
    model.visual.to(memory_format=torch.channels_last)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(config))
    loss_of = open_clip.ClipLoss()
    model.train()
    progress = tqdm(_batches(config, len(tokens)), "train", config.steps, disable=None)
    for epoch, rows in progress:
        images = torch.from_numpy(pictures[rows]).permute(0, 3, 1, 2).float().div_(255)
        images = (augment(images, generator) - mean) / std
        images = images.contiguous(memory_format=torch.channels_last)
        texts = torch.from_numpy(tokens[rows, epoch % config.captions].astype(np.int64))
        image_features = model.encode_image(images, normalize=True)
        text_features = encode_text_cropped(model, texts)
        loss = loss_of(image_features, text_features, model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def new_model() -> Any:
    """The untrained model, float32."""
    tiny.register()
    # open_clip.create_model would warn that the weights are random, which here they must be.
    return open_clip.CLIP(**open_clip.get_model_config(tiny.MODEL_NAME))


def _schedule(config: TrainConfig) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


def _batches(config: TrainConfig, rows: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(epoch, row numbers of one batch), `config.steps` times; every epoch in another order."""
    rng = np.random.default_rng([config.seed, 1])
    step = epoch = 0
    while True:
        order = rng.permutation(rows)
        for start in range(0, rows - config.batch + 1, config.batch):
            if step == config.steps:
                return
            # Sorted, as the pictures are read from a file.
            yield epoch, np.sort(order[start : start + config.batch])
            step += 1
        epoch += 1


def save(model: Any, path: Path) -> None:
    """Write the weights as float16 safetensors, in the usual layout of memory."""
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for the owner alone; this file is to be packaged


# --- figures --------------------------------------------------------------------------------


def measure(config: TrainConfig, weights: Path) -> dict[str, Any]:
    """Figures on held-out pairs, through open_clip's own factory, transform and tokenizer."""
    tiny.register()
    model, _, transform = open_clip.create_model_and_transforms(
        tiny.MODEL_NAME, pretrained=str(weights)
    )
    tokenize = open_clip.get_tokenizer(tiny.MODEL_NAME)
    model.eval()
    rng = np.random.default_rng([config.seed, 2])
    drawn = [s for s, _ in zip(stream(rng, held_out=True), range(config.held_out), strict=False)]
    texts = [scenes.caption(scene, rng) for scene in drawn]
    pictures = [scenes.draw(scene) for scene in drawn]
    copies = [compressed(scenes.jitter(picture, rng), 75) for picture in pictures]
    pictures = [compressed(picture, 90) for picture in pictures]
    with torch.inference_mode():
        image = model.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True)
        copy = model.encode_image(torch.stack([transform(p) for p in copies]), normalize=True)
        text = model.encode_text(tokenize(texts), normalize=True)
    similarity = image @ text.T
    matched = similarity.diagonal()
    shuffled = (image * text.roll(1, 0)).sum(1)
    among = (image @ image.T).fill_diagonal_(-1)
    to_copy = (image * copy).sum(1)
    nearest = among.max(1).values
    return {
        "held_out_pairs": config.held_out,
        "distinct_captions": len(set(texts)) / len(texts),
        "image_to_text": recalls(similarity),
        "text_to_image": recalls(similarity.T),
        "cosine_matched_mean": float(matched.mean()),
        "cosine_shuffled_mean": float(shuffled.mean()),
        # The area under the ROC curve is the chance that a matched pair beats a shuffled one.
        "auc_matched_vs_shuffled": float((matched[:, None] > shuffled).float().mean()),
        "near_copy": {
            "cosine_mean": float(to_copy.mean()),
            "cosine_p05": float(to_copy.quantile(0.05)),
            "nearest_other_cosine_mean": float(nearest.mean()),
            "closer_than_every_other": float((to_copy > nearest).float().mean()),
        },
    }


def recalls(similarity: Tensor) -> dict[str, float]:
    """R@1, R@5 and R@10 of a [n, n] similarity whose diagonal is right; ties count as misses."""
    rank = (similarity >= similarity.diagonal()[:, None]).sum(1)
    return {f"r@{k}": float((rank <= k).float().mean()) for k in (1, 5, 10)}


def _rounded(value: Any) -> Any:
    """The same figures to four digits: more would only be noise of 1,000 pairs."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _processor() -> str:
    """The processor's name where the system tells it (Linux), else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    """Draw, train, write, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory of the two files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = tiny_clip(args.seed)
    torch.set_num_threads(config.threads)
    started = time.monotonic()
    # TemporaryDirectory: the pool is a gigabyte, and of no use afterwards.
    with tempfile.TemporaryDirectory(prefix="tiny-clip-") as folder:
        pictures, tokens = draw_pool(config, Path(folder))
        drawn = time.monotonic()
        model = train(config, pictures, tokens)
    trained = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    weights = args.out / tiny.WEIGHTS.name
    save(model, weights)
    figures = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{_processor()}, {config.threads} threads",
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
        "config": asdict(config),
        "samples_seen": config.steps * config.batch,
        "minutes_drawing": round((drawn - started) / 60, 1),
        "minutes_training": round((trained - drawn) / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_bytes": weights.stat().st_size,
        "held_out_rule": "scenes.held_out: one combination of attributes in 16, by hash;"
        " the training pool has none of them",
        **measure(config, weights),
    }
    text = json.dumps(_rounded(figures), indent=2) + "\n"
    (args.out / "figures.json").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
