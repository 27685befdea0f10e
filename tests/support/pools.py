"""Small pools of metadata on disk, clean and dirty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def make(
    n: int, dim: int, *, seed: int = 0, copies: float = 0.1, decay: float = 0
) -> dict[str, Any]:
    """uid (n,), img and txt (n, dim) float16: clustered, with a share of exact copies.

    decay: axis number to this negative power is the spread along it; 0 for the same along all.
    """
    rng = np.random.default_rng(seed)
    axes = np.arange(1.0, dim + 1) ** -decay
    centers = rng.normal(size=(max(2, n // 60), dim)) * axes
    img = centers[rng.integers(0, len(centers), n)] + 0.4 * rng.normal(size=(n, dim)) * axes
    txt = img + rng.normal(size=(n, dim)) * axes
    copied = rng.random(n) < copies
    source = rng.integers(0, n, n)
    img[copied], txt[copied] = img[source[copied]], txt[source[copied]]
    uid = [rng.bytes(16).hex() for _ in range(n)]
    return {"uid": uid, "img": img.astype(np.float16), "txt": txt.astype(np.float16)}


def write(
    folder: Path,
    pool: dict[str, Any],
    *,
    files: int = 1,
    shuffle: int | None = None,
    arch: str = "l14",
    columns: dict[str, Any] | None = None,
) -> Path:
    """Write the pool as `files` DataComp pairs, rows shuffled by a seed; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    n = len(pool["uid"])
    rows = np.arange(n) if shuffle is None else np.random.default_rng(shuffle).permutation(n)
    extra = columns or {}
    for number, chunk in enumerate(np.array_split(rows, files)):
        table = {"uid": pa.array([pool["uid"][r] for r in chunk], pa.string())}
        for name, values in extra.items():
            table[name] = pa.array([values[r] for r in chunk])
        pq.write_table(pa.table(table), folder / f"{number:05d}.parquet")
        np.savez(
            folder / f"{number:05d}.npz",
            **{f"{arch}_img": pool["img"][chunk], f"{arch}_txt": pool["txt"][chunk]},
        )
    return folder


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with other values in one of its columns."""
    return table.set_column(table.column_names.index(name), name, pa.array(values))
