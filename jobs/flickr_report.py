"""Writes the results file and the plot of `jobs.bench_flickr`."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from jobs import bench_flickr as flickr
from jobs import flickr_pool, two_tower
from jobs.bench import made_by
from jobs.bench_extra import pyplot
from jobs.bench_flickr import DRAWS, F64, GAMMAS, GRID_K, KEPT, MAIN, SHARES, Figures
from jobs.bench_planted import BEST, PUBLISHED, publish


def write(figures: Figures, path: Path) -> None:
    """PATH, and the plot beside it."""
    publish(path, report(figures, path.with_suffix(".png").name))
    plot(figures, path.with_suffix(".png"))


def report(figures: Figures, picture: str) -> list[str]:
    """The results file, line by line."""
    return [
        "# Methods and settings on real photographs with real captions",
        "",
        made_by("jobs.bench_flickr"),
        "",
        *_introduction(figures),
        "",
        "## Against the best gamma in hindsight",
        "",
        *_hindsight(figures),
        "",
        f"![useful share, noise and retrieval]({picture})",
        *itertools.chain.from_iterable(_shares(figures)),
        "",
        "## Models trained on what is kept",
        "",
        *_trained(figures),
        "",
        f"## D2's settings, {_percent(MAIN)} of the captions swapped",
        "",
        *_grid(figures),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _introduction(figures: Figures) -> list[str]:
    scorer, facts = figures.scorer, figures.facts
    main = [fact for fact in facts if fact["share"] == MAIN]
    one = main[0]
    right, wrong = (np.mean([fact[which] for fact in main], axis=0) for which in ("right", "wrong"))
    least = min(fact["recall"] for fact in facts)
    return [
        f"Pool: {one['pictures']:,} photographs of Flickr8k's train split (Hodosh et al. 2013) "
        f"with five captions each, {one['pairs']:,} pairs, a known share of the captions swapped "
        f"between pictures. Scorer: {two_tower.SAYS}; trained on the other half of the train "
        f"split in {scorer['seconds'][1]:.0f} s of one core. On the official test split it has "
        f"text→image R@1 {scorer['r1']:.3f}, R@10 {scorer['r10']:.3f} and Kendall τ_c "
        f"{scorer['tau']:.3f} with the expert judgments; in the pool right pairs have "
        f"{right[0]:.2f} ± {right[1]:.2f}, wrong ones {wrong[0]:.2f} ± {wrong[1]:.2f}. "
        f"Embeddings image|text, 256 + 256; score = cosine; one graph of "
        f"k={flickr_pool.NEIGHBORS} a pool (recall at least {least:.3f}), of which smaller k are "
        f"prefixes. {100 * one['same picture']:.0f}% of the 10 nearest are of the same picture.",
        "",
        "*useful*: kept right pairs of whose picture no right pair ranks before them, of all "
        "kept; *noise*: kept pairs with a swapped caption; *covered*: pictures of which a right "
        "pair is kept, of those that have one. All in percent. Gammas are in units of the median "
        "squared distance in the lists (*median*), but the published one. "
        f"With {_percent(MAIN)} swapped {len(DRAWS)} draws of the captions that are: mean ± "
        f"standard deviation; one for {' and '.join(flickr.SLOW)} (a minute and more a ranking), "
        "and one of each other share.",
    ]


def _cell(values: F64, digits: int = 1, scale: float = 100) -> str:
    if not values.size:
        return "–"
    mean = f"{scale * values.mean():.{digits}f}"
    spread = f" ± {scale * values.std(ddof=1):.{digits}f}" if values.size > 1 else ""
    return mean + spread


def _names(figures: Figures, share: float) -> list[str]:
    """Lines of a table: all but the grid."""
    grid = {str(candidate) for candidate in flickr.GRID}
    one = flickr.entries(MAIN, DRAWS[0])
    found = [e.name for e in one if e.name not in grid]
    there = [n for n in found if figures.values(share, n, KEPT[0], "useful").size]
    return [*there, flickr.HINDSIGHT, flickr.CLEAN, BEST]


def _shares(figures: Figures) -> list[list[str]]:
    tables = []
    for share in sorted(SHARES, key=lambda s: s != MAIN):
        names = _names(figures, share)
        for what in ("useful", "noise", "covered") if share else ("useful", "covered"):
            lines = ["", f"## {_percent(share)} swapped: {what}", "", _head("", KEPT)]
            for name in names:
                cells = [_cell(figures.values(share, name, kept, what)) for kept in KEPT]
                lines.append(_line(name, cells))
            tables.append(lines)
    return tables


def _head(first: str, columns: tuple[str, ...]) -> str:
    names = " | ".join(f"kept {column}" for column in columns)
    return f"| {first} | {names} |\n|{'---|' * (1 + len(columns))}"


def _line(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _hindsight(figures: Figures) -> list[str]:
    """Is the automatic setting as useful as the best of the grid, and no noisier than the score?"""
    rules = [one.name for one in flickr.automatic()]
    lines = [
        f"*{flickr.HINDSIGHT}*: of {len(flickr.GRID)} settings (gamma {GAMMAS[0]:g} to "
        f"{GAMMAS[-1]:g}, k of {', '.join(map(str, GRID_K))}) the one with the largest useful "
        "share, chosen for each share that is kept on the pools that it is judged on; "
        f"*{flickr.CLEAN}*: the same among those at most {100 * flickr.NOISIER:g} points noisier "
        "than the score. Wanted of a rule: at most "
        f"{100 * flickr.BELOW:g} point less useful than the best, and up to 0.5 at most "
        f"{100 * flickr.NOISIER:g} points noisier than the score.",
        "",
        "| swapped | kept | best: setting, useful, noise | as clean: setting, useful, noise | "
        + " | ".join(f"{name}: useful against best, as clean; noise over score" for name in rules)
        + " |",
        "|---" * (4 + len(rules)) + "|",
    ]
    for share, kept in itertools.product(SHARES, KEPT):
        cells = [kept, *(_best(figures, share, kept, clean) for clean in (False, True))]
        cells += [_against(figures, share, kept, name) for name in rules]
        lines.append(_line(_percent(share), cells))
    return lines


def _against(figures: Figures, share: float, kept: str, name: str) -> str:
    useful, noise = (figures.mean(share, name, kept, what) for what in ("useful", "noise"))
    best, clean = (
        useful - figures.mean(share, one, kept) for one in (flickr.HINDSIGHT, flickr.CLEAN)
    )
    over = noise - figures.mean(share, str(flickr.SCORE), kept, "noise")
    misses = [
        *(["useful"] if best < -flickr.BELOW else []),
        *(["noise"] if over > flickr.NOISIER and float(kept) <= 0.5 else []),
    ]
    verdict = f" (misses {' and '.join(misses)})" if misses else ""
    return f"{100 * best:+.1f}, {100 * clean:+.1f}; {100 * over:+.1f}{verdict}"


def _best(figures: Figures, share: float, kept: str, clean: bool) -> str:
    best = figures.hindsight(share, kept, clean=clean)
    if best is None:
        return "–"
    useful, noise = (100 * figures.mean(share, str(best), kept, w) for w in ("useful", "noise"))
    return f"k={best.k} gamma={best.gamma:g}: {useful:.1f}, {noise:.1f}"


def _trained(figures: Figures) -> list[str]:
    lines = [
        f"The scorer's towers, {flickr.TRAINED_STEPS} steps of {flickr.TRAINED_BATCH} pairs, on "
        f"what is kept of the pool with {_percent(MAIN)} swapped; {len(DRAWS)} starts, each on "
        "its own draw. Official test split: text→image R@1 / R@10 in percent, and Kendall τ_c "
        "(× 100) with the experts.",
        "",
        _head("", flickr.TRAINED_KEPT),
    ]
    for name in _names(figures, MAIN):
        if figures.values(MAIN, name, flickr.TRAINED_KEPT[0], "r10").size:
            cells = [_models(figures, name, kept) for kept in flickr.TRAINED_KEPT]
            lines.append(_line(name, cells))
    whole = _models(figures, flickr.ALL, "1")
    return [*lines, "", f"All of the pool, swapped ones included: {whole}."]


def _models(figures: Figures, name: str, kept: str) -> str:
    cells = (_cell(figures.values(MAIN, name, kept, what)) for what in ("r1", "r10", "tau"))
    return " / ".join(cells)


def _grid(figures: Figures) -> list[str]:
    lines = ["Useful share / noise, means of the draws."]
    for kept in KEPT:
        columns = " | ".join(f"{gamma:g}" for gamma in GAMMAS)
        lines += ["", f"Kept {kept}:", "", f"| k \\ gamma | {columns} |", "|---" * 11 + "|"]
        for k in GRID_K:
            cells = [
                f"{100 * figures.mean(MAIN, str(c), kept):.1f} / "
                f"{100 * figures.mean(MAIN, str(c), kept, 'noise'):.1f}"
                for c in flickr.GRID
                if c.k == k
            ]
            lines.append(_line(str(k), cells))
    return lines


def plot(figures: Figures, path: Path) -> None:
    """Useful share, noise, and retrieval of models trained on what is kept."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.2))
    names = _names(figures, MAIN)
    bold = {
        BEST: ("black", ":"),
        flickr.HINDSIGHT: ("tab:red", ":"),
        flickr.CLEAN: ("tab:red", "--"),
        str(PUBLISHED): ("tab:orange", "-"),
        str(flickr.SCORE): ("tab:blue", "-"),
        str(flickr.COLLAPSED[-1]): ("tab:blue", "--"),
        str(flickr.RANDOM): ("tab:gray", "-"),
        **{one.name: ("tab:red", "-") for one in flickr.automatic()[:1]},
    }
    thin = itertools.cycle(
        f"tab:{c}" for c in ("green", "purple", "brown", "pink", "olive", "cyan")
    )
    kept = np.array([float(k) for k in KEPT])
    for name in names:
        color, dashes = bold.get(name) or (next(thin), "-.")
        width = 2.4 if name in bold else 1.0
        for axis, what in zip(axes[:2], ("useful", "noise"), strict=True):
            values = [100 * figures.values(MAIN, name, k, what) for k in KEPT]
            axis.errorbar(
                kept,
                [v.mean() for v in values],
                yerr=[v.std(ddof=1) if v.size > 1 else 0 for v in values],
                color=color, linestyle=dashes, linewidth=width, marker="o", markersize=4,
                capsize=2, label=name,
            )  # fmt: skip
        values = [100 * figures.values(MAIN, name, k, "r10") for k in flickr.TRAINED_KEPT]
        if all(v.size for v in values):
            axes[2].errorbar(
                [float(k) for k in flickr.TRAINED_KEPT],
                [v.mean() for v in values],
                yerr=[v.std(ddof=1) if v.size > 1 else 0 for v in values],
                color=color, linestyle=dashes, linewidth=width, marker="o", markersize=4, capsize=2,
            )  # fmt: skip
    titles = ("useful share of what is kept, %", "swapped captions among the kept, %",
              "R@10 of a model trained on the kept, %")  # fmt: skip
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("share kept")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(f"Flickr8k, {_percent(MAIN)} of the captions swapped")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)
