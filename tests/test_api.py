"""The notebook interface `d2filter.rank`, compared with the command line."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
from support import pools

import d2filter
from d2filter import api
from d2filter.cli.main import main
from d2filter.errors import InputError, UsageError
from d2filter.formats import ranking
from d2filter.formats.paths import Folder
from d2filter.formats.uid import to_hex


def pool(n: int = 40, d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)).astype(np.float32), rng.random(n).astype(np.float32)


def test_the_example_in_the_docstring_works() -> None:
    found = doctest.DocTestFinder(recurse=False).find(api.rank, "rank", globs={"rank": api.rank})
    results = [doctest.DocTestRunner().run(one) for one in found]
    assert [one.failed for one in results] == [0]
    assert results[0].attempted > 2


def test_the_example_of_explain_is_that_of_a_run(tmp_path: Path, cluster: None) -> None:
    pools.write(tmp_path / "m", pools.make(50, 6))
    out = str(tmp_path / "o")
    assert main(["run", "--metadata-dir", str(tmp_path / "m"), "--out-dir", out]) == 0
    (part,) = ranking.iter_columns(Folder(out).sub("ranking"))
    first = part["rank"] == 0
    (uid,) = to_hex(part["uid_hi"][first], part["uid_lo"][first])
    names = {"explain": d2filter.explain, "out": out, "uid": uid}
    (example,) = doctest.DocTestFinder(recurse=False).find(api.explain, "explain", globs=names)
    result = doctest.DocTestRunner().run(example)
    assert (result.failed, result.attempted) == (0, 2)


def test_every_budget_is_a_prefix_and_inputs_stay_as_they_are() -> None:
    embeddings, scores = pool()
    before = embeddings.copy(), scores.copy()
    ranked = d2filter.rank(embeddings, scores, n_neighbors=3)
    whole = ranked.select(1.0)
    assert sorted(whole.tolist()) == list(range(40))
    assert ranked.select(0.25).tolist() == whole[:10].tolist()
    assert ranked.select(size=7).tolist() == whole[:7].tolist()
    floor = float(np.median(scores))
    assert ranked.select(0.5, min_score=floor).tolist() == [
        row for row in whole[:20] if scores[row] >= floor
    ]
    assert (embeddings == before[0]).all()
    assert (scores == before[1]).all()


def test_the_order_of_rows_does_not_matter_when_uids_are_given() -> None:
    embeddings, scores = pool()
    embeddings[20:] = embeddings[:20]  # copies, so that uids decide
    scores[:] = 0.5
    uid = [f"{(i * 7919) % 40:032x}" for i in range(40)]
    plain = d2filter.rank(embeddings, scores, n_neighbors=2, uids_hex=uid)
    turn = np.random.default_rng(1).permutation(40)
    turned = d2filter.rank(
        embeddings[turn], scores[turn], n_neighbors=2, uids_hex=[uid[i] for i in turn]
    )
    assert (turned.rank == plain.rank[turn]).all()
    assert (turned.final == plain.final[turn]).all()
    found = turned.suppressed_by
    assert (np.where(found >= 0, turn[found], -1) == plain.suppressed_by[turn]).all()


def test_an_array_that_cannot_be_ranked_is_refused_with_its_first_bad_row() -> None:
    embeddings, scores = pool()

    def broken(row: int, value: float) -> np.ndarray:
        out = embeddings.copy()
        out[row] = value
        return out

    odd = scores.copy()
    odd[9] = np.nan
    twice = ["0" * 32] * 40
    for arguments, said in (
        ((broken(5, np.nan), scores), "embedding is not finite in 1 rows, first in row 5"),
        ((broken(6, 0), scores), "embedding is zero in 1 rows, first in row 6"),
        ((embeddings, odd), "score is not finite in 1 rows, first in row 9"),
        ((embeddings[:30], scores), "embeddings has shape"),
        ((embeddings, np.empty(0)), "scores has shape"),
        (([], scores), "embeddings is empty"),
    ):
        with pytest.raises(InputError, match=said):
            d2filter.rank(*arguments)
    with pytest.raises(InputError, match="uid is repeated in 39 rows"):
        d2filter.rank(embeddings, scores, uids_hex=twice)
    with pytest.raises(InputError, match="uid is not 32 lowercase hex digits"):
        d2filter.rank(embeddings, scores, uids_hex=["x"] * 40)
    with pytest.raises(UsageError, match="n-neighbors is 0"):
        d2filter.rank(embeddings, scores, n_neighbors=0)
    with pytest.raises(UsageError, match="fraction is 2"):
        d2filter.rank(embeddings, scores).select(2)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'filter'"):
        _ = d2filter.filter


def test_groups_have_edges_inside_and_every_budget_its_share() -> None:
    embeddings, scores = pool()
    labels = ["cat"] * 10 + ["dog"] * 30
    ranked = d2filter.rank(embeddings, scores, n_neighbors=3, groups=labels)
    classes = np.array(labels)
    assert (classes[ranked.neighbors] == classes[:, None]).all()
    for fraction, cats in ((0.2, 2), (0.5, 5), (0.8, 8)):
        assert (classes[ranked.select(fraction)] == "cat").sum() == cats
    uniform = d2filter.rank(
        embeddings, scores, n_neighbors=3, groups=labels, group_budgets="uniform"
    )
    assert (classes[uniform.select(size=20)] == "cat").sum() == 10
    # a class alone is ranked as it is inside
    one = d2filter.rank(embeddings[10:], scores[10:], n_neighbors=3, forward="none")
    both = d2filter.rank(embeddings, scores, n_neighbors=3, forward="none", groups=labels)
    inside = both.neighbors[10:] - 10
    assert (inside == one.neighbors).all()
    with pytest.raises(InputError, match="groups has shape"):
        d2filter.rank(embeddings, scores, groups=["cat"])
    with pytest.raises(UsageError, match="group-budgets is 'even'"):
        d2filter.rank(embeddings, scores, groups=labels, group_budgets="even")


def test_cut_samples_and_copies_come_last() -> None:
    embeddings, scores = pool()
    embeddings[5] = embeddings[4]
    scores[4], scores[5] = 0.5, 0.4
    ranked = d2filter.rank(embeddings, scores, cut_hardest=0.25, collapse_copies=0.0)
    hardest = np.argsort(-scores)[:10]
    assert set(ranked.select(1.0)[-11:]) == {5, *hardest.tolist()}
    with pytest.raises(UsageError, match=r"cut-hardest is 1\.5"):
        d2filter.rank(embeddings, scores, cut_hardest=1.5)
    with pytest.raises(UsageError, match="cut-hardest is NaN"):
        d2filter.rank(embeddings, scores, cut_hardest="much")
