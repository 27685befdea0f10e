"""Removal of control characters and secrets from text for terminals and records."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2filter.errors import InputError
from d2filter.text import printable, redacted, scrubbed


@given(st.text(st.characters(codec=None)))
def test_printed_text_is_one_valid_utf_8_line_without_control_characters(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    shown.encode()
    assert not {c for c in shown if ord(c) < 32 or 127 <= ord(c) < 160} - {"\t"}
    assert printable(shown) == shown


@given(st.recursive(st.text(st.characters(codec=None)), st.lists))
def test_json_stays_the_same_json(value: object) -> None:
    for indent in (None, 2):
        text = json.dumps(value, ensure_ascii=False, indent=indent)
        assert json.loads(printable(text, lines=True)) == value


def test_printable_text_is_unchanged() -> None:
    text = "Zoë, 猫, می‌خواهم, 👩\u200d🚀, a\tb"
    assert printable(text) == text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:S@h:8/a/0.tar", "https://h:8/a/0.tar"),
        ("https://S@h/a@b.tar", "https://h/a@b.tar"),
        ("https://u:S/S@h/a.tar", "https://h/a.tar"),
        ("https://u:S?S#S@h/a.tar", "https://h/a.tar"),
        ("https://u:S@[::1]:8/a.tar?sig=S", "https://[::1]:8/a.tar"),
        ("https://h/a.tar?X-Amz-Signature=S&X-Amz-Credential=S", "https://h/a.tar"),
        ("https://h/a.tar?se=2026&sp=r&sig=S%2BS", "https://h/a.tar"),
        ("https://h/a.tar?S", "https://h/a.tar"),
        ("https://h/a.tar#S", "https://h/a.tar"),
        ("HTTPS://h/get?file=a/0.tar&code=S", "HTTPS://h/get?file=a/0.tar"),
        ("https://h/get?token=S.tar", "https://h/get"),
        ("https://h/get?url=https%3A%2F%2Fx%2Fa.tar%3Fsig=S.tar", "https://h/get"),
        ("simplecache::https://u:S@h/a?sig=S", "simplecache::https://h/a"),
        ("zip://a.tar::https://u:S@h/a.zip?token=S", "zip://a.tar::https://h/a.zip"),
        ("sftp://u:S@h/a.tar", "sftp://h/a.tar"),
        ("abfs://container@account/a.tar?sig=S", "abfs://container@account/a.tar"),
    ],
)
def test_passwords_and_signatures_are_taken_out_of_urls(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert redacted(shown) == shown
    for text in ("{}", "shard {} is gone", "('{}')", "[{}]: 403", "url='{}', {}.", '{{"a": "{}"}}'):
        told = scrubbed(text.format(url, url))
        assert told == text.format(shown, shown)
        assert str(InputError(text.format(url, url))) == told


@pytest.mark.parametrize(
    "url", ["/a/b?c=d@e", "a b.tar", "s3://pool/a?.tar", "s3://pool/a#1.tar", "gs://b/u@v.tar", ""]
)
def test_text_without_a_password_is_unchanged(url: str) -> None:
    assert redacted(url) == scrubbed(url) == url
