"""The 95% confidence interval of a measured share."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # standard deviations of 95%


def wilson(share: float, draws: float) -> tuple[float, float]:
    """Wilson's interval (Wilson 1927) for a share in [0, 1], measured on `draws` > 0 draws.

    `draws` may be a fraction: the number of independent draws that would have the same variance.
    """
    z2 = _Z * _Z
    center = (share + z2 / (2 * draws)) / (1 + z2 / draws)
    half = _Z / (1 + z2 / draws) * math.sqrt(share * (1 - share) / draws + z2 / (4 * draws * draws))
    # rounding must not leave the share outside
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))
