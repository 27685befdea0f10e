"""Benchmark: all methods and settings on real photographs with captions, some of them swapped.

    python -m jobs.bench_flickr --data DATA --cache CACHE --out OUT

A scorer is trained on half of Flickr8k's train pictures; the other half, with five captions each,
is the pool. Each pool gets one graph with k=20; a smaller k is a prefix of each list. Then models
are trained on the subsets of the main methods and tested on the official test split. Finished
figures are in OUT/flickr.jsonl; another call continues from there. DATA: see `jobs/real_data.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2filter.algorithm.knn import products
from d2filter.algorithm.methods import selectors
from d2filter.config import RankConfig
from jobs.bench_planted import BEST, PUBLISHED, Candidate
from jobs.flickr_pool import Pairs, Photographs

Row = dict[str, Any]
F64 = np.ndarray[Any, np.dtype[np.float64]]

SHARES = (0.0, 0.2, 0.4)  # of the captions that are swapped
MAIN = 0.2
DRAWS = (0, 1, 2)  # which captions are swapped, and how trained models start
KEPT = ("0.1", "0.2", "0.3", "0.5", "0.7")
GAMMAS = (0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
GRID_K = (1, 5, 10, 20)
AUTO_K = 10
COPIES = (0.1, 0.3)
SLOW = ("k_center", "herding")  # a minute a ranking: on one pool
TRAINED_KEPT = ("0.1", "0.3", "0.5")
TRAINED_STEPS, TRAINED_BATCH = 100, 256
BELOW, NOISIER = 0.01, 0.02  # useful share below the best of the grid, noise above the score's
FACTS, SCORER, ALL = "facts", "scorer", "all pairs"
HINDSIGHT, CLEAN = "D2, best of the grid", "D2, best of the grid that is as clean"

GRID = [
    Candidate(method="d2", k=k, gamma=gamma, scale="median") for k in GRID_K for gamma in GAMMAS
]
SCORE, RANDOM = Candidate(method="score"), Candidate(method="random")
COLLAPSED = [Candidate(method="score", copies=copies) for copies in COPIES]
OTHERS = [Candidate(method=name) for name in selectors.SELECTORS if name not in ("score", "random")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of the tables."""

    name: str
    k: int
    config: Callable[[str], RankConfig]
    """of the share that is kept: a rule may look at it"""
    per_budget: bool = False
    """whether each share has a ranking of its own"""


def entry(candidate: Candidate) -> Entry:
    """A setting that is the same for every share."""
    return Entry(name=str(candidate), k=candidate.k, config=lambda _: candidate.rank_config)


def automatic() -> list[Entry]:
    """Settings that the tool chooses by itself."""

    def config(kept: str) -> RankConfig:
        return RankConfig(tuned_for=Decimal(kept))

    return [Entry(name="D2 auto", k=10, config=config, per_budget=True)]


def entries(share: float, draw: int) -> list[Entry]:
    """All that is measured on a pool."""
    slow = (share, draw) == (MAIN, DRAWS[0])
    plain = [PUBLISHED, *GRID, SCORE, *COLLAPSED, RANDOM, *OTHERS]
    fixed = [entry(c) for c in plain if slow or c.method not in SLOW]
    return [*automatic(), *sorted(fixed, key=lambda e: e.name in SLOW)]


# --- figures --------------------------------------------------------------------------------


class Finished:
    """Figures in OUT/flickr.jsonl: those that are there are not made again."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.say = folder / "flickr.jsonl", say
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def has(self, **wanted: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(k) == v for k, v in wanted.items()) for row in self.rows)

    def add(self, rows: list[Row]) -> None:
        """Write rows that belong together."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows += rows


def pools() -> list[tuple[float, int]]:
    """Shares of swapped captions and draws of them: the main one first, in several draws."""
    return [(MAIN, draw) for draw in DRAWS] + [(s, DRAWS[0]) for s in SHARES if s != MAIN]


def measure(photographs: Photographs, finished: Finished) -> None:
    """Rankings of all pools, then models trained on the main one."""
    if not finished.has(kind=SCORER):
        finished.add([{"kind": SCORER, **photographs.facts}])
    made = functools.cache(functools.partial(Pairs, photographs))
    for share, draw in pools():
        where = {"share": share, "draw": draw}
        left = [
            one
            for one in entries(share, draw)
            if not finished.has(kind="rank", name=one.name, **where)
        ]
        if not left:
            continue
        pairs = made(share, draw)
        if not finished.has(kind=FACTS, **where):
            best = pairs.best_order()
            rows = [{"name": BEST, "kept": kept, **pairs.judge(best, kept)} for kept in KEPT]
            finished.add([{"kind": "rank", **where, **row} for row in rows])
            finished.add([{"kind": FACTS, **where, **pairs.facts()}])
        for one in left:
            started = time.perf_counter()
            finished.add([{"kind": "rank", **where, **row} for row in rank(pairs, one)])
            finished.say(f"{where} {one.name}: {time.perf_counter() - started:.1f} s")
    for draw in DRAWS:
        train(photographs, finished, made, draw)


def rank(pairs: Pairs, one: Entry) -> list[Row]:
    """Figures of an entry at every share that is kept."""
    rows, order = [], None
    for kept in KEPT:
        if order is None or one.per_budget:
            order = pairs.order(one.config(kept), one.k)
        rows.append({"name": one.name, "kept": kept, **pairs.judge(order, kept)})
    return rows


def trained(figures: Figures) -> list[tuple[Entry | None, str]]:
    """What models are trained on: whose ranking, None: the whole pool; the share kept of it."""
    fixed = [*automatic()[:1], *(entry(c) for c in (RANDOM, SCORE, COLLAPSED[-1], PUBLISHED))]
    found: list[tuple[Entry | None, str]] = [(None, "1")]
    for kept in TRAINED_KEPT:
        best = {figures.hindsight(MAIN, kept, clean=clean) for clean in (False, True)}
        settings = [entry(c) for c in GRID if c in best]
        found += [(one, kept) for one in [*fixed, *settings]]
    return found


def train(
    photographs: Photographs, finished: Finished, made: Callable[[float, int], Pairs], draw: int
) -> None:
    """Models trained on what is kept of a draw of the main pool."""
    where = {"kind": "train", "share": MAIN, "draw": draw}
    for one, kept in trained(Figures(finished.rows)):
        name = one.name if one else ALL
        if finished.has(name=name, kept=kept, **where):
            continue
        pairs = made(MAIN, draw)
        started = time.perf_counter()
        order = pairs.order(one.config(kept), one.k) if one else np.arange(pairs.score.size)
        rows = np.sort(order[: pairs.size(kept)])
        model = photographs.train(
            pairs.picture[rows], pairs.caption[rows], seed=draw, steps=TRAINED_STEPS,
            batch=TRAINED_BATCH,
        )  # fmt: skip
        finished.add([{**where, "name": name, "kept": kept, **photographs.tested(model)}])
        seconds = time.perf_counter() - started
        finished.say(f"draw {draw}, trained on {kept} by {name}: {seconds:.1f} s")


class Figures:
    """What was measured, by its name; `HINDSIGHT` and `CLEAN` are names too."""

    def __init__(self, rows: list[Row]) -> None:
        def of(*kinds: str) -> list[Row]:
            return [row for row in rows if row["kind"] in kinds]

        self.scorer = of(SCORER)[0]
        self.facts = of(FACTS)
        self.at: dict[tuple[Any, ...], Row] = {}
        for r in of("rank", "train"):
            self.at.setdefault((r["share"], r["draw"], r["name"], r["kept"]), {}).update(r)

    def values(self, share: float, name: str, kept: str, what: str) -> F64:
        """A figure of each draw that has it."""
        if name in (HINDSIGHT, CLEAN):
            name = str(self.hindsight(share, kept, clean=name == CLEAN))
        rows = [self.at.get((share, draw, name, kept), {}) for draw in DRAWS]
        return np.array([row[what] for row in rows if what in row])

    def mean(self, share: float, name: str, kept: str, what: str = "useful") -> float:
        """Its mean over the draws, NaN where there is none."""
        values = self.values(share, name, kept, what)
        return float(values.mean()) if values.size else float("nan")

    def hindsight(self, share: float, kept: str, *, clean: bool = False) -> Candidate | None:
        """The setting of the grid with the largest useful share on these pools themselves.

        clean: among those whose noise is at most NOISIER above the score's; None: there are none.
        """
        most = self.mean(share, str(SCORE), kept, "noise") + NOISIER
        fit = [c for c in GRID if not clean or self.mean(share, str(c), kept, "noise") <= most]
        return max(fit, key=lambda c: self.mean(share, str(c), kept), default=None)


def main() -> None:
    """Measure, write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", required=True, type=Path, help="folder with flickr8k/")
    parser.add_argument("--cache", required=True, type=Path, help="folder for features")
    parser.add_argument("--out", required=True, type=Path, help="folder for finished figures")
    parser.add_argument("--results", default="jobs/results/bench_flickr.md", type=Path)
    arguments = parser.parse_args()
    products.use_threads(1)
    torch.set_num_threads(1)
    finished = Finished(arguments.out, functools.partial(print, flush=True))
    measure(Photographs(arguments.data, arguments.cache), finished)

    from jobs import flickr_report

    flickr_report.write(Figures(finished.rows), arguments.results)


if __name__ == "__main__":
    main()
