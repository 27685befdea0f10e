"""The report: its figures compared with the whole files, its pictures, and hostile content."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from bokeh.models import ColumnDataSource
from PIL import Image
from support import pools, shard_files
from support.runs import copy_of, ranking_columns

from d2filter.algorithm.greedy import demoted
from d2filter.cli.main import main
from d2filter.errors import RunStateError, StorageError, UsageError
from d2filter.formats import catalog, graph, webdataset
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import RunState
from d2filter.tools import album as albums
from d2filter.tools import gallery, measures, pages, plots, report, sampled

pytestmark = pytest.mark.usefixtures("cluster", "reports")

N = 240
EVIL = (
    "<script>document.title='taken'</script><img src=https://evil.example/x.png onerror=alert(1)>"
)


@pytest.fixture(scope="module")
def reported_run(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """A run of three partitions whose samples lie in two shards; ranked without a report."""
    folder = tmp_path_factory.mktemp("reported")
    pool = pools.make(N, 8, copies=0.5)
    files: dict[int, list[tuple[str, bytes]]] = {0: [], 1: []}
    shard, key = [], []
    for i, uid in enumerate(pool["uid"]):
        members = shard_files.members(f"{i:05d}", i % 20, uid=uid)
        files[i % 2] += [members[0], (f"{i:05d}.txt", f"number {i} {EVIL}".encode()), members[2]]
        shard.append(str(folder / f"s{i % 2}.tar"))
        key.append(f"{i:05d}")
    for number, members in files.items():
        shard_files.write(folder / f"s{number}.tar", members)
    pools.write(folder / "m", pool, files=2, columns={"shard": shard, "key": key})
    words = ["run", "--metadata-dir", str(folder / "m"), "--out-dir", str(folder / "o")]
    more = ["--n-neighbors", "4", "--partitions", "3", "--min-score", "0.65", "--no-report"]
    assert main([*words, *more]) == 0
    assert not (folder / "o/report.html").exists()
    return folder / "o"


@pytest.fixture
def run(reported_run: Path, tmp_path: Path) -> Path:
    return copy_of(reported_run, tmp_path)


def test_the_measures_are_those_of_the_whole_files(run: Path) -> None:
    folder = Folder(str(run))
    m = measures.measure(folder, 7)
    rows, g = ranking_columns(run), graph.read(folder.sub("graph"))
    features = np.concatenate([p.features for p in catalog.iter_parts(folder.sub("catalog"))])
    order = np.lexsort((rows["uid_lo"], rows["uid_hi"]))
    assert m.whole
    np.testing.assert_array_equal(m.drawn.id, order)
    np.testing.assert_array_equal(m.drawn.rank, rows["rank"][order])
    np.testing.assert_array_equal(m.drawn.features, features)
    np.testing.assert_allclose(m.drawn.spacing, np.sqrt(g.sqdist[order].max(axis=1)), rtol=1e-6)
    subset = {tuple(pair) for pair in np.load(run / "subset.npy").tolist()}
    pairs = zip(m.drawn.hi.tolist(), m.drawn.lo.tolist(), strict=True)
    assert m.drawn.kept.tolist() == [pair in subset for pair in pairs]
    assert 0 < m.own.kept.sum() < int(0.3 * N)  # --min-score bites
    for one in (m.by_score, m.at_random):
        assert one.kept.sum() == m.own.kept.sum()
    lost = (rows["forward"] - rows["final"])[order] / 2.0**40
    np.testing.assert_allclose(m.drawn.lost, np.where(m.drawn.suppressed_by >= 0, lost, 0))
    first = np.argsort(rows["rank"])
    np.testing.assert_array_equal(m.first.id, first[:7])
    np.testing.assert_array_equal(m.last.id, first[-7:])
    # coverage by brute force: few copies are exact here, and groups are rows of one kind
    wide = features.astype(np.float64)
    far = np.linalg.norm(wide[:, None] - wide[None], axis=2)
    place = np.argsort(order)
    near = (g.sqdist[order] <= np.float32(m.near)) & (g.neighbors[order] >= 0)
    group = np.arange(N)
    for _ in range(N):
        for i, j in np.argwhere(near).tolist():
            other = place[g.neighbors[order][i, j]]
            group[i] = group[other] = min(group[i], group[other])
    leads = {}
    for i in np.lexsort((np.arange(N), -rows["difficulty"][order])).tolist():
        leads.setdefault(group[i], i)
    assert m.groups == len(leads) < N
    unit = demoted.unit(g.sqdist)
    for one in (m.own, m.by_score, m.at_random, m.everything):
        covered = set(group[one.kept].tolist())
        nearest = [
            0.0 if kind in covered else far[lead][one.kept].min() for kind, lead in leads.items()
        ]
        np.testing.assert_allclose(np.sort(one.nearest), np.sort(nearest), atol=1e-3)
        assert one.coverage == pytest.approx(np.exp(-np.square(nearest) / unit).mean(), abs=1e-3)
        assert one.score == pytest.approx(m.raw[one.kept].mean())
    assert m.everything.coverage == 1
    # in one piece, what the lists say among the drawn ones is what they say
    assert m.crowding.copies == m.own.measured.copies
    assert m.crowding.effective == pytest.approx(m.own.measured.effective)
    assert m.everything.kept.all()
    assert m.cells.size.sum() == N
    assert (m.cells.size * m.cells.share).sum() == pytest.approx(m.drawn.kept.sum())


def test_a_large_pool_is_measured_on_samples_that_only_their_uids_choose(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled, "SAMPLE", 50)
    words = ["run", "--metadata-dir", str(run), "--out-dir", str(tmp_path / "p")]
    words[2] = json.loads((run / "completions/catalog.json").read_text())["sources"]["metadata"]
    assert main([*words, "--n-neighbors", "4", "--min-score", "0.65", "--no-report"]) == 0
    three, one = (measures.measure(Folder(str(out)), 5) for out in (run, tmp_path / "p"))
    assert not three.whole
    assert three.drawn.hi.size == 50
    for name in ("hi", "lo", "difficulty", "rank", "spacing", "kept", "features", "lost"):
        np.testing.assert_array_equal(getattr(three.drawn, name), getattr(one.drawn, name))
    assert three.own.coverage == one.own.coverage
    assert three.first.rank.tolist() == list(range(5))
    assert three.last.rank.tolist() == list(range(N - 5, N))
    whole = ranking_columns(run)
    at = three.drawn.id
    np.testing.assert_array_equal(whole["uid_hi"][at], three.drawn.hi)
    page = Path(report.report(Folder(str(run)), each=0)).read_text()
    assert "50 of 240 ranked samples" in page


def test_the_galleries_show_who_suppressed_whom(run: Path) -> None:
    folder = Folder(str(run))
    m = measures.measure(folder, 12)
    rows = ranking_columns(run)
    kept = set(m.drawn.id[m.drawn.kept].tolist())
    score = set(m.drawn.id[m.by_score.kept].tolist())
    titled = {one.title: one for one in gallery.choose(folder, m, 12)}
    groups = titled["Most suppressed groups"].groups
    victims = (rows["suppressed_by"] >= 0) & ~np.isin(np.arange(N), list(kept))
    loss = np.bincount(
        rows["suppressed_by"][victims], (rows["forward"] - rows["final"])[victims], N
    )
    best = [i for i in np.argsort(-loss, kind="stable").tolist() if i in kept and loss[i] > 0]
    assert {group[0].id for group in groups} == set(best[:6])
    for lead, *others in groups:
        assert lead.kept
        assert lead.sqdist is None
        assert others
        for one in others:
            assert rows["suppressed_by"][one.id] == lead.id
            assert one.id not in kept
            assert not one.kept
        far = [one.sqdist for one in others if one.sqdist is not None]
        assert far == sorted(far)
    ranks = [group[0].rank for group in titled["Ranked first"].groups]
    assert ranks == list(range(12))
    ranks = [group[0].rank for group in titled["Ranked last"].groups]
    assert ranks == list(range(N - 1, N - 13, -1))
    gained = titled["Kept by D2, not by CLIP score alone"].groups
    assert {group[0].id for group in gained} <= kept - score
    for one, *by in titled["Kept by CLIP score alone, not by D2"].groups:
        assert one.id in score - kept
        assert [other.id for other in by] == [i for i in [rows["suppressed_by"][one.id]] if i >= 0]
    hexes = uid_format.to_hex(rows["uid_hi"], rows["uid_lo"])
    for found in titled.values():
        for group in found.groups:
            assert [hexes[one.id] for one in group] == [one.uid for one in group]
            assert [rows["rank"][one.id] for one in group] == [one.rank for one in group]


def uids_in(page: str) -> set[str]:
    return set(re.findall(r"explain OUT ([0-9a-f]{32})", page))


def test_pictures_come_out_of_the_shards_and_captions_are_only_text(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), "--gallery", "3"]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert EVIL not in page
    assert "&lt;script&gt;document.title" in page
    assert page.count("data:image/jpeg;base64,") >= len(uids_in(page)) > 9
    assert "no picture" not in page.replace("No pictures", "")
    url = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert url is not None
    import io

    with Image.open(io.BytesIO(base64.b64decode(url[1]))) as picture:
        assert max(picture.size) <= albums.THUMBNAIL


def test_the_policy_lets_in_the_scripts_of_the_page_and_nothing_else(run: Path) -> None:
    report.report(Folder(str(run)), each=2)
    page = (run / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    ]
    assert rules["script-src"].split() == hashes
    assert not re.search(r"<(link|iframe|object|embed|base)\b|<script[^>]+src=", page)


def test_embedded_data_cannot_close_its_script_element() -> None:
    text = pages._script_json({"a": "</script><script>alert(1)</script>"})
    assert "<" not in text
    assert json.loads(text) == {"a": "</script><script>alert(1)</script>"}


def test_pictures_that_do_not_fit_are_left_out_and_counted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = len(Path(report.report(Folder(str(run)), each=0)).read_bytes())
    whole = Path(report.report(Folder(str(run)), each=12)).read_text()
    assert whole.count("data:image/jpeg") > len(uids_in(whole))  # some come more than once
    for room in (40_000, 90_000, 150_000):
        monkeypatch.setattr(report, "MOST_BYTES", bare + room)
        page = Path(report.report(Folder(str(run)), each=12)).read_text()
        assert len(page.encode()) <= report.MOST_BYTES
        assert page.count("data:image/jpeg") < whole.count("data:image/jpeg")
    assert re.search(r"\d+ pictures are left out: the page ends at", page)
    # so small a page has no room for the frames either
    monkeypatch.setattr(report, "MOST_BYTES", bare + 500)
    assert len(Path(report.report(Folder(str(run)), each=12)).read_bytes()) <= report.MOST_BYTES


def test_missing_shards_are_reported_and_the_report_is_written(
    run: Path, tmp_path: Path, reported_run: Path
) -> None:
    folder = Folder(str(run))
    m = measures.measure(folder, 4)
    galleries = gallery.choose(folder, m, 4)
    places = albums.places_of(
        folder, {s.uid for g in galleries for group in g.groups for s in group}
    )
    assert set(places) == {str(reported_run.parent / f"s{i}.tar") for i in (0, 1)}
    # as if the shards had been moved: found again by uid where one says they are
    for i in (0, 1):
        shutil.copy(reported_run.parent / f"s{i}.tar", tmp_path / f"moved{i}.tar")
    by_uid = albums.look_up(folder, galleries, [str(tmp_path / "moved{0,1}.tar")], False, print)
    by_key = albums.look_up(folder, galleries, [], True, print)
    assert by_uid.pictures == by_key.pictures
    assert not by_uid.troubles
    assert not by_key.troubles
    hidden = reported_run.parent / "hidden.tar"
    (reported_run.parent / "s0.tar").rename(hidden)
    try:
        album = albums.look_up(folder, galleries, [], True, print)
        page = report.render(folder, m, galleries, album)
    finally:
        hidden.rename(reported_run.parent / "s0.tar")
    assert 0 < len(album.pictures) < len(by_key.pictures)
    trouble, missing = album.troubles
    assert "s0.tar does not exist" in trouble
    assert "were not found in the shards" in missing
    assert "s0.tar does not exist" in page
    assert "no picture" in page


def test_remote_pictures_are_fetched_only_on_request(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(run))
    m = measures.measure(folder, 2)
    galleries = gallery.choose(folder, m, 2)
    places = albums.places_of(
        folder, {s.uid for g in galleries for group in g.groups for s in group}
    )
    fs = fsspec.filesystem("memory")
    for url in places:
        fs.pipe(f"/far/{Path(url).name}", Path(url).read_bytes())
    elsewhere = {f"memory://far/{Path(url).name}": found for url, found in places.items()}
    monkeypatch.setattr(albums, "places_of", lambda folder, wanted: elsewhere)
    album = albums.look_up(folder, galleries, [], False, print)
    assert not album.pictures
    assert "only the metadata names" in album.troubles[0]
    mark = run / "completions/catalog.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "upstream": "embed's"}))
    album = albums.look_up(folder, galleries, [], False, print)
    assert not album.pictures
    (trouble,) = album.troubles
    assert re.search(r"^\d+ pictures lie in 2 shards on other machines: .*--gallery N", trouble)
    asked = albums.look_up(folder, galleries, [], True, print)
    assert asked.pictures
    assert not asked.troubles


@pytest.mark.parametrize(
    "name",
    [
        "/x/{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar",
        "/**/*.tarx",
        "a.tar",
        "zip://a.tar::/nowhere/none.zip",
        "reference://x.tar",
        "nosuch://x.tar",
        "x" * 5000,
    ],
)
def test_a_shard_of_any_name_is_found_and_only_its_wanted_pictures_are_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = Folder(str(run))
    m = measures.measure(folder, 2)
    galleries = gallery.choose(folder, m, 2)
    wanted = {s.uid for g in galleries for group in g.groups for s in group}
    places = albums.places_of(folder, wanted)
    odd = {**places, name: {"00000": min(wanted)}}
    monkeypatch.setattr(albums, "places_of", lambda folder, wanted: odd)
    started = time.monotonic()
    album = albums.look_up(folder, galleries, [], True, print)
    assert time.monotonic() - started < 20
    assert len(album.pictures) >= len(wanted) - 1
    assert any("1 pictures: " in trouble for trouble in album.troubles)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder", "socket"])
def test_only_files_are_opened(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """A pipe would wait for ever, a device never ends."""
    folder = Folder(str(run))
    galleries = gallery.choose(folder, measures.measure(folder, 2), 2)
    place = tmp_path / "x.tar"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "folder":
            place.mkdir()
        elif kind == "socket":
            monkeypatch.chdir(tmp_path)
            listener.bind("x.tar")
        elif kind == "link to a device":
            place.symlink_to("/dev/zero")
        else:
            place = Path("/dev/zero")
        wanted = {s.uid for g in galleries for group in g.groups for s in group}
        places = {str(place): {"00000": min(wanted)}}
        monkeypatch.setattr(albums, "places_of", lambda folder, wanted: places)
        album = albums.look_up(folder, galleries, [], True, print)
    assert not album.pictures
    assert f"1 pictures: {place} is not a regular file" in album.troubles


def test_shards_that_only_metadata_names_are_opened_only_on_request(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any) -> Any:
        raise AssertionError("a shard was opened")

    folder = Folder(str(run))
    m = measures.measure(folder, 2)
    galleries = gallery.choose(folder, m, 2)
    monkeypatch.setattr(webdataset, "shard_at", read)
    monkeypatch.setattr(webdataset, "read_samples", read)
    album = albums.look_up(folder, galleries, [], False, print)
    wanted = {s.uid for g in galleries for group in g.groups for s in group}
    assert album.troubles == (
        f"{len(wanted)} pictures lie in 2 shards that only the metadata names, which are "
        "opened only on request: `d2filter report OUT --shards …`",
    )
    assert "which are opened only on request" in report.render(folder, m, galleries, album)


def test_a_twin_of_a_sample_is_not_shown_for_it(
    run: Path, reported_run: Path, tmp_path: Path
) -> None:
    """Where one tells where the shards are now, those of the run are searched by key."""
    folder = Folder(str(run))
    galleries = gallery.choose(folder, measures.measure(folder, 4), 4)
    wanted = sorted({s.uid for g in galleries for group in g.groups for s in group})
    twins = [
        m
        for n, uid in enumerate(wanted)
        for m in shard_files.members(f"twin{n}", 19 - n % 3, uid=uid)
    ]
    shard_files.write(tmp_path / "t/a.tar", twins)
    for n in (0, 1):
        shutil.copy(reported_run.parent / f"s{n}.tar", tmp_path / f"t/s{n}.tar")
    by_key = albums.look_up(folder, galleries, [], True, print)
    moved = albums.look_up(folder, galleries, [str(tmp_path / "t")], False, print)
    assert moved == by_key
    assert not by_key.troubles


def test_a_storage_that_does_not_answer_is_tried_once(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(run))
    galleries = gallery.choose(folder, measures.measure(folder, 2), 2)
    asked = []

    def silent(url: str) -> Any:
        asked.append(url)
        raise StorageError("no answer")

    places = {f"{run}/far/{i}.tar": {str(i): f"{i:032x}"} for i in range(5)}
    monkeypatch.setattr(albums, "places_of", lambda folder, wanted: places)
    monkeypatch.setattr(webdataset, "shard_at", silent)
    album = albums.look_up(folder, galleries, [], True, print)
    assert len(asked) == 1
    assert any("no answer" in trouble for trouble in album.troubles)


def test_pictures_go_by_shard_and_key_where_the_run_knows_them(tmp_path: Path) -> None:
    """Metadata may have its own uids."""
    pool = pools.make(60, 6)
    files = [member for i in range(60) for member in shard_files.members(f"{i:05d}", i % 10)]
    shard = str(shard_files.write(tmp_path / "s.tar", files))
    columns = {"shard": [shard] * 60, "key": [f"{i:05d}" for i in range(60)]}
    pools.write(tmp_path / "m", pool, columns=columns)
    words = ["run", "--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    assert main(words) == 0
    page = (tmp_path / "o/report.html").read_text()
    assert "data:image/jpeg" not in page
    assert re.search(r"\d+ pictures lie in 1 shards that only the metadata names", page)
    assert "were not found in the shards" not in page
    assert main(["report", str(tmp_path / "o"), "--gallery", "12"]) == 0
    assert "data:image/jpeg" in (tmp_path / "o/report.html").read_text()
    (tmp_path / "t").mkdir()
    (tmp_path / "s.tar").rename(tmp_path / "t/s.tar")
    assert main(["report", str(tmp_path / "o"), "--shards", str(tmp_path / "t")]) == 0
    page = (tmp_path / "o/report.html").read_text()
    assert "data:image/jpeg" in page
    assert "no picture" not in page
    assert "were not found in the shards" not in page


@pytest.mark.parametrize("content", [b"", b"no picture", shard_files.picture(1)[:300]])
def test_a_picture_that_cannot_be_decoded_has_no_thumbnail(content: bytes) -> None:
    assert albums.thumbnail(content) == b""


def test_unusual_pictures_have_thumbnails(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (
        shard_files.black_png_with_alpha(),
        shard_files.picture(2, "WEBP"),
        shard_files.picture(3, mode="L"),
    ):
        assert albums.thumbnail(content)
    monkeypatch.setattr(albums, "MOST_PIXELS", 100)
    assert albums.thumbnail(shard_files.picture(1)) == b""


def test_a_run_writes_its_report_and_another_budget_writes_it_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json.loads((run / "completions/catalog.json").read_text())["sources"]["metadata"]
    words = ["run", "--metadata-dir", source, "--out-dir", str(run), "--n-neighbors", "4"]
    page = run / "report.html"
    assert main(words) == 0
    assert f"report    {page}" in capsys.readouterr().out
    first = page.stat()
    assert main(words) == 0
    assert "report    done before" in capsys.readouterr().out
    assert page.stat().st_mtime_ns == first.st_mtime_ns
    assert main(["select", "--out-dir", str(run), "--fraction", "0.3"]) == 0
    assert page.exists()  # the same budget
    assert main(["select", "--out-dir", str(run), "--fraction", "0.1"]) == 0
    kept = len(np.load(run / "subset.npy"))
    assert f"{kept} of {N} ranked samples kept" in page.read_text()
    assert main(words) == 0
    kept = len(np.load(run / "subset.npy"))
    assert f"{kept} of {N} ranked samples kept" in page.read_text()
    assert main(["rank", "--out-dir", str(run), "--gamma", "2", "--overwrite", "rank"]) == 0
    assert not page.exists()


def test_a_report_stays_until_the_next_one_is_complete(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at any point leaves a whole report, which is taken for no other selection's."""
    folder, state = Folder(str(run)), RunState(Folder(str(run)))
    selections = {}

    def select(fraction: str) -> None:
        main(["select", "--out-dir", str(run), "--fraction", fraction, "--min-score", "0.65"])
        selections[fraction] = state.require("select")["fingerprint"]

    select("0.3")
    page = Path(report.report(folder, each=0))
    whole = page.read_text()
    assert state.has_report(selections["0.3"])

    class Killed(BaseException):
        pass

    def publish(self: Folder, name: str, *more: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return plain(self, name, *more)

    select("0.1")
    page.write_text(whole)
    state.note_report(selections["0.3"])
    plain = Folder.publish
    for steps in range(3):
        left = steps
        with monkeypatch.context() as patched:
            patched.setattr(Folder, "publish", publish)
            with pytest.raises(Killed):
                report.report(folder, each=0)
        assert page.read_text().endswith("</html>")
        is_new = page.read_text() != whole
        assert is_new == (steps == 2)
        assert not state.has_report(selections["0.1"])
        assert state.has_report(selections["0.3"]) == (steps == 0)
    report.report(folder, each=0)
    assert state.has_report(selections["0.1"])


def test_a_selection_that_changes_meanwhile_has_no_report_of_the_one_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(*arguments: Any) -> str:
        main(["select", "--out-dir", str(run), "--fraction", "0.2"])
        return "of both"

    monkeypatch.setattr(report, "render", render)
    with pytest.raises(RunStateError, match="changed while its report was written"):
        report.report(Folder(str(run)), each=0)
    assert not (run / "report.html").exists()


def test_the_report_contains_the_sweep(run: Path) -> None:
    words = ["sweep", str(run), "--method", "score,semdedup", "--fraction", "0.1,0.3"]
    assert main(words) == 0
    m = measures.measure(Folder(str(run)), 1)
    assert [(row["setting"], row["fraction"]) for row in m.swept] == [
        (name, share) for name in ("score", "semdedup") for share in ("0.1", "0.3")
    ]
    page = Path(report.report(Folder(str(run)), each=0)).read_text()
    assert 'id="sweep"' in page
    assert m.setting == "d2 k=4 gamma=auto tuned_for=0.3"  # what a sweep of it would be called
    assert "semdedup" in page
    # of another graph it is not
    path = next((run / "sweep/settings").glob("semdedup*"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "graph": "another"}))
    assert {row["setting"] for row in measures.measure(Folder(str(run)), 1).swept} == {"score"}


@pytest.mark.parametrize("method", ["random", "score"])
def test_other_methods_have_a_report_too(run: Path, method: str) -> None:
    words = ["--out-dir", str(run), "--overwrite", "rank", "--method", method]
    assert main(["rank", *words]) == 0
    assert main(["select", "--out-dir", str(run)]) == 0
    page = Path(report.report(Folder(str(run)), each=2)).read_text()
    assert f"{method} by CLIP score" in page
    assert "Most suppressed groups" not in page


def test_a_column_name_with_markup_is_shown_as_text(tmp_path: Path) -> None:
    name = "$$x$$ @{y} <u>SPOOF</u>"
    pool = pools.make(60, 6)
    pools.write(tmp_path / "m", pool, columns={name: np.arange(60.0)})
    words = ["run", "--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    assert main([*words, "--score-column", name, "--fraction", "0.5"]) == 0
    page = (tmp_path / "o/report.html").read_text()
    assert name not in page
    assert "No pictures: the run does not know the shards" in page
    labels = [
        json.dumps(str(axis.axis_label))
        for plot in plots.all_plots(measures.measure(Folder(str(tmp_path / "o")), 1)).values()
        for axis in plot.axis
    ]
    assert not any("$" in label for label in labels)
    figures = plots.all_plots(measures.measure(Folder(str(tmp_path / "o")), 1)).values()
    tips = [
        text for plot in figures for tool in plot.hover for pair in tool.tooltips for text in pair
    ]
    assert not any("SPOOF" in tip for tip in tips)  # there it would be HTML


@pytest.mark.parametrize(
    "words",
    [
        ("--group-column", "c"),
        ("--score-column", "q", "--keep-first", "low"),
        ("--min-score", "99"),
        ("--budget", "1"),
        ("--score-column", "same", "--undirected"),
        ("--score-column", "random", "--fraction", "1"),
    ],
)
def test_unusual_runs_have_a_report(tmp_path: Path, words: tuple[str, ...]) -> None:
    pool = pools.make(80, 6, copies=0.5)
    columns = {
        "c": [f"class {i % 3}" for i in range(80)],
        "q": np.arange(80.0),
        "same": np.ones(80),
        "random": np.arange(80.0) % 7,
    }
    pools.write(tmp_path / "m", pool, columns=columns)
    run = ["run", "--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    assert main([*run, "--n-neighbors", "3", *words]) == 0
    page = (tmp_path / "o/report.html").read_text()
    m = measures.measure(Folder(str(tmp_path / "o")), 2)
    assert m.own.kept.sum() == m.stats["samples"]["kept"]
    assert ("nothing is kept" in page) == (m.own.kept.sum() == 0)
    assert {curve.name for curve in m.curves} == {"D2", "random", m.score}
    for plot in plots.all_plots(m).values():
        for source in plot.select({"type": ColumnDataSource}):
            for values in source.data.values():
                numbers = [value for value in values if isinstance(value, float)]
                assert np.isfinite(numbers).all()


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(measures, "measure", fail)
    pools.write(tmp_path / "m", pools.make(40, 6))
    words = ["run", "--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    assert main(words) == 0
    assert "warning: no report: no room; `d2filter report OUT`" in capsys.readouterr().err


def test_a_report_of_a_run_of_another_version_fails_with_one_line(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "completions/select.json"
    record = json.loads(path.read_text())
    del record["stats"]["budget"]
    path.write_text(json.dumps(record))
    assert main(["report", str(run)]) == 1
    assert "was written by another version of d2filter" in capsys.readouterr().err


def test_one_sample_has_no_report_and_the_run_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pools.write(tmp_path / "m", pools.make(1, 4))
    words = ["run", "--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    assert main([*words, "--fraction", "1"]) == 0
    assert "report    left out: there is 1 ranked sample" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "o")]) == 1
    assert "1 ranked sample, a report needs 2" in capsys.readouterr().err


def test_remote_features_are_read_only_on_request(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report.obstacle(Folder(str(run))) == ""
    elsewhere = Folder("memory://far/run")
    elsewhere.publish_json(
        "completions/catalog.json", json.loads((run / "completions/catalog.json").read_text())
    )
    assert report.obstacle(elsewhere) == ""
    monkeypatch.setattr(report, "MOST_FAR", 1000)
    assert "features lie elsewhere" in report.obstacle(elsewhere)


def test_a_report_of_an_unfinished_run_or_a_negative_gallery_fails_with_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "no finished catalog" in capsys.readouterr().err
    with pytest.raises(UsageError, match="gallery is -1"):
        report.report(Folder(str(run)), each=-1)


def test_too_many_bad_samples_still_leave_a_report(tmp_path: Path) -> None:
    pool: dict[str, Any] = pools.make(60, 6)
    for i in range(20):
        pool["uid"][i] = "no uid"
    pools.write(tmp_path / "m", pool)
    words = ["run", "--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    assert main(words) == 3
    page = (tmp_path / "o/report.html").read_text()
    assert "Not ranked, by reason" in page
    assert "bad: " in page
