from __future__ import annotations

import os
from pathlib import Path

import pytest

from d2filter.errors import DependencyError, InputError, UsageError
from d2filter.formats.paths import Folder, absolute


@pytest.fixture(params=["local", "file url", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return {
        "local": Folder(str(tmp_path / "run")),
        "file url": Folder(f"file://{tmp_path}/run"),
        "memory": Folder(f"memory://{tmp_path.name}/run"),
    }[request.param]


def test_a_published_file_is_whole(folder: Folder) -> None:
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


def test_missing_files_and_folders(folder: Folder) -> None:
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


def test_unknown_protocol() -> None:
    with pytest.raises(UsageError, match="no usable location"):
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
