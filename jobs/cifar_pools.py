"""CIFAR-10 as pools to prune: three sets of labels, and every method's order of the samples.

Difficulties are computed from the log of one training on all samples, the graph from features.
`Trainer` hides which network is trained: a head on frozen features, or a network from pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import by_class, features, quantile
from d2filter.algorithm.greedy import auto_cut, auto_settings, in_memory
from d2filter.algorithm.knn import products
from d2filter.algorithm.methods import selectors
from d2filter.algorithm.scores import registry as scores
from d2filter.config import TUNED_FOR, RankConfig

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

NEIGHBORS = 10
CENTROIDS = 10  # of prototypicality: as many as there are classes


class Trainer(Protocol):
    """Trains networks on rows of the training pictures, and judges them on the test pictures."""

    @property
    def summary(self) -> str:
        """What is trained, for the report."""

    def log(self, label: I64, seed: int) -> tuple[F32, F32]:
        """Train on everything: probabilities after each epoch (n, e, classes), features (n, d)."""

    def accuracies(self, label: I64, subsets: Sequence[I64], seed: int) -> list[float]:
        """Train one network on each subset: the share of the test pictures that it has right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting of D2, but for its cut."""

    k: int
    gamma: float | Literal["auto"]
    gamma_scale: str = "median"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """Neighbor lists of n samples."""

    neighbors: I64
    """(n, k) rows, −1 pads"""
    sqdist: F32
    """(n, k)"""

    def first(self, k: int) -> Lists:
        """The first k of each list."""
        return Lists(neighbors=self.neighbors[:, :k], sqdist=self.sqdist[:, :k])


class Pool:
    """n training pictures with one set of labels, and the orders in which methods keep them."""

    def __init__(self, label: I64, rows: F32, log: F32, seed: int, inside: Lists, across: Lists):
        """label: (n,). rows: (n, d) features of the graph. log: (n, e, classes) probabilities.
        inside, across: neighbor lists within classes, and without regard to them.
        """
        self._label, self._rows, self._log, self._seed = label, rows, log, seed
        self._inside, self._across = inside, across
        self._hi = np.zeros(label.size, np.uint64)
        self._lo = np.arange(label.size, dtype=np.uint64)
        self._orders: dict[str, I64] = {}

    def __len__(self) -> int:
        return self._label.size

    def difficulty(self, score: str) -> F32:
        """A score of the log, or `prototypicality`; higher goes first."""
        if score == "prototypicality":
            return scores.difficulty(_to_centroids(self._rows, self._seed), "high")
        values = scores.function_of(score)(self._log, self._label)
        return scores.difficulty(values, scores.SCORES[score].kept_first)

    def auto_cut(self, kept: Decimal, score: str = "margin") -> Decimal:
        """The share of the hardest that `--cut-hardest auto` takes away for a kept share."""
        return auto_cut.auto(
            quantile.upper_counts(self.difficulty(score)), kept, middle=auto_cut.MIDDLE.get(score)
        )

    def d2(self, setting: Setting, cut: Decimal, kept: Decimal = TUNED_FOR) -> I64:
        """D2 over the margin within the classes, which keep their shares. kept: what a gamma of
        `auto` is for.
        """
        return self._d2(setting, cut, "margin", self._inside, self._label, kept)

    def d2_without_labels(self, setting: Setting, cut: Decimal) -> I64:
        """D2 over all samples with prototypicality: no label is looked at."""
        one = np.zeros(self._label.size, np.int64)
        return self._d2(setting, cut, "prototypicality", self._across, one)

    def _d2(
        self,
        setting: Setting,
        cut: Decimal,
        score: str,
        lists: Lists,
        group: I64,
        kept: Decimal = TUNED_FOR,
    ) -> I64:
        some, difficulty = lists.first(setting.k), self.difficulty(score)
        config = RankConfig(
            gamma=setting.gamma,
            kernel="rbf",
            collapse_copies=None,
            gamma_scale=setting.gamma_scale,
            cut_hardest=cut,
            tuned_for=kept,
        )
        ids = self._hi, self._lo
        resolved, last = config.resolve_on(
            difficulty, *ids, some.neighbors, some.sqdist, auto_settings.PoolFacts()
        )
        ranked = in_memory.rank_graph(
            *ids,
            difficulty,
            some.neighbors,
            some.sqdist,
            scheme=config.scheme(resolved),
            is_demoted=last,
        )
        return np.argsort(by_class.interleaved(ranked.rank, group, last, "proportional"))

    def ccs(self, cut: Decimal) -> I64:
        """CCS over the margin."""
        return selectors.ccs(self._pool(self._inside, "margin"), cut=float(cut))

    def hardest(self, score: str) -> I64:
        """Highest difficulty first."""
        return selectors.order("score", self._pool(self._inside, score))

    def selected(self, method: str) -> I64:
        """One of `selectors.SELECTORS`, within the classes where it looks at neighbors."""
        if method not in self._orders:
            self._orders[method] = selectors.order(method, self._pool(self._inside, "margin"))
        return self._orders[method]

    def _pool(self, lists: Lists, score: str) -> selectors.Pool:
        return selectors.Pool(
            hi=self._hi,
            lo=self._lo,
            difficulty=self.difficulty(score),
            features=self._rows,
            neighbors=lists.neighbors,
            sqdist=lists.sqdist,
            group=self._label,
            seed=self._seed,
        )


def lists(rows: F32, label: I64 | None, *, k: int = NEIGHBORS) -> Lists:
    """Exact neighbor lists of rows of any length, inside the classes where there are labels."""
    n = len(rows)
    group = np.zeros(n, np.int64) if label is None else label
    graph, _ = by_class.graph(
        features.fix([rows]), np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64), group, k
    )
    return Lists(neighbors=graph.neighbors, sqdist=graph.sqdist)


def unit(rows: F32) -> F32:
    """Rows of length 1, as the graph has them."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: F32 = (rows / np.where(length > 0, length, 1)).astype(np.float32)
    return scaled


def _to_centroids(rows: F32, seed: int) -> F32:
    """Distance to the nearest of CENTROIDS centers of k-means: no label is looked at."""
    trained = products.load_faiss().Kmeans(
        rows.shape[1], CENTROIDS, niter=25, spherical=True, seed=seed
    )
    trained.train(rows)
    return scores.prototypicality(rows, trained.centroids)
