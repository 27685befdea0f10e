"""A small CLIP-like scorer of pairs, from the features of a frozen image encoder and from words.

The benchmarks on real photographs use it in place of CLIP, and train it on subsets. Models are
measured by retrieval and by their agreement with experts.
"""

from __future__ import annotations

import collections
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

SAYS = (
    "two small towers over EfficientNet-Lite0's features (96 px) and over words and pairs of words"
)
WIDTH, HIDDEN, BATCH, STEPS = 256, 512, 512, 500
RATE, DECAY, DROPOUT, WORDS_DROPPED = 2e-3, 0.05, 0.5, 0.1
LEAST = 3  # times that a word is said, or it is any other word


class Towers(nn.Module):
    """Both towers; rows of unit length."""

    def __init__(self, pixels: int, words: int) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            nn.Dropout(DROPOUT), nn.Linear(pixels, HIDDEN), nn.GELU(),
            nn.Dropout(DROPOUT), nn.Linear(HIDDEN, WIDTH),
        )  # fmt: skip
        self.words = nn.EmbeddingBag(words, WIDTH, mode="sum")
        nn.init.normal_(self.words.weight, std=0.1)
        self.text = nn.Sequential(
            nn.Dropout(DROPOUT / 2), nn.Linear(WIDTH, HIDDEN), nn.GELU(),
            nn.Dropout(DROPOUT / 2), nn.Linear(HIDDEN, WIDTH),
        )  # fmt: skip
        self.heat = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))

    def pictures(self, values: torch.Tensor) -> torch.Tensor:
        """(b, WIDTH) of standardized features (b, pixels)."""
        return functional.normalize(self.picture(values), dim=1)

    def captions(self, said: list[I64]) -> torch.Tensor:
        """(b, WIDTH) of the words of b captions."""
        sizes = np.array([words.size for words in said])
        starts = torch.from_numpy(np.cumsum(sizes) - sizes)
        sums = self.words(torch.from_numpy(np.concatenate(said)), starts)
        scaled = sums / torch.from_numpy(np.sqrt(sizes)).float()[:, None]
        return functional.normalize(self.text(scaled), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoTower:
    """A trained one."""

    towers: Towers
    vocabulary: dict[str, int]
    """rows of the table of word vectors; 0 is any other word"""
    mean: F32
    """(d,) of the features that it was trained on"""
    spread: F32
    """(d,)"""

    def embed_pictures(self, features: F16) -> F32:
        """(m, WIDTH) of unit length."""
        with torch.inference_mode():
            values = _standardized(features, self.mean, self.spread)
            made: F32 = self.towers.pictures(values).numpy()
        return made

    def embed_captions(self, captions: list[str]) -> F32:
        """(m, WIDTH) of unit length."""
        with torch.inference_mode():
            made: F32 = self.towers.captions(_rows(captions, self.vocabulary)).numpy()
        return made


def train(
    features: F16, captions: list[str], owner: I64, *, steps: int, seed: int, batch: int = BATCH
) -> TwoTower:
    """A model of the pairs (features[owner[i]], captions[i]).

    features: (m, d) of the pictures; captions: (n,); owner: (n,) rows of `features`, each there at
    least once. The loss is CLIP's, over batches of `batch` different pictures with a caption each.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    counts = collections.Counter(word for caption in captions for word in words_of(caption))
    common = sorted(word for word, count in counts.items() if count >= LEAST)
    vocabulary = {word: row for row, word in enumerate(common, 1)}
    said = _rows(captions, vocabulary)
    wide = features.astype(np.float32)
    mean, spread = wide.mean(axis=0), wide.std(axis=0) + np.float32(1e-3)
    values = _standardized(features, mean, spread)
    towers = Towers(features.shape[1], len(vocabulary) + 1).train()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    order = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=len(features))
    begins = np.cumsum(sizes) - sizes
    target = torch.arange(min(batch, len(features)))
    for _ in range(steps):
        some = rng.choice(len(features), len(target), replace=False)
        pair = order[begins[some] + (rng.random(some.size) * sizes[some]).astype(np.int64)]
        pictures = towers.pictures(values[some])
        texts = towers.captions([_thinned(said[p], rng) for p in pair.tolist()])
        logits = towers.heat.exp().clamp(max=100) * pictures @ texts.T
        loss = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        optimizer.step()
        schedule.step()
    return TwoTower(towers=towers.eval(), vocabulary=vocabulary, mean=mean, spread=spread)


def words_of(caption: str) -> list[str]:
    """Words, and each two that follow each other."""
    words = "".join(c if c.isalnum() else " " for c in caption.lower()).split()
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def _rows(captions: list[str], vocabulary: dict[str, int]) -> list[I64]:
    """Rows of the table, at least one a caption."""
    known = ([vocabulary[w] for w in words_of(c) if w in vocabulary] or [0] for c in captions)
    return [np.array(rows, np.int64) for rows in known]


def _thinned(words: I64, rng: np.random.Generator) -> I64:
    left = words[rng.random(words.size) >= WORDS_DROPPED]
    return left if left.size else words


def _standardized(features: F16, mean: F32, spread: F32) -> torch.Tensor:
    """Each column to unit variance, then each row to one length."""
    values = torch.from_numpy(((features.astype(np.float32) - mean) / spread).clip(-4, 4))
    scaled: torch.Tensor = functional.normalize(values, dim=1) * values.shape[1] ** 0.5
    return scaled


# --- measures -------------------------------------------------------------------------------


def retrieval(pictures: F32, captions: F32, owner: I64) -> dict[str, float]:
    """Text → image: captions whose picture comes first, and among the first ten.

    pictures: (m, d), captions: (n, d), of unit length; owner: (n,) the picture of each caption.
    Of pictures that score the same, the right one comes last.
    """
    score = captions @ pictures.T
    right = score[np.arange(len(captions)), owner]
    ahead = (score >= right[:, None]).sum(axis=1) - 1
    return {"r1": float((ahead < 1).mean()), "r10": float((ahead < 10).mean())}


def tau_c(score: npt.NDArray[np.floating], grade: I64) -> float:
    """Kendall's τ_c (Stuart 1953): 2·(C − D) / n² · g/(g − 1), n pairs with grades of g values.

    score, grade: (n,). C: twos of different grade that the score orders in the same way; D: in the
    other way. CLIPScore (Hessel et al. 2021) reports it for these judgments.
    """
    levels = [np.sort(score[grade == g]) for g in np.unique(grade)]
    balance = 0
    for high in range(1, len(levels)):
        for low in levels[:high]:
            below = np.searchsorted(low, levels[high], side="left")
            above = low.size - np.searchsorted(low, levels[high], side="right")
            balance += int(below.sum() - above.sum())
    return 2 * balance / score.size**2 * len(levels) / (len(levels) - 1)
