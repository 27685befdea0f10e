"""The network of `bench_cifar --device cuda`: a small residual network, trained from pixels.

A layer of this size keeps a GPU busy for microseconds only. So a training step is recorded once as
a CUDA graph, which is replayed for every network, with other initial weights and other rows. All
pictures are in GPU memory, where they are flipped and shifted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from d2filter.algorithm.scores import training_dynamics
from jobs.supervised_data import batches

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

CLASSES = 10
SIDE = 32
SHIFT = 2  # pixels, at most, in each direction
CALM = 0.125  # factor of the logits: with the rates that convolutions want, the last layer is wild
MEAN, SCALE = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of CIFAR-10's training pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a network is trained: SGD with Nesterov's momentum, its rate up and down in lines."""

    width: int = 32
    """channels of the first layer; then twice, four and eight times as many"""
    steps: int = 300
    batch: int = 512
    epochs: int = 12
    """of the training on everything that makes the log"""
    rate: float = 0.3
    warm: float = 0.25
    """share of the steps in which the rate rises"""
    momentum: float = 0.9
    decay: float = 5e-4
    smooth: float = 0.1
    """of the labels"""
    compiled: bool = False
    """fuse what is between the convolutions (Triton)"""

    def rates(self, steps: int) -> F32:
        """(steps,) the rate of each step."""
        top = max(1.0, self.warm * steps)
        step = np.arange(steps)
        rising, falling = (step + 1) / top, (steps - step) / max(1.0, steps - top)
        found: F32 = (self.rate * np.minimum(1.0, np.minimum(rising, falling))).astype(np.float32)
        return found


class Pixels:
    """Trains networks on the pictures, one after the other."""

    def __init__(self, train: U8, test: U8, test_label: I64, schedule: Schedule, device: str):
        """train: (n, 32, 32, 3) uint8. test: (t, 32, 32, 3). test_label: (t,)."""
        self._schedule, self._device = schedule, torch.device(device)
        # weights stay float32; a card multiplies in bfloat16
        self._kind = torch.bfloat16 if device == "cuda" else torch.float32
        self._train, self._test = self._placed(train), self._placed(test)
        self._test_label = test_label
        self._net = Network(schedule.width).to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._step = _Step(self._net, self._train, schedule, self._mixed)

    @property
    def summary(self) -> str:
        """What is trained, for the report."""
        plan = self._schedule
        return (
            f"{len(self._train):,} training pictures; "
            f"a residual network of 8 layers with {plan.width} to {8 * plan.width} channels, "
            f"trained from pixels; {plan.steps} steps of {plan.batch} whatever is kept, the log "
            f"from {plan.epochs} rounds over everything"
        )

    def log(self, label: I64, seed: int) -> tuple[F32, F32]:
        """Train on everything: probabilities after each epoch (n, e, classes), features (n, d)."""
        plan, n = self._schedule, len(label)
        epoch = -(-n // plan.batch)
        epochs: list[F32] = []
        features: list[F32] = []

        def watch(step: int) -> None:
            if (step + 1) % epoch == 0:
                found, logits = self._predict(self._train)
                epochs.append(np.asarray(training_dynamics.softmax(logits), np.float32))
                features[:] = [found]

        self._fit(label, np.arange(n), seed, plan.epochs * epoch, watch)
        return np.stack(epochs, axis=1), features[0]

    def accuracies(self, label: I64, subsets: Sequence[I64], seed: int) -> list[float]:
        """Train one network on each subset: the share of the test pictures that it has right."""
        found = []
        for subset in subsets:
            self._fit(label, subset, seed, self._schedule.steps)
            _, logits = self._predict(self._test)
            found.append(float((logits.argmax(axis=1) == self._test_label).mean()))
        return found

    def _fit(
        self,
        label: I64,
        subset: I64,
        seed: int,
        steps: int,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        """Train the network anew. The same seed gives the same first weights and changes of the
        pictures, whatever the subset.
        """
        plan = self._schedule
        self._net.start(seed)
        self._net.train()
        self._step.begin(
            torch.from_numpy(label),
            torch.from_numpy(batches(subset, steps, plan.batch, seed)),
            torch.from_numpy(changes(steps, plan.batch, seed)),
            torch.from_numpy(plan.rates(steps)),
        )
        for step in range(steps):
            self._step()
            if watch is not None:
                watch(step)
                self._net.train()

    def _predict(self, pictures: torch.Tensor) -> tuple[F32, F32]:
        """Features (n, d) and logits (n, classes) of n pictures as `_placed` gives them."""
        self._net.eval()
        features, logits = [], []
        with torch.inference_mode(), self._mixed():
            for some in torch.split(pictures, 2000):
                inside = some[:, SHIFT:-SHIFT, SHIFT:-SHIFT].permute(0, 3, 1, 2)
                found = self._net(inside)
                features.append(found[0].float())
                logits.append(found[1].float())
        return torch.cat(features).cpu().numpy(), torch.cat(logits).cpu().numpy()

    def _placed(self, pictures: U8) -> torch.Tensor:
        """(n, 36, 36, 3): centered and scaled, with a border of zeros, channels last."""
        values = torch.from_numpy(pictures).to(self._device).float() / 255
        mean, scale = (torch.tensor(v, device=self._device) for v in (MEAN, SCALE))
        scaled = ((values - mean) / scale).to(self._kind)
        return functional.pad(scaled, (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))

    def _mixed(self) -> Any:
        half = self._kind is torch.bfloat16
        # what is cast once would not be cast again when a graph is replayed
        return torch.autocast(self._device.type, torch.bfloat16, half, cache_enabled=False)


class _Step:
    """One step of training on static tensors, recorded as a CUDA graph where there is a card."""

    def __init__(
        self, net: Network, pictures: torch.Tensor, plan: Schedule, mixed: Callable[[], Any]
    ) -> None:
        self._net, self._pictures, self._plan, self._mixed = net, pictures, plan, mixed
        self._device = pictures.device
        n, batch = len(pictures), plan.batch
        most = max(plan.steps, plan.epochs * -(-n // batch))
        self._label = torch.zeros(n, dtype=torch.int64, device=self._device)
        self._rows = torch.zeros((most, batch), dtype=torch.int64, device=self._device)
        self._changes = torch.zeros((most, batch, 3), dtype=torch.int64, device=self._device)
        self._rates = torch.zeros(most, dtype=torch.float32, device=self._device)
        self._at = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._weights: list[torch.Tensor] = list(net.parameters())
        self._speed = [torch.zeros_like(w) for w in self._weights]
        self._forward: Callable[[torch.Tensor], Any] = (
            torch.compile(net, dynamic=False) if plan.compiled else net
        )
        self._steps = torch.arange(SIDE, device=self._device)
        self._graph = self._recorded() if self._device.type == "cuda" else None

    def begin(
        self, label: torch.Tensor, rows: torch.Tensor, drawn: torch.Tensor, rates: torch.Tensor
    ) -> None:
        """A new training: labels (n,), rows (steps, batch), changes (steps, batch, 3), rates."""
        self._label.copy_(label)
        self._rows[: len(rows)] = rows.to(self._device)
        self._changes[: len(rows)] = drawn.to(self._device)
        self._rates[: len(rows)] = rates.to(self._device)
        self._at.zero_()
        for speed in self._speed:
            speed.zero_()

    def __call__(self) -> None:
        """Take the next step."""
        if self._graph is None:
            self._take()
        else:
            self._graph.replay()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it bare
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their kernels outside of the graph
            for _ in range(5):
                self._take()
                self._at.zero_()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._take()
        return graph

    def _take(self) -> None:
        plan = self._plan
        rows = self._rows[self._at][0]
        with self._mixed():
            _, logits = self._forward(self._varied(rows, self._changes[self._at][0]))
        loss = functional.cross_entropy(
            logits.float(), self._label[rows], label_smoothing=plan.smooth
        )
        slopes = list(torch.autograd.grad(loss, self._weights))
        with torch.no_grad():
            torch._foreach_add_(slopes, self._weights, alpha=plan.decay)
            torch._foreach_mul_(self._speed, plan.momentum)
            torch._foreach_add_(self._speed, slopes)
            torch._foreach_add_(slopes, self._speed, alpha=plan.momentum)
            torch._foreach_mul_(slopes, -self._rates[self._at][0])
            torch._foreach_add_(self._weights, slopes)
            self._at += 1

    def _varied(self, rows: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Pictures (batch, 3, 32, 32) of the rows, each shifted and flipped as drawn for it."""
        down, across, flipped = drawn.unbind(1)
        lines = down[:, None] + self._steps
        dots = torch.where(flipped[:, None] > 0, SIDE - 1 - self._steps, self._steps)
        dots = across[:, None] + dots
        found = self._pictures[rows[:, None, None], lines[:, :, None], dots[:, None, :]]
        return found.permute(0, 3, 1, 2)


class Network(nn.Module):
    """A residual network of 8 layers: pictures (b, 3, 32, 32) → features, logits (b, …)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.stem = _layer(3, w)
        self.second = _layer(w, 2 * w, halved=True)
        self.near = nn.Sequential(_layer(2 * w, 2 * w), _layer(2 * w, 2 * w))
        self.third = _layer(2 * w, 4 * w, halved=True)
        self.fourth = _layer(4 * w, 8 * w, halved=True)
        self.far = nn.Sequential(_layer(8 * w, 8 * w), _layer(8 * w, 8 * w))
        self.last = nn.Linear(8 * w, CLASSES)

    def start(self, seed: int) -> None:
        """First weights of a seed, in place."""
        torch.manual_seed(seed)
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                part.reset_parameters()

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (b, 8·width) and logits (b, classes)."""
        x = self.second(self.stem(pictures))
        x = x + self.near(x)
        x = self.fourth(self.third(x))
        features = (x + self.far(x)).amax(dim=(2, 3))
        return features, CALM * self.last(features)


def _layer(into: int, out: int, *, halved: bool = False) -> nn.Sequential:
    """3 × 3 convolution, maximum of 2 × 2 where `halved`, batch normalization, ReLU."""
    conv = nn.Conv2d(into, out, 3, padding=1, bias=False)
    # before the normalization, which then has a quarter to do
    middle = [nn.MaxPool2d(2)] if halved else []
    return nn.Sequential(conv, *middle, nn.BatchNorm2d(out), nn.ReLU())


def changes(steps: int, batch: int, seed: int) -> I64:
    """(steps, batch, 3): lines down, dots across, both 0 to 2·SHIFT, and flipped or not."""
    rng = np.random.default_rng([seed, 3])
    shifts = rng.integers(0, 2 * SHIFT + 1, (steps, batch, 2))
    return np.concatenate([shifts, rng.integers(0, 2, (steps, batch, 1))], axis=2)
