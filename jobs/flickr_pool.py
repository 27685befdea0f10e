"""Flickr8k as a pool: real photographs with real captions, a known share of them swapped.

A scorer is trained on half of the train pictures. The other half, with five captions each, is the
pool: the scorer embeds and scores it, as CLIP does for a crawl. Models are tested on the official
test split.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import by_class, features, uids
from d2filter.algorithm.greedy import auto_settings, demoted
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.measures import ground_truth
from d2filter.algorithm.scores import mismatched
from d2filter.config import RankConfig
from d2filter.formats import graph
from d2filter.stages.rank import in_memory as rank_in_memory
from jobs import real_data, two_tower

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Row = dict[str, Any]

SPLIT_SEED, SCORER_SEED = 0, 0
NEIGHBORS = 20  # of the graph; shorter lists are prefixes


class Photographs:
    """Flickr8k with the encoder's features, and the scorer's embeddings of all of it."""

    def __init__(self, data: Path, cache: Path) -> None:
        whole = real_data.flickr8k(data)
        pictures = real_data.flickr8k_pictures(data, whole.names)
        self.features = real_data.encode(pictures, cache, "flickr8k")
        self.names = whole.names
        self.captions = [caption for five in whole.captions for caption in five]
        self.owner = np.repeat(np.arange(len(whole.names)), [len(c) for c in whole.captions])
        """(captions,) the picture that each is of"""
        split = np.array(whole.split)
        shuffled = np.random.default_rng(SPLIT_SEED).permutation(np.flatnonzero(split == "train"))
        self.taught = np.sort(shuffled[: shuffled.size // 2])
        """pictures that the scorer learns from"""
        self.pool = np.sort(shuffled[shuffled.size // 2 :])
        """pictures of the pool"""
        self.test = np.flatnonzero(split == "test")
        self.judged = read_judgments(data, whole.names)
        self.facts: Row = {}
        self.picture_rows, self.caption_rows = self._embedded(cache)

    def captions_of(self, pictures: I64) -> I64:
        """Numbers of the captions of these pictures."""
        return np.flatnonzero(np.isin(self.owner, pictures))

    def train(
        self, picture: I64, caption: I64, *, seed: int, steps: int, batch: int
    ) -> two_tower.TwoTower:
        """A model of the pairs (picture[i], caption[i]), given by their numbers."""
        shown, owner = np.unique(picture, return_inverse=True)
        said = [self.captions[c] for c in caption]
        return two_tower.train(
            self.features[shown], said, owner, steps=steps, seed=seed, batch=batch
        )

    def tested(self, model: two_tower.TwoTower) -> Row:
        """Retrieval on the official test split, and agreement with the experts."""
        asked = self.captions_of(self.test)
        pictures = model.embed_pictures(self.features[self.test])
        captions = model.embed_captions([self.captions[c] for c in asked])
        mine = np.searchsorted(self.test, self.owner[asked])
        return {
            **two_tower.retrieval(pictures, captions, mine),
            "tau": self._tau(pictures, captions, asked),
        }

    def _tau(self, pictures: F32, captions: F32, asked: I64) -> float:
        picture = np.searchsorted(self.test, self.judged.picture)
        caption = np.searchsorted(asked, self.judged.caption)
        score = np.einsum("ij,ij->i", pictures[picture], captions[caption])
        each = self.judged.grades.shape[1]
        return two_tower.tau_c(np.repeat(score, each), self.judged.grades.ravel())

    def _embedded(self, cache: Path) -> tuple[F32, F32]:
        """The scorer's rows of all pictures and of all captions; a file in the cache has them."""
        told = Path(two_tower.__file__).read_bytes()
        made_of = (two_tower.STEPS, SPLIT_SEED, SCORER_SEED, real_data.INPUT, told)
        path = cache / f"flickr8k-scorer-{real_data.hashed(*made_of)}.npz"
        if not path.exists():
            started, used = time.perf_counter(), time.process_time()
            caption = self.captions_of(self.taught)
            scorer = self.train(
                self.owner[caption], caption, seed=SCORER_SEED, steps=two_tower.STEPS,
                batch=two_tower.BATCH,
            )  # fmt: skip
            seconds = (time.perf_counter() - started, time.process_time() - used)
            pictures = scorer.embed_pictures(self.features)
            captions = scorer.embed_captions(self.captions)
            tested = np.array(list(self.tested(scorer).items()))
            np.savez(path, pictures=pictures, captions=captions, tested=tested, seconds=seconds)
        found = np.load(path, allow_pickle=False)
        self.facts = {
            **{name: float(value) for name, value in found["tested"]},
            "seconds": found["seconds"].tolist(),
        }
        return found["pictures"], found["captions"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judgments:
    """What experts think of captions of other pictures (Hodosh et al. 2013)."""

    picture: I64
    """(j,)"""
    caption: I64
    """(j,) number over all pictures, in the order of their names"""
    grades: I64
    """(j, 3) 1: unrelated, to 4: it describes the picture"""


def read_judgments(data: Path, names: list[str]) -> Judgments:
    """Read ExpertAnnotations.txt, without those of a picture's own captions."""
    number = {name: row for row, name in enumerate(names)}
    found = []
    for line in (data / "flickr8k" / "ExpertAnnotations.txt").read_text("utf-8").splitlines():
        name, caption, *grades = line.split("\t")
        of, _, which = caption.partition("#")
        if of != name:
            found.append((number[name], 5 * number[of] + int(which), *map(int, grades)))
    table = np.array(found, np.int64)
    return Judgments(picture=table[:, 0], caption=table[:, 1], grades=table[:, 2:])


def swapped_captions(caption: I64, owner: I64, share: float, seed: int) -> I64:
    """The same captions, round(share · n) of them at other pictures' places.

    caption: (n,) numbers. owner: the picture of each number. Captions change places among the
    chosen, until none of them is at a picture of its own.
    """
    rng = np.random.default_rng([seed, round(1000 * share)])
    out: I64 = caption.copy()
    chosen = rng.choice(caption.size, round(share * caption.size), replace=False)
    while chosen.size and (owner[out[chosen]] == owner[caption[chosen]]).any():
        chosen = rng.permutation(chosen)
        out[chosen] = caption[np.roll(chosen, 1)]
    return out


class Pairs:
    """The pool with a share of its captions swapped; rows ascend by uid."""

    def __init__(self, photographs: Photographs, share: float, seed: int) -> None:
        slot = photographs.captions_of(photographs.pool)
        picture = photographs.owner[slot]
        caption = swapped_captions(slot, photographs.owner, share, seed)
        # as if the pool were crawled: ids come from what a pair is
        digests = [
            hashlib.blake2b(f"{photographs.names[p]} {c}".encode(), digest_size=16).digest()
            for p, c in zip(picture, caption, strict=True)
        ]
        halves = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)
        order = uids.ascending(halves[:, 0], halves[:, 1])
        hi, lo = halves[order, 0], halves[order, 1]
        self.picture, self.caption = picture[order], caption[order]
        self.swapped: Bools = photographs.owner[self.caption] != self.picture
        pictures = photographs.picture_rows[self.picture]
        captions = photographs.caption_rows[self.caption]
        self.score: F32 = np.einsum("ij,ij->i", pictures, captions)
        rows = features.fix([pictures, captions])
        found, classes = by_class.graph(rows, hi, lo, np.zeros(hi.size, np.int64), NEIGHBORS)
        self.recall = knn.pooled([(one.size, one.recall) for one in classes]).value
        part = graph.GraphPart(
            hi=hi, lo=lo, difficulty=self.score, neighbors=found.neighbors, sqdist=found.sqdist
        )
        wrong = mismatched.wrong_share(
            {"pairs": mismatched.judged(rows[mismatched.sampled(hi, lo)])}
        )
        self.whole = rank_in_memory.LoadedPool(part, rows, auto_settings.PoolFacts(wrong=wrong))
        # a right pair is useful when it is the first right one of its picture: a swapped one is of
        # a group of its own, so that it takes nobody's place
        own = len(photographs.names) + np.arange(hi.size)
        self.group: I64 = np.where(self.swapped, own, self.picture)
        self.can_be_covered = np.unique(self.picture[~self.swapped]).size

    def facts(self) -> Row:
        """What every method has to work with."""
        right, wrong = self.score[~self.swapped], self.score[self.swapped]
        part = self.whole.part
        one = part.sqdist[:, :10]
        same = self.picture[part.neighbors[:, :10]] == self.picture[:, None]
        facts: Row = {
            "pairs": self.score.size,
            "pictures": int(np.unique(self.picture).size),
            "can be covered": self.can_be_covered,
            "recall": self.recall,
            "right": [float(right.mean()), float(right.std())],
            "unit": demoted.unit(one),
            "same picture": float(same.mean()),
        }
        if wrong.size:
            facts["wrong"] = [float(wrong.mean()), float(wrong.std())]
        return facts

    def order(self, config: RankConfig, k: int) -> I64:
        """Rows best first; k: neighbors of each list that count."""
        rank, _, _ = rank_in_memory.ranks_of(self.whole.narrowed(k), config)
        return np.argsort(rank, kind="stable").astype(np.int64, copy=False)

    def best_order(self) -> I64:
        """A ranking that no other beats."""
        return ground_truth.best_order(self.group, self.swapped)

    def judge(self, order: I64, kept: str) -> Row:
        """Figures of the first share `kept` of an order."""
        size = self.size(kept)
        found = ground_truth.usefulness(order, self.group, self.swapped, size)
        return {
            "useful": found.useful,
            "noise": found.swapped,
            "covered": found.useful * size / self.can_be_covered,
        }

    def size(self, kept: str) -> int:
        """Pairs that a share of the pool is."""
        return round(float(kept) * self.score.size)
