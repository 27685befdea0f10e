"""Files on web servers that send all facts about a file, and on servers that send none."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.web_server import WebServer

from d2filter.errors import DependencyError, InputError, StorageError, UsageError
from d2filter.formats import content_hash, remote, retry, shardlist, webdataset
from d2filter.formats.paths import Folder, place_of

SIGNED = "X-Amz-Signature=5ec%2Bret%3D&X-Amz-Date=2026%2F11"
# what servers do not tell or do
SERVERS: dict[str, dict[str, Any]] = {
    "all": {},
    "no HEAD": {"head": False},
    "no sizes": {"lengths": False},
    "no ranges": {"ranges": False},
    "no sizes and ranges": {"lengths": False, "ranges": False},
    "no etags": {"etags": False},
    "no etags and times": {"etags": False, "times": False},
    "nothing": {"head": False, "lengths": False, "ranges": False, "etags": False, "times": False},
    "signed": {"query": SIGNED, "head": False, "index": 403},
    "with a login": {"login": "me:pass%20word"},
}


@pytest.fixture(params=[200, 403, 404], ids=["index", "index forbidden", "no index"])
def index(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ranges so small that files have several, and no waits."""
    monkeypatch.setattr(remote, "RANGE", 40_000)
    monkeypatch.setattr(remote, "BUFFER", 10_000)
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    return


def content(size: int = 150_000, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("size", [0, 1, 150_000])
def test_a_named_file_is_read_completely_from_any_kind_of_server(
    kind: str, size: int, index: int
) -> None:
    options = {"index": index, **SERVERS[kind]}
    with serving({"a/0.tar": content(size)}, **options) as web:
        folder, name = place_of(web.url("a/0.tar"))
        info = folder.info(name)
        assert info is not None
        assert (info.name, info.size) == ("0.tar", size)
        assert info.version
        for known in (None, info):
            with folder.fetched(name, known) as stream:
                assert stream.read() == content(size)
            with folder.reading(name, known) as stream:
                assert stream.seek(size // 2) == size // 2
                assert stream.read() == content(size)[size // 2 :]
        assert folder.exists(name)
        missing = name.replace("0.tar", "1.tar")
        assert folder.info(missing) is None
        assert not folder.exists(missing)
        with pytest.raises(InputError, match=r"1\.tar does not exist"), folder.fetched(missing):
            pass


def serving(files: dict[str, bytes], **options: Any) -> WebServer:
    return _Login(files, **options)


class _Login(WebServer):
    """Whose URLs spell the password as URLs must."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._spelled, self.login = self.login, self.login.replace("%20", " ")

    def url(self, path: str = "") -> str:
        plain = super().url(path)
        return plain.replace(self.login, self._spelled) if self.login else plain


@pytest.mark.parametrize("kind", [kind for kind in SERVERS if kind != "signed"])
def test_a_folder_with_an_index_is_listed_with_sizes_and_versions(kind: str) -> None:
    files = {"a/0.tar": content(1000), "a/b c.tar": b"", "a/deep/x.tar": b"x", "a/note.txt": b"n"}
    with serving({**files, "0.tar": b"above"}, **SERVERS[kind]) as web:
        for url in (web.url("a"), web.url("a/")):
            folder = Folder(url)
            found = folder.files(".tar")
            assert [(i.name, i.size) for i in found] == [("0.tar", 1000), ("b%20c.tar", 0)]
            assert all(info.version for info in found)
            assert folder.names() == ["0.tar", "b%20c.tar", "note.txt"]
            assert folder.sub("deep").names() == ["x.tar"]
            assert [folder.info(info.name) for info in found] == found
            assert folder.info("deep") is None
            with folder.reading("b%20c.tar", found[1]) as stream:
                assert stream.read() == b""


def test_the_query_of_a_folder_goes_behind_the_names_in_it() -> None:
    with serving({"a/0.json": b"[1]"}, query=SIGNED) as web:
        folder = Folder(web.url("a"))
        assert folder.names() == ["0.json"]
        assert folder.read_json("0.json") == [1]
        assert folder.where("0.json") == f"http://{web.host}/a/0.json"


def test_a_signature_is_sent_unchanged() -> None:
    with serving({"a ü.bin": b"x"}, query=SIGNED) as web:
        folder, name = place_of(web.url("a%20%C3%BC.bin"))
        assert folder.info(name) is not None
        assert {path for _, path, _ in web.requests} == {f"/a%20%C3%BC.bin?{SIGNED}"}


@pytest.mark.parametrize("kind", SERVERS)
def test_a_file_replaced_by_one_of_its_size_has_another_version(kind: str) -> None:
    with serving({"0.npz": content(seed=1)}, **SERVERS[kind]) as web:
        folder, name = place_of(web.url("0.npz"))
        before = folder.info(name)
        assert folder.info(name) == before
        web.files["0.npz"] = content(seed=2)
        web.changed += 1  # second: as fine as this header is
        after = folder.info(name)
        assert before is not None
        assert after is not None
        assert before.size == after.size
        assert before.version != after.version


def test_a_copy_with_another_time_has_the_same_content() -> None:
    with serving({"0.parquet": b"rows"}, etags=False) as web:
        folder = Folder(web.url())
        before, sum_before = folder.info("0.parquet"), content_hash.of(folder, "0.parquet")
        web.changed += 1
        assert folder.info("0.parquet") != before
        assert content_hash.of(folder, "0.parquet") == sum_before


@pytest.mark.parametrize("kind", ["all", "no etags and times"])
def test_a_file_that_changed_after_it_was_listed_is_refused(kind: str) -> None:
    with serving({"0.tar": content()}, **SERVERS[kind]) as web:
        folder = Folder(web.url())
        (info,) = folder.files()
        web.files["0.tar"] = content(100)
        refused = r"0\.tar was changed while it was read"
        with pytest.raises(StorageError, match=refused), folder.fetched("0.tar", info):
            pass
        with pytest.raises(StorageError, match=refused), folder.reading("0.tar", info) as stream:
            stream.read()


def test_a_server_without_ranges_sends_a_file_once_or_twice() -> None:
    with serving({"0.tar": content()}, ranges=False) as web:
        folder = Folder(web.url())
        (info,) = folder.files()
        for stream_of in (folder.fetched, folder.reading):
            web.sent = 0
            with stream_of("0.tar", info) as stream:
                for at in range(140_000, 0, -10_000):
                    stream.seek(at)
                    assert stream.read(7) == content()[at : at + 7]
            # an answer that is let go has some of it on its way
            assert web.sent <= 2 * len(content())


@pytest.mark.parametrize("kind", SERVERS)
def test_broken_and_failed_answers_are_requested_again(kind: str) -> None:
    with serving({"0.tar": content()}, **SERVERS[kind]) as web:
        folder, name = place_of(web.url("0.tar"))
        info = folder.info(name)
        web.cut, web.fails = 1000, [503, 500, 429]
        with folder.fetched(name, info) as stream:
            assert stream.read() == content()
        assert web.cut == 0
        web.fails = [500] * 4
        assert folder.info(name) == info


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (403, "permission denied: the server answers 403 Forbidden"),
        (401, "permission denied: the server answers 401"),
        (400, "the server answers 400 Bad Request; check the URL"),
    ],
)
def test_a_refusal_is_not_retried(status: int, told: str) -> None:
    with serving({"0.tar": b"x"}, fails=[status] * 99) as web:
        for look in (lambda f: f.info("0.tar"), lambda f: f.names(), lambda f: f.exists("0.tar")):
            web.requests.clear()
            with pytest.raises(StorageError, match=told):
                look(Folder(web.url()))
            assert len(web.requests) <= 2


def test_a_server_that_stays_broken_is_no_missing_file() -> None:
    answers = r"in 6 tries .* the server answers 500"
    with (
        serving({"0.tar": b"x"}, fails=[500] * 99) as web,
        pytest.raises(StorageError, match=answers),
    ):
        Folder(web.url()).info("0.tar")
    with pytest.raises(StorageError, match="could not be looked up in 6 tries"):
        Folder(f"http://{web.host}").exists("0.tar")


def test_content_with_a_content_encoding_is_decoded() -> None:
    packed = gzip.compress(content(), mtime=0)
    with serving({"0.tar": packed}, encoding="gzip") as web:
        folder = Folder(web.url())
        info = folder.info("0.tar")
        assert info is not None
        assert info.size == len(content())
        with folder.fetched("0.tar", info) as stream:
            assert stream.read() == content()


def test_a_web_server_is_not_written_to() -> None:
    with serving({"a.json": b"1"}) as web:
        folder = Folder(web.url())
        for write in (
            lambda: folder.publish_json("a.json", 2),
            lambda: folder.append("b.jsonl", "x\n"),
            lambda: folder.remove("a.json"),
        ):
            with pytest.raises(UsageError, match="web servers are only read"):
                write()


def test_without_aiohttp_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from d2filter.formats.paths import Folder\n"
        "from d2filter.errors import DependencyError\n"
        "try: Folder('https://host/a').exists()\n"
        "except DependencyError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'd2filter[http]'" in done.stdout, done.stderr
    assert DependencyError.exit_code == 1


def shards_of(*patterns: str) -> list[tuple[str, int]]:
    return [(shard.name, shard.info.size) for shard in webdataset.list_shards(patterns)]


FILES = {f"p/{n}.tar": content(10 * n) for n in range(4)}


@pytest.mark.parametrize("kind", SERVERS)
def test_named_shards_need_no_listing(kind: str, index: int) -> None:
    with serving(dict(FILES), **{**SERVERS[kind], "index": index}) as web:
        expected = [(str(n), 10 * n) for n in range(4)]
        assert shards_of(*(web.url(name) for name in FILES)) == expected
        assert shards_of(web.url("p/{0..3}.tar")) == expected
        # a signature may hold what are wildcards elsewhere, and slashes
        with pytest.raises(InputError, match=r"/p/4\.tar does not exist"):
            webdataset.list_shards([web.url("p/{0..9}.tar")])
        assert not any(path.partition("?")[0].endswith("/") for _, path, _ in web.requests)


@pytest.mark.parametrize("kind", [kind for kind in SERVERS if kind != "signed"])
def test_a_folder_of_shards_and_its_wildcards_need_an_index(kind: str, index: int) -> None:
    files = {**FILES, "p/note.txt": b"x", "p/deep/5.tar": b"x"}
    with serving(files, **{**SERVERS[kind], "index": index}) as web:
        patterns = [web.url("p"), web.url("p/"), web.url("p/*.tar"), web.url("p/[0-3].tar")]
        for pattern in patterns:
            if index == 200:
                assert shards_of(pattern) == [(str(n), 10 * n) for n in range(4)]
                continue
            with pytest.raises((InputError, StorageError, UsageError)) as caught:
                webdataset.list_shards([pattern])
            assert len(str(caught.value).splitlines()) == 1
            if index == 403:
                assert "the server answers 403 Forbidden" in str(caught.value)
        if index == 200:
            found = webdataset.find_shards([web.url("p")])
            assert found.left_out == {".txt": 1, "folders": 1}


def test_shards_named_by_a_query_and_by_a_signature() -> None:
    query = "token=a/b*[c]&n=1"
    with serving(dict(FILES), query=query) as web:
        (shard,) = webdataset.list_shards([web.url("p/1.tar")])
        assert (shard.name, shard.address) == ("1", f"http://{web.host}/p/1.tar")
        assert shard.place[0] == Folder(f"http://{web.host}/p")
        assert webdataset.shard_at(shard.url).info == shard.info
    with serving({"get": b"x"}) as web:
        names = [web.url(f"get?file={name}") for name in ("a/0.tar", "b/0.tar", "b/1.tar")]
        got = webdataset.list_shards(names)
        assert [shard.address for shard in got] == names
        assert len({shard.name for shard in got}) == 3
        assert got[2].name == "1"
        with pytest.raises(
            UsageError, match=r"two shards have the URL .*/get and differ only in login or query"
        ):
            webdataset.list_shards([web.url("get?id=1"), web.url("get?id=2")])


def test_a_shard_with_a_new_signature_is_the_same_shard() -> None:
    found = []
    for signature in ("sig=1", "sig=2"):
        with serving(dict(FILES), query=signature) as web:
            urls = [web.url("p/1.tar"), web.url("p/1.tar").replace("/p/", "/p//")]
            names = shardlist.unique_names([url.replace(web.host, "host") for url in urls])
            found.append((names, webdataset.shard_at(urls[0]).info))
    assert found[0] == found[1]


def test_many_named_shards_are_looked_up_at_once_and_a_missing_first_one_alone() -> None:
    with serving({f"{n:05d}.tar": b"x" * 9 for n in range(200)}) as web:
        assert len(shards_of(web.url("{00000..00199}.tar"))) == 200
        assert len(web.requests) == 200
        web.requests.clear()
        with pytest.raises(InputError, match="does not exist"):
            webdataset.list_shards([web.url("a/{00000..30000000}.tar")])
        assert len({path for _, path, _ in web.requests}) == 1
