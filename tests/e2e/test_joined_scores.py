"""Scores from files, subsets to rank within, and sums of scores, through the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from support import pools
from support.pools import with_column
from support.runs import difficulties, graph_difficulties, run, stats

from d2filter.algorithm import sizes
from d2filter.algorithm.scores import registry as scores
from d2filter.formats import join_table
from d2filter.stages.catalog import pool_scores as score_stage

pytestmark = pytest.mark.usefixtures("cluster")

N = 600
POOL = pools.make(N, 8)
RNG = np.random.default_rng(4)
OWN = RNG.normal(size=N).round(1).astype(np.float32)
DFN = RNG.normal(size=N).astype(np.float32)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same pool in one file, and shuffled in four."""
    folder = tmp_path_factory.mktemp("joined")
    columns = {"own": OWN.tolist()}
    return [
        pools.write(folder / "one", POOL, columns=columns),
        pools.write(folder / "four", POOL, files=4, shuffle=3, columns=columns),
    ]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "CATALOG_PART", 16_000)
    monkeypatch.setattr(join_table, "BUCKET_ROWS", 150)
    monkeypatch.setattr(score_stage, "KEYS_AT_ONCE", 100)


def score_table(rows: list[int], more: int = 0) -> Any:
    """dfn of some rows in some order, and of uids that the pool does not have."""
    uid = [POOL["uid"][row] for row in rows] + [f"{row:032x}" for row in range(more)]
    value = np.append(DFN[rows], np.arange(more, dtype=np.float32))
    return pa.table({"uid": uid, "dfn": value, "other": -value})


def write_subset(path: Path, rows: list[int], *, order: bool = True) -> Path:
    pairs = [(int(POOL["uid"][r][:16], 16), int(POOL["uid"][r][16:], 16)) for r in rows]
    np.save(path, np.array(sorted(pairs) if order else pairs, "u8,u8"))
    return path


def by_uid(values: np.ndarray) -> dict[str, float]:
    return dict(zip(POOL["uid"], values.tolist(), strict=True))


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["parquet", "csv", "folder"])
def test_scores_of_a_file_are_joined_by_uid(
    kind: str, metadata: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = RNG.permutation(N).tolist()
    table = score_table(rows[5:], more=7)
    path = tmp_path / f"scores.{kind}"
    if kind == "csv":
        pacsv.write_csv(table, path)
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=100)
    else:
        path.mkdir()
        pq.write_table(table.slice(0, 200), path / "a.parquet")
        pq.write_table(table.slice(200), path / "b.parquet")
    words = ("--score-file", path, "--score-column", "dfn")
    out = tmp_path / "o"
    assert run("run", "--metadata-dir", metadata[1], "--out-dir", out, *words) == 0
    found = difficulties(out)
    expected = by_uid(DFN)
    assert found == {POOL["uid"][row]: expected[POOL["uid"][row]] for row in rows[5:]}
    figures = stats(out)
    assert figures["samples"]["bad"] == 5
    assert figures["catalog"]["bad_reasons"] == {"no row in the score file": 5}
    score = {"name": "dfn", "high_is": "unknown", "kept_first": "high"}
    assert figures["catalog"]["score"] == score
    said = f"7 of the {N + 2} uids of the score file belong to no ranked sample"
    assert said in capsys.readouterr().out
    assert not (out / "catalog" / "outside").exists()
    assert run("verify", out, "--deep") == 0


def test_a_score_file_counts_by_its_content(
    metadata: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scores.parquet"
    table = score_table(list(range(N))).select(["uid", "dfn"])
    pq.write_table(table, path)
    words = ("graph", "--out-dir", tmp_path / "o", "--score-file", path)
    assert run(*words, "--metadata-dir", metadata[0]) == 0
    assert difficulties(tmp_path / "o") == by_uid(DFN)  # the only column
    os.utime(path, (1, 1))
    for more in ((), ("--metadata-dir", metadata[0])):
        capsys.readouterr()
        assert run(*words, *more) == 0
        assert "catalog   done before" in capsys.readouterr().out
    changed = table.set_column(1, "dfn", pa.array(-DFN))
    pq.write_table(changed, path)
    for more in ((), ("--metadata-dir", metadata[0])):
        assert run(*words, *more) == 1
        assert "input file score-file/scores.parquet has changed" in last_line(capsys)


TWICE = [POOL["uid"][0]] * 2 + POOL["uid"][2:20]


@pytest.mark.parametrize(
    ("breaks", "column", "code", "said"),
    [
        (lambda t: t, "", 2, "has 2 columns beside uid (dfn, other): choose one"),
        (lambda t: t, "dfn2", 2, "has no column 'dfn2' (did you mean dfn?)"),
        (lambda t: t.drop_columns(["uid"]), "dfn", 1, "has no column uid"),
        (lambda t: t.select(["uid"]), "", 2, "has 0 columns beside uid"),
        (lambda t: with_column(t, "uid", ["cat"] * len(t)), "dfn", 1, "'cat' in row 0 is not a"),
        (lambda t: with_column(t, "uid", TWICE), "dfn", 1, "in column dfn: keep one row a uid"),
        (
            lambda t: with_column(t, "dfn", [[1.0]] * len(t)),
            "dfn",
            1,
            "column dfn must hold numbers",
        ),
    ],
)
def test_a_file_that_is_not_a_score_file_is_refused(
    breaks: Any, column: str, code: int, said: str, metadata: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "scores.parquet"
    pq.write_table(breaks(score_table(list(range(20)))), path)
    words = ("--score-file", path, *(["--score-column", column] if column else []))
    assert run("graph", "--metadata-dir", metadata[0], "--out-dir", tmp_path / "o", *words) == code
    assert said in last_line(capsys)


def test_a_malformed_csv_is_refused(
    metadata: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("graph", "--metadata-dir", metadata[0], "--out-dir", tmp_path / "o", "--score-file")
    (tmp_path / "a.csv").write_text("")
    assert run(*words, tmp_path / "a.csv") == 1
    assert "is not a readable csv file" in last_line(capsys)
    (tmp_path / "b.csv").write_text(f"uid,dfn\n{POOL['uid'][0]},high\n")
    assert run(*words, tmp_path / "b.csv") == 1
    assert "is not a readable csv file" in last_line(capsys)
    assert run(*words, tmp_path / "none.csv") == 1
    assert "is neither a .parquet or .csv file" in last_line(capsys)


def test_only_samples_of_another_filter_are_ranked(
    metadata: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = sorted(RNG.permutation(N)[:250].tolist())
    path = write_subset(tmp_path / "subset.npy", inside, order=False)
    # a broken sample outside is outside, one inside is bad
    broken = {**POOL, "img": POOL["img"].copy()}
    away = next(row for row in range(N) if row not in inside)
    broken["img"][[away, inside[0]]] = 0
    made_of = [
        pools.write(tmp_path / "m1", broken),
        pools.write(tmp_path / "m3", broken, files=3, shuffle=8),
    ]
    subsets = []
    for number, (folder, partitions) in enumerate(
        [(made_of[0], 1), (made_of[1], 3), (made_of[1], 8)]
    ):
        out = tmp_path / f"o{number}"
        words = ("--within", path, "--partitions", partitions, "--n-neighbors", 2)
        assert run("run", "--metadata-dir", folder, "--out-dir", out, *words) == 0
        subsets.append((out / "subset.npy").read_bytes())
        assert run("verify", out, "--deep") == 0
        samples = stats(out)["samples"]
        assert (samples["outside"], samples["bad"], samples["ranked"]) == (N - 250, 1, 249)
        assert set(difficulties(out)) == {POOL["uid"][row] for row in inside[1:]}
        ledger = pq.read_table(out / "bad_samples.parquet").to_pylist()
        apart = [e["uid"] for e in ledger if e["status"] == "outside"]
        assert sorted(apart) == sorted(set(POOL["uid"]) - {POOL["uid"][row] for row in inside})
    assert len(set(subsets)) == 1
    # the same as a pool that never had the others
    alone = {name: [broken[name][row] for row in inside] for name in ("uid", "img", "txt")}
    alone = {"uid": alone["uid"], **{n: np.array(alone[n]) for n in ("img", "txt")}}
    folder = pools.write(tmp_path / "alone", alone)
    words = ("--metadata-dir", folder, "--out-dir", tmp_path / "p", "--n-neighbors", 2)
    assert run("run", *words) == 0
    assert (tmp_path / "p" / "subset.npy").read_bytes() == subsets[0]
    # a run directory is its subset; another subset is another input
    words = ("--metadata-dir", made_of[0], "--out-dir", tmp_path / "o0", "--n-neighbors", 2)
    assert run("run", *words, "--within", tmp_path / "p") == 1
    assert "input file within/subset.npy has changed" in last_line(capsys)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(3, np.int64), "has dtype int64"),
        (np.zeros(2, "u8,u8"), "600 outside of the subset"),
        (None, "is not a .npy file"),
    ],
)
def test_a_file_that_is_not_a_subset_is_refused(
    array: Any, said: str, metadata: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if array is not None:
        np.save(tmp_path / "a.npy", array)
    words = ("--metadata-dir", metadata[0], "--out-dir", tmp_path / "o")
    assert run("graph", *words, "--within", tmp_path / "a.npy") == 1
    assert said in last_line(capsys)


def percentile(values: np.ndarray) -> np.ndarray:
    lower = (values[None] < values[:, None]).sum(axis=1)
    same = (values[None] == values[:, None]).sum(axis=1)
    found: np.ndarray = (2 * lower + same) / (2 * values.size)
    return found


def test_a_computed_score_a_column_and_a_file_are_added(
    metadata: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "scores.parquet"
    pq.write_table(score_table(RNG.permutation(N).tolist()), path)
    words = ("--score", "0.7*clip_score + 0.3*own-dfn", "--score-file", path)
    clip = scores.clip_score(POOL["img"], POOL["txt"]).astype(np.float64)
    total = 0.7 * clip + 0.3 * OWN.astype(np.float64) + -1.0 * DFN.astype(np.float64)
    expected = by_uid(total.astype(np.float32))
    assert graph_difficulties(metadata[0], tmp_path / "a", *words) == expected
    assert graph_difficulties(metadata[1], tmp_path / "b", *words) == expected
    assert stats(tmp_path / "a")["catalog"]["score"]["name"] == "0.7*clip_score+0.3*own-dfn"
    # another spelling of the same is the same
    words = ("--score", "0.70*clip_score+.3*own - dfn", "--score-file", path)
    assert graph_difficulties(metadata[0], tmp_path / "a", *words) == expected
    turned = graph_difficulties(metadata[0], tmp_path / "c", *words, "--keep-first", "low")
    assert turned == {uid: -value for uid, value in expected.items()}


def test_percentile_ranks_and_pool_scores_can_be_added(
    metadata: list[Path], tmp_path: Path
) -> None:
    words = ("--score", "rank(own)-0.25*rank(prototypicality)+0.01*clip_score")
    found = graph_difficulties(metadata[0], tmp_path / "a", *words)
    assert len(list((tmp_path / "a" / "catalog").glob("part-*.parquet"))) > 1
    assert found == graph_difficulties(metadata[1], tmp_path / "b", *words)
    assert not (tmp_path / "b" / "catalog" / "scores").exists()
    own = graph_difficulties(metadata[0], tmp_path / "c", "--score", "prototypicality")
    prototypical = np.array([own[uid] for uid in POOL["uid"]], np.float32)
    clip = scores.clip_score(POOL["img"], POOL["txt"]).astype(np.float64)
    total = 1.0 * percentile(OWN) + -0.25 * percentile(prototypical)
    total = total + 0.01 * clip
    assert found == by_uid(total.astype(np.float32))


def test_percentile_ranks_are_over_the_ranked_samples(metadata: list[Path], tmp_path: Path) -> None:
    inside = list(range(0, N, 3))
    path = write_subset(tmp_path / "s.npy", inside)
    out = tmp_path / "o"
    words = ("--score", "rank(own)", "--within", path, "--fraction", 0.5, "--partitions", 3)
    assert run("run", "--metadata-dir", metadata[1], "--out-dir", out, *words) == 0
    expected = percentile(OWN[inside]).astype(np.float32).tolist()
    uids = [POOL["uid"][row] for row in inside]
    assert difficulties(out) == dict(zip(uids, expected, strict=True))
    assert run("verify", out, "--deep") == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--score", "0.7*clip_score+0.3*ovn"), 2, "'0.3*ovn': 'ovn' is neither a computed score"),
        (("--score", "0.7*clip_score+0.3*own2"), 2, "(did you mean own?)"),
        (("--score", "beauty"), 2, "nor a column of"),
        (("--score", "clip_score+"), 2, "unreadable from '+' on"),
        (("--score", "clip_score 0.3"), 2, "unreadable from '0.3'"),
        (("--score", "own", "--score-column", "own"), 2, "both given"),
        (("--score", "own+el2n"), 2, "score own+el2n needs --training-log"),
        (("--score", "clip_score", "--score-file", "FILE"), 2, "is not a column of score-file"),
        (("--score", "1e39*rank(own)"), 1, "is too large for float32"),
    ],
)
def test_an_impossible_sum_of_scores_is_refused(
    words: tuple[str, ...], code: int, said: str, metadata: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "scores.parquet"
    pq.write_table(score_table(list(range(N))), path)
    words = tuple(str(path) if word == "FILE" else word for word in words)
    assert run("graph", "--metadata-dir", metadata[0], "--out-dir", tmp_path / "o", *words) == code
    assert said in last_line(capsys)
