"""d2filter: D2 Pruning for image-text pools, exact and distributed.

The names a notebook needs are loaded on first use, so that `import d2filter` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = ["RankedPool", "__version__", "explain", "keep", "load_subset", "rank"]

if TYPE_CHECKING:
    from d2filter.api import RankedPool, explain, rank
    from d2filter.tools.keep import keep, load_subset


def __getattr__(name: str) -> Any:
    if name in ("rank", "RankedPool", "explain"):
        from d2filter import api

        return getattr(api, name)
    if name in ("keep", "load_subset"):
        from d2filter.tools import keep as keeping

        return getattr(keeping, name)
    raise AttributeError(f"module 'd2filter' has no attribute {name!r}")
