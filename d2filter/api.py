"""D2 Pruning for notebooks: `rank` computes the same ranking as the command line, from arrays."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from d2filter import arrays
from d2filter.algorithm import budget, features, uids
from d2filter.algorithm import by_class as grouping
from d2filter.algorithm.greedy import auto_settings, in_memory
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.scores import mismatched
from d2filter.config import AUTO, GraphConfig, RankConfig, SelectConfig
from d2filter.errors import InputError
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder, absolute

if TYPE_CHECKING:
    from d2filter.tools.explain import Explained, NotRanked

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedPool:
    """A ranked pool of n samples; all arrays are in the order of the rows given to `rank`."""

    rank: I64
    """(n,) position in the ranking, 0 = first; every budget is a prefix"""
    final: I64
    """(n,) final score, when the sample is selected, in units of 2⁻⁴⁰"""
    forward: I64
    """(n,) forward score, in units of 2⁻⁴⁰"""
    suppressed_by: I64
    """(n,) row of the suppressor, which lowered the score most; −1: none"""
    neighbors: I64
    """(n, k) rows, nearest first, −1 pads; k is `n_neighbors`, at most n − 1"""
    sqdist: npt.NDArray[np.float32]
    """(n, k) squared distances of the fixed features"""
    difficulty: npt.NDArray[np.float32]
    """(n,) scores as given"""
    recall: knn.Recall
    """measured recall@k of `neighbors`"""
    gamma: float
    """as given, or as fitted to `tuned_for`"""

    def select(
        self,
        fraction: float | str | Decimal | None = None,
        *,
        size: int | None = None,
        min_score: float | None = None,
    ) -> I64:
        """Rows to keep, best first, int64: the first floor(fraction·n) of the ranking, or `size`.

        `min_score` drops rows with a lower score from this prefix. Raises UsageError for a fraction
        outside (0, 1] or a size below 1.
        """
        exact = None if fraction is None else budget.parse_fraction(fraction)
        checked = SelectConfig(fraction=exact, budget=_index(size), min_score=_float(min_score))
        count = budget.budget_of(len(self.rank), fraction=checked.fraction, budget=checked.budget)
        rows = np.flatnonzero(
            budget.kept_mask(self.rank, self.difficulty, count, checked.min_score)
        )
        kept: I64 = rows[np.argsort(self.rank[rows])]
        return kept


def rank(
    embeddings: Any,
    scores: Any,
    *,
    n_neighbors: int = 10,
    gamma: float | Literal["auto"] = "auto",
    tuned_for: float | str | Decimal = "0.3",
    gamma_forward: float | None = None,
    kernel: str = "local",
    forward: str = "sum",
    reverse: str = "weighted",
    undirected: bool = False,
    gamma_scale: str = "none",
    cut_hardest: float | str | Decimal = 0,
    learned_below: float | None = None,
    collapse_copies: float | Literal["auto"] | None = "auto",
    groups: Any = None,
    group_budgets: str = "proportional",
    uids_hex: Sequence[str] | None = None,
    normalize: bool = True,
    target_recall: float = 0.95,
    exact_below: int = 16384,
    seed: int = 0,
) -> RankedPool:
    """Rank a pool with D2 Pruning: the same result as `d2filter run` (docs/method.md).

    Arrays may be from NumPy or PyTorch (any floating type and device), columns of pandas, Polars or
    Arrow, or lists of rows.

    embeddings: (n, d) numbers, or several such arrays, which are normalized separately and
    concatenated (image and text give `image|text`). scores: (n,), higher is kept first, rounded to
    float32. n_neighbors: k, at most n − 1. gamma: `auto` fits it to tuned_for, the share to keep;
    other shares are prefixes of the same ranking. cut_hardest: `auto` fits it to tuned_for too.
    learned_below: for this `auto`, samples with this score or more count as not learned by a
    network; None: from the middle of the scores' range on. uids_hex: (n,) uids, which decide ties;
    None: the row number decides. groups: (n,) classes; neighbors are then of the same class, and
    every budget contains the share of each class (group_budgets: proportional or uniform). Other
    arguments are those of the command line.

    Raises InputError, with the first bad row, for values that cannot be ranked, also for distinct
    integer scores that are equal in float32. Raises UsageError for settings out of range.

    >>> import numpy as np
    >>> pool = rank(np.eye(4, dtype=np.float32), [0.1, 0.4, 0.3, 0.2])
    >>> pool.select(0.5).tolist()
    [1, 2]
    """
    graph_config = GraphConfig(
        n_neighbors=_index(n_neighbors), target_recall=_float(target_recall),
        exact_below=_index(exact_below), seed=_index(seed),
    )  # fmt: skip
    rank_config = RankConfig(
        gamma=_float(gamma),
        tuned_for=budget.parse_fraction(tuned_for),
        gamma_forward=_float(gamma_forward),
        kernel=kernel,
        forward=forward,
        reverse=reverse,
        undirected=undirected,
        gamma_scale=gamma_scale,
        cut_hardest=_share(cut_hardest),
        collapse_copies=_float(collapse_copies),
        group_budgets=group_budgets,
    )
    modalities, difficulty = arrays.modalities(embeddings), arrays.difficulty(scores)
    n = len(difficulty)
    _check(modalities, n, normalize)
    hi, lo = _ids(uids_hex, n)
    order = uids.ascending(hi, lo)
    rows = features.fix(modalities, normalize=normalize)
    arrays.refuse(~np.isfinite(rows).all(axis=1), "features overflow float16")
    rows, hi, lo = rows[order], hi[order], lo[order]
    group = _classes(groups, n)[order]
    graph, classes = grouping.graph(
        rows, hi, lo, group, knn.width(graph_config.n_neighbors, n),
        target_recall=graph_config.target_recall, exact_below=graph_config.exact_below,
        seed=graph_config.seed,
    )  # fmt: skip
    resolved, last = rank_config.resolve_on(
        difficulty[order],
        hi,
        lo,
        graph.neighbors,
        graph.sqdist,
        auto_settings.PoolFacts(
            wrong=_wrong_share(modalities, rows, hi, lo), learned_below=_float(learned_below)
        ),
    )
    ranked = in_memory.rank_graph(
        hi,
        lo,
        difficulty[order],
        graph.neighbors,
        graph.sqdist,
        scheme=rank_config.scheme(resolved),
        undirected=rank_config.undirected,
        is_demoted=last,
    )
    places = ranked.rank
    if groups is not None:
        places = grouping.interleaved(places, group, last, group_budgets)
    back = np.empty_like(order)
    back[order] = np.arange(order.size)
    return RankedPool(
        rank=places[back],
        final=ranked.final[back],
        forward=ranked.forward[back],
        suppressed_by=_rows(ranked.suppressed_by, order)[back],
        neighbors=_rows(graph.neighbors, order)[back],
        sqdist=graph.sqdist[back],
        difficulty=difficulty,
        recall=knn.pooled([(one.size, one.recall) for one in classes]),
        gamma=resolved.gamma,
    )


def explain(out: str | os.PathLike[str], uid: str) -> Explained | NotRanked:
    """Explain why a sample of a finished run was kept or dropped. out: the run directory, a path or
    an fsspec URL.

    Raises UsageError if `uid` is not a uid, InputError if the run has not read such a sample.

    >>> found = explain(out, uid)
    >>> found.kept, found.rank
    (True, 0)
    """
    from d2filter.tools.explain import explain as explain_all

    return explain_all(Folder(absolute(os.fspath(out))), [uid])[0]


def _wrong_share(
    modalities: list[npt.NDArray[Any]], rows: features.F16, hi: uids.U64, lo: uids.U64
) -> Fraction | None:
    """Share of pairs that match no better than random pairs; None if the arrays are not pairs."""
    widths = [array.shape[1] for array in modalities]
    if len(widths) != 2 or widths[0] != widths[1]:
        return None
    return mismatched.wrong_share({"pairs": mismatched.judged(rows[mismatched.sampled(hi, lo)])})


def _classes(groups: Any, n: int) -> I64:
    """Class number of each sample, (n,) int64; all 0 without classes."""
    if groups is None:
        return np.zeros(n, np.int64)
    labels = arrays.labels(groups)
    if labels.shape != (n,):
        raise InputError(f"groups has shape {labels.shape} and scores has {n} entries")
    try:
        return np.unique(labels, return_inverse=True)[1].astype(np.int64, copy=False)
    except TypeError as error:
        kinds = sorted({type(label).__name__ for label in labels})
        raise InputError(
            f"groups holds {' and '.join(kinds)}, which have no order: give every sample a label "
            "of one type"
        ) from error


def _index(value: Any) -> Any:
    """Convert any integer type to int; other values stay, and the configuration refuses them."""
    try:
        return operator.index(value)
    except TypeError:
        return value


def _share(value: float | str | Decimal) -> Any:
    if value == AUTO:
        return value
    try:
        return Decimal(str(value))
    except InvalidOperation:
        return Decimal("NaN")  # the configuration refuses it with the name of the option


def _float(value: Any) -> Any:
    """Convert any number type to float; other values stay, and the configuration refuses them."""
    if value is None or isinstance(value, str):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _rows(numbers: I64, order: I64) -> I64:
    """Convert row numbers of the sorted pool to those of the caller; −1 stays."""
    return np.where(numbers >= 0, order[numbers], -1)


def _ids(uids_hex: Any, n: int) -> tuple[uids.U64, uids.U64]:
    if uids_hex is None:
        return np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64)
    given = arrays.labels(uids_hex)
    if given.shape != (n,):
        raise InputError(f"uids_hex has shape {given.shape} and scores has {n} entries")
    import pyarrow as pa

    words = [uid if isinstance(uid, str) else None for uid in given]
    hi, lo, valid = uid_format.parse(pa.array(words, pa.string()))
    arrays.refuse(~valid, "uid is not 32 lowercase hex digits")
    order = uids.ascending(hi, lo)
    repeated = np.zeros(n, np.bool_)
    repeated[order[1:]] = (hi[order][1:] == hi[order][:-1]) & (lo[order][1:] == lo[order][:-1])
    arrays.refuse(repeated, "uid is repeated")
    return hi, lo


def _check(modalities: list[npt.NDArray[Any]], n: int, normalize: bool) -> None:
    for array in modalities:
        if array.ndim != 2 or len(array) != n or array.shape[1] == 0:
            raise InputError(
                f"embeddings has shape {array.shape}, expected ({n}, dimension), as scores has "
                f"{n} entries"
            )
        arrays.refuse(~np.isfinite(array).all(axis=1), "embedding is not finite")
        if normalize:
            arrays.refuse(~array.any(axis=1), "embedding is zero")
