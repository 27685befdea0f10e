"""`d2filter report OUT`: what a finished run did to its pool, as one HTML page that works offline.

The page loads nothing from elsewhere and its content security policy allows no foreign script,
because captions come from the web. Plots use Bokeh because its script is the smallest to embed (1.3
MB; Plotly's is 4.8 MB; Vega's is 0.9 MB, but its Python package contains a compiler of 33 MB).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from d2filter.algorithm.measures import coverage
from d2filter.config import AUTO
from d2filter.errors import RunStateError, UsageError
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import REPORT, REPORT_DATA, RunState
from d2filter.text import redacted
from d2filter.tools import (
    album,
    alerts,
    gallery,
    measures,
    pages,
    plots,
    selfcheck,
    sweep,
    sweep_plots,
)

GALLERY = 12
MOST_BYTES = 20_000_000
MOST_FAR = 10_000_000_000
"""bytes of features on an object store, which are read whole"""
_TILE = 200  # bytes around a picture
_REGIONS = 6  # of the most and the least thinned
_LARGE_ENOUGH = 5  # samples of a region that is named

Say = Callable[[str], None]


def report(
    folder: Folder,
    *,
    each: int | None = None,
    shards: Sequence[str] = (),
    say: Say = lambda line: None,
) -> str:
    """Write OUT/report.html, and return where it is. A report that is there stays until the new one
    is whole, and is replaced by it.

    each: pictures in a gallery; None: GALLERY, unless they would have to be fetched from far away.
    shards: where the pictures are, for a run that does not know. Raises RunStateError for a run
    that is not finished, UsageError for a negative `each`.
    """
    if each is not None and each < 0:
        raise UsageError(f"gallery is {each}, allowed is a whole number of at least 0")
    wanted = GALLERY if each is None else each
    try:
        m = measures.measure(folder, max(1, wanted))
    except (KeyError, TypeError) as error:
        raise RunStateError(
            f"{folder.url} was written by another version of d2filter, which this one cannot read "
            f"({error}): run it again, or use that version"
        ) from error
    say(f"report    measured on {len(m.drawn.hi):,} of {m.ranked:,} ranked samples")
    galleries = gallery.choose(folder, m, wanted) if wanted else []
    pictures = album.Album(pictures={}, troubles=())
    if galleries:
        pictures = album.look_up(folder, galleries, shards, is_requested=each is not None, say=say)
    data = {**counted(m), "selfcheck": selfcheck.of_run(folder)}
    found = alerts.find(alerts.Facts(records=m.records, counted=data))
    page = render(folder, m, galleries, pictures, found, data["selfcheck"])
    _publish(folder, page, data)
    return folder.where(REPORT)


def counted(m: measures.Measures) -> dict[str, Any]:
    """What report.json holds: figures that were counted on samples, for alerts and programs."""
    raw = np.sort(m.raw)
    found: dict[str, Any] = {
        "select": m.records["select"]["fingerprint"],
        "measured_on": raw.size,
        "ranked": m.ranked,
        "groups": m.groups,
        "kept_by": {
            subset.name: {**asdict(subset.measured), "score": subset.score}
            for subset in (m.own, m.by_score, m.at_random)
            if subset.kept.any()
        },
        "near_copies": {"share_of_kept": m.crowding.copies, "sqdist": m.near},
        "exact_copies": dict(zip(("samples", "kept"), m.exact_copies, strict=True)),
        "scores": {
            "name": m.score,
            "is_clip": m.score == measures.CLIP_SCORE,
            "lower_quartile": float(raw[raw.size // 4]),
            "median": float(raw[raw.size // 2]),
            "upper_quartile": float(raw[(3 * raw.size) // 4]),
            "not_positive": float((raw <= 0).mean()),
        },
    }
    if m.shared_caption is not None:
        count, uid = m.shared_caption
        found["shared_caption"] = {"samples": count, "looked_at": raw.size, "uid": uid}
    return found


def _publish(folder: Folder, page: str, data: dict[str, Any]) -> None:
    """Put a page in the place of the one before, of whatever selection that was.

    The note of which selection a report shows is made invalid first: after a crash in between, the
    report is made again rather than taken for that of the selection before.
    """
    state = RunState(folder)
    selection = data["select"]
    now = state.done("select")
    if now is None or now["fingerprint"] != selection:
        raise RunStateError(
            f"the selection in {folder.url} changed while its report was written: run "
            "`d2filter report OUT` again"
        )
    state.note_report("")
    with folder.publish(REPORT) as path:
        path.write_text(page, "utf-8")
    folder.publish_json(REPORT_DATA, data)
    state.note_report(selection)


def obstacle(folder: Folder) -> str:
    """Why a run should not write its report unasked; empty when nothing speaks against it."""
    catalog = RunState(folder).require("catalog")["stats"]
    ranked = catalog["samples"]["ranked"]
    if ranked < measures.FEWEST:
        return f"there is {ranked} ranked sample"
    size = 2 * ranked * catalog["dimension"]
    if folder.local is None and size > MOST_FAR:
        return f"{size / 1e9:,.0f} GB of features lie elsewhere; `d2filter report OUT` reads them"
    return ""


def render(
    folder: Folder,
    m: measures.Measures,
    galleries: Sequence[gallery.Gallery],
    pictures: album.Album,
    found: Sequence[str] = (),
    checked: dict[str, Any] | None = None,
) -> str:
    """The page, of at most MOST_BYTES. What does not fit is left out, with a note."""
    drawn = pages.drawn(plots.all_plots(m))
    nothing = album.Album(pictures={}, troubles=pictures.troubles)
    bare = _page(folder, m, galleries, nothing, drawn, found, checked)
    while galleries and len(bare.encode()) > MOST_BYTES:
        halved = [replace(one, groups=one.groups[: len(one.groups) // 2]) for one in galleries]
        galleries = [one for one in halved if one.groups]
        bare = _page(folder, m, galleries, nothing, drawn, found, checked)
    if not galleries:
        return bare
    pictures = _fitting(pictures, galleries, MOST_BYTES - len(bare.encode()))
    return _page(folder, m, galleries, pictures, drawn, found, checked)


def _page(
    folder: Folder,
    m: measures.Measures,
    galleries: Sequence[gallery.Gallery],
    pictures: album.Album,
    drawn: Sequence[tuple[str, str]],
    found: Sequence[str],
    checked: dict[str, Any] | None,
) -> str:
    tabs = {"overview": "Overview", "scores": "Scores", "coverage": "Coverage"}
    tabs |= {"sweep": "Sweep"} if m.swept else {}
    tabs |= {"pictures": "Pictures"} if galleries else {}
    tabs |= {"settings": "Settings"}
    subsets = {one.name: one for one in (m.own, m.by_score, m.at_random, m.everything)}
    return pages.render(
        "report.html",
        drawn,
        m=m,
        out=redacted(folder.url),
        title=f"{redacted(folder.url).rstrip('/').rpartition('/')[2]} · d2filter",
        headline=_headline(m),
        alerts=found,
        checked=checked or {},
        rates=_rates(checked or {}),
        tabs=list(tabs.items()),
        cards=_cards(m),
        flow=_flow(m),
        reasons=[
            (status, reason, count)
            for status, reasons in m.reasons.items()
            for reason, count in reasons.items()
        ],
        lost=m.stats["lost_shards"],
        watched=f"{m.own.nearest.size:,}",
        subsets=[(s, coverage.jaccard(m.own.kept, s.kept)) for s in subsets.values()],
        regions=_regions(m.cells),
        measures=sweep.MEASURES,
        styles=sweep_plots.styles(m.swept),
        settings_swept=len({row["setting"] for row in m.swept}),
        galleries=galleries,
        album=pictures,
        settings=_settings(m),
    )


def _fitting(pictures: album.Album, galleries: Sequence[gallery.Gallery], room: int) -> album.Album:
    """The pictures that fit into `room` bytes, in the order of the page; one may come often."""
    from markupsafe import escape

    often = Counter(one.uid for g in galleries for group in g.groups for one in group)
    room -= _TILE  # for what is said of those that are left out
    kept = {}
    for uid, times in often.items():
        picture = pictures.pictures.get(uid)
        if picture is None:
            continue
        size = len(picture.url) + len(str(escape(picture.caption)).encode()) + _TILE
        if times * size > room:
            break
        room -= times * size
        kept[uid] = picture
    left = len(often.keys() & pictures.pictures.keys()) - len(kept)
    note = (f"{left:,} pictures are left out: the page ends at {MOST_BYTES / 1e6:g} MB",)
    return album.Album(pictures=kept, troubles=pictures.troubles + note * bool(left))


def _headline(m: measures.Measures) -> str:
    options = m.records["rank"]["options"]
    how = f"{m.method} by {m.score}"
    if m.method == "D2":
        k = options["n_neighbors"] or m.stats["graph"]["k"]
        gamma = m.records["rank"]["stats"].get("gamma", options["gamma"])
        how += f", k = {k}, gamma = {gamma:.4g}"
        if options["gamma"] != AUTO and options["gamma_scale"] != "none":
            how += f" ({options['gamma_scale']})"
    cut = m.records["rank"]["stats"].get("cut_hardest", "0")
    if float(cut):
        how += f", without the hardest {float(cut):.1%}"
    if options["tuned_for"] is not None:
        how += f", fitted to a kept share of {float(options['tuned_for']):g}"
    return f"{m.stats['samples']['kept']:,} of {m.ranked:,} ranked samples kept: {how}."


def _cards(m: measures.Measures) -> list[tuple[str, str, str]]:
    samples, graph = m.stats["samples"], m.stats["graph"]
    low, high = graph["recall_ci"]
    taken = sum(m.stats["seconds"].values())
    return [
        (f"{samples['read']:,}", "samples read", ""),
        (f"{samples['ranked']:,}", "ranked", ""),
        (f"{samples['kept']:,}", "kept", f"{m.share:.1%} of the ranked{_repeats(m.stats)}"),
        (f"{samples['read'] - samples['ranked']:,}", "not ranked", _not_ranked(samples)),
        (
            f"{m.crowding.copies:.1%}",
            "of the kept have a kept near-copy",
            f"within distance² {m.near:.3g}",
        ),
        (
            f"{graph['recall']:.4f}",
            f"recall@{graph['k']} of the graph",
            f"95%: {low:.4f} to {high:.4f}",
        ),
        (
            _duration(taken),
            "in all stages",
            f"{graph['partitions']} partitions" if graph["partitions"] > 1 else "in one partition",
        ),
    ]


def _repeats(stats: dict[str, Any]) -> str:
    """How many those of a soft selection are with their repeats."""
    total = stats["select"].get("total")
    return f", {total:,} with repeats" if total else ""


def _not_ranked(samples: dict[str, int]) -> str:
    return "bad, duplicate or outside" if "outside" in samples else "bad or duplicate"


def _flow(m: measures.Measures) -> list[dict[str, Any]]:
    """Counts whose sum is the number of samples read."""
    samples = m.stats["samples"]
    read = max(1, samples["read"])
    labels = {"kept": "kept", "pruned": "pruned", "duplicate": "duplicates", "bad": "bad"}
    labels |= {"outside": "outside of the subset"} if "outside" in samples else {}
    return [
        {
            "name": name,
            "label": label,
            "count": samples[name],
            "percent": 100 * samples[name] / read,
            "text": f"{samples[name]:,} {label}",
        }
        for name, label in labels.items()
    ]


def _rates(checked: dict[str, Any]) -> list[tuple[str, float, float, float, float, bool]]:
    """Of the self-check, by share kept: the rate, its interval, that of the score alone, and
    whether it is the budget of this run.
    """
    rows = sorted(checked.get("rates", {}).values(), key=lambda r: float(r["share_kept"]))
    own = checked.get("at_budget")
    return [
        (f"{r['share_kept']:.0%}", r["kept"], r["low"], r["high"], r["by_score"], r == own)
        for r in rows
    ]


def _regions(cells: measures.Cells) -> list[tuple[str, list[tuple[str, int, float, float]]]]:
    """The most and the least thinned."""
    rows = [
        row
        for row in zip(
            cells.center, cells.size.tolist(), cells.share.tolist(), cells.score.tolist(),
            strict=True,
        )
        if row[1] >= _LARGE_ENOUGH
    ]  # fmt: skip
    found = [("Most thinned regions", rows[:_REGIONS])]
    return [*found, ("Least thinned regions", rows[_REGIONS:][::-1][:_REGIONS])] if rows else []


def _settings(m: measures.Measures) -> list[tuple[str, list[tuple[str, str]]]]:
    found = []
    for stage, record in m.records.items():
        shown = {"d2filter": record["d2filter"], **record["options"]}
        shown["seconds"] = f"{record['seconds']:,}"
        shown["peak memory of a process"] = f"{record['peak_rss_bytes'] / 1e9:.2f} GB"
        found.append((stage, [(n.replace("_", "-"), str(v)) for n, v in shown.items()]))
    return found


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
