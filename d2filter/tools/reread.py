"""`verify --deep`: reads the input again and looks for every sample of it in the run's files.

For shards: their samples, in order, must be those of OUT/metadata and the ledger. For metadata:
each row must be in the catalog with the same bits, or in the ledger. Images are not embedded again.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from d2filter.algorithm import uids
from d2filter.errors import D2FilterError, InputError
from d2filter.formats import catalog, metadata, side_inputs, tables, webdataset
from d2filter.formats.paths import FileInfo, Folder
from d2filter.formats.reading import CatalogConfig
from d2filter.formats.runstate import RunState
from d2filter.tools import provenance

Breaches = list[str]


def shards(folder: Folder) -> Breaches:
    """Shards whose samples are not those that were embedded or recorded as bad."""
    out: Breaches = []
    embed = RunState(folder).done("embed")
    if embed is None:
        return out
    for name, url in provenance.shards(folder).items():
        shard = webdataset.Shard(url, FileInfo(name, *embed["inputs"][name]), name)
        try:
            different = _shard(folder, shard)
        except D2FilterError as error:
            different = str(error)
        if different:
            out.append(different)
    return out


def _shard(folder: Folder, shard: webdataset.Shard) -> str:
    """The first difference between a shard and its recorded samples."""
    embedded = folder.sub("metadata")
    rows: list[tuple[str, str]] = []
    if embedded.exists(f"{shard.name}.parquet"):
        table = tables.read_table(embedded, f"{shard.name}.parquet", ["key", "uid"])
        rows = list(zip(*(table.column(n).to_pylist() for n in ("key", "uid")), strict=True))
    recorded = tables.read_table(folder.sub("ledger/embed"), f"{shard.name}.parquet")
    bad = [(e["key"], e["reason"]) for e in recorded.to_pylist()]
    left = Counter(bad)
    lost = folder.read_json(f"completions/embed/{shard.name}.json")["lost"]
    place = 0
    now_lost = ""
    try:
        for sample in webdataset.read_samples(shard):
            if not sample.reason and place < len(rows) and rows[place] == (sample.key, sample.uid):
                place += 1
                continue
            # a picture is found broken when it is decoded
            reasons = [sample.reason] if sample.reason else [r for k, r in left if k == sample.key]
            found = next((r for r in reasons if left[sample.key, r] > 0), None)
            if found is None:
                return f"{shard.url}: sample {sample.key} was not read like this"
            left[sample.key, found] -= 1
    except webdataset.LostTail as error:
        now_lost = f"{shard.url}: {error}"
    if now_lost != lost:
        return f"{shard.url} reads otherwise: {now_lost or 'whole'}, was {lost or 'whole'}"
    if place < len(rows):
        return f"{shard.url}: {len(rows) - place} samples are missing now"
    gone = sum(left.values())
    return f"{shard.url}: {gone} samples of the ledger are missing now" if gone else ""


def rows(folder: Folder, known: catalog.Samples) -> Breaches:
    """Rows of the metadata that the catalog holds with other bits, or neither it nor the ledger.

    known: all samples of the catalog, ascending by uid.
    """
    record = RunState(folder).require("catalog")
    if "sources" not in record:
        return ["the catalog was made by an earlier d2filter, which did not record its input"]
    source = Folder(record["sources"]["metadata"])
    if not source.exists():
        return [f"{source.url} is not there: the input cannot be read again"]
    config = CatalogConfig.from_options(record["options"], record["sources"])
    with tempfile.TemporaryDirectory() as tables_beside:
        return _rows(folder, known, record, config, Folder(tables_beside))


def _rows(
    folder: Folder,
    known: catalog.Samples,
    record: dict[str, Any],
    config: CatalogConfig,
    tables_beside: Folder,
) -> Breaches:
    source = Folder(record["sources"]["metadata"])
    beside = side_inputs.load(config, tables_beside)
    repeated = _repeated(folder)
    claimed = np.zeros(len(known.hi), np.bool_)
    counts: Counter[str] = Counter()
    out: Breaches = []
    pairs, _ = metadata.list_pairs(source)
    for pair in pairs:
        try:
            read = metadata.read_pair(source, pair.name, config, beside)
        except InputError as error:
            out.append(str(error))
            continue
        counts["read"] += len(read.hi)
        good = np.flatnonzero(read.reason == 0)
        apart = int(np.count_nonzero(read.reason == metadata.OUTSIDE))
        counts["outside"] += apart
        counts["bad"] += len(read.hi) - good.size - apart
        at = uids.positions(known.hi, known.lo, read.hi[good], read.lo[good])
        same = at >= 0
        same[same] = (known.features[at[same]] == read.features[good[same]]).all(axis=1)
        if not config.waits:
            here = np.flatnonzero(same)
            same[here] = known.difficulty[at[here]] == _clipped(record, config, read)[good[here]]
        other = [r for r in good[~same].tolist() if _uid(read, r) not in repeated]
        if other:
            out.append(
                f"{source.where(pair.name)}: {len(other)} rows are not in the catalog as they are "
                f"here, row {other[0]} first"
            )
        claimed[at[same]] = True
    missing = int(np.count_nonzero(~claimed))
    if missing:
        out.append(f"{missing} samples of the catalog are not in the metadata any more")
    stats = record["stats"]["samples"]
    embedded = RunState(folder).done("embed") if record["upstream"] else None
    before = embedded["stats"]["samples"]["bad"] if embedded else 0
    expected = {
        "read": stats["read"] - before, "bad": stats["bad"] - before,
        "outside": stats.get("outside", 0),
    }  # fmt: skip
    out += [
        f"{counts[name]} rows of the metadata are {name}, {number} were"
        for name, number in expected.items()
        if counts[name] != number
    ]
    return out


def _clipped(
    record: dict[str, Any], config: CatalogConfig, read: metadata.MetadataRows
) -> npt.NDArray[np.float32]:
    """Difficulties as the catalog contains them: clipped if `--clip-scores` was given."""
    recorded = record["stats"].get("clipped")
    if recorded is None:
        return read.difficulty
    low, high = sorted(config.raw(recorded[end]) for end in ("from", "to"))
    return np.clip(read.difficulty, np.float32(low), np.float32(high))


def _repeated(folder: Folder) -> set[str]:
    """uids of which some rows were left out."""
    table: Any = tables.read_table(folder, "bad_samples.parquet", ["uid", "status"])
    both = zip(table.column("uid").to_pylist(), table.column("status").to_pylist(), strict=True)
    return {uid for uid, status in both if status == "duplicate"}


def _uid(read: metadata.MetadataRows, row: int) -> str:
    hi: npt.NDArray[np.uint64] = read.hi
    return f"{int(hi[row]):016x}{int(read.lo[row]):016x}"
