"""Shapes, colors and words of drawn scenes: what `scenes.py` can draw, and its captions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

RGB = tuple[int, int, int]

COLORS: Mapping[str, RGB] = MappingProxyType(
    {
        "red": (214, 36, 40),
        "orange": (246, 130, 30),
        "yellow": (250, 222, 40),
        "green": (38, 158, 58),
        "blue": (34, 88, 218),
        "purple": (132, 56, 178),
        "pink": (250, 146, 190),
        "brown": (122, 72, 34),
        "black": (20, 20, 22),
        "white": (250, 250, 250),
        "gray": (124, 124, 128),
        "cyan": (46, 206, 222),
    }
)
"""Colors of objects, in 8-bit sRGB."""

BACKGROUNDS: Mapping[str, RGB] = MappingProxyType(
    {
        "white": (236, 236, 234),
        "black": (34, 34, 36),
        "gray": (146, 146, 150),
        "beige": (226, 206, 164),
        "navy": (24, 38, 96),
        "teal": (20, 122, 124),
        "maroon": (112, 22, 48),
        "olive": (112, 118, 42),
        "lavender": (192, 176, 234),
        "mint": (168, 230, 194),
    }
)
"""Colors of backgrounds, in 8-bit sRGB."""

SHAPE_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "circle": ("circle", "disc", "dot"),
        "square": ("square", "box"),
        "triangle": ("triangle",),
        "star": ("star",),
        "diamond": ("diamond", "rhombus"),
        "hexagon": ("hexagon",),
        "cross": ("cross", "plus sign"),
        "heart": ("heart",),
        "ring": ("ring", "hoop"),
        "crescent": ("crescent", "half moon"),
        "arrow": ("arrow",),
        "bar": ("bar", "flat rectangle"),
    }
)
"""Shape -> the words for it in a caption."""

SIZE_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "small": ("small", "little", "tiny"),
        "medium": ("medium", "average"),
        "large": ("large", "big", "huge"),
    }
)
"""Size -> the words for it in a caption."""

PLACE_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "top left": ("in the top left", "at the upper left"),
        "top": ("at the top", "near the top"),
        "top right": ("in the top right", "at the upper right"),
        "left": ("on the left", "at the left"),
        "center": ("in the center", "in the middle"),
        "right": ("on the right", "at the right"),
        "bottom left": ("in the bottom left", "at the lower left"),
        "bottom": ("at the bottom", "near the bottom"),
        "bottom right": ("in the bottom right", "at the lower right"),
    }
)
"""Place -> the words for it in a caption; the order is row by row."""

TEXTURE_WORDS: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "plain": (("plain", "no pattern"), ("solid", "no pattern")),
        "horizontal stripes": (("horizontally striped", "horizontal stripes"),),
        "vertical stripes": (("vertically striped", "vertical stripes"),),
        "diagonal stripes": (
            ("diagonally striped", "diagonal stripes"),
            ("slanted", "slanted lines"),
        ),
        "checks": (("checkered", "checks"), ("chessboard", "squares")),
        "dots": (("dotted", "dots"), ("spotted", "spots")),
        "grid": (("gridded", "a grid"), ("netted", "a net")),
        "gradient": (("shaded", "a gradient"), ("fading", "a fade")),
        "grain": (("grainy", "grain"), ("noisy", "noise")),
    }
)
"""Texture -> (adjective, noun phrase) pairs for a caption."""
