"""Benchmark: test accuracy on CIFAR-10 after pruning, for D2 and its peers (the paper's table 1).

    python -m jobs.bench_cifar --data FOLDER --device cpu --results jobs/results/bench_cifar.md

FOLDER contains cifar10/. The labels are the clean ones, and CIFAR-10N's human labels `aggre` and
`worse`. For each set of labels, a network is trained on all samples, and difficulties are computed
from its training log. Then every method keeps 70 to 10% of the samples, and networks are trained on
the kept ones. --device cpu: small heads on the features of a frozen encoder. --device cuda:
residual networks from pixels, sized for 8 minutes of an H100. No method uses test pictures or the
knowledge which labels are wrong. The report also shows CCS and D2 as published with the best of
several cuts, chosen by the test pictures, which favors them; D2 with `--cut-hardest auto` uses no
test picture. With --cache FOLDER the job resumes; --smoke runs everything on few pictures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from d2filter.algorithm import budget
from d2filter.algorithm.knn import products
from jobs import cifar_heads, cifar_pixels, cifar_pools, cifar_report, real_data
from jobs.cifar_pools import Lists, Pool, Setting, Trainer

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Row = dict[str, Any]

LABELS = ("clean", "aggre", "worse")
KEPT = ("0.7", "0.5", "0.3", "0.2", "0.1")
SEEDS = {"cpu": (0, 1, 2, 3, 4), "cuda": (0, 1, 2)}
LOG_SEED = 100
CUTS = {
    "cpu": ("0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6"),
    "cuda": ("0", "0.2", "0.4"),
}
PUBLISHED = Setting(k=5, gamma=0.1, gamma_scale="none")
AUTO = Setting(k=10, gamma="auto")
FIXED = Setting(k=10, gamma=1.0)
DERIVED = {"cpu": {"d2_auto": AUTO, "d2_fixed": FIXED}, "cuda": {"d2_auto": AUTO}}
SCORES = ("margin", "el2n", "forgetting", "entropy", "prototypicality")
OTHERS = ("random", "moderate", "k_center", "facility_location", "graph_cut")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One subset to train on: what chose it, with which cut, and the share that it keeps."""

    method: str
    kept: str
    cut: str = "0"


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description="Test accuracy after pruning CIFAR-10.")
    parser.add_argument("--data", required=True, type=Path, help="folder with cifar10/")
    parser.add_argument("--device", choices=tuple(SEEDS), default="cpu")
    parser.add_argument("--results", type=Path, default=Path("jobs/results/bench_cifar.md"))
    parser.add_argument("--cache", type=Path, help="folder for features and finished trainings")
    parser.add_argument(
        "--pixels", type=int, default=real_data.INPUT, help="a side of what the encoder is given"
    )
    parser.add_argument(
        "--pool", type=int, default=50_000, help="training pictures to prune, drawn by a seed"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin no other seed that would end later"
    )
    parser.add_argument("--steps", type=int, help="of a network from pixels")
    parser.add_argument("--compiled", action="store_true", help="networks from pixels by Triton")
    parser.add_argument("--smoke", action="store_true", help="few pictures, steps and seeds")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
        products.use_threads(1)
    elif not arguments.smoke and not torch.cuda.is_available():
        parser.error("--device cuda: there is no card here; --smoke runs it on the CPU")
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        pool, tested = (300, 100) if arguments.smoke else (arguments.pool, 10_000)
        pictures = drawn(real_data.cifar10(arguments.data), pool, tested)
        trainer = _trainer(arguments, pictures, cache)
        seeds = SEEDS[arguments.device][: 2 if arguments.smoke else None]
        name = f"{arguments.device}-{arguments.pixels}-{len(pictures.train)}"
        run = Run(name=name, device=arguments.device, trainer=trainer, seeds=seeds, cache=cache)
        started = time.perf_counter()
        rows, seeds = run.all_of(pictures, arguments.minutes)
        minutes = (time.perf_counter() - started) / 60
    about = cifar_report.About(
        device=arguments.device, summary=trainer.summary, seeds=seeds, minutes=minutes,
        smoke=arguments.smoke,
    )  # fmt: skip
    cifar_report.write(arguments.results, rows, about)


def drawn(pictures: real_data.Cifar10, pool: int, tested: int) -> real_data.Cifar10:
    """Some of the training pictures, in the order of a seed, for they lie class by class and ties
    go to the first row; and about as many test pictures as are `tested`.
    """
    order = np.random.default_rng(7).permutation(len(pictures.train))[:pool]
    judges = np.arange(0, len(pictures.test), max(1, len(pictures.test) // tested))
    return replace(
        pictures,
        train=pictures.train[order],
        train_label=pictures.train_label[order],
        test=pictures.test[judges],
        test_label=pictures.test_label[judges],
        human={name: label[order] for name, label in pictures.human.items()},
    )


def _trainer(arguments: argparse.Namespace, pictures: real_data.Cifar10, cache: Path) -> Trainer:
    smoke = arguments.smoke
    if arguments.device == "cpu":
        made = cifar_heads.heads(pictures, cache, arguments.pixels)
        return replace(made, network=replace(made.network, steps=40)) if smoke else made
    plan = cifar_pixels.Schedule()
    plan = replace(plan, steps=arguments.steps or plan.steps, compiled=arguments.compiled)
    if smoke:
        plan = replace(plan, width=4, steps=2, batch=32, epochs=2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return cifar_pixels.Pixels(
        pictures.train, pictures.test, pictures.test_label, plan, device
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All trainings of a device."""

    name: str
    """of what is in the cache"""
    device: str
    trainer: Trainer
    seeds: tuple[int, ...]
    cache: Path

    def all_of(
        self, pictures: real_data.Cifar10, minutes: float
    ) -> tuple[list[Row], tuple[int, ...]]:
        """One row for each training, and the seeds that `minutes` were enough for: no other is
        begun when the time would be over before it is done.
        """
        end = time.monotonic() + 60 * minutes
        labels = {
            which: pictures.train_label if which == "clean" else pictures.human[which]
            for which in LABELS
        }
        subsets = {which: self._subsets(which, label) for which, label in labels.items()}
        rows: list[Row] = []
        done: list[int] = []
        for seed in self.seeds:
            began = time.monotonic()
            for which, label in labels.items():
                wrong = label != pictures.train_label
                rows += self._trained(which, label, wrong, subsets[which], seed)
            done.append(seed)
            now = time.monotonic()
            if now + (now - began) > end:
                break
        return rows, tuple(done)

    def _pool(self, which: str, label: I64) -> Pool:
        log, rows = self._kept(f"log-{which}", lambda: self.trainer.log(label, LOG_SEED))
        rows = cifar_pools.unit(rows)
        inside = self._lists(f"inside-{which}", rows, label)
        # on frozen features they are the same for all labels, but cost little
        across = self._lists(f"across-{which}", rows, None)
        return Pool(label, rows, log, LOG_SEED, inside, across)

    def _lists(self, name: str, rows: F32, label: I64 | None) -> Lists:
        def find() -> tuple[I64, F32]:
            found = cifar_pools.lists(rows, label)
            return found.neighbors, found.sqdist

        neighbors, sqdist = self._kept(name, find)
        return Lists(neighbors=neighbors, sqdist=sqdist)

    def _kept(self, name: str, make: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Two arrays from the cache, made where they are not there."""
        path = self.cache / f"{self.name}-{name}.npz"
        if not path.exists():
            first, second = make()
            np.savez(path, first=first, second=second)
        with np.load(path, allow_pickle=False) as there:
            return there["first"], there["second"]

    def _subsets(self, which: str, label: I64) -> dict[Candidate, I64]:
        """What every method keeps, row numbers in no special order."""
        started = time.perf_counter()
        pool = self._pool(which, label)
        autos = {kept: pool.auto_cut(Decimal(kept)) for kept in KEPT}
        n = len(pool)
        sizes = {kept: budget.budget_of(n, fraction=Decimal(kept)) for kept in KEPT}
        made: dict[Candidate, I64] = {}

        def add(method: str, order: I64, cut: str = "0") -> None:
            for kept in KEPT:
                # a larger cut takes away what the budget has room for
                if Decimal(cut) <= 1 - Decimal(kept):
                    made[Candidate(method=method, kept=kept, cut=cut)] = order[: sizes[kept]]

        for method in OTHERS:
            found = self._kept(f"{method}-{which}", partial(_with_nothing, pool.selected, method))
            add(method, found[0])
        for score in SCORES:
            add(score, pool.hardest(score))
        for cut in CUTS[self.device]:
            add("ccs", pool.ccs(Decimal(cut)), cut)
            add("d2_published", pool.d2(PUBLISHED, Decimal(cut)), cut)
        add("d2_self", pool.d2_without_labels(PUBLISHED, Decimal(0)))
        for kept in KEPT:
            for method, setting in DERIVED[self.device].items():
                order = pool.d2(setting, autos[kept], Decimal(kept))
                one = Candidate(method=method, kept=kept, cut=str(autos[kept]))
                made[one] = order[: sizes[kept]]
        made[Candidate(method="full", kept="1")] = np.arange(n)
        seconds = time.perf_counter() - started
        print(f"{which}: {len(made)} subsets, {seconds:.0f} s", flush=True)
        return made

    def _trained(
        self, which: str, label: I64, wrong: Any, subsets: dict[Candidate, I64], seed: int
    ) -> list[Row]:
        """All trainings of one seed, from the cache where they are there."""
        if seed:  # what random keeps changes with the seed, what the others keep does not
            rng = np.random.default_rng([seed, 11])
            order = rng.permutation(len(label))
            subsets = {
                one: order[: len(rows)] if one.method == "random" else rows
                for one, rows in subsets.items()
            }
        digests = {one: real_data.hashed(np.sort(rows).tobytes()) for one, rows in subsets.items()}
        path = self.cache / f"{self.name}-rows-{which}-{seed}.jsonl"
        there: dict[str, float] = {}
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                there.update(json.loads(line))
        missing = {digests[one]: np.sort(rows) for one, rows in subsets.items()}
        missing = {digest: rows for digest, rows in missing.items() if digest not in there}
        started = time.perf_counter()
        step = 24
        for begin in range(0, len(missing), step):
            names = list(missing)[begin : begin + step]
            found = self.trainer.accuracies(label, [missing[name] for name in names], seed)
            fresh = dict(zip(names, found, strict=True))
            there.update(fresh)
            with path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(fresh) + "\n")
        seconds = time.perf_counter() - started
        print(f"{which}, seed {seed}: {len(missing)} networks, {seconds:.0f} s", flush=True)
        return [
            {
                **asdict(one),
                "labels": which,
                "seed": seed,
                "accuracy": there[digests[one]],
                "wrong": float(np.mean(wrong[rows])),
                "all_wrong": float(np.mean(wrong)),
            }
            for one, rows in subsets.items()
        ]


def _with_nothing(make: Callable[[str], I64], name: str) -> tuple[I64, I64]:
    return make(name), np.zeros(0, np.int64)


if __name__ == "__main__":
    main()
