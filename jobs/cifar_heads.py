"""The networks of `bench_cifar --device cpu`: small heads on the features of a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from d2filter.algorithm.scores import training_dynamics
from jobs import real_data
from jobs import supervised_data as data

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

WIDTH = 64  # principal components of the encoder's features that a head is given
CLASSES = 10
# steps are few and batches large: what a core does fastest
NETWORK = data.Network(hidden=((1, 64),), steps=200, rate=1e-2, batch=256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Trains heads of 64-64-10 on standardized features."""

    rows: F32
    """(n, WIDTH) of the training pictures"""
    test_rows: F32
    test_label: I64
    pixels: int
    """a side of what the encoder was given"""
    network: data.Network = NETWORK

    @property
    def summary(self) -> str:
        """What is trained, for the report."""
        net = self.network
        return (
            f"{len(self.rows):,} training pictures; "
            f"a head of {self.rows.shape[1]}-{net.hidden[0][1]}-{CLASSES} on {self.rows.shape[1]} "
            "principal components of the features of a frozen EfficientNet-Lite0 (ImageNet) at "
            f"{self.pixels} × {self.pixels} pixels; {net.steps} steps of {net.batch} whatever is "
            "kept"
        )

    def log(self, label: I64, seed: int) -> tuple[F32, F32]:
        """Train on everything: probabilities after each epoch (n, e, classes), features (n, d)."""
        epochs: list[F32] = []

        def watch(layers: data.Layers) -> None:
            logits = data.predict(self.network, layers, 0, self.rows)[1]
            epochs.append(np.asarray(training_dynamics.softmax(logits), np.float32))

        everything = [np.arange(len(self.rows))]
        data.train(self.network, CLASSES, self.rows, label, everything, seed=seed, watch=watch)
        return np.stack(epochs, axis=1), self.rows

    def accuracies(self, label: I64, subsets: Sequence[I64], seed: int) -> list[float]:
        """Train one head on each subset: the share of the test pictures that it has right."""
        layers = data.train(self.network, CLASSES, self.rows, label, subsets, seed=seed)
        found = []
        for which in range(len(subsets)):
            logits = data.predict(self.network, layers, which, self.test_rows)[1]
            found.append(float(np.mean(logits.argmax(axis=1) == self.test_label)))
        return found


def heads(pictures: real_data.Cifar10, cache: Path, pixels: int) -> Heads:
    """Features of all pictures, from the cache where they are there, and what trains on them."""
    train, test = (
        real_data.encode(
            map(Image.fromarray, some), cache, f"cifar10-{kind}-{len(some)}", side=pixels
        )
        for kind, some in (("train", pictures.train), ("test", pictures.test))
    )
    rows, test_rows = principal(train, test, WIDTH)
    return Heads(
        rows=rows, test_rows=test_rows, test_label=pictures.test_label, pixels=pixels
    )  # fmt: skip


def principal(train: Any, test: Any, width: int) -> tuple[F32, F32]:
    """The first principal components of `train` (n, d) and `test`, of mean variance 1."""
    wide = train.astype(np.float32)
    some = wide[:: max(1, len(wide) // 10_000)]  # enough for a covariance
    middle = some.mean(axis=0)
    variance, axes = np.linalg.eigh(np.cov((some - middle).T))
    axes = axes[:, ::-1][:, :width] / np.sqrt(variance[::-1][:width].mean())

    def turned(rows: F32) -> F32:
        made: F32 = ((rows - middle) @ axes).astype(np.float32)
        return made

    return turned(wide), turned(test.astype(np.float32))
