"""Readers of damaged bytes: only errors of d2filter, no hang, little memory, nothing half-read.

The nightly tests run fifty times as many examples.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from d2filter.config import CatalogConfig
from d2filter.errors import D2FilterError, InputError
from d2filter.formats import metadata, npz, tarindex, traininglog, uid, webdataset
from d2filter.formats.paths import Folder
from d2filter.formats.tables import shown

_MEMORY = 1 << 30
# a memory disk where there is one: thousands of small files are written
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

often = pytest.mark.parametrize(
    "times",
    [
        pytest.param(1, id="few", marks=pytest.mark.timeout(60)),
        pytest.param(50, id="many", marks=[pytest.mark.nightly, pytest.mark.timeout(1800)]),
    ],
)


@contextmanager
def little_memory() -> Iterator[None]:
    """At most 1 GB more than now; the memory of hypothesis itself grows with the examples."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound if hard < 0 else min(bound, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def holds(times: int, examples: int, strategy: st.SearchStrategy, check: Callable) -> None:
    """Try `check` on many examples with little memory; one that takes 20 seconds hangs."""

    def limited(case: Any) -> None:
        with little_memory():
            check(case)

    suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    profile = settings(
        max_examples=examples * times, deadline=20_000, suppress_health_check=suppressed
    )
    profile(given(strategy)(limited))()


# ---- mutations ----

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0), st.integers(0, 7)),
        st.tuples(st.just("set"), st.integers(0), st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("cut"), st.integers(0), st.none()),
        st.tuples(st.just("insert"), st.integers(0), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("blocks"), st.integers(0), st.binary(min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.integers(0), st.integers(1, 12)),
        st.tuples(st.just("delete"), st.integers(0), st.integers(1, 600)),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, operations: list[tuple[str, int, Any]], *, at_end: bool) -> bytes:
    """at_end: positions count from the end, where zip and parquet keep their directories."""
    out = bytearray(content)
    for name, position, what in operations:
        if not out:
            break
        at = position % len(out)
        if at_end:
            at = len(out) - 1 - at
        block = at // 512 * 512
        if name == "flip":
            out[at] ^= 1 << what
        elif name == "set":
            out[at : at + len(what)] = what
        elif name == "cut":
            del out[at:]
        elif name == "insert":
            out[at:at] = what
        elif name == "blocks":
            out[block:block] = what * 512
        elif name == "repeat":
            out[block:block] = out[block : block + 512 * what]
        else:
            del out[at : at + what]
    return bytes(out)


# ---- shards ----


def shard_bytes(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def shard_members(order: list[int]) -> list[tuple[str, bytes]]:
    """Four samples of three members each, whose names need long headers at times."""
    members = []
    for i in range(4):
        key = ["a", "é雪", "long/" * 30 + "c", "../../d"][i]
        members += [
            (f"{key}.jpg", bytes([i]) * (1 + 700 * i)),
            (f"{key}.txt", f"caption {i}".encode()),
            (f"{key}.json", json.dumps({"uid": f"{i:032x}", "url": f"http://{i}"}).encode()),
        ]
    return [members[i] for i in order]


def read_shard(path: Path) -> tuple[list[webdataset.Sample], str]:
    (shard,) = webdataset.list_shards([str(path)])
    samples = []
    try:
        for sample in webdataset.read_samples(shard):
            well_formed(sample)
            samples.append(sample)
    except webdataset.LostTail as error:
        lost = str(error)
    else:
        lost = ""
    lost.encode()
    assert len(lost) < 500
    return samples, lost


def well_formed(sample: webdataset.Sample) -> None:
    (sample.key + sample.message + sample.caption).encode()
    assert sample.uid is None or uid.is_uid(sample.uid)
    assert len(sample.message) < 500
    if sample.reason:
        assert not sample.image
        return
    assert sample.uid
    assert sample.image
    assert sample.caption.strip()
    assert set(sample.meta) <= {"url", "sha256", "original_width", "original_height"}


@often
def test_damaged_shards_give_the_samples_before_the_damage(tmp_path: Path, times: int) -> None:
    path = tmp_path / "0.tar"
    forms = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]
    order = st.one_of(st.just(list(range(12))), st.permutations(range(12)))

    def check(case: tuple[list[int], int, list[Any]]) -> None:
        order, form, operations = case
        whole = shard_bytes(shard_members(order), form)
        damaged = mutated(whole, operations, at_end=False)
        path.write_bytes(whole)
        known, lost = read_shard(path)
        assert not lost
        ends = ends_of_members(whole)
        path.write_bytes(damaged)
        got, _ = read_shard(path)
        first: dict[str, webdataset.Sample] = {}
        for sample in got:
            first.setdefault(sample.key, sample)
        same = next(
            (i for i, (a, b) in enumerate(zip(whole, damaged, strict=False)) if a != b),
            len(damaged),
        )
        for sample in known:
            if ends[sample.key] <= same:
                assert first[sample.key] == sample

    holds(times, 250, st.tuples(order, st.sampled_from(forms), OPERATIONS), check)


def ends_of_members(content: bytes) -> dict[str, int]:
    """Where the last member of each key ends."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {
            tarindex.split_name(m.name)[0]: m.offset_data + m.size
            for m in sorted(archive, key=lambda m: m.offset)
        }


@often
def test_random_bytes_are_no_shard(tmp_path: Path, times: int) -> None:
    path = tmp_path / "0.tar"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        read_shard(path)

    magic = st.sampled_from([b"", b"\0" * 512, b"\x1f\x8b", b"a.jpg", b"\x80" * 200])
    content = st.tuples(magic, st.binary(max_size=2000)).map(b"".join)
    holds(times, 100, content, check)


KEYWORDS = [
    *("path", "size", "linkpath", "hdrcharset", "mtime", "uid", "comment", "é", "a" * 300),
    *(f"GNU.sparse.{name}" for name in ("map", "size", "major", "minor", "name", "realsize")),
    *("GNU.sparse.offset", "GNU.sparse.numbytes"),
]
VALUES = [
    *("", "0", "1", "-1", "-512", "9" * 20, "9" * 200, "9" * 5000, "1,2,x", "0,1,0,1"),
    *("BINARY", "nan", "1e999", "../../x.jpg", "/abs.json", "\0", "\n", "x" * 70_000),
]
PAX_RECORDS = st.lists(
    st.tuples(
        st.sampled_from(KEYWORDS),
        st.one_of(st.sampled_from(VALUES), st.text(max_size=30)),
        st.integers(-2, 2),
    ),
    max_size=4,
)
SIZES = st.one_of(
    st.integers(0, 1200),
    st.sampled_from([-1, -512, -(2**60), 2**31, 2**33, 2**62, 2**63, 2**64, 2**80]),
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from([*"01234567ADKLMNSVXgx", "\0"]),
        st.sampled_from(["a.jpg", "a.txt", "a.json", "b.jpg", "/b.txt", "../b.json", ".jpg", ""]),
        st.one_of(st.none(), SIZES),
        st.one_of(st.binary(max_size=700), PAX_RECORDS),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


def raw_member(case: tuple[str, str, int | None, bytes | list[Any], bool]) -> bytes:
    """A header with a valid checksum that claims what it likes, and its content."""
    kind, name, claimed, content, extended = case
    if isinstance(content, list):
        content = b"".join(pax_record(*record) for record in content)
    size = len(content) if claimed is None else claimed
    octal = b"%011o\0" % size if 0 <= size < 8**11 else b"\x80"
    if len(octal) < 12:  # base 256
        octal = (b"\xff" if size < 0 else b"\x80") + (size % 256**11).to_bytes(11, "big")
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[100:124] = b"0000644\0" + b"0000000\0" * 2
    header[124:136] = octal
    header[136:148] = b"00000000000\0"
    header[156:157] = kind.encode()
    header[257:265] = b"ustar  \0"
    if kind == "S":
        header[386:482] = b"".join(b"%011o\0" % n for n in (0, 512, 1024, 512, 0, 0, 0, 0))
        header[482], header[483:495] = int(extended), octal
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return bytes(header) + content + b"\0" * (-len(content) % 512)


def pax_record(keyword: str, value: str, off: int) -> bytes:
    line = f" {keyword}={value}\n".encode("utf-8", "surrogatepass")
    length = len(line)
    while len(b"%d" % length) + len(line) != length:
        length = len(b"%d" % length) + len(line)
    return b"%d" % max(0, length + off) + line


@often
def test_headers_that_claim_anything_do_no_harm(tmp_path: Path, times: int) -> None:
    path = tmp_path / "0.tar"

    def check(headers: list[Any]) -> None:
        path.write_bytes(b"".join(map(raw_member, headers)) + b"\0" * 1024)
        read_shard(path)

    holds(times, 250, HEADERS, check)


# ---- headers that are read without tarfile ----

NUMBERS = st.one_of(
    st.tuples(
        st.sampled_from([b"%07o\0", b"%07o ", b"%06o \0", b"%7o\0", b"%o", b" %o\0x"]),
        st.integers(0, 8**6 - 1),
    ).map(lambda case: case[0] % case[1]),
    st.sampled_from([b"", b"\0" * 8, b" " * 8, b"0o7", b"+7", b"-7", b"1_0", b"\x80\0\1", b"\xff"]),
    st.sampled_from([b"8", b"0000008\0", b"7 7", b"abc", b"0000\xff00\0", b"000000:\0"]),
)
NAMES = st.one_of(
    st.sampled_from([b"a.jpg", b"a.json", b"d/a.txt", b"a.txt/", b"", b"a\0b.jpg", b"x" * 100]),
    st.binary(max_size=110),
)
USUAL = {"name": b"a.jpg", "size": b"%011o\0" % 700, "type": b"0", "sum": b"%06o\0 ", "off": 0}
OTHERS = {
    "name": NAMES,
    "size": st.one_of(st.integers(0, 1500).map(lambda n: b"%011o\0" % n), NUMBERS),
    "type": st.sampled_from([b"\0", b"1", b"5", b"7", b"L", b"x", b"g", b"S"]),
    "sum": st.sampled_from(
        [b"%06o \0", b"%07o\0", b"%7o ", b"%o", b"\0%o", b"0%05o\0 ", b"%06o\0\0", b"%06o\x000"]
    ),
    "off": st.sampled_from(["signed", 1, -256, 65521, -65521]),
    **dict.fromkeys(("mode", "owner", "group", "time", "major", "minor"), NUMBERS),
    "link": NAMES,
    "magic": st.sampled_from([b"ustar\x0000", b"ustar  \0", b"\0" * 8, b"\xff" * 8]),
    "user": st.binary(max_size=40),
    "prefix": NAMES,
    "tail": st.binary(max_size=12),
}
SPELLED = st.lists(
    st.sampled_from(list(OTHERS)).flatmap(lambda name: st.tuples(st.just(name), OTHERS[name])),
    max_size=3,
).map(lambda changes: {**USUAL, **dict(changes)})
FIELDS = {
    "name": (0, 100), "mode": (100, 8), "owner": (108, 8), "group": (116, 8), "size": (124, 12),
    "time": (136, 12), "type": (156, 1), "link": (157, 100), "magic": (257, 8), "user": (265, 32),
    "major": (329, 8), "minor": (337, 8), "prefix": (345, 155), "tail": (500, 12),
}  # fmt: skip


def spelled(case: dict[str, Any]) -> bytes:
    """A header whose fields are spelled in ways that some program may have."""
    out = bytearray(tarfile.TarInfo().tobuf())
    for field, (begin, length) in FIELDS.items():
        if field in case:
            out[begin : begin + length] = case[field][:length].ljust(length, b"\0")
    rest = bytes(out[:148] + out[156:])
    total = 256 + sum(rest)
    if case["off"] == "signed":
        total -= 256 * sum(byte > 127 for byte in rest)
    else:
        total = max(0, total + case["off"])
    out[148:156] = (case["sum"] % max(0, total))[:8].ljust(8, b"\0")
    return bytes(out)


ARCHIVES = st.one_of(
    st.lists(st.tuples(SPELLED, st.binary(max_size=600)), min_size=1, max_size=6).map(
        lambda many: b"".join(spelled(c) + b + b"\0" * (-len(b) % 512) for c, b in many)
    ),
    HEADERS.map(lambda many: b"".join(map(raw_member, many))),
    st.tuples(
        st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.permutations(range(12))
    ).map(lambda case: shard_bytes(shard_members(case[1]), case[0])),
)


@often
def test_the_fast_reader_of_headers_agrees_with_tarfile(times: int) -> None:
    images = webdataset.IMAGE_SUFFIXES

    def check(case: tuple[bytes, list[Any], bool]) -> None:
        archive, operations, damaged = case
        # after a sound member: tarfile itself reads the first one
        content = header_of_a_sound_member() + archive + b"\0" * 1024
        if damaged:
            content = mutated(content, operations, at_end=False)
        told = tarindex.read(io.BytesIO(content), images)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(tarindex, "plain_file", lambda *_: None)
            assert told == tarindex.read(io.BytesIO(content), images)

    holds(times, 250, st.tuples(ARCHIVES, OPERATIONS, st.booleans()), check)


def header_of_a_sound_member() -> bytes:
    return tarfile.TarInfo("begin.txt").tobuf()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_plain_headers_are_read_without_tarfile(form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first, and that of the end."""
    content = shard_bytes([(f"{i:03d}.jpg", b"x" * i) for i in range(100)], form)
    parsed_by_tarfile = []
    plain = tarfile.TarInfo.frombuf.__func__  # type: ignore[attr-defined]

    def counted(cls: type, *arguments: Any) -> Any:
        parsed_by_tarfile.append(arguments)
        return plain(cls, *arguments)

    monkeypatch.setattr(tarfile.TarInfo, "frombuf", classmethod(counted))
    keys, broken = tarindex.read(io.BytesIO(content), ("jpg",))
    assert not broken
    assert [(key.name, key.members["jpg"].size) for key in keys] == [
        (f"{i:03d}", i) for i in range(100)
    ]
    assert len(parsed_by_tarfile) == 2


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(["\ud800", "0" * 32, "F" * 32, "\0", " ", "x" * 5000, 10**400, 1e308]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
JSON_OBJECTS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("uid", "caption", "url", "sha256", "original_width", "original_height"), JSON_VALUES
    ),
)
JSON_TEXTS = st.one_of(
    st.one_of(JSON_OBJECTS, JSON_VALUES).map(lambda value: json.dumps(value).encode()),
    # repeated names: the last one counts, as everywhere in Python
    st.lists(JSON_OBJECTS, min_size=2, max_size=3).map(
        lambda many: ("{" + ",".join(json.dumps(m)[1:-1] for m in many if m) + "}").encode()
    ),
    st.sampled_from([b"[", b'{"a":', b"[{}", b"[[],"]).map(lambda begin: begin * 100_000),
    st.sampled_from([b"9" * 100_000, b"-1e" + b"9" * 100_000, b"\xef\xbb\xbf{}", b"NaN", b"nul"]),
    st.sampled_from(["utf-16", "utf-32", "latin-1"]).map(lambda c: '{"caption": "é"}'.encode(c)),
    st.binary(max_size=60),
)


@often
def test_any_json_gives_a_sample_or_a_reason(tmp_path: Path, times: int) -> None:
    path = tmp_path / "0.tar"

    def check(texts: list[bytes]) -> None:
        members = []
        for i, text in enumerate(texts):
            members += [(f"{i}.jpg", b"?"), (f"{i}.json", text)]
        path.write_bytes(shard_bytes(members))
        samples, lost = read_shard(path)
        assert not lost
        assert [s.key for s in samples] == [str(i) for i in range(len(texts))]
        for sample, text in zip(samples, texts, strict=True):
            told = parsed(text)
            if not isinstance(told, dict):
                assert sample.reason == "broken json"
            elif uid.normalized(told.get("uid")):
                assert sample.uid == uid.normalized(told["uid"])
            if not sample.reason:
                assert sample.caption == told["caption"]

    holds(times, 150, st.lists(JSON_TEXTS, min_size=1, max_size=4), check)


def parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---- metadata ----

ROWS = 20


def parquet_bytes(columns: dict[str, Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, **options)
    return stream.getvalue()


def npz_bytes(write: Callable[..., None] = np.savez, **arrays: Any) -> bytes:
    stream = io.BytesIO()
    write(stream, **arrays)
    return stream.getvalue()


def clean_columns(rows: int = ROWS) -> dict[str, Any]:
    return {
        "uid": pa.array([f"{i:032x}" for i in range(rows)]),
        "clip_l14_similarity_score": pa.array(np.linspace(0, 1, rows, dtype=np.float32)),
        "shard": pa.array(["data/0.tar"] * rows),
        "key": pa.array([f"k{i}" for i in range(rows)]),
        "class": pa.array([f"c{i % 3}" for i in range(rows)]),
    }


def clean_arrays(rows: int = ROWS) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {f"l14_{n}": rng.normal(size=(rows, 6)).astype(np.float16) for n in ("img", "txt")}


PAIR = (parquet_bytes(clean_columns()), npz_bytes(**clean_arrays()))
WRITINGS = [
    {"compression": compression, "use_dictionary": dictionary, "row_group_size": group}
    for compression, dictionary, group in (
        ("snappy", True, None), ("zstd", False, 7), ("none", True, 5), ("gzip", False, None),
    )
]  # fmt: skip
CONFIGS = st.sampled_from(
    [
        CatalogConfig(),
        CatalogConfig(group_column="class"),
        CatalogConfig(score="clip_score", feature_type="image"),
        CatalogConfig(score_column="key", normalize=False),
        CatalogConfig(feature_keys=("l14_txt",)),
    ]
)


def read_pair(table: bytes, arrays: bytes, config: CatalogConfig) -> metadata.MetadataRows | None:
    """The rows of such a pair, all of them well-formed; None when it was refused."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        (Path(folder) / "0.parquet").write_bytes(table)
        (Path(folder) / "0.npz").write_bytes(arrays)
        try:
            rows = metadata.read_pair(Folder(folder), "0", config)
        except D2FilterError as error:
            refused(error)
            return None
    n = len(rows.hi)
    for column in (rows.lo, rows.reason, rows.difficulty, rows.features, rows.uid):
        assert len(column) == n
    good = rows.reason == 0
    assert np.isfinite(rows.features[good]).all()
    assert rows.features[good].any(axis=1).all()
    assert np.isfinite(rows.difficulty[good]).all()
    hexes = uid.to_hex(rows.hi, rows.lo)
    for i in range(n):
        text = shown(rows.uid[i])
        assert text is None or len(text) <= 300
        assert not good[i] or uid.normalized(text) == hexes[i]
    for column in (rows.shard, rows.key, rows.group):
        assert column.type == pa.string()
        assert len(column.to_pylist()) == n
    return rows


def refused(error: D2FilterError) -> None:
    assert isinstance(error, InputError)
    assert len(str(error).splitlines()) == 1
    str(error).encode()


@often
def test_damaged_tables_are_refused_or_read(times: int) -> None:
    tables = [parquet_bytes(clean_columns(), **options) for options in WRITINGS]

    def check(case: tuple[bytes, list[Any], bool, CatalogConfig]) -> None:
        table, operations, at_end, config = case
        read_pair(mutated(table, operations, at_end=at_end), PAIR[1], config)

    case = st.tuples(st.sampled_from(tables), OPERATIONS, st.booleans(), CONFIGS)
    holds(times, 200, case, check)


@often
def test_damaged_arrays_are_refused_or_read(times: int) -> None:
    archives = [npz_bytes(write, **clean_arrays()) for write in (np.savez, np.savez_compressed)]

    def check(case: tuple[bytes, list[Any], bool, CatalogConfig]) -> None:
        archive, operations, at_end, config = case
        rows = read_pair(PAIR[0], mutated(archive, operations, at_end=at_end), config)
        # a zip knows the CRC-32 of what it holds
        if rows is not None:
            whole = read_pair(*PAIR, config)
            assert whole is not None
            assert rows.features.tobytes() == whole.features.tobytes()

    case = st.tuples(st.sampled_from(archives), OPERATIONS, st.booleans(), CONFIGS)
    holds(times, 200, case, check)


DTYPES = st.one_of(
    st.sampled_from(["<f2", "<f4", "<f8", "g", ">f2", ">f4", ">f8"]).map(np.dtype),
    hnp.scalar_dtypes(),
    st.just(np.dtype([("a", np.float32)])),
)
SHAPES = st.one_of(
    st.just((ROWS, 6)),
    st.sampled_from([(ROWS, 1), (ROWS, 0), (0, 6), (ROWS,), (), (ROWS, 2, 3), (ROWS + 1, 6)]),
)
ARRAYS = st.tuples(DTYPES, SHAPES, st.integers(0, 2**32), st.booleans())


def any_array(case: tuple[np.dtype, tuple[int, ...], int, bool]) -> np.ndarray:
    """Random bits: NaN, infinities, the smallest and the largest values are among them."""
    kind, shape, seed, fortran = case
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    array = np.frombuffer(rng.bytes(size * kind.itemsize), kind, size).reshape(shape)
    return np.asfortranarray(array) if fortran else array


@often
def test_arrays_of_any_type_are_refused_or_read(times: int) -> None:
    def check(case: tuple[Any, Any, CatalogConfig]) -> None:
        image, text, config = case
        read_pair(PAIR[0], npz_bytes(l14_img=any_array(image), l14_txt=any_array(text)), config)

    holds(times, 150, st.tuples(ARRAYS, ARRAYS, CONFIGS), check)


SHAPE_TEXTS = st.sampled_from(
    [
        "(20, 6)",
        "(20, 1000000000)",
        "(1000000000000, 6)",
        "(-20, -6)",
        "(20, True)",
        "(20, 6.0)",
        "(20,)",
        "()",
        "(20, 10**10)",
        "(" * 500 + ")" * 500,
        "20",
        "('20', 6)",
        "(20, None)",
    ]
)
DESCRIPTIONS = st.sampled_from(
    ["'<f2'", "'|O'", "'<f16'", "'>f8'", "'V8'", "'f0'", "'<f3'", "[('a', '<f2')]", "'<M8[s]'", "7"]
)


@often
def test_array_headers_with_false_sizes_do_no_harm(times: int) -> None:
    """Shapes, sizes and compression of which nothing is true."""

    def check(case: tuple[Any, ...]) -> None:
        shape, description, version, length_off, payload, sizes, method, config = case
        text = f"{{'descr': {description}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        width = 2 if version == 1 else 4
        length = max(0, len(text) + length_off) % 256**width
        content = b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(width, "little") + text
        content += b"\1" * payload
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            archive.writestr("l14_img.npy", content)
            archive.writestr("l14_txt.npy", content)
            for info, size in zip(archive.infolist(), sizes, strict=True):
                # the directory is written at the end, from these
                info.file_size, info.compress_size = (
                    told if told is not None else true
                    for told, true in zip(size, (info.file_size, info.compress_size), strict=True)
                )
        read_pair(PAIR[0], stream.getvalue(), config)

    told = st.one_of(st.none(), st.sampled_from([0, 1, 368, 2**31, 2**32 + 5, 2**40]))
    case = st.tuples(
        SHAPE_TEXTS,
        DESCRIPTIONS,
        st.sampled_from([1, 2, 3, 9]),
        st.sampled_from([0, 0, 1, -1, 10_000, 2**31]),
        st.sampled_from([0, 240, 241, 5000, 3_000_000]),
        st.tuples(*[st.tuples(told, told)] * 2),
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]),
        CONFIGS,
    )
    holds(times, 200, case, check)


TEXT_TYPES = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]
if hasattr(pa, "string_view"):
    TEXT_TYPES += [pa.string_view(), pa.binary_view()]
UIDS = st.integers(0, 2**128 - 1).map(lambda n: f"{n:032x}")
SPELLED_UIDS = UIDS.flatmap(lambda u: st.sampled_from([u, u.upper(), str(UUID(u))]))
TEXTS = st.one_of(SPELLED_UIDS, st.none(), st.text(max_size=40).filter(webdataset.encodable))


def text_array(values: list[str | None], kind: pa.DataType, encoded: bool) -> pa.Array:
    if encoded:
        return pa.array(values, pa.string()).dictionary_encode()
    raw = [None if v is None else v.encode() for v in values]
    return pa.array(raw if "binary" in str(kind) else values, kind)


@often
def test_uids_are_parsed_from_any_kind_of_text(times: int) -> None:
    def check(case: tuple[list[str | None], pa.DataType, bool, list[int]]) -> None:
        values, kind, encoded, cuts = case
        array = text_array(values, kind, encoded)
        edges = sorted({0, len(array), *(c % (len(array) + 1) for c in cuts)})
        parts = [array[a:b] for a, b in itertools.pairwise(edges)]
        for column in (array, pa.chunked_array(parts, array.type)):
            hi, lo, valid = uid.parse(column)
            known = [uid.normalized(v) for v in values]
            assert valid.tolist() == [one is not None for one in known]
            assert uid.to_hex(hi[valid], lo[valid]) == [one for one in known if one]
            assert not hi[~valid].any()
            assert not lo[~valid].any()

    kinds = st.sampled_from(TEXT_TYPES)
    cuts = st.lists(st.integers(0), max_size=3)
    holds(times, 100, st.tuples(st.lists(TEXTS, max_size=12), kinds, st.booleans(), cuts), check)


ANY_TYPE = st.sampled_from(
    [
        pa.int8(),
        pa.int64(),
        pa.uint64(),
        pa.float16(),
        pa.float32(),
        pa.float64(),
        pa.bool_(),
        pa.decimal128(30, 4),
        pa.date32(),
        pa.timestamp("us"),
        pa.time64("ns"),
        pa.null(),
        pa.binary(32),
        pa.list_(pa.string()),
        pa.struct([("uid", pa.string())]),
        *TEXT_TYPES,
    ]
)


def any_column(kind: pa.DataType, seed: int, rows: int) -> pa.Array:
    """Values of a type, extremes and nulls among them."""
    rng = np.random.default_rng(seed)
    if kind in TEXT_TYPES:
        pool = ["0" * 32, "f" * 32, "", "1.5", "nan", None, "x" * 3000, "é\n", "G" * 32]
        return text_array([pool[i] for i in rng.integers(0, len(pool), rows)], kind, False)
    if pa.types.is_list(kind):
        return pa.array([["a"]] * rows, kind)
    if pa.types.is_struct(kind):
        return pa.array([{"uid": "0" * 32}] * rows, kind)
    if pa.types.is_null(kind):
        return pa.nulls(rows)
    if pa.types.is_decimal(kind) or kind == pa.bool_():
        return pa.array(rng.integers(0, 2, rows)).cast(kind)
    width = kind.bit_width // 8
    raw = pa.py_buffer(rng.bytes(width * rows))
    valid = pa.array(rng.random(rows) < 0.8).buffers()[1]
    return pa.Array.from_buffers(kind, rows, [valid, raw])


@often
def test_columns_of_any_type_are_refused_or_read(times: int) -> None:
    names = list(clean_columns())

    def check(case: tuple[dict[str, pa.DataType], int, CatalogConfig, dict]) -> None:
        kinds, seed, config, options = case
        columns = {**clean_columns()}
        for i, (name, kind) in enumerate(kinds.items()):
            columns[name] = any_column(kind, seed + i, ROWS)
        read_pair(parquet_bytes(columns, **options), PAIR[1], config)

    kinds = st.dictionaries(st.sampled_from(names), ANY_TYPE, min_size=1, max_size=3)
    case = st.tuples(kinds, st.integers(0, 2**32), CONFIGS, st.sampled_from(WRITINGS))
    holds(times, 200, case, check)


@often
def test_damaged_training_logs_are_refused_or_read(tmp_path: Path, times: int) -> None:
    path = tmp_path / "log.parquet"
    rows = 24
    rng = np.random.default_rng(0)
    lists = pa.array(rng.dirichlet([1, 1, 1], rows).tolist(), pa.list_(pa.float32()))
    columns = {
        "uid": pa.array([f"{i // 3:032x}" for i in range(rows)]),
        "epoch": pa.array([i % 3 for i in range(rows)]),
        "label": pa.array([i // 3 % 3 for i in range(rows)]),
        "probabilities": lists,
    }
    whole = parquet_bytes(columns, compression="none")

    def score(content: bytes) -> None:
        path.write_bytes(content)
        try:
            found = traininglog.score(str(path), "el2n")
        except D2FilterError as error:
            refused(error)
        else:
            assert found.hi.size == found.lo.size == found.value.size > 0
            assert np.isfinite(found.value).all()

    def damaged(case: tuple[list[Any], bool]) -> None:
        score(mutated(whole, case[0], at_end=case[1]))

    def retyped(case: tuple[str, pa.DataType, int]) -> None:
        name, kind, seed = case
        score(parquet_bytes({**columns, name: any_column(kind, seed, rows)}))

    holds(times, 200, st.tuples(OPERATIONS, st.booleans()), damaged)
    case = st.tuples(st.sampled_from(list(columns)), ANY_TYPE, st.integers(0, 2**32))
    holds(times, 100, case, retyped)


@often
def test_damaged_score_targets_are_refused_or_read(tmp_path: Path, times: int) -> None:
    path = tmp_path / "target.npy"
    stream = io.BytesIO()
    np.save(stream, np.ones((5, 6), np.float32))

    def check(case: tuple[list[Any], bool]) -> None:
        path.write_bytes(mutated(stream.getvalue(), case[0], at_end=case[1]))
        try:
            array = npz.read_array(Folder(str(tmp_path)), "target.npy", "score-target")
        except D2FilterError as error:
            refused(error)
        else:
            assert array.ndim == 2
            assert array.dtype in (np.float16, np.float32, np.float64)

    holds(times, 200, st.tuples(OPERATIONS, st.booleans()), check)
