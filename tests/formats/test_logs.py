"""What logs tell of arguments and figures."""

from __future__ import annotations

from d2filter.formats import logs, webdataset
from d2filter.formats.paths import FileInfo, Folder


def test_addresses_are_told_alone_and_in_lists_and_large_things_are_not() -> None:
    shards = [
        webdataset.Shard(f"/x/{i}.tar", FileInfo(f"{i}.tar", 1, ""), str(i)) for i in range(3)
    ]
    assert logs.told({"out": Folder("/o"), "shards": shards, "k": 5, "rows": object()}) == {
        "out": "/o",
        "shards": ["/x/0.tar", "/x/1.tar", "/x/2.tar"],
        "k": 5,
    }
    (many,) = logs.told({"names": [f"n{i}" for i in range(1000)]}).values()
    assert many[0] == "n0"
    assert many[-1].startswith("and ")
    assert len(many) < 100
    assert logs.told({"mixed": [object(), 1]}) == {}
