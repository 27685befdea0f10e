"""`d2filter demo`: draws pairs with known truth, filters them with all stages, and compares.

About 30% of the pairs are near-copies of another pair (cropped, jittered, recompressed), and about
20% carry another pair's caption. OUT contains what a user's run would: shards/ and one run
directory for each setting of D2, and also truth/, which the filter does not read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from d2filter import config
from d2filter.algorithm.measures import ground_truth
from d2filter.algorithm.methods import baselines
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.engine.task import Report, Task
from d2filter.errors import RunStateError, UsageError
from d2filter.formats import graph, ranking
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder, absolute
from d2filter.stages.pipeline import Pipeline
from d2filter.tools import report, scenes

I64 = ground_truth.I64


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run D2, in its own run directory."""

    name: str
    label: str
    k: int
    rank: config.RankConfig

    @property
    def shown(self) -> str:
        """For people."""
        return f"k={self.k}, gamma={self.rank.gamma}"


FRACTION = Decimal("0.5")
PUBLISHED = Setting(
    name="d2-published", label="D2 as published", k=1,
    rank=config.RankConfig(kernel="rbf", gamma=1.0, collapse_copies=None),
)  # fmt: skip
AUTO = Setting(
    name="d2-auto", label="D2 by itself", k=10,
    rank=config.RankConfig(),
)  # fmt: skip

_COPIES = 0.3
_SWAPPED = 0.2
_SHARDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which pair shows what: n pairs, row by row."""

    scene: I64
    """(n,) number of the scene that the picture shows; equal for near-copies: the group"""
    copy: ground_truth.Bools
    """(n,) True for a near-copy"""
    caption_of: I64
    """(n,) pair whose caption this one carries; its own number if the caption is right"""

    @property
    def swapped(self) -> ground_truth.Bools:
        """(n,) True where the caption belongs to another pair."""
        return np.asarray(self.caption_of != np.arange(len(self.scene)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table."""

    name: str
    result: ground_truth.Usefulness


def lay_out(pairs: int, seed: int) -> Layout:
    """Plant copies and swapped captions, from the seed alone."""
    rng = np.random.default_rng([seed, 0])
    copies = round(pairs * _COPIES)
    originals = pairs - copies
    scene = np.concatenate([np.arange(originals), rng.integers(0, originals, copies)])
    copy = np.arange(pairs) >= originals
    order = rng.permutation(pairs)
    scene, copy = scene[order], copy[order]
    wrong = rng.choice(pairs, round(pairs * _SWAPPED), replace=False)
    caption_of = np.arange(pairs)
    caption_of[wrong] = np.roll(wrong, 1)
    # a caption that moved inside its own group would still be right
    back = np.flatnonzero(scene[caption_of] == scene)
    caption_of[back] = back
    return Layout(scene=scene, copy=copy, caption_of=caption_of)


def draw_shard(
    *, report: Report, out: Folder, number: int, rows: I64, layout: Layout, seed: int
) -> dict[str, Any]:
    """Task: draw some pairs into one shard, and write the truth about them to truth/."""
    name = f"{number:05d}"
    uids = []
    with out.sub("shards").publish(f"{name}.tar") as path, path.open("wb") as stream:
        writer = webdataset.TarWriter(stream, encoder=False, mtime=0)
        for at, row in enumerate(rows.tolist()):
            image, caption = draw_pair(layout, row, seed)
            uids.append(uid_format.content_uid(image, caption))
            key = f"{name}{at:04d}"
            meta = {"uid": uids[-1], "caption": caption, "key": key, "status": "success"}
            writer.write(
                {
                    "__key__": key,
                    "jpg": image,
                    "txt": caption.encode(),
                    "json": json.dumps(meta).encode(),
                }
            )
            report(1)
        writer.close()
    truth = {
        "uid": uids,
        "group": layout.scene[rows],
        "copy": layout.copy[rows],
        "swapped": layout.swapped[rows],
    }
    with out.sub("truth").publish(f"{name}.parquet") as path:
        pq.write_table(pa.table(truth), path)
    return {"pairs": len(rows)}


def scene_of(number: int, seed: int) -> scenes.Scene:
    """Scene of a pool by its number."""
    return scenes.random_scene(np.random.default_rng([seed, 1, number]))


def draw_pair(
    layout: Layout,
    row: int,
    seed: int,
    scene_of: Callable[[int, int], scenes.Scene] = scene_of,
) -> tuple[bytes, str]:
    """JPEG bytes and caption of one pair. scene_of: the scene with a number in a seed's pool."""
    rng = np.random.default_rng([seed, 2, row])
    picture = scenes.draw(scene_of(int(layout.scene[row]), seed))
    quality = int(rng.integers(85, 93))
    if layout.copy[row]:
        picture = scenes.jitter(picture, rng)
        quality = int(rng.integers(60, 85))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    speaker = int(layout.caption_of[row])
    words = np.random.default_rng([seed, 3, speaker])
    return stream.getvalue(), scenes.caption(scene_of(int(layout.scene[speaker]), seed), words)


def demo(
    out_dir: str,
    *,
    pairs: int = 4200,
    seed: int = 0,
    say: Callable[[str], None],
    show_progress: bool | None = None,
) -> list[Line]:
    """Draw, embed, rank in two settings, compare; returns the table that it prints.

    Raises UsageError for fewer than 100 pairs.
    """
    out = Folder(absolute(out_dir))
    settings = (PUBLISHED, AUTO)
    draw_and_run(
        out, pairs=pairs, seed=seed, settings=settings, say=say, show_progress=show_progress
    )
    lines = compare(out, settings)
    say("")
    for text in table(lines):
        say(text)
    written = report.report(out.sub(AUTO.name))
    say("")
    say(f"report:  {written}  (open it in a browser)")
    say(f"results: {out.where(AUTO.name)}  (subset.npy, ranking/, graph/, stats.json)")
    say(f"shards:  {out.where('shards')}   truth: {out.where('truth')}")
    say(f"next:    d2filter select --out-dir {out.where(AUTO.name)} --fraction 0.3")
    say(f"         d2filter verify {out.where(AUTO.name)}")
    return lines


def draw_and_run(
    out: Folder,
    *,
    pairs: int,
    seed: int,
    settings: Sequence[Setting],
    say: Callable[[str], None],
    show_progress: bool | None = None,
) -> None:
    """Draw the pool into OUT/shards and run the line once for each setting."""
    if pairs < 100:
        raise UsageError(f"pairs is {pairs}, allowed is a whole number of at least 100")
    _claim(out, pairs, seed)
    layout = lay_out(pairs, seed)
    say(
        f"{pairs:,} drawn pairs: {layout.copy.sum():,} near-copies, "
        f"{layout.swapped.sum():,} swapped captions"
    )
    common = {"out": out, "layout": layout, "seed": seed}
    tasks = [
        Task(
            name=f"draw-{number:05d}",
            run=draw_shard,
            arguments={**common, "number": number, "rows": rows},
        )
        for number, rows in enumerate(np.array_split(np.arange(pairs), _SHARDS))
    ]
    runner = Runner(out, show_progress=show_progress)
    try:
        StageRun(runner, "draw", f"{pairs}-{seed}").run("draw", tasks, total=pairs)
        for setting in settings:
            say("")
            say(f"{setting.name}: {setting.shown}, half kept")
            run = _run_config(out, settings[0].name, setting)
            Pipeline(run, say=say, show_progress=show_progress).run("run")
    finally:
        runner.close()


def _claim(out: Folder, pairs: int, seed: int) -> None:
    """Refuse a folder that holds another demo: drawing over its shards would spoil both."""
    mine = {"pairs": pairs, "seed": seed}
    there = out.read_json("demo.json")
    if there is None:
        out.publish_json("demo.json", mine)
    elif there != mine:
        raise RunStateError(
            f"{out.url} holds a demo of {there['pairs']} pairs, seed {there['seed']}: "
            "choose another --out-dir, or remove it"
        )


def _run_config(out: Folder, first: str, setting: Setting) -> config.RunConfig:
    """The first run embeds; the others read its metadata."""
    embed = config.EmbedConfig(shards=(out.sub("shards").url,))
    chained = setting.name == first
    return config.RunConfig(
        out_dir=out.sub(setting.name).url,
        embed=embed if chained else None,
        metadata_dir="" if chained else out.sub(f"{first}/metadata").url,
        catalog=config.CatalogConfig(arch=embed.resolved_arch),
        graph=config.GraphConfig(n_neighbors=setting.k),
        rank=replace(setting.rank, tuned_for=FRACTION),
        select=config.SelectConfig(fraction=FRACTION),
    )


def compare(out: Folder, settings: Sequence[Setting]) -> list[Line]:
    """The table's lines from the files of all runs and the truth."""
    first = graph.read(out.sub(f"{settings[0].name}/graph"))
    group, swapped = truth(out, first)
    size = int(FRACTION * len(group))
    orders = {
        f"{setting.label} ({setting.shown})": _order(out, setting.name) for setting in settings
    }
    orders["CLIP score alone"] = baselines.by_score(first.difficulty, first.hi, first.lo)
    orders["random"] = baselines.at_random(first.hi, first.lo)
    orders["best that is possible"] = ground_truth.best_order(group, swapped)
    return [
        Line(name=name, result=ground_truth.usefulness(order, group, swapped, size))
        for name, order in orders.items()
    ]


def table(lines: list[Line]) -> list[str]:
    """The comparison as lines of text."""
    out = [f"{'half kept, judged by the truth':<34}{'useful':>9}{'swapped':>10}{'groups':>9}"]
    for line in lines:
        r = line.result
        out.append(f"{line.name:<34}{r.useful:>9.1%}{r.swapped:>10.1%}{r.groups_covered:>9.1%}")
    out.append("useful: right caption and the first of its group in the ranking; swapped: wrong")
    out.append("caption; both of what is kept. groups: share of all with a rightly captioned one")
    return out


def _order(out: Folder, name: str) -> I64:
    parts = ranking.iter_columns(out.sub(f"{name}/ranking"), ["rank"])
    return np.argsort(np.concatenate([p["rank"] for p in parts])).astype(np.int64, copy=False)


def truth(out: Folder, rows: graph.GraphPart) -> tuple[I64, ground_truth.Bools]:
    """group and swapped of each row of a graph."""
    folder = out.sub("truth")
    known: dict[str, tuple[int, bool]] = {}
    for name in folder.names(".parquet"):
        with folder.reading(name) as stream:
            part = pq.read_table(stream).to_pydict()
        known.update(
            zip(part["uid"], zip(part["group"], part["swapped"], strict=True), strict=True)
        )
    found = [known[uid] for uid in uid_format.to_hex(rows.hi, rows.lo)]
    return np.array([g for g, _ in found], np.int64), np.array([s for _, s in found], np.bool_)
