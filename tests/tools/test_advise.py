"""`advise`: the recommended setting has the reported measures, and the page opens anywhere."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import pools

from d2filter.algorithm.measures import selfcheck as checks
from d2filter.cli.main import main
from d2filter.config import RankConfig
from d2filter.formats.paths import Folder
from d2filter.tools import advise, selfcheck

pytestmark = pytest.mark.usefixtures("cluster")

N = 600


def pairs(seed: int = 0, noise: float = 0.4) -> dict[str, Any]:
    """Pictures of few kinds, captions near them, a fifth of the captions wrong."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(size=(60, 8))
    img = kinds[rng.integers(0, 60, N)] + 0.15 * rng.normal(size=(N, 8))
    txt = img + noise * rng.normal(size=(N, 8))
    wrong = rng.choice(N, N // 5, replace=False)
    txt[wrong] = txt[np.roll(wrong, 1)]
    uid = [rng.bytes(16).hex() for _ in range(N)]
    return {
        "uid": uid, "img": img.astype(np.float16), "txt": txt.astype(np.float16),
        "wrong": np.isin(np.arange(N), wrong),
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> dict[str, Path]:
    """One pool with its graph: in one part, in three of shuffled files, and with other scores."""
    folder = tmp_path_factory.mktemp("advised")
    outs = {}
    hardness = np.random.default_rng(5).random(N)
    for name, files, shuffle, words in (
        ("one", 1, None, ()),
        ("three", 3, 7, ("--partitions", "3")),
        ("column", 1, None, ("--score-column", "hardness")),
    ):
        metadata = pools.write(
            folder / f"m-{name}", pairs(), files=files, shuffle=shuffle,
            columns={"hardness": hardness},
        )  # fmt: skip
        outs[name] = folder / name
        given = ["--metadata-dir", str(metadata), "--out-dir", str(outs[name])]
        assert main(["graph", *given, "--n-neighbors", "5", *words]) == 0
    return outs


def test_the_self_check_agrees_with_the_captions_that_are_wrong(runs: dict[str, Path]) -> None:
    """The pool has wrong captions of its own: they are kept about as often as those made here."""
    folder = Folder(str(runs["one"]))
    known = selfcheck.load(folder)
    prepared = selfcheck.prepare(folder, known)
    assert isinstance(prepared, selfcheck.Prepared)
    assert prepared.whole
    assert prepared.correlation > 0.999
    assert 50 < prepared.swapped.size <= N // 10
    part = known.part
    pool = pairs()
    uid = [f"{hi:016x}{lo:016x}" for hi, lo in zip(part.hi.tolist(), part.lo.tolist(), strict=True)]
    place = dict(zip(pool["uid"], range(N), strict=True))
    wrong = pool["wrong"][[place[one] for one in uid]]
    for gamma in (1.0, 5.0):
        config = RankConfig(
            gamma=gamma, kernel="rbf", gamma_scale="median", collapse_copies=None, n_neighbors=5
        )
        rank = selfcheck.ranks(known, config)
        for fraction, row in prepared.rates(config, selfcheck.FRACTIONS).items():
            really = checks.rate(rank, np.flatnonzero(wrong), int(float(fraction) * N)).kept
            assert abs(row["kept"] - really) < 0.15
            assert row["low"] <= row["kept"] <= row["high"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What `d2filter advise` printed and wrote for a run."""

    printed: str
    data: dict[str, Any]
    page: str


@pytest.fixture(scope="module")
def advice(runs: dict[str, Path]) -> dict[str, Advice]:
    """The advice for the two layouts of the pool, without options."""
    found = {}
    for name in ("one", "three"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(["advise", str(runs[name])]) == 0
        found[name] = Advice(
            printed=printed.getvalue(),
            data=json.loads((runs[name] / "advise.json").read_text()),
            page=(runs[name] / "advise.html").read_text(),
        )
    return found


def test_advice_is_the_same_for_any_partitions_and_files(advice: dict[str, Advice]) -> None:
    found = {name: one.data for name, one in advice.items()}
    assert found["one"]["options"] == found["three"]["options"]
    for mine, theirs in zip(found["one"]["trials"], found["three"]["trials"], strict=True):
        assert mine["setting"] == theirs["setting"]
        for fraction, row in mine["measures"].items():
            assert row == pytest.approx(theirs["measures"][fraction], rel=1e-9)
    for one in advice.values():
        for what in ("k ", "gamma ", "copies ", "budget "):
            assert re.search(f"^{what}", one.printed, re.MULTILINE)
        assert "the graph has 5 neighbors a sample" in one.printed


def test_the_recommended_setting_keeps_few_wrong_pairs_and_covers_the_pool(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = runs["one"]
    assert main(["advise", str(out), "--fraction", "0.3"]) == 0
    data = json.loads((out / "advise.json").read_text())
    trials = {trial["setting"]: trial["measures"]["0.3"] for trial in data["trials"]}
    (chosen,) = (t["measures"] for t in data["trials"] if t["options"] == data["options"])
    alone = trials["score alone"]
    assert chosen["0.3"]["wrong"] <= alone["wrong"] + advise.SLACK
    allowed = [row for row in trials.values() if row["wrong"] <= alone["wrong"] + advise.SLACK]
    assert chosen["0.3"]["coverage"] >= alone["coverage"]
    assert chosen["0.3"]["coverage"] >= max(row["coverage"] for row in allowed) - 2 * advise.WORTH
    assert chosen[data["fraction"]]["wrong"] <= advise.CLEAN
    # the commands that it prints are good ones, and rank as it measured
    capsys.readouterr()
    for command in data["commands"]:
        words = command.split()[1:]
        assert main(words) == 0
    kept = len(np.load(out / "subset.npy"))
    assert kept == int(float(data["fraction"]) * N)
    record = json.loads((out / "completions/rank.json").read_text())
    assert record["options"]["gamma"] == data["options"]["gamma"]


def test_without_a_clip_score_the_advice_uses_the_score_and_names_this(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", str(runs["column"])]) == 0
    said = capsys.readouterr().out
    assert "no self-check: the score is not the cosine of the two halves" in said
    data = json.loads((runs["column"] / "advise.json").read_text())
    assert all(row["wrong"] is None for t in data["trials"] for row in t["measures"].values())
    (chosen,) = (t["measures"]["0.3"] for t in data["trials"] if t["options"] == data["options"])
    alone = data["trials"][0]["measures"]["0.3"]
    assert chosen["difficulty"] > 0.5 + (alone["difficulty"] - 0.5) / 2 - 0.02


def test_advice_on_a_large_pool_uses_a_sample_and_names_its_size(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selfcheck, "MOST", 500)
    monkeypatch.setattr(selfcheck, "SAMPLED", 200)
    chosen = [selfcheck.load(Folder(str(runs[name]))).part for name in ("one", "three")]
    np.testing.assert_array_equal(chosen[0].lo, chosen[1].lo)
    np.testing.assert_array_equal(chosen[0].neighbors, chosen[1].neighbors)
    assert len(chosen[0].hi) == 200
    assert main(["advise", str(runs["three"])]) == 0
    said = capsys.readouterr().out
    assert "on 200 of 600 samples, chosen by a hash of the uid" in said
    assert "measured on 200 of 600 samples" in said


def test_the_page_loads_nothing_from_the_network(advice: dict[str, Advice]) -> None:
    page = advice["one"].page
    assert "default-src 'none'" in page
    # but for names in the code of the plots' script, which the policy stops
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "<table" in markup
    assert not re.search(r"(src|href)=[\"']?https?:", markup)
    assert page.count('data-plot="trials"') == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--fraction", "2"), "fraction is 2"), (("--fraction", "0.0001"), "keeps nothing of 600")],
)
def test_impossible_requests_for_advice_fail_with_one_line(
    runs: dict[str, Path], words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", str(runs["one"]), *words]) == 2
    assert said in capsys.readouterr().err


def test_advice_without_a_graph_names_the_missing_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", str(tmp_path)]) == 1
    assert "run `d2filter graph` first" in capsys.readouterr().err
