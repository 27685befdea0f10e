"""Small WebDataset shards of drawn scenes, clean and broken."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2filter.tools import scenes


def picture(seed: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """An image file of the scene of a seed."""
    scene = scenes.random_scene(np.random.default_rng(seed))
    return encoded(scenes.draw(scene).convert(mode), kind)


def caption(seed: int) -> str:
    """What the scene of a seed shows."""
    scene = scenes.random_scene(np.random.default_rng(seed))
    return scenes.caption(scene, np.random.default_rng(seed))


def members(key: str, seed: int, **meta: Any) -> list[tuple[str, bytes]]:
    """jpg, txt and json of one clean sample."""
    return [
        (f"{key}.jpg", picture(seed)),
        (f"{key}.txt", caption(seed).encode()),
        (f"{key}.json", json.dumps({"caption": caption(seed), **meta}).encode()),
    ]


def tar(files: list[tuple[str, bytes]]) -> bytes:
    """A tar of files, given as name and content."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)  # bytes that are no UTF-8 come as surrogates
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def write(path: Path, files: list[tuple[str, bytes]]) -> Path:
    """Write a tar of files, and the folders above it; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(files))
    return path


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """The file of a picture; kind and options as `Image.save` takes them."""
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png(picture: Image.Image) -> bytes:
    return encoded(picture, "PNG")


def black_png_with_alpha() -> bytes:
    return png(Image.new("RGBA", (30, 20), (255, 0, 0, 0)))
