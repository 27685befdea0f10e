"""Removes passwords and terminal control characters from text that is printed, logged or recorded.

Captions, file names and scores come from strangers, and URLs may contain passwords or signatures.
"""

from __future__ import annotations

import re

# of a chain like simplecache::https://host/file
_CHAINED = re.compile(r"::(?=[a-z][a-z0-9+.-]*(?:://|::))")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/?#]*)(.*)", re.DOTALL)
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"<>]+")
_AFTER = "'`,;:.)]}"  # what may follow a URL in a sentence
# where what stands before the @ is a container and no user
_CONTAINERS = ("abfs://", "abfss://", "wasb://", "wasbs://", "az://", "adl://")
_WEB = ("http://", "https://")
_SECRET = re.compile(
    r"sig|token|secret|passw|pwd|key|credential|auth|session|jwt|policy|hmac", re.IGNORECASE
)
# a parameter that names a file: the only kind that tells two URLs of one path apart for long
_FILE = re.compile(r"([^=]+)=((?:(?!%3f|%40)[^?@])*\.(?:tar|parquet|npz|npy|json|ya?ml))", re.I)

# controls, line and paragraph separators, marks that reorder what is shown, halves of characters
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_OBEYED = re.compile(f"[{_CONTROLS}]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""`text` on one line, with control characters, marks that reorder text and lone surrogates
    spelled out as JSON spells them, so that JSON stays JSON. lines: line breaks stay.

    >>> printable("a\x1b[2Jb\nc\u2028")
    'a\\u001b[2Jb\\u000ac\\u2028'
    """
    shown = _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return shown if lines else shown.replace("\n", "\\u000a")


def redacted(url: str) -> str:
    """A URL without user, password, fragment and query: how it is recorded and shown. Parameters of
    a query stay where they name a file. A path on a disk stays as it is.

    >>> redacted("https://me:pw@host/a/0.tar?X-Amz-Signature=5a&part=0")
    'https://host/a/0.tar'
    >>> redacted("https://host/get?file=a/0.tar&token=5a")
    'https://host/get?file=a/0.tar'
    """
    if "://" not in url:
        return url
    return "::".join(_redacted(one) for one in _CHAINED.split(url))


def scrubbed(text: str) -> str:
    """`text` with every URL in it redacted."""
    if "://" not in text:
        return text
    return _IN_TEXT.sub(_in_text, text)


def scrubbed_in(value: object) -> object:
    """What JSON can hold, with every text in it scrubbed."""
    if isinstance(value, str):
        return scrubbed(value)
    if isinstance(value, dict):
        return {scrubbed_in(name): scrubbed_in(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed_in(one) for one in value]
    return value


def _in_text(found: re.Match[str]) -> str:
    url = found[0].rstrip(_AFTER)
    return redacted(url) + found[0][len(url) :]


def _redacted(url: str) -> str:
    found = _URL.match(url)
    if found is None:
        return url
    scheme, host, rest = found.groups()
    before, at, after = host.rpartition("@")
    if at and (":" in before or scheme.lower() not in _CONTAINERS):
        host = after
    elif not at and re.search(r":\D", host.rpartition("]")[2]):
        # no port: a password with one of the characters that end a host
        host, rest = ("", rest[rest.rindex("@") + 1 :]) if "@" in rest else (host, rest)
    path, mark, query = rest.partition("?")
    if scheme.lower() in _WEB:
        path, query = path.partition("#")[0], query.partition("#")[0]
        kept = [one for one in query.split("&") if _names_a_file(one)]
        query = "&".join(kept)
        mark = "?" if kept else ""
    elif _SECRET.search(query):
        mark = query = ""
    return f"{scheme}{host}{path}{mark}{query}"


def _names_a_file(parameter: str) -> bool:
    found = _FILE.fullmatch(parameter)
    return found is not None and _SECRET.search(found[1]) is None
