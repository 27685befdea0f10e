"""bad_samples.parquet: every sample that was read and not ranked, with the reason.

Tasks publish their parts under ledger/<stage>/; `collect` joins them when a stage is done.

See docs/files.md#ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from d2filter.formats import tables
from d2filter.formats.paths import Folder
from d2filter.text import redacted, scrubbed

BAD_SAMPLES = "bad_samples.parquet"
_SCHEMA = pa.schema(
    [(n, pa.string()) for n in ("shard", "key", "uid", "stage", "status", "reason", "message")]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One sample that is not ranked."""

    stage: str
    status: Literal["bad", "duplicate", "outside"]
    reason: str
    """one of few words, to count by"""
    message: str = ""
    """where it was found, or the decoder's message"""
    shard: str | None = None
    key: str | None = None
    uid: str | None = None


def outside(stage: str, reason: str, shard: Any, key: Any, uid: Sequence[str]) -> Any:
    """Entries of samples outside of the subset, as a table, because there may be millions.

    shard, key: (n,) arrow string arrays; uid: (n,).
    """
    coded = shard.dictionary_encode()
    known = [_recorded("shard", url) for url in coded.dictionary.to_pylist()]
    columns = {
        "shard": pa.array(known, pa.string()).take(coded.indices),
        "key": key,
        "uid": pa.array(uid, pa.string()),
        "stage": pa.repeat(stage, len(uid)),
        "status": pa.repeat("outside", len(uid)),
        "reason": pa.repeat(reason, len(uid)),
        "message": pa.nulls(len(uid), pa.string()),
    }
    return pa.table(columns, schema=_SCHEMA)


def publish_entries(
    folder: Folder, stage: str, task: str, entries: Sequence[Entry], more: Sequence[Any] = ()
) -> None:
    """Write one task's part; an empty part is written too, so that a rerun replaces an old one.
    more: tables of `outside`.
    """
    columns = {
        name: pa.array([_recorded(name, getattr(e, name)) for e in entries], pa.string())
        for name in _SCHEMA.names
    }
    with folder.publish(f"ledger/{stage}/{task}.parquet") as path:
        pq.write_table(pa.concat_tables([pa.table(columns, schema=_SCHEMA), *more]), path)


def _recorded(column: str, text: str | None) -> str | None:
    """Without passwords of URLs."""
    if text is None or column not in ("shard", "message"):
        return text
    return redacted(text) if column == "shard" else scrubbed(text)


def collect(folder: Folder, stages: Sequence[str]) -> None:
    """Join the parts of `stages`, in order of stage and task, to bad_samples.parquet."""
    with (
        folder.publish(BAD_SAMPLES) as path,
        pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer,
    ):
        for stage in stages:
            parts = folder.sub(f"ledger/{stage}")
            for name in parts.names(".parquet"):
                writer.write_table(tables.read_table(parts, name).cast(_SCHEMA))


def count_reasons(folder: Folder) -> dict[str, dict[str, int]]:
    """{status: {reason: samples}} of a run's bad_samples.parquet, most frequent first."""
    table = tables.read_table(folder, BAD_SAMPLES, ["status", "reason"])
    counts: dict[str, dict[str, int]] = {}
    grouped = table.group_by(["status", "reason"]).aggregate([([], "count_all")])
    rows = sorted(grouped.to_pylist(), key=lambda r: (-r["count_all"], r["reason"]))
    for row in rows:
        counts.setdefault(row["status"], {})[row["reason"]] = row["count_all"]
    return counts
