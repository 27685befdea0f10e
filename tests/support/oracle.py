"""Naive transcriptions of docs/method.md: slow, sequential, independent of the fast code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def forward(
    scores: Sequence[float], neighbors: Sequence[Sequence[int]], sqdist: np.ndarray, gamma: float
) -> list[int]:
    """x_i in units of 2⁻⁴⁰, Python integers."""
    one = 2.0**40
    low, high = min(scores), max(scores)
    normal = [1.0 if high == low else (float(s) - low) / (high - low) for s in scores]
    out = []
    for i, row in enumerate(neighbors):
        x = round(normal[i] * one)
        for c, j in enumerate(row):
            if j >= 0:
                x += round(weight(sqdist[i][c], gamma) * normal[j] * one)
        out.append(x)
    return out


def weight(sqdist: float, gamma: float) -> float:
    return float(np.float32(math.exp(-gamma * float(sqdist))))


def greedy(
    x: Sequence[int],
    uid: Sequence[int],
    neighbors: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    saturation: int = -(2**62),
) -> tuple[list[int], list[int], list[int]]:
    """(selection order, score when selected, suppressed_by), one argmax at a time."""
    x = [int(v) for v in x]
    live = set(range(len(x)))
    order: list[int] = []
    final = list(x)
    strongest = [(0, 0, -1)] * len(x)
    while live:
        i = min(live, key=lambda r: (-x[r], uid[r]))
        live.remove(i)
        order.append(i)
        final[i] = x[i]
        for c, j in enumerate(neighbors[i]):
            if j < 0 or j not in live:
                continue
            message = round(float(weights[i][c]) * float(x[i])) if x[i] > 0 else 0
            x[j] = max(x[j] - message, saturation)
            best, best_uid, sender = strongest[j]
            if message > best or (message == best > 0 and sender >= 0 and uid[i] < best_uid):
                strongest[j] = (message, uid[i], i)
    return order, final, [s[2] for s in strongest]


def knn(rows: np.ndarray, uid: Sequence[int], k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Exact lists by (float32 of the float64 squared distance, (uid_j − uid_i) mod 2¹²⁸)."""
    wide = rows.astype(np.float64)
    neighbors, distances = [], []
    for i in range(len(wide)):
        d = np.square(wide - wide[i]).sum(axis=1).astype(np.float32)
        others = sorted(
            (j for j in range(len(wide)) if j != i),
            key=lambda j: (d[j], (uid[j] - uid[i]) % 2**128),
        )[:k]
        pad = k - len(others)
        neighbors.append(others + [-1] * pad)
        distances.append([float(d[j]) for j in others] + [math.inf] * pad)
    return neighbors, distances


def greedy_argmax(
    x: np.ndarray, neighbors: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(order, final) of the same rule for thousands of rows; rows must ascend by uid."""
    x = x.copy()
    dead = np.iinfo(np.int64).min
    final = np.empty_like(x)
    order = np.empty(len(x), np.int64)
    live = np.ones(len(x), bool)
    for step in range(len(x)):
        i = int(np.argmax(x))  # the first of equals: the smallest uid
        order[step] = i
        final[i] = value = int(x[i])
        x[i] = dead
        live[i] = False
        for j, w in zip(neighbors[i].tolist(), weights[i].tolist(), strict=True):
            if j >= 0 and live[j] and value > 0:
                x[j] = max(int(x[j]) - round(w * float(value)), -(2**62))
    return order, final
