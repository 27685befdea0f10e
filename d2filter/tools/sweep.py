"""`d2filter sweep OUT`: ranks one graph with many settings and compares their measures.

sweep/settings/NAME.json   measures of one setting at each fraction, and the graph's fingerprint
sweep/table.csv            results of the latest sweep, a line per setting and fraction
sweep/plot.html            a page with a plot for each measure

Memory: the graph, the features and one ranking of the whole pool.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import budget
from d2filter.algorithm.measures import coverage, distinct
from d2filter.algorithm.methods import selectors
from d2filter.config import AUTO, RankConfig, options_of
from d2filter.errors import UsageError
from d2filter.formats.paths import Folder, read_jsons
from d2filter.formats.runstate import RunState, digest
from d2filter.stages.rank import in_memory as rank_in_memory
from d2filter.text import redacted
from d2filter.tools import pages, selfcheck, sweep_plots

Say = Callable[[str], None]
Row = dict[str, Any]
I64 = npt.NDArray[np.int64]

PAGE, TABLE = "sweep/plot.html", "sweep/table.csv"
WATCHED = 2000
"""largest number of groups whose distance to the nearest kept sample is measured"""
_CELLS, _CELL = 1000, 20  # largest number of regions, and average samples of one at least

MEASURES = {
    "coverage": "how near a kept sample is to each distinct group, copies counted once, 1 where a "
    "member is kept: high is good",
    "groups": "share of the distinct groups with a kept member: high is good",
    "copies": "share of the kept samples with a kept near-copy: low is good",
    "effective": "effective share of the kept samples, 1 where none has a kept neighbor: high is "
    "good",
    "score": "mean score of the kept samples",
    "wrong": "share of swapped captions that would be kept (self-check): low is good; empty where "
    "it cannot be measured",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The settings and fractions to measure: every combination."""

    configs: tuple[RankConfig, ...]
    fractions: tuple[Decimal, ...]


def grid(fractions: Sequence[str], **values: Sequence[Any]) -> Grid:
    """All combinations of options of RankConfig. Options that a method does not use are not varied.
    Raises UsageError for values out of range.
    """
    configs: dict[str, RankConfig] = {}
    for combination in itertools.product(*values.values()):
        options = dict(zip(values, combination, strict=True))
        read = selectors.options(options.get("method", "d2"))
        for name in selectors.OPTIONS - read:
            options.pop(name, None)
        given = RankConfig(**options)  # refuses values out of range, also those that are not used
        if not given.is_tuned:
            options.pop("tuned_for", None)
        if options.get("method", "d2") != "d2":
            mine = {"method", "n_neighbors", "cut_hardest", "collapse_copies", "seed", "tuned_for"}
            mine |= read
            options = {name: value for name, value in options.items() if name in mine}
            if options.get("collapse_copies") in (None, AUTO):
                options.pop("collapse_copies", None)
                if "neighbors" not in selectors.SELECTORS[options["method"]].wants:
                    options.pop("n_neighbors", None)
        config = RankConfig(**options)
        configs.setdefault(digest(options_of(config)), config)
    exact = tuple(sorted({budget.parse_fraction(f) for f in fractions}))
    return Grid(configs=tuple(configs.values()), fractions=exact)


def label(config: RankConfig) -> str:
    """A short name of a setting: its method and the options that are not the default."""
    default = options_of(RankConfig())
    own = options_of(config)
    words = [config.method]
    if config.method == "d2":
        words += [f"k={config.n_neighbors or 'all'}", f"gamma={config.gamma}"]
    shown = ("method", "gamma", "n_neighbors") if config.method == "d2" else ("method",)
    words += [f"{n}={v}" for n, v in own.items() if n not in shown and v != default[n]]
    return " ".join(words)


def cell_count(samples: int) -> int:
    """Number of regions into which a pool is divided for the report."""
    return min(_CELLS, max(1, samples // _CELL))


def sweep(folder: Folder, wanted: Grid, say: Say) -> list[Row]:
    """Measure the settings that were not measured before; writes the table and the page,
    returns the rows of the table.

    Raises RunStateError without a graph, UsageError for more neighbors than the graph has, or for a
    pool that is too large for a method.
    """
    graph = RunState(folder).require("graph")
    k = int(graph["stats"]["k"])
    resolved = (
        replace(c, n_neighbors=k) if c.method == "d2" and not c.n_neighbors else c
        for c in wanted.configs
    )
    configs = list({digest(options_of(c)): c for c in resolved}.values())
    for config in configs:
        if config.n_neighbors > k:
            raise UsageError(
                f"n-neighbors is {config.n_neighbors}, the graph of {folder.url} has {k}: sweep "
                "at most that many, or build the graph again"
            )
    rows: list[Row] = []
    pool: _Pool | None = None
    for number, config in enumerate(configs, 1):
        known = _known(folder, config, graph["fingerprint"])
        missing = [f for f in wanted.fractions if str(f) not in known]
        if missing:
            pool = pool or _Pool(folder, k, say)
            known.update(pool.measured(config, missing))
            folder.publish_json(
                _file(config), {"graph": graph["fingerprint"], "options": options_of(config),
                                "measures": known},
            )  # fmt: skip
        say(
            f"[{number}/{len(configs)}] {label(config)}" + ("" if missing else " (measured before)")
        )
        rows += [{"setting": label(config), **known[str(f)]} for f in wanted.fractions]
    _write_table(folder, rows)
    _write_page(folder, rows)
    return rows


def measured(folder: Folder) -> list[Row]:
    """All measures that sweeps have stored for the current graph, by setting and fraction."""
    graph = RunState(folder).require("graph")["fingerprint"]
    home = folder.sub("sweep/settings")
    rows = []
    for found in read_jsons(home, home.names(".json")).values():
        if found["graph"] == graph:
            name = label(RankConfig.from_options(found["options"]))
            mine = found["measures"].values()
            # another version may have stored other measures
            rows += [{"setting": name, **row} for row in mine if row.keys() >= MEASURES.keys()]
    return sorted(rows, key=lambda r: (r["setting"], Decimal(r["fraction"])))


def table(rows: list[Row]) -> list[str]:
    """The measures as lines of text, best coverage first for each fraction."""
    width = max(len("fraction, setting"), *(len(r["setting"]) + 6 for r in rows))
    head = f"{'fraction, setting':<{width}}" + "".join(f"{name:>10}" for name in MEASURES)
    out = [head]
    for r in sorted(rows, key=lambda r: (Decimal(r["fraction"]), -r["coverage"])):
        name = f"{r['fraction']:<5} {r['setting']}"
        values = ("-" if r[m] is None else f"{r[m]:.4g}" for m in MEASURES)
        out.append(f"{name:<{width}}" + "".join(f"{value:>10}" for value in values))
    return [*out, *(f"{name}: {text}" for name, text in MEASURES.items())]


class _Pool:
    """A loaded pool, and the values that all measures use."""

    def __init__(self, folder: Folder, k: int, say: Say) -> None:
        say("reading the graph and its features")
        self._folder = folder
        self._k = k
        self._lists = {k: rank_in_memory.read_pool(folder, k, with_features=True)}
        whole = self._lists[k]
        # measures are over rows in order of uid, like the features
        self._order = whole.order
        self._pool = whole.by_uid(RankConfig())
        p = self._pool
        self._yardstick = distinct.Yardstick(
            p.features, p.hi, p.lo, p.difficulty, p.neighbors, p.sqdist, watched=WATCHED
        )
        self._spacing = coverage.spacing(p.sqdist)
        catalog = RunState(folder).require("catalog")["stats"]
        score = catalog.get("score", {})
        self._raw = budget.raw_scores(p.difficulty, score.get("kept_first", "high"))
        self._say = say

    def measured(self, config: RankConfig, fractions: Sequence[Decimal]) -> dict[str, Row]:
        """Measures of one setting, by fraction."""
        known = self._with(config.n_neighbors or self._k)
        ranks, _, _ = rank_in_memory.ranks_of(known, config)
        rank = ranks[self._order]
        wrong = self._wrong(config, fractions)
        return {str(f): {**self._row(rank, f), "wrong": wrong.get(str(f))} for f in fractions}

    @cached_property
    def _checked(self) -> selfcheck.Prepared | str:
        """The pool with swapped captions, or why it cannot be checked."""
        checked = selfcheck.of_pool(self._folder, self._lists[self._k])
        if isinstance(checked, str):
            self._say(f"no self-check: {checked}")
        return checked

    def _wrong(self, config: RankConfig, fractions: Sequence[Decimal]) -> dict[str, float]:
        """The rates at which swapped captions would be kept, by fraction."""
        if config.method not in selfcheck.CHEAP:
            return {}
        checked = self._checked
        if isinstance(checked, str):
            return {}
        size = len(checked.known.part.hi)
        # the self-check may use a sample of the pool, of which a small budget keeps nothing
        rates = checked.rates(config, [f for f in fractions if budget.floor_of(f, size)])
        return {fraction: row["kept"] for fraction, row in rates.items()}

    def _with(self, k: int) -> rank_in_memory.LoadedPool:
        if k not in self._lists:
            self._lists[k] = self._lists[self._k].narrowed(k)
        return self._lists[k]

    def _row(self, rank: I64, fraction: Decimal) -> Row:
        p = self._pool
        size = budget.budget_of(rank.size, fraction=fraction)
        kept = rank < size
        shares = {
            f"{name}_decile_{d}": float(share)
            for name, values in (("score", p.difficulty), ("spacing", self._spacing))
            for d, share in enumerate(coverage.kept_by_decile(values, kept), 1)
        }
        return {
            "fraction": str(fraction),
            "kept": size,
            **asdict(self._yardstick.measure(kept)),
            "score": float(self._raw[kept].mean(dtype=np.float64)),
            "near": self._yardstick.near,
            **shares,
        }


def _known(folder: Folder, config: RankConfig, fingerprint: str) -> dict[str, Row]:
    """Measures of a setting on this graph from an earlier sweep, by fraction."""
    found = folder.read_json(_file(config))
    if found is None or found["graph"] != fingerprint:
        return {}
    measures: dict[str, Row] = found["measures"]
    return {fraction: row for fraction, row in measures.items() if row.keys() >= MEASURES.keys()}


def _file(config: RankConfig) -> str:
    return f"sweep/settings/{config.method}-{digest(options_of(config))[:12]}.json"


def _write_table(folder: Folder, rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with folder.publish(TABLE) as path:
        path.write_text(text.getvalue(), "utf-8")


def _write_page(folder: Folder, rows: list[Row]) -> None:
    shown = [name for name in MEASURES if sweep_plots.any_of(rows, name)]
    page = pages.render(
        "sweep.html",
        pages.drawn(sweep_plots.all_panels(rows, shown)),
        out=redacted(folder.url),
        title=f"sweep · {redacted(folder.url).rstrip('/').rpartition('/')[2]} · d2filter",
        settings=len({row["setting"] for row in rows}),
        styles=sweep_plots.styles(rows),
        shown=shown,
        rows=rows,
        measures=MEASURES,
    )
    with folder.publish(PAGE) as path:
        path.write_text(page, "utf-8")
