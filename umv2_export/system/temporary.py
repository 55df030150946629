"""Temporary folders beside an output: told from everybody else's by a marker inside and its lock, never by a name."""

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from umv2_export.errors import EnvironmentUnfit

__all__ = ["is_temporary", "temporary_sibling"]

PREFIX = ".umv2-partial-"
MARKER = "umv2-export-temporary.json"
FORMAT = "umv2-temporary"

# A folder that was moved aside, and may have to come back.
OLD = "old"

# Says that a run found no other of its target, so that two that start at once do not both give way.
_CLAIM = "claimed"
_CLAIM_SECONDS = 5.0

_MAX_MARKER_BYTES = 4096


@contextlib.contextmanager
def temporary_sibling(target: Path, *, alone: bool) -> Iterator[Path]:
    """A new folder beside `target`, removed when the block ends, with all that is in it.

    Folders that dead runs left in the same place are removed first. One is known by its marker, which names its inode,
    its own name and its user, and by the lock on the marker, which lives as long as its run: another folder of such a
    name is nobody's business. The short name leaves `target` all 255 bytes of its own.

    Args:
        target: absolute; the folder above it exists.
        alone: refuse a target that another run is writing.

    Raises:
        EnvironmentUnfit: another run writes it.
    """
    for folder in _marked(target.parent):
        _remove_if_dead(folder)
    lock, folder = None, Path(tempfile.mkdtemp(prefix=PREFIX, dir=target.parent))
    try:
        lock = _mark(folder, target.name)
        if alone:
            _claim(folder, target)
        yield folder
    finally:
        _remove(folder, target.name)
        if lock is not None:
            os.close(lock)


def is_temporary(folder: Path) -> bool:
    """Whether this is a temporary folder of this user's runs, dead or alive."""
    return _target_name(folder) is not None


def _mark(folder: Path, name: str) -> int:
    """Put the marker into a new folder; its lock lives as long as the returned descriptor."""
    lock = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Locked before it says anything: a marker that can be read and locked is a dead run's.
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = {"format": FORMAT, "folder": folder.name, "inode": os.stat(folder).st_ino, "target": name}
        os.write(lock, json.dumps(marker).encode())
    except BaseException:
        os.close(lock)
        raise
    return lock


def _target_name(folder: Path) -> str | None:
    """The name of the target of a marked folder; None where the folder is not ours."""
    try:
        owned = os.lstat(folder)
        if not stat.S_ISDIR(owned.st_mode) or owned.st_uid != os.geteuid():
            return None
        descriptor = os.open(folder / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != owned.st_uid:
                return None
            marker = json.loads(os.read(descriptor, _MAX_MARKER_BYTES))
        finally:
            os.close(descriptor)
    except (OSError, ValueError, RecursionError):
        return None
    # A copy has another inode: it is the user's.
    known = {"format": FORMAT, "folder": folder.name, "inode": owned.st_ino}
    if not isinstance(marker, dict) or any(marker.get(field) != value for field, value in known.items()):
        return None
    name = marker.get("target")
    return name if isinstance(name, str) and name and "/" not in name and name not in (".", "..") else None


def _marked(parent: Path) -> list[Path]:
    """Our temporary folders in `parent`."""
    return [folder for folder in sorted(parent.glob(PREFIX + "*")) if is_temporary(folder)]


@contextlib.contextmanager
def _locked(folder: Path, kind: int) -> Iterator[bool]:
    """Try to lock the marker of a folder; false where a live run, or one that removes the folder, holds it.

    Not by filelock 4.2, whose locks are exclusive: of two runs that look at one dead folder at once, each would take
    the other's look for a live run. Its shared lock (ReadWriteLock) is an SQLite file, which a marker is not.
    """
    try:
        descriptor = os.open(folder / MARKER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # removed meanwhile
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _claim(folder: Path, target: Path) -> None:
    """Refuse a target that another run has claimed; of two that claim it at once, the first by name goes on."""
    end = time.monotonic() + _CLAIM_SECONDS
    while True:
        rivals = []
        for other in _marked(target.parent):
            if other != folder and _target_name(other) == target.name:
                with _locked(other, fcntl.LOCK_SH) as dead:
                    rivals += [] if dead else [other]
        if not rivals:
            (folder / _CLAIM).touch()
            return
        settled = any(other.name < folder.name or (other / _CLAIM).exists() for other in rivals)
        if settled or time.monotonic() > end:
            raise EnvironmentUnfit("another run is writing this output", where=target, fix="wait for it to end")
        time.sleep(0.01)


def _remove_if_dead(folder: Path) -> None:
    with _locked(folder, fcntl.LOCK_EX) as dead:
        name = _target_name(folder)
        if dead and name is not None:
            _remove(folder, name)


def _remove(folder: Path, name: str) -> None:
    """Remove a temporary folder, the marker last: whatever a kill leaves of it is still known to be ours."""
    target = folder.with_name(name)
    try:
        if (folder / OLD).exists() and not os.path.lexists(target):
            (folder / OLD).rename(target)
        for entry in folder.iterdir():
            if entry.name != MARKER:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()
        if [entry.name for entry in folder.iterdir()] in ([], [MARKER]):
            (folder / MARKER).unlink(missing_ok=True)
            folder.rmdir()
    except OSError:
        return  # what cannot be removed hides nothing: the outcome of the run stands
