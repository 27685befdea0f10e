"""Calibrates the neighbor search: chooses how many cells to probe, with a task per catalog part.

The driver writes queries to files. One task per catalog part searches them among the rows of the
part, and the driver merges the lists of all parts. All matrix products run in tasks.

index/asked-KIND-TURN-00.*          queries of one request: catalog_rows, features, cells to search
index/answer-KIND-TURN-00-00000.*   lists of one part for these queries

See docs/method.md#calibration.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm.knn import calibrate, products, search, shortlist
from d2filter.algorithm.knn.exact_lists import Lists, merge_inplace
from d2filter.config import GraphConfig
from d2filter.engine.stage_run import StageRun, TaskFunction
from d2filter.engine.task import Figures, Report, assigned_cpus
from d2filter.formats import catalog
from d2filter.formats.paths import Folder
from d2filter.formats.rows import read_columns, write_columns
from d2filter.stages.graph.search import list_exactly, read_lists, read_short, write_short
from d2filter.stages.graph.train import CALIBRATE, assigned_rows, each_count, read_trained

F16 = npt.NDArray[np.float16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
_READERS = 16  # threads that read the lists of parts, which may be on an object store


def choose(
    *, report: Report, steps: StageRun, config: GraphConfig, parts: int, kind: str
) -> Figures:
    """Task of the driver: choose how many cells to probe, and whether to refine. kind: of cells.
    Figures: `calibrate.Choice`, and whether cells pay.
    """
    pool = PartedSearcher(steps, parts, kind)
    sample = read_columns(steps.out.sub("index"), CALIBRATE, "catalog_row", "rows", "probed")
    choice = calibrate.choose(
        pool, sample["rows"], sample["catalog_row"], sample["probed"], config.n_neighbors,
        config.target_recall,
    )  # fmt: skip
    return {**asdict(choice), "pays": calibrate.pays(choice, pool.total, pool.trained.cells.count)}


class PartedSearcher:
    """Searches the whole catalog with tasks (a `calibrate.Searcher`)."""

    def __init__(self, steps: StageRun, parts: int, kind: str) -> None:
        out = steps.out
        self.trained = read_trained(out)
        self.sketch = self.trained.sketch
        self._steps = steps
        self._out = out
        self._parts = parts
        self._kind = kind
        self._layout = catalog.layout(out.sub("catalog"))
        self._assigned = assigned_rows(out, self._layout)
        self.total = self._layout.total
        nothing = np.zeros(self.trained.cells.count, np.int64)
        self.sizes: I64 = sum(each_count(out, parts), nothing)
        self._turns = 0

    def truth(self, queries: F16, catalog_rows: I64, k: int) -> Lists:
        """Exact lists (m, k) over the whole pool. queries: (m, d); catalog_rows: (m,)."""
        stem = self._ask([(queries, catalog_rows, np.zeros((len(catalog_rows), 0), np.int32))])
        self._search(list_exact_part, {"stem": stem, "k": k})
        found = Lists.empty(len(queries), k)
        everyone = np.arange(len(queries), dtype=np.int64)
        for _, theirs in self._answers(read_lists, stem, 0):
            merge_inplace(found, everyone, theirs, catalog_rows, self.total)
        return found

    def find(self, requests: Sequence[calibrate.Request]) -> list[Lists]:
        """Lists that the search of the requested cells finds, one `Lists` per request."""
        stem = self._ask([(r.queries, r.catalog_rows, r.probed) for r in requests])
        places = [self.sketch.places(r.k) for r in requests]
        self._search(short_lists, {"stem": stem, "places": places})
        out = []
        for number, r in enumerate(requests):
            short = shortlist.empty(len(r.queries), places[number])
            everyone = np.arange(len(r.queries), dtype=np.int64)
            for _, theirs in self._answers(read_short, stem, number):
                shortlist.merge_inplace(short, everyone, theirs, r.catalog_rows, self.total)
            out.append(shortlist.settle(short, r.catalog_rows, r.k, self.total))
        return out

    def rows(self, catalog_rows: I64) -> F16:
        """The features of catalog rows."""
        return self._layout.gather(catalog_rows)

    def probed(self, catalog_rows: I64) -> I32:
        """The cells that catalog rows probe."""
        return self._assigned.gather(catalog_rows)

    def _search(self, run: TaskFunction, arguments: Figures) -> None:
        """Search the queries of a turn in every catalog part."""
        turn, parts = arguments["stem"], [{"part": part} for part in range(self._parts)]
        self._steps.each(
            "choose", run, parts, arguments, name=f"choose-{turn}", variant=turn,
            on_gpu=products.may_use_gpus(),
        )  # fmt: skip

    def _answers(self, read: Callable[[Folder, str], Any], stem: str, number: int) -> Iterator[Any]:
        """The lists that the parts have found for a request, in the order of parts, with
        read-ahead.
        """
        stems = deque(_answer(stem, number, part) for part in range(self._parts))
        index = self._out.sub("index")
        with ThreadPoolExecutor(_READERS) as pool:
            ahead: deque[Future[Any]] = deque()
            while stems or ahead:
                while stems and len(ahead) < 2 * _READERS:
                    ahead.append(pool.submit(read, index, stems.popleft()))
                yield ahead.popleft().result()

    def _ask(self, requests: Sequence[tuple[F16, I64, I32]]) -> str:
        stem = f"{self._kind}-{self._turns:02d}"
        self._turns += 1
        for number, (queries, catalog_rows, probed) in enumerate(requests):
            write_columns(
                self._out.sub("index"), _asked(stem, number), rows=queries,
                catalog_row=catalog_rows, probed=probed,
            )  # fmt: skip
        return stem


def list_exact_part(*, report: Report, out: Folder, part: int, stem: str, k: int) -> Figures:
    """Task: write exact lists of the queries over one catalog part. Memory: the part."""
    list_exactly(out, part, _asked(stem, 0), _answer(stem, 0, part), k)
    return {}


def short_lists(
    *, report: Report, out: Folder, part: int, stem: str, places: Sequence[int]
) -> Figures:
    """Task: write shortlists of each request over one catalog part. Memory: the part."""
    products.use_threads(assigned_cpus())
    index = out.sub("index")
    trained = read_trained(out)
    layout = catalog.layout(out.sub("catalog"))
    rows = layout.read(part)
    own = layout.starts[part] + np.arange(len(rows), dtype=np.int64)
    home = np.array(assigned_rows(out, layout).part(part)[:, 0])
    members = search.make_members(trained.sketch.apply(rows), own, home, trained.cells.count)
    for number, width in enumerate(places):
        asked = read_columns(index, _asked(stem, number), "rows", "catalog_row", "probed")
        sketches = trained.sketch.apply(asked["rows"])
        short = shortlist.find(
            members, rows, own, sketches, asked["rows"], asked["catalog_row"], asked["probed"],
            width, layout.total,
        )  # fmt: skip
        write_short(index, _answer(stem, number, part), asked["catalog_row"], short)
    return {}


def _asked(stem: str, number: int) -> str:
    return f"asked-{stem}-{number:02d}"


def _answer(stem: str, number: int, part: int) -> str:
    return f"answer-{stem}-{number:02d}-{part:05d}"
