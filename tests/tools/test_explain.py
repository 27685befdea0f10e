"""`explain`, compared with the content of the whole files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import oracle, pools
from support.runs import ranking_columns, stats

from d2filter.cli.main import main
from d2filter.formats import graph, ranking, sparse
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.tools import explain

pytestmark = pytest.mark.usefixtures("cluster")

ONE = 2.0**40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    pool = pools.make(400, 8, copies=0.4)
    pool["uid"][7] = "no uid"
    pool["uid"][9] = pool["uid"][8]
    pools.write(folder / "m", pool, files=2)
    words = ["--metadata-dir", str(folder / "m"), "--out-dir", str(folder / "o")]
    more = ["--n-neighbors", "4", "--partitions", "3", "--collapse-copies", "none"]
    assert main(["run", *words, *more, "--max-bad", "1", "--cut-hardest", "0.05"]) == 2
    assert main(["run", *words, *more, "--max-bad", "1"]) == 0
    return folder / "o"


def test_every_figure_is_that_of_the_files_and_adds_up(run: Path) -> None:
    folder = Folder(str(run))
    r, g = ranking_columns(run), graph.read(folder.sub("graph"))
    hexes = uid_format.to_hex(r["uid_hi"], r["uid_lo"])
    figures = stats(run)
    rank = figures["rank"]
    low, high = r["difficulty"].min(), r["difficulty"].max()
    normalized = (r["difficulty"].astype(float) - low) / (float(high) - low)
    sigma = np.maximum(g.sqdist[:, -1], np.float32(rank["gamma_floor"])).astype(float)
    squared = g.sqdist.astype(float) ** 2
    relative = (squared / (sigma[:, None] * sigma[g.neighbors])).astype(np.float32)
    weights = np.vectorize(lambda x: oracle.weight(x, rank["gamma"]))(relative.astype(float))
    message = np.rint(weights * r["final"][:, None].astype(float))
    subset = {tuple(pair) for pair in np.load(run / "subset.npy").tolist()}
    for row, found in enumerate(explain.explain(folder, hexes)):
        assert isinstance(found, explain.Explained)
        assert found.uid == hexes[row]
        assert (found.rank, found.ranked) == (r["rank"][row], len(hexes))
        assert found.kept == ((r["uid_hi"][row], r["uid_lo"][row]) in subset)
        assert found.forward == r["forward"][row] / ONE
        assert found.final == r["final"][row] / ONE
        assert found.normalized == pytest.approx(normalized[row])
        assert found.normalized + sum(n.gave for n in found.neighbors) == pytest.approx(
            found.forward, abs=1e-9
        )
        assert [n.uid for n in found.neighbors] == [hexes[j] for j in g.neighbors[row]]
        assert [n.rank for n in found.neighbors] == r["rank"][g.neighbors[row]].tolist()
        senders, edge = np.nonzero(g.neighbors == row)
        sooner = r["rank"][senders] < r["rank"][row]
        got = {hexes[s]: message[s, e] for s, e in zip(senders[sooner], edge[sooner], strict=True)}
        got = {uid: m for uid, m in got.items() if m > 0}
        assert (found.suppressed_by == "") == (not got)
        if got:
            assert found.strongest * ONE == max(got.values()) == got[found.suppressed_by]
            assert r["forward"][row] - r["final"][row] == sum(got.values())


def test_a_sample_alone_is_explained_as_among_all(run: Path) -> None:
    folder = Folder(str(run))
    r = ranking_columns(run)
    hexes = uid_format.to_hex(r["uid_hi"], r["uid_lo"])
    together = explain.explain(folder, hexes)
    for row in range(0, len(hexes), 7):
        assert explain.explain(folder, [hexes[row]]) == [together[row]]


def test_text_and_json_contain_the_same_facts(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    r = ranking_columns(run)
    best = int(np.argmin(r["rank"]))
    worst = int(np.argmax(r["rank"]))
    uids = uid_format.to_hex(r["uid_hi"][[best, worst]], r["uid_lo"][[best, worst]])
    capsys.readouterr()
    assert main(["explain", str(run), *uids]) == 0
    text = capsys.readouterr().out
    n = len(r["rank"])
    assert f"{uids[0]}  kept: rank 1 of {n:,} (top 0.3%), the budget is {int(n * 0.3):,}" in text
    assert f"{uids[1]}  dropped: rank {n:,} of {n:,} (top 100.0%)" in text
    assert main(["explain", str(run), *uids, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["rank"], first["kept"], second["kept"]) == (0, True, False)
    assert len(first["neighbors"]) == 4


def test_samples_that_are_not_ranked_are_explained_with_the_reason(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["explain", str(run), "f" * 32]) == 1
    assert "is not a sample of" in capsys.readouterr().err
    assert main(["explain", str(run), "UPPER"]) == 2
    assert "'UPPER' is not a uid" in capsys.readouterr().err
    found = explain._Run(Folder(str(run))).left_out("no uid")
    assert [entry["reason"] for entry in found.entries] == ["malformed uid"]
    assert "bad: malformed uid (" in explain.lines(found)[1]


def test_a_sample_is_distinguished_from_others_with_its_uid(
    tmp_path: Path,
) -> None:
    """The one that was ranked by shard and key; of one that was not, all that are left out."""
    pool = pools.make(60, 6)
    uid = pool["uid"][3]
    for row in (10, 50):
        pool["uid"][row] = uid
    for row in (20, 55):
        pool["uid"][row] = "no uid"
    shard = [f"s3://pool/{row % 2}.tar" for row in range(60)]
    columns = {"shard": shard, "key": [f"{row:05d}" for row in range(60)]}
    pools.write(tmp_path / "m", pool, files=3, columns=columns)
    words = ["--metadata-dir", str(tmp_path / "m"), "--out-dir", str(tmp_path / "o")]
    assert main(["run", *words, "--max-bad", "1"]) == 0
    folder = Folder(str(tmp_path / "o"))
    (found,) = explain.explain(folder, [uid])
    assert isinstance(found, explain.Explained)
    table = pq.read_table(tmp_path / "o/catalog/part-00000.parquet").to_pylist()
    (row,) = [r for r in table if f"{r['uid_hi']:016x}{r['uid_lo']:016x}" == uid]
    assert (found.shard, found.key) == (row["shard"], row["key"])
    assert found.key in ("00003", "00010", "00050")
    assert f"  sample {found.key} of {found.shard}" in explain.lines(found)
    # in whatever row groups they lie
    bad = pq.read_table(tmp_path / "o/bad_samples.parquet")
    pq.write_table(bad, tmp_path / "o/bad_samples.parquet", row_group_size=1)
    left_out = explain._Run(folder).left_out("no uid")
    assert sorted(str(entry["key"]) for entry in left_out.entries) == ["00020", "00055"]


def test_only_row_groups_with_requested_rows_are_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in any order and repeated are those of the whole table, at one read a row group."""
    whole = ranking_columns(run)
    parts = sparse.Sparse(Folder(str(run)).sub("ranking"))
    reads: list[int] = []
    plain = sparse.Sparse.read_row_group

    def counted(self: sparse.Sparse, place: int, names: Any) -> Any:
        reads.append(place)
        return plain(self, place, names)

    monkeypatch.setattr(sparse.Sparse, "read_row_group", counted)
    asked = np.array([5, 390, 5, 0, 200])
    found = parts.rows(asked, ("rank", "uid_hi"))
    assert found["rank"].tolist() == whole["rank"][asked].tolist()
    assert reads == sorted(set(reads))
    assert parts.find(int(whole["uid_hi"][123]), int(whole["uid_lo"][123])) == 123
    assert parts.find(1, 1) == -1


def test_many_samples_are_explained_like_each_alone_and_no_row_group_is_read_twice(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(run))
    r = ranking_columns(run)
    hexes = uid_format.to_hex(r["uid_hi"], r["uid_lo"])
    asked = [hexes[row] for row in (390, 5, 200, 5, 77, 0)]
    alone = [one for uid in asked for one in explain.explain(folder, [uid])]
    assert [one.uid for one in alone] == asked
    reads: Counter[tuple[str, int, tuple[str, ...]]] = Counter()
    plain = sparse.Sparse.read_row_group

    def counted(self: sparse.Sparse, place: int, names: Any) -> Any:
        reads[self._folder.url, place, tuple(names)] += 1
        return plain(self, place, names)

    monkeypatch.setattr(sparse.Sparse, "read_row_group", counted)
    assert explain.explain(folder, asked) == alone
    assert len(reads) > 3
    assert max(reads.values()) == 1
    assert explain.explain(folder, []) == []


def test_uids_with_equal_first_halves_are_distinguished(tmp_path: Path) -> None:
    halves = [(1, 5), (7, 2), (7, 9), (8, 0)], [(2, 1), (7, 3), (7, 4)]
    for number, pairs in enumerate(halves):
        hi, lo = np.array(pairs, np.uint64).T
        zeros = np.zeros(hi.size, np.int64)
        part = ranking.RankingPart(
            uid_hi=hi, uid_lo=lo, difficulty=zeros.astype(np.float32), forward=zeros, final=zeros,
            rank=zeros, suppressed_by=zeros,
        )  # fmt: skip
        ranking.publish_part(Folder(str(tmp_path)), number, part)
    parts = sparse.Sparse(Folder(str(tmp_path)))
    every = [pair for pairs in halves for pair in pairs]
    assert [parts.find(hi, lo) for hi, lo in every] == list(range(7))
    assert [parts.find(hi, lo) for hi, lo in [(7, 1), (7, 8), (7, 10), (0, 5), (9, 0)]] == [-1] * 5
