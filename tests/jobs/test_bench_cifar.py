"""The parts of `jobs.bench_cifar` on a few drawn pictures."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from jobs import bench_cifar, cifar_heads, cifar_pixels, cifar_pools, cifar_report
from jobs.supervised_data import Network

N = 120


@pytest.fixture(scope="module")
def label() -> np.ndarray:
    return np.arange(N) % 10


@pytest.fixture(scope="module")
def pictures(label: np.ndarray) -> np.ndarray:
    """Each class has a color of its own."""
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (10, 1, 1, 3))
    noise = rng.integers(-20, 21, (N, 32, 32, 3))
    return np.clip(color[label] + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def trainer(pictures: np.ndarray, label: np.ndarray) -> cifar_pixels.Pixels:
    plan = cifar_pixels.Schedule(width=8, steps=80, batch=32, epochs=12)
    return cifar_pixels.Pixels(pictures, pictures[:50], label[:50], plan, "cpu")


@pytest.fixture(scope="module")
def heads(label: np.ndarray) -> cifar_heads.Heads:
    """Rows in place of pictures: each class has a direction of its own."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(10, 16))[label] + rng.normal(scale=0.3, size=(N, 16))
    rows = rows.astype(np.float32)
    network = Network(hidden=((1, 16),), steps=48, rate=1e-2, batch=32)
    return cifar_heads.Heads(
        rows=rows, test_rows=rows[:50], test_label=label[:50], pixels=16, network=network
    )


BOTH = pytest.mark.parametrize("which", ["trainer", "heads"])


@BOTH
def test_a_network_learns_its_samples_and_each_training_starts_from_scratch(
    which: str, request: pytest.FixtureRequest, label: np.ndarray
) -> None:
    trainer: cifar_pools.Trainer = request.getfixturevalue(which)
    everything, half = np.arange(N), np.flatnonzero(label < 5)
    first = trainer.accuracies(label, [everything, half], 3)
    assert first[0] > 0.7
    # it has never seen the other half of the classes
    assert first[1] <= 0.5
    assert trainer.accuracies(label, [half, everything], 3) == first[::-1]


def test_pictures_are_shifted_and_flipped_as_drawn(trainer: cifar_pixels.Pixels) -> None:
    import torch

    step = trainer._step
    drawn = torch.tensor([[2, 2, 0], [0, 4, 0], [2, 2, 1]])
    plain, moved, flipped = step._varied(torch.tensor([7, 7, 7]), drawn)
    inside = trainer._train[7, 2:-2, 2:-2].permute(2, 0, 1)
    assert torch.equal(plain, inside)
    assert torch.equal(flipped, inside.flip(2))
    assert torch.equal(moved[:, 2:, :-2], inside[:, :-2, 2:])
    assert not moved[:, :2].any()


@BOTH
def test_every_method_gives_an_order_and_the_cut_takes_wrong_labels(
    which: str, request: pytest.FixtureRequest, label: np.ndarray
) -> None:
    trainer: cifar_pools.Trainer = request.getfixturevalue(which)
    given = label.copy()
    given[:12] = (given[:12] + 1) % 10
    log, rows = trainer.log(given, 1)
    assert log.shape == (N, 12, 10)  # as many epochs
    rows = cifar_pools.unit(rows)
    pool = cifar_pools.Pool(
        given, rows, log, 1, cifar_pools.lists(rows, given, k=4), cifar_pools.lists(rows, None, k=4)
    )
    cut = pool.auto_cut(Decimal("0.5"))
    orders = [pool.selected(method) for method in bench_cifar.OTHERS]
    orders += [pool.hardest(score) for score in bench_cifar.SCORES]
    auto = pool.d2(cifar_pools.Setting(k=4, gamma="auto"), cut, Decimal("0.5"))
    published = pool.d2_without_labels(bench_cifar.PUBLISHED, Decimal(0))
    for order in (*orders, pool.ccs(Decimal(0)), auto, published):
        assert sorted(order.tolist()) == list(range(N))
    assert np.mean(auto[:60] < 12) < np.mean(pool.hardest("margin")[:60] < 12)


def test_the_report_lists_each_method_and_where_it_is_worse(tmp_path: Path) -> None:
    rows = []
    for method in cifar_report.SAYS:
        name = cifar_report._BEST.get(method, method)
        for kept in ("0.5", "0.1"):
            for seed in (0, 1):
                # random is ahead at a tenth
                accuracy = 0.6 + 0.001 * seed + 0.2 * (name == "random") * (kept == "0.1")
                rows.append(
                    {
                        "method": name, "kept": kept, "cut": "0", "labels": "aggre", "seed": seed,
                        "accuracy": accuracy, "wrong": 0.1, "all_wrong": 0.09, "code": "x",
                    }
                )  # fmt: skip
    rows += [{**rows[0], "method": "full", "kept": "1", "seed": seed} for seed in (0, 1)]
    about = cifar_report.About(device="cpu", summary="heads", seeds=(0, 1), minutes=1, smoke=False)
    cifar_report.write(tmp_path / "r.md", rows, about)
    text = (tmp_path / "r.md").read_text("utf-8")
    assert "| **D2, cut and gamma auto** | 60.0 ± 0.1 | 60.0 ± 0.1 |" in text
    assert "against random, aggre: 50% +0.0 ± 0.0; 90% -20.0 ± 0.0, behind" in text
    assert (tmp_path / "r.png").stat().st_size > 10_000
