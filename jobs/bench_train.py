"""Benchmark: trains small CLIP models from scratch on the subset of each method and compares them.

    python -m jobs.bench_train --out /tmp/planted --results jobs/results/bench_train.md

The pools are those of `jobs.bench_planted` (drawn here if OUT has none): near-copies, swapped
captions, rare concepts, with scores and graph from the bundled model. A model with other, much
smaller towers is trained on each subset with equally many steps and tested on clean pairs drawn
with other seeds. It uses one core. Finished figures are in OUT/train.jsonl; another call continues
from there.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from d2filter.algorithm.knn import products
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.tools import scenes
from d2filter.tools.scene_words import BACKGROUNDS, COLORS, SHAPE_WORDS
from jobs import bench_planted as planted
from jobs.bench import made_by
from jobs.bench_extra import pyplot
from jobs.bench_planted import Candidate

Row = dict[str, Any]
Pictures = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

SEEDS, STARTS = (2, 3, 4), (0, 1)
SIDE, CONTEXT = 64, 32
# chosen by jobs/results/bench_planted.md, on a pool that is not among these
CHOSEN = Candidate(method="d2", k=10, gamma=10.0, scale="median", copies=0.05)
COLLAPSED = Candidate(method="score", copies=0.05)
ALL = "all pairs"
ORACLE = Candidate(method=planted.BEST)
FEW = [CHOSEN, planted.PUBLISHED, COLLAPSED, Candidate(method="score"), Candidate(method="random")]
MORE = [
    Candidate(method="ccs"),
    Candidate(method="semdedup"),
    ORACLE,
]
# of the subsets that matter most; the others have the first only
REPEATED = [(candidate, 0.3) for candidate in FEW]
RUNS = [*((c, 0.3) for c in [*FEW, *MORE]), (Candidate(method=ALL), 1.0), *((c, 0.5) for c in FEW)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All that a training depends on but its pairs."""

    steps: int = 160
    batch: int = 192
    learning_rate: float = 5e-3
    """Peak of the schedule: linear warm-up, then a cosine down to zero."""
    warmup: int = 20
    weight_decay: float = 0.05
    """AdamW's."""
    width: int = 16
    """Channels after the first convolution; the others have 2 and 4 times as many."""
    text_width: int = 64
    embed: int = 128
    """Columns of an embedding."""


# --- model ----------------------------------------------------------------------------------


class ImageTower(nn.Module):
    """Three convolutions, 64 × 64 pixels → 4 × 4 places, and a projection."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        w = config.width
        self.body = nn.Sequential(
            *_convolution(3, w, kernel=4, stride=4),
            *_convolution(w, 2 * w, kernel=3, stride=2),
            *_convolution(2 * w, 4 * w, kernel=3, stride=2),
        )
        self.projection = nn.Linear(4 * w * (SIDE // 16) ** 2, config.embed)

    def forward(self, pictures: Tensor) -> Tensor:
        """Unit rows [B, embed] from float32 [B, 3, SIDE, SIDE] in −1..1."""
        return F.normalize(self.projection(self.body(pictures).flatten(1)), dim=-1)


def _convolution(before: int, after: int, *, kernel: int, stride: int) -> list[nn.Module]:
    padding = (kernel - stride + 1) // 2
    convolution = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


class TextTower(nn.Module):
    """Words and places, one transformer layer, their mean, and a projection."""

    def __init__(self, config: TrainConfig, words: int) -> None:
        super().__init__()
        w = config.text_width
        self.words = nn.Embedding(words, w, padding_idx=0)
        self.places = nn.Parameter(torch.randn(CONTEXT, w) * 0.01)
        self.layer = nn.TransformerEncoderLayer(
            w, nhead=4, dim_feedforward=2 * w, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(w)
        self.projection = nn.Linear(w, config.embed)

    def forward(self, tokens: Tensor) -> Tensor:
        """Unit rows [B, embed] from int64 [B, L ≤ CONTEXT], 0 after the end."""
        there = tokens != 0
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        x = self.norm(self.layer(x, src_key_padding_mask=~there))
        weight = there.float()[:, :, None]
        return F.normalize(self.projection((x * weight).sum(1) / weight.sum(1)), dim=-1)


class SmallClip(nn.Module):
    """Both towers and the learned temperature."""

    def __init__(self, config: TrainConfig, words: int) -> None:
        super().__init__()
        self.image = ImageTower(config)
        self.text = TextTower(config, words)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def loss(self, pictures: Tensor, tokens: Tensor) -> Tensor:
        """Contrastive loss of a batch: the mean of both cross entropies."""
        similarity = self.image(pictures) @ self.text(tokens).T
        logits = self.log_scale.clamp(max=math.log(100)).exp() * similarity
        right = torch.arange(len(logits))
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


# --- data -----------------------------------------------------------------------------------


class Vocabulary:
    """Words of captions as numbers: 0 ends a caption, 1 is any word that was never seen."""

    def __init__(self, captions: Sequence[str]) -> None:
        words = sorted({word for caption in captions for word in caption.split()})
        self._number = {word: at for at, word in enumerate(words, 2)}

    def __len__(self) -> int:
        return len(self._number) + 2

    def tokens(self, captions: Sequence[str]) -> Tokens:
        """(n, CONTEXT) int64."""
        out = np.zeros((len(captions), CONTEXT), np.int64)
        for row, caption in enumerate(captions):
            numbers = [self._number.get(word, 1) for word in caption.split()][:CONTEXT]
            out[row, : len(numbers)] = numbers
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """n pictures with captions."""

    pictures: Pictures
    """(n, SIDE, SIDE, 3)"""
    captions: list[str]


def read_pairs(pool: Folder, hi: npt.NDArray[np.uint64], lo: npt.NDArray[np.uint64]) -> Pairs:
    """All pairs of a pool in the order of these uids."""
    row = {uid: at for at, uid in enumerate(uid_format.to_hex(hi, lo))}
    pictures = np.empty((len(hi), SIDE, SIDE, 3), np.uint8)
    captions = [""] * len(hi)
    shards = pool.sub("shards")
    for name in shards.names(".tar"):
        with shards.reading(name) as stream, tarfile.open(fileobj=stream) as tar:
            members = ((m.name.rsplit(".", 1), tar.extractfile(m)) for m in tar)
            files = [(key, suffix, f.read()) for (key, suffix), f in members if f is not None]
        samples: dict[str, dict[str, bytes]] = {}
        for key, suffix, content in files:
            samples.setdefault(key, {})[suffix] = content
        for sample in samples.values():
            at = row[json.loads(sample["json"])["uid"]]
            pictures[at] = _decoded(sample["jpg"])
            captions[at] = sample["txt"].decode()
    return Pairs(pictures=pictures, captions=captions)


def _decoded(content: bytes) -> Pictures:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests:
    """Clean pairs that no pool has."""

    retrieval: list[Pairs]
    """sets of TEST_PAIRS, every pair another scene, all concepts alike often"""
    objects: Pairs
    """scenes of one object"""
    words: dict[str, npt.NDArray[np.int64]]
    """(n,) number of each one's color, shape and background in the tables of words"""


TEST_SETS, TEST_PAIRS = 4, 1_000


def draw_tests(seed: int) -> Tests:
    """The tests of a pool, drawn with seeds that the pool does not use."""
    rng = np.random.default_rng([seed, 100])
    sets = [[scenes.random_scene(rng) for _ in range(TEST_PAIRS)] for _ in range(TEST_SETS)]
    single: list[scenes.Scene] = []
    while len(single) < TEST_PAIRS:
        scene = scenes.random_scene(rng)
        if len(scene.things) == 1:
            single.append(scene)
    words = {
        "color": [list(COLORS).index(scene.things[0].color) for scene in single],
        "shape": [list(SHAPE_WORDS).index(scene.things[0].shape) for scene in single],
        "background": [list(BACKGROUNDS).index(scene.background) for scene in single],
    }
    return Tests(
        retrieval=[_as_pairs(drawn, rng) for drawn in sets],
        objects=_as_pairs(single, rng),
        words={what: np.array(numbers, np.int64) for what, numbers in words.items()},
    )


def _as_pairs(drawn: Sequence[scenes.Scene], rng: np.random.Generator) -> Pairs:
    pictures = np.empty((len(drawn), SIDE, SIDE, 3), np.uint8)
    for at, scene in enumerate(drawn):
        stream = io.BytesIO()
        scenes.draw(scene, SIDE).save(stream, "JPEG", quality=int(rng.integers(85, 93)))
        pictures[at] = _decoded(stream.getvalue())
    return Pairs(pictures=pictures, captions=[scenes.caption(scene, rng) for scene in drawn])


# --- training and testing -------------------------------------------------------------------


def train(pairs: Pairs, tokens: Tokens, rows: npt.NDArray[np.int64], seed: int, words: int,
          config: TrainConfig) -> SmallClip:  # fmt: skip
    """A model trained on some rows; the seed gives weights and the order of the pairs."""
    torch.manual_seed(seed)
    model = SmallClip(config, words)
    model.image.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    rng = np.random.default_rng([seed, 101])
    order = np.concatenate(
        [rng.permutation(rows) for _ in range(1 + config.steps * config.batch // len(rows))]
    )
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        some = order[step * config.batch : (step + 1) * config.batch]
        loss = model.loss(_images(pairs.pictures[some]), _texts(tokens[some]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def _schedule(step: int, config: TrainConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / (config.steps - config.warmup)))


def _images(pictures: Pictures) -> Tensor:
    batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return batch.contiguous(memory_format=torch.channels_last)


def _texts(tokens: Tokens) -> Tensor:
    return torch.from_numpy(tokens[:, : int((tokens != 0).sum(axis=1).max())])


@torch.no_grad()
def test(model: SmallClip, tests: Tests, vocabulary: Vocabulary) -> Row:
    """Recall of the right caption, and accuracy of naming color, shape and background of scenes
    with one object: each word by the mean of all prompts that have it."""
    ranks = []
    for pairs in tests.retrieval:
        texts = model.text(_texts(vocabulary.tokens(pairs.captions)))
        similarity = model.image(_images(pairs.pictures)) @ texts.T
        # ties count as misses
        ranks.append((similarity >= similarity.diagonal()[:, None]).sum(1))
    rank = torch.cat(ranks)
    words = itertools.product(COLORS, SHAPE_WORDS, BACKGROUNDS)
    prompts = [f"a {color} {shape} on a {ground} background" for color, shape, ground in words]
    shape = (len(COLORS), len(SHAPE_WORDS), len(BACKGROUNDS), -1)
    named = model.text(_texts(vocabulary.tokens(prompts))).view(shape)
    objects = model.image(_images(tests.objects.pictures))
    answers = {
        "color": objects @ F.normalize(named.mean((1, 2)), dim=-1).T,
        "shape": objects @ F.normalize(named.mean((0, 2)), dim=-1).T,
        "background": objects @ F.normalize(named.mean((0, 1)), dim=-1).T,
    }
    figures_of = {
        what: float((answer.argmax(1).numpy() == tests.words[what]).mean())
        for what, answer in answers.items()
    }
    return {
        "r1": float((rank <= 1).float().mean()),
        "r5": float((rank <= 5).float().mean()),
        **figures_of,
    }


def starts_of(candidate: Candidate, fraction: float) -> tuple[int, ...]:
    """Starts that a subset is trained from."""
    return STARTS if (candidate, fraction) in REPEATED else STARTS[:1]


class Prepared:
    """A pool and its tests in memory."""

    def __init__(self, folder: str, seed: int) -> None:
        pool = planted.make_pool(folder, seed)
        self.seed = seed
        self.known = planted.Planted(pool)
        self.pairs = read_pairs(pool, self.known.hi, self.known.lo)
        self.tests = draw_tests(seed)
        self.vocabulary = Vocabulary(self.pairs.captions)
        self.tokens = self.vocabulary.tokens(self.pairs.captions)

    def run(self, candidate: Candidate, fraction: float, start: int) -> Row:
        """Train on what a method keeps, and test."""
        n = len(self.tokens)
        order = np.arange(n) if candidate.method == ALL else self.known.order(candidate)
        chosen = np.sort(order[: round(fraction * n)])
        started = time.process_time()
        seed = 10 * self.seed + start
        model = train(self.pairs, self.tokens, chosen, seed, len(self.vocabulary), TrainConfig())
        found = self.known.judge(order, fraction)
        return {
            **test(model, self.tests, self.vocabulary),
            "useful": found["useful"],
            "swapped": found["swapped"],
            "seconds": round(time.process_time() - started, 1),
        }


def measure(folder: str, say: Callable[[str], None]) -> list[Row]:
    """All figures; those that OUT/train.jsonl has are not made again."""
    path = Path(folder) / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    there = {(row["seed"], row["start"], row["name"], row["kept"]) for row in rows}
    pools: dict[int, Prepared] = {}
    for start, seed, (candidate, fraction) in itertools.product(STARTS, SEEDS, RUNS):
        if (seed, start, str(candidate), fraction) in there:
            continue
        if start not in starts_of(candidate, fraction):
            continue
        if seed not in pools:
            pools[seed] = Prepared(folder, seed)
        row = {
            "seed": seed,
            "start": start,
            "name": str(candidate),
            "kept": fraction,
            **pools[seed].run(candidate, fraction, start),
        }
        with path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        rows.append(row)
        say(f"{row}")
    return rows


# --- report ---------------------------------------------------------------------------------

_TESTED = {"r1": "R@1", "r5": "R@5", "background": "background", "color": "color", "shape": "shape"}


class Figures:
    """Mean and standard error of what was measured."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.at = {(r["seed"], r["start"], r["name"], r["kept"]): r for r in rows}

    def values(self, candidate: Candidate, fraction: float, what: str) -> F64:
        """A figure of each pool and start, in percent; those of the first starts come first."""
        runs = [(seed, start) for start in starts_of(candidate, fraction) for seed in SEEDS]
        found = [self.at[seed, start, str(candidate), fraction] for seed, start in runs]
        return np.array([100 * row[what] for row in found])


def _cell(values: F64) -> str:
    return f"{values.mean():.1f} ± {_error(values):.1f}"


def _error(values: F64) -> float:
    return float(values.std(ddof=1) / math.sqrt(values.size))


def _label(candidate: Candidate) -> str:
    note = {CHOSEN: ", chosen", planted.PUBLISHED: ", published"}.get(candidate)
    return str(candidate) if note is None else f"**{candidate}**{note}"


def report(figures: Figures) -> list[str]:
    """The results file, line by line."""
    config = TrainConfig()
    seconds = [row["seconds"] for row in figures.rows]
    repeated = ", ".join(str(candidate) for candidate, _ in REPEATED)
    out = [
        "# Models trained on what each method keeps",
        "",
        made_by("jobs.bench_train"),
        "",
        f"Pools of {planted.PAIRS:,} drawn pairs as in [bench_planted.md](bench_planted.md): 30% "
        "near-copies, 20% swapped captions, scores and graph by the bundled model. A small CLIP "
        f"(three convolutions of {config.width}, {2 * config.width} and {4 * config.width} "
        f"channels; one transformer layer of {config.text_width} columns; {config.embed} columns "
        f"out) is trained from scratch on each subset: {config.steps} steps of {config.batch} "
        "pairs whatever the size of the subset, a start's weights the same for all subsets of a "
        f"pool, one torch thread, {min(seconds):.0f} to {max(seconds):.0f} CPU seconds each with "
        f"the test. Tested on clean pairs that no pool has: the right caption among "
        f"{TEST_PAIRS:,} for a picture, in {TEST_SETS} sets (R@1, R@5; chance 0.1 and 0.5), and "
        "the word for background, color and shape of scenes with one object without training for "
        "it (chance 10.0, 8.3 and 8.3). All in percent, mean ± standard error over trainings: the "
        f"pools of seeds {', '.join(map(str, SEEDS))}, one start each, and {len(STARTS)} for "
        f"{len(REPEATED)} subsets of {REPEATED[0][1]:g} ({repeated}). D2's "
        "setting and the learning rate were chosen on the pool of seed "
        f"{planted.CHOOSING}; *useful* and *swapped* as in bench_planted.",
    ]  # fmt: skip
    for fraction in sorted({fraction for _, fraction in RUNS}):
        out += [
            "",
            f"## Kept: {fraction:.1f} of the pool",
            "",
            f"| | {' | '.join(_TESTED.values())} | R@1, D2 as chosen less it | useful | swapped |",
            "|---" * (len(_TESTED) + 4) + "|",
        ]
        some = [c for c, f in RUNS if f == fraction]
        for candidate in sorted(some, key=lambda c: -figures.values(c, fraction, "r1").mean()):
            values = [figures.values(candidate, fraction, what) for what in _TESTED]
            cells = [_cell(v) for v in values]
            cells.append(_gain(figures, candidate, fraction))
            cells += [
                f"{figures.values(candidate, fraction, what).mean():.1f}"
                for what in ("useful", "swapped")
            ]
            out.append(f"| {_label(candidate)} | {' | '.join(cells)} |")
    return [*out, "", "![R@1](bench_train.png)", "", "## What the figures say", "", *_said(figures)]


def _gain(figures: Figures, candidate: Candidate, fraction: float) -> str:
    """Points of R@1 that D2 as chosen is ahead on the same pools."""
    if candidate == CHOSEN:
        return ""
    own = figures.values(CHOSEN, 0.3 if fraction == 1.0 else fraction, "r1")
    its = figures.values(candidate, fraction, "r1")
    both = min(own.size, its.size)
    gain = own[:both] - its[:both]
    return f"{gain.mean():+.1f} ± {_error(gain):.1f}"


def _said(figures: Figures) -> list[str]:
    """Sentences that follow from the figures."""
    out = []
    for fraction in (0.3, 0.5):
        some = [c for c, f in RUNS if f == fraction and c not in (CHOSEN, ORACLE)]
        gains = "; ".join(f"{c} {_gain(figures, c, fraction)}" for c in some)
        out.append(
            f"- Kept {fraction:g}: D2 as chosen has R@1 "
            f"{_cell(figures.values(CHOSEN, fraction, 'r1'))}; points ahead of each other method "
            f"on the same pools: {gains}."
        )
    out.append(
        f"- The best subset of 0.3 that the planted truth allows has R@1 "
        f"{_cell(figures.values(ORACLE, 0.3, 'r1'))}, the whole pool with the same steps "
        f"{_cell(figures.values(Candidate(method=ALL), 1.0, 'r1'))}."
    )
    rows = [row for row in figures.rows if row["kept"] < 1]
    clean = [row for row in rows if row["swapped"] < 0.01]
    r, r_clean = (
        np.corrcoef([row["useful"] for row in some], [row["r1"] for row in some])[0, 1]
        for some in (rows, clean)
    )
    out.append(
        f"- R@1 and the useful share of the subset: correlation {r:.2f} over all {len(rows)} "
        f"trainings on a subset, {r_clean:.2f} over the {len(clean)} on one with less than 1% "
        "swapped."
    )
    return out


def plot(figures: Figures, path: Path) -> None:
    """R@1 of each subset, mean and standard error."""
    plt = pyplot()
    groups = ((0.3, 1.0), (0.5,))
    heights = [sum(f in group for _, f in RUNS) for group in groups]
    figure, axes = plt.subplots(
        2, 2, figsize=(11, 6), sharex="col", sharey="row", gridspec_kw={"height_ratios": heights}
    )
    most = max(figures.values(c, f, "r1").max() for c, f in RUNS)
    for row, group in zip(axes, groups, strict=True):
        some = [(c, f) for c, f in RUNS if f in group]
        some.sort(key=lambda run: figures.values(run[0], run[1], "r1").mean())
        for axis in row:
            for at, (candidate, fraction) in enumerate(some):
                values = figures.values(candidate, fraction, "r1")
                axis.errorbar(
                    values.mean(),
                    at,
                    xerr=_error(values),
                    fmt="o",
                    capsize=4,
                    color={"d2": "red", ORACLE.method: "black"}.get(candidate.method, "tab:blue"),
                )
                axis.plot(values, [at] * values.size, ".", color="gray", markersize=4, zorder=0)
            axis.grid(alpha=0.3)
            axis.set_ylim(-0.6, len(some) - 0.4)
        names = [_label(c).replace("**", "") + " (1.0)" * (f == 1) for c, f in some]
        row[0].set_yticks(range(len(some)), names)
        row[0].set_title(f"kept: {group[0]:g} of the pool", fontsize=10)
        row[1].set_title("the same, the right end", fontsize=10)
    axes[1, 0].set_xlabel("R@1 of clean test pairs, %")
    axes[1, 1].set_xlabel("mean ± standard error; gray: each training")
    axes[1, 1].set_xlim(0.9 * most, 1.02 * most)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", required=True, help="folder for the pools and finished figures")
    parser.add_argument("--results", default="jobs/results/bench_train.md")
    arguments = parser.parse_args()
    products.use_threads(1)
    torch.set_num_threads(1)
    figures = Figures(measure(arguments.out, lambda line: print(line, flush=True)))
    results = Path(arguments.results)
    planted.publish(results, report(figures))
    plot(figures, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
