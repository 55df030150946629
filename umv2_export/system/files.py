"""Files by names that are not trusted, and their hashes."""

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from umv2_export.errors import InputRejected, shown
from umv2_export.system.links import require_own_links

__all__ = ["file_sha256", "inside"]


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, where `name` was read from a file.

    Raises:
        InputRejected: it is missing, the name leads out of the folder, or a link on the way is another user's.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name or "\\" in name:
        raise InputRejected(f"file name {name!r} leads out of its folder", where=folder)
    require_own_links(folder, name)
    try:
        is_file = (folder / name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        is_file = False
    if not is_file:
        raise InputRejected(f"file {shown(name)} is missing", where=folder)
    return folder / name


def file_sha256(file: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file's bytes; `advance` is told of every piece read."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(8 * 2**20):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()
