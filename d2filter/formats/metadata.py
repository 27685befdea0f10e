"""Metadata in DataComp's layout: NAME.parquet with its NAME.npz, row by row (DESIGN §6)."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import features, scores, uids
from d2filter.config import CatalogConfig
from d2filter.errors import InputError
from d2filter.formats import tables, traininglog
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import FileInfo, Folder, absolute

# reasons, by code in `Rows.reason`; 0 is a valid row
REASONS = (
    "",
    "malformed uid",
    "non-finite image embedding",
    "zero image embedding",
    "non-finite text embedding",
    "zero text embedding",
    "score is NaN",
    "score is infinite",
    "features overflow float16",
    "features vanish in float16",
    "no row in the training log",
    "no class",
    "non-finite embedding",
    "zero embedding",
)

EMBED_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),
        ("text", pa.string()),
        ("original_width", pa.int64()),
        ("original_height", pa.int64()),
        ("sha256", pa.string()),
        ("key", pa.string()),
        ("shard", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One NAME.parquet and NAME.npz of a metadata folder."""

    name: str
    size: int
    """bytes of both files"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The n rows of one pair, fixed and judged."""

    hi: uids.U64
    lo: uids.U64
    reason: npt.NDArray[np.uint8]
    """(n,) index into REASONS; 0 for a valid row"""
    difficulty: npt.NDArray[np.float32]
    features: features.F16
    """(n, d) fixed float16 features"""
    has_score: bool
    """whether the file brought the score; computed otherwise"""
    uid: Any
    """arrow column of the uids as read"""
    shard: Any
    """arrow string array, null where unknown"""
    key: Any
    group: Any


def list_pairs(folder: Folder) -> tuple[list[Pair], list[FileInfo]]:
    """The pairs of a folder by name, and all their files.

    Raises InputError for a missing folder, one without parquet, or a file without its partner.
    """
    if not folder.exists():
        raise InputError(f"metadata folder {folder.url} does not exist: check --metadata-dir")
    parquets = folder.files(".parquet")
    arrays = {info.name.removesuffix(".npz"): info for info in folder.files(".npz")}
    if not parquets:
        raise InputError(
            f"metadata folder {folder.url} holds no .parquet file: "
            "--metadata-dir takes a folder of NAME.parquet + NAME.npz pairs"
        )
    pairs = []
    files = []
    for table in parquets:
        name = table.name.removesuffix(".parquet")
        partner = arrays.pop(name, None)
        if partner is None:
            raise InputError(
                f"{folder.where(table.name)} has no {name}.npz beside it: "
                "download its embeddings or remove the parquet file"
            )
        pairs.append(Pair(name, table.size + partner.size))
        files += [table, partner]
    if arrays:
        name = min(arrays)
        raise InputError(
            f"{folder.where(name + '.npz')} has no {name}.parquet beside it: "
            "download its table or remove the npz file"
        )
    return pairs, files


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What scores need beside the metadata."""

    target: npt.NDArray[Any] | None = None
    """(t, d) image embeddings of a target set"""
    log: traininglog.Scored | None = None


def outside_files(config: CatalogConfig) -> list[FileInfo]:
    """Files that a score needs beside the metadata. Raises InputError for one that is not there."""
    if config.training_log:
        return traininglog.files(config.training_log)[1]
    if not config.score_target:
        return []
    parent, _, name = absolute(config.score_target).rpartition("/")
    folder = Folder(parent)
    suffix = ".npz" if name.endswith(".npz") else ".npy"
    found = [info for info in folder.files(suffix) if info.name == name] if folder.exists() else []
    if not found:
        raise InputError(f"score-target {config.score_target} is no .npy or .npz file")
    return found


def read_target(url: str, arch: str) -> npt.NDArray[Any]:
    """A target set: .npy (t, d), or the ARCH_img of an .npz. Raises InputError."""
    parent, _, name = absolute(url).rpartition("/")
    folder = Folder(parent)
    if name.endswith(".npz"):
        return _read_arrays(folder, name, [f"{arch}_img"], "")[f"{arch}_img"]
    try:
        with folder.reading(name) as stream:
            array = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(
            f"score-target {url} is no array file: {tables.first_line(error)}"
        ) from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(f"score-target {url} must hold an array (targets, dimension) of floats")
    return array


def read_pair(
    folder: Folder, name: str, config: CatalogConfig, outside: Outside | None = None
) -> Rows:
    """Read one pair: ids, difficulty, fixed features, and what is wrong with each row. The
    difficulty of a score that needs the pool is 0 for now.

    Raises InputError, naming the file, for anything that concerns the pair as a whole.
    """
    try:
        return _read_pair(folder, name, config, outside or Outside())
    except (pa.ArrowException, ValueError, KeyError) as error:
        # arrow and numpy have many ways to say that a file is not what its name promises
        raise InputError(
            f"{folder.where(name)}.parquet and .npz are no usable pair, fetch them again: "
            f"{tables.first_line(error)}"
        ) from error


def _read_pair(folder: Folder, name: str, config: CatalogConfig, outside: Outside) -> Rows:
    table = _read_table(folder, f"{name}.parquet", config)
    image, text = f"{config.arch}_img", f"{config.arch}_txt"
    wanted = list(config.feature_keys) or {
        "image|text": [image, text], "image": [image], "text": [text],
    }[config.feature_type]  # fmt: skip
    score_name = config.score_name
    has_score = score_name in table.column_names and not config.score
    if config.score_column and not has_score:
        raise InputError(
            f"{folder.where(name)}.parquet has no column {config.score_column!r}; "
            f"it has {', '.join(table.column_names)}: choose one with --score-column"
        )
    needed = wanted
    if config.needs == "target":
        needed = [*wanted, image]
    elif not has_score and config.needs in ("", "pair"):
        needed = [*wanted, image, text]
    needed = list(dict.fromkeys(needed))
    arrays = _read_arrays(folder, f"{name}.npz", needed, score_name)
    for key, array in arrays.items():
        if len(array) != table.num_rows:
            raise InputError(
                f"{folder.where(name)}.parquet has {table.num_rows} rows and {key} of "
                f"{name}.npz has {len(array)}: the pair does not belong together, fetch it again"
            )
    where = folder.where(f"{name}.parquet")
    logged = np.ones(table.num_rows, np.bool_)
    try:
        hi, lo, known = uid_format.parse(table.column("uid"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{where}: column uid must hold strings: {error}") from error
    if has_score:
        difficulty = _as_float32(table.column(score_name), f"{where}: column {score_name}")
    elif config.needs == "pool":
        difficulty = np.zeros(table.num_rows, np.float32)
    elif config.needs == "log":
        difficulty, logged = _logged(outside, hi, lo)
    elif config.needs == "target":
        assert outside.target is not None
        widths = (outside.target.shape[1], arrays[image].shape[1])
        if widths[0] != widths[1]:
            raise InputError(
                f"score-target {config.score_target} has embeddings of dimension {widths[0]}, "
                f"{image} of {where.removesuffix('.parquet')}.npz of {widths[1]}: use one model"
            )
        difficulty = scores.norm_sim(arrays[image], outside.target)
    else:
        difficulty = scores.clip_score(arrays[image], arrays[text])
    difficulty = scores.difficulty(difficulty, config.first)
    group = _strings(table, config.group_column)
    classed = np.ones(table.num_rows, np.bool_)
    if config.group_column:
        classed = group.is_valid().to_numpy(zero_copy_only=False)
    fixed = features.fix([arrays[key] for key in wanted], normalize=config.normalize)
    by_kind = {{image: "image", text: "text"}.get(key, key): arrays[key] for key in arrays}
    return Rows(
        hi=hi,
        lo=lo,
        has_score=has_score,
        reason=_judge(known, difficulty, by_kind, fixed, logged, classed),
        difficulty=difficulty,
        features=fixed,
        uid=table.column("uid"),
        shard=_strings(table, "shard"),
        key=_strings(table, "key"),
        group=group,
    )


def publish_pair(
    folder: Folder,
    name: str,
    arch: str,
    rows: Sequence[dict[str, Any]],
    image: npt.NDArray[np.float16],
    text: npt.NDArray[np.float16],
) -> None:
    """Write what `embed` made of one shard; the npz first, for a parquet is what readers look for.

    rows: one dict a sample with EMBED_SCHEMA's fields. image, text: (n, d) float16 unit rows.
    """
    score = scores.clip_score(image, text)
    table = pa.Table.from_pylist(list(rows), schema=EMBED_SCHEMA)
    table = table.append_column(f"clip_{arch}_similarity_score", pa.array(score, pa.float32()))
    with folder.publish(f"{name}.npz") as path, path.open("wb") as stream:
        arrays: dict[str, Any] = {f"{arch}_img": image, f"{arch}_txt": text}
        np.savez(stream, **arrays)
    with folder.publish(f"{name}.parquet") as path:
        pq.write_table(table, path, compression="zstd")


def _judge(
    known: npt.NDArray[np.bool_],
    difficulty: npt.NDArray[np.float32],
    by_kind: dict[str, npt.NDArray[Any]],
    fixed: features.F16,
    logged: npt.NDArray[np.bool_],
    classed: npt.NDArray[np.bool_],
) -> npt.NDArray[np.uint8]:
    """First thing that is wrong with each row, as an index into REASONS."""
    reason = np.zeros(len(known), np.uint8)

    def mark(rows: Any, text: str) -> None:
        reason[rows & (reason == 0)] = REASONS.index(text)

    mark(~known, "malformed uid")
    mark(~logged, "no row in the training log")
    mark(~classed, "no class")
    for kind, array in by_kind.items():
        what = f"{kind} embedding" if kind in ("image", "text") else "embedding"
        mark(~np.isfinite(array).all(axis=1), f"non-finite {what}")
        mark(~array.any(axis=1), f"zero {what}")
    mark(np.isnan(difficulty), "score is NaN")
    mark(np.isinf(difficulty), "score is infinite")
    mark(~np.isfinite(fixed).all(axis=1), "features overflow float16")
    mark(~fixed.any(axis=1), "features vanish in float16")
    return reason


def shown(value: Any) -> str | None:
    """A string of an arrow column for the ledger, whatever bytes it holds."""
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        text = value.cast(pa.binary()).as_py()
    return text if text is None or isinstance(text, str) else repr(text)


def _read_table(folder: Folder, name: str, config: CatalogConfig) -> Any:
    with tables.open_table(folder, name) as parquet:
        there = parquet.schema_arrow.names
        if "uid" not in there:
            raise InputError(f"{folder.where(name)} has no column uid; it has {', '.join(there)}")
        if config.group_column and config.group_column not in there:
            raise InputError(
                f"{folder.where(name)} has no column {config.group_column!r}; it has "
                f"{', '.join(there)}: choose one with --group-column"
            )
        wanted = ("uid", config.score_name, "shard", "key", config.group_column)
        columns = [c for c in dict.fromkeys(wanted) if c in there]
        if config.score_column and config.score_column not in there:
            columns = there  # the caller's message lists them
        return parquet.read(columns=columns)


def _read_arrays(
    folder: Folder, name: str, keys: Sequence[str], score_name: str
) -> dict[str, npt.NDArray[Any]]:
    where = folder.where(name)
    with folder.reading(name) as stream:
        try:
            with np.load(stream, allow_pickle=False) as archive:
                missing = [key for key in keys if key not in archive.files]
                if missing:
                    archs = sorted({f.removesuffix("_img") for f in archive.files if "_img" in f})
                    raise InputError(
                        f"{where} has no {' and no '.join(missing)} (needed for the features, or "
                        f"for the score as there is no column {score_name}); it has "
                        f"{', '.join(archive.files)}: "
                        + (f"try --arch {archs[0]}" if archs else "choose with --arch")
                    )
                arrays = {key: archive[key] for key in keys}
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(
                f"{where} is no readable npz file of plain arrays, fetch it again: "
                f"{tables.first_line(error)}"
            ) from error
        except AttributeError as error:  # a lone .npy under the name .npz has no `files`
            raise InputError(f"{where} is a single array, a .npz archive is needed") from error
    for key, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] == 0:
            raise InputError(
                f"{where}: {key} has shape {array.shape} and dtype {array.dtype}, "
                "needed is (rows, dimension) of floats"
            )
    return arrays


def _as_float32(column: Any, where: str) -> npt.NDArray[np.float32]:
    """A numeric column as float32; null becomes NaN."""
    try:
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{where} must hold numbers: {tables.first_line(error)}") from error
    with np.errstate(over="ignore"):
        narrow: npt.NDArray[np.float32] = np.asarray(values, np.float64).astype(np.float32)
    return narrow


def _logged(
    outside: Outside, hi: uids.U64, lo: uids.U64
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Scores of a training log, NaN where it has none, and whether it has one."""
    log = outside.log
    assert log is not None
    at = uids.positions(log.hi, log.lo, hi, lo)
    return np.where(at >= 0, log.value[at], np.nan).astype(np.float32), at >= 0


def _strings(table: Any, name: str) -> Any:
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    return table.column(name).cast(pa.string()).combine_chunks()
