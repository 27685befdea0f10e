"""What a metadata file holds, told by the few bytes that sum it up (DESIGN §6, fingerprints).

An npz lists the CRC-32 of each array in its directory; a parquet file ends in a footer with the
sizes, counts and statistics of its columns. A copy has another time and the same of these.
"""

from __future__ import annotations

import hashlib
import os
import zipfile

from d2filter.errors import InputError
from d2filter.formats.paths import Folder
from d2filter.formats.tables import first_line

_TAIL = 8  # bytes: the length of a parquet footer, and the magic number


def of(folder: Folder, name: str) -> str:
    """32 hex digits for a .npz or .parquet file. Raises InputError for one that is neither."""
    digest = hashlib.blake2b(digest_size=16)
    with folder.reading(name) as stream:
        try:
            if name.endswith(".npz"):
                with zipfile.ZipFile(stream) as archive:
                    members = sorted((i.filename, i.file_size, i.CRC) for i in archive.infolist())
                digest.update(repr(members).encode())
            else:
                end = stream.seek(-_TAIL, os.SEEK_END)
                length = int.from_bytes(stream.read(4), "little")
                if length > end or stream.read(4) != b"PAR1":
                    raise ValueError("no parquet footer")
                stream.seek(end - length)
                digest.update(stream.read(length))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{folder.where(name)} cannot be read: {first_line(error)}") from error
    return digest.hexdigest()
