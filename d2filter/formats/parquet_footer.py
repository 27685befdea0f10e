"""Sizes of the column chunks of a parquet file, from its footer.

pyarrow ends the process if it is asked for a column chunk whose statistics contradict the schema,
as in a damaged file (`RowGroupMetaData.column`, pyarrow 26). The sizes are therefore read from the
footer itself: Thrift's compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), with the field
numbers of parquet.thrift. Memory and time grow with the footer only, whatever its bytes claim.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO, Any

_ROW_GROUPS, _COLUMNS, _METADATA = 4, 1, 3  # of FileMetaData, RowGroup, ColumnChunk
_PATH, _VALUES, _COMPRESSED = 3, 5, 7  # of ColumnMetaData
_BINARY, _LIST, _SET, _MAP, _STRUCT = 8, 9, 10, 11, 12
_FIXED = {3: 1, 7: 8, 13: 16}  # bytes of an int8, a double, a UUID
_DEEPEST = 12


def chunk_sizes(stream: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """(top-level column, values, compressed bytes) of each column chunk of a parquet file.

    Raises ValueError for a footer that lacks one of these, or that is damaged.
    """
    end = stream.seek(0, os.SEEK_END) - 8  # the length of the footer and b"PAR1"
    stream.seek(max(0, end))
    length = int.from_bytes(stream.read(4), "little")
    if length > end:
        raise ValueError("its footer is longer than the file")
    stream.seek(end - length)
    footer = _Reader(stream.read(length)).value(_STRUCT, 0)
    try:
        for group in footer[_ROW_GROUPS]:
            for chunk in group[_COLUMNS]:
                about = chunk[_METADATA]
                name = about[_PATH][0].decode("utf-8")
                yield name, int(about[_VALUES]), int(about[_COMPRESSED])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError("its footer lacks the sizes of columns") from error


class _Reader:
    """Reads values of the compact protocol: structs as {field number: value}."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def value(self, kind: int, depth: int) -> Any:
        """The next value. Raises ValueError for bytes that are not of this kind."""
        if depth > _DEEPEST:
            raise ValueError("its footer is nested too deeply")
        if kind == _STRUCT:
            return dict(self._fields(depth))
        if kind in (_LIST, _SET):
            head = self._take(1)[0]
            size = head >> 4 if head >> 4 < 15 else self._varint()
            return [self.value(head & 15, depth + 1) for _ in range(self._plausible(size))]
        if kind == _MAP:
            size = self._plausible(self._varint())
            kinds = self._take(1)[0] if size else 0
            for _ in range(size):  # parquet has none that is needed here
                self.value(kinds >> 4, depth + 1)
                self.value(kinds & 15, depth + 1)
            return {}
        if kind == _BINARY:
            return self._take(self._varint())
        if kind in _FIXED:
            return self._take(_FIXED[kind])
        if kind in (1, 2):  # in a list, a boolean takes a byte
            return self._take(1) == b"\1"
        if kind in (4, 5, 6):
            return self._integer()
        raise ValueError(f"its footer has a value of the unknown kind {kind}")

    def _fields(self, depth: int) -> Iterator[tuple[int, Any]]:
        number = 0
        while head := self._take(1)[0]:
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else self._integer()
            # as a field, a boolean is its kind
            yield number, kind == 1 if kind in (1, 2) else self.value(kind, depth + 1)

    def _integer(self) -> int:
        """A signed integer: zigzag-encoded, so that small negative ones are short, too."""
        zigzag = self._varint()
        return zigzag >> 1 ^ -(zigzag & 1)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its footer has a number of more than 64 bits")

    def _plausible(self, size: int) -> int:
        """The size of a list: every value takes a byte at least."""
        if size > len(self._content) - self._at:
            raise ValueError("its footer has a list that is longer than the footer")
        return size

    def _take(self, size: int) -> bytes:
        taken = self._content[self._at : self._at + size]
        if len(taken) < size:
            raise ValueError("its footer ends inside a value")
        self._at += size
        return taken
