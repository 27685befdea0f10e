"""How logs represent arguments and figures."""

from __future__ import annotations

from pathlib import Path

from d2filter.formats import logs, webdataset
from d2filter.formats.paths import FileInfo, Folder


def test_logs_contain_addresses_and_lists_of_them_but_no_large_values() -> None:
    shards = [
        webdataset.Shard(f"/x/{i}.tar", FileInfo(f"{i}.tar", 1, ""), str(i)) for i in range(3)
    ]
    assert logs.plain({"out": Folder("/o"), "shards": shards, "k": 5, "rows": object()}) == {
        "out": "/o",
        "shards": ["/x/0.tar", "/x/1.tar", "/x/2.tar"],
        "k": 5,
    }
    (many,) = logs.plain({"names": [f"n{i}" for i in range(1000)]}).values()
    assert many[0] == "n0"
    assert many[-1].startswith("and ")
    assert len(many) < 100
    assert logs.plain({"mixed": [object(), 1]}) == {}


SECRETS = "https://me:s3cret@host/a/0.tar?X-Amz-Signature=s3cret&file=s3cret"


def test_lines_of_a_log_are_lines_for_every_reader_and_a_terminal_obeys_nothing(
    tmp_path: Path,
) -> None:
    folder = Folder(str(tmp_path))
    hostile = "a\u2028b\u2029c\x85d\x0be\x1b]0;title\x07f\ng\u202eh\udc80"
    log = logs.TaskLog(folder, "logs/embed/0.jsonl")
    for n in range(3):
        log.line("read", key=hostile, n=n)
    logs.append(folder, logs.DRIVER, "task failed", error=hostile)
    logs.append_all(folder, logs.DRIVER, "task failed", [{"error": hostile}] * 2)
    for name, key in (("logs/embed/0.jsonl", "key"), (logs.DRIVER, "error")):
        raw = (tmp_path / name).read_bytes()
        assert len(raw.decode().splitlines()) == raw.count(b"\n") == 3
        assert not {c for c in raw.decode() if not c.isprintable()} - {"\n"}
        assert [line[key] for line in logs.read(folder, name)] == [hostile] * 3


def test_lines_of_an_older_log_that_holds_other_separators_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"error": "a\u2028b\x85c"}\n{"cut', "utf-8")
    assert logs.read(Folder(str(tmp_path)), "a.jsonl") == [{"error": "a\u2028b\x85c"}]


def test_passwords_of_urls_are_in_no_log(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    shard = webdataset.Shard(SECRETS, FileInfo("0.tar", 1, ""), "0")
    told = logs.plain(
        {"shard": shard, "shards": [shard] * 9, "out": Folder(SECRETS), "url": SECRETS}
    )
    logs.append(folder, "a.jsonl", "started", arguments=told, error=f"no file ('{SECRETS}')")
    text = (tmp_path / "a.jsonl").read_text()
    assert "s3cret" not in text
    assert "https://host/a/0.tar" in text
    assert logs.read(folder, "a.jsonl")[0]["error"] == "no file ('https://host/a/0.tar')"
