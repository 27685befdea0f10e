"""`d2filter advise OUT`: recommends k, gamma, copies and a budget for a pool, with reasons.

It ranks the pool in memory with several settings, on the finished graph, and compares their
measures: coverage of distinct groups, kept near-copies and mean score
(`algorithm/measures/distinct.py`), and the rate of kept wrong pairs (`tools/selfcheck.py`).

advise.json   the recommendation with its reasons, and the measures of all settings
advise.html   the same as a page
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np

from d2filter.algorithm import budget
from d2filter.algorithm.measures import distinct
from d2filter.config import AUTO, RankConfig, options_of
from d2filter.errors import InputError, UsageError
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import RunState
from d2filter.text import redacted
from d2filter.tools import pages, plots, selfcheck, sweep

Say = Callable[[str], None]
Row = dict[str, Any]

DATA, PAGE = "advise.json", "advise.html"
FRACTIONS = selfcheck.FRACTIONS
NEIGHBORS = (1, 5, 10, 20)
GAMMAS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
"""gammas to try with the kernel `local`, besides `auto`"""
SLACK = 0.02
"""a recommended setting may keep this share of the wrong pairs more than the score alone keeps"""
WORTH = 0.005
"""smaller differences of coverage do not decide"""
FEWEST = 20
"""fewest samples for advice"""
CLEAN = 0.05
"""budgets that keep a larger share of the wrong pairs are not recommended"""
_SCORE = "score alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting with its measures."""

    config: RankConfig
    rows: dict[str, Row]
    """measures by fraction; `wrong` is the rate of the self-check, None without a self-check"""

    @property
    def name(self) -> str:
        """A short name for tables and plots."""
        config = self.config
        if config.method != "d2":
            return _SCORE
        copies = "" if config.collapse_copies is None else f", copies {_copies(config)}"
        return f"k={config.n_neighbors}, gamma={_number(config.gamma)}{copies}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A recommendation. `lines` are (name, value, reason)."""

    lines: tuple[tuple[str, str, str], ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    chosen: Trial
    fraction: str
    """fraction at which settings were compared"""
    budget: str
    """recommended fraction"""
    trials: tuple[Trial, ...]


def advise(folder: Folder, *, fraction: str = "", say: Say = lambda line: None) -> Advice:
    """Measure settings and choose one; writes advise.json and advise.html.

    fraction: budget at which settings are compared; empty: that of the run, or 0.3. Raises
    RunStateError without a graph, InputError for a pool that is too small, UsageError for a
    fraction that keeps nothing.
    """
    state = RunState(folder)
    k = int(state.require("graph")["stats"]["k"])
    bench = _Bench(folder, say)
    share = _plain(budget.parse_fraction(fraction)) if fraction else _own_share(state)
    if not budget.floor_of(share, bench.size):
        raise UsageError(f"fraction {share} keeps nothing of {bench.size:,} samples")
    shares = sorted({share, *(f for f in FRACTIONS if budget.floor_of(f, bench.size))})
    at = str(share)

    def tried(configs: Sequence[RankConfig]) -> list[Trial]:
        found = []
        for number, config in enumerate(configs, 1):
            found.append(Trial(config=config, rows=bench.measure(config, shares)))
            say(f"[{number}/{len(configs)}] {found[-1].name}")
        return found

    by_score, *settings = tried([RankConfig(method="score"), *_grid(k, share)])
    limit, bound = _limit(by_score, bench, at)
    chosen = _best(settings, at, limit)
    copies = tried([
        replace(chosen.config, collapse_copies=value)
        for value in (None, 0.0, AUTO)
        if value != chosen.config.collapse_copies
    ])  # fmt: skip
    with_copies = _best_of_copies([chosen, *copies], at, limit)
    size, why = _budget(with_copies, shares, bench)
    found = Advice(
        lines=(
            ("k", str(chosen.config.n_neighbors), _why_k(chosen, settings, at, limit)),
            (
                "gamma",
                _number(chosen.config.gamma),
                _why_gamma(chosen, settings, by_score, at, bound),
            ),
            (
                "copies",
                _copies(with_copies.config),
                _why_copies(with_copies, [chosen, *copies], at),
            ),
            ("budget", size, why),
        ),
        commands=_commands(folder, with_copies.config, size),
        notes=tuple(_notes(k, bench)),
        chosen=with_copies,
        fraction=at,
        budget=size,
        trials=(by_score, *settings, *copies),
    )  # fmt: skip
    _write(folder, found, bench)
    return found


def table(found: Advice) -> list[str]:
    """The recommendation as lines of text."""
    width = max(len(value) for _, value, _ in found.lines)
    return [
        *(f"{what:<7} {value:<{width}}  {why}" for what, value, why in found.lines),
        "",
        *found.notes,
        *(f"then: {command}" for command in found.commands),
    ]


class _Bench:
    """A loaded pool, and its copy with swapped captions for the self-check."""

    def __init__(self, folder: Folder, say: Say) -> None:
        say("reading the graph and its features")
        self._known = selfcheck.load(folder, say)
        part = self._known.part
        self.size = len(part.hi)
        if self.size < FEWEST:
            raise InputError(f"{folder.url} has {self.size} ranked samples, advise needs {FEWEST}")
        self.checked = selfcheck.prepare(folder, self._known)
        self.yardstick = distinct.Yardstick(
            self._known.rows, part.hi, part.lo, part.difficulty, part.neighbors, part.sqdist,
            watched=sweep.WATCHED,
        )  # fmt: skip
        score = RunState(folder).require("catalog")["stats"].get("score", {})
        self._raw = budget.raw_scores(part.difficulty, score.get("kept_first", "high"))
        self.ranked = int(RunState(folder).require("catalog")["stats"]["samples"]["ranked"])
        self.mean = float(part.difficulty.mean(dtype=np.float64))

    def measure(self, config: RankConfig, shares: Sequence[Decimal]) -> dict[str, Row]:
        rank = selfcheck.ranks(self._known, config)
        rates: dict[str, Any] = {}
        if not isinstance(self.checked, str):
            rates = self.checked.rates(config, shares)
        rows = {}
        for share in shares:
            size = budget.budget_of(rank.size, fraction=share)
            kept = rank < size
            rows[str(share)] = {
                **asdict(self.yardstick.measure(kept)),
                "score": float(self._raw[kept].mean(dtype=np.float64)),
                "difficulty": float(self._known.part.difficulty[kept].mean(dtype=np.float64)),
                "wrong": rates[str(share)]["kept"] if rates else None,
            }
        return rows


def _own_share(state: RunState) -> Decimal:
    record = state.done("select")
    if record is None:
        return Decimal("0.3")
    samples = record["stats"]["samples"]
    share = Decimal(samples["kept"]) / Decimal(samples["kept"] + samples["pruned"])
    return _plain(round(share, 4)) or Decimal("0.3")


def _plain(share: Decimal) -> Decimal:
    """The number without trailing zeros: 0.3 for 0.3000."""
    return Decimal(f"{share.normalize():f}")


def _grid(k: int, share: Decimal) -> list[RankConfig]:
    """The settings to try, those with `--gamma auto` first; all demote near-copies."""
    ks = [n for n in NEIGHBORS if n <= k] or [k]
    common: dict[str, Any] = {"kernel": "local", "collapse_copies": AUTO}
    fitted = [RankConfig(n_neighbors=n, gamma=AUTO, tuned_for=share, **common) for n in ks]
    fixed = itertools.product(ks, GAMMAS)
    return [*fitted, *(RankConfig(n_neighbors=n, gamma=g, **common) for n, g in fixed)]


def _limit(by_score: Trial, bench: _Bench, at: str) -> tuple[Callable[[Row], bool], str]:
    """The condition that a recommended setting must meet, and its description."""
    alone = by_score.rows[at]
    if alone["wrong"] is not None:
        most = alone["wrong"] + SLACK
        return (lambda row: row["wrong"] <= most), f"at most {most:.1%} of the swapped captions"
    least = (alone["difficulty"] + bench.mean) / 2
    return (lambda row: row["difficulty"] >= least), "half of what the score alone gains in score"


def _best(trials: Sequence[Trial], at: str, limit: Callable[[Row], bool]) -> Trial:
    """The setting with the highest coverage within the limit; if several are about equal, that with
    the highest mean score.
    """
    allowed = [t for t in trials if limit(t.rows[at])]
    if not allowed:
        wrong = [t.rows[at]["wrong"] for t in trials]
        if None not in wrong:
            return trials[int(np.argmin(wrong))]
        return max(trials, key=lambda t: t.rows[at]["difficulty"])
    most = max(t.rows[at]["coverage"] for t in allowed)
    alike = [t for t in allowed if t.rows[at]["coverage"] >= most - WORTH]
    return max(alike, key=lambda t: t.rows[at]["difficulty"])


def _best_of_copies(trials: Sequence[Trial], at: str, limit: Callable[[Row], bool]) -> Trial:
    """The setting that keeps the fewest near-copies without a loss of coverage."""
    allowed = [t for t in trials if limit(t.rows[at])] or list(trials)
    most = max(t.rows[at]["coverage"] for t in allowed)
    alike = [t for t in allowed if t.rows[at]["coverage"] >= most - WORTH]
    return min(alike, key=lambda t: round(t.rows[at]["copies"], 3))


def _budget(trial: Trial, shares: Sequence[Decimal], bench: _Bench) -> tuple[str, str]:
    names = [str(share) for share in shares]
    if isinstance(bench.checked, str):
        at = [f"{trial.rows[n]['coverage']:.2f} at {n}" for n in names]
        return names[len(names) // 2], (
            f"your choice: coverage of distinct groups is {', '.join(at)}; the self-check, "
            f"which measures noise, is not possible: {bench.checked}"
        )
    clean = [n for n in names if trial.rows[n]["wrong"] <= CLEAN]
    if not clean:
        return names[0], (
            f"even {names[0]} keeps {trial.rows[names[0]]['wrong']:.1%} of the swapped captions: "
            "the score hardly separates wrong pairs from right ones"
        )
    best = clean[-1]
    row = trial.rows[best]
    why = f"keeps {row['wrong']:.1%} of the swapped captions and covers {row['coverage']:.2f}"
    after = names[names.index(best) + 1 :]
    if after:
        why += f"; {after[0]} would keep {trial.rows[after[0]]['wrong']:.1%} of them"
    return best, why


def _why_k(chosen: Trial, settings: Sequence[Trial], at: str, limit: Callable[[Row], bool]) -> str:
    own = chosen.config.n_neighbors
    rivals = []
    for k in sorted({t.config.n_neighbors for t in settings} - {own}):
        best = _best([t for t in settings if t.config.n_neighbors == k], at, limit)
        row = best.rows[at]
        held = "" if limit(row) else ", too noisy"
        rivals.append(f"{row['coverage']:.3f} with k={k}{held}")
    mine = f"covers {chosen.rows[at]['coverage']:.3f} of the distinct groups at {at}"
    return f"{mine}; the best setting with another k: {', '.join(rivals)}" if rivals else mine


def _why_gamma(
    chosen: Trial, settings: Sequence[Trial], by_score: Trial, at: str, bound: str
) -> str:
    row, alone = chosen.rows[at], by_score.rows[at]
    why = (
        f"the most coverage ({row['coverage']:.3f}, score alone {alone['coverage']:.3f}) of the "
        f"settings that keep {bound}"
    )
    mine = [t for t in settings if t.config.n_neighbors == chosen.config.n_neighbors]
    wide = max(mine, key=lambda t: t.rows[at]["coverage"])
    if wide is chosen or wide.rows[at]["coverage"] <= row["coverage"] + WORTH:
        return why
    cost = (
        f"{wide.rows[at]['wrong']:.1%} of those"
        if wide.rows[at]["wrong"] is not None
        else f"a mean score of {wide.rows[at]['score']:.3f}"
    )
    return (
        f"{why}; gamma={_number(wide.config.gamma)} covers {wide.rows[at]['coverage']:.3f} "
        f"and keeps {cost}"
    )


def _why_copies(chosen: Trial, trials: Sequence[Trial], at: str) -> str:
    def described(trial: Trial) -> str:
        row = trial.rows[at]
        return f"covers {row['coverage']:.3f} with {row['copies']:.1%} of the kept near-copies"

    rivals = [f"{_copies(t.config)} {described(t)}" for t in trials if t is not chosen]
    return f"{described(chosen)}; {', '.join(rivals)}"


def _notes(k: int, bench: _Bench) -> list[str]:
    found = []
    if k < NEIGHBORS[-2]:
        found.append(
            f"the graph has {k} neighbors a sample: `d2filter graph --n-neighbors {NEIGHBORS[-2]}` "
            "finds more, which often gives a better subset"
        )
    if bench.size < bench.ranked:
        found.append(
            f"measured on {bench.size:,} of {bench.ranked:,} samples: neighbors are farther apart "
            "there than in the whole pool"
        )
    if isinstance(bench.checked, str):
        found.append(f"no self-check: {bench.checked}")
    return found


def _commands(folder: Folder, config: RankConfig, size: str) -> tuple[str, ...]:
    out = redacted(folder.url)
    words = [f"d2filter rank --out-dir {out} --overwrite rank"]
    default = options_of(RankConfig())
    for name, value in options_of(config).items():
        if value != default[name] or name in ("n_neighbors", "gamma"):
            shown = "none" if value is None else value
            words.append(f"--{name.replace('_', '-')} {_number(shown)}")
    return " ".join(words), f"d2filter select --out-dir {out} --fraction {size}"


def _copies(config: RankConfig) -> str:
    return "none" if config.collapse_copies is None else _number(config.collapse_copies)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(folder: Folder, found: Advice, bench: _Bench) -> None:
    folder.publish_json(
        DATA,
        {
            "graph": RunState(folder).require("graph")["fingerprint"],
            "recommended": {what: {"value": value, "why": why} for what, value, why in found.lines},
            "options": options_of(found.chosen.config),
            "fraction": found.budget,
            "compared_at": found.fraction,
            "commands": found.commands,
            "notes": found.notes,
            "near": bench.yardstick.near,
            "measured_on": bench.size,
            "ranked": bench.ranked,
            "trials": [
                {"setting": t.name, "options": options_of(t.config), "measures": t.rows}
                for t in found.trials
            ],
        },
    )
    page = pages.render(
        "advise.html",
        pages.drawn({"trials": plots.trials(*_dots(found))}),
        out=redacted(folder.url),
        title=f"advice · {redacted(folder.url).rstrip('/').rpartition('/')[2]} · d2filter",
        found=found,
        trials=sorted(found.trials, key=lambda t: -t.rows[found.fraction]["coverage"]),
        checked=not isinstance(bench.checked, str),
    )
    with folder.publish(PAGE) as path:
        path.write_text(page, "utf-8")


def _dots(found: Advice) -> tuple[list[tuple[str, float, float]], str]:
    """Name, mean score and coverage of each trial, and the name of the chosen one."""
    rows = [(t.name, t.rows[found.fraction]) for t in found.trials]
    return [(name, row["score"], row["coverage"]) for name, row in rows], found.chosen.name
