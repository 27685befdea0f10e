"""Folders on local disks and object stores: publishing, reading, retries, removal, errors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from d2filter.errors import DependencyError, InputError, StorageError, UsageError
from d2filter.formats import addresses, remote, retry
from d2filter.formats.paths import FileInfo, Folder, absolute, checksum, place_of
from d2filter.formats.rows import read_range, write_array
from d2filter.formats.tables import open_table


@pytest.fixture(params=["local", "file url", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return {
        "local": Folder(str(tmp_path / "run")),
        "file url": Folder(f"file://{tmp_path}/run"),
        "memory": Folder(f"memory://{tmp_path.name}/run"),
    }[request.param]


def test_a_published_file_is_complete(folder: Folder) -> None:
    with folder.publish("deep/inside.bin") as path:
        path.write_bytes(b"abc")
        assert not folder.exists("deep/inside.bin")
    with folder.reading("deep/inside.bin") as stream:
        assert stream.read() == b"abc"
    assert folder.sub("deep").names() == ["inside.bin"]
    assert folder.sub("deep").files()[0].size == 3


def test_a_failed_write_leaves_the_old_file_and_no_other(folder: Folder) -> None:
    folder.publish_json("a.json", {"old": 1})

    def write_half() -> None:
        with folder.publish("a.json") as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert folder.read_json("a.json") == {"old": 1}
    if folder.local is not None:
        assert os.listdir(folder.local) == ["a.json"]


def test_missing_files_and_folders_are_empty_or_named(folder: Folder) -> None:
    assert folder.names() == []
    assert folder.read_json("none.json") is None
    assert not folder.exists()
    folder.remove("none")
    with pytest.raises(InputError, match=r"none\.bin does not exist"), folder.reading("none.bin"):
        pass


def test_remove_takes_files_and_folders(folder: Folder) -> None:
    folder.publish_json("tree/a/b.json", 1)
    folder.publish_json("tree/c.json", 1)
    folder.remove("tree/a")
    assert not folder.exists("tree/a/b.json")
    assert folder.exists("tree/c.json")
    folder.remove("tree/c.json")
    assert not folder.exists("tree/c.json")


def test_broken_json_is_named(folder: Folder) -> None:
    with folder.publish("x.json") as path:
        path.write_text("{")
    with pytest.raises(InputError, match=r"x\.json is not valid JSON"):
        folder.read_json("x.json")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UsageError, match="not a usable location"):
        Folder("nonsense://x/y").exists()


def test_a_missing_protocol_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*args: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DependencyError, match=r"d2filter\[s3\]"):
        Folder("s3://bucket/run").exists()


def test_links_that_lead_nowhere_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.npz").symlink_to(tmp_path / "gone.npz")
    folder = Folder(str(tmp_path))
    assert folder.names(".npz") == ["a.npz"]
    with pytest.raises(InputError, match="does not exist"), folder.reading("a.npz"):
        pass


def test_local_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute("run") == str(tmp_path / "run")
    assert absolute("~/run") == "/home/me/run"
    assert absolute("s3://bucket/run") == "s3://bucket/run"


def test_checksums_are_those_of_the_published_bytes(folder: Folder) -> None:
    content = bytes(range(256)) * 10_000
    sums: dict[str, list[int | str]] = {}
    with folder.publish("a/b.bin", sums) as path:
        path.write_bytes(content)
    expected = [len(content), hashlib.blake2b(content, digest_size=16).hexdigest()]
    assert sums == {"a/b.bin": expected}
    assert checksum(folder, "a/b.bin") == expected
    with folder.publish("a/b.bin") as path:
        path.write_bytes(content[:-1] + b"!")
    assert checksum(folder, "a/b.bin") != expected


def test_a_failed_write_has_no_checksum(folder: Folder) -> None:
    sums: dict[str, list[int | str]] = {}

    def write_half() -> None:
        with folder.publish("a.bin", sums) as path:
            path.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert sums == {}


def test_text_is_appended(folder: Folder) -> None:
    folder.append("logs/a.jsonl", "one\n")
    folder.append("logs/a.jsonl", "zwölf \udc80\n")
    with folder.reading("logs/a.jsonl") as stream:
        assert stream.read().decode() == "one\nzwölf \\udc80\n"


def test_a_folder_is_no_file(folder: Folder) -> None:
    folder.publish_json("tree/a.json", 1)
    with pytest.raises(InputError, match="tree is a folder"), folder.reading("tree"):
        pass


class Flaky(MemoryFileSystem):
    """A file system in memory whose calls fail according to `plan`, one entry a call."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012  # as its base has it
    pseudo_dirs = [""]  # noqa: RUF012
    plan: dict[str, list[Any]] = {}  # noqa: RUF012
    calls: list[tuple[str, tuple[Any, ...]]] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("flaky://", "memory://"))

    def _now(self, name: str, *args: Any) -> Any:
        self.calls.append((name, args))
        todo = self.plan.get(name)
        step = todo.pop(0) if todo else None
        if isinstance(step, Exception):
            raise step
        return step or (lambda result: result)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        after = self._now("cat_file", path, start, end)
        return after(super().cat_file(path, start, end))

    def info(self, path: str, **options: Any) -> Any:
        after = self._now("info", path)
        return after({**super().info(path), "ETag": "1"})

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        after = self._now("ls", path)
        return after(super().ls(path, detail, **options))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        after = self._now("put_file", rpath)
        after(super().put_file(lpath, rpath, **options))

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        after = self._now("mv", path1, path2)
        after(super().mv(path1, path2, **options))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    found: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    return found


@pytest.fixture
def flaky(waits: list[float]) -> Iterator[Folder]:
    """A folder of such a file system, without faults yet."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    yield Folder("flaky://pool/run")
    for kept in (Flaky.store, Flaky.plan, Flaky.calls):
        kept.clear()
    Flaky.pseudo_dirs[:] = [""]


def cut(result: bytes) -> bytes:
    return result[: len(result) // 2]


def gone(what: str = "connection reset by peer") -> OSError:
    return OSError(errno.ECONNRESET, what)


def content_of(folder: Folder, name: str, info: FileInfo | None = None) -> bytes:
    with folder.reading(name, info) as stream:
        return stream.read()


def put(folder: Folder, name: str, content: bytes) -> None:
    with folder.publish(name) as path:
        path.write_bytes(content)


def test_broken_and_short_answers_of_a_store_are_requested_again(
    flaky: Folder, waits: list[float]
) -> None:
    put(flaky, "a.bin", b"0123456789")
    Flaky.plan["cat_file"] = [gone(), cut, RuntimeError("a library's own"), TimeoutError()]
    assert content_of(flaky, "a.bin") == b"0123456789"
    assert len(waits) == 4
    # twice as long each time, by chance up to half of it less
    assert all(0.25 * 2**i <= wait <= 0.5 * 2**i for i, wait in enumerate(waits))


@pytest.mark.parametrize("method", ["info", "ls", "put_file", "mv"])
def test_each_kind_of_request_is_tried_again(flaky: Folder, method: str) -> None:
    put(flaky, "a.bin", b"abc")
    Flaky.plan[method] = [gone()] * 5
    put(flaky, "b.bin", b"def")
    assert flaky.exists("b.bin")
    assert flaky.names() == ["a.bin", "b.bin"]
    assert content_of(flaky, "b.bin") == b"def"
    assert Flaky.plan[method] == []


def test_a_lasting_failure_is_one_line_with_the_number_of_attempts(
    flaky: Folder, waits: list[float]
) -> None:
    put(flaky, "a.bin", b"abc")
    Flaky.plan["cat_file"] = [gone("it is gone\nreally")] * 99
    with pytest.raises(StorageError) as caught:
        content_of(flaky, "a.bin")
    message = str(caught.value)
    assert message.startswith("flaky:///pool/run/a.bin could not be read in 6 tries over ")
    assert "it is gone;" in message
    assert message.endswith("run the same command again")
    assert len(waits) == 5


def test_patience_ends_with_time_too(flaky: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 25))  # each try takes 25 s
    monkeypatch.setattr(retry.time, "monotonic", lambda: float(next(clock)))
    Flaky.plan["info"] = [gone()] * 99
    with pytest.raises(StorageError, match="in 3 tries over 75 s"):
        flaky.exists("a.bin")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError("Forbidden"), "permission denied: Forbidden; check the credentials"),
        (OSError(errno.ENOSPC, "No space"), "No space; make room and run the same command again"),
        (OSError(errno.EROFS, "Read-only"), "Read-only; make it writable and run"),
    ],
)
def test_failures_that_waiting_does_not_cure_are_not_retried(
    flaky: Folder, waits: list[float], error: OSError, told: str
) -> None:
    Flaky.plan["put_file"] = [error] * 99
    with pytest.raises(StorageError, match=told):
        put(flaky, "a.bin", b"abc")
    assert waits == []
    assert not flaky.exists("a.bin")


def test_programming_errors_are_not_retried(flaky: Folder, waits: list[float]) -> None:
    Flaky.plan["info"] = [TypeError("a mistake of ours")]
    with pytest.raises(TypeError):
        flaky.exists("a.bin")
    assert waits == []


def truncate(_: object) -> None:
    """Half of what was put there last arrived."""
    path = next(args[0] for name, args in reversed(Flaky.calls) if name == "put_file")
    entry = Flaky.store[Flaky._strip_protocol(path)]
    entry.truncate(entry.getbuffer().nbytes // 2)


def test_half_an_upload_never_has_the_final_name(flaky: Folder) -> None:
    put(flaky, "a.bin", b"old")
    Flaky.plan["put_file"] = [truncate] * 5
    put(flaky, "a.bin", b"new and longer")
    assert content_of(flaky, "a.bin") == b"new and longer"
    Flaky.plan["put_file"] = [truncate] * 99
    with pytest.raises(StorageError, match=r"a\.bin could not be written .* 2 of 5 bytes arrived"):
        put(flaky, "a.bin", b"third")
    assert content_of(flaky, "a.bin") == b"new and longer"
    assert len(Flaky.store) == 1


def test_a_file_system_that_replaces_nothing_is_cleared_first(flaky: Folder) -> None:
    put(flaky, "a.bin", b"old")
    Flaky.plan["mv"] = [FileExistsError("there is one")]
    put(flaky, "a.bin", b"new")
    assert content_of(flaky, "a.bin") == b"new"
    assert len(Flaky.store) == 1


def test_large_files_come_in_ranges_and_a_break_costs_one(
    flaky: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RANGE", 1000)
    monkeypatch.setattr(remote, "BUFFER", 300)
    content = np.random.default_rng(0).bytes(3500)
    put(flaky, "a.bin", content)
    Flaky.calls.clear()
    Flaky.plan["cat_file"] = [None, cut]
    assert content_of(flaky, "a.bin") == content
    # the last asks for one byte more, to see that there is none
    asked = [args[1:] for name, args in Flaky.calls if name == "cat_file"]
    assert asked == [(0, 1000), (1000, 2000), (1000, 2000), (2000, 3000), (3000, 3501)]
    with flaky.fetched("a.bin") as stream:
        assert stream.read() == content
        assert stream.seek(-10, io.SEEK_END) == 3490
        assert stream.read() == content[-10:]


def test_any_place_of_a_file_can_be_read(flaky: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RANGE", 64)
    monkeypatch.setattr(remote, "BUFFER", 16)
    content = bytes(range(200))
    put(flaky, "a.bin", content)
    local = io.BytesIO(content)
    rng = np.random.default_rng(1)
    with flaky.reading("a.bin") as stream:
        for _ in range(200):
            whence = int(rng.integers(3))
            at = int(rng.integers(0, 200)) - (200 if whence == 2 else 0)
            if whence == 1:
                at = max(at, 100) - 100
            assert stream.seek(at, whence) == local.seek(at, whence)
            count = int(rng.integers(-1, 150))
            assert stream.read(count) == local.read(count)
            assert stream.tell() == local.tell()
            if local.tell() > 300:
                stream.seek(0)
                local.seek(0)


def test_a_known_file_is_not_looked_up(flaky: Folder) -> None:
    put(flaky, "a.bin", b"abc")
    (info,) = flaky.files()
    Flaky.calls.clear()
    assert content_of(flaky, "a.bin", info) == b"abc"
    assert [name for name, _ in Flaky.calls] == ["cat_file"]


@pytest.mark.parametrize("now", [b"longer than before", b"short"])
def test_a_file_that_changed_after_the_listing_is_an_error(
    flaky: Folder, waits: list[float], now: bytes
) -> None:
    put(flaky, "a.bin", b"ten bytes.")
    (info,) = flaky.files()
    put(flaky, "a.bin", now)
    with pytest.raises(StorageError, match=r"a\.bin was changed while it was read"):
        content_of(flaky, "a.bin", info)
    assert waits == []


def test_a_file_that_changed_between_two_ranges_is_an_error(
    flaky: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RANGE", 4)
    put(flaky, "a.bin", b"ten bytes.")
    Flaky.plan["info"] = [None, lambda info: {**info, "ETag": "2"}]
    with pytest.raises(StorageError, match=r"a\.bin was changed while it was read"):
        content_of(flaky, "a.bin")


def test_a_file_that_is_removed_while_it_is_read_is_an_error(flaky: Folder) -> None:
    put(flaky, "a.bin", b"abc")
    (info,) = flaky.files()
    flaky.remove("a.bin")
    with pytest.raises(StorageError, match=r"a\.bin was removed while it was read"):
        content_of(flaky, "a.bin", info)


def test_a_server_that_knows_no_ranges_is_read(
    flaky: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RANGE", 4)
    put(flaky, "a.bin", b"ten bytes.")
    Flaky.plan["cat_file"] = [lambda part: b"ten bytes."] * 3
    assert content_of(flaky, "a.bin") == b"ten bytes."


def test_json_is_one_request_and_is_read_again_if_it_was_cut_off(flaky: Folder) -> None:
    flaky.publish_json("a.json", {"a": 1})
    Flaky.calls.clear()
    assert flaky.read_json("a.json") == {"a": 1}
    assert [name for name, _ in Flaky.calls] == ["cat_file"]
    Flaky.plan["cat_file"] = [cut]
    assert flaky.read_json("a.json") == {"a": 1}


def test_tables_and_arrays_tell_of_the_storage_and_not_of_a_broken_file(flaky: Folder) -> None:
    write_array(flaky, "a.npy", np.arange(10))
    with flaky.publish("a.parquet") as path:
        pq.write_table(pa.table({"x": [1, 2, 3]}), path)
    Flaky.plan["cat_file"] = [gone()] * 99
    with pytest.raises(StorageError, match=r"a\.npy could not be read"):
        read_range(flaky, "a.npy")
    with (
        pytest.raises(StorageError, match=r"a\.parquet could not be read"),
        open_table(flaky, "a.parquet") as table,
    ):
        table.read()


def test_a_file_name_with_wildcards_removes_only_that_file() -> None:
    folder = Folder("memory://pattern")
    folder.publish_json("run1/a.json", 1)
    folder.publish_json("run[1]/a.json", 1)
    folder.remove("run[1]")
    assert folder.exists("run1/a.json")
    assert not folder.exists("run[1]/a.json")
    folder.remove("")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_disk_fails_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = Folder(str(tmp_path))
    folder.publish_json("a.json", "old")

    def full(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError) as caught:
        folder.publish_json("a.json", "new")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/a.json could not be written: {os.strerror(number)}; ")
    assert message.endswith("run the same command again")
    assert json.loads((tmp_path / "a.json").read_text()) == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_full_disk_error_of_numpy_is_recognized() -> None:
    # numpy says "N requested and M written" and no reason
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    folder = Folder("memory://full")

    def write() -> None:
        with folder.publish("a.npy") as path:
            path.symlink_to("/dev/full")
            with path.open("wb", buffering=0) as stream:
                np.save(stream, np.arange(100_000))

    with pytest.raises(StorageError, match="No space left on device; make room"):
        write()


def test_an_error_of_another_file_is_not_blamed_on_the_one_that_is_written(
    tmp_path: Path,
) -> None:
    folder = Folder(str(tmp_path))
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "picture.png"))
    with pytest.raises(PermissionError), folder.publish("a.bin"):
        raise denied


LONG = {
    "ascii": "x" * 255,
    "suffix": "x" * 247 + ".parquet",
    "two bytes": "ü" * 125 + ".json",
    "three bytes": "雪" * 84 + ".gz",
    "four bytes": "👩" * 62 + ".tar",
    "all suffix": "." + "s" * 254,
    "a long suffix": "a." + "ü" * 126,
}


@pytest.mark.parametrize("name", LONG.values(), ids=LONG)
def test_names_as_long_as_a_file_system_allows_are_written(folder: Folder, name: str) -> None:
    assert 250 < len(name.encode()) <= 255
    for content in (b"one", b"two"):
        with folder.publish(name) as path:
            path.write_bytes(content)
            assert len(path.name.encode()) <= 255
        with folder.reading(name) as stream:
            assert stream.read() == content
    folder.publish_json(name, [1])
    assert folder.read_json(name) == [1]
    folder.append(name, "2")
    info = folder.info(name)
    assert info is not None
    assert info.size == len("[\n  1\n]\n2")
    folder.remove(name)
    assert folder.info(name) is None
    if folder.local is not None:
        assert os.listdir(folder.local) == []


def test_temporary_files_keep_the_suffix_of_their_format(folder: Folder) -> None:
    with folder.publish("plot.svg") as path:
        path.write_bytes(b"")
        assert path.suffix == ".svg"


def test_a_name_that_is_too_long_fails_with_one_line(tmp_path: Path) -> None:
    with pytest.raises((StorageError, OSError)) as caught:
        Folder(str(tmp_path)).publish_json("x" * 300, 1)
    assert os.strerror(errno.ENAMETOOLONG) in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_double_colons_in_a_local_path_are_part_of_the_name(tmp_path: Path, prefix: str) -> None:
    url = f"{prefix}{tmp_path}/a.tar::b::c"
    assert absolute(url) == url
    folder = Folder(url)
    assert folder.local == tmp_path / "a.tar::b::c"
    folder.publish_json("x::y/z::.json", 1)
    assert folder.read_json("x::y/z::.json") == 1
    assert folder.sub("x::y").names() == ["z::.json"]
    assert folder.exists("x::y")
    assert not folder.exists("s3::y")
    assert absolute("zip::a") == str(Path.cwd() / "zip::a")


@pytest.mark.parametrize("url", ["a::s3://b/c", "nonsense::memory://b", "::", "s3::"])
def test_a_malformed_chain_of_urls_raises_an_error_of_d2filter(url: str) -> None:
    with contextlib.suppress(UsageError, DependencyError, InputError, StorageError):
        Folder(url).exists()


@pytest.mark.parametrize(
    ("url", "folder", "name", "recorded"),
    [
        ("/a/b.tar", "/a", "b.tar", "b.tar"),
        ("/b.tar", "/", "b.tar", "b.tar"),
        ("b?c.tar", ".", "b?c.tar", "b?c.tar"),
        ("s3://a/b?/c.tar", "s3://a/b?", "c.tar", "c.tar"),
        ("https://h/a/b.tar?s=x/y", "https://h/a", "b.tar?s=x/y", "b.tar"),
        ("https://h/get?file=a/b.tar", "https://h", "get?file=a/b.tar", "b.tar"),
        ("https://u:p@h/b.tar", "https://u:p@h", "b.tar", "b.tar"),
    ],
)
def test_a_url_is_split_into_its_folder_and_file_name(
    url: str, folder: str, name: str, recorded: str
) -> None:
    assert place_of(url) == (Folder(folder), name)
    assert addresses.inside(folder, name) == url.removeprefix("./") or folder == "."
    assert addresses.file_name(url) == recorded


def test_the_information_about_one_file_equals_the_listing(folder: Folder) -> None:
    folder.publish_json("a/x.json", 1)
    inner = folder.sub("a")
    assert [inner.info(info.name) for info in inner.files()] == inner.files()
    assert folder.info("a") is None
    assert folder.info("a/y.json") is None
    assert inner.infos(["x.json", "y.json"]) == [*inner.files(), None]


def test_a_file_replaced_by_one_of_its_size_has_another_version(folder: Folder) -> None:
    folder.publish_json("x.json", 1)
    (before,) = folder.files()
    assert before.version
    folder.publish_json("x.json", 2)
    (after,) = folder.files()
    assert (before.size, before.name) == (after.size, after.name)
    assert before.version != after.version


class Silent(Flaky):
    """A file system that knows no versions."""

    protocol = "silent"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("silent://", "memory://"))

    def info(self, path: str, **options: Any) -> Any:
        found = MemoryFileSystem.info(self, path)
        return {name: found[name] for name in ("name", "size", "type")}

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        found = MemoryFileSystem.ls(self, path, detail=True)
        return [{name: one[name] for name in ("name", "size", "type")} for one in found]


def test_without_version_information_the_content_identifies_a_file(flaky: Folder) -> None:
    fsspec.register_implementation("silent", Silent, clobber=True)
    folder = Folder("silent://pool/run")
    put(folder, "a.bin", b"one")
    (before,) = folder.files()
    assert folder.info("a.bin") == before
    assert content_of(folder, "a.bin", before) == b"one"
    put(folder, "a.bin", b"two")
    assert folder.files() != [before]
    put(folder, "a.bin", b"one")
    assert folder.files() == [before]


def test_published_json_reads_back_equal_and_contains_no_terminal_escapes(folder: Folder) -> None:
    value = {"https://me:pw@host/?class=1": ["a\x1b[2J", "\u2028", "\udc80", "l\n", "\x9b", "é"]}
    folder.publish_json("a.json", value)
    assert folder.read_json("a.json") == value
    with folder.reading("a.json") as stream:
        text = stream.read().decode()
    assert not {c for c in text if not c.isprintable()} - {"\n"}
