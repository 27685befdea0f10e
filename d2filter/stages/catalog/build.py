"""Stage catalog: metadata → valid samples with distinct uids, sorted by uid.

An external sort in two passes. The first pass reads groups of metadata files, checks the rows, and
writes each group as a run sorted by uid. The second pass merges one range of uids of all runs into
one part, and keeps one sample of each repeated uid. The ranges are quantiles of the uids seen in
the first pass, so that parts have about equal sizes for any distribution of uids. Memory: a group
of files in the first pass, a part in the second.

See docs/files.md#catalog.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from d2filter.algorithm import sizes, uids
from d2filter.algorithm.scores import mismatched as pairs_of
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Figures, Report
from d2filter.errors import InputError
from d2filter.formats import catalog, content_hash, ledger, metadata, tables
from d2filter.formats import side_inputs as beside
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.reading import CatalogConfig
from d2filter.formats.runstate import RunState, digest
from d2filter.stages.catalog import clip_scores, pool_scores
from d2filter.stages.catalog import side_inputs as prepare_side_inputs
from d2filter.stages.graph.train import sample_by_hash


def build(
    steps: StageRun, source: Folder, pairs: Sequence[metadata.Pair], config: CatalogConfig
) -> Figures:
    """Run both passes; returns the stage's figures. Raises InputError when no sample is valid.

    The memory of a task bounds groups and parts; 0 for the usual sizes.
    """
    out, memory = steps.out, steps.memory
    groups = grouped(pairs, sizes.catalog_group(memory))
    parts = sizes.catalog_parts(sum(pair.size for pair in pairs), memory)
    split = {"groups": [len(g) for g in groups], "parts": parts}
    cut = prepare_side_inputs.cuts(config, memory)
    split.update({"tables": cut} if cut else {})
    RunState(out).set_task_split("catalog", split)
    # with other memory the same task name means another group of files
    steps.fingerprint = digest([steps.fingerprint, split])
    held = beside.all_contents(config)
    joined = prepare_side_inputs.prepare(steps, config, cut)
    runs = [f"{number:05d}" for number in range(len(groups))]
    read = steps.each(
        "catalog",
        read_group,
        [
            {"names": [pair.name for pair in group], "run_name": run}
            for group, run in zip(groups, runs, strict=True)
        ],
        {"source": source, "config": config},
        name="read",
    )
    reasons, dimension = _require_samples(source, config, read)
    marks = [mark for figures in read for mark in figures["marks"]]
    merged = steps.each(
        "merge",
        merge_range,
        [
            {"number": number, "low": low, "high": high}
            for number, (low, high) in enumerate(_ranges(marks, parts))
        ],
        {"runs": runs},
    )
    out.sub("catalog").remove("runs")
    prepare_side_inputs.tidy(out)
    if config.waits:
        scored = pool_scores.build(steps, config)
        merged = [{**a, **b} for a, b in zip(merged, scored, strict=True)]
    described = config.describe(read[0]["has_score"], read[0]["file_column"])
    clipped = clip_scores.clip(steps, config, merged, described["name"])
    matched: Figures = {}
    if all(figures["are_pairs"] for figures in read):
        found = steps.alone("pairs", match_pairs, {})
        matched = {"pairs": found["pairs"]} if found["pairs"] else {}
    ranked = sum(figures["ranked"] for figures in merged)
    left_out = {"outside": sum(f["outside"] for f in read)} if config.within else {}
    return {
        "samples": {
            "read": sum(figures["read"] for figures in read),
            "ranked": ranked,
            "bad": sum(reasons.values()),
            "duplicate": sum(figures["duplicate"] for figures in merged),
            **left_out,
        },
        "bad_reasons": dict(reasons.most_common()),
        **({"uids_of_tables": joined} if joined else {}),
        "contents": {**held, **{n: found for f in read for n, found in f["contents"].items()}},
        "dimension": dimension,
        "score": described,
        "parts": len(merged),
        **clipped.figures,
        **matched,
        "alerts": [
            *_alerts(source, read, described["name"]),
            *prepare_side_inputs.alerts(joined, ranked),
            *clipped.alerts,
        ],
    }


def _require_samples(
    source: Folder, config: CatalogConfig, read: Sequence[Figures]
) -> tuple[Counter[str], int]:
    """Bad rows by reason, and the dimension of the embeddings. Raises InputError when files do not
    fit together, or no row is valid. read: figures of `read_group`.
    """
    kinds = {figures["has_score"]: figures["first_file"] for figures in read}
    if len(kinds) > 1:
        raise _mixed_scores(source, config, kinds[True], kinds[False])
    widths = {figures["dimension"]: figures["first_file"] for figures in read}
    if len(widths) > 1:
        raise InputError(
            f"{source.url}: files disagree on the dimension of the {config.arch} embeddings: "
            + ", ".join(f"{name}.npz has {width}" for width, name in sorted(widths.items()))
            + "; use files of one model"
        )
    reasons: Counter[str] = sum((Counter(figures["reasons"]) for figures in read), Counter())
    total = sum(figures["read"] for figures in read)
    apart = Counter({metadata.REASONS[metadata.OUTSIDE]: sum(f["outside"] for f in read)})
    if total == sum((reasons + apart).values()):
        what = ", ".join(f"{count} {reason}" for reason, count in (reasons + apart).most_common(3))
        raise InputError(
            f"{source.url}: none of {total} rows is a valid sample ({what or 'no rows'})"
        )
    return reasons, next(iter(widths))


def read_group(
    *,
    report: Report,
    out: Folder,
    source: Folder,
    names: Sequence[str],
    run_name: str,
    config: CatalogConfig,
) -> Figures:
    """Pass one: some metadata files → one run of valid rows, and ledger entries for the rest."""
    parts: list[catalog.Samples] = []
    entries: list[ledger.Entry] = []
    left_out: list[Any] = []
    reasons: Counter[str] = Counter()
    first: metadata.MetadataRows | None = None
    read = 0
    merged = [0, 0]
    tables_beside = prepare_side_inputs.ready(out, config)
    held: dict[str, str] = {}
    for name in names:
        before = _contents(source, name)
        rows = metadata.read_pair(source, name, config, tables_beside)
        if first is None:
            first = rows
        if first.has_score != rows.has_score:
            having, lacking = (name, names[0]) if rows.has_score else (names[0], name)
            raise _mixed_scores(source, config, having, lacking)
        if first.features.shape[1] != rows.features.shape[1]:
            raise InputError(
                f"{source.where(name)}.npz has features of dimension {rows.features.shape[1]}, "
                f"{names[0]}.npz of {first.features.shape[1]}: use files of one model"
            )
        merged = [a + b for a, b in zip(merged, rows.merged, strict=True)]
        sound = np.flatnonzero(rows.reason == 0)
        apart = np.flatnonzero(rows.reason == metadata.OUTSIDE)
        if apart.size:
            left_out.append(_outside(rows, apart))
        for row in np.flatnonzero((rows.reason > 0) & (rows.reason != metadata.OUTSIDE)).tolist():
            reason = metadata.REASONS[rows.reason[row]]
            reasons[reason] += 1
            entries.append(
                ledger.Entry(
                    stage="catalog",
                    status="bad",
                    reason=reason,
                    message=_found(source.where(f"{name}.parquet"), rows, row),
                    shard=rows.shard[row].as_py(),
                    key=rows.key[row].as_py(),
                    uid=tables.shown(rows.uid[row]),
                )
            )
        good = catalog.Samples(
            hi=rows.hi,
            lo=rows.lo,
            difficulty=rows.difficulty,
            features=rows.features,
            shard=rows.shard,
            key=rows.key,
            group=rows.group,
            terms=rows.terms,
        )
        parts.append(good.take(sound) if sound.size < rows.reason.size else good)
        for file, content in _contents(source, name).items():
            if content != before[file]:
                raise InputError(
                    f"{source.where(file)} changed while it was read: run the same command again "
                    "when nothing writes to it any more"
                )
        held.update(before)
        read += len(rows.hi)
        report(len(rows.hi))
    samples = catalog.concatenate(parts)
    marks = catalog.publish_run(out.sub("catalog"), run_name, samples)
    ledger.publish_entries(out, "catalog", f"read-{run_name}", entries, left_out)
    scored = tables_beside.scored
    return {
        "read": read,
        "reasons": dict(reasons),
        "outside": sum(len(table) for table in left_out),
        "file_column": scored.columns[0] if scored is not None and not config.score else "",
        "dimension": samples.features.shape[1],
        "first_file": names[0],
        "has_score": first is not None and first.has_score,
        "are_pairs": first is not None and first.are_pairs,
        "merged": merged,
        "marks": marks,
        "contents": held,
    }


def _contents(source: Folder, name: str) -> dict[str, str]:
    """A hash of the content of each of the two files of a pair."""
    return {file: content_hash.of(source, file) for file in (f"{name}.parquet", f"{name}.npz")}


def _found(where: str, rows: metadata.MetadataRows, row: int) -> str:
    """Where a bad row was found, and its value if it is no uid."""
    message = f"{where} row {row}"
    if metadata.REASONS[rows.reason[row]] == "malformed uid":
        message += f": {tables.quoted(rows.uid[row])} is not 32 hex digits"
    return message


def _outside(rows: metadata.MetadataRows, apart: npt.NDArray[np.int64]) -> Any:
    """Ledger entries of rows that are not in the subset."""
    index = pa.array(apart)
    return ledger.outside(
        "catalog", metadata.REASONS[metadata.OUTSIDE], rows.shard.take(index),
        rows.key.take(index), uid_format.to_hex(rows.hi[apart], rows.lo[apart]),
    )  # fmt: skip


def merge_range(
    *, report: Report, out: Folder, runs: Sequence[str], number: int, low: str, high: str
) -> Figures:
    """Pass two: the uids from `low` to below `high` of all runs → one part without repeats."""
    folder = out.sub("catalog")
    everything = catalog.concatenate([catalog.read_range(folder, run, low, high) for run in runs])
    stays, repeats = distinct(everything)
    entries = [
        ledger.Entry(
            stage="catalog",
            status="duplicate",
            reason="repeated uid",
            shard=everything.shard[row].as_py(),
            key=everything.key[row].as_py(),
            uid=f"{int(everything.hi[row]):016x}{int(everything.lo[row]):016x}",
        )
        for row in repeats.tolist()
    ]
    samples = everything.take(stays)
    sums = catalog.publish_part(folder, number, samples)
    if samples.terms is not None:
        pool_scores.write_terms(folder, number, samples.terms)
    ledger.publish_entries(out, "catalog", f"merge-{number:05d}", entries)
    report(len(everything.hi))
    return {
        **clip_scores.part_figures(samples.hi, samples.lo, samples.difficulty),
        "duplicate": repeats.size,
        "checksums": sums,
    }


def match_pairs(*, report: Report, out: Folder) -> Figures:
    """Task: how many of some pairs match no better than random ones, see
    `algorithm/scores/mismatched.py`.
    """
    layout = catalog.layout(out.sub("catalog"))
    salt = uids.SALT_PAIRS
    rows = layout.gather(sample_by_hash(layout, {salt: pairs_of.SAMPLE}, 0)[salt])
    report(layout.total)
    return {"pairs": pairs_of.judged(rows)}


def distinct(
    samples: catalog.Samples,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows that stay, ascending by uid, and rows whose uid is repeated, each int64.

    Of rows with one uid, the one with the smallest blake2b of (feature bytes, score bits) stays; of
    rows that are equal in those, the one whose shard, key and class sort first.
    """
    order = uids.ascending(samples.hi, samples.lo)
    hi, lo = samples.hi[order], samples.lo[order]
    begins = np.flatnonzero(~uids.repeats(hi, lo))
    ends = np.append(begins[1:], order.size)
    stays = order[begins]
    for at in np.flatnonzero(ends - begins > 1).tolist():
        rows = order[begins[at] : ends[at]].tolist()
        stays[at] = min(rows, key=lambda row: _precedence(samples, row))
    leaves = np.ones(order.size, np.bool_)
    leaves[stays] = False
    return stays, order[leaves[order]]


def _precedence(samples: catalog.Samples, row: int) -> tuple[Any, ...]:
    digest = hashlib.blake2b(samples.features[row].tobytes(), digest_size=16)
    digest.update(samples.difficulty[row].tobytes())
    if samples.terms is not None:
        digest.update(samples.terms[row].tobytes())
    words = (column[row].as_py() or "" for column in (samples.shard, samples.key, samples.group))
    return digest.digest(), *words


def _ranges(marks: Sequence[str], parts: int) -> list[tuple[str, str]]:
    """(low, high) uid of each part, as hex digits: quantiles of the marks; high "" is the end."""
    ordered = sorted(set(marks))
    inner = sorted({ordered[len(ordered) * part // parts] for part in range(1, parts)} - {""})
    bounds = ["0" * 32, *(mark for mark in inner if mark > "0" * 32), ""]
    return list(pairwise(bounds))


def _alerts(source: Folder, read: Sequence[Figures], score_name: str) -> list[str]:
    """Alerts about metadata that was read without an error."""
    alerts = []
    others = metadata.left_out(source)
    if others:
        alerts.append(others)
    lost, distinct = (sum(figures["merged"][at] for figures in read) for at in (0, 1))
    if lost:
        alerts.append(
            f"{lost:,} of {distinct:,} distinct scores ({score_name}) are equal to another one of "
            "their file in float32, in which difficulties are kept: subtract what all have in "
            "common, or give their ranks as scores"
        )
    return alerts


def _mixed_scores(source: Folder, config: CatalogConfig, having: str, lacking: str) -> InputError:
    return InputError(
        f"{source.url}: {having}.parquet has the column {config.score_name} and {lacking}.parquet "
        "has not: scores of two sources would be mixed; add it everywhere, or drop it everywhere "
        "to have it computed"
    )


def grouped(pairs: Sequence[metadata.Pair], most: int) -> list[list[metadata.Pair]]:
    """Consecutive pairs in groups of about `most` bytes, at least one a group."""
    groups: list[list[metadata.Pair]] = []
    held = 0
    for pair in pairs:
        if not groups or held + pair.size > most:
            groups.append([])
            held = 0
        groups[-1].append(pair)
        held += pair.size
    return groups
