"""Difficulty of a sample, computed from its embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def clip_score(image: npt.NDArray[Any], text: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """CLIP score: cosine of image and text embedding, shape (n,) float32.

    image, text: (n, d) float16 or float32. Products are summed in float64. A zero or non-finite
    embedding gives NaN (the catalog counts such a sample as bad).
    """
    a = np.asarray(image, dtype=np.float64)
    b = np.asarray(text, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        cosine = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.asarray(cosine, np.float32)
