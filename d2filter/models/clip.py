"""Loads and runs a CLIP model through open_clip's own factory, transforms and tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.errors import InputError
from d2filter.models import BUNDLED_MODEL

F16 = npt.NDArray[np.float16]

_SAFE_TORCH = (2, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a forward pass takes."""

    images: Any
    """(b, 3, height, width) tensor"""
    tokens: Any
    """(b, context) int tensor"""
    count: int
    """n ≤ b: rows behind it only fill the batch"""


@dataclass(frozen=True, slots=True)
class Clip:
    """A loaded model with what prepares its input."""

    model: Any
    transform: Callable[[Any], Any]
    """PIL image → (3, height, width) float tensor"""
    tokenize: Callable[[Sequence[str]], Any]
    """captions → (n, context) int tensor"""
    device: str
    dtype: Any

    @property
    def side(self) -> int:
        """Pixels of the model's input: the shorter side."""
        size = self.model.visual.image_size
        return int(min(size) if isinstance(size, tuple | list) else size)

    def prepare(self, images: Sequence[Any], captions: Sequence[str], pad_to: int) -> Batch:
        """n transformed images and n captions as a batch of `pad_to` rows.

        Every forward pass has this shape, because other shapes use other kernels, whose last bits
        differ. For a GPU the batch is in page-locked memory and in the model's own type, from which
        copying takes a fraction of the time.
        """
        import torch

        stacked = torch.stack(list(images)).to(self.dtype)
        tokens = self.tokenize(list(captions))
        missing = pad_to - len(images)
        if missing > 0:
            stacked = torch.cat([stacked, stacked.new_zeros((missing, *stacked.shape[1:]))])
            tokens = torch.cat([tokens, tokens.new_zeros((missing, *tokens.shape[1:]))])
        if self.device == "cuda":
            stacked, tokens = stacked.pin_memory(), tokens.pin_memory()
        return Batch(images=stacked, tokens=tokens, count=len(images))

    def encode(self, batch: Batch) -> tuple[F16, F16]:
        """Unit embeddings of the images and of the captions, each (n, d) float16. A row that the
        model cannot embed is NaN.
        """
        import torch

        with torch.inference_mode():
            image = self.model.encode_image(batch.images.to(self.device, non_blocking=True))
            text = self.model.encode_text(batch.tokens.to(self.device, non_blocking=True))
        return _unit(image[: batch.count]), _unit(text[: batch.count])


@lru_cache(maxsize=1)
def load(model: str, pretrained: str, precision: str, on_gpu: bool = False) -> Clip:
    """Load once a process. on_gpu: on the GPU of this process, if torch sees one there.

    Raises InputError, in one line, for an unknown model or weights that cannot be had.
    """
    import open_clip
    import torch

    if model == BUNDLED_MODEL:
        from d2filter.models import tiny

        tiny.register()
        pretrained = pretrained or str(tiny.WEIGHTS)
    if model not in open_clip.list_models():
        raise InputError(
            f'open_clip has no model {model!r}: `python -c "import open_clip; '
            'print(open_clip.list_models())"` lists them'
        )
    _refuse_pickles(pretrained, torch.__version__)
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    try:
        with warnings.catch_warnings():
            # open_clip warns of quick-GELU mismatches and of its own defaults
            warnings.simplefilter("ignore")
            network, _, transform = open_clip.create_model_and_transforms(
                model, pretrained=pretrained, precision=precision, device=device
            )
            tokenize = open_clip.get_tokenizer(model)
    except Exception as error:  # the factory raises whatever its hub, torch and safetensors raise
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model {model} with weights {pretrained!r} cannot be loaded: {text}; --pretrained "
            "takes one of open_clip's tags (needs its download) or a path to weights"
        ) from error
    network.eval()
    dtype = open_clip.get_input_dtype(precision)
    return Clip(network, transform, tokenize, device, dtype)


def rehearse(model: Clip, batch_size: int) -> None:
    """One forward pass of an empty batch of that many: what it needs is then known.

    Raises InputError, in one line, when the batch does not fit into the GPU's memory.
    """
    import torch
    from PIL import Image

    try:
        one = model.transform(Image.new("RGB", (64, 64)))
        model.encode(model.prepare([one], [""], batch_size))
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"batch-size {batch_size} does not fit into the memory of the GPU: halve it, or use "
            "--precision pure_fp16 or pure_bf16"
        ) from error


def _refuse_pickles(pretrained: str, version: str) -> None:
    """Raise InputError for a file of weights that could run code in an old torch (CVE-2025-32434).

    pip requires a newer torch, but other environments may have any version.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    file = Path(pretrained)
    pickled = file.suffix not in (".safetensors", ".npz", ".npy")
    if (major, minor) < _SAFE_TORCH and pickled and file.is_file():
        raise InputError(
            f"torch {version} may run code that is hidden in weights like {pretrained}: install "
            f"torch>={'.'.join(map(str, _SAFE_TORCH))}, or take weights in .safetensors"
        )


def use_threads(count: int) -> None:
    """Let torch use `count` threads of this process."""
    import torch

    torch.set_num_threads(count)


def _unit(rows: Any) -> F16:
    """L2-normalized float16 rows of a tensor."""
    wide = rows.float().cpu().numpy().astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit: F16 = (wide / np.sqrt((wide * wide).sum(axis=1))[:, None]).astype(np.float16)
    return unit
