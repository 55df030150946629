"""What may be written: an output is compared with all that a command reads, by device and inode, before work begins."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from umv2_export.errors import EnvironmentUnfit, InvalidRequest
from umv2_export.system.temporary import is_temporary

__all__ = ["check_file_target", "check_path", "check_target", "refuse_overlap"]

# What is written into a temporary sibling has a longer path than the target itself: .umv2-partial-12345678/new/...
LONGEST_PATH = 4095
ROOM_FOR_NAMES = 160

# Folders of a checkpoint lie one in another at most so deep: the weights of a rank, or of a cache that is linked to.
INPUT_DEPTH = 3

_MOST_LINKS = 40

Identity = tuple[int, int]


def check_path(path: Path) -> Path:
    """A path as the user typed it, where every library that is handed it can open it; returns it resolved.

    Raises:
        InvalidRequest: it holds NUL, is not UTF-8, is too long, or its links lead in a circle.
    """
    if "\0" in str(path):
        raise InvalidRequest("the path holds a NUL character", where=path, why="no file can have such a name")
    resolved = Path(os.path.realpath(path))
    for text in (str(path), str(resolved)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "the path is not UTF-8",
                where=text,
                why="ONNX Runtime and safetensors take names of files as UTF-8, and would not find this one",
                fix="rename the folder, or reach it through a folder of another name",
            ) from error
    try:
        os.stat(resolved)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InvalidRequest("the path leads in a circle of symbolic links", where=path) from error
        if error.errno == errno.ENAMETOOLONG:
            raise InvalidRequest("the path, or a name in it, is too long", where=path, why=str(error)) from error
    return resolved


def check_target(target: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse a target folder that holds something, or whose replacement would destroy more than an old result.

    Args:
        target: the folder to be written.
        force: replace what is there.
        inputs: folders and files that the command reads.

    Raises:
        InvalidRequest: the target may not be written.
        EnvironmentUnfit: this user cannot write it.
    """
    resolved = check_path(target)
    if max(len(os.fsencode(resolved)), len(os.fsencode(resolved.parent))) > LONGEST_PATH - ROOM_FOR_NAMES:
        raise InvalidRequest("the path is too long to write files in it", where=resolved, fix="name a shorter one")
    if _identity(resolved) in {*_trail(_current_folder()), _identity(Path("/"))}:
        raise InvalidRequest(
            f"the output is {resolved}, which holds the current folder",
            why="an output folder is written aside and takes its name when it is whole",
            fix="name a folder below it",
        )
    nearest = _nearest(resolved)
    if not nearest.is_dir():
        raise InvalidRequest("the output exists and is a file, or lies under one", where=nearest, fix="name a folder")
    above = set(_trail(resolved.parent))
    for source in inputs:
        if _identity(source) in above:
            raise InvalidRequest(f"the output lies in {source}, which is read", where=resolved, fix="name another")
    for path in (target, *inputs):
        _refuse_temporary(path)
    if os.path.ismount(resolved):
        raise InvalidRequest(
            "the output is a mount point, which cannot be renamed", where=resolved, fix="name a folder below it"
        )
    _require_writable(resolved, nearest)
    if not resolved.exists() or not any(resolved.iterdir()):
        return
    if not force:
        raise InvalidRequest("the output folder is not empty", where=target, fix="name another, or pass --force")
    removed = {_identity(Path(folder)) for folder, _, _ in os.walk(resolved)}
    removed |= {_identity(Path(folder, name), follow=False) for folder, _, names in os.walk(resolved) for name in names}
    for kept in (*_home(), *inputs):
        for path in _contents(kept) if kept in inputs else [kept]:
            if not removed.isdisjoint(_trail(path)):
                raise InvalidRequest(
                    f"--force would delete {path}", where=target, why="the output folder is replaced as a whole"
                )


def check_file_target(file: Path, *, force: bool, inputs: Sequence[Path], what: str) -> None:
    """Refuse to write a file over something that is read, or into a folder that is.

    Args:
        file: to be written.
        force: replace what is there.
        inputs: folders and files that the command reads.
        what: it is, for the message.

    Raises:
        InvalidRequest: it may not be written.
        EnvironmentUnfit: this user cannot write it.
    """
    refuse_overlap(file, inputs, what=what)
    resolved = Path(os.path.realpath(file))
    nearest = _nearest(resolved)
    if resolved.is_dir() or not (nearest.is_dir() or nearest == resolved):
        raise InvalidRequest(f"{what} is to be a file", where=nearest, fix="name a file in a folder")
    if resolved.exists() and not force:
        raise InvalidRequest(f"{what} exists", where=file, fix="pass --force, or another name")
    _require_writable(resolved, nearest if nearest.is_dir() else resolved.parent)


def refuse_overlap(file: Path, inputs: Sequence[Path], *, what: str) -> None:
    """Refuse to write a file over something that is read, or into a folder that is.

    Raises:
        InvalidRequest: it would be.
    """
    resolved = check_path(file)
    for source in inputs:
        for path in _contents(source):
            if _identity(path) in {*_trail(resolved.parent), _identity(resolved), _identity(file, follow=False)} - {
                None
            }:
                raise InvalidRequest(
                    f"{what} would be written into, or over, {path}, which is read", where=file, fix="name another"
                )


def _identity(path: Path, *, follow: bool = True) -> Identity | None:
    """Device and inode; None where nothing is."""
    try:
        facts = os.stat(path, follow_symlinks=follow)
    except (OSError, ValueError):
        return None
    return facts.st_dev, facts.st_ino


def _trail(path: Path) -> Iterator[Identity]:
    """Everything that must stay for a path to lead where it leads: its folders, its links and theirs, and its end."""
    folder, links = Path("/"), 0
    steps = list(reversed(path.absolute().parts[1:]))
    while steps:
        step = steps.pop()
        if step == "..":
            folder = folder.parent
            continue
        try:
            facts = os.lstat(folder / step)
        except (OSError, ValueError):
            return
        yield facts.st_dev, facts.st_ino
        if not stat.S_ISLNK(facts.st_mode):
            folder /= step
            continue
        links += 1
        if links > _MOST_LINKS:
            return
        destination = Path(os.readlink(folder / step))
        if destination.is_absolute():
            folder = Path("/")
        steps += reversed([part for part in destination.parts if part != "/"])


def _contents(source: Path, depth: int = INPUT_DEPTH) -> Iterator[Path]:
    """An input, and what lies in it, through links too."""
    yield source
    try:
        names = os.listdir(source) if depth else []
    except OSError:  # a file, or a folder that will be refused when it is read
        return
    for name in names:
        yield from _contents(source / name, depth - 1)


def _nearest(resolved: Path) -> Path:
    """The path, or the nearest above it that exists."""
    return next(path for path in (resolved, *resolved.parents) if os.path.lexists(path))


def _refuse_temporary(path: Path) -> None:
    resolved = Path(os.path.realpath(path))
    for folder in (resolved, *resolved.parents):
        if is_temporary(folder):
            raise InvalidRequest(
                f"{path} lies in a temporary folder",
                where=folder,
                why="a run made it, and it is removed when that ends; or it was killed, and the next run removes it",
                fix="move what you need of it to another folder",
            )


def _require_writable(resolved: Path, nearest: Path) -> None:
    """The folder that gets a new name must be writable, and what is replaced must be this user's to move."""
    exists = os.path.lexists(resolved)
    folder = resolved.parent if exists else nearest
    for path in (folder, *([resolved] if resolved.is_dir() else [])):
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            raise EnvironmentUnfit("the output may not be written", where=path, fix="name a folder that is yours")
    above, user = os.stat(folder), os.geteuid()
    if exists and above.st_mode & stat.S_ISVTX and user not in (0, above.st_uid, os.lstat(resolved).st_uid):
        raise EnvironmentUnfit(
            "the output may not be written", where=resolved, why="it is another user's, in a folder that all share"
        )


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:  # removed since
        return Path("/")


def _home() -> list[Path]:
    """The user's home, where there is one: a service has none."""
    try:
        return [Path.home()]
    except RuntimeError:
        return []
