"""The 95% confidence interval of a measured share."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # standard deviations of 95%


def wilson(share: float, draws: float) -> tuple[float, float]:
    """Wilson's interval (Wilson 1927) of a share in [0, 1] that `draws` > 0 draws gave, of which
    there may be parts: draws that tell as much as so many independent ones.
    """
    z2 = _Z * _Z
    center = (share + z2 / (2 * draws)) / (1 + z2 / draws)
    half = _Z / (1 + z2 / draws) * math.sqrt(share * (1 - share) / draws + z2 / (4 * draws * draws))
    # rounding must not leave the share outside
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))
