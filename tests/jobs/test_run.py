"""Named runs: their configurations, `--set`, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2filter.algorithm import sizes
from d2filter.algorithm.knn import in_memory as knn
from d2filter.algorithm.knn import sketch
from d2filter.cli import main as cli
from d2filter.cli import options
from d2filter.config import RunConfig, parse_bytes
from d2filter.errors import UsageError
from jobs import run, runs

GIVEN = {
    "out-dir": "/shared/run",
    "metadata-dir": "/shared/pool",
    "shards": "/shared/{000..127}.tar /shared/more",
}
PIPELINES = [name for name, made in runs.RUNS.items() if made().command == "run"]


def configuration(name: str, **given: str) -> RunConfig:
    made = runs.RUNS[name]()
    needed = {need: GIVEN[need] for need in made.needs}
    return made.configuration(
        name, {**needed, **{k.replace("_", "-"): v for k, v in given.items()}}
    )


def test_every_run_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(runs.RUNS)
    assert all(40 < len(line) < 110 and line.endswith((".", "?")) for line in lines)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_is_a_whole_configuration_of_the_published_recipe(name: str) -> None:
    found = configuration(name)
    recipe = options.RECIPES["datacomp"].values
    assert found.catalog.feature_type == recipe["feature_type"]
    assert (found.graph.n_neighbors, found.rank.gamma) == (recipe["n_neighbors"], recipe["gamma"])
    assert str(found.select.fraction) == recipe["fraction"]
    assert found.catalog.arch == "l14"
    assert found.out_dir == GIVEN["out-dir"]


def test_shards_are_embedded_before_they_are_filtered() -> None:
    embed = configuration("shards_to_subset").embed
    assert embed is not None
    assert embed.shards == ("/shared/{000..127}.tar", "/shared/more")
    assert (embed.model, embed.pretrained) == ("ViT-L-14", "openai")


@pytest.mark.parametrize(
    ("name", "samples"),
    [("datacomp_small", 12.8e6), ("datacomp_medium", 128e6), ("datacomp_large", 1.28e9)],
)
def test_partitions_fit_their_workers_at_the_longest_sketch(name: str, samples: float) -> None:
    """As many as the graph itself would choose for that memory, or more."""
    found = configuration(name)

    row_bytes = 2 * 1536
    # with a refinement pass lists are longer
    for passes in (0, 1):
        places = sketch.places(knn.list_width(1, passes), identity=row_bytes == 2 * 768)
        cut = sizes.plan_partitions(
            int(samples), sizes.graph_row(row_bytes, 768, places), nodes=4, cpus=64,
            node_bytes=10**12, memory=found.memory_per_worker,
        )  # fmt: skip
        assert cut.partitions <= found.partitions <= 1.1 * cut.partitions


def test_set_stands_for_what_the_run_has_and_may_come_several_times(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = run.command_line(
        [
            "datacomp_small",
            "--set",
            "out_dir=o",
            "metadata_dir=m",
            "--set",
            "partitions=auto",
            "undirected=true",
            "report=false",
        ]
    )
    assert capsys.readouterr().out.startswith("datacomp_small: d2filter ")
    assert words[0] == "run"
    found = options.run_config(cli.parse([w for w in words if w != "--no-report"]))
    assert (found.out_dir, found.metadata_dir) == ("o", "m")
    assert (found.partitions, found.rank.undirected) == (0, True)
    assert found.memory_per_worker == parse_bytes("8GB")
    assert "--no-report" in words


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "name a run: datacomp_small, datacomp_medium"),
        (["datacomp"], "'datacomp' is no run, allowed are datacomp_small"),
        (["datacomp_small"], "needs metadata-dir and out-dir: add --set metadata-dir=… out-dir=…"),
        (["demo", "--set", "out-dir="], "demo needs out-dir: add --set out-dir=…"),
        (["demo", "--set", "out-dir"], "--set out-dir: needed is key=value"),
        (["demo", "--set", "=3"], "--set =3: needed is key=value"),
        (["demo", "--out-dir=o"], "unrecognized arguments: --out-dir=o"),
        (["demo", "--set", "out-dir=o", "pair=200"], "unrecognized arguments: --pair=200"),
        (["demo", "--set", "out-dir=o", "pairs=some"], "argument --pairs: invalid int value"),
        (
            ["datacomp_small", "--set", "out-dir=o", "metadata-dir=m", "partitions=0"],
            "argument --partitions: '0', allowed are auto and whole numbers from 1",
        ),
        (
            ["datacomp_small", "--set", "out-dir=o", "metadata-dir=m", "gamma=-1"],
            "gamma is -1.0, allowed is a finite number",
        ),
    ],
)
def test_a_run_that_cannot_start_fails_with_one_line(
    words: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main(words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_has_the_code_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"out-dir={tmp_path / 'o'}", f"metadata-dir={tmp_path / 'nowhere'}"]
    assert run.main(["datacomp_medium", "--set", *given]) == 1
    assert "metadata folder" in capsys.readouterr().err


def test_a_missing_option_is_named_before_anything_is_parsed() -> None:
    with pytest.raises(UsageError, match="shards_to_subset needs shards and out-dir"):
        runs.shards_to_subset().words("shards_to_subset", {"model": "no such"})
