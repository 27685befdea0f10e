"""Named runs: their configurations, `--set`, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from d2filter.cli import main as cli
from d2filter.cli import options
from d2filter.cli.recipes import RECIPES, RUNS
from d2filter.config import RunConfig, parse_bytes
from d2filter.errors import UsageError
from d2filter.tools import cost_model, plan, plan_steps
from jobs import run

GIVEN = {
    "out-dir": "/shared/run",
    "metadata-dir": "/shared/pool",
    "shards": "/shared/{000..127}.tar /shared/more",
}
PIPELINES = [name for name, one in RUNS.items() if one.command == "run"]


def configuration(name: str) -> RunConfig:
    given = [f"{need}={GIVEN[need]}" for need in RUNS[name].needs]
    return options.run_config(cli.parse(run.command_line([name, "--set", *given])))


def test_every_run_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RUNS)
    assert all(40 < len(line) < 110 and line.endswith((".", "?")) for line in lines)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_is_a_whole_configuration_of_the_published_recipe(name: str) -> None:
    found = configuration(name)
    recipe = RECIPES["datacomp"].values
    assert found.catalog.feature_type == recipe["feature-type"]
    assert found.graph.n_neighbors == int(recipe["n-neighbors"])
    assert found.rank.gamma == float(recipe["gamma"])
    assert str(found.select.fraction) == recipe["fraction"]
    assert found.catalog.arch == "l14"
    assert found.out_dir == GIVEN["out-dir"]


def test_shards_are_embedded_before_they_are_filtered() -> None:
    embed = configuration("shards_to_subset").embed
    assert embed is not None
    assert embed.shards == ("/shared/{000..127}.tar", "/shared/more")
    assert (embed.model, embed.pretrained) == ("ViT-L-14", "openai")


@pytest.mark.parametrize(
    ("name", "samples", "nodes"),
    [
        ("datacomp_small", 12_800_000, 1),
        ("datacomp_medium", 128_000_000, 4),
        ("datacomp_large", 1_280_000_000, 32),
    ],
)
def test_workers_of_a_named_run_hold_its_partitions(name: str, samples: int, nodes: int) -> None:
    """On the clusters of docs/cluster.md, at the longest sketch."""
    found = configuration(name)
    pool = plan_steps.Pool(samples=samples, dimension=1536, k=found.graph.n_neighbors)
    cluster = cost_model.Cluster(
        nodes=nodes, cpus=32, memory=256 * 10**9, memory_per_worker=found.memory_per_worker,
        partitions=found.partitions,
    )  # fmt: skip
    rates = plan.read_rates()
    longest = replace(rates, habits=replace(rates.habits, sketch_dim=rates.dimension // 2))
    estimate = cost_model.estimate(pool, cluster, longest)
    assert not estimate.refusals
    largest = max(stage.memory for stage in estimate.stages)
    # and are not made for much less
    assert 0.5 * found.memory_per_worker <= largest <= found.memory_per_worker


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
        run.command_line(["shards_to_subset", "--set", "precision=no such"])
