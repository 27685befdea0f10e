"""The pool of photographs: its known truth, and the measures of rankings and models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs import bench_flickr, flickr_pool, real_data, two_tower
from jobs.bench_planted import Candidate

PICTURES, WIDTH = 60, 16


def photographs() -> Any:
    """Random unit rows in place of the scorer's; captions resemble their picture."""
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(PICTURES, WIDTH))
    owner = np.repeat(np.arange(PICTURES), 5)
    captions = pictures[owner] + 0.7 * rng.normal(size=(owner.size, WIDTH))

    def unit(rows: Any) -> Any:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    pool = np.arange(10, PICTURES)
    return SimpleNamespace(
        names=[f"{number}.jpg" for number in range(PICTURES)],
        owner=owner,
        pool=pool,
        captions_of=lambda which: np.flatnonzero(np.isin(owner, which)),
        picture_rows=unit(pictures),
        caption_rows=unit(captions),
    )


@pytest.fixture(scope="module")
def pairs() -> flickr_pool.Pairs:
    return flickr_pool.Pairs(photographs(), 0.2, 1)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_the_requested_share_of_captions_is_swapped(share: float) -> None:
    owner = np.repeat(np.arange(40), 5)
    caption = np.arange(50, 200)
    found = flickr_pool.swapped_captions(caption, owner, share, 3)
    assert (owner[found] != owner[caption]).sum() == round(share * caption.size)
    assert sorted(found) == caption.tolist()
    again = flickr_pool.swapped_captions(caption, owner, share, 3)
    assert (found == again).all()


def test_the_figures_are_those_of_a_count_by_hand(pairs: flickr_pool.Pairs) -> None:
    order = pairs.order(Candidate(method="score").rank_config, 5)
    assert (np.diff(pairs.score[order]) <= 0).all()
    found = pairs.judge(order, "0.3")
    size, seen, noise = 75, set(), 0
    for row in order[:size].tolist():
        if pairs.swapped[row]:
            noise += 1
        else:
            seen.add(int(pairs.picture[row]))
    right = set(pairs.picture[~pairs.swapped].tolist())
    expected = {
        "useful": len(seen) / size,
        "noise": noise / size,
        "covered": len(seen & right) / len(right),
    }
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("entry", bench_flickr.entries(bench_flickr.MAIN, 0), ids=lambda e: e.name)
def test_every_entry_ranks_the_whole_pool(
    entry: bench_flickr.Entry, pairs: flickr_pool.Pairs
) -> None:
    rows = bench_flickr.rank(pairs, entry)
    assert [row["kept"] for row in rows] == list(bench_flickr.KEPT)
    best = pairs.best_order()
    for row in rows:
        assert row["useful"] <= pairs.judge(best, row["kept"])["useful"]
        assert row["useful"] + row["noise"] <= 1
    assert sorted(pairs.order(entry.config("0.3"), entry.k)) == list(range(pairs.score.size))


def test_finished_figures_are_not_computed_again(tmp_path: Path) -> None:
    finished = bench_flickr.Finished(tmp_path / "out", print)
    finished.add([{"kind": "rank", "name": "score", "share": 0.2, "list": [1]}])
    again = bench_flickr.Finished(tmp_path / "out", print)
    assert again.has(kind="rank", name="score", share=0.2)
    assert not again.has(kind="rank", name="score", share=0.4)
    assert json.loads(again.path.read_text()) == again.rows[0]


def test_tau_c_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(5)
    grade = rng.integers(1, 5, 80)
    score = np.round(grade + rng.normal(size=80), 1)
    balance = sum(
        int(np.sign(score[i] - score[j]) * np.sign(grade[i] - grade[j]))
        for i in range(80)
        for j in range(i)
    )
    assert two_tower.tau_c(score, grade) == pytest.approx(2 * balance / 80**2 * 4 / 3)


def test_retrieval_counts_captions_whose_picture_comes_early() -> None:
    pictures = np.eye(12, dtype=np.float32)
    captions = np.eye(12, dtype=np.float32)[[0, 2, 2]]
    found = two_tower.retrieval(pictures, captions, np.array([0, 1, 2]))
    assert found == pytest.approx({"r1": 2 / 3, "r10": 2 / 3})


def test_a_model_learns_which_captions_belong_together() -> None:
    rng = np.random.default_rng(1)
    kinds = ["a red dog", "the blue car", "some green trees", "one white boat"]
    kind = np.arange(40) % 4
    features = (np.eye(4)[kind] + 0.1 * rng.normal(size=(40, 4))).astype(np.float16)
    captions = [kinds[k] for k in kind]
    model = two_tower.train(features, captions, np.arange(40), steps=40, seed=0)
    score = model.embed_captions(kinds) @ model.embed_pictures(features).T
    assert (score.argmax(axis=0) == kind).all()
    same = two_tower.train(features, captions, np.arange(40), steps=40, seed=0)
    assert (same.embed_pictures(features) == model.embed_pictures(features)).all()


def test_the_judgments_are_of_other_pictures() -> None:
    """The experts' file of Flickr8k, where D2FILTER_DATA names the folder of the data."""
    data = Path(os.environ.get("D2FILTER_DATA", "nowhere"))
    if not (data / "flickr8k").is_dir():
        pytest.skip("no D2FILTER_DATA with flickr8k/")
    whole = real_data.flickr8k(data)
    judged = flickr_pool.read_judgments(data, whole.names)
    split = np.array(whole.split)
    assert [int((split == s).sum()) for s in ("train", "dev", "test")] == [6000, 1000, 1000]
    assert judged.grades.shape == (5664, 3)
    assert set(np.unique(judged.grades)) == {1, 2, 3, 4}
    assert (judged.caption // 5 != judged.picture).all()
    assert set(split[judged.picture]) == {"test"}
