"""Draws captioned scenes without a network: for tests, the demo and the tiny model.

A scene is one or two colored shapes on a textured background. `Scene` contains the whole truth;
`draw` and `caption` are functions of it, so pairs can be matched, swapped, copied or captioned
again with known truth. Nothing here is a photograph, and results on these pictures say nothing
about photographs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageEnhance

from d2filter.tools.scene_words import (
    BACKGROUNDS,
    COLORS,
    PLACE_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    TEXTURE_WORDS,
)

Points = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.float32]

_RADIUS = {"small": 0.080, "medium": 0.130, "large": 0.195}
_CENTER = {
    name: (0.22 + 0.28 * (i % 3), 0.22 + 0.28 * (i // 3)) for i, name in enumerate(PLACE_WORDS)
}
_VISIBLE = 110.0
_ROOM = 0.005
_OVERSAMPLE = 4
_TWO_OBJECTS = 0.6
_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One object of a scene, by the names that its caption uses."""

    color: str
    """A key of `COLORS`."""
    shape: str
    """A key of `SHAPE_WORDS`."""
    size: str
    """A key of `SIZE_WORDS`."""
    place: str
    """A key of `PLACE_WORDS`."""

    def __post_init__(self) -> None:
        _known("color", self.color, COLORS)
        _known("shape", self.shape, SHAPE_WORDS)
        _known("size", self.size, SIZE_WORDS)
        _known("place", self.place, PLACE_WORDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that determines an image, and everything that its caption may mention.

    Raises ValueError for an unknown name, an object that its background would hide, or two objects
    that would cover each other, because the caption would describe what nobody can see.
    """

    things: tuple[Thing, ...]
    """One or two objects; their order changes nothing in the picture."""
    background: str
    """A key of `BACKGROUNDS`."""
    texture: str
    """A key of `TEXTURE_WORDS`."""
    detail_seed: int
    """What no caption mentions: exact position, rotation, shades, lighting and noise."""

    def __post_init__(self) -> None:
        _known("background", self.background, BACKGROUNDS)
        _known("texture", self.texture, TEXTURE_WORDS)
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene has 1 or 2 things, not {len(self.things)}")
        if self.detail_seed < 0:
            raise ValueError(f"detail_seed must be >= 0, not {self.detail_seed}")
        for thing in self.things:
            if not visible(thing.color, self.background):
                raise ValueError(
                    f"a {thing.color} {thing.shape} cannot be seen on {self.background};"
                    " choose colors for which scenes.visible() holds"
                )
        if len(self.things) == 2 and not apart(*self.things):
            raise ValueError(
                f"{self.things[0]} and {self.things[1]} overlap;"
                " choose places and sizes for which scenes.apart() holds"
            )


def _known(what: str, name: str, names: Mapping[str, object]) -> None:
    if name not in names:
        raise ValueError(f"{what} must be one of {', '.join(names)}; not {name!r}")


@cache
def visible(color: str, background: str) -> bool:
    """Whether an object of `color` stands out from `background` (Euclidean sRGB distance)."""
    return math.dist(COLORS[color], BACKGROUNDS[background]) >= _VISIBLE


def apart(a: Thing, b: Thing) -> bool:
    """Whether the circles around two objects stay clear of each other."""
    gap = math.dist(_CENTER[a.place], _CENTER[b.place]) - _RADIUS[a.size] - _RADIUS[b.size]
    return gap >= _ROOM


def held_out(scene: Scene) -> bool:
    """Whether this combination of attributes is kept away from training: one in 16, by hash.

    The detail seed and the order of the objects do not count, so no drawing of a held-out
    combination can slip into a training pool, whatever the seeds.
    """
    things = sorted(f"{t.color},{t.shape},{t.size},{t.place}" for t in scene.things)
    text = "|".join([*things, scene.background, scene.texture])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0


def random_scene(rng: np.random.Generator) -> Scene:
    """One valid scene; 60% have two objects."""
    background = _pick(tuple(BACKGROUNDS), rng)
    colors = tuple(name for name in COLORS if visible(name, background))
    count = 2 if rng.random() < _TWO_OBJECTS else 1
    while True:
        things = tuple(
            Thing(
                color=_pick(colors, rng),
                shape=_pick(tuple(SHAPE_WORDS), rng),
                size=_pick(tuple(SIZE_WORDS), rng),
                place=_pick(tuple(PLACE_WORDS), rng),
            )
            for _ in range(count)
        )
        if count == 1 or apart(*things):
            break
    return Scene(
        things=things,
        background=background,
        texture=_pick(tuple(TEXTURE_WORDS), rng),
        detail_seed=int(rng.integers(2**62)),
    )


def _pick(names: Sequence[str], rng: np.random.Generator) -> str:
    return names[int(rng.integers(len(names)))]


# --- pictures -------------------------------------------------------------------------------


def draw(scene: Scene, side: int = 64) -> Image.Image:
    """The picture of a scene: RGB, `side` x `side` pixels, the same bytes for the same scene."""
    if side < 16:
        raise ValueError(f"side must be >= 16 pixels, not {side}; shapes would not be legible")
    rng = np.random.default_rng(scene.detail_seed)
    canvas = _background(scene.background, scene.texture, side, rng)
    # One fixed order, so that swapping the objects of a scene gives the same picture.
    for thing in sorted(scene.things, key=lambda t: tuple(_CENTER[t.place])):
        mask = _mask(thing, side, rng)
        shade = np.array(COLORS[thing.color], np.float32) + rng.uniform(-10, 10, 3)
        canvas += mask * (shade.astype(np.float32)[:, None, None] - canvas)
    canvas *= _light(side, rng)
    # The same noise in all channels: drawing it is the dearest step, and this is a third of it.
    canvas += rng.standard_normal((side, side), dtype=np.float32) * np.float32(rng.uniform(1, 4))
    np.clip(canvas + np.float32(0.5), 0, 255, out=canvas)
    return Image.fromarray(np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 0)))


@cache
def _unit_grid(side: int) -> tuple[Pixels, Pixels]:
    """Pixel centers as (x, y), both float32 [side, side] in (0, 1); cached, so read-only."""
    axis = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)
    x, y = (np.ascontiguousarray(a) for a in np.meshgrid(axis, axis))
    x.flags.writeable = y.flags.writeable = False
    return x, y


def _background(color: str, texture: str, side: int, rng: np.random.Generator) -> Pixels:
    """The ground, float32 [3, side, side] in 0..255: one color, made lighter and darker."""
    base = np.array(BACKGROUNDS[color], np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)
    relief = _relief(texture, side, rng) * np.float32(rng.uniform(20, 28))
    # Dark and light grounds have no room on one side: there the pattern goes to the other.
    level = float(base.mean())
    shift = np.float32(14 if level < 60 else -14 if level > 220 else 0)
    if texture != "plain":
        relief += shift
    return np.asarray(base[:, None, None] + relief, np.float32)


def _relief(texture: str, side: int, rng: np.random.Generator) -> Pixels:
    """The pattern of a texture, float32 [side, side] in about -1..1."""
    x, y = _unit_grid(side)
    period = np.float32(rng.uniform(0.11, 0.17))
    dx, dy = (np.float32(v) for v in rng.uniform(0, 1, 2))
    one = np.float32(1)
    if texture == "plain":
        return np.zeros((side, side), np.float32)
    if texture == "grain":
        return rng.standard_normal((side, side), dtype=np.float32)
    if texture == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        return np.asarray(2.6 * ((x - 0.5) * cos + (y - 0.5) * sin), np.float32)
    if texture == "horizontal stripes":
        return _wave(y / period + dy)
    if texture == "vertical stripes":
        return _wave(x / period + dx)
    if texture == "diagonal stripes":
        return _wave((x + y * np.float32(rng.choice([-1, 1]))) / (period * 1.3) + dx)
    if texture == "checks":
        return _wave(x / (period * 1.6) + dx) * _wave(y / (period * 1.6) + dy)
    u = (x / period + dx) % one - np.float32(0.5)
    v = (y / period + dy) % one - np.float32(0.5)
    if texture == "dots":
        return np.asarray(np.clip(2.6 - 9.0 * np.hypot(u, v), -0.7, 1.3), np.float32)
    return np.asarray(np.where((np.abs(u) < 0.13) | (np.abs(v) < 0.13), 1.3, -0.4), np.float32)


def _wave(phase: Pixels) -> Pixels:
    """A square wave with soft edges, so that no pattern depends on how pixels fall on it."""
    return np.asarray(np.clip(3 * np.sin(2 * np.pi * phase), -1, 1), np.float32)


def _light(side: int, rng: np.random.Generator) -> Pixels:
    """Light from one side, float32 [side, side], within 8% of 1."""
    x, y = _unit_grid(side)
    ax, ay = rng.uniform(-0.08, 0.08, 2)
    level = rng.uniform(0.96, 1.04)
    return np.asarray(level + ax * (x - 0.5) + ay * (y - 0.5), np.float32)


def _mask(thing: Thing, side: int, rng: np.random.Generator) -> Pixels:
    """Coverage of one object, float32 [side, side] in 0..1, antialiased."""
    fine = side * _OVERSAMPLE
    cx, cy = np.asarray(_CENTER[thing.place]) + rng.uniform(-0.02, 0.02, 2)
    radius = _RADIUS[thing.size] * rng.uniform(0.93, 1.07)
    angle = math.radians(rng.uniform(-12, 12))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    image = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(image)
    for outline, ink in _outlines()[thing.shape]:
        points = (outline @ turn * radius + (cx, cy)) * fine
        pen.polygon([(float(px), float(py)) for px, py in points], fill=ink)
    coverage = np.asarray(image.reduce(_OVERSAMPLE), np.uint8).astype(np.float32)
    return np.asarray(coverage / 255, np.float32)


@cache
def _outlines() -> dict[str, list[tuple[Points, int]]]:
    """Shape -> polygons within the unit circle (y down), painted in order: 255 ink, 0 a hole."""
    round_ = _regular(40)
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    heart = np.stack(
        [
            16 * np.sin(t) ** 3,
            -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) - 2,
        ],
        axis=1,
    )
    star = np.empty((10, 2))
    star[0::2] = _regular(5)
    star[1::2] = -0.42 * np.roll(_regular(5), 2, axis=0)
    arm = 0.36
    cross = [
        (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
        (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
    ]  # fmt: skip
    arrow = [(0, -1), (0.85, 0), (0.34, 0), (0.34, 1), (-0.34, 1), (-0.34, 0), (-0.85, 0)]
    whole = {
        "circle": round_,
        "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.82,
        "triangle": _regular(3) * 1.1 + (0, 0.15),
        "star": star * 1.1,
        "diamond": np.array([(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)]),
        "hexagon": _regular(6),
        "cross": np.array(cross),
        "heart": heart / 16,
        "arrow": np.array(arrow),
        "bar": np.array([(-1.1, -0.38), (1.1, -0.38), (1.1, 0.38), (-1.1, 0.38)]),
    }
    shapes = {name: [(outline, 255)] for name, outline in whole.items()}
    shapes["ring"] = [(round_, 255), (round_ * 0.56, 0)]
    shapes["crescent"] = [(round_, 255), (round_ * 0.85 + (0.5, -0.1), 0)]
    return shapes


def _regular(corners: int) -> Points:
    """A regular polygon in the unit circle, first corner up, float64 [corners, 2]."""
    angle = np.arange(corners) * (2 * math.pi / corners)
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A near-copy: cropped by up to 8% a side and resized back, slightly other in its colors.

    Size and mode stay.  Compression is the caller's: save as JPEG at another quality.
    """
    width, height = image.size
    keep = rng.uniform(0.92, 0.98)
    left, top = (rng.uniform(0, 1 - keep) * extent for extent in (width, height))
    box = (left, top, left + keep * width, top + keep * height)
    copy = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        copy = enhance(copy).enhance(float(rng.uniform(0.92, 1.08)))
    return copy


# --- captions -------------------------------------------------------------------------------


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many sentences that are true of the scene.

    Color and shape of every object and the color of the background are always named; size,
    place and texture nearly always.
    """
    things = [_thing_phrase(thing, rng) for thing in scene.things]
    if len(things) == 2 and rng.random() < 0.5:
        things.reverse()
    what = " and ".join(things)
    adjective, noun = TEXTURE_WORDS[scene.texture][
        int(rng.integers(len(TEXTURE_WORDS[scene.texture])))
    ]
    ground = _pick(("background", "backdrop"), rng)
    style = rng.random()
    if style < 0.1:
        where = f"{_article(scene.background)} {ground}"
    elif style < 0.55:
        where = f"{_article(adjective)} {scene.background} {ground}"
    else:
        where = f"{_article(scene.background)} {ground} with {noun}"
    order = rng.random()
    if order < 0.6:
        return f"{what} {_pick(('on', 'against', 'over'), rng)} {where}"
    if order < 0.8:
        return f"{_pick(('on', 'against'), rng)} {where}, {what}"
    return f"{_pick(('a picture of', 'a drawing of', 'there is'), rng)} {what} on {where}"


def _thing_phrase(thing: Thing, rng: np.random.Generator) -> str:
    shape = _pick(SHAPE_WORDS[thing.shape], rng)
    size = _pick(SIZE_WORDS[thing.size], rng)
    style = rng.random()
    if style < 0.08:
        phrase = f"{_article(thing.color)} {shape}"
    elif style < 0.85:
        phrase = f"{_article(size)} {thing.color} {shape}"
    else:
        phrase = f"{_article(size)} {shape} in {thing.color}"
    return phrase if rng.random() < 0.04 else f"{phrase} {_pick(PLACE_WORDS[thing.place], rng)}"


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
