"""A file of torch.save, or one inside of a larger file, mapped: a zip of one pickle and an entry for each storage.

Written here rather than read by torch.load, which believes the pickle where it and the entries disagree.
"""

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from umv2_export.checkpoint.pickle_reader import Call, Global, Persistent, read_pickle
from umv2_export.errors import InputRejected, Unsupported, located, shown

__all__ = ["Archive"]

# A real state dict's pickle has 200 KB; more is an attack or another file.
MAX_PICKLE_BYTES = 64 * 2**20

# 1000 tensors with two moments each have 3000 entries.
MAX_ENTRIES = 200_000

# Keys have five, and nothing has more.
MAX_DIMENSIONS = 8

_LOCAL_HEADER = struct.Struct("<4s22xHH")

_STORAGES: Mapping[str, torch.dtype] = {
    f"torch.{name}Storage": dtype
    for name, dtype in (
        ("Float", torch.float32),
        ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
        ("Double", torch.float64),
        ("Long", torch.int64),
        ("Int", torch.int32),
        ("Short", torch.int16),
        ("Char", torch.int8),
        ("Byte", torch.uint8),
        ("Bool", torch.bool),
        ("ComplexFloat", torch.complex64),
        ("ComplexDouble", torch.complex128),
    )
}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")

# Newer dtypes have no storage of their own; theirs is bytes, and the call names the dtype.
_DTYPES: Mapping[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"),
        *("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "complex64", "complex128"),
    )
}

_TENSOR = "torch._utils._rebuild_tensor_v2"
_TENSOR_WITH_DTYPE = "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"

# Everything that a state dict of plain tensors and its optimizer need, and nothing else.
_ALLOWED = frozenset(
    {"collections.OrderedDict", _TENSOR, _TENSOR_WITH_DTYPE, _PARAMETER}
    | _STORAGES.keys()
    | _DTYPES.keys()
    | set(_UNTYPED)
)


@dataclass(frozen=True)
class _Storage:
    """Bytes of the file, and how many elements of which dtype the pickle says they are; None: bytes alone."""

    start: int
    size: int
    dtype: torch.dtype | None


class _Window(io.RawIOBase):
    """A part of a file as a file, for zipfile."""

    def __init__(self, file: Path, start: int, size: int) -> None:
        self._stream = file.open("rb")
        self._start, self._size, self._position = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        self._stream.seek(self._start + self._position)
        data = self._stream.read(size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


class Archive:
    """An archive of torch.save.

    Args:
        file: the file.
        start, size: the part of it that is the archive; all of it where they are not given.
        mapping: all bytes of the file, where they are mapped already.

    Attributes:
        content: what was saved, as `read_pickle` gives it: a tensor is a Call, for `tensor` to map.
        mapping: all bytes of the file.

    Raises:
        InputRejected: the archive is truncated, corrupt, or holds more than tensors.
    """

    def __init__(
        self, file: Path, *, start: int = 0, size: int | None = None, mapping: torch.UntypedStorage | None = None
    ) -> None:
        self.file = file
        self._start = start
        try:
            length = file.stat().st_size
            self._size = length - start if size is None else size
            if not 0 <= start <= start + self._size <= length:
                raise InputRejected(
                    "the file is truncated",
                    where=file,
                    why=f"bytes {start} to {start + self._size} are asked of {length}",
                )
            with _Window(file, start, self._size) as window, zipfile.ZipFile(window) as archive:
                self._entries = self._checked_entries(archive)
                self._root = self._find_root()
                content = self._read(archive, "data.pkl")
                if f"{self._root}byteorder" in self._entries and self._read(archive, "byteorder") != b"little":
                    raise Unsupported("the file was written on a big-endian machine", where=file)
        except OSError as error:
            raise InputRejected("the file cannot be read", where=file, why=_first_line(error)) from error
        except zipfile.BadZipFile as error:
            if "CRC" not in str(error):
                raise self._no_archive(error) from error
            raise InputRejected(
                "the file is corrupt: an entry is not what its checksum says",
                where=file,
                why=_first_line(error),
                fix="copy the file again; if it was saved under torch.serialization.set_crc32_options(False), save it "
                "with checksums",
            ) from error
        except (ValueError, NotImplementedError, EOFError, struct.error) as error:
            raise self._no_archive(error) from error
        with located(file):
            self.content = read_pickle(content, _ALLOWED)
        self.mapping = _map_file(file, length) if mapping is None else mapping

    def tensor(self, name: str, value: Any) -> torch.Tensor:
        """Map a tensor of `content`; `name` is for messages.

        Raises:
            InputRejected: the value is not a plain tensor, or says more than its storage holds.
        """
        if isinstance(value, Call) and value.function == _PARAMETER and len(value.arguments) == 3:
            value = value.arguments[0]
        if not isinstance(value, Call) or value.state is not None:
            raise self._not_plain(name, "it is not a tensor")
        arguments = value.arguments
        if value.function == _TENSOR and len(arguments) in (6, 7):
            storage, *layout, _, hooks = arguments[:6]
            dtype, metadata = None, arguments[6:]
        elif value.function == _TENSOR_WITH_DTYPE and len(arguments) in (7, 8):
            storage, *layout, _, hooks, dtype = arguments[:7]
            metadata = arguments[7:]
        else:
            raise self._not_plain(name, f"{value.function} with {len(arguments)} arguments")
        if hooks or any(metadata):
            raise self._not_plain(name, "it is negated, conjugated or has hooks")
        place = self._storage(name, storage)
        dtype = place.dtype if dtype is None else _DTYPES.get(getattr(dtype, "name", ""))
        if dtype is None or (place.dtype is not None and place.dtype != dtype):
            raise self._not_plain(name, "its dtype and that of its storage differ")
        return self._view(name, place, dtype, *layout)

    def _view(
        self, name: str, place: _Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any
    ) -> torch.Tensor:
        known = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_DIMENSIONS
        if not known or not all(type(n) is int and 0 <= n < 2**62 for n in (offset, *size, *stride)):
            raise self._not_plain(name, f"offset {shown(offset)}, size {shown(size)}, strides {shown(stride)}")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        available = place.size // dtype.itemsize
        if 0 not in size and last >= available:
            raise InputRejected(
                f"tensor {name!r} is a view of {last + 1} elements into a storage of {available}", where=self.file
            )
        elements = math.prod(size)
        if elements > available:
            raise InputRejected(
                f"tensor {name!r} has {elements} elements, its storage {available}",
                where=self.file,
                why="an expanded view claims more bytes than the file holds",
            )
        storage = self.mapping[place.start : place.start + place.size]
        return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)

    def _storage(self, name: str, value: Any) -> _Storage:
        """The bytes that ('storage', type, key, location, elements) stands for. Where they lay (a GPU) is all one."""
        identifier = value.identifier if isinstance(value, Persistent) else None
        if not isinstance(identifier, tuple) or len(identifier) != 5 or identifier[0] != "storage":
            raise self._not_plain(name, "its storage is not in this file")
        _, kind, key, location, elements = identifier
        known = isinstance(kind, Global) and (kind.name in _STORAGES or kind.name in _UNTYPED)
        if not known or not isinstance(key, str) or not isinstance(location, str) or type(elements) is not int:
            raise self._not_plain(name, "its storage is described in no known way")
        dtype = _STORAGES.get(kind.name)
        entry = self._entries.get(f"{self._root}data/{key}")
        if entry is None:
            raise InputRejected(f"the storage of tensor {name!r} is missing", where=self.file, why=f"key {shown(key)}")
        size = elements * (1 if dtype is None else dtype.itemsize)
        if size != entry.file_size:
            raise InputRejected(
                f"the storage of tensor {name!r} has {entry.file_size} bytes, its description says {shown(size)}",
                where=self.file,
            )
        return _Storage(self._data_start(entry), size, dtype)

    def _data_start(self, entry: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin: its own header tells, for its padding is not in the central directory."""
        with _Window(self.file, self._start, self._size) as window:
            window.seek(entry.header_offset)
            header = window.read(_LOCAL_HEADER.size) or b""
        if len(header) != _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            raise InputRejected(f"entry {entry.filename!r} is corrupt", where=self.file)
        _, name, extra = _LOCAL_HEADER.unpack(header)
        start: int = entry.header_offset + _LOCAL_HEADER.size + name + extra
        if start + entry.file_size > self._size:
            raise InputRejected(f"entry {entry.filename!r} is truncated", where=self.file)
        return self._start + start

    def _checked_entries(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        """Reject what cannot be mapped: compressed or encrypted entries, names that stand twice."""
        infos = archive.infolist()
        entries = {entry.filename: entry for entry in infos}
        if len(infos) > MAX_ENTRIES or len(entries) < len(infos):
            raise InputRejected(f"the archive has {len(infos)} entries of {len(entries)} names", where=self.file)
        for entry in infos:
            too_large = entry.filename.endswith("/data.pkl") and entry.file_size > MAX_PICKLE_BYTES
            packed = entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
            if packed or entry.flag_bits & 1 or too_large:
                raise InputRejected(
                    f"entry {entry.filename!r} is compressed or too large ({entry.file_size} bytes)",
                    where=self.file,
                    why="torch.save stores its entries plain",
                )
        return entries

    def _find_root(self) -> str:
        roots = [name.removesuffix("data.pkl") for name in self._entries if name.endswith("data.pkl")]
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in self._entries):
            raise InputRejected(
                "the file is a TorchScript archive: a program, not a state dict",
                where=self.file,
                fix="save the weights alone: torch.save(model.state_dict(), ...)",
            )
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise InputRejected(
                "the file is not a torch checkpoint", where=self.file, why=f"{len(roots)} entries are named data.pkl"
            )
        return roots[0]

    def _read(self, archive: zipfile.ZipFile, name: str) -> bytes:
        return archive.read(f"{self._root}{name}")

    def _no_archive(self, error: Exception) -> InputRejected:
        return InputRejected(
            "the file is truncated, or not a torch checkpoint",
            where=self.file,
            why=f"not a zip archive ({_first_line(error)})",
            fix="copy the file again; a checkpoint of torch before 1.6 must be saved again with a newer torch",
        )

    def _not_plain(self, name: str, why: str) -> InputRejected:
        return InputRejected(f"tensor {name!r} is not a plain array", where=self.file, why=why)


def _map_file(file: Path, size: int) -> torch.UntypedStorage:
    storage = torch.UntypedStorage.from_file(str(file), False, size)
    if not isinstance(storage, torch.UntypedStorage):
        raise TypeError(f"torch maps files as {type(storage).__name__}")
    return storage


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
