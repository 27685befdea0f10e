"""Message schemes: kernels, forward rules and reverse rules.

A scheme names one of each. They are entries of the tables at the end of this file; to add one, add
an entry. The greedy is exact for every scheme with float32 weights in [0, 1] and integer scores:
messages are then never negative, and depend only on the two samples and their distance.

See docs/method.md#message-schemes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from d2filter.algorithm.greedy import messages
from d2filter.errors import UsageError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

Kernel = Callable[[F64], F64]
Forward = Callable[[F64, I64], I64]
Weigh = Callable[[F32], F32]
Reverse = Callable[[F32, Weigh], F32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How messages are made. The defaults are the published DataComp recipe."""

    kernel: str = "rbf"
    forward: str = "sum"
    reverse: str = "weighted"
    gamma_forward: float = 1.0
    gamma_reverse: float = 1.0
    floor: float = 0.0
    """of the kernel local: the smallest σ² of a sample (`local_kernel.py`)"""

    def forward_weights(self, sqdist: F32) -> F32:
        """Weights of the forward pass, same shape as `sqdist`; 0 where it is inf.

        For the kernel local, here and in the reverse pass, `sqdist` is what `local_kernel.relative`
        gives.
        """
        return messages.edge_weights(sqdist, self.gamma_forward, KERNELS[self.kernel])

    def reverse_weights(self, sqdist: F32) -> F32:
        """Weights of the reverse pass: a message is rint(w·x_i). 0 where `sqdist` is inf."""

        def weigh(distances: F32) -> F32:
            return messages.edge_weights(distances, self.gamma_reverse, KERNELS[self.kernel])

        return REVERSE[self.reverse](sqdist, weigh)

    def per(self, unit: float) -> Scheme:
        """The same with gammas that were given for distances in units of √`unit`.

        Raises UsageError where a gamma is too large for a float64 then.
        """
        exponent = float(KERNELS[self.kernel](np.array(unit, np.float64)))
        forward, reverse = self.gamma_forward / exponent, self.gamma_reverse / exponent
        for asked, made in ((self.gamma_forward, forward), (self.gamma_reverse, reverse)):
            if not math.isfinite(made):
                raise UsageError(
                    f"gamma {asked} is too large for distances in units of their median, "
                    f"{unit:g} squared: give a smaller one, or --gamma-scale none"
                )
        return replace(self, gamma_forward=forward, gamma_reverse=reverse)

    @property
    def is_local(self) -> bool:
        """Whether distances are to be made relative to those around both ends first."""
        return self.kernel == "local"

    @property
    def one_weight(self) -> bool:
        """Whether both passes weigh an edge alike."""
        return self.reverse == "weighted" and self.gamma_forward == self.gamma_reverse

    def forward_scores(self, scores: F64, gathered: I64) -> I64:
        """x_i from s'_i (n,) in [0, 1] and Σ_j rint(w_ij·s'_j·2⁴⁰) (n,), in units of 2⁻⁴⁰."""
        return FORWARD[self.forward](scores, gathered)


def _rbf(sqdist: F64) -> F64:
    """exp(−gamma·d²)."""
    return sqdist


def _exp(sqdist: F64) -> F64:
    """exp(−gamma·d)."""
    return np.sqrt(sqdist)


def _local(relative: F64) -> F64:
    """exp(−gamma·(d²/(σ_i·σ_j))²), of what `local_kernel.relative` has made of d²."""
    return relative


def _own(scores: F64) -> I64:
    fixed: I64 = np.rint(scores * np.float64(messages.ONE)).astype(np.int64)
    return fixed


def _sum(scores: F64, gathered: I64) -> I64:
    """x_i = s'_i + Σ_j w_ij·s'_j."""
    return _own(scores) + gathered


def _product(scores: F64, gathered: I64) -> I64:
    """x_i = s'_i·Σ_j w_ij·s'_j, rounded once more where the sum needs more than 53 bits."""
    fixed: I64 = np.rint(scores * gathered.astype(np.float64)).astype(np.int64)
    return fixed


def _no_forward(scores: F64, gathered: I64) -> I64:
    """x_i = s'_i."""
    return _own(scores)


def _weighted(sqdist: F32, weigh: Weigh) -> F32:
    """x_j ← x_j − w_ij·x_i."""
    return weigh(sqdist)


def _absolute(sqdist: F32, weigh: Weigh) -> F32:
    """x_j ← x_j − x_i."""
    return np.isfinite(sqdist).astype(np.float32)


def _no_reverse(sqdist: F32, weigh: Weigh) -> F32:
    """Nothing is subtracted: the order is that of the forward scores."""
    return np.zeros_like(sqdist)


KERNELS: dict[str, Kernel] = {"rbf": _rbf, "exp": _exp, "local": _local}
FORWARD: dict[str, Forward] = {"sum": _sum, "product": _product, "none": _no_forward}
REVERSE: dict[str, Reverse] = {
    "weighted": _weighted,
    "absolute": _absolute,
    "none": _no_reverse,
}
