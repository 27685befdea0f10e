"""The external sort of the catalog: sorted runs, merged ranges, dropped duplicates, alerts."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import pools

from d2filter.algorithm import features
from d2filter.algorithm.scores import registry as scores
from d2filter.config import CatalogConfig
from d2filter.engine.runner import Runner
from d2filter.engine.stage_run import StageRun
from d2filter.formats import catalog, metadata
from d2filter.formats import uid as uid_format
from d2filter.formats.paths import Folder
from d2filter.stages.catalog import build as stage
from d2filter.stages.catalog import pool_scores


def samples(rows: list[tuple[int, float, float, str]]) -> catalog.Samples:
    """(uid, feature, score, key) rows."""
    return catalog.Samples(
        hi=np.zeros(len(rows), np.uint64),
        lo=np.array([r[0] for r in rows], np.uint64),
        difficulty=np.array([r[2] for r in rows], np.float32),
        features=np.array([[r[1]] for r in rows], np.float16).reshape(len(rows), 1),
        shard=pa.array(["s"] * len(rows), pa.string()),
        key=pa.array([r[3] for r in rows], pa.string()),
        group=pa.nulls(len(rows), pa.string()),
    )


ROW = st.tuples(
    st.integers(0, 5),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([0.1, 0.2]),
    st.sampled_from("ab"),
)


@given(st.lists(ROW, max_size=20), st.randoms(use_true_random=False))
def test_the_row_that_stays_does_not_depend_on_the_order(rows: list[tuple], random: object) -> None:
    def kept(order: list[tuple]) -> list[tuple]:
        stays, repeats = stage.distinct(samples(order))
        assert sorted([*stays.tolist(), *repeats.tolist()]) == list(range(len(order)))
        return [order[i] for i in stays]

    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first = kept(rows)
    assert kept(shuffled) == first
    assert [r[0] for r in first] == sorted({r[0] for r in rows})


def test_parts_ascend_for_any_number_of_parts(tmp_path: Path) -> None:
    """Passes one and two by hand, with 1 and 5 ranges, over files cut and ordered differently."""
    pool = pools.make(300, 6, seed=4)
    pool["uid"][7] = pool["uid"][8]
    pool["uid"][9] = "not a uid"
    config = CatalogConfig()
    results = []
    for files, wanted in ((1, 1), (4, 5), (7, 2)):
        source = Folder(str(pools.write(tmp_path / f"m{files}", pool, files=files, shuffle=files)))
        out = Folder(str(tmp_path / f"o{files}"))
        names = [pair.name for pair in metadata.list_pairs(source)[0]]
        read = [
            stage.read_group(
                report=lambda n: None,
                out=out,
                source=source,
                names=[name],
                run_name=f"{number:05d}",
                config=config,
            )
            for number, name in enumerate(names)
        ]
        assert {figures["dimension"] for figures in read} == {12}
        runs = [f"{number:05d}" for number in range(len(names))]
        ranges = stage._ranges([mark for figures in read for mark in figures["marks"]], wanted)
        merged = [
            stage.merge_range(
                report=lambda n: None, out=out, runs=runs, number=number, low=low, high=high
            )
            for number, (low, high) in enumerate(ranges)
        ]
        assert sum(m["ranked"] for m in merged) == 298
        assert sum(m["duplicate"] for m in merged) == 1
        parts = list(catalog.iter_parts(out.sub("catalog")))
        assert len(parts) == len(ranges) > wanted / 2
        results.append(catalog.concatenate(parts))
    first = results[0]
    assert sorted(zip(first.hi, first.lo, strict=True)) == list(
        zip(first.hi, first.lo, strict=True)
    )
    for other in results[1:]:
        assert (other.hi == first.hi).all()
        assert (other.lo == first.lo).all()
        assert other.features.tobytes() == first.features.tobytes()
        assert other.difficulty.tobytes() == first.difficulty.tobytes()


@pytest.mark.parametrize("pattern", ["sequential", "one upper half", "random"])
def test_parts_have_equal_size_for_any_uids(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "ROW_GROUP", 10)
    n = 400
    pool = pools.make(n, 3)
    if pattern != "random":
        upper = "0" * 16 if pattern == "sequential" else "abcdef0123456789"
        pool["uid"] = [f"{upper}{i:016x}" for i in range(n)]
    source = Folder(str(pools.write(tmp_path / "m", pool, shuffle=1)))
    out = Folder(str(tmp_path / "o"))
    figures = stage.read_group(
        report=lambda n: None, out=out, source=source, names=["00000"], run_name="r",
        config=CatalogConfig(),
    )  # fmt: skip
    ranges = stage._ranges(figures["marks"], 4)
    sizes = [
        stage.merge_range(report=lambda n: None, out=out, runs=["r"], number=i, low=low, high=high)[
            "ranked"
        ]
        for i, (low, high) in enumerate(ranges)
    ]
    assert sizes == [100, 100, 100, 100]
    whole = catalog.concatenate(list(catalog.iter_parts(out.sub("catalog"))))
    assert uid_format.to_hex(whole.hi, whole.lo) == sorted(pool["uid"])


def test_features_in_the_catalog_are_the_fixed_ones(tmp_path: Path) -> None:
    pool = pools.make(20, 4)
    source = Folder(str(pools.write(tmp_path / "m", pool)))
    rows = metadata.read_pair(source, "00000", CatalogConfig())
    assert rows.features.tobytes() == features.fix([pool["img"], pool["txt"]]).tobytes()
    only = metadata.read_pair(source, "00000", CatalogConfig(feature_type="text"))
    assert only.features.tobytes() == features.fix([pool["txt"]]).tobytes()
    assert only.difficulty.tobytes() == rows.difficulty.tobytes()


def test_merged_scores_and_unread_files_give_alerts(tmp_path: Path) -> None:
    pool = pools.make(20, 4)
    times = [1_700_000_000 + i for i in range(20)]
    source = Folder(str(pools.write(tmp_path / "m", pool, files=2, columns={"when": times})))
    (tmp_path / "m" / "notes.txt").touch()
    config = CatalogConfig(score_column="when")
    read = [
        stage.read_group(
            report=lambda n: None, out=Folder(str(tmp_path / "o")), source=source, names=[name],
            run_name=name, config=config,
        )
        for name in ("00000", "00001")
    ]  # fmt: skip
    left, merged = stage._alerts(source, read, "when")
    assert "1 files that are no pairs (notes.txt)" in left
    assert merged.startswith("18 of 20 distinct scores (when)")


def test_entries_of_bad_rows_show_the_value_and_are_the_same_each_time(tmp_path: Path) -> None:
    pool = pools.make(6, 4)
    pool["uid"][2:5] = ["beauty\x1b[31m", "", "x" * 500]
    pool["img"][5] = np.nan
    source = Folder(str(pools.write(tmp_path / "m", pool)))
    parts = []
    for name in ("a", "b"):
        out = Folder(str(tmp_path / name))
        stage.read_group(
            report=lambda n: None, out=out, source=source, names=["00000"], run_name="r",
            config=CatalogConfig(),
        )  # fmt: skip
        parts.append((tmp_path / name / "ledger" / "catalog" / "read-r.parquet").read_bytes())
    assert parts[0] == parts[1]
    table = pq.read_table(pa.BufferReader(parts[0])).to_pydict()
    where = f"{source.where('00000.parquet')} row"
    assert table["message"] == [
        f"{where} 2: 'beauty\\x1b[31m' is not 32 hex digits",
        f"{where} 3: '' is not 32 hex digits",
        f"{where} 4: '{'x' * 60}…' is not 32 hex digits",
        f"{where} 5",
    ]
    assert "0x" not in "".join(table["message"]).replace("\\x1b", "")


def test_two_spellings_of_one_uid_are_one_sample(tmp_path: Path) -> None:
    pool = pools.make(4, 4, copies=0)
    pool["uid"] = ["ab" * 16, "AB" * 16, str(uuid.UUID("ab" * 16)), "cd" * 16]
    source = Folder(str(pools.write(tmp_path / "m", pool)))
    out = Folder(str(tmp_path / "o"))
    stage.read_group(
        report=lambda n: None, out=out, source=source, names=["00000"], run_name="r",
        config=CatalogConfig(),
    )  # fmt: skip
    merged = stage.merge_range(
        report=lambda n: None, out=out, runs=["r"], number=0, low="0" * 32, high=""
    )
    assert (merged["ranked"], merged["duplicate"]) == (2, 2)


def test_a_score_of_the_pool_that_nothing_computes_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = scores.Score(name="beauty", kept_first="high", meaning="better", needs="pool", summary="")
    monkeypatch.setitem(scores.SCORES, "beauty", new)
    part = samples([(1, 1.0, 0.0, "k")])
    catalog.publish_part(Folder(str(tmp_path)).sub("catalog"), 0, part)
    config, out = CatalogConfig(score="beauty"), Folder(str(tmp_path))
    with pytest.raises(ValueError, match="beauty"):
        pool_scores.build(StageRun(Runner(out), "catalog", "f"), config)
    with pytest.raises(ValueError, match="beauty"):
        pool_scores.score_part(report=lambda n: None, out=out, number=0, config=config)
