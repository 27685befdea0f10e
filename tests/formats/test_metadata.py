"""Metadata folders from other programs: what is accepted, and what is refused."""

from __future__ import annotations

import decimal
import io
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2filter.algorithm import features
from d2filter.algorithm.scores import registry as scores
from d2filter.config import CatalogConfig
from d2filter.errors import InputError
from d2filter.formats import metadata, npz, side_inputs, tables, traininglog
from d2filter.formats.paths import Folder

UIDS = [f"{i:032x}" for i in range(6)]


def pair(folder: Path, *, arrays: Any = None, rows: int = 6, **columns: Any) -> Path:
    """A pair of six rows, some of its columns or arrays replaced."""
    pq.write_table(pa.table({"uid": UIDS[:rows], **columns}), folder / "0.parquet")
    one = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float16)
    np.savez(folder / "0.npz", **({"l14_img": one, "l14_txt": one} if arrays is None else arrays))
    return folder


def read(folder: Path, **options: Any) -> metadata.MetadataRows:
    return metadata.read_pair(Folder(str(folder)), "0", CatalogConfig(**options))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0.25, 0.5, None, 1, 2, 3], pa.float16()),
        pa.array([0.25, 0.5, None, 1, 2, 3], pa.float32()),
        pa.array([decimal.Decimal(x) if x else None for x in ("0.25", "0.5", "", "1", "2", "3")]),
        pa.array(["0.25", "5e-1", None, "1", "2", "3.0"]),
        pa.array(["0.25", "0.5", None, "1", "2", "3"]).dictionary_encode(),
        pa.array([0.25, 0.5, None, 1, 2, 3]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type)[:10],
)
def test_a_score_may_be_any_kind_of_number(tmp_path: Path, column: Any) -> None:
    rows = read(pair(tmp_path, mine=column), score_column="mine")
    assert rows.difficulty.dtype == np.float32
    assert rows.difficulty[[0, 1, 3, 4, 5]].tolist() == [0.25, 0.5, 1, 2, 3]
    assert [metadata.REASONS[r] for r in rows.reason] == ["", "", "score is NaN", "", "", ""]


def test_whole_numbers_beyond_float64_are_rounded(tmp_path: Path) -> None:
    rows = read(pair(tmp_path, mine=[2**60 + 1] * 6), score_column="mine")
    assert set(rows.difficulty.tolist()) == {2.0**60}


@pytest.mark.parametrize(
    "column", [["high"] * 6, [[1.0]] * 6, [b"\xff"] * 6, pa.array([1] * 6, pa.date32())]
)
def test_a_score_that_is_no_number_is_refused(tmp_path: Path, column: Any) -> None:
    with pytest.raises(InputError, match="column mine must hold numbers"):
        read(pair(tmp_path, mine=column), score_column="mine")


@pytest.mark.parametrize(
    "kind",
    ["large_string", "binary", "large_binary", "string_view", "binary_view", "fixed", "dictionary"],
)
def test_uids_and_places_may_be_any_kind_of_text(tmp_path: Path, kind: str) -> None:
    def typed(values: list[str]) -> Any:
        if kind == "dictionary":
            return pa.array(values).dictionary_encode()
        if kind == "fixed":
            return pa.array([v.encode() for v in values], pa.binary(len(values[0])))
        if not hasattr(pa, kind):
            pytest.skip("this arrow has no views")
        raw = [v.encode() for v in values] if "binary" in kind else values
        return pa.array(raw, getattr(pa, kind)())

    names = {"shard": typed(["s/0.tar"] * 6), "key": typed([f"k{i}" for i in range(6)])}
    rows = read(pair(tmp_path, uid=typed(UIDS), **names))
    assert rows.lo.tolist() == list(range(6))
    assert not rows.reason.any()
    assert rows.shard.to_pylist() == ["s/0.tar"] * 6
    assert rows.key.to_pylist() == [f"k{i}" for i in range(6)]


def test_a_key_may_be_a_number_and_need_not_be_text(tmp_path: Path) -> None:
    """Parquet does not check that strings are UTF-8."""
    rows = read(pair(tmp_path, key=list(range(6))))
    assert rows.key.to_pylist() == list("012345")
    raw = pa.array([b"ok", b"\xff\xfe", b"", None, "é".encode(), b"x" * 100_000], pa.binary())
    broken = pa.StringArray.from_buffers(6, *raw.buffers()[1:], raw.buffers()[0])
    rows = read(pair(tmp_path, key=broken, shard=broken))
    assert rows.key.to_pylist() == ["ok", "\\xff\\xfe", "", None, "é", "x" * 100_000]
    assert rows.shard == rows.key


def test_null_uids_are_malformed_and_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    rows = read(pair(tmp_path, uid=pa.nulls(6)))
    assert {metadata.REASONS[r] for r in rows.reason} == {"malformed uid"}
    empty = {"l14_img": np.empty((0, 4)), "l14_txt": np.empty((0, 4))}
    rows = read(pair(tmp_path, uid=pa.nulls(0), arrays=empty, rows=0))
    assert rows.features.shape == (0, 8)


def test_a_few_bytes_of_parquet_do_not_become_gigabytes(tmp_path: Path) -> None:
    """One string of 10 MB, which each of 2,000 rows points to: 20 GB when it is written out."""
    long = pa.DictionaryArray.from_arrays(np.zeros(2000, np.int32), pa.array(["x" * 10_000_000]))
    ones = np.ones((2000, 4), np.float16)
    path = tmp_path / "0.parquet"
    before = pa.default_memory_pool().max_memory()

    def write(**columns: Any) -> None:
        pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False)
        assert path.stat().st_size < 200_000

    np.savez(tmp_path / "0.npz", l14_img=ones, l14_txt=ones)
    write(uid=long)
    rows = read(tmp_path)
    assert {metadata.REASONS[r] for r in rows.reason} == {"malformed uid"}
    assert {tables.shown(rows.uid[i]) for i in range(2000)} == {"x" * 300}
    uids = pa.array([f"{i:032x}" for i in range(2000)])
    write(uid=uids, shard=long)
    with pytest.raises(InputError, match="column shard holds 20000000000 bytes of text"):
        read(tmp_path)
    write(uid=uids, mine=long)
    with pytest.raises(InputError, match="column mine must hold numbers"):
        read(tmp_path, score_column="mine")
    assert pa.default_memory_pool().max_memory() - before < 200_000_000


def test_a_dictionary_that_points_outside_is_refused(tmp_path: Path) -> None:
    """Arrow hands out the indices of a page unchecked: a byte more is a row of foreign memory."""
    pair(tmp_path)
    path = tmp_path / "0.parquet"
    texts = pa.array([f"{i:032x}" for i in (0, 0, 0, 1, 1, 1)])
    pq.write_table(pa.table({"uid": texts}), path, compression="none", write_statistics=False)
    assert read(tmp_path).lo.tolist() == [0, 0, 0, 1, 1, 1]
    # bit width 1, then one run of eight packed indices: 0b111000
    content = path.read_bytes()
    packed = b"\x01\x03\x38"
    assert content.count(packed) == 1
    path.write_bytes(content.replace(packed, b"\x08\x0c\xf0"))
    with pytest.raises(
        InputError, match=r"0\.parquet is not a readable parquet file.*240 points out"
    ):
        read(tmp_path)


def npy(shape: str, payload: bytes, descr: str = "'<f2'") -> bytes:
    """An .npy file with a false header."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload


def lying(folder: Path, content: bytes, method: int = zipfile.ZIP_STORED, **told: int) -> None:
    """An npz with these bytes as both arrays; told: the size that its directory claims."""
    with zipfile.ZipFile(folder / "0.npz", "w", method) as archive:
        for key in ("l14_img", "l14_txt"):
            archive.writestr(f"{key}.npy", content)
        for info in archive.infolist():
            for name, value in told.items():
                setattr(info, name, value)


ZEROS = bytes(6 * 4 * 2)
BOMB = npy(f"(6, {1 << 16})", bytes(6 * (1 << 17)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: lying(f, npy("(6, 40000)", ZEROS)), "a header claims shape (6, 40000), 48"),
        (lambda f: lying(f, npy("(6, 1000000000000)", ZEROS)), "has shape (6, 1000000000000)"),
        (lambda f: lying(f, npy("(6, 70000)", bytes(840_000))), "has shape (6, 70000)"),
        (lambda f: lying(f, npy("(9000000000000, 4)", ZEROS)), "a header claims shape"),
        (lambda f: lying(f, npy("(-6, -4)", ZEROS)), "dtype float16, expected"),
        (lambda f: lying(f, npy("(6, 4)", ZEROS + b"more")), "52 bytes follow"),
        (lambda f: lying(f, npy("(6, 4)", bytes(24), "'|b1'")), "dtype bool, expected"),
        (lambda f: lying(f, npy("(6, 4)", ZEROS, "'|O'")), "it holds Python objects"),
        (lambda f: lying(f, npy("(6, 4)", ZEROS), file_size=1 << 50), "would inflate from 1"),
        (
            lambda f: lying(f, npy("(6, 4)", ZEROS), file_size=1 << 40, compress_size=1 << 40),
            "reaches beyond the end of the file",
        ),
        (lambda f: lying(f, npy("(6, 4)", ZEROS), file_size=70), "two sizes"),
        (lambda f: lying(f, npy("(6, 4)", ZEROS), flag_bits=1), "password"),
        (lambda f: lying(f, npy("(6, 4)", ZEROS), compress_type=99), "not a readable npz"),
        (lambda f: lying(f, npy("(6, 4)", ZEROS), CRC=1), "Bad CRC-32"),
        (
            lambda f: lying(f, BOMB + bytes(80 << 20), zipfile.ZIP_DEFLATED),
            "l14_img would inflate from",
        ),
    ],
)  # fmt: skip
def test_npz_headers_with_false_sizes_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    pair(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "0.npz") in message
    assert said in message
    assert len(message.splitlines()) == 1


def test_embeddings_of_two_spaces_have_no_cosine(tmp_path: Path) -> None:
    """One of a single column would be stretched to fit, without a word."""
    arrays = {"l14_img": np.ones((6, 4), np.float16), "l14_txt": np.ones((6, 1), np.float16)}
    with pytest.raises(InputError, match="l14_img has dimension 4 and l14_txt 1"):
        read(pair(tmp_path, arrays=arrays))
    rows = read(pair(tmp_path, arrays=arrays, mine=[0.5] * 6), score_column="mine")
    assert rows.features.shape == (6, 5)


@pytest.mark.parametrize("kind", [">f2", ">f4", "<f8", "g"])
def test_floats_of_another_machine_are_the_same_numbers(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float16)
    plain = read(pair(tmp_path, arrays={"l14_img": values, "l14_txt": values}))
    other = read(pair(tmp_path, arrays={f"l14_{n}": values.astype(kind) for n in ("img", "txt")}))
    assert other.features.tobytes() == plain.features.tobytes()
    assert other.difficulty.tobytes() == plain.difficulty.tobytes()


def test_a_score_target_with_a_false_size_is_refused(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    path = tmp_path / "t.npy"
    for content, said in [
        (npy("(1000000000, 512)", ZEROS), "score-target t is not an array file: a header claims"),
        (npy("(6, 4)", ZEROS, "'|O'"), "it holds Python objects"),
        (npy("(24,)", ZEROS), "must hold an array"),
        (b"", "score-target t is not an array file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            npz.read_array(folder, "t.npy", "score-target t")
        assert said in str(caught.value)
    stream = io.BytesIO()
    np.save(stream, np.ones((3, 4)))
    path.write_bytes(stream.getvalue())
    assert npz.read_array(folder, "t.npy", "x").shape == (3, 4)


def test_names_out_of_a_file_do_not_break_the_line(tmp_path: Path) -> None:
    table = pa.table({"url\nd2filter: done": ["x"], **{f"column{i}": [1] for i in range(500)}})
    pq.write_table(table, tmp_path / "0.parquet")
    np.savez(tmp_path / "0.npz", **{"b32_img\n": np.ones((6, 4))})
    with pytest.raises(InputError, match="has no column uid; it has url") as caught:
        read(tmp_path)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"uid": UIDS}), tmp_path / "0.parquet")
    with pytest.raises(InputError, match="has no l14_img and no l14_txt") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["uid", "shard", "key", "kind", "mine"])
@pytest.mark.parametrize("shape", ["list", "struct", "map", "fixed list", "bytes of one length"])
def test_the_types_of_columns_are_checked_before_they_are_read(
    tmp_path: Path, column: str, shape: str
) -> None:
    """Of 2,000 rows each repeats one text of a megabyte: 2 GB from a small file."""
    n = 2000
    texts = pa.array(["x" * 1000] * n)
    nested: dict[str, Any] = {
        "list": lambda: pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32), texts),
        "struct": lambda: pa.StructArray.from_arrays([texts], ["text"]),
        "map": lambda: pa.MapArray.from_arrays(np.arange(n + 1, dtype=np.int32), texts, texts),
        "fixed list": lambda: pa.FixedSizeListArray.from_arrays(texts, 1),
        "bytes of one length": lambda: pa.array([b"x" * 600_000] * n, pa.binary(600_000)),
    }
    columns: dict[str, Any] = {"uid": [f"{i:032x}" for i in range(n)], "mine": [0.5] * n}
    columns["kind"] = ["a"] * n
    columns[column] = nested[shape]()
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False)
    ones = np.ones((n, 4), np.float16)
    np.savez(tmp_path / "0.npz", l14_img=ones, l14_txt=ones)
    columns.clear()
    nested.clear()
    before = pa.total_allocated_bytes()
    with pytest.raises(InputError, match=f"column {column} (must hold|holds)") as caught:
        read(tmp_path, score_column="mine", group_column="kind")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600
    assert pa.total_allocated_bytes() - before < 50_000_000


def test_texts_that_arrow_calls_views_stay_as_small_as_their_file(tmp_path: Path) -> None:
    if not hasattr(pa, "string_view"):
        pytest.skip("this arrow has no views")
    pair(tmp_path, key=pa.array(["x" * 100_000] * 6, pa.string_view()))
    with tables.open_table(Folder(str(tmp_path)), "0.parquet", encoded=["key"]) as parquet:
        assert tables.read_checked(parquet, ["key"]).nbytes < 200_000
    assert read(tmp_path).key.to_pylist() == ["x" * 100_000] * 6


def test_a_repeated_column_is_refused(tmp_path: Path) -> None:
    pair(tmp_path)
    table = pa.table([pa.array(UIDS), pa.array(UIDS)], names=["uid", "uid"])
    pq.write_table(table, tmp_path / "0.parquet")
    with pytest.raises(InputError, match="has 2 columns of the name 'uid'"):
        read(tmp_path)


@pytest.mark.parametrize("column", ["uid", "epoch", "label", "probabilities"])
@pytest.mark.parametrize("odd", [[["a"]] * 2, [{"a": 1}] * 2])
def test_the_types_of_a_training_log_are_checked_before_it_is_read(
    tmp_path: Path, column: str, odd: list[Any]
) -> None:
    columns: dict[str, Any] = {
        "uid": UIDS[:2], "epoch": [0, 0], "label": [1, 0], "logits": [[1.0, 2.0]] * 2
    }  # fmt: skip
    columns["logits" if column == "probabilities" else column] = odd
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    with pytest.raises(InputError, match="must hold"):
        traininglog.score(str(tmp_path / "log.parquet"), "el2n")


def test_a_compressed_log_that_claims_too_many_values_is_refused(tmp_path: Path) -> None:
    n = 40_000_000
    ones = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int8)), pa.array([UIDS[0]]))
    empty = pa.ListArray.from_arrays(np.zeros(n + 1, np.int32), pa.array([], pa.float32()))
    same = pa.array(np.zeros(n, np.int8))
    table = pa.table({"uid": ones, "epoch": same, "label": same, "logits": empty})
    path = tmp_path / "log.parquet"
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(InputError, match=r"claims 160000000 values in \d+ bytes"):
        traininglog.score(str(path), "el2n")


@pytest.mark.parametrize("odd", ["beauty", "", 7])
def test_uids_in_other_spellings_are_equal_and_malformed_ones_are_shown(
    tmp_path: Path, odd: Any
) -> None:
    spelled = [UIDS[0], str(uuid.UUID(UIDS[1])), f"{0xABC:032X}", str(odd), f"{4:032x}"[:-1], None]
    rows = read(pair(tmp_path, uid=spelled))
    assert rows.lo.tolist()[:3] == [0, 1, 0xABC]
    assert [metadata.REASONS[r] for r in rows.reason] == ["", "", ""] + ["malformed uid"] * 3
    assert tables.quoted(rows.uid[3]) == repr(str(odd))
    assert tables.quoted(rows.uid[5]) == "null"


def test_a_missing_key_or_column_is_named_with_its_purpose_and_a_suggestion(tmp_path: Path) -> None:
    score = {"clip_l14_similarity_score": [0.5] * 6}
    one = np.ones((6, 4), np.float16)
    pair(tmp_path, arrays={"sentence": one, "b32_img": one}, **score)
    for options, said, unsaid in (
        ({"feature_keys": ("sentense",)}, "did you mean sentence?", "--arch"),
        ({"feature_keys": ("zzz",)}, "choose with --feature-keys", "--arch"),
        ({}, "(needed for the features); it has sentence, b32_img: try --arch b32", "no column"),
        (
            {"score": "clip_score", "feature_keys": ("sentence",)},
            "clip_score); it has sentence, b32_img: try --arch",
            "no column",
        ),
        ({"score_column": "clip_l14_similarity_scores"}, "clip_l14_similarity_score?", "--arch"),
        ({"group_column": "Uid"}, "did you mean uid?", "--arch"),
    ):
        with pytest.raises(InputError) as caught:
            read(tmp_path, **options)
        assert said in str(caught.value)
        assert unsaid not in str(caught.value)
    pair(tmp_path, arrays={"sentence": one})
    with pytest.raises(InputError, match="for the score, as there is no column clip_l14_sim"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("column", "lost"),
    [
        ([2**24, 2**24 + 1, 2**24 + 2, 1, 2, None], 1),
        ([2**60, 2**60 + 1, 2**60 + 2, 1, 2, 3], 2),
        ([1.7e9 + i for i in range(6)], 5),
        ([decimal.Decimal(2**24 + i) for i in range(6)], 3),
        (["1700000000", "1700000001", "1.7e9", "1", "2", "3"], 0),
        ([0.1, 0.2, 0.3, 0.30000000000000004, 1 / 3, 0.5], 0),
        ([1, 2, 3, 3, 3, 3], 0),
        (pa.array([0.1] * 6, pa.float32()), 0),
    ],
)
def test_scores_that_float32_makes_one_are_counted(tmp_path: Path, column: Any, lost: int) -> None:
    rows = read(pair(tmp_path, mine=column), score_column="mine")
    assert rows.merged[0] == lost
    if lost:
        assert rows.merged[1] == len({v for v in column if v is not None})


@pytest.mark.parametrize("key", ["l14_img", "l14_txt"])
def test_the_order_in_memory_changes_no_bit(tmp_path: Path, key: str) -> None:
    rng = np.random.default_rng(3)
    plain = {name: rng.normal(size=(6, 700)).astype(np.float32) for name in ("l14_img", "l14_txt")}
    turned = {**plain, key: np.asfortranarray(plain[key])}
    results = []
    for name, arrays in (("c", plain), ("f", turned)):
        (tmp_path / name).mkdir()
        rows = read(pair(tmp_path / name, arrays=arrays))
        results.append((rows.features.tobytes(), rows.difficulty.tobytes()))
        score = scores.clip_score(arrays["l14_img"], arrays["l14_txt"])
        assert score.tobytes() == rows.difficulty.tobytes()
        fixed = features.fix([arrays["l14_img"], arrays["l14_txt"]])
        assert fixed.tobytes() == rows.features.tobytes()
    assert results[0] == results[1]


def test_an_unknown_score_is_refused_with_a_suggestion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair(tmp_path)
    for need in ("pair", "target"):
        new = scores.Score(
            name="beauty", kept_first="high", meaning="better", needs=need, summary="",
        )  # fmt: skip
        monkeypatch.setitem(scores.SCORES, "beauty", new)
        target = {"score_target": "t.npy"} if need == "target" else {}
        with pytest.raises(InputError, match="nothing here computes the score 'beauty'"):
            read(tmp_path, score="beauty", **target)


@pytest.mark.parametrize("column", ["epoch", "label"])
def test_a_training_log_without_an_epoch_or_a_label_is_refused(tmp_path: Path, column: str) -> None:
    columns = {
        "uid": UIDS[:2],
        "epoch": [0, 0],
        "label": [1, 0],
        "probabilities": [[0.5, 0.5], [0.1, 0.9]],
    }
    columns[column] = [0, None]
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    with pytest.raises(InputError, match=f"{column} is null in 1 rows"):
        traininglog.score(str(tmp_path / "log.parquet"), "el2n")


def test_files_beside_the_metadata_have_names_of_their_own(tmp_path: Path) -> None:
    """A training log may be a folder with the file names of the metadata."""
    for folder in ("m", "log"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"uid": ["0" * 32]}), tmp_path / folder / "00000.parquet")
    config = CatalogConfig(score="forgetting", training_log=str(tmp_path / "log"))
    names = [info.name for info in side_inputs.files(config)]
    assert names == ["training-log/00000.parquet"]


def test_files_of_a_folder_that_are_not_read_are_counted_in_one_line(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    pair(tmp_path)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "sub").mkdir()
    assert metadata.left_out(folder) == ""
    pair(tmp_path / "sub")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    pair(tmp_path / "deep" / "er")
    for name in ("1.PARQUET", "1.NPZ", "notes.txt", "list.csv"):
        (tmp_path / name).touch()
    said = metadata.left_out(folder)
    assert "4 files that are no pairs (1.NPZ, 1.PARQUET, list.csv, …)" in said
    assert "2 pairs in 2 folders inside it (sub, deep/er)" in said
    assert "lower case" in said
    assert len(metadata.list_pairs(folder)[0]) == 1


def test_a_folder_of_folders_is_refused_with_the_place_of_the_pairs(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    pair(tmp_path / "part")
    with pytest.raises(InputError, match=r"no .parquet file.*1 pairs in 1 folders inside it"):
        metadata.list_pairs(Folder(str(tmp_path)))


@pytest.mark.parametrize(("there", "lacking"), [("npz", "parquet"), ("parquet", "npz")])
def test_files_without_their_partner_are_counted(tmp_path: Path, there: str, lacking: str) -> None:
    pair(tmp_path)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.{there}").touch()
    with pytest.raises(InputError, match=rf"a.{there} has no a.{lacking} beside it \(and 2 more"):
        metadata.list_pairs(Folder(str(tmp_path)))
