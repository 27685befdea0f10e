"""The bundled model loads through open_clip's factory and reaches the figures of its model card."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2filter.errors import DependencyError
from d2filter.models import tiny
from d2filter.tools import scenes

open_clip = pytest.importorskip("open_clip")
torch = pytest.importorskip("torch")

FIGURES = json.loads(tiny.WEIGHTS.with_name("figures.json").read_text(encoding="utf-8"))
PAIRS = 200


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Any]]:
    """(model, transform, tokenizer), registered in a cache directory of this test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        tiny.register()
        model, _, transform = open_clip.create_model_and_transforms(
            tiny.MODEL_NAME, pretrained=str(tiny.WEIGHTS)
        )
        yield model.eval(), transform, open_clip.get_tokenizer(tiny.MODEL_NAME)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def embed(model: Any, transform: Callable[..., Any], pictures: list[Image.Image]) -> np.ndarray:
    with torch.inference_mode():
        batch = torch.stack([transform(picture) for picture in pictures])
        return np.asarray(model.encode_image(batch, normalize=True).numpy())


@pytest.fixture(scope="module")
def drawn() -> tuple[list[scenes.Scene], list[Image.Image], np.random.Generator]:
    rng = np.random.default_rng(20_240_601)
    kept: list[scenes.Scene] = []
    while len(kept) < PAIRS:
        scene = scenes.random_scene(rng)
        if scenes.held_out(scene):
            kept.append(scene)
    return kept, [scenes.draw(scene) for scene in kept], rng


def test_weights_are_small_and_float16() -> None:
    safetensors = pytest.importorskip("safetensors")
    assert tiny.WEIGHTS.stat().st_size <= 8_000_000
    with safetensors.safe_open(tiny.WEIGHTS, "np") as file:
        kinds = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    assert kinds == {"float16", "int64"}


def test_importing_the_package_imports_neither_torch_nor_open_clip() -> None:
    code = "import sys, d2filter.models.tiny; assert not {'torch', 'open_clip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_loads_as_float32_with_the_transform_of_its_config(loaded: tuple[Any, Any, Any]) -> None:
    model, transform, _ = loaded
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    picture = transform(Image.new("RGB", (200, 120), "white"))
    assert tuple(picture.shape) == (3, 64, 64)
    assert model.visual.image_mean == open_clip.OPENAI_DATASET_MEAN
    assert model.visual.image_std == open_clip.OPENAI_DATASET_STD
    assert picture[0].mean().item() == pytest.approx((1 - 0.48145466) / 0.26862954, abs=1e-4)


def test_register_twice_is_harmless(loaded: tuple[Any, Any, Any]) -> None:
    before = open_clip.list_models()
    tiny.register()
    assert open_clip.list_models() == before


def test_register_repairs_an_emptied_cache(loaded: tuple[Any, Any, Any]) -> None:
    config = open_clip.get_model_config(tiny.MODEL_NAME)
    Path(config["text_cfg"]["tokenizer_kwargs"]["bpe_path"]).unlink()
    tiny.register()
    assert open_clip.get_tokenizer(tiny.MODEL_NAME).vocab_size == config["text_cfg"]["vocab_size"]


def test_many_processes_may_register_at_once(tmp_path: Path) -> None:
    # Publishing is what they race for; importing open_clip in each would only cost time.
    code = (
        "import sys, json; from pathlib import Path; from d2filter.models import tiny;"
        "config = json.loads(tiny.CONFIG.read_text());"
        "[tiny._write(Path(sys.argv[1]) / 'name', config, b'x' * 50_000) for _ in range(50)]"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(timeout=60) for process in running] == [0] * 4
    folder = tmp_path / "name"
    assert sorted(p.name for p in folder.iterdir()) == ["d2filter-tiny.json", "merges.txt.gz"]
    assert (folder / "merges.txt.gz").read_bytes() == b"x" * 50_000


def test_a_cache_that_cannot_be_written_falls_back_to_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path = tiny._publish("name", {"text_cfg": {}}, b"merges")
    assert path.is_relative_to(tmp_path / "tmp")
    merges = json.loads(path.read_text())["text_cfg"]["tokenizer_kwargs"]["bpe_path"]
    assert Path(merges).read_bytes() == b"merges"


def test_another_merge_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "MERGES_SHA256", "0" * 64)
    with pytest.raises(DependencyError, match=r"merges of .* was trained with 0000"):
        tiny._first_merges(8000)


@pytest.mark.parametrize(
    "text", ["", "a red star", "ein grüner Kreis", "红色的星星 🌟 ★", "\x00\ud7ff\uffff"]
)
def test_tokenizer_takes_any_text(loaded: tuple[Any, Any, Any], text: str) -> None:
    model, _, tokenize = loaded
    tokens = tokenize([text])
    assert tuple(tokens.shape) == (1, 40)
    assert int(tokens.max()) == tokenize.eot_token_id == model.vocab_size - 1
    with torch.inference_mode():
        assert torch.isfinite(model.encode_text(tokens)).all()


def test_tokenizer_cuts_long_text_and_keeps_the_end_token(loaded: tuple[Any, Any, Any]) -> None:
    _, _, tokenize = loaded
    tokens = tokenize(["a red star and " * 100])
    assert tuple(tokens.shape) == (1, 40)
    assert tokens[0, -1] == tokenize.eot_token_id


def test_captions_of_scenes_are_not_cut(loaded: tuple[Any, Any, Any], drawn: Any) -> None:
    _, _, tokenize = loaded
    kept, _, _ = drawn
    rng = np.random.default_rng(0)
    lengths = [len(tokenize.encode(scenes.caption(scene, rng))) + 2 for scene in kept]
    assert max(lengths) <= 40


def test_the_bundled_model_retrieves_held_out_pairs(
    loaded: tuple[Any, Any, Any], drawn: Any
) -> None:
    model, transform, tokenize = loaded
    kept, pictures, _ = drawn
    rng = np.random.default_rng(1)
    texts = [scenes.caption(scene, rng) for scene in kept]
    image = embed(model, transform, [jpeg(picture, 88) for picture in pictures])
    with torch.inference_mode():
        text = model.encode_text(tokenize(texts), normalize=True).numpy()
    similarity = image @ text.T
    matched = np.diagonal(similarity)
    # Among 200 it is easier than among the 1,000 of the figures; .1 is seven standard errors.
    for scores, name in ((similarity, "image_to_text"), (similarity.T, "text_to_image")):
        recall = (scores >= matched[:, None]).sum(1) == 1
        assert recall.mean() >= FIGURES[name]["r@1"] - 0.1
    assert matched.mean() == pytest.approx(FIGURES["cosine_matched_mean"], abs=0.05)
    shuffled = np.sum(image * np.roll(text, 1, axis=0), axis=1)
    assert (matched[:, None] > shuffled).mean() >= FIGURES["auc_matched_vs_shuffled"] - 0.01


def test_near_copies_are_closer_than_nearly_all_others(
    loaded: tuple[Any, Any, Any], drawn: Any
) -> None:
    model, transform, _ = loaded
    _, pictures, rng = drawn
    image = embed(model, transform, [jpeg(picture, 90) for picture in pictures])
    copies = [jpeg(scenes.jitter(picture, rng), 75) for picture in pictures]
    copy = embed(model, transform, copies)
    similarity = image @ copy.T
    rank = (similarity > np.diagonal(similarity)[:, None]).sum(1)
    assert (rank == 0).mean() >= 0.9
    assert np.diagonal(similarity).mean() >= FIGURES["near_copy"]["cosine_mean"] - 0.02


def test_figures_contain_the_settings_of_their_measurement() -> None:
    assert FIGURES["held_out_pairs"] == 1000
    assert FIGURES["image_to_text"]["r@1"] >= 0.5
    assert FIGURES["weights_bytes"] == tiny.WEIGHTS.stat().st_size
    assert FIGURES["distinct_captions"] >= 0.99
    assert {"date", "machine", "config", "samples_seen", "minutes_training"} <= set(FIGURES)
