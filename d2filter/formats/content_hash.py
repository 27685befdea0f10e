"""Hashes the content of a metadata file, so that a copied or touched file counts as unchanged.

For an npz, the CRC-32 of each array is in the zip directory, and only that is hashed. Parquet files
are hashed whole, because the footer is the same for rows in another order, and they are small.

See docs/files.md#records-and-fingerprints.
"""

from __future__ import annotations

import hashlib
import zipfile

from d2filter.errors import InputError
from d2filter.formats.paths import Folder, checksum
from d2filter.formats.tables import first_line


def of(folder: Folder, name: str) -> str:
    """32 hex digits for a .npz or .parquet file. Raises InputError for a broken npz."""
    if not name.endswith(".npz"):
        return str(checksum(folder, name)[1])
    with folder.reading(name) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                members = sorted((i.filename, i.file_size, i.CRC) for i in archive.infolist())
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{folder.where(name)} is not a readable npz file, fetch it again: "
                f"{first_line(error)}"
            ) from error
    return hashlib.blake2b(repr(members).encode(), digest_size=16).hexdigest()
