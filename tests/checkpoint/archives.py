"""Archives as torch.save writes them, of pickles that no pickler would write."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["call", "global_name", "integer", "pickled_dict", "storage", "tensor", "text", "write_archive"]


def write_archive(file: Path, pickle: bytes, storages: Mapping[str, bytes] | None = None) -> None:
    """A zip of this pickle and these storages, stored plain."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("model/data.pkl", pickle)
        archive.writestr("model/byteorder", "little")
        archive.writestr("model/version", "3\n")
        for key, data in (storages or {}).items():
            archive.writestr(f"model/data/{key}", data)


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def integer(value: int) -> bytes:
    """LONG1."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def global_name(name: str) -> bytes:
    """GLOBAL."""
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def call(function: str, *arguments: bytes) -> bytes:
    """REDUCE of a global."""
    return global_name(function) + b"(" + b"".join(arguments) + b"tR"


def storage(key: str = "0", elements: int = 6, kind: str = "torch.FloatStorage", location: str = "cpu") -> bytes:
    """A persistent reference to a storage."""
    return b"(" + text("storage") + global_name(kind) + text(key) + text(location) + integer(elements) + b"tQ"


def tensor(
    place: bytes | None = None, *, offset: int = 0, size: tuple[int, ...] = (2, 3), stride: tuple[int, ...] = (3, 1)
) -> bytes:
    """A call that rebuilds a tensor."""
    sizes, strides = (b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (size, stride))
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", place or storage(), integer(offset), sizes, strides, b"\x89", hooks)


def pickled_dict(items: Mapping[str, bytes]) -> bytes:
    """A pickle of a dictionary."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in items.items()) + b"u."
