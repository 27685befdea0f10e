"""Metadata in DataComp's layout: NAME.parquet with NAME.npz, the same rows in both.

See docs/files.md#metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.algorithm import features, uids
from d2filter.algorithm.scores import registry as scores
from d2filter.errors import InputError
from d2filter.formats import columns, npz, scored, tables
from d2filter.formats import side_inputs as outside_format
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Checksums, FileInfo, Folder
from d2filter.formats.reading import CatalogConfig
from d2filter.formats.side_inputs import Outside
from d2filter.text import redacted

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
    "no row in the score file",
    "outside of the subset",
)
OUTSIDE = REASONS.index("outside of the subset")

_FOLDERS_LOOKED_AT = 100
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
class MetadataRows:
    """The n rows of one pair, with features and validity."""

    hi: uids.U64
    lo: uids.U64
    reason: npt.NDArray[np.uint8]
    """(n,) index into REASONS; 0 for a valid row"""
    difficulty: npt.NDArray[np.float32]
    terms: npt.NDArray[np.float32] | None
    """(n, terms) if the score needs the whole pool (`formats/scored.py`); else None"""
    features: features.F16
    """(n, d) fixed float16 features"""
    are_pairs: bool
    """whether the features are an image and a text embedding of one width"""
    has_score: bool
    """whether the file brought the score; computed otherwise"""
    merged: tuple[int, int]
    """distinct scores in the file that equal another one as float32, and all distinct ones; (0, 0)
    where all have that precision"""
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
    tables_ = {info.name.removesuffix(".parquet"): info for info in folder.files(".parquet")}
    arrays = {info.name.removesuffix(".npz"): info for info in folder.files(".npz")}
    if not tables_:
        others = left_out(folder)
        raise InputError(
            f"metadata folder {folder.url} holds no .parquet file: --metadata-dir takes a folder "
            f"of NAME.parquet + NAME.npz pairs{f'; {others}' if others else ''}"
        )
    for mine, theirs, suffix, lacking, what in (
        (tables_, arrays, "parquet", "npz", "embeddings"),
        (arrays, tables_, "npz", "parquet", "table"),
    ):
        alone = sorted(mine.keys() - theirs.keys())
        if alone:
            more = f" (and {len(alone) - 1:,} more such files)" if len(alone) > 1 else ""
            raise InputError(
                f"{folder.where(f'{alone[0]}.{suffix}')} has no {alone[0]}.{lacking} beside it"
                f"{more}: download its {what} or remove the {suffix} file"
            )
    names = list(tables_)
    pairs = [Pair(name, tables_[name].size + arrays[name].size) for name in names]
    return pairs, [info for name in names for info in (tables_[name], arrays[name])]


def left_out(folder: Folder) -> str:
    """One line about files in a metadata folder that are not read: other files, and pairs in
    subfolders. Empty if there are none; names that begin with . or _ do not count.
    """
    others = [
        name
        for name in folder.names()
        if not name.endswith((".parquet", ".npz")) and name[0] != "_"
    ]
    skipped = []
    if others:
        skipped.append(f"{len(others):,} files that are no pairs ({_some(others)})")
    within = []
    pairs = looked = 0
    waiting = folder.folders()
    while waiting and looked < _FOLDERS_LOOKED_AT:
        name = waiting.pop(0)
        looked += 1
        inner = folder.sub(name)
        found = set(map(_stem, inner.names(".parquet"))) & set(map(_stem, inner.names(".npz")))
        if found:
            within.append(name)
            pairs += len(found)
        waiting += [f"{name}/{deeper}" for deeper in inner.folders()]
    if within:
        skipped.append(f"{pairs:,} pairs in {len(within):,} folders inside it ({_some(within)})")
    if not skipped:
        return ""
    upper = any(name.lower().endswith((".parquet", ".npz")) for name in others)
    return (
        f"not read of {redacted(folder.url)}: {' and '.join(skipped)}; only pairs right inside "
        "it are" + (", with their suffixes in lower case" if upper else "")
    )


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _some(names: Sequence[str]) -> str:
    return tables.listed(names[:3]) + (", …" if len(names) > 3 else "")


def check_score(source: Folder, pairs: Sequence[Pair], config: CatalogConfig) -> None:
    """Raise UsageError for a score that names no column, by the first pair, if there is one."""
    if pairs and config.terms:
        name = f"{pairs[0].name}.parquet"
        with tables.open_table(source, name) as parquet:
            there = parquet.schema_arrow.names
        outside_format.check_terms(config, source.where(name), there)
    elif config.score_file:
        outside_format.file_columns(config)


def read_pair(
    folder: Folder, name: str, config: CatalogConfig, outside: Outside | None = None
) -> MetadataRows:
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
            f"{folder.where(name)}.parquet and .npz are not a usable pair, fetch them again: "
            f"{tables.first_line(error)}"
        ) from error


def _read_pair(folder: Folder, name: str, config: CatalogConfig, outside: Outside) -> MetadataRows:
    terms = outside.terms(config)
    score_columns = scored.columns_of(terms, outside)
    there, rows = _columns(folder, f"{name}.parquet", config, score_columns)
    image, text = f"{config.arch}_img", f"{config.arch}_txt"
    wanted = list(config.feature_keys) or {
        "image|text": [image, text], "image": [image], "text": [text],
    }[config.feature_type]  # fmt: skip
    score_name = config.score_name
    has_score = score_name in there and not terms
    from_pair = not terms and not has_score
    for_score = [image, text] if from_pair else scored.arrays_of(config, terms)
    chosen = "--feature-keys" if config.feature_keys else "--arch"
    needed = {key: npz.Need("the features", chosen) for key in wanted}
    why = f"the score, as there is no column {score_name}" if from_pair else config.score
    for key in for_score:
        both = f"the features and for {why}" if key in needed else why
        needed[key] = npz.Need(both, chosen if key in needed else "--arch")
    # the parquet's rows last: what two files agree on is not the claim of one
    arrays = npz.read_arrays(folder, f"{name}.npz", needed, rows)
    table = _read_table(folder, f"{name}.parquet", list(_kinds(config, there, score_columns)))
    where = folder.where(f"{name}.parquet")
    if table.num_rows != rows:
        raise InputError(f"{where} has {table.num_rows} rows and its footer lists {rows}")
    everyone = np.ones(table.num_rows, np.bool_)
    try:
        hi, lo, known = uid_format.parse(table.column("uid"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{where}: column uid must hold strings: {error}") from error
    by_terms = None
    merged = (0, 0)
    if terms:
        by_terms = scored.of_terms(config, terms, outside, table, arrays, (hi, lo), where)
        difficulty, merged = by_terms.difficulty, by_terms.merged
    elif has_score:
        column = table.column(score_name)
        difficulty, merged = columns.as_float32(column, f"{where}: column {score_name}")
    else:
        difficulty = scored.computed(scores.SCORES["clip_score"], config, outside, arrays, where)
    difficulty = scores.difficulty(difficulty, config.first)
    group = columns.strings(table, config.group_column, where)
    classed = everyone
    if config.group_column:
        classed = group.is_valid().to_numpy(zero_copy_only=False)
    fixed = features.fix([arrays[key] for key in wanted], normalize=config.normalize)
    by_kind = {{image: "image", text: "text"}.get(key, key): arrays[key] for key in arrays}
    lacking = {
        "malformed uid": ~known,
        "outside of the subset": ~_inside(outside, hi, lo),
        "no row in the training log": ~(everyone if by_terms is None else by_terms.logged),
        "no row in the score file": ~(everyone if by_terms is None else by_terms.listed),
        "no class": ~classed,
    }
    return MetadataRows(
        hi=hi,
        lo=lo,
        are_pairs=wanted == [image, text] and arrays[image].shape[1] == arrays[text].shape[1],
        has_score=has_score,
        merged=merged,
        reason=_judge(lacking, difficulty, by_kind, fixed),
        difficulty=difficulty,
        terms=None if by_terms is None else by_terms.terms,
        features=fixed,
        uid=table.column("uid"),
        shard=columns.strings(table, "shard", where),
        key=columns.strings(table, "key", where),
        group=group,
    )


def _inside(outside: Outside, hi: uids.U64, lo: uids.U64) -> npt.NDArray[np.bool_]:
    """Which uids are in the subset; all where there is none."""
    return np.ones(hi.size, np.bool_) if outside.within is None else outside.within.find(hi, lo)[0]


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
    lacking: dict[str, npt.NDArray[np.bool_]],
    difficulty: npt.NDArray[np.float32],
    by_kind: dict[str, npt.NDArray[Any]],
    fixed: features.F16,
) -> npt.NDArray[np.uint8]:
    """First thing that is wrong with each row, as an index into REASONS. lacking: reasons that
    come first, and the rows that they hold for.
    """
    reason = np.zeros(len(difficulty), np.uint8)

    def mark(rows: Any, text: str) -> None:
        reason[rows & (reason == 0)] = REASONS.index(text)

    for text, rows in lacking.items():
        mark(rows, text)
    for kind, array in by_kind.items():
        what = f"{kind} embedding" if kind in ("image", "text") else "embedding"
        mark(~np.isfinite(array).all(axis=1), f"non-finite {what}")
        mark(~array.any(axis=1), f"zero {what}")
    mark(np.isnan(difficulty), "score is NaN")
    mark(np.isinf(difficulty), "score is infinite")
    mark(~np.isfinite(fixed).all(axis=1), "features overflow float16")
    mark(~fixed.any(axis=1), "features vanish in float16")
    return reason


def _columns(
    folder: Folder, name: str, config: CatalogConfig, score_columns: Sequence[str]
) -> tuple[list[str], int]:
    """Columns and rows of a table, from its footer, which also judges those that will be read.
    score_columns: those that the score names.
    """
    where = folder.where(name)
    with tables.open_table(folder, name) as parquet:
        there: list[str] = parquet.schema_arrow.names
        for column, option in (
            ("uid", ""),
            (config.group_column, "--group-column"),
            ("" if config.score_file else config.score_column, "--score-column"),
        ):
            if column and column not in there:
                raise InputError(
                    f"{where} has no column {column if option == '' else repr(column)}"
                    f"{tables.nearest(column, there)}; it has {tables.listed(there)}"
                    + (f": choose one with {option}" if option else "")
                )
        for column in score_columns:
            if column not in there:
                raise scored.missing_column(where, column, there)
        tables.check_types(parquet, where, _kinds(config, there, score_columns))
        return there, parquet.metadata.num_rows


def _kinds(
    config: CatalogConfig, there: Sequence[str], score_columns: Sequence[str]
) -> dict[str, tables.Kind]:
    """The columns that are read of those that are there, and what they must hold."""
    wanted: dict[str, tables.Kind] = {
        config.group_column: "plain values",
        "shard": "plain values",
        "key": "plain values",
        "uid": "strings",
    }
    own = [] if config.score or config.score_file else [config.score_name]
    wanted.update(dict.fromkeys([*own, *score_columns], "numbers"))
    return {column: kind for column, kind in wanted.items() if column in there}


def _read_table(folder: Folder, name: str, columns: Sequence[str]) -> Any:
    with tables.open_table(folder, name, encoded=columns) as parquet:
        return tables.read_checked(parquet, columns)
