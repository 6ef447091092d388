"""Files that survive a crash: written whole or not at all."""

import os
import pathlib


def fsync(path: pathlib.Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Replaces a file so that a crash at any moment leaves its old or its new content, whole.

    Raises:
      OSError: if it cannot be written; what was there stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        fsync(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)
