"""Drawn scenes: the same seed gives the same scene, and caption and picture agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from d2filter.tools import scene_words, scenes
from d2filter.tools.scenes import Scene, Thing

BASE = Scene(
    things=(
        Thing(color="red", shape="star", size="medium", place="top left"),
        Thing(color="yellow", shape="ring", size="medium", place="bottom right"),
    ),
    background="navy",
    texture="plain",
    detail_seed=7,
)


def some_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.random_scene(rng) for _ in range(count)]


def pixels(scene: Scene, side: int = 64) -> np.ndarray:
    return np.asarray(scenes.draw(scene, side)).astype(np.int16)


def changed(first: Thing) -> Scene:
    return replace(BASE, things=(first, BASE.things[1]))


def test_scenes_have_the_variety_that_the_model_card_states() -> None:
    assert len(scene_words.COLORS) >= 10
    assert len(scene_words.SHAPE_WORDS) >= 10
    assert len(scene_words.SIZE_WORDS) == 3
    assert len(scene_words.PLACE_WORDS) == 9
    assert len(scene_words.TEXTURE_WORDS) >= 6
    assert len(scene_words.BACKGROUNDS) >= 8


def test_same_seed_gives_same_scenes_pictures_and_captions() -> None:
    first, second = some_scenes(20), some_scenes(20)
    assert first == second
    for a, b in zip(first, second, strict=True):
        assert scenes.draw(a).tobytes() == scenes.draw(b).tobytes()
        captions = [scenes.caption(s, np.random.default_rng(3)) for s in (a, b)]
        assert captions[0] == captions[1]


def test_random_scenes_are_valid_varied_and_often_have_two_things() -> None:
    drawn = some_scenes(2000)
    two = [s for s in drawn if len(s.things) == 2]
    assert 0.5 < len(two) / len(drawn) < 0.7
    for scene in drawn:
        assert all(scenes.visible(t.color, scene.background) for t in scene.things)
    assert all(scenes.apart(*s.things) for s in two)
    things = [t for s in drawn for t in s.things]
    assert {t.color for t in things} == set(scene_words.COLORS)
    assert {t.shape for t in things} == set(scene_words.SHAPE_WORDS)
    assert {t.size for t in things} == set(scene_words.SIZE_WORDS)
    assert {t.place for t in things} == set(scene_words.PLACE_WORDS)
    assert {s.background for s in drawn} == set(scene_words.BACKGROUNDS)
    assert {s.texture for s in drawn} == set(scene_words.TEXTURE_WORDS)


@pytest.mark.parametrize("side", [16, 64, 97])
def test_a_picture_is_rgb_of_the_requested_size(side: int) -> None:
    image = scenes.draw(BASE, side)
    assert (image.mode, image.size) == ("RGB", (side, side))


def variants() -> Iterable[tuple[str, Scene]]:
    star = BASE.things[0]
    for name in scene_words.COLORS:
        if name != star.color and scenes.visible(name, BASE.background):
            yield f"color {name}", changed(replace(star, color=name))
    for name in set(scene_words.SHAPE_WORDS) - {star.shape}:
        yield f"shape {name}", changed(replace(star, shape=name))
    for name in ("small", "large"):
        yield f"size {name}", changed(replace(star, size=name))
    for name in set(scene_words.PLACE_WORDS) - {star.place, BASE.things[1].place}:
        yield f"place {name}", changed(replace(star, place=name))
    for name in ("black", "teal", "gray"):
        yield f"background {name}", replace(BASE, background=name)
    for name in set(scene_words.TEXTURE_WORDS) - {BASE.texture}:
        yield f"texture {name}", replace(BASE, texture=name)
    yield "one thing", replace(BASE, things=BASE.things[:1])


def test_every_attribute_changes_the_picture_visibly() -> None:
    base = pixels(BASE)
    for name, scene in variants():
        difference = np.abs(pixels(scene) - base).max(axis=2)
        # 25 of 4,096 pixels by more than 12 levels; noise alone reaches neither.
        assert (difference > 12).sum() >= 25, name


def test_detail_seed_changes_the_picture_but_not_much() -> None:
    base = pixels(BASE)
    other = pixels(replace(BASE, detail_seed=8))
    assert (other != base).any()
    assert np.abs(other - base).mean() < 25


def test_order_of_things_changes_nothing() -> None:
    swapped = replace(BASE, things=BASE.things[::-1])
    assert scenes.draw(swapped).tobytes() == scenes.draw(BASE).tobytes()
    assert scenes.held_out(swapped) == scenes.held_out(BASE)


def test_a_thing_has_the_place_and_color_of_its_scene() -> None:
    for index, place in enumerate(scene_words.PLACE_WORDS):
        thing = Thing(color="yellow", shape="square", size="large", place=place)
        scene = replace(BASE, things=(thing,))
        image = pixels(scene)
        row, column = (round(64 * (0.22 + 0.28 * i)) for i in divmod(index, 3))
        assert np.abs(image[row, column] - scene_words.COLORS["yellow"]).max() < 60
        opposite = image[63 - row if index // 3 != 1 else 2, 63 - column if index % 3 != 1 else 2]
        if place != "center":
            assert np.abs(opposite - scene_words.BACKGROUNDS["navy"]).max() < 60


def test_caption_names_the_attributes() -> None:
    rng = np.random.default_rng(0)
    named = {"size": 0, "place": 0, "texture": 0}
    total = {"size": 0, "place": 0, "texture": 0}
    for scene in some_scenes(500):
        text = scenes.caption(scene, rng)
        assert scene.background in text
        textures = [word for pair in scene_words.TEXTURE_WORDS[scene.texture] for word in pair]
        named["texture"] += any(word in text for word in textures)
        total["texture"] += 1
        for thing in scene.things:
            assert thing.color in text
            assert any(word in text for word in scene_words.SHAPE_WORDS[thing.shape])
            named["size"] += any(word in text for word in scene_words.SIZE_WORDS[thing.size])
            named["place"] += any(word in text for word in scene_words.PLACE_WORDS[thing.place])
            total["size"] += 1
            total["place"] += 1
    assert all(named[what] / total[what] > 0.85 for what in named)


def test_captions_of_one_scene_vary() -> None:
    rng = np.random.default_rng(0)
    captions = {scenes.caption(BASE, rng) for _ in range(50)}
    assert len(captions) > 25
    assert len({caption.split()[0] for caption in captions}) > 1


def test_jitter_stays_close_but_differs_and_keeps_its_argument() -> None:
    rng = np.random.default_rng(0)
    pictures = [scenes.draw(scene) for scene in some_scenes(40)]
    small = np.stack([np.asarray(p.resize((16, 16))).astype(np.float64) for p in pictures])
    for i, picture in enumerate(pictures):
        before = picture.tobytes()
        copy = scenes.jitter(picture, rng)
        assert picture.tobytes() == before
        assert (copy.mode, copy.size) == (picture.mode, picture.size)
        assert copy.tobytes() != before
        tiny = np.asarray(copy.resize((16, 16))).astype(np.float64)
        distance = np.abs(small - tiny).mean(axis=(1, 2, 3))
        assert distance[i] < 24
        assert (distance < distance[i]).sum() <= 2


def test_jitter_keeps_a_size_that_is_not_square() -> None:
    image = Image.new("RGB", (80, 48), "teal")
    assert scenes.jitter(image, np.random.default_rng(0)).size == (80, 48)


def test_held_out_is_a_small_share_and_ignores_the_detail_seed() -> None:
    drawn = some_scenes(3000)
    kept = [scenes.held_out(scene) for scene in drawn]
    assert 0.04 < np.mean(kept) < 0.09
    assert kept == [scenes.held_out(replace(s, detail_seed=s.detail_seed // 2)) for s in drawn]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"background": "plaid"}, "background must be one of .* not 'plaid'"),
        ({"texture": "furry"}, "texture must be one of .* not 'furry'"),
        ({"detail_seed": -1}, "detail_seed must be >= 0, not -1"),
        ({"things": ()}, "1 or 2 things, not 0"),
        ({"background": "maroon"}, "a red star cannot be seen on maroon"),
    ],
)
def test_impossible_scenes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["color", "shape", "size", "place"])
def test_unknown_names_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of .* not 'odd'"):
        replace(BASE.things[0], **{field: "odd"})


def test_things_that_overlap_are_refused() -> None:
    near = replace(BASE.things[1], place="top", size="large")
    with pytest.raises(ValueError, match="overlap"):
        replace(BASE, things=(replace(BASE.things[0], size="large"), near))


def test_side_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="side must be >= 16 pixels, not 8"):
        scenes.draw(BASE, 8)
