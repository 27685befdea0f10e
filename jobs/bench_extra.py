"""Modules of the extra `bench`, imported where a benchmark uses them."""

from __future__ import annotations

import importlib
from typing import Any

from d2filter.errors import DependencyError


def needed(module: str, package: str) -> Any:
    """A module of the extra. Raises DependencyError that names its package if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"{package} is not installed and this benchmark needs it: pip install 'd2filter[bench]'"
        ) from error


def pyplot() -> Any:
    """matplotlib.pyplot, set up to draw into files without a display."""
    needed("matplotlib", "matplotlib").use("Agg")
    return needed("matplotlib.pyplot", "matplotlib")
