"""hypothesis strategies for graphs, scores and uids with many ties."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st


@dataclass
class Case:
    """A graph with scores; rows ascend by uid."""

    uid: list[int]
    x: np.ndarray
    neighbors: np.ndarray
    sqdist: np.ndarray
    weights: np.ndarray

    @property
    def hi(self) -> np.ndarray:
        return np.array([u >> 64 for u in self.uid], np.uint64)

    @property
    def lo(self) -> np.ndarray:
        return np.array([u & (2**64 - 1) for u in self.uid], np.uint64)


@st.composite
def graphs(draw: st.DrawFn, largest: int = 40) -> Case:
    """Random lists with paddings and hubs, few distinct distances, scores with ties."""
    n = draw(st.integers(1, largest))
    k = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    halves = rng.integers(0, 2**63, n) if draw(st.booleans()) else rng.integers(0, 2, n)
    lows = rng.choice(10 * n, n, replace=False)
    uid = sorted(int(h) * 2**64 + int(low) for h, low in zip(halves, lows, strict=True))
    hub = draw(st.booleans())
    neighbors = np.full((n, k), -1, np.int64)
    for i in range(n):
        others = np.delete(np.arange(n), i)
        size = int(rng.integers(0, min(k, n - 1) + 1))
        chosen = rng.choice(others, size, replace=False)
        if hub and size and i != 0 and 0 not in chosen:
            chosen[0] = 0
        neighbors[i, :size] = chosen
    levels = draw(st.sampled_from([1, 3, 1000]))
    sqdist = np.sort(rng.integers(0, levels, (n, k)) / levels * 2, axis=1).astype(np.float32)
    sqdist[neighbors < 0] = np.inf
    weights = np.exp(-sqdist.astype(np.float64)).astype(np.float32)
    scale = draw(st.sampled_from(["unit", "ties", "zero", "constant", "wide", "floor"]))
    one = 2**40
    x = {
        "unit": lambda: rng.integers(0, 3 * one, n),
        "ties": lambda: rng.integers(0, 3, n) * one,
        "zero": lambda: np.zeros(n, np.int64),
        "constant": lambda: np.full(n, one),
        "wide": lambda: rng.integers(-(2**62), 2**62, n),
        # hubs just above the saturation, senders far above: the floor is hit
        "floor": lambda: np.where(rng.random(n) < 0.5, -(2**62) + rng.integers(0, 9, n), 2**61),
    }[scale]()
    return Case(uid, np.asarray(x, np.int64), neighbors, sqdist, weights)
