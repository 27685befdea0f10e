"""Decodes images into the tensors that the model takes, ahead of the model and in bounded memory.

Images are decoded as in open_clip's training: the first frame, converted to RGB before it is
scaled, not turned by EXIF.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Condition
from typing import Any

import numpy as np

from d2filter.algorithm import sizes
from d2filter.config import EmbedConfig
from d2filter.formats import filetype, webdataset
from d2filter.models import clip

_LONGEST_RATIO = 1000  # the transform scales the short side up: 1 × 60,000 would take gigabytes
_DRAFT_TIMES = 2  # cosines to plain embeddings of 0.9999 on average (jobs/bench_embed.py)
# bytes a pixel that decoders take at most, with what is made of the pixels before they are scaled;
# measured at 42 megapixels with Pillow 13; other formats: sizes.PIXEL
BYTES_A_PIXEL = {"JPEG": 9, "MPO": 9, "PNG": 10, "BMP": 9, "GIF": 9, "WEBP": 18}
_PROGRESSIVE = 6  # more, for the coefficients of the whole picture
GRAY_PIXELS = 1 << 20  # pixels of 16-bit gray that are scaled at once
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF's tags


@dataclass(frozen=True, slots=True)
class Ready:
    """A sample whose image is decoded and transformed; the encoded bytes are freed."""

    sample: webdataset.Sample
    sha256: str
    """of the encoded picture"""
    tensor: Any
    width: int
    height: int
    alpha: bool
    """whether a pixel of it is not opaque"""
    one_color: bool
    """whether the model sees a single color"""


class Memory:
    """Limits the bytes that threads use together for decoding. An image that needs more than the
    limit is decoded alone.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._changed = Condition()

    @contextmanager
    def held(self, count: int) -> Iterator[None]:
        """Wait until `count` bytes are free, and hold them."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + count <= self._most)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


def decoded(
    pool: ThreadPoolExecutor,
    samples: Iterator[webdataset.Sample],
    model: clip.Clip,
    config: EmbedConfig,
) -> Iterator[Ready | webdataset.Sample]:
    """Samples in order, decoded ahead by at most two batches; unusable ones as they are.

    The samples before a LostTail are handed out before it is raised.
    """
    waiting: deque[tuple[int, Future[Ready | webdataset.Sample]]] = deque()
    ahead = 0
    memory = Memory(sizes.decoded_pictures(config.max_pixels))
    lost: webdataset.LostTail | None = None
    with _own_limits(config.max_pixels):
        try:
            for sample in samples:
                size = len(sample.image)
                waiting.append((size, pool.submit(_decode, sample, model, memory, config)))
                ahead += size
                while len(waiting) > 2 * config.batch_size or ahead > sizes.PICTURES_AHEAD:
                    size, future = waiting.popleft()
                    ahead -= size
                    yield future.result()
        except webdataset.LostTail as error:
            lost = error
        while waiting:
            yield waiting.popleft()[1].result()
    if lost is not None:
        raise lost


@contextmanager
def _own_limits(max_pixels: int) -> Iterator[None]:
    """Set Pillow's limit of pixels to ours, because Pillow refuses some images before this module
    sees them, and silence its warnings about half as many pixels and about palettes.
    """
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        # once for all threads
        warnings.simplefilter("ignore")
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


class _Refused(Exception):
    """A picture that is not decoded: (reason, message)."""


def _decode(
    sample: webdataset.Sample, model: clip.Clip, memory: Memory, config: EmbedConfig
) -> Ready | webdataset.Sample:
    from PIL import Image

    if sample.reason:
        return sample
    try:
        with Image.open(io.BytesIO(sample.image), formats=webdataset.IMAGE_FORMATS) as picture:
            width, height = picture.size
            _refuse(picture, config.max_pixels)
            if config.fast_decode:
                _draft(picture, _DRAFT_TIMES * model.side)
            with memory.held(_bytes_of(picture)):
                try:
                    picture.load()
                    alpha = _is_transparent(picture)
                    tensor = model.transform(_as_rgb(picture, config.alpha, alpha))
                finally:
                    picture.close()  # its pixels too, before another thread takes their place
        sha256 = hashlib.sha256(sample.image).hexdigest()
        return Ready(
            replace(sample, image=b""), sha256, tensor, width, height, alpha, _is_flat(tensor)
        )
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        reason, message = _why(error, sample.image)
        return webdataset.Sample(key=sample.key, uid=sample.uid, reason=reason, message=message)


def _refuse(picture: Any, most: int) -> None:
    """Raise _Refused for what would take too much memory, before any of it is taken."""
    width, height = picture.size
    if max(width, height) > _LONGEST_RATIO * min(width, height):
        raise _Refused("broken image", f"{width} × {height} is longer than {_LONGEST_RATIO} : 1")
    if _pixels_of(picture) > most:
        what = f"{width} × {height}" if width * height > most else "a tile of the picture"
        raise _Refused(
            "too many pixels",
            f"{what} has {_pixels_of(picture)} pixels, at most {most} are read (--max-pixels)",
        )


def _pixels_of(picture: Any) -> int:
    """Pixels that are decoded at once."""
    pixels: int = picture.width * picture.height
    if picture.format == "TIFF":
        # a tile of a small picture may be of any size, and is decoded whole
        tags = picture.tag_v2
        tile = int(tags.get(_TILE_WIDTH) or 0) * int(tags.get(_TILE_LENGTH) or 0)
        return max(pixels, tile)
    return pixels


def _bytes_of(picture: Any) -> int:
    """What its decoding may take."""
    each = BYTES_A_PIXEL.get(picture.format, sizes.PIXEL)
    if picture.info.get("progressive"):
        each += _PROGRESSIVE
    return _pixels_of(picture) * each


def _draft(picture: Any, side: int) -> None:
    """Let a JPEG be decoded at the least of its own sizes that keeps `side`."""
    width, height = picture.size
    shorter = min(width, height)
    if shorter > side:
        picture.draft(None, (width * side // shorter, height * side // shorter))


def _why(error: Exception, image: bytes) -> tuple[str, str]:
    """Reason and message of a picture that could not be decoded."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, _Refused):
        reason, message = error.args
        return reason, message
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels", f"{webdataset.describe(error)} (--max-pixels)"
    if not isinstance(error, UnidentifiedImageError):
        return "broken image", webdataset.describe(error)
    kind = filetype.recognize(image[: filetype.HEAD_BYTES])
    if kind is None:
        return "broken image", f"no picture: it begins with the bytes {image[:8].hex(' ')}"
    known = ", ".join(webdataset.IMAGE_FORMATS)
    if kind.name.partition(" ")[2].removesuffix(" picture").upper() in webdataset.IMAGE_FORMATS:
        return "broken image", f"it begins like {kind.name} and is none"
    return "unread format", f"it is {kind.name}; {known} are read"


def _is_transparent(picture: Any) -> bool:
    """Whether a pixel of a loaded picture is not opaque."""
    if _is_deep(picture) or not picture.has_transparency_data:
        return False
    whole = picture if "A" in picture.getbands() else picture.convert("RGBA")
    return bool(whole.getchannel("A").getextrema()[0] < 255)


def _as_rgb(picture: Any, alpha: str, transparent: bool) -> Any:
    """An image in the mode that training scales: RGB, or gray, which scales in the same way.

    alpha: drop takes the colors that the file has below transparent pixels, as training does; white
    and black put the image on such a background.
    """
    from PIL import Image

    if _is_deep(picture):
        return _eight_bit(picture)
    if transparent and alpha != "drop":
        layered = picture.convert("RGBA")
        ground = Image.new("RGB", picture.size, alpha)
        ground.paste(layered.convert("RGB"), mask=layered.getchannel("A"))
        return ground
    return picture if picture.mode in ("RGB", "L") else picture.convert("RGB")


def _is_deep(picture: Any) -> bool:
    return bool(picture.mode == "I" or picture.mode.startswith("I;16"))


def _eight_bit(picture: Any) -> Any:
    """16-bit gray scaled to 8 bits; PIL's own conversion cuts everything above 255 to white."""
    from PIL import Image

    width, height = picture.size
    scaled = Image.new("L", (width, height))
    rows = max(1, GRAY_PIXELS // width)
    for top in range(0, height, rows):
        part = np.asarray(picture.crop((0, top, width, min(top + rows, height))))
        eight = part.clip(0, 65535).astype(np.uint16) // 257
        scaled.paste(Image.fromarray(eight.astype(np.uint8)), (0, top))
    return scaled


def _is_flat(tensor: Any) -> bool:
    """Whether all pixels of a (3, height, width) tensor are alike."""
    colors = np.asarray(tensor).reshape(len(tensor), -1)
    return bool((colors == colors[:, :1]).all())
