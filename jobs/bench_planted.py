"""Benchmark: all methods and settings of D2 on synthetic pools whose truth is known.

    python -m jobs.bench_planted --out /tmp/planted --results jobs/results/bench_planted.md

A pool has near-copies, swapped captions and *rare concepts*: pairs of a color and a shape that a
few scenes show and all others avoid. Each pool gets one graph with the largest k, from the bundled
model; a smaller k is a prefix of each list. D2's setting is chosen on one pool and reported on the
others. Finished figures are in OUT/planted.jsonl; another call continues from there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from d2filter import config
from d2filter.algorithm.greedy import demoted
from d2filter.algorithm.knn import products
from d2filter.algorithm.measures import coverage, ground_truth
from d2filter.algorithm.methods import selectors
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder, absolute
from d2filter.stages.pipeline import Pipeline
from d2filter.stages.rank import in_memory as rank_in_memory
from d2filter.tools import demo, scenes
from d2filter.tools.scene_words import COLORS, SHAPE_WORDS
from jobs.bench import made_by
from jobs.bench_extra import pyplot

Row = dict[str, Any]
F64 = np.ndarray[Any, np.dtype[np.float64]]

CHOOSING, REPORTED = 1, (2, 3, 4)
PAIRS, SHARDS = 20_000, 8
RARE, SCENES_EACH = 36, 3
NEIGHBORS = (1, 2, 5, 10, 15)
GAMMAS = {"none": (0.1, 1.0, 5.0, 10.0, 20.0), "median": (0.3, 1.0, 3.0, 10.0, 30.0)}
COPIES = (None, 0.05, 0.2)
COPIES_OTHERS = (None, 0.05, 0.1, 0.2)  # all that the other methods can be told here
FRACTIONS = (0.1, 0.3, 0.5, 0.7)
HELD_OUT = 2_000
# two minutes a ranking on one core: without collapsing, and not on the pool for choosing
SLOW = ("k_center", "herding")
BEST = "best that is possible"
FACTS = "facts"
PERCENTILES = (0.05, 0.5, 0.95)
BY_HAND = "## Why: read by hand from these figures\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A method, and what it is told."""

    method: str
    k: int = max(NEIGHBORS)
    gamma: float = 1.0
    scale: str = "none"
    copies: float | None = None
    tuned_for: float | None = None
    """D2 fits itself to this share, whatever else is said here"""

    def __str__(self) -> str:
        name = self.method
        if self.tuned_for is not None:
            return "D2 by itself"
        if name == "d2":
            name = f"D2 k={self.k} gamma={self.gamma:g}" + " median" * (self.scale == "median")
        return name if self.copies is None else f"{name}, copies {self.copies:g}"

    @property
    def rank_config(self) -> config.RankConfig:
        """The same for the ranking; k is that of the lists that it is given."""
        if self.tuned_for is not None:
            return config.RankConfig(tuned_for=Decimal(str(self.tuned_for)))
        return config.RankConfig(
            method=self.method,
            gamma=self.gamma,
            kernel="rbf",
            gamma_scale=self.scale,
            collapse_copies=self.copies,
        )


PUBLISHED = Candidate(method="d2", k=1)
BY_ITSELF = [Candidate(method="d2", k=10, tuned_for=fraction) for fraction in FRACTIONS]
D2 = [
    Candidate(method="d2", k=k, gamma=gamma, scale=scale, copies=copies)
    for k, copies, scale in itertools.product(NEIGHBORS, COPIES, GAMMAS)
    for gamma in GAMMAS[scale]
]
OTHERS = [
    Candidate(method=method, copies=copies)
    for copies in COPIES_OTHERS
    for method in selectors.SELECTORS
    if copies is None or method not in SLOW
]


# --- pools ----------------------------------------------------------------------------------


@functools.cache
def rare_concepts(seed: int) -> tuple[tuple[str, str], ...]:
    """The colors and shapes that are rare together in the pool of this seed."""
    every = list(itertools.product(COLORS, SHAPE_WORDS))
    chosen = np.random.default_rng([seed, 4]).choice(len(every), RARE, replace=False)
    return tuple(every[i] for i in chosen)


def concept_of(number: int) -> int:
    """The rare concept that a scene shows, −1 for none."""
    return number // SCENES_EACH if number < RARE * SCENES_EACH else -1


def scene_of(number: int, seed: int) -> scenes.Scene:
    """Scene `number` of a pool: at random among those that show its rare concept and no other."""
    rare = rare_concepts(seed)
    concept = concept_of(number)
    wanted = {rare[concept]} if concept >= 0 else set()
    rng = np.random.default_rng([seed, 1, number])
    while True:
        scene = scenes.random_scene(rng)
        if {(t.color, t.shape) for t in scene.things}.intersection(rare) == wanted:
            return scene


def draw_shard(job: tuple[str, int, int]) -> None:
    """Draw one shard of a pool, and write what is true of its pairs to truth/."""
    url, seed, number = job
    out, name = Folder(url), f"{number:05d}"
    if out.exists(f"truth/{name}.parquet"):
        return
    layout = demo.lay_out(PAIRS, seed)
    rows = np.array_split(np.arange(PAIRS), SHARDS)[number]
    uids = []
    with out.sub("shards").publish(f"{name}.tar") as path, path.open("wb") as stream:
        writer = webdataset.TarWriter(stream, encoder=False, mtime=0)
        for at, row in enumerate(rows.tolist()):
            image, caption = demo.draw_pair(layout, row, seed, scene_of)
            uids.append(uid_format.content_uid(image, caption))
            meta = json.dumps({"uid": uids[-1], "caption": caption}).encode()
            sample = {"__key__": f"{name}{at:04d}", "jpg": image, "txt": caption.encode()}
            writer.write({**sample, "json": meta})
        writer.close()
    truth = {
        "uid": uids,
        "group": layout.scene[rows],
        "swapped": layout.swapped[rows],
        "concept": [concept_of(int(scene)) for scene in layout.scene[rows]],
    }
    with out.sub("truth").publish(f"{name}.parquet") as path:
        pq.write_table(pa.table(truth), path)


def make_pool(folder: str, seed: int) -> Folder:
    """Draw, embed and link the pool of a seed in folder/pool-SEED, unless it is there; its run."""
    out = Folder(absolute(folder)).sub(f"pool-{seed}")
    with multiprocessing.get_context("spawn").Pool(2) as workers:
        workers.map(draw_shard, [(out.url, seed, number) for number in range(SHARDS)], chunksize=1)
    run = config.RunConfig(
        out_dir=out.where("run"),
        embed=config.EmbedConfig(shards=(out.where("shards"),)),
        catalog=config.CatalogConfig(arch="tiny"),
        graph=config.GraphConfig(n_neighbors=max(NEIGHBORS)),
        select=config.SelectConfig(fraction=Decimal("0.3")),
    )
    Pipeline(run, say=print).run("run")
    return out


class Planted:
    """A pool in memory with its truth; all arrays ascend by uid."""

    def __init__(self, pool: Folder) -> None:
        run = pool.sub("run")
        self.known = {k: rank_in_memory.read_pool(run, k, with_features=True) for k in NEIGHBORS}
        whole = self.known[max(NEIGHBORS)]
        part, order = whole.part, whole.order
        self.hi, self.lo = part.hi[order], part.lo[order]
        self.recall = float(run.read_json("stats.json")["graph"]["recall"])
        found: dict[str, tuple[int, bool, int]] = {}
        for name in pool.sub("truth").names(".parquet"):
            with pool.sub("truth").reading(name) as stream:
                truth = pq.read_table(stream).to_pydict()
            columns = (truth["group"], truth["swapped"], truth["concept"])
            found.update(zip(truth["uid"], zip(*columns, strict=True), strict=True))
        facts = [found[uid] for uid in uid_format.to_hex(self.hi, self.lo)]
        self.group = np.array([f[0] for f in facts], np.int64)
        self.swapped = np.array([f[1] for f in facts], np.bool_)
        self.concept = np.array([f[2] for f in facts], np.int64)
        self.rows = whole.rows
        self.held = coverage.hold_out(self.rows, self.hi, self.lo, HELD_OUT)
        right = ~self.swapped[self.held.rows]
        self.held_right = coverage.HeldOut(
            rows=self.held.rows[right],
            neighbors=self.held.neighbors[right],
            distance=self.held.distance[right],
        )

    def facts(self) -> Row:
        """What every ranking has to work with: how far copies and other scenes are."""
        whole = self.known[max(NEIGHBORS)]
        part = whole.part
        near = part.neighbors[whole.order]
        there, near = near >= 0, whole.position[near]
        sqdist = part.sqdist[whole.order]
        right = ~self.swapped
        both = there & right[:, None] & right[near]
        same = self.group[near] == self.group[:, None]
        others_at = np.where(there & ~same, sqdist, np.inf).min(axis=1)
        facts: Row = {
            "copy": np.quantile(sqdist[both & same], PERCENTILES).tolist(),
            "other": np.quantile(others_at[right], PERCENTILES).tolist(),
            "other_swapped": np.quantile(others_at[~right], PERCENTILES).tolist(),
            "other_rare": np.quantile(others_at[right & (self.concept >= 0)], PERCENTILES).tolist(),
            "groups": int(np.unique(self.group[right]).size),
            # squared distance that a gamma "median" counts in, for each k
            "unit": {str(k): demoted.unit(known.part.sqdist) for k, known in self.known.items()},
        }
        for copies in COPIES[1:]:
            last = demoted.mask(
                part.difficulty, part.hi, part.lo, part.neighbors, part.sqdist,
                collapse_copies=copies,
            )[whole.order]  # fmt: skip
            facts[f"last {copies}"] = int(last.sum())
            facts[f"groups {copies}"] = int(np.unique(self.group[right & ~last]).size)
        return facts

    def order(self, candidate: Candidate) -> ground_truth.I64:
        """Rows by ascending uid, best first."""
        if candidate.method == BEST:
            return ground_truth.best_order(self.group, self.swapped)
        known = self.known[candidate.k]
        rank, _, _ = rank_in_memory.ranks_of(known, candidate.rank_config)
        return np.argsort(rank[known.order], kind="stable").astype(np.int64, copy=False)

    def judge(self, order: ground_truth.I64, fraction: float) -> Row:
        """Figures of the first `fraction` of an order."""
        size = round(fraction * len(order))
        kept = np.zeros(len(order), np.bool_)
        kept[order[:size]] = True
        found = ground_truth.usefulness(order, self.group, self.swapped, size)
        there = (self.concept >= 0) & ~self.swapped
        rare = np.unique(self.concept[there & kept]).size / np.unique(self.concept[there]).size
        return {
            "useful": found.useful,
            "swapped": found.swapped,
            "second": 1 - found.useful - found.swapped,
            "groups": found.groups_covered,
            "rare": rare,
            "coverage": coverage.aucpr(self.rows, self.held, kept),
            "coverage_right": coverage.aucpr(self.rows, self.held_right, kept),
        }


# --- figures --------------------------------------------------------------------------------


def measure(folder: str, say: Callable[[str], None]) -> list[Row]:
    """All figures; those that OUT/planted.jsonl has are not made again."""
    path = Path(folder) / "planted.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    there = {(row["seed"], row["name"]) for row in rows}
    for seed in (CHOOSING, *REPORTED):
        candidates = [Candidate(method=BEST), *BY_ITSELF, *D2, *OTHERS]
        if seed == CHOOSING:
            candidates = [c for c in candidates if c.method not in SLOW]
        left = [c for c in candidates if (seed, str(c)) not in there]
        if not left and (seed, FACTS) in there:
            continue
        planted = Planted(make_pool(folder, seed))
        if (seed, FACTS) not in there:
            rows.append({"seed": seed, "name": FACTS, **planted.facts()})
            with path.open("a") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
        for candidate in sorted(left, key=lambda c: c.method in SLOW):
            started = time.perf_counter()
            order = planted.order(candidate)
            seconds = time.perf_counter() - started
            new = [
                {
                    "seed": seed,
                    "name": str(candidate),
                    "kept": fraction,
                    **planted.judge(order, fraction),
                    "recall": planted.recall,
                    "seconds": round(seconds, 2),
                }
                for fraction in FRACTIONS
                if candidate.tuned_for in (None, fraction)
            ]
            with path.open("a") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in new)
            rows += new
            say(f"seed {seed}: {candidate} {seconds:.1f} s")
    return rows


class Figures:
    """Mean and spread of what was measured."""

    def __init__(self, rows: Iterable[Row]) -> None:
        every = list(rows)
        self.rows = [row for row in every if row["name"] != FACTS]
        self.at = {(row["seed"], row["name"], row["kept"]): row for row in self.rows}
        self.facts = [r for r in every if r["name"] == FACTS and r["seed"] in REPORTED]

    def values(self, candidate: Candidate, fraction: float, what: str) -> F64:
        """A figure on each reported pool."""
        return np.array([self.at[seed, str(candidate), fraction][what] for seed in REPORTED])

    def mean(self, candidate: Candidate, fraction: float, what: str = "useful") -> float:
        """Its mean over the reported pools."""
        return float(self.values(candidate, fraction, what).mean())

    def chosen(
        self, candidates: Iterable[Candidate], fractions: Iterable[float] = FRACTIONS
    ) -> Candidate:
        """The largest useful share on the pool for choosing, mean over these fractions."""

        def useful(candidate: Candidate) -> float:
            name = str(candidate)
            return sum(float(self.at[CHOOSING, name, f]["useful"]) for f in fractions)

        return max(candidates, key=useful)


# --- report ---------------------------------------------------------------------------------


def shown(figures: Figures) -> dict[str, Candidate]:
    """Lines of the tables: D2 as chosen and as published, and every other method."""
    best = figures.chosen(D2)
    lines = {
        "**D2 by itself**": BY_ITSELF[0],
        f"**{best}**, chosen": best,
        f"**{PUBLISHED}**, published": PUBLISHED,
    }
    for copies in COPIES:
        if copies is not None:
            line = replace(PUBLISHED, copies=copies)
            lines[str(line)] = line
    plain = figures.chosen(c for c in D2 if c.copies is None)
    lines.setdefault(f"{plain}, chosen without collapsing", plain)
    known = list(selectors.SELECTORS)
    lines |= {str(c): c for c in sorted(OTHERS, key=lambda c: known.index(c.method))}
    return {**lines, BEST: Candidate(method=BEST)}


def report(figures: Figures) -> list[str]:
    """The results file, line by line."""
    best, lines = figures.chosen(D2), shown(figures)
    recalls = [row["recall"] for row in figures.rows]
    out = [
        "# Methods and settings on drawn pools with planted truth",
        "",
        made_by("jobs.bench_planted"),
        "",
        f"Pools of {PAIRS:,} drawn pairs: 30% near-copies, 20% swapped captions, and {RARE} rare "
        f"concepts, each a color and a shape that {SCENES_EACH} scenes show and no other one; "
        f"scores and features (image|text) by the bundled model, one graph of k={max(NEIGHBORS)} "
        f"(recall {min(recalls):.3f} to {max(recalls):.3f}). D2 was chosen among {len(D2)} "
        f"settings by the mean useful share over all fractions on the pool of seed {CHOOSING}. "
        f"Every figure below is mean ± standard deviation over the pools of seeds "
        f"{', '.join(map(str, REPORTED))}. The other methods have no settings here but the copies "
        "that are collapsed, and all of these are shown. One run a pool: the methods that draw "
        "lots did so once.",
        "",
        "*useful*: kept samples with a right caption that rank first of their group (a scene and "
        "its near-copies). *second*: right caption, not the first of its group. *groups*: groups "
        "with a rightly captioned kept sample. *rare*: rare concepts with one, of those that have "
        "one in the pool. *AUCpr*: mean distance of "
        f"{HELD_OUT:,} samples of the pool to the nearest kept one (lower is better), over all of "
        "them and over those with right captions. *copies 0.05*: `collapse_copies=0.05`. All "
        "shares in percent.",
        "",
        "## Useful share",
        "",
        "| | " + " | ".join(f"kept {f:g}" for f in FRACTIONS) + " |",
        "|---" * (1 + len(FRACTIONS)) + "|",
    ]  # fmt: skip
    for label, candidate in lines.items():
        useful = " | ".join(_cell(figures.values(candidate, f, "useful")) for f in FRACTIONS)
        out.append(f"| {label} | {useful} |")
    out += ["", "![useful share](bench_planted.png)"]
    for fraction in FRACTIONS[1:]:
        out += ["", f"## What is kept at {fraction:g}", "", "| | " + " | ".join(_TOLD) + " | AUCpr "
                "| AUCpr, right captions |", "|---" * (3 + len(_TOLD)) + "|"]  # fmt: skip
        for label, candidate in lines.items():
            cells = [_cell(figures.values(candidate, fraction, what)) for what in _TOLD]
            cells += [
                _cell(figures.values(candidate, fraction, what), 1, 3)
                for what in ("coverage", "coverage_right")
            ]
            out.append(f"| {label} | {' | '.join(cells)} |")
    for fraction in (0.3, 0.5):
        out += [
            "",
            f"## D2's settings: useful share at {fraction:g}",
            "",
            *_grid(figures, fraction),
        ]
    return [*out, "", "## What the figures say", "", *_said(figures, best)]


_TOLD = ("useful", "second", "swapped", "groups", "rare")


def _cell(values: F64, scale: float = 100, digits: int = 1) -> str:
    values = values * scale
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def _grid(figures: Figures, fraction: float) -> list[str]:
    columns = [(scale, gamma) for scale in GAMMAS for gamma in GAMMAS[scale]]
    heads = [f"{gamma:g}" + " median" * (scale == "median") for scale, gamma in columns]
    out = [f"| k, copies \\ gamma | {' | '.join(heads)} |", "|---" * (1 + len(columns)) + "|"]
    for copies, k in itertools.product(COPIES, NEIGHBORS):
        setting = Candidate(method="d2", k=k, copies=copies)
        cells = [
            _cell(figures.values(replace(setting, gamma=g, scale=scale), fraction, "useful"))
            for scale, g in columns
        ]
        out.append(f"| {k}, {'none' if copies is None else copies} | {' | '.join(cells)} |")
    return out


def _said(figures: Figures, best: Candidate) -> list[str]:
    """Sentences that follow from the figures."""
    scale = ""
    if best.scale == "median":
        plain = best.gamma / np.mean([f["unit"][str(best.k)] for f in figures.facts])
        scale = f" (on these pools the same as gamma={plain:.1f} without `median`)"
    rival = figures.chosen(c for c in OTHERS if c.method not in SLOW)
    one = [
        f"{c} {np.mean([100 * figures.mean(c, f) for f in FRACTIONS]):.1f}"
        for c in (best, replace(best, copies=None), rival, PUBLISHED)
    ]
    out = [
        f"- Chosen over all fractions: {best}{scale}.",
        "- One setting for all fractions, mean of the four useful shares: "
        f"{', '.join(one)}; {rival} is what is chosen among the others in the same way.",
    ]
    for fraction in FRACTIONS:
        rivals = sorted(OTHERS, key=lambda c: -figures.mean(c, fraction))[:2]
        own = _cell(figures.values(best, fraction, "useful"))
        most = _cell(figures.values(Candidate(method=BEST), fraction, "useful"))
        versus = [
            f"{rival} {_cell(figures.values(rival, fraction, 'useful'))} "
            f"({_signed(figures, best, rival, fraction)} points for D2)"
            for rival in (*rivals, PUBLISHED)
        ]
        alone = figures.chosen(D2, [fraction])
        out.append(
            f"- Kept {fraction:g}: D2 as chosen {own} useful, {most} possible. The best two of the "
            f"others, looked up afterwards, and D2 as published: {'; '.join(versus)}. D2 chosen "
            f"for this fraction alone: {alone} {_cell(figures.values(alone, fraction, 'useful'))} "
            f"({_signed(figures, alone, rivals[0], fraction)} points ahead of the first of them)."
        )
    facts = figures.facts

    def quantiles(what: str) -> str:
        mean = np.mean([f[what] for f in facts], axis=0)
        return f"{mean[1]:.2f} ({mean[0]:.2f} to {mean[2]:.2f})"

    out.append(
        "- Squared distance in the graph, median (5% to 95%), mean of the pools: between rightly "
        f"captioned members of a group {quantiles('copy')}; to the nearest other scene, of a "
        f"rightly captioned sample {quantiles('other')}, of one that shows a rare concept "
        f"{quantiles('other_rare')}, of a swapped one {quantiles('other_swapped')}."
    )
    for copies in COPIES[1:]:
        last, left, groups = (
            np.mean([f[what] for f in facts])
            for what in (f"last {copies}", f"groups {copies}", "groups")
        )
        out.append(
            f"- Collapsing copies up to {copies:g} (lists of {max(NEIGHBORS)}) puts {last:,.0f} of "
            f"{PAIRS:,} samples last; {left:,.0f} of {groups:,.0f} groups with a right caption "
            "still have one before them."
        )
        gains = []
        for c in (replace(best, copies=None), PUBLISHED, Candidate(method="score")):
            listed = ", ".join(
                _signed(figures, replace(c, copies=copies), c, fraction) for fraction in FRACTIONS
            )
            gains.append(f"{c} {listed}")
        out.append(
            f"- Collapsing copies up to {copies:g}, points of useful share at "
            f"{', '.join(f'{f:g}' for f in FRACTIONS)}: {'; '.join(gains)}."
        )
    return out


def _signed(figures: Figures, a: Candidate, b: Candidate, fraction: float) -> str:
    """How much more useful a is than b on the same pools, in points."""
    gain = figures.values(a, fraction, "useful") - figures.values(b, fraction, "useful")
    return f"{100 * gain.mean():+.1f} ± {100 * gain.std(ddof=1):.1f}"


def plot(figures: Figures, path: Path) -> None:
    """Useful share against the fraction kept, mean and standard deviation."""
    plt = pyplot()
    best = figures.chosen(D2)
    notes = {best: ", chosen", PUBLISHED: ", published"}
    drawn = [best, PUBLISHED, *(Candidate(method="score", copies=c) for c in COPIES_OTHERS[1:])]
    drawn += [Candidate(method=BEST), *(c for c in OTHERS if c.copies is None)]
    drawn.sort(key=lambda c: -figures.mean(c, 0.3))
    figure, axis = plt.subplots(figsize=(10, 5))
    names = ("orange", "green", "purple", "brown", "pink", "gray", "olive", "cyan")
    colors = itertools.cycle([*(f"tab:{name}" for name in names), "navy"])
    # one color a family, one line a setting
    family = {"d2": "red", "score": "tab:blue", BEST: "black"}
    dashes = {PUBLISHED: "--", Candidate(method=BEST): ":"}
    lines = ("-", "--", "-.", ":")
    dashes |= {Candidate(method="score", copies=c): lines[i] for i, c in enumerate(COPIES_OTHERS)}
    for at, candidate in enumerate(drawn):
        values = [100 * figures.values(candidate, f, "useful") for f in FRACTIONS]
        ours = candidate.method == "d2"
        axis.errorbar(
            FRACTIONS,
            [v.mean() for v in values],
            yerr=[v.std(ddof=1) for v in values],
            marker="osD^v<>Pp*hX8d"[at % 14],
            markersize=5,
            capsize=3,
            linewidth=2.8 if ours else 1.2,
            color=family.get(candidate.method) or next(colors),
            linestyle=dashes.get(candidate, "-"),
            zorder=3 if ours else 2,
            label=f"{candidate}{notes.get(candidate, '')}",
        )
    axis.set_xlabel("fraction kept")
    axis.set_ylabel("useful share of what is kept, %")
    axis.set_xticks(FRACTIONS)
    axis.set_ylim(0, 103)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def publish(path: Path, lines: list[str]) -> None:
    """Write a results file; what somebody wrote below `BY_HAND` stays."""
    before = path.read_text("utf-8") if path.exists() else ""
    _, heading, said = before.partition(BY_HAND)
    path.write_text("\n".join(lines) + "\n" + ("\n" + heading + said if said else ""), "utf-8")


def main() -> None:
    """Measure, write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", required=True, help="folder for the pools and finished figures")
    parser.add_argument("--results", default="jobs/results/bench_planted.md")
    arguments = parser.parse_args()
    products.use_threads(1)
    figures = Figures(measure(arguments.out, functools.partial(print, flush=True)))
    results = Path(arguments.results)
    publish(results, report(figures))
    plot(figures, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
