"""Which k and gamma serve the demo's pool: the grid behind `demo.MEASURED`.

    python -m jobs.demo_settings --out /tmp/demo-settings --results jobs/results/demo_settings.md

Draws and embeds one pool for each seed (none of them the demo's own), builds one graph of the
largest k, and ranks it with every setting; a smaller k is a prefix of each list.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from d2filter.algorithm import baselines, metrics, ranking
from d2filter.algorithm.schemes import Scheme
from d2filter.formats import graph
from d2filter.formats.paths import Folder
from d2filter.tools import demo
from jobs.bench import made_by


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
    """What is tried."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """pools; the demo shows seed 0"""
    pairs: int = 4200
    neighbors: tuple[int, ...] = (1, 2, 3, 4, 5, 10, 15)
    gammas: tuple[float, ...] = (0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 50.0)


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", required=True)
    parser.add_argument("--results", required=True)
    arguments = parser.parse_args()
    grid = GridConfig()
    shares: dict[str, list[metrics.Usefulness]] = {}
    for seed in grid.seeds:
        out = Folder(f"{arguments.out}/seed-{seed}")
        demo.draw_and_run(
            out,
            pairs=grid.pairs,
            seed=seed,
            say=print,
            settings=(replace(demo.PUBLISHED, name="d2-grid", k=max(grid.neighbors)),),
        )
        rows = graph.read(out.sub("d2-grid/graph"))
        group, swapped = demo.truth(out, rows)
        size = int(demo.FRACTION * len(group))

        def judge(
            name: str,
            order: metrics.I64,
            planted: tuple[metrics.I64, metrics.Bools, int] = (group, swapped, size),
        ) -> None:
            shares.setdefault(name, []).append(metrics.usefulness(order, *planted))

        for k in grid.neighbors:
            for gamma in grid.gammas:
                ranked = ranking.rank_graph(
                    rows.hi,
                    rows.lo,
                    rows.difficulty,
                    np.ascontiguousarray(rows.neighbors[:, :k]),
                    np.ascontiguousarray(rows.sqdist[:, :k]),
                    scheme=Scheme(gamma_forward=gamma, gamma_reverse=gamma),
                )
                judge(f"{k}|{gamma:g}", np.argsort(ranked.rank))
        judge("CLIP score alone", baselines.by_score(rows.difficulty, rows.hi, rows.lo))
        judge("random", baselines.at_random(rows.hi, rows.lo))
        judge("best that is possible", metrics.best_order(group, swapped))
    Path(arguments.results).write_text(_report(grid, shares), "utf-8")


def _report(grid: GridConfig, shares: dict[str, list[metrics.Usefulness]]) -> str:
    def cell(name: str) -> str:
        useful = np.array([u.useful for u in shares[name]]) * 100
        return f"{useful.mean():.1f} ± {useful.std(ddof=1):.1f}"

    lines = [
        "# Settings of D2 on the demo's drawn pool",
        "",
        f"Useful share in percent of the kept half (right caption and first of its group), mean ± "
        f"standard deviation over pools of seeds {', '.join(map(str, grid.seeds))}; "
        f"{grid.pairs:,} pairs each, 30% near-copies, 20% swapped captions, bundled model, "
        "features image|text, directed graph, same gamma in both passes.",
        "",
        made_by("jobs.demo_settings"),
        "",
        "| k \\ gamma | " + " | ".join(f"{g:g}" for g in grid.gammas) + " |",
        "|---" * (len(grid.gammas) + 1) + "|",
    ]  # fmt: skip
    for k in grid.neighbors:
        cells = " | ".join(cell(f"{k}|{g:g}") for g in grid.gammas)
        lines.append(f"| {k} | {cells} |")
    lines += ["", "| for comparison | useful |", "|---|---|"]
    for name in ("CLIP score alone", "random", "best that is possible"):
        lines.append(f"| {name} | {cell(name)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
