"""One table of D2's setting over the drawn pool, the photographs and the labelled pictures.

    python -m jobs.bench_settings --planted OUT --flickr OUT --cifar OUT

Reads what `jobs.bench_planted`, `jobs.bench_flickr` and `jobs.bench_cifar` have measured, each from
its folder of finished figures, and measures nothing. A pool without a folder is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench import made_by

Row = dict[str, Any]

# D2 in other settings, and what is no method
_NOT_OTHERS = ("D2", "score", "random", "best that is possible", "all pairs", "facts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of one method on one draw of a pool."""

    name: str
    column: str
    value: float
    """a share; more is better"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the figures of a pool are, and which of them are shown."""

    title: str
    file: str
    columns: tuple[str, ...]

    def figures(self, rows: Iterable[Row]) -> list[Figure]:
        """Those of the columns."""
        found = [_figure(self.file, row) for row in rows]
        return [one for one in found if one is not None and one.column in self.columns]


def _figure(file: str, row: Row) -> Figure | None:
    if file == "planted.jsonl" and row.get("seed") in (2, 3, 4) and "kept" in row:
        return Figure(name=row["name"], column=f"{row['kept']:g}", value=row["useful"])
    if file == "flickr.jsonl" and row["kind"] == "rank" and row["share"] == 0.2:
        return Figure(name=row["name"], column=row["kept"], value=row["useful"])
    return None


SOURCES = {
    "planted": Source(
        title="drawn pairs, useful share", file="planted.jsonl", columns=("0.1", "0.3", "0.5")
    ),
    "flickr": Source(
        title="photographs, useful share", file="flickr.jsonl", columns=("0.1", "0.3", "0.5")
    ),
}


def read(path: Path) -> list[Row]:
    """The lines of a file of finished figures."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def best(figures: list[Figure], column: str, names: Iterable[str]) -> str:
    """The name and mean of the best of some methods in a column, in percent; – without any."""
    means = {
        name: float(np.mean(values))
        for name in set(names)
        if (values := [f.value for f in figures if (f.name, f.column) == (name, column)])
    }
    if not means:
        return "–"
    name = max(sorted(means), key=means.__getitem__)
    return f"{100 * means[name]:.1f}" + (f" ({name})" if len(set(names)) > 1 else "")


def table(pools: dict[str, list[Figure]]) -> list[str]:
    """The table, line by line. pools: figures by the name of their source."""
    columns = [(name, column) for name in pools for column in SOURCES[name].columns]
    heads = " | ".join(f"{SOURCES[name].title}, kept {column}" for name, column in columns)
    every = {name: sorted({f.name for f in figures}) for name, figures in pools.items()}
    lines = [f"| | {heads} |", "|---" * (1 + len(columns)) + "|"]
    for label, fits in (
        ("**D2 auto**", lambda name: name == "D2 auto"),
        ("D2 published", lambda name: name == "D2 k=1 gamma=1"),
        ("score", lambda name: name == "score"),
        ("score, collapsed copies, best distance", lambda name: name.startswith("score, copies")),
        ("random", lambda name: name == "random"),
        ("best of the others", lambda name: not name.startswith(_NOT_OTHERS)),
        ("D2, best setting in hindsight", lambda name: name.startswith("D2 k=")),
    ):
        cells = [best(pools[p], c, [n for n in every[p] if fits(n)]) for p, c in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Read, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, source in SOURCES.items():
        parser.add_argument(f"--{name}", type=Path, help=f"folder with {source.file}")
    parser.add_argument("--results", default="jobs/results/bench_settings.md", type=Path)
    arguments = vars(parser.parse_args())
    pools = {
        name: source.figures(read(arguments[name] / source.file))
        for name, source in SOURCES.items()
        if arguments[name] is not None
    }
    lines = [
        "# One setting over three pools",
        "",
        made_by("jobs.bench_settings"),
        "",
        "Means of the draws, in percent. The setting of *D2 auto* is chosen by the tool for each "
        "share that is kept; *hindsight* and *best* are looked up for each column on the pool "
        "itself.",
        "",
        *table(pools),
    ]
    arguments["results"].write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
