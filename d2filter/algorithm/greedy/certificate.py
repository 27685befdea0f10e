"""Proves, edge by edge, that a ranking is the one of the sequential greedy.

For each sample u, go through the samples that sent it a message, in the order of their ranks. The
ranking is the greedy's if and only if each sender had a better key than u before its message
arrived, and u's final score is what remains after the last message. Between two messages u's key
does not change while the keys of selected samples only fall, so no other moment has to be checked.
Cost: one sort of the edges that carried a message.

See docs/method.md#certificate.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import compiled
from d2filter.algorithm.greedy.messages import FLOOR

I64 = npt.NDArray[np.int64]


def breaches(
    forward: I64,
    final: I64,
    rank: I64,
    precedence: I64,
    edges: tuple[I64, I64, npt.NDArray[np.float32]],
    suppressed_by: I64,
) -> tuple[int, int, int]:
    """How many samples break the greedy: (final score wrong, taken too late, suppressor wrong).

    forward, final, rank, suppressed_by: (n,) int64. precedence: (n,) int64, position by ascending
    uid. edges: source, target (e,) int64 and weight (e,) float32 of the reverse pass; an edge that
    counts in both directions is there twice.
    """
    source, target, weight = edges
    sent = rank[source] < rank[target]
    source, target = source[sent], target[sent]
    value = np.maximum(final[source], 0)
    message = np.rint(weight[sent].astype(np.float64) * value.astype(np.float64))
    order = np.lexsort((rank[source], target))
    wrong, late, other = _walk(
        forward,
        final,
        precedence,
        source[order],
        target[order],
        message.astype(np.int64)[order],
        suppressed_by,
    )
    return int(wrong), int(late), int(other)


@compiled.njit()
def _walk(forward, final, precedence, source, target, message, suppressed_by):  # type: ignore[no-untyped-def]
    """Replay the messages of each target in the order of their senders' ranks."""
    x = forward.copy()
    late = np.zeros(forward.size, np.bool_)
    strongest = np.zeros(forward.size, np.int64)
    sender = np.full(forward.size, -1, np.int64)
    for e in range(target.size):
        u, v = target[e], source[e]
        if final[v] < x[u] or (final[v] == x[u] and precedence[v] > precedence[u]):
            late[u] = True
        x[u] = max(x[u] - message[e], np.int64(FLOOR))
        tied = message[e] == strongest[u] and sender[u] >= 0
        if message[e] > strongest[u] or (tied and precedence[v] < precedence[sender[u]]):
            strongest[u] = message[e]
            sender[u] = v
    return (x != final).sum(), late.sum(), (sender != suppressed_by).sum()
