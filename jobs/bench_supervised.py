"""Benchmark: test accuracy after pruning data with labels, for D2 and its peers.

    pip install -e '.[cpu,bench]'
    apt-get download fortunes fortunes-min && for d in *.deb; do dpkg -x "$d" FOLDER; done
    python -m jobs.bench_supervised --fortunes FOLDER --results jobs/results/bench_supervised.md

A network is trained once on all training data, and its probabilities are stored after every epoch.
They give the difficulties and, except for texts, the features. Then every method chooses a subset,
and the same network is trained on it from scratch with as many steps. Settings (k, gamma and cut of
D2, the cut of CCS) are chosen on a held-out part of the training data, with seeds that are not
reported; no method uses the test data. Measured time: 20 minutes of one core, 4 for the embeddings,
3 with --try, which tries other kernels and rules of D2. With --cache FOLDER it resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import d2filter
from d2filter.algorithm import budget
from d2filter.algorithm.knn import products
from d2filter.algorithm.methods import selectors
from d2filter.algorithm.scores import registry as scores
from d2filter.algorithm.scores import training_dynamics
from jobs import supervised_data as data
from jobs.bench import commit, made_by
from jobs.bench_extra import pyplot
from jobs.supervised_data import F32, I64, Task

KEPT = ("0.7", "0.5", "0.3", "0.2", "0.1")
REPORTED = (0, 1, 2, 3, 4)
CHOOSING = (100, 101, 102)
NOISE = 0.2  # wrong labels, where there are some
NEIGHBORS, GAMMAS, CUTS = (1, 5, 10), (0.1, 1.0, 10.0), (0.0, 0.2, 0.4)
TRIED_AT = ("0.5", "0.3")
METHODS = {
    "random": "random",
    "random_by_class": "random, in each class",
    "score": "score, hardest first",
    "moderate": "moderate",
    "ccs": "CCS, cut chosen",
    "k_center": "k-center",
    "d2_published": "D2, k=5, gamma=0.1, cut chosen",
    "d2": "D2, k, gamma, cut chosen",
    "d2_auto": "D2, gamma and cut auto",
}

OURS = "d2_auto"

_LINES = {  # color and style in the plot
    "random": ("black", "--"),
    "random_by_class": ("gray", "--"),
    "score": ("tab:olive", "-"),
    "moderate": ("tab:brown", "-"),
    "ccs": ("tab:green", "-"),
    "k_center": ("tab:orange", "-"),
    "d2_published": ("tab:cyan", "-"),
    "d2": ("tab:blue", "-"),
    "d2_auto": ("tab:red", "-"),
}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What D2, or of it the cut for CCS, is told."""

    k: int = 5
    gamma: float | Literal["auto"] = 0.1
    gamma_scale: str = "none"
    cut: float | str = 0.0
    kernel: str = "rbf"
    forward: str = "sum"
    reverse: str = "weighted"
    undirected: bool = False
    score: str = "margin"
    features: str = "learned"

    def __str__(self) -> str:
        plain = Setting()
        return ", ".join(
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name in ("k", "gamma", "cut") or getattr(self, f.name) != getattr(plain, f.name)
        )


GRID = [
    Setting(k=k, gamma=gamma, gamma_scale="median", cut=cut)
    for k, gamma, cut in itertools.product(NEIGHBORS, GAMMAS, CUTS)
]
AUTO = Setting(k=10, gamma="auto", cut="auto")
WITH_CUT = [Setting(cut=cut) for cut in CUTS]
CHANGES: dict[str, Row] = {
    "as chosen": {},
    "kernel exp": {"kernel": "exp"},
    "forward product": {"forward": "product"},
    "forward none": {"forward": "none"},
    "reverse absolute": {"reverse": "absolute"},
    "undirected": {"undirected": True},
    "features: the rows themselves": {"features": "rows"},
    "score el2n": {"score": "el2n"},
    "score forgetting": {"score": "forgetting"},
    "score variance": {"score": "variance"},
    "score entropy": {"score": "entropy"},
    "easiest first": {"score": "easiest"},
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One training: what chose the subset, told what, and how much of the data it keeps."""

    method: str
    setting: Setting
    kept: str


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description="Test accuracy after pruning labelled data.")
    parser.add_argument("--results", default="jobs/results/bench_supervised.md")
    parser.add_argument("--fortunes", default="", help="folder with unpacked packages; else none")
    parser.add_argument("--cache", default="", help="folder for what is finished, to go on from")
    parser.add_argument("--try", action="store_true", dest="tried", help="other words of D2 too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    products.use_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.cache or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tasks = _tasks(arguments.fortunes, folder)
        rows = [row for task in tasks for row in run(task, folder, tried=arguments.tried)]
    _write(Path(arguments.results), tasks, rows)


def _tasks(fortunes: str, folder: Path) -> list[Task]:
    digits, mnist1d = data.digits(), data.mnist1d()
    tasks = [Task(digits, 0.0), Task(mnist1d, 0.0)]
    if fortunes:
        tasks.append(Task(data.fortunes(Path(fortunes), folder), 0.0))
    return [*tasks, Task(digits, NOISE), Task(mnist1d, NOISE)]


def run(task: Task, folder: Path, *, tried: bool) -> list[Row]:
    """Choose the settings of a task, then measure: one row for each network trained."""
    grids = {"d2": GRID, "d2_published": WITH_CUT, "ccs": WITH_CUT, "random": WITH_CUT[:1]}
    candidates = [
        Candidate(method, setting, kept)
        for method, settings in grids.items()
        for setting, kept in itertools.product(settings, KEPT)
    ]
    rows = [r for seed in CHOOSING for r in _once(task, "choose", seed, candidates, folder)]
    best = {key: choose(rows, *key, grids[key[0]]) for key in itertools.product(grids, KEPT)}
    if tried:
        candidates = [
            Candidate(f"d2: {name}", replace(best["d2", kept], **change), kept)
            for name, change in CHANGES.items()
            for kept in TRIED_AT
        ]
        rows += [r for seed in CHOOSING for r in _once(task, "try", seed, candidates, folder)]
    best |= {("d2_auto", kept): AUTO for kept in KEPT}
    candidates = [
        Candidate(method, best.get((method, kept), Setting()), kept)
        for method in METHODS
        for kept in KEPT
    ]
    candidates.append(Candidate("full", Setting(), "1"))
    return rows + [r for seed in REPORTED for r in _once(task, "report", seed, candidates, folder)]


def choose(rows: list[Row], method: str, kept: str, settings: list[Setting]) -> Setting:
    """The setting of the highest mean accuracy on what was held out; of equals, the first."""

    def mean(setting: Setting) -> float:
        return float(
            np.mean(
                [
                    row["accuracy"]
                    for row in rows
                    if (row["method"], row["kept"]) == (method, kept)
                    and row["setting"] == asdict(setting)
                ]
            )
        )

    return max(settings, key=mean)


def _once(
    task: Task, phase: str, seed: int, candidates: list[Candidate], folder: Path
) -> list[Row]:
    """All candidates on one seed, from the cache if they are there."""
    what = [
        [task.name, phase, seed, data.HELD_OUT, data.TEST_SHARE, data.MNIST1D, data.LARGEST],
        [task.data.rows.shape, asdict(task.data.network)],
        [asdict(c) for c in candidates],
    ]
    digest = hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()
    path = folder / f"{phase}-{seed}-{digest}.jsonl"
    if not path.exists():
        started = time.process_time()
        rows = compete(task, data.draw(task, seed, choosing=phase != "report"), seed, candidates)
        seconds = time.process_time() - started
        changes = ["git", "status", "--porcelain", "d2filter", "jobs"]
        dirty = subprocess.run(changes, capture_output=True, check=True).stdout
        code = commit() + (" with changes" if dirty else "")
        for row in rows:
            row.update(
                code=code, task=task.name, phase=phase, seed=seed, seconds=seconds / len(rows)
            )
        aside = path.with_suffix(".part")
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        aside.replace(path)
        print(f"{task.name}, {phase}, seed {seed}: {seconds:.0f} s", flush=True)
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def compete(task: Task, drawn: data.Drawn, seed: int, candidates: list[Candidate]) -> list[Row]:
    """Choose the subset of every candidate, train on it, judge."""
    network, classes, n = task.data.network, task.data.classes, len(drawn.rows)
    subset, hard = _chooser(task, drawn, seed)
    hardness = np.argsort(np.argsort(hard, kind="stable")) / (n - 1)
    subsets = [subset(one) for one in candidates]
    layers = data.train(network, classes, drawn.rows, drawn.label, subsets, seed=seed)
    rows = []
    for which, (one, kept) in enumerate(zip(candidates, subsets, strict=True)):
        _, logits = data.predict(network, layers, which, drawn.judge_rows)
        rows.append(
            {
                **asdict(one),
                "accuracy": float(np.mean(logits.argmax(axis=1) == drawn.judge_label)),
                "share": len(kept) / n,
                "wrong": float(np.mean(drawn.wrong[kept])),
                "hardness": float(np.mean(hardness[kept])),
                "classes": np.bincount(drawn.label[kept], minlength=classes).tolist(),
            }
        )
    return rows


def _chooser(task: Task, drawn: data.Drawn, seed: int) -> tuple[Callable[[Candidate], I64], F32]:
    """A function from a candidate to the row numbers that it keeps, best first; the difficulty."""
    log, learned = _log(task, drawn, seed)
    n = len(drawn.rows)
    features = {
        "rows": drawn.rows,
        "learned": drawn.rows if task.data.embedded else learned,
    }

    @cache
    def difficulty(name: str) -> F32:
        if name == "easiest":
            return -difficulty("margin")
        values = scores.function_of(name)(log, drawn.label)
        return scores.difficulty(values, scores.SCORES[name].kept_first)

    @cache
    def d2(setting: Setting, kept: str = "0.3") -> d2filter.RankedPool:
        return d2filter.rank(
            features[setting.features],
            difficulty(setting.score),
            n_neighbors=setting.k,
            collapse_copies=None,
            gamma=setting.gamma,
            gamma_scale=setting.gamma_scale,
            kernel=setting.kernel,
            forward=setting.forward,
            reverse=setting.reverse,
            undirected=setting.undirected,
            groups=drawn.label,
            cut_hardest=setting.cut,
            learned_below=0.0,  # of the margin
            tuned_for=kept,
            group_budgets="proportional",
        )

    @cache
    def pool() -> selectors.Pool:
        graph = d2(Setting())
        rows = features["learned"]
        return selectors.Pool(
            hi=np.zeros(n, np.uint64),
            lo=np.arange(n, dtype=np.uint64),
            difficulty=difficulty("margin"),
            # of length 1, as D2 has them
            features=rows / np.linalg.norm(rows, axis=1, keepdims=True),
            neighbors=graph.neighbors,
            sqdist=graph.sqdist,
            group=drawn.label,
            seed=seed,
        )

    @cache
    def order(method: str, cut: Any) -> I64:
        if method == "random_by_class":
            return _in_each_class(selectors.order("random", pool()), drawn.label)
        if method == "ccs":
            return selectors.ccs(pool(), cut=cut)
        return selectors.order(method, pool())

    def subset(one: Candidate) -> I64:
        if one.method == "full":
            return np.arange(n)
        if one.method == "d2_auto":
            return d2(one.setting, one.kept).select(one.kept)
        if one.method.startswith("d2"):
            return d2(one.setting).select(one.kept)
        size = budget.budget_of(n, fraction=budget.parse_fraction(one.kept))
        return order(one.method, one.setting.cut)[:size]

    return subset, difficulty("margin")


def _log(task: Task, drawn: data.Drawn, seed: int) -> tuple[F32, F32]:
    """Probabilities after every epoch on all data (n, e, classes), and the last features (n, h)."""
    network = task.data.network
    epochs: list[F32] = []
    features: list[F32] = []

    def watch(layers: data.Layers) -> None:
        last, logits = data.predict(network, layers, 0, drawn.rows)
        epochs.append(np.asarray(training_dynamics.softmax(logits), np.float32))
        features[:] = [last]

    everything = [np.arange(len(drawn.rows))]
    data.train(
        network, task.data.classes, drawn.rows, drawn.label, everything, seed=seed, watch=watch
    )
    return np.stack(epochs, axis=1), features[0]


def _in_each_class(order: I64, label: I64) -> I64:
    """The order rearranged so that every prefix has the classes in their shares."""
    place = np.empty(len(order))
    for one in np.unique(label):
        rows = order[label[order] == one]
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return order[np.argsort(place[order], kind="stable")]


@dataclass(frozen=True, slots=True)
class Accuracies:
    """What was reported of one task, in percent; arrays follow REPORTED."""

    rows: list[Row]

    def of(self, method: str, kept: str, field: str = "accuracy") -> F32:
        """(seeds,) percent."""
        some = sorted((r["seed"], r[field]) for r in self.rows if _is(r, method, kept))
        return np.array([100 * value for _, value in some], np.float32)

    def lead(self, method: str, kept: str, other: str = "random") -> tuple[float, float]:
        """Mean lead over another method and its standard error, seed against same seed."""
        return _mean(self.of(method, kept) - self.of(other, kept))

    def ahead(self, method: str, kept: str, other: str = "random") -> int:
        """1 ahead, −1 behind, by more than two standard errors; else 0."""
        mean, error = self.lead(method, kept, other)
        return int(mean > 2 * error) - int(mean < -2 * error)

    def first(self, kept: str, *, but: str = "") -> str:
        """The method of the highest mean."""
        return max((m for m in METHODS if m != but), key=lambda m: self.of(m, kept).mean())


def _is(row: Row, method: str, kept: str) -> bool:
    return bool(row["phase"] == "report" and row["method"] == method and row["kept"] == kept)


def _mean(values: F32) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _write(path: Path, tasks: list[Task], rows: list[Row]) -> None:
    reported = {
        task: Accuracies([r for r in rows if r["task"] == task.name and r["phase"] == "report"])
        for task in tasks
    }
    plot = path.with_suffix(".png")
    minutes = sum(row["seconds"] for row in rows) / 60
    lines = [
        "# D2 on labelled data: accuracy after pruning",
        "",
        f"{made_by('jobs.bench_supervised')} One thread; {len(rows):,} networks trained, "
        f"{minutes:.0f} minutes of one core with the choosing of subsets (embeddings not counted), "
        f"by the code of {', '.join(sorted({row['code'] for row in rows}))}.",
        "",
        f"Test accuracy in percent, mean ± standard error over seeds {_list(REPORTED)}. Bold: the "
        "best of its column, where it is ahead of random by more than two standard errors of the "
        "difference (seed against same seed). The split into training and test data is the same "
        "for all seeds; a seed decides first weights, order of batches, wrong labels and what "
        "random takes, so the errors do not hold what another test set would add. All networks "
        "of a data set take the same number of steps.",
        "",
        "Difficulty is the accumulated margin, smallest first. The graph is built on the "
        "penultimate layer of the network trained on everything, for texts on their embeddings. "
        "D2 seeks neighbors within the class and keeps the classes in their shares; "
        '"random, in each class" shows what the shares alone are worth. '
        f"Chosen: k of {_list(NEIGHBORS)}, gamma of {_list(GAMMAS)} in units of the "
        f"median squared neighbor distance, cut of the hardest of {_list(CUTS)}, for every data "
        f"set and share, by the accuracy on {data.HELD_OUT:.0%} of the training data, held out, "
        f'over seeds {_list(CHOOSING)}; labels there are as wrong as in the rest. "D2, k=5, '
        'gamma=0.1" has the published values, on squared distances of rows of length 1; its cut '
        'and that of CCS are chosen of the same three in the same way. "D2, gamma and cut auto" '
        "chooses nothing by accuracy: k=10, `algorithm/greedy/auto_gamma.py`, and "
        "`algorithm/greedy/auto_cut.py`, "
        "whose form was found on CIFAR-10 and on none of these sets. How hard: the mean "
        "percentile of the difficulty among all training data, 50 for random.",
        "",
        f"![accuracy against the share kept]({plot.name})",
    ]
    for task, found in reported.items():
        lines += ["", *_section(task, found)]
    lines += ["", "## What the figures say", "", *_says(reported)]
    lines += _tried(tasks, rows)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    _plot(reported, plot)
    print("\n".join(lines))


def _list(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _section(task: Task, found: Accuracies) -> list[str]:
    mean, error = _mean(found.of("full", "1"))
    lines = [
        f"## {task.name}",
        "",
        f"{task.data.summary}; {len(task.data.rows):,} rows to prune, "
        f"{len(task.data.test_rows):,} to test on, {task.data.network.steps} steps of "
        f"{task.data.network.batch}. All training data: {mean:.1f} ± {error:.1f}.",
        "",
        "| pruned | " + " | ".join(map(data.pruned, KEPT)) + " |",
        "|---" * (len(KEPT) + 1) + "|",
    ]
    for method, name in METHODS.items():
        cells = []
        for kept in KEPT:
            mean, error = _mean(found.of(method, kept))
            cell = f"{mean:.1f} ± {error:.1f}"
            best = found.first(kept) == method and found.ahead(method, kept) > 0
            cells.append(f"**{cell}**" if best else cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| *chosen for D2* | " + " | ".join(_chosen(found, k) for k in KEPT) + " |")
    hardness = (f"{found.of('d2', kept, 'hardness').mean():.0f}" for kept in KEPT)
    lines.append("| *how hard what D2 keeps is* | " + " | ".join(hardness) + " |")
    if task.noise:
        lines += ["", "Wrong labels in what is kept, percent:", "", *lines[4:6]]
        for method, name in METHODS.items():
            shares = (found.of(method, kept, "wrong").mean() for kept in KEPT)
            lines.append(f"| {name} | " + " | ".join(f"{share:.1f}" for share in shares) + " |")
    return lines


def _chosen(found: Accuracies, kept: str) -> str:
    setting = next(r["setting"] for r in found.rows if _is(r, "d2", kept))
    return f"k={setting['k']}, gamma={setting['gamma']:g}, cut={setting['cut']:g}"


def _says(reported: dict[Task, Accuracies]) -> list[str]:
    """The figures in sentences, made from the figures."""
    cells = [(found, kept) for found in reported.values() for kept in KEPT]
    lines = [
        f"Of the {len(cells)} columns above, D2 with gamma and cut auto has the highest mean in "
        f"{sum(found.first(kept) == OURS for found, kept in cells)}. Against each of the others, "
        "counted where the difference is more than two standard errors:",
        "",
        "| D2, auto, against | ahead | behind | neither | points on average |",
        "|---|---|---|---|---|",
    ]
    for other, name in METHODS.items():
        if other == OURS:
            continue
        signs = [found.ahead(OURS, kept, other) for found, kept in cells]
        mean = np.mean([found.lead(OURS, kept, other)[0] for found, kept in cells])
        counts = " | ".join(str(signs.count(sign)) for sign in (1, -1, 0))
        lines.append(f"| {name} | {counts} | {mean:+.1f} |")
    lines += [
        "",
        "The best other method is picked after the fact, column by column, which favors it:",
        "",
    ]
    for task, found in reported.items():
        first = _shares(found.first(kept) == OURS for kept in KEPT)
        ahead, behind = (
            _shares(found.ahead(OURS, kept) == sign for kept in KEPT) for sign in (1, -1)
        )
        words = []
        for kept in KEPT:
            rival = found.first(kept, but=OURS)
            words.append(f"at {data.pruned(kept)} {_points(found.lead(OURS, kept))} against random")
            if rival == "random":
                words[-1] += ", the best other"
            else:
                lead = _points(found.lead(OURS, kept, rival))
                words[-1] += f" and {lead} against the best other, {METHODS[rival]}"
        lines.append(
            f"- **{task.name}**: D2, auto, is first at {first} pruned, ahead of random by more "
            f"than two standard errors at {ahead}, behind at {behind}; " + "; ".join(words) + "."
        )
    return lines


def _shares(which: Iterable[bool]) -> str:
    named = [data.pruned(kept) for kept, holds in zip(KEPT, which, strict=True) if holds]
    return ", ".join(named) or "no share"


def _points(lead: tuple[float, float]) -> str:
    return f"{lead[0]:+.1f} ± {lead[1]:.1f}".replace("-", "−")


def _tried(tasks: list[Task], rows: list[Row]) -> list[str]:
    """Accuracy on held-out data of the chosen setting with one word changed."""
    rows = [r for r in rows if r["phase"] == "try" or r["method"] == "random"]
    rows = [r for r in rows if r["phase"] != "report" and r["kept"] in TRIED_AT]
    if not any(r["phase"] == "try" for r in rows):
        return []
    columns = list(itertools.product(tasks, TRIED_AT))
    lines = [
        "",
        "## What else was tried",
        "",
        "The chosen setting with one thing changed: accuracy in percent on what was held out of "
        f"the training data, mean ± standard error over seeds {_list(CHOOSING)}. These seeds "
        "chose the setting, which favors it. None of it went into the tables above.",
        "",
        "| | " + " | ".join(f"{task.name}, {data.pruned(k)} pruned" for task, k in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method in ("random", *(f"d2: {name}" for name in CHANGES)):
        cells = []
        for task, kept in columns:
            some = [
                100 * r["accuracy"]
                for r in rows
                if (r["task"], r["method"], r["kept"]) == (task.name, method, kept)
            ]
            mean, error = _mean(np.array(some, np.float32))
            cells.append(f"{mean:.1f} ± {error:.1f}")
        lines.append(f"| {method.removeprefix('d2: ')} | " + " | ".join(cells) + " |")
    return lines


def _plot(reported: dict[Task, Accuracies], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6))
    panels = axes.ravel()
    places = 100 * np.array([float(kept) for kept in KEPT])
    for panel, (task, found) in zip(panels, reported.items(), strict=False):
        for method, (color, style) in _LINES.items():
            means = np.array([_mean(found.of(method, kept)) for kept in KEPT])
            panel.errorbar(
                places,
                means[:, 0],
                means[:, 1],
                marker="o",
                markersize=5 if method == "d2" else 3,
                linewidth=2.6 if method == "d2" else 1.2,
                linestyle=style,
                color=color,
                capsize=2,
                zorder=3 if method == "d2" else 2,
                label=METHODS[method],
            )
        full = found.of("full", "1").mean()
        panel.axhline(full, color="gray", linestyle=":", label="all training data")
        # lines far below random would press all others together
        low = min(found.of("random", kept).mean() for kept in KEPT)
        panel.set_ylim(bottom=max(panel.get_ylim()[0], low - (full - low) / 2))
        panel.set_xticks(places)
        panel.set_title(task.name)
        panel.set_xlabel("kept, % of the training data")
        panel.set_ylabel("test accuracy, %")
        panel.grid(alpha=0.3)
    for panel in panels[len(reported) :]:
        panel.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    note = "lines that leave a panel go on below it"
    panels[-1].legend(handles, labels, loc="center", fontsize=10, title=note)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
