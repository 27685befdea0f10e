"""Reads a training log: one row per sample and epoch, easy to write from any training loop.

LOG.parquet   uid (32 hex digits), epoch int, label int, and probabilities or logits list<float>[c]

A folder of such files is one log. All samples must have the same epochs, and each one label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from d2filter.algorithm import uids
from d2filter.algorithm.scores import registry as scores
from d2filter.algorithm.scores import training_dynamics
from d2filter.errors import InputError
from d2filter.formats import tables
from d2filter.formats import uid as uid_format
from d2filter.formats.addresses import file_name
from d2filter.formats.paths import FileInfo, Folder, absolute, place_of

_COLUMNS = ("uid", "epoch", "label")
_KINDS: tuple[tables.Kind, ...] = ("strings", "numbers", "numbers", "lists of numbers")
_OUTPUTS = ("probabilities", "logits")
_BLOCK = 4096  # samples scored at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One score of each of n samples, ascending by uid."""

    hi: uids.U64
    lo: uids.U64
    value: npt.NDArray[np.float32]


def files(url: str) -> tuple[Folder, list[FileInfo]]:
    """The parquet files of a log. Raises InputError when there is none."""
    place = absolute(url)
    if file_name(place).endswith(".parquet"):
        folder, name = place_of(place)
        info = folder.info(name)
        # a file is opened by the name in its URL
        found = [] if info is None else [replace(info, name=name)]
    else:
        folder = Folder(place)
        found = folder.files(".parquet") if folder.exists() else []
    if not found:
        raise InputError(f"training-log {url} is neither a .parquet file nor a folder of them")
    return folder, found


def score(url: str, name: str) -> Scored:
    """A score that needs a log, for every sample in a log. Memory: the whole log.

    Raises InputError, naming file and uid, for a log that cannot be read.
    """
    folder, found = files(url)
    parts = [_read(folder, info.name) for info in found]
    widths = {part[4].shape[1] for part in parts}
    if len(widths) > 1:
        raise InputError(f"training-log {url}: files disagree on the number of classes: {widths}")
    hi, lo, epoch, label, p = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((epoch, lo, hi))
    hi, lo, epoch, label = hi[order], lo[order], epoch[order], label[order]
    new = np.ones(hi.size, np.bool_)
    new[1:] = (hi[1:] != hi[:-1]) | (lo[1:] != lo[:-1])
    begins = np.flatnonzero(new)
    epochs = np.unique(epoch)
    _refuse(
        url, hi, lo, begins, np.diff(np.append(begins, hi.size)) != epochs.size,
        f"does not have one row for each of the {epochs.size} epochs",
    )  # fmt: skip
    epoch, label = epoch.reshape(-1, epochs.size), label.reshape(-1, epochs.size)
    _refuse(url, hi, lo, begins, (epoch != epochs).any(axis=1), "has an epoch twice")
    _refuse(url, hi, lo, begins, (label != label[:, :1]).any(axis=1), "has more than one label")
    outside = (label[:, 0] < 0) | (label[:, 0] >= p.shape[1])
    _refuse(url, hi, lo, begins, outside, f"has a label outside 0 to {p.shape[1] - 1}")
    order = order.reshape(-1, epochs.size)
    compute = scores.function_of(name)
    value = np.concatenate(
        [
            compute(p[order[at : at + _BLOCK]], label[at : at + _BLOCK, 0])
            for at in range(0, begins.size, _BLOCK)
        ]
    )
    return Scored(hi=hi[begins], lo=lo[begins], value=value)


def _read(folder: Folder, name: str) -> tuple[Any, ...]:
    """uid_hi, uid_lo, epoch, label and probabilities (rows, c) of one file."""
    where = folder.where(name)
    with tables.open_table(folder, name, encoded=["uid"]) as parquet:
        there = parquet.schema_arrow.names
        outputs = [column for column in _OUTPUTS if column in there]
        missing = [column for column in _COLUMNS if column not in there]
        if missing or not outputs:
            lacking = [*missing, *([] if outputs else [" or ".join(_OUTPUTS)])]
            raise InputError(
                f"{where} has no column {' and no '.join(lacking)}; it has {tables.listed(there)}"
                f"{tables.nearest(lacking[0], there)}"
            )
        tables.check_types(parquet, where, dict(zip((*_COLUMNS, outputs[0]), _KINDS, strict=True)))
        tables.check_size(folder, name, [*_COLUMNS, outputs[0]])
        table = tables.read_checked(parquet, [*_COLUMNS, outputs[0]])
    if not table.num_rows:
        raise InputError(f"{where} has no rows: a log has one for each sample and epoch")
    for column in ("epoch", "label"):
        if table.column(column).null_count:
            raise InputError(f"{where}: {column} is null in {table.column(column).null_count} rows")
    try:
        hi, lo, known = uid_format.parse(table.column("uid"))
        lists = table.column(outputs[0]).combine_chunks()
        flat = lists.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
        epoch, label = (
            table.column(column).cast(pa.int64()).to_numpy() for column in ("epoch", "label")
        )
    except (pa.ArrowException, AttributeError, ValueError) as error:
        raise InputError(
            f"{where}: uid must hold strings, epoch and label whole numbers, {outputs[0]} lists of "
            f"numbers: {tables.first_line(error)}"
        ) from error
    if not known.all():
        row = int(np.flatnonzero(~known)[0])
        raise InputError(
            f"{where}: {tables.quoted(table.column('uid')[row])} in row {row} is not a uid, "
            "expected 32 hex digits"
        )
    width = flat.size // table.num_rows
    if width * table.num_rows != flat.size or width == 0 or _ragged(lists, width):
        raise InputError(f"{where}: lists in {outputs[0]} are not all of one length above 0")
    p = flat.reshape(-1, width)
    if not np.isfinite(p).all():
        raise InputError(f"{where}: {outputs[0]} holds values that are not finite")
    return hi, lo, epoch, label, training_dynamics.softmax(p) if outputs[0] == "logits" else p


def _ragged(lists: Any, width: int) -> bool:
    import pyarrow.compute as pc

    lengths = pc.list_value_length(lists)
    return bool(lengths.null_count) or not pc.all(pc.equal(lengths, width)).as_py()


def _refuse(url: str, hi: uids.U64, lo: uids.U64, begins: Any, broken: Any, what: str) -> None:
    rows = np.flatnonzero(broken)
    if rows.size:
        at = begins[rows[0]]
        raise InputError(
            f"training-log {url}: uid {int(hi[at]):016x}{int(lo[at]):016x} {what} "
            f"({rows.size} such uids)"
        )
