"""Scores by name through the command line: their values, direction and requirements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import pools
from support.pools import with_column
from support.runs import difficulties, graph_difficulties, interrupt, run, stats

from d2filter.algorithm import features, sizes
from d2filter.algorithm.scores import registry as scores
from d2filter.algorithm.scores import training_dynamics

pytestmark = pytest.mark.usefixtures("cluster")

LOG_SCORES = [name for name, score in scores.SCORES.items() if score.needs == "log"]
N = 600
POOL = pools.make(N, 8)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same pool in one file, and shuffled in four."""
    folder = tmp_path_factory.mktemp("scores")
    return [
        pools.write(folder / "one", POOL),
        pools.write(folder / "four", POOL, files=4, shuffle=3),
    ]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "CATALOG_PART", 16_000)


def parts(out: Path) -> int:
    return len(list((out / "catalog").glob("part-*.parquet")))


def in_order() -> list[int]:
    return sorted(range(N), key=lambda row: POOL["uid"][row])


def fixed(name: str) -> np.ndarray:
    return features.fix([POOL[name]])


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("rounds", [1, 3])
def test_negclip_loss_is_that_of_batches_by_uid(
    rounds: int, metadata: list[Path], tmp_path: Path
) -> None:
    words = ("--score", "negclip_loss", "--score-batch", 50, "--score-rounds", rounds)
    found = graph_difficulties(metadata[0], tmp_path / "a", *words)
    again = graph_difficulties(metadata[1], tmp_path / "b", *words)
    assert parts(tmp_path / "a") > 1
    assert found == again
    assert not (tmp_path / "a" / "catalog" / "scores").exists()
    image, text = fixed("img"), fixed("txt")
    hi = np.array([int(u[:16], 16) for u in POOL["uid"]], np.uint64)
    lo = np.array([int(u[16:], 16) for u in POOL["uid"]], np.uint64)
    total = np.zeros(N)
    for turn in range(rounds):
        batch = scores.batch_of(hi, lo, batches=scores.batches_for(N, 50), round=turn)
        for number in set(batch.tolist()):
            rows = [row for row in in_order() if batch[row] == number]
            total[rows] += scores.negclip_loss(image[rows], text[rows])
    for row, uid in enumerate(POOL["uid"]):
        assert found[uid] == pytest.approx(total[row] / rounds, rel=1e-6)


@pytest.mark.usefixtures("small_parts")
def test_prototypicality_does_not_depend_on_the_split_of_files(
    metadata: list[Path], tmp_path: Path
) -> None:
    words = ("--score", "prototypicality", "--feature-type", "image")
    found = graph_difficulties(metadata[0], tmp_path / "a", *words)
    assert found == graph_difficulties(metadata[1], tmp_path / "b", *words)
    assert parts(tmp_path / "a") > 1
    values = np.array(list(found.values()))
    # 600 samples around ten centers, nine centroids: few lie far away, none on a centroid
    assert 0 < values.min() < np.median(values) < values.max() < 2
    turned = graph_difficulties(metadata[0], tmp_path / "c", *words, "--keep-first", "low")
    assert turned == {uid: -value for uid, value in found.items()}


def test_norm_sim_is_the_largest_cosine_to_the_targets(
    metadata: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = np.random.default_rng(5).normal(size=(7, 8)).astype(np.float32)
    np.save(tmp_path / "target.npy", target)
    words = ("--score", "norm_sim", "--score-target", tmp_path / "target.npy")
    words = (*words, "--feature-type", "text")
    found = graph_difficulties(metadata[1], tmp_path / "a", *words)
    image = POOL["img"].astype(np.float64)
    cosine = (image @ target.T) / np.linalg.norm(image, axis=1)[:, None]
    best = (cosine / np.linalg.norm(target.astype(np.float64), axis=1)).max(axis=1)
    for row, uid in enumerate(POOL["uid"]):
        assert found[uid] == pytest.approx(best[row], rel=1e-6)
    # another target set is another input
    np.savez(tmp_path / "target.npz", l14_img=target[:3])
    words = (*words[:2], "--score-target", tmp_path / "target.npz", *words[4:])
    out = ("--metadata-dir", metadata[1], "--out-dir", tmp_path / "a")
    assert run("graph", *out, *words) == 1
    assert "target.np" in capsys.readouterr().err
    assert run("graph", *out, *words, "--overwrite", "catalog") == 0
    assert difficulties(tmp_path / "a") != found


def log(epochs: int = 4, classes: int = 3, *, logits: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(9)
    p = rng.random((N, epochs, classes)).astype(np.float32)
    if not logits:
        p /= p.sum(axis=2, keepdims=True)
    label = rng.integers(0, classes, N)
    return {"p": p, "label": label, "column": "logits" if logits else "probabilities"}


def write_log(path: Path, made: dict[str, Any], rows: list[int] | None = None) -> Path:
    p, label = made["p"], made["label"]
    order = [
        (row, epoch) for row in (range(N) if rows is None else rows) for epoch in range(p.shape[1])
    ]
    np.random.default_rng(1).shuffle(order)
    table = {
        "uid": [POOL["uid"][row] for row, _ in order],
        "epoch": pa.array([10 + epoch for _, epoch in order], pa.int32()),
        "label": [int(label[row]) for row, _ in order],
        made["column"]: [p[row, epoch].tolist() for row, epoch in order],
    }
    pq.write_table(pa.table(table), path)
    return path


@pytest.mark.parametrize("name", LOG_SCORES)
@pytest.mark.parametrize("logits", [False, True])
def test_scores_of_a_training_log_equal_the_formulas(
    name: str, logits: bool, metadata: list[Path], tmp_path: Path
) -> None:
    from d2filter.formats import traininglog

    made = log(logits=logits)
    folder = tmp_path / "log"
    folder.mkdir()
    write_log(folder / "a.parquet", made, list(range(0, N, 2)))
    write_log(folder / "b.parquet", made, list(range(1, N, 2)))
    found = traininglog.score(str(folder), name)
    p = training_dynamics.softmax(made["p"]) if logits else made["p"]
    expected = scores.function_of(name)(p.astype(np.float32), made["label"])
    by_uid = expected[in_order()]
    assert np.allclose(found.value, by_uid, rtol=1e-5, atol=1e-7)
    assert (np.diff(found.hi.astype(object)) > 0).all()


def test_a_training_log_gives_the_difficulty_and_samples_without_a_row_are_bad(
    metadata: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_log = log()
    path = write_log(tmp_path / "log.parquet", made_log, list(range(N - 5)))
    words = ("--metadata-dir", metadata[0], "--out-dir", tmp_path / "a", "--training-log", path)
    assert run("graph", *words, "--score", "margin", "--max-bad", "0.05") == 0
    found = difficulties(tmp_path / "a")
    expected = training_dynamics.margin(made_log["p"], made_log["label"])
    assert len(found) == N - 5
    for row in range(N - 5):
        # a low margin is a hard sample, and goes first
        assert found[POOL["uid"][row]] == pytest.approx(-expected[row], abs=1e-6)
    figures = stats(tmp_path / "a")
    assert figures["samples"]["bad"] == 5
    assert figures["catalog"]["bad_reasons"] == {"no row in the training log": 5}
    score = {"name": "margin", "high_is": "easier", "kept_first": "low"}
    assert figures["catalog"]["score"] == score
    # without the folder the log still counts
    words = ("graph", "--out-dir", tmp_path / "a", "--score", "margin", "--training-log", path)
    assert run(*words) == 0
    write_log(path, made_log, list(range(N - 6)))
    assert run(*words) == 1
    assert "input file training-log/log.parquet has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (lambda t: t.slice(0, len(t) - 1), "does not have one row for each of the 4 epochs"),
        (lambda t: t.drop_columns(["label"]), "has no column label"),
        (lambda t: t.drop_columns(["probabilities"]), "has no column probabilities or logits"),
        (
            lambda t: with_column(t, "epoch", [10] * len(t)),
            "does not have one row for each of the 1 epochs",
        ),
        (lambda t: with_column(t, "label", [7] * len(t)), "has a label outside 0 to 2"),
        (lambda t: with_column(t, "label", list(range(len(t)))), "has more than one label"),
        (lambda t: with_column(t, "uid", ["cat"] * len(t)), "'cat' in row 0 is not a uid"),
        (
            lambda t: with_column(t, "probabilities", [[0.5]] + [[0.5, 0.5]] * (len(t) - 1)),
            "one length",
        ),
        (lambda t: with_column(t, "probabilities", [[float("nan")]] * len(t)), "not finite"),
        (lambda t: with_column(t, "probabilities", ["high"] * len(t)), "lists of numbers"),
        (lambda t: t.slice(0, 0), "has no rows"),
    ],
)
def test_a_file_that_is_not_a_training_log_is_refused(
    breaks: Any, said: str, metadata: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write_log(tmp_path / "log.parquet", log(), list(range(20)))
    pq.write_table(breaks(pq.read_table(path)), path)
    words = ("--metadata-dir", metadata[0], "--out-dir", tmp_path / "a", "--training-log", path)
    assert run("graph", *words, "--score", "el2n") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--score", "beauty"), 2, "beauty"),
        (("--score", "el2n"), 2, "score el2n needs --training-log"),
        (("--score", "norm_sim"), 2, "score norm_sim needs --score-target"),
        (("--score-target", "x.npy"), 2, "score-target is for the scores norm_sim"),
        (("--score", "clip_score", "--score-column", "a"), 2, "both given"),
        (("--score", "negclip_loss", "--feature-type", "image"), 2, "needs both embeddings"),
        (("--score", "negclip_loss", "--score-batch", 1), 2, "score-batch is 1"),
        (("--keep-first", "best"), 2, "best"),
        (("--score", "norm_sim", "--score-target", "none.npy"), 1, "is not a .npy or .npz file"),
        (("--score", "el2n", "--training-log", "none.parquet"), 1, "is neither a .parquet file"),
    ],
)
def test_a_score_that_cannot_be_computed_is_refused(
    words: tuple[Any, ...], code: int, said: str, metadata: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run("graph", "--metadata-dir", metadata[0], "--out-dir", tmp_path, *words) == code
    assert said in capsys.readouterr().err


def test_a_named_clip_score_is_computed_and_a_column_can_be_turned(tmp_path: Path) -> None:
    column = np.linspace(0, 1, N).astype(np.float32)
    folder = pools.write(
        tmp_path / "m", POOL, columns={"clip_l14_similarity_score": column.tolist()}
    )
    plain = graph_difficulties(folder, tmp_path / "a")
    assert plain == dict(zip(POOL["uid"], column.tolist(), strict=True))
    turned = graph_difficulties(folder, tmp_path / "b", "--keep-first", "low")
    assert turned == {uid: -value for uid, value in plain.items()}
    computed = graph_difficulties(folder, tmp_path / "c", "--score", "clip_score")
    expected = scores.clip_score(POOL["img"], POOL["txt"])
    assert computed == dict(zip(POOL["uid"], expected.tolist(), strict=True))


def test_any_embeddings_make_a_graph_without_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts alone: one key, prototypicality as score."""
    folder = tmp_path / "m"
    folder.mkdir()
    pq.write_table(pa.table({"uid": POOL["uid"]}), folder / "a.parquet")
    vectors = POOL["txt"].astype(np.float32)
    vectors[3] = 0
    vectors[4, 0] = np.nan
    np.savez(folder / "a.npz", sentence=vectors, topic=POOL["img"])
    words = ("graph", "--metadata-dir", folder, "--score", "prototypicality")
    assert run(*words, "--out-dir", tmp_path / "o", "--feature-keys", "sentence") == 0
    figures = stats(tmp_path / "o")
    assert figures["catalog"]["bad_reasons"] == {"zero embedding": 1, "non-finite embedding": 1}
    assert figures["catalog"]["dimension"] == 8
    both = ("--feature-keys", "sentence", "topic")
    assert run(*words, "--out-dir", tmp_path / "p", *both) == 0
    assert stats(tmp_path / "p")["catalog"]["dimension"] == 16
    assert run("verify", tmp_path / "p") == 1  # no ranking yet
    assert run(*words, "--out-dir", tmp_path / "q", "--feature-keys", "words") == 1
    assert "has no words" in capsys.readouterr().err


def test_a_target_set_of_another_model_is_refused(
    metadata: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "target.npy", np.ones((3, 9), np.float32))
    words = ("--score", "norm_sim", "--score-target", tmp_path / "target.npy")
    assert run("graph", "--metadata-dir", metadata[0], "--out-dir", tmp_path / "o", *words) == 1
    line = capsys.readouterr().err
    assert "target.npy has embeddings of dimension 9, l14_img of" in line
    assert "use one model" in line


def test_the_lowest_score_is_in_the_units_of_the_score(tmp_path: Path) -> None:
    column = np.linspace(0, 1, N).astype(np.float32)
    folder = pools.write(tmp_path / "m", POOL, columns={"loss": column.tolist()})
    words = ("run", "--metadata-dir", folder, "--out-dir", tmp_path / "o", "--fraction", 1)
    words = (*words, "--score-column", "loss", "--keep-first", "low", "--min-score", 0.25)
    assert run(*words) == 0
    figures = stats(tmp_path / "o")
    assert figures["samples"]["kept"] == (column >= 0.25).sum()
    assert run("verify", tmp_path / "o") == 0


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (("--score", "clip_score"), True),
        ((), True),
        (("--score", "prototypicality"), False),
        (("--score", "prototypicality", "--keep-first", "low"), True),
        (("--score-column", "own"), False),
    ],
)
def test_the_hardest_are_cut_only_where_they_go_first(
    words: tuple[str, ...], refused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pools.write(tmp_path / "m", POOL, columns={"own": [1.0] * N})
    words = ("--metadata-dir", folder, "--out-dir", tmp_path / "o", *words)
    assert run("run", *words, "--cut-hardest", 0.1) == (2 if refused else 0)
    assert ("cut-hardest drops" in capsys.readouterr().err) == refused


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("before", ["merge", "batches", "score"])
def test_an_interrupted_score_of_the_pool_continues(
    before: str, metadata: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--score", "negclip_loss", "--score-batch", 50)
    undisturbed = graph_difficulties(metadata[1], tmp_path / "a", *words)
    with monkeypatch.context() as patch:
        interrupt(patch, before)
        command = ("graph", "--metadata-dir", metadata[1], "--out-dir", tmp_path / "b", *words)
        assert run(*command) == 130
    assert graph_difficulties(metadata[1], tmp_path / "b", *words) == undisturbed


@pytest.mark.parametrize("before", ["merge", "score"])
def test_another_task_size_builds_the_catalog_again(
    before: str, metadata: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another --memory-per-worker makes them: groups of the same name hold other files."""
    words = ("--score", "prototypicality")
    undisturbed = graph_difficulties(metadata[1], tmp_path / "a", *words)
    with monkeypatch.context() as patch:
        interrupt(patch, before)
        command = ("graph", "--metadata-dir", metadata[1], "--out-dir", tmp_path / "b", *words)
        assert run(*command) == 130
    monkeypatch.setattr(sizes, "CATALOG_GROUP", 1000)
    monkeypatch.setattr(sizes, "CATALOG_PART", 16_000)
    assert graph_difficulties(metadata[1], tmp_path / "b", *words) == undisturbed
    figures = stats(tmp_path / "b")
    assert figures["samples"]["read"] == N
    assert figures["samples"]["duplicate"] == 0
