"""Metadata in DataComp's layout: NAME.parquet with its NAME.npz, row by row (DESIGN §6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2filter.algorithm import features, scores, uids
from d2filter.config import CatalogConfig
from d2filter.errors import InputError
from d2filter.formats import npz, tables, traininglog
from d2filter.formats import uid as uid_format
from d2filter.formats.addresses import file_name
from d2filter.formats.paths import Checksums, FileInfo, Folder, absolute, place_of

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

# of one text column of one file, each row counted
_MAX_TEXT_BYTES = 1 << 30
_SHOWN = 300
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
    """Files that a score needs beside the metadata, by names that no file of that has. Raises
    InputError for one that is not there.
    """
    if config.training_log:
        place, logged = traininglog.files(config.training_log)
        return [replace(i, name=f"training-log/{file_name(place.where(i.name))}") for i in logged]
    if not config.score_target:
        return []
    folder, name = place_of(absolute(config.score_target))
    info = folder.info(name)
    if info is None or not info.name.endswith((".npy", ".npz")):
        raise InputError(f"score-target {config.score_target} is no .npy or .npz file")
    return [replace(info, name=f"score-target/{info.name}")]


def read_target(url: str, arch: str) -> npt.NDArray[Any]:
    """A target set: .npy (t, d), or the ARCH_img of an .npz. Raises InputError."""
    folder, name = place_of(absolute(url))
    if file_name(url).endswith(".npz"):
        return npz.read_arrays(folder, name, [f"{arch}_img"], "")[f"{arch}_img"]
    return npz.read_array(folder, name, f"score-target {url}")


def read_pair(
    folder: Folder, name: str, config: CatalogConfig, outside: Outside | None = None
) -> Rows:
    """Read one pair: ids, difficulty, fixed features, and what is wrong with each row. The
    difficulty of a score that needs the pool is 0 for now.

    Raises InputError, naming the file, for anything that concerns the pair as a whole.
    """
    try:
        # numpy announces the conversion of a signaling NaN; that row is judged like other NaNs
        with np.errstate(invalid="ignore", over="ignore"):
            return _read_pair(folder, name, config, outside or Outside())
    except (pa.ArrowException, ValueError, KeyError, MemoryError) as error:
        # arrow and numpy have many ways to say that a file is not what its name promises
        raise InputError(
            f"{folder.where(name)}.parquet and .npz are no usable pair, fetch them again: "
            f"{tables.first_line(error)}"
        ) from error


def _read_pair(folder: Folder, name: str, config: CatalogConfig, outside: Outside) -> Rows:
    there, rows = _columns(folder, f"{name}.parquet", config)
    image, text = f"{config.arch}_img", f"{config.arch}_txt"
    wanted = list(config.feature_keys) or {
        "image|text": [image, text], "image": [image], "text": [text],
    }[config.feature_type]  # fmt: skip
    score_name = config.score_name
    has_score = score_name in there and not config.score
    if config.score_column and not has_score:
        raise InputError(
            f"{folder.where(name)}.parquet has no column {config.score_column!r}; "
            f"it has {tables.listed(there)}: choose one with --score-column"
        )
    needed = wanted
    if config.needs == "target":
        needed = [*wanted, image]
    elif not has_score and config.needs in ("", "pair"):
        needed = [*wanted, image, text]
    needed = list(dict.fromkeys(needed))
    # the parquet's rows last: what two files agree on is not the claim of one
    arrays = npz.read_arrays(folder, f"{name}.npz", needed, score_name, rows)
    table = _read_table(folder, f"{name}.parquet", config, there)
    where = folder.where(f"{name}.parquet")
    if table.num_rows != rows:
        raise InputError(f"{where} has {table.num_rows} rows and its footer says {rows}")
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
        widths = (arrays[image].shape[1], arrays[text].shape[1])
        if widths[0] != widths[1]:
            raise InputError(
                f"{where.removesuffix('.parquet')}.npz: {image} has dimension {widths[0]} and "
                f"{text} {widths[1]}: a score needs both in one space, or name a --score-column"
            )
        difficulty = scores.clip_score(arrays[image], arrays[text])
    difficulty = scores.difficulty(difficulty, config.first)
    group = _strings(table, config.group_column, where)
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
        shard=_strings(table, "shard", where),
        key=_strings(table, "key", where),
        group=group,
    )


def publish_pair(
    folder: Folder,
    name: str,
    arch: str,
    rows: Sequence[dict[str, Any]],
    image: npt.NDArray[np.float16],
    text: npt.NDArray[np.float16],
) -> Checksums:
    """Write what `embed` made of one shard; the npz first, for a parquet is what readers look for.

    rows: one dict a sample with EMBED_SCHEMA's fields. image, text: (n, d) float16 unit rows.
    """
    score = scores.clip_score(image, text)
    table = pa.Table.from_pylist(list(rows), schema=EMBED_SCHEMA)
    table = table.append_column(f"clip_{arch}_similarity_score", pa.array(score, pa.float32()))
    sums: Checksums = {}
    with folder.publish(f"{name}.npz", sums) as path, path.open("wb") as stream:
        arrays: dict[str, Any] = {f"{arch}_img": image, f"{arch}_txt": text}
        np.savez(stream, **arrays)
    with folder.publish(f"{name}.parquet", sums) as path:
        pq.write_table(table, path, compression="zstd")
    return sums


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
    """A string of an arrow column for the ledger, cut if long, whatever bytes it holds."""
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    if not value.is_valid:
        return None
    begin: bytes = value.as_buffer()[: 4 * _SHOWN].to_pybytes()
    return begin.decode("utf-8", "backslashreplace")[:_SHOWN]


def _columns(folder: Folder, name: str, config: CatalogConfig) -> tuple[list[str], int]:
    """Columns and rows of a table, from its footer."""
    with tables.open_table(folder, name) as parquet:
        there: list[str] = parquet.schema_arrow.names
        if "uid" not in there:
            listed = tables.listed(there)
            raise InputError(f"{folder.where(name)} has no column uid; it has {listed}")
        if config.group_column and config.group_column not in there:
            raise InputError(
                f"{folder.where(name)} has no column {config.group_column!r}; it has "
                f"{tables.listed(there)}: choose one with --group-column"
            )
        return there, parquet.metadata.num_rows


def _read_table(folder: Folder, name: str, config: CatalogConfig, there: Sequence[str]) -> Any:
    wanted = ("uid", config.score_name, "shard", "key", config.group_column)
    columns = [c for c in dict.fromkeys(wanted) if c in there]
    with tables.open_table(folder, name, encoded=columns) as parquet:
        return tables.read_checked(parquet, columns)


def _as_float32(column: Any, where: str) -> npt.NDArray[np.float32]:
    """A column of numbers, or of strings that spell them, as float32; null becomes NaN."""
    try:
        values = [_as_float64(chunk) for chunk in column.chunks]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{where} must hold numbers: {tables.first_line(error)}") from error
    with np.errstate(over="ignore"):
        return np.concatenate([np.empty(0), *values]).astype(np.float32)


def _as_float64(chunk: Any) -> npt.NDArray[np.float64]:
    if pa.types.is_dictionary(chunk.type):
        # never decoded: see tables.open_table
        values = np.append(_as_float64(chunk.dictionary), np.nan)
        rows = pc.fill_null(chunk.indices.cast(pa.int64()), len(values) - 1).to_numpy()
        taken: npt.NDArray[np.float64] = values[rows]
        return taken
    if not pa.types.is_float16(chunk.type):  # arrow 15 does not cast them
        chunk = chunk.cast(pa.float64(), safe=False)
    return np.asarray(chunk.to_numpy(zero_copy_only=False), np.float64)


def _logged(
    outside: Outside, hi: uids.U64, lo: uids.U64
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Scores of a training log, NaN where it has none, and whether it has one."""
    log = outside.log
    assert log is not None
    at = uids.positions(log.hi, log.lo, hi, lo)
    return np.where(at >= 0, log.value[at], np.nan).astype(np.float32), at >= 0


def _strings(table: Any, name: str, where: str) -> Any:
    """A column as valid UTF-8, null where there is none. Raises InputError for too much text."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    column = table.column(name)
    size = sum(_text_bytes(chunk) for chunk in column.chunks)
    if size > _MAX_TEXT_BYTES:
        raise InputError(
            f"{where}: column {name} holds {size} bytes of text, at most {_MAX_TEXT_BYTES} are "
            "read: split the file"
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        text = column.cast(pa.string())
        text.validate(full=True)
    except pa.ArrowInvalid:
        if column.type not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
            raise
        raw = column.cast(pa.large_binary()).to_pylist()
        shown_bytes = [None if v is None else v.decode("utf-8", "backslashreplace") for v in raw]
        text = pa.chunked_array([pa.array(shown_bytes, pa.string())])
    return text.combine_chunks()


def _text_bytes(chunk: Any) -> int:
    """Bytes of all rows of a dictionary of strings; 0 for what is not repeated."""
    if not pa.types.is_dictionary(chunk.type):
        return 0
    length = pc.binary_length(chunk.dictionary.cast(pa.large_binary()))
    return int(pc.sum(pc.take(length, chunk.indices)).as_py() or 0)
