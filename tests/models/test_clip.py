"""Weights from a file: which contents are accepted, and that loading runs no code from the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from d2filter.config import BUNDLED_MODEL
from d2filter.errors import InputError
from d2filter.models import clip


class Hostile:
    """Pickled, it makes a file wherever it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights", "weights.safetensors"])
def test_weights_run_no_code(tmp_path: Path, name: str) -> None:
    torch.save({"state_dict": Hostile(tmp_path / "made")}, tmp_path / name)
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        clip.load(BUNDLED_MODEL, str(tmp_path / name), "fp32")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("version", "name", "refused"),
    [
        ("2.5.1+cu121", "w.pt", True),
        ("2.5.1", "w.safetensors", False),
        ("1.13.0", "w", True),
        ("2.6.0", "w.pt", False),
        ("2.10.0a0+git", "w.pt", False),
        ("2.5.1", "", False),
        ("2.5.1", "openai", False),
    ],
)
def test_an_old_torch_loads_no_pickled_weights(
    tmp_path: Path, version: str, name: str, refused: bool
) -> None:
    """CVE-2025-32434: before 2.6 torch.load ran code of files that it was to read weights of."""
    (tmp_path / "w.pt").write_bytes(b"x")
    (tmp_path / "w").write_bytes(b"x")
    (tmp_path / "w.safetensors").write_bytes(b"x")
    pretrained = str(tmp_path / name) if name.startswith("w") else name
    if refused:
        with pytest.raises(InputError, match=r"install torch>=2\.6, or take weights in \.safetens"):
            clip._refuse_pickles(pretrained, version)
    else:
        clip._refuse_pickles(pretrained, version)
