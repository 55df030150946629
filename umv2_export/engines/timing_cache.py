"""The timing cache of TensorRT: what a builder measured, kept for the next build.

TensorRT reads such a file unchecked, so a record beside it says what it is: NAME.json holds its sha256, and the version
and GPU that it was measured with.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import lock_descriptor

from umv2_export.errors import InputRejected, shown
from umv2_export.records.json_files import read_json
from umv2_export.system.output import write_atomically
from umv2_export.system.target import refuse_overlap

__all__ = ["TimingCache", "check_timing_cache", "open_timing_cache"]

_REMEDY = "delete both files, or name others: the build then times everything anew"


def check_timing_cache(file: Path, inputs: Sequence[Path]) -> None:
    """Refuse a cache that would be written, or its record, into or over what a build reads.

    Raises:
        InvalidRequest: it would be.
    """
    for written in (file, _record(file)):
        refuse_overlap(written, inputs, what="the timing cache, or its record,")


@dataclass(frozen=True)
class TimingCache:
    """A timing cache, and for what it is valid.

    Attributes:
        file: where it is kept.
        content: what was read; empty where there is no file yet.
        tensorrt_version, compute_capability: of the builder and the GPU.
    """

    file: Path
    content: bytes
    tensorrt_version: str
    compute_capability: str

    def save(self, content: bytes) -> None:
        """Replace the file and its record, if the content is new."""
        if content == self.content:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.file.parent):
            write_atomically(self.file, content)
            write_atomically(_record(self.file), (json.dumps(self.record(content), indent=2) + "\n").encode())

    def record(self, content: bytes) -> dict[str, str]:
        """What is written beside a cache of this content."""
        return {
            "sha256": hashlib.sha256(content).hexdigest(),
            "tensorrt_version": self.tensorrt_version,
            "compute_capability": self.compute_capability,
        }


def open_timing_cache(
    file: Path, *, tensorrt_version: str, compute_capability: str, required: bool = False
) -> TimingCache:
    """Read a timing cache; a file that does not exist is an empty one.

    Args:
        file: the cache.
        tensorrt_version: of the builder that will use it.
        compute_capability: of the GPU that it will build on.
        required: the file must exist.

    Raises:
        InputRejected: it is missing though required, has no record or differs from it, or was measured elsewhere.
    """
    if not file.exists():
        if os.path.lexists(_record(file)):
            # It may be any file of such a name, and would be written over.
            raise InputRejected(
                "a file lies where the record of a new timing cache would", where=_record(file), fix=_REMEDY
            )
        if required:
            raise InputRejected(
                "the timing cache is missing",
                where=file,
                why="--require-timing-cache lets a build time nothing itself",
                fix="make it by a build with --timing-cache alone",
            )
        return TimingCache(file, b"", tensorrt_version, compute_capability)
    if not file.is_file():
        raise InputRejected("the timing cache is not a file", where=file)
    if not _record(file).is_file():
        raise InputRejected("the timing cache has no record: its content is unknown", where=_record(file), fix=_REMEDY)
    with _locked(file.parent):
        cache = TimingCache(file, file.read_bytes(), tensorrt_version, compute_capability)
        record = read_json(_record(file))
    for name, ours in cache.record(cache.content).items():
        if record.get(name) != ours:
            raise InputRejected(
                f"the timing cache has {name} {ours}, its record says {shown(record.get(name))}"
                if name == "sha256"
                else f"the timing cache is for {name} {shown(record.get(name))}, this build has {ours}",
                where=file,
                fix=_REMEDY,
            )
    return cache


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other builds out of the caches of a folder: a file and its record change together.

    The folder itself is locked. A `FileLock` leaves a file beside the cache, and refuses (PermissionError) a cache in a
    folder that cannot be written, which --require-timing-cache only reads.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock_descriptor(lock)
        yield
    finally:
        os.close(lock)


def _record(file: Path) -> Path:
    return file.with_name(file.name + ".json")
