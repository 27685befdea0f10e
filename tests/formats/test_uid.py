"""uids as text and as two 64-bit numbers; uids from content."""

from __future__ import annotations

import re
import uuid

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.formats import uid

GOOD = st.integers(0, 2**128 - 1).map(lambda n: f"{n:032x}")
SPELLED = st.one_of(
    GOOD,
    GOOD.map(str.upper),
    GOOD.map(lambda s: str(uuid.UUID(s))),
    GOOD.map(lambda s: str(uuid.UUID(s)).upper()),
    GOOD.map(lambda s: s[:16].upper() + s[16:]),
)
ODD = st.one_of(
    st.none(),
    st.text(max_size=40),
    st.text("0123456789abcdefABCDEF-", min_size=36, max_size=36),
    GOOD.map(lambda s: str(uuid.UUID(s))).map(lambda s: s[:8] + s[9:12] + "-" + s[12:]),
    GOOD.map(lambda s: f"{{{uuid.UUID(s)}}}"),
    GOOD.map(lambda s: f"{s[:16]}-{s[16:]}---"),
    GOOD.map(lambda s: s[:-1]),
    GOOD.map(lambda s: s + "0"),
    GOOD.map(lambda s: s[:-1] + "g"),
    GOOD.map(lambda s: s[:-2] + "é"),
)


@given(
    st.lists(st.one_of(SPELLED, ODD), max_size=30),
    st.sampled_from(["string", "large_string", "dictionary", "binary", "chunks"]),
)
def test_parse_takes_exactly_the_uids(texts: list[str | None], kind: str) -> None:
    plain = pa.array(texts, pa.string())
    column = {
        "string": lambda: plain,
        "large_string": lambda: plain.cast(pa.large_string()),
        "dictionary": lambda: plain.dictionary_encode(),
        "binary": lambda: plain.cast(pa.binary()),
        "chunks": lambda: pa.chunked_array([plain[:3], plain[3:]]),
    }[kind]()
    hi, lo, valid = uid.parse(column)
    assert valid.tolist() == [uid.normalized(t) is not None for t in texts]
    for i, text in enumerate(texts):
        expected = uuid.UUID(text).int if valid[i] and text else 0
        assert int(hi[i]) * 2**64 + int(lo[i]) == expected
    known = [uid.normalized(t) for t in texts if uid.normalized(t)]
    assert uid.to_hex(hi[valid], lo[valid]) == known


@given(st.one_of(SPELLED, ODD))
def test_all_spellings_of_a_uid_give_one_number(text: str | None) -> None:
    """The standard library's reading of UUIDs, and nothing that could be two."""
    found = uid.normalized(text)
    usual = isinstance(text, str) and (
        re.fullmatch("[0-9a-fA-F]{32}", text)
        or re.fullmatch("-".join(f"[0-9a-fA-F]{{{n}}}" for n in (8, 4, 4, 4, 12)), text)
    )
    assert found == (uuid.UUID(text).hex if usual else None)
    assert found is None or uid.is_uid(found)
    assert uid.normalized(found) == found
    assert uid.normalized(7) is None


def test_a_sliced_column_is_read_from_its_own_offset() -> None:
    texts = [f"{n:032x}" for n in range(10)]
    _, lo, _ = uid.parse(pa.array(["short", *texts])[4:])
    assert lo.tolist() == list(range(3, 10))


def test_numbers_are_no_uids() -> None:
    with pytest.raises(pa.ArrowInvalid):
        uid.parse(pa.array([1, 2]))


def test_content_ids_know_where_the_image_ends() -> None:
    assert uid.content_uid(b"ab", "c") != uid.content_uid(b"a", "bc")
    assert uid.is_uid(uid.content_uid(b"", ""))
    assert uid.content_uid(b"x", "\ud800") != uid.content_uid(b"x", "")


def test_to_hex_of_no_uids_is_empty() -> None:
    assert uid.to_hex(np.empty(0, np.uint64), np.empty(0, np.uint64)) == []
