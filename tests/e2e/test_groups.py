"""Classes through the command line: edges inside of classes, and the share of each in a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import pools
from support.runs import copy_of, run, stats

import d2filter
from d2filter.formats import graph
from d2filter.formats.paths import Folder
from d2filter.formats.runstate import RunState

pytestmark = pytest.mark.usefixtures("cluster")

N = 600
POOL = pools.make(N, 8)
SIZES = {"cat": 300, "dog": 200, "newt": 97, "olm": 3}
LABELS = np.random.default_rng(3).permutation([name for name, n in SIZES.items() for _ in range(n)])


@pytest.fixture(scope="module")
def runs(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One pool in one partition, and shuffled from three files in as many as there are classes."""
    folder = tmp_path_factory.mktemp("groups")
    outs = []
    for name, files, shuffle, partitions in (("one", 1, None, 1), ("more", 3, 5, 9)):
        columns = {"label": LABELS.tolist(), "score": np.linspace(0, 1, N).tolist()}
        metadata = pools.write(
            folder / f"m-{name}", POOL, files=files, shuffle=shuffle, columns=columns
        )
        out = folder / name
        words = ("--n-neighbors", 5, "--partitions", partitions, "--score-column", "score")
        words = (*words, "--group-column", "label", "--fraction", "0.5")
        assert run("run", "--metadata-dir", metadata, "--out-dir", out, *words) == 0
        outs.append(out)
    return outs


def ranks(out: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in (out / "ranking").glob("*.parquet"):
        t = pq.read_table(path).to_pydict()
        for hi, lo, rank in zip(t["uid_hi"], t["uid_lo"], t["rank"], strict=True):
            found[f"{hi:016x}{lo:016x}"] = rank
    return found


def kept_of(found: dict[str, int], size: int) -> dict[str, int]:
    label = dict(zip(POOL["uid"], LABELS.tolist(), strict=True))
    counts = dict.fromkeys(SIZES, 0)
    for uid, rank in found.items():
        counts[label[uid]] += rank < size
    return counts


def test_classes_have_edges_inside_and_their_share_of_every_budget(runs: list[Path]) -> None:
    figures = stats(runs[1])
    assert (figures["graph"]["groups"], figures["graph"]["partitions"]) == (4, 4)
    assert figures["rank"]["cut_edges"] == 0
    for out in runs:
        part = graph.read(Folder(str(out / "graph")))
        assert part.group is not None
        inside = np.where(part.neighbors >= 0, part.group[part.neighbors], part.group[:, None])
        assert (inside == part.group[:, None]).all()
        # an olm has two others
        assert (part.neighbors >= 0).sum() == 5 * 597 + 2 * 3
        assert run("verify", out) == 0
    one, more = (ranks(out) for out in runs)
    assert one == more
    half = kept_of(one, 300)
    for size, kept in ((300, half), (60, kept_of(one, 60)), (7, kept_of(one, 7))):
        for name, rows in SIZES.items():
            assert abs(kept[name] - size * rows / N) <= 1


def test_the_command_line_ranks_as_the_notebook_does(runs: list[Path]) -> None:
    pool = d2filter.rank(
        [POOL["img"], POOL["txt"]],
        np.linspace(0, 1, N).astype(np.float32),
        n_neighbors=5,
        groups=LABELS,
        uids_hex=POOL["uid"],
        tuned_for="0.5",
    )
    assert ranks(runs[0]) == dict(zip(POOL["uid"], pool.rank.tolist(), strict=True))


@pytest.mark.parametrize(
    "words",
    [
        ("--group-budgets", "uniform", "--cut-hardest", "0.1"),
        ("--method", "moderate"),
        ("--method", "random", "--group-budgets", "uniform"),
    ],
)
def test_other_budgets_and_methods_give_each_class_its_share(
    words: tuple[str, ...], runs: list[Path], tmp_path: Path
) -> None:
    outs = [copy_of(out, tmp_path) for out in runs]
    for out in outs:
        assert run("rank", "--out-dir", out, "--overwrite", "rank", *words) == 0
        assert run("select", "--out-dir", out) == 0
        assert run("verify", out) == 0
    one, more = (ranks(out) for out in outs)
    assert one == more
    if "uniform" in words:
        counts = kept_of(one, 120)
        assert counts["olm"] >= 2
        assert counts["cat"] == counts["dog"]
    else:
        assert abs(kept_of(one, 300)["cat"] - 150) <= 1


def test_verify_sees_a_class_that_was_left_out_of_its_turn(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = (runs[0] / "ranking").glob("*.parquet")
    whole = path.read_bytes()
    table = pq.read_table(path)
    rank = table["rank"].to_numpy().copy()
    rank[[0, 1]] = rank[[1, 0]]
    pq.write_table(table.set_column(5, "rank", [rank]), path)
    assert run("verify", runs[0]) == 1
    assert "ranks do not give each class its turn" in capsys.readouterr().out
    path.write_bytes(whole)


def test_samples_without_a_class_are_bad_and_a_missing_class_column_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [None, None, *LABELS[2:].tolist()]
    metadata = pools.write(tmp_path / "m", POOL, columns={"label": labels})
    words = ("graph", "--metadata-dir", metadata, "--out-dir", tmp_path / "o")
    assert run(*words, "--group-column", "label") == 0
    figures = stats(tmp_path / "o")
    assert figures["samples"]["bad"] == 2
    assert figures["catalog"]["bad_reasons"] == {"no class": 2}
    words = ("graph", "--metadata-dir", metadata, "--out-dir", tmp_path / "p")
    assert run(*words, "--group-column", "kind") == 1
    assert "has no column 'kind'" in capsys.readouterr().err


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a graph of classes in so many partitions, but for its record; its command's words."""
    metadata = pools.write(tmp_path / "m", POOL, columns={"label": LABELS.tolist()})
    words = ("--metadata-dir", metadata, "--out-dir", tmp_path / "o", "--group-column", "label")

    def make(partitions: int) -> tuple[Any, ...]:
        with monkeypatch.context() as patch:
            patch.setattr(RunState, "finish", finish_all_but("graph", RunState.finish))
            assert run("graph", *words, "--partitions", partitions) == 130
        assert len(list((tmp_path / "o" / "graph").glob("*.parquet"))) == partitions
        return words

    return make


def test_another_number_of_partitions_leaves_no_part_of_the_first(
    tmp_path: Path, interrupted: Any
) -> None:
    assert run("run", *interrupted(4), "--partitions", 2) == 0
    assert len(list((tmp_path / "o" / "graph").glob("*.parquet"))) == 2
    assert run("verify", tmp_path / "o") == 0


def test_without_a_number_a_graph_of_classes_keeps_its_partitions(
    tmp_path: Path, interrupted: Any
) -> None:
    assert run("graph", *interrupted(3)) == 0
    assert len(list((tmp_path / "o" / "graph").glob("*.parquet"))) == 3


def finish_all_but(stage: str, finish: Any) -> Any:
    def until(state: RunState, plan: Any, **more: Any) -> None:
        if plan.stage == stage:
            raise KeyboardInterrupt
        finish(state, plan, **more)

    return until


def test_a_large_class_is_searched_by_cells(tmp_path: Path) -> None:
    metadata = pools.write(tmp_path / "m", POOL, columns={"label": LABELS.tolist()})
    words = ("--metadata-dir", metadata, "--group-column", "label", "--undirected")
    words = (*words, "--n-neighbors", 3, "--target-recall", "0.5", "--exact-below", 90)
    found = []
    for partitions in (1, 3):
        out = tmp_path / f"o{partitions}"
        assert run("run", *words, "--out-dir", out, "--partitions", partitions) == 0
        assert run("verify", out) == 0
        found.append(ranks(out))
    assert found[0] == found[1]
    graphs = stats(tmp_path / "o1")["graph"]
    low, high = graphs["recall_ci"]
    assert low <= graphs["recall"] <= high
    assert graphs["worst_class_recall"] <= graphs["recall"]
    assert graphs["recall_queries"] == N


def test_of_a_repeated_uid_the_class_that_sorts_first_stays(tmp_path: Path) -> None:
    found = []
    for name, labels in (("a", ("dog", "cat")), ("b", ("cat", "dog"))):
        folder = tmp_path / name
        folder.mkdir()
        for number, label in enumerate(labels):
            table = {"uid": POOL["uid"], "label": [label] * N}
            pq.write_table(pa.table(table), folder / f"{number}.parquet")
            np.savez(folder / f"{number}.npz", l14_img=POOL["img"], l14_txt=POOL["txt"])
        out = tmp_path / f"o-{name}"
        words = ("--metadata-dir", folder, "--out-dir", out, "--group-column", "label")
        assert run("graph", *words) == 0
        found.append(json.loads((out / "index" / "classes.json").read_text()))
    assert found == [["cat"], ["cat"]]
