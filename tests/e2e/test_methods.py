"""Methods other than D2, and sweeps, through the command line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from support import pools
from support.runs import ranking_by_uid, run, stats

from d2filter.algorithm.methods import selectors
from d2filter.algorithm.scores import registry as scores
from d2filter.cli import main as cli
from d2filter.cli import options, recipes
from d2filter.config import METHODS
from d2filter.stages.rank import in_memory
from d2filter.tools import sweep as sweeping

pytestmark = pytest.mark.usefixtures("cluster")

N = 900


@pytest.fixture(scope="module")
def runs(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One pool, from metadata in one order and one file, in another order and three files."""
    folder = tmp_path_factory.mktemp("methods")
    outs = []
    for name, files, shuffle, partitions in (("one", 1, None, 1), ("three", 3, 5, 3)):
        pool = pools.make(N, 8)
        columns = {"hardness": scores.clip_score(pool["img"], pool["txt"])}
        metadata = pools.write(
            folder / f"m-{name}", pool, files=files, shuffle=shuffle, columns=columns
        )
        out = folder / name
        words = ("--n-neighbors", 3, "--exact-below", 100, "--best-effort")
        words = (*words, "--target-recall", 0.9, "--partitions", partitions)
        words = (*words, "--score-column", "hardness")
        assert run("run", "--metadata-dir", metadata, "--out-dir", out, *words) == 0
        outs.append(out)
    return outs


@pytest.mark.parametrize("method", [name for name in METHODS if name != "d2"])
def test_every_method_ranks_alike_in_any_partitions_and_verify_proves_it(
    method: str, runs: list[Path]
) -> None:
    words = ("--method", method, "--overwrite", "rank")
    found = []
    for out in runs:
        assert run("rank", "--out-dir", out, *words) == 0
        found.append(ranking_by_uid(out))
    for name, values in found[0].items():
        assert (values == found[1][name]).all(), name
    assert sorted(found[0]["rank"].tolist()) == list(range(N))
    if method == "score":
        order = np.argsort(found[0]["rank"])
        assert (np.diff(found[0]["difficulty"][order]) <= 0).all()
    assert run("select", "--out-dir", runs[0], "--fraction", 0.2) == 0
    assert run("verify", runs[0]) == 0


def test_verify_refutes_a_ranking_of_another_seed(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("rank", "--out-dir", runs[0], "--overwrite", "rank")
    assert run(*words, "--method", "random", "--seed", 1) == 0
    assert run("select", "--out-dir", runs[0]) == 0
    record = runs[0] / "completions" / "rank.json"
    whole = json.loads(record.read_text())
    whole["options"]["seed"] = 2
    record.write_text(json.dumps(whole))
    assert run("verify", runs[0]) == 1
    assert "ranks are not those of random" in capsys.readouterr().out
    assert run(*words) == 0


def test_the_hardest_and_copies_come_last_for_every_method(runs: list[Path]) -> None:
    words = ("--method", "random", "--cut-hardest", "0.1", "--collapse-copies")
    assert run("rank", "--out-dir", runs[0], "--overwrite", "rank", *words) == 0
    counted = stats(runs[0])["rank"]["late"]
    late = counted["hardest"] + counted["copies"]
    found = ranking_by_uid(runs[0])
    stays = np.sort(found["difficulty"])[-91]  # the best of those that are not cut
    last = found["rank"] >= N - late
    assert late > 90
    assert last[found["difficulty"] > stays].all()
    assert run("rank", "--out-dir", runs[0], "--overwrite", "rank") == 0


def test_a_pool_that_is_too_large_for_a_method_is_refused(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    small = replace(selectors.SELECTORS["herding"], most=N - 1)
    monkeypatch.setitem(selectors.SELECTORS, "herding", small)
    words = ("--method", "herding")
    for command in (
        ("sweep", runs[0], *words),
        ("rank", "--out-dir", runs[0], *words, "--overwrite", "rank"),
    ):
        assert run(*command) == 2
        said = capsys.readouterr().err
        assert "herding" in said
        assert small.instead in said
    # nothing was thrown away for it
    assert (runs[0] / "completions" / "rank.json").exists()
    assert list((runs[0] / "ranking").glob("*.parquet"))
    assert run("rank", "--out-dir", runs[0], "--method", "best") == 2


def test_options_that_a_method_does_not_read_are_not_swept_and_labels_differ() -> None:
    grid = sweeping.grid(
        ["0.5"], method=["random", "d2"], n_neighbors=[1, 5], gamma=[1.0, 1.0000001],
        collapse_copies=[0.0],
    )  # fmt: skip
    # copies are those of the lists that count
    assert [(c.method, c.n_neighbors, c.gamma) for c in grid.configs] == [
        ("random", 1, "auto"), ("random", 5, "auto"), ("d2", 1, 1.0), ("d2", 1, 1.0000001),
        ("d2", 5, 1.0), ("d2", 5, 1.0000001),
    ]  # fmt: skip
    assert len({sweeping.label(c) for c in grid.configs}) == 6


def test_an_option_of_one_method_is_read_by_it_and_refused_by_the_others(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for method, option, value, other in (
        ("infomax", "--redundancy", 0, "d2"), ("density", "--temperature", 100, "infomax"),
    ):  # fmt: skip
        found = []
        for words in ((), (option, value)):
            again = ("--method", method, *words, "--overwrite", "rank")
            assert run("rank", "--out-dir", runs[0], *again) == 0
            found.append(ranking_by_uid(runs[0])["rank"])
        assert (found[0] != found[1]).any()
        assert run("select", "--out-dir", runs[0]) == 0
        assert run("verify", runs[0]) == 0
        capsys.readouterr()
        again = ("--method", other, option, value, "--overwrite", "rank")
        assert run("rank", "--out-dir", runs[0], *again) == 2
        assert f"the method {other} does not use it" in capsys.readouterr().err
        for bad in (-1, "inf", "nan"):
            again = ("--method", method, option, bad)
            assert run("rank", "--out-dir", runs[0], *again) == 2
            assert f"{option[2:]} is {float(bad)}, allowed is" in capsys.readouterr().err
    # likeness that costs nothing leaves the score alone
    words = ("--method", "infomax", "--redundancy", 0, "--overwrite", "rank")
    assert run("rank", "--out-dir", runs[0], *words) == 0
    ranked = ranking_by_uid(runs[0])
    assert (np.diff(ranked["difficulty"][np.argsort(ranked["rank"])]) <= 0).all()
    grid = sweeping.grid(["0.5"], method=["infomax", "d2", "score"], redundancy=[0.0, 2.0])
    assert [(c.method, c.redundancy) for c in grid.configs] == [
        ("infomax", 0.0), ("infomax", 2.0), ("d2", 1.0), ("score", 1.0),
    ]  # fmt: skip


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "sweep" / "table.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_a_sweep_ranks_as_rank_does_and_does_nothing_twice(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = runs[0]
    grid = ("--gamma", "0.1,3", "--n-neighbors", "1,3", "--method", "d2,score,random")
    assert run("sweep", out, *grid, "--fraction", "0.1,0.5") == 0
    rows = rows_of(out)
    settings = {row["setting"] for row in rows}
    # gamma and k are nothing to the two others
    assert settings == {
        "score", "random", "d2 k=1 gamma=0.1", "d2 k=1 gamma=3.0", "d2 k=3 gamma=0.1",
        "d2 k=3 gamma=3.0",
    }  # fmt: skip
    assert len(rows) == 2 * len(settings)
    mean = {(r["setting"], r["fraction"]): float(r["score"]) for r in rows}
    for fraction in ("0.1", "0.5"):
        assert max(settings, key=lambda name: mean[name, fraction]) == "score"
    assert all(0 <= float(r[name]) <= 1 for r in rows for name in ("coverage", "groups", "copies"))
    # the score is the cosine of the two halves: swapped captions can be told, at any setting
    wrong = {(r["setting"], r["fraction"]): float(r["wrong"]) for r in rows}
    for fraction in ("0.1", "0.5"):
        assert wrong["score", fraction] < wrong["random", fraction] < float(fraction) + 0.3
        assert max(settings, key=lambda name: wrong[name, fraction]) == "random"
    # what the table says of a setting is true of its ranking
    one = ("--gamma", 3, "--n-neighbors", 1)
    assert run("rank", "--out-dir", out, "--overwrite", "rank", *one) == 0
    found = ranking_by_uid(out)
    kept = found["rank"] < N // 2
    (row,) = [r for r in rows if r["setting"] == "d2 k=1 gamma=3.0" and r["fraction"] == "0.5"]
    assert float(row["score"]) == pytest.approx(found["difficulty"][kept].mean(), rel=1e-6)
    order = np.argsort(found["difficulty"], kind="stable")
    # of equal scores each counts with what is kept of all of them
    share = np.array([kept[found["difficulty"] == score].mean() for score in found["difficulty"]])
    assert float(row["score_decile_10"]) == pytest.approx(share[order[-90:]].mean())
    page = (out / "sweep" / "plot.html").read_text()
    assert all(f'data-setting="{setting}"' in page for setting in settings)
    capsys.readouterr()
    monkeypatch.setattr(in_memory, "read_pool", None)  # would fail if anything were measured
    assert run("sweep", out, *grid, "--fraction", "0.5") == 0
    assert capsys.readouterr().out.count("(measured before)") == len(settings)
    assert len(rows_of(out)) == len(settings)
    monkeypatch.undo()
    assert run("rank", "--out-dir", out, "--overwrite", "rank") == 0


def test_measures_of_another_graph_are_measured_again(runs: list[Path]) -> None:
    out = runs[1]
    words = ("sweep", out, "--method", "score", "--fraction", "0.5")
    assert run(*words) == 0
    (path,) = (out / "sweep" / "settings").glob("score-*.json")
    known = json.loads(path.read_text())
    known["graph"] = "another"
    known["measures"]["0.5"]["score"] = 7.0
    path.write_text(json.dumps(known))
    assert run(*words) == 0
    assert float(rows_of(out)[0]["score"]) < 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--gamma", "1,wide", "separated by commas"),
        ("--gamma", "-1", "gamma is -1.0"),
        ("--fraction", "0.1,2", "fraction is 2"),
        ("--n-neighbors", "1,9", "n-neighbors is 9, the graph of"),
        ("--method", "d2,best", "method is 'best'"),
    ],
)
def test_impossible_sweeps_are_refused(
    option: str, value: str, said: str, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", runs[0], f"{option}={value}") == 2
    assert said in capsys.readouterr().err


def test_a_sweep_without_a_graph_names_the_missing_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", tmp_path / "nothing") == 1
    assert "run `d2filter graph` first" in capsys.readouterr().err


def test_help_names_every_score_method_and_recipe_on_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run("run", "--help")
    begins = [line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines()]
    for name in (*selectors.SELECTORS, *scores.SCORES, *recipes.RECIPES):
        assert name in begins


@pytest.mark.parametrize(
    "command", ["embed", "graph", "rank", "select", "sweep", "advise", "verify", "demo"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"d2filter {command}" in said
    # no default is told twice
    assert not re.search(r"\(default[^)]*\)\s*\(default", said)


def test_a_recipe_sets_the_options_that_are_not_given(tmp_path: Path) -> None:
    words = [
        "run",
        "--out-dir",
        "o",
        "--metadata-dir",
        "m",
        "--score",
        "prototypicality",
        "--recipe",
    ]
    for name, recipe in recipes.RECIPES.items():
        typed = [f"--{option}={value}" for option, value in recipe.values.items()]
        by_name, by_option = cli.parse([*words, name]), cli.parse([*words[:-1], *typed])
        assert {**vars(by_option), "recipe": name} == vars(by_name)
        # all of them are good options
        options.run_config(by_name)
    assert cli.parse([*words, "datacomp", "--gamma", "7"]).gamma == 7
    (tmp_path / "budget.yaml").write_text("budget: 100\n")
    for more in (["--budget", "100"], ["--config", str(tmp_path / "budget.yaml")]):
        chosen = options.run_config(cli.parse([*words, "datacomp", *more])).select
        assert (chosen.budget, chosen.fraction) == (100, None)
    (tmp_path / "run.yaml").write_text("gamma: 3\n")
    chosen = cli.parse([*words, "datacomp", "--config", str(tmp_path / "run.yaml")])
    assert (chosen.gamma, chosen.fraction) == (3, "0.3")
    # a command takes what it has
    assert cli.parse(["rank", "--out-dir", "o", "--recipe", "datacomp"]).n_neighbors == 1


def test_an_unknown_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--out-dir", "o", "--recipe", "best") == 2
    assert "recipe is 'best', allowed are datacomp" in capsys.readouterr().err


def test_a_file_of_options_holds_no_recipe_and_switches_are_true_or_false(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    words = ["run", "--out-dir", "o", "--metadata-dir", "m", "--config", str(path)]
    path.write_text("recipe: datacomp\n")
    assert run(*words) == 2
    assert "unknown option 'recipe'" in capsys.readouterr().err
    path.write_text("undirected: false\n")
    assert cli.parse(words).undirected is False
    path.write_text("undirected: true\n")
    assert cli.parse(words).undirected is True
    path.write_text("undirected: sometimes\n")
    assert run(*words) == 2
    assert "allowed are true and false" in capsys.readouterr().err


def test_a_seed_does_not_change_d2(runs: list[Path]) -> None:
    assert run("rank", "--out-dir", runs[0], "--overwrite", "rank", "--seed", 1) == 0
    assert run("rank", "--out-dir", runs[0]) == 0
