"""Writing folders so that a killed run leaves the old one or nothing, and reading names that are not trusted."""

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch

from umv2_export.errors import EnvironmentUnfit, InputRejected, InvalidRequest, shown
from umv2_export.links import require_own_links
from umv2_export.strict_json import parse_json
from umv2_export.temporary import OLD, temporary_sibling

__all__ = [
    "TOKENIZER_FILES",
    "HashedFile",
    "atomic_directory",
    "file_sha256",
    "inside",
    "read_json",
    "require_free_space",
    "tensor_bytes",
    "tokenizer_files",
    "write_atomically",
]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

# Far above any configuration, index or manifest: a larger file is not read into memory.
MAX_JSON_BYTES = 16 * 2**20

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object; see `parse_json` for what is refused.

    Raises:
        InputRejected: the file is missing, too large, behind another user's link, or holds none.
    """
    require_own_links(file.parent, file.name)
    if not file.is_file():
        raise InputRejected("file missing", where=file)
    with file.open("rb") as stream:
        content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise InputRejected(f"the file is larger than {MAX_JSON_BYTES} bytes", where=file)
    try:
        data = parse_json(content.decode())
    except ValueError as error:
        raise InputRejected("not a JSON file", where=file, why=str(error)) from error
    if not isinstance(data, dict):
        raise InputRejected("expected a JSON object", where=file)
    return data


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


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files of a checkpoint or bundle, where it has any.

    Raises:
        InputRejected: one is reached through another user's link.
    """
    return [inside(folder, name) for name in TOKENIZER_FILES if (folder / name).is_file()]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a CPU tensor as bytes, little-endian, without a copy when it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def file_sha256(file: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file's bytes; `advance` is told of every piece read."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(8 * 2**20):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


class HashedFile:
    """A new file that is hashed while it is written, and on disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._stream = path.open("xb", buffering=0)

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            os.fsync(self._stream.fileno())
        self._stream.close()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        self._digest.update(view)
        self.size += len(view)
        while view.nbytes:
            view = view[self._stream.write(view) :]

    def align(self, alignment: int) -> int:
        """Pad with zeros to a multiple of `alignment` bytes; returns the offset reached."""
        self.write(bytes(-self.size % alignment))
        return self.size

    @property
    def sha256(self) -> str:
        """Digest of all bytes written so far."""
        return self._digest.hexdigest()


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, in place of an older one; a link stays, and leads to it."""
    file = Path(os.path.realpath(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    with temporary_sibling(file, alone=False) as folder:
        with HashedFile(folder / "new") as out:
            out.write(content)
        (folder / "new").replace(file)


def require_free_space(target: Path, size: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        EnvironmentUnfit: fewer than `size` bytes are free where `target` will be.
    """
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise EnvironmentUnfit(
            f"the disk has {free / 1e9:.3f} GB free, the output needs {size / 1e9:.3f} GB",
            where=folder,
            fix="free some space, or choose another disk; an output that is replaced stays until the new one is whole",
        )


@contextlib.contextmanager
def atomic_directory(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary folder to write into; it takes the name `target` when the block ends without error.

    Without `replace`, a folder that holds anything by then is left alone, whenever its content came.

    Killed at any moment, the old folder or nothing stands under the name. What an earlier, killed run left is removed;
    a target that a live run writes is an error.

    Raises:
        EnvironmentUnfit: the disk is full or may not be written, or another run writes the same target.
    """
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(target, alone=True) as folder:
            # Inside the private folder, and with the mode that the user's umask gives.
            new = folder / "new"
            new.mkdir()
            yield new
            _sync_files(new)
            if replace:
                _exchange(new, target, aside=folder / OLD)
            else:
                _rename_to_empty(new, target)
            _sync_directory(target.parent)
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise EnvironmentUnfit(
                "the disk is full", where=target.parent, why=str(error), fix="nothing was written; free some space"
            ) from error
        if error.errno in _NO_ACCESS:
            raise EnvironmentUnfit("the output may not be written", where=target, why=str(error)) from error
        raise


def _rename_to_empty(new: Path, target: Path) -> None:
    try:
        new.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise InvalidRequest(
            "the output folder is not empty any more", where=target, fix="name another, or pass --force"
        ) from error


def _exchange(new: Path, target: Path, *, aside: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    if _rename_exchange(new, target):
        return
    # Not every file system can exchange: a kill between the two renames leaves nothing under the name, and the next
    # run puts the old folder back.
    target.rename(aside)
    new.rename(target)


def _rename_exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; false where the kernel or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    paths = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    if libc.renameat2(*paths, _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _sync_files(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
