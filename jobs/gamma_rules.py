"""Benchmark: compares rules that choose gamma, on pools whose truth is known.

    python -m jobs.gamma_rules --data data --cache cache --results jobs/results/gamma_rules.md

Each rule is judged by what it costs against the best gamma in hindsight of the plain kernel (a grid
of 10 × k of 1, 5, 10, 20), and by how much noisier it is than the score alone. The pools: Flickr8k
with 0, 20 and 40% of the captions swapped; the same with one caption a picture, so that nothing is
redundant; real CLIP vectors of 100 pictures with five captions, 20% swapped, mean of five draws;
and with --planted the drawn pool of jobs/bench_planted.py.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from d2filter.algorithm import by_class, features, quantile, uids
from d2filter.algorithm.greedy import auto_gamma, auto_settings, in_memory, local_kernel
from d2filter.algorithm.greedy.schemes import Scheme
from d2filter.algorithm.knn import products
from d2filter.algorithm.measures import ground_truth
from d2filter.algorithm.scores import mismatched as matched
from d2filter.config import RankConfig
from jobs import flickr_pool
from jobs.bench import made_by

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

GAMMAS = (0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
NEIGHBORS = (1, 5, 10, 20)
KEPT = ("0.1", "0.2", "0.3", "0.5", "0.7")
EXPONENTS = (0.35, 0.5, 0.65, 0.8)
DRAWS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Rows ascend by uid."""

    name: str
    hi: uids.U64
    lo: uids.U64
    score: F32
    neighbors: I64
    """(n, 20)"""
    sqdist: F32
    group: I64
    """equal for what may be kept once: a swapped pair is of no group but its own"""
    swapped: Bools
    wrong: Fraction | None

    def judge(self, rank: I64, kept: str) -> tuple[float, float]:
        """Useful share and noise of the first share of a ranking."""
        order = np.argsort(rank, kind="stable").astype(np.int64)
        size = int(Decimal(kept) * len(order))
        found = ground_truth.usefulness(order, self.group, self.swapped, size)
        return found.useful, found.swapped


Rule = Callable[[Pool, str], I64]


def make(name: str, halves: list[F32], score: F32, group: I64, swapped: Bools, seed: int) -> Pool:
    """A pool with its graph; uids are drawn."""
    n = score.size
    hi = np.random.default_rng(seed).integers(0, 2**63, n).astype(np.uint64)
    lo = np.arange(n, dtype=np.uint64)
    order = uids.ascending(hi, lo)
    rows = features.fix([half[order] for half in halves])
    hi, lo = hi[order], lo[order]
    found, _ = by_class.graph(rows, hi, lo, np.zeros(n, np.int64), max(NEIGHBORS))
    wrong = matched.wrong_share({"pairs": matched.judged(rows[matched.sampled(hi, lo)])})
    own = int(group.max()) + 1 + np.arange(n)
    return Pool(
        name=name, hi=hi, lo=lo, score=score[order], neighbors=found.neighbors,
        sqdist=found.sqdist, group=np.where(swapped, own, group)[order], swapped=swapped[order],
        wrong=wrong,
    )  # fmt: skip


def photographs(data: Path, cache: Path) -> Iterator[list[Pool]]:
    """Flickr8k as jobs/bench_flickr.py has it, and with one caption a picture."""
    known = flickr_pool.Photographs(data, cache)
    every = known.captions_of(known.pool)
    for name, share, slot in (
        ("photographs", 0.0, every),
        ("photographs, 20% swapped", 0.2, every),
        ("photographs, 40% swapped", 0.4, every),
        ("one caption each, 20% swapped", 0.2, every[np.unique(known.owner[every], True)[1]]),
    ):
        caption = flickr_pool.swapped_captions(slot, known.owner, share, 0)
        picture = known.owner[slot]
        halves = [known.picture_rows[picture], known.caption_rows[caption]]
        score = np.einsum("ij,ij->i", *halves).astype(np.float32)
        yield [make(name, halves, score, picture, known.owner[caption] != picture, 0)]


def clip_vectors(data: Path) -> list[Pool]:
    """100 pictures × 5 captions in OpenAI's ViT-B/32, a fifth swapped."""
    folder = data / "real_clip_vectors" / "flickr8k_100x5_openai_b32" / "metadata"
    held = np.load(next(iter(sorted(folder.glob("*.npz")))), allow_pickle=False)
    pq.read_metadata(next(iter(sorted(folder.glob("*.parquet")))))
    image, text = held["b32_img"].astype(np.float32), held["b32_txt"].astype(np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    picture = np.unique(image.round(3), axis=0, return_inverse=True)[1].reshape(-1)
    pools = []
    for seed in range(DRAWS):
        slot = np.arange(len(image))
        caption = flickr_pool.swapped_captions(slot, picture, 0.2, seed)
        halves = [image, text[caption]]
        score = np.einsum("ij,ij->i", *halves).astype(np.float32)
        pools.append(
            make("real CLIP vectors", halves, score, picture, picture[caption] != picture, seed)
        )
    return pools


def planted(folder: str) -> list[Pool]:
    """The drawn pool that bench_planted reports on first."""
    from jobs import bench_planted

    found = bench_planted.Planted(bench_planted.make_pool(folder, bench_planted.REPORTED[0]))
    width = found.rows.shape[1] // 2
    halves = [found.rows[:, :width].astype(np.float32), found.rows[:, width:].astype(np.float32)]
    known = found.known[max(bench_planted.NEIGHBORS)]
    score = known.part.difficulty[known.order]
    return [make("drawn pairs, 20% swapped", halves, score, found.group, found.swapped, 0)]


# --- rules ----------------------------------------------------------------------------------


def by_score(pool: Pool, kept: str) -> I64:
    """The score alone."""
    order = np.lexsort((pool.lo, pool.hi, -pool.score.astype(np.float64)))
    return _inverse(order)


def at(k: int, gamma: float) -> Rule:
    """The plain kernel at one gamma in units of the median."""
    return configured(k, kernel="rbf", gamma=gamma, gamma_scale="median", collapse_copies=None)


def configured(k: int = 10, **options: Any) -> Rule:
    """Any configuration, tuned for the share that is kept."""

    def rule(pool: Pool, kept: str) -> I64:
        config = RankConfig(tuned_for=Decimal(kept), **options)
        neighbors, sqdist = pool.neighbors[:, :k], pool.sqdist[:, :k]
        resolved, last = config.resolve_on(
            pool.score,
            pool.hi,
            pool.lo,
            neighbors,
            sqdist,
            auto_settings.PoolFacts(wrong=pool.wrong),
        )
        return _ranked(pool, neighbors, sqdist, config.scheme(resolved), last)

    return rule


def power(kernel: str, exponent: float, k: int = 10) -> Rule:
    """Effective share = kept share ^ exponent, the same for every pool."""

    def rule(pool: Pool, kept: str) -> I64:
        neighbors, sqdist = pool.neighbors[:, :k], pool.sqdist[:, :k]
        reach = local_kernel.reach(sqdist)
        floor = local_kernel.floor_of(quantile.middle(reach))
        there = neighbors >= 0
        if kernel == "local":
            of = reach[np.where(there, neighbors, 0)]
            lists = auto_gamma.local_lists(sqdist, reach, of, there, floor)
            unit = 1.0
        else:
            unit = float(np.median(sqdist[there & (sqdist > 0)]))
            lists = auto_gamma.median_scaled(sqdist, unit)
        target = float(kept) ** exponent * len(lists)
        low, high = 1e-3, 1e4
        for _ in range(40):
            middle = float(np.sqrt(low * high))
            reached = auto_gamma.share_of(lists, middle) / (1 << 40) >= target
            low, high = (low, middle) if reached else (middle, high)
        scheme = Scheme(
            kernel=kernel, gamma_forward=high / unit, gamma_reverse=high / unit, floor=floor
        )
        return _ranked(pool, neighbors, sqdist, scheme, np.zeros(len(reach), np.bool_))

    return rule


def _ranked(pool: Pool, neighbors: I64, sqdist: F32, scheme: Scheme, last: Bools) -> I64:
    return in_memory.rank_graph(
        pool.hi, pool.lo, pool.score, neighbors, sqdist, scheme=scheme, is_demoted=last
    ).rank


def _inverse(order: I64) -> I64:
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return rank


# --- report ---------------------------------------------------------------------------------


def measured(pools: list[Pool], rule: Rule) -> npt.NDArray[np.float64]:
    """(budgets, 2) useful share and noise in percent, mean over the draws of a pool."""
    every = [[pool.judge(rule(pool, kept), kept) for kept in KEPT] for pool in pools]
    found: npt.NDArray[np.float64] = 100 * np.mean(every, axis=0)
    return found


def report(every: list[list[Pool]], say: Callable[[str], None]) -> list[str]:
    """The results file, line by line."""
    rules: dict[str, Rule] = {
        "**auto**": configured(),
        **{
            f"{kernel}, a={a:g}": power(kernel, a) for kernel in ("local", "rbf") for a in EXPONENTS
        },
        "published (k=1, gamma=1)": configured(1, kernel="rbf", gamma=1.0, collapse_copies=None),
    }
    out = [
        "# Rules for gamma",
        "",
        made_by("jobs.gamma_rules"),
        "",
        *(__doc__ or "").split("\n\n", 2)[2].splitlines(),
        "",
        "Every cell: points of useful share (right caption, first of its picture) above the best "
        "gamma in hindsight / points of noise above the score alone. *a*: effective share = kept "
        "share ^ a, the same on every pool, k=10. *auto*: a from the pool, as "
        "`d2filter/algorithm/greedy/auto_gamma.py` says, copies collapsed.",
    ]
    for pools in every:
        score = measured(pools, by_score)
        best = np.max(
            [measured(pools, at(k, g)) for k, g in itertools.product(NEIGHBORS, GAMMAS)], axis=0
        )[:, 0]
        wrong = float(np.mean([float(pool.wrong or 0) for pool in pools]))
        out += [
            "",
            f"## {pools[0].name}: {len(pools[0].score):,} pairs, {wrong:.2f} match no better than "
            "random ones",
            "",
            "| | " + " | ".join(f"kept {kept}" for kept in KEPT) + " |",
            "|---" * (1 + len(KEPT)) + "|",
            "| best in hindsight, useful | " + " | ".join(f"{b:.1f}" for b in best) + " |",
            "| score, useful / noise | "
            + " | ".join(f"{u:.1f} / {z:.1f}" for u, z in score)
            + " |",
        ]
        for name, rule in rules.items():
            found = measured(pools, rule)
            cells = [
                f"{u - b:+.1f} / {z - s:+.1f}"
                for (u, z), b, (_, s) in zip(found, best, score, strict=True)
            ]
            out.append(f"| {name} | {' | '.join(cells)} |")
        say(f"{pools[0].name} done")
    return out


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the real data")
    parser.add_argument("--cache", type=Path, required=True, help="where features are kept")
    parser.add_argument("--planted", default="", help="folder of jobs/bench_planted.py's pools")
    parser.add_argument("--results", type=Path, default=Path("jobs/results/gamma_rules.md"))
    arguments = parser.parse_args()
    products.use_threads(1)
    every = [*photographs(arguments.data, arguments.cache), clip_vectors(arguments.data)]
    if arguments.planted:
        every.append(planted(arguments.planted))
    arguments.results.write_text("\n".join(report(every, print)) + "\n", "utf-8")


if __name__ == "__main__":
    main()
