"""The calibration loop, with a pool that only pretends to be searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from d2filter.algorithm.knn import calibrate, cells
from d2filter.algorithm.knn.calibrate import Choice, Effort, TrainedSizes

SMALL = 100_000


class Pool:
    """Notes what `fit` does; `choice` gives the result of each effort."""

    def __init__(self, choice: Callable[[Effort], Choice], total: int, nlist: int = 64) -> None:
        self.total = total
        self.did: list[Any] = []
        self._choice = choice
        self._nlist = nlist

    def train(self, effort: Effort) -> TrainedSizes:
        self._effort = effort
        self.did.append(effort)
        return TrainedSizes(cells=self._nlist, axes=32, parents=6)

    def choose(self) -> Choice:
        self.did.append("choose")
        return self._choice(self._effort)

    def assign(self, probes: int) -> None:
        self.did.append(probes)

    def use_one_cell(self) -> None:
        self.did.append("one cell")


def found(
    predicted: float, probes: int = 2, short_of: str = "", evaluations: float = 9.0
) -> Choice:
    return Choice(
        probes=probes, passes=0, predicted=predicted, evaluations=evaluations,
        reached=not short_of, short_of=short_of,
    )  # fmt: skip


def test_a_choice_that_reaches_the_target_is_taken_at_once() -> None:
    pool = Pool(lambda effort: found(0.99), SMALL)
    assert calibrate.fit(pool, 0.95) == found(0.99)
    assert pool.did == [calibrate.LEAST, "choose"]


def test_a_pool_of_one_cell_is_not_calibrated() -> None:
    pool = Pool(lambda effort: found(0.0), 900, nlist=1)
    assert calibrate.fit(pool, 0.95) == calibrate.exact_choice(900)
    assert pool.did == [calibrate.LEAST]


def test_effort_grows_until_the_target_is_reached() -> None:
    """First the parents, of which there are 6, then the axes."""

    def choice(effort: Effort) -> Choice:
        if effort.least_axes:
            return found(0.96, probes=cells.STORED_PROBES + 5)
        return found(0.9, short_of="cells" if effort == calibrate.LEAST else "axes")

    pool = Pool(choice, SMALL)
    assert calibrate.fit(pool, 0.95) == choice(Effort(least_axes=128))
    efforts = [step for step in pool.did if isinstance(step, Effort)]
    assert efforts[0] == calibrate.LEAST
    assert efforts[-1].least_axes == 128
    assert len(efforts) >= 2
    # more probes than are stored: assigned once, at the end
    assert pool.did[-1] == cells.STORED_PROBES + 5
    assert pool.did.count("choose") == len(efforts)


@pytest.mark.parametrize(
    ("total", "choice", "exact"),
    [
        (SMALL, found(0.99, evaluations=0.6 * SMALL), True),  # as costly as comparing all
        (SMALL, found(0.9, short_of=""), False),
        (calibrate.EXACT_UP_TO, found(0.96, short_of="axes"), True),  # it may miss the target
        (calibrate.EXACT_UP_TO + 1, found(0.96, short_of="axes"), False),  # but the pool is large
    ],
)
def test_where_cells_do_not_pay_all_is_in_one_cell(total: int, choice: Choice, exact: bool) -> None:
    pool = Pool(lambda effort: choice, total)
    target = min(0.95, choice.predicted)
    assert calibrate.fit(pool, target) == (calibrate.exact_choice(total) if exact else choice)
    assert ("one cell" in pool.did) == exact
