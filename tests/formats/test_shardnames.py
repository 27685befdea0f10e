"""Shards of a run, named as training programs name them."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.errors import InputError
from d2filter.formats import shardnames
from d2filter.formats.shardnames import ShardNames

RUN = ["s3://pool/a/00000.tar", "s3://pool/b/00000.tar", "data/00001.tar", "/d/x/00002", "odd"]


@pytest.mark.parametrize(
    ("url", "number"),
    [
        ("s3://pool/a/00000.tar", 0),
        ("/mnt/pool/b/00000.tar", 1),
        ("file:///mnt/b/00000.tar", 1),
        ("./b/00000.tar", 1),
        ("b//x/../00000.tar", 1),
        ("simplecache::s3://pool/b/00000.tar", 1),
        ("pipe:aws s3 cp 's3://pool/b/00000.tar' -", 1),
        ("pipe:curl -s -L https://host/b/00000.tar?token=5a || true", 1),
        ("pipe:cat 'no end", -1),
        ("pipe:", -1),
        ("https://host/b/00000.tar?X-Amz-Signature=b/00001.tar#x", 1),
        ("https://host/get?token=1&file=pool%2Fb%2F00000.tar&x=1", 1),
        ("/elsewhere/00001.tar", 2),
        ("00001.TAR", 2),
        ("00002.tar", 3),
        ("/odd.tar", 4),
        ("00003.tar", -1),
        ("00001.tar.gz", -1),
        ("1.tar", -1),
        ("", -1),
        ("/", -1),
        ("a\udce9.tar", -1),
    ],
)
def test_a_shard_is_found_wherever_it_lies(url: str, number: int) -> None:
    assert ShardNames(RUN).find(url) == number


@pytest.mark.parametrize("url", ["00000.tar", "/c/00000.tar", "pipe:cat 00000.tar"])
def test_a_name_that_may_be_several_is_an_error(url: str) -> None:
    with pytest.raises(
        InputError, match=r"may be the shard s3://pool/a/00000\.tar or s3://pool/b/0"
    ):
        ShardNames(RUN).find(url)


def test_messages_tell_no_secret() -> None:
    with pytest.raises(InputError) as caught:
        ShardNames(RUN).find("pipe:curl -H 'X: secret' https://me:secret@h/00000.tar?sig=secret")
    assert "secret" not in str(caught.value)
    assert "https://h/00000.tar" in str(caught.value)


PARTS = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)


@given(st.lists(PATHS, unique=True, max_size=6), PATHS)
def test_the_longest_common_end_wins(paths: list[str], wanted: str) -> None:
    names = [f"s3://pool/{path}.tar" for path in paths]
    pairs = [(path.split("/")[::-1], wanted.split("/")[::-1]) for path in paths]
    common = [max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n]) for a, b in pairs]
    best = [n for n, c in enumerate(common) if c == max(common)] if max(common, default=0) else []
    if len(best) > 1:
        with pytest.raises(InputError):
            ShardNames(names).find(f"{wanted}.tar")
    else:
        assert ShardNames(names).find(f"{wanted}.tar") == (best[0] if best else -1)
    for number, name in enumerate(names):
        assert ShardNames(names).find(name) == number  # its own name is always its own


def test_the_example_in_the_docstring_works() -> None:
    result = doctest.testmod(shardnames)
    assert result.failed == 0
    assert result.attempted == 2
