"""The one policy for links: they may lead anywhere, if who reads them made them.

Download caches are folders of links to blobs beside them, so a link is not a fault. A link that somebody else made is
one: it could lead to a file that its owner cannot read and the reader can.
"""

import os
import stat
from pathlib import Path, PurePosixPath

from umv2_export.errors import InputRejected, shown

__all__ = ["require_own_links"]

# As the kernel follows.
MOST_HOPS = 40


def require_own_links(folder: Path, name: str) -> None:
    """Refuse links of other users on the way from `folder` to the file behind `folder / name`.

    Every link on the way, and the folder that holds it, must belong to the user or to root. `folder` was named by the
    user and is not checked.

    Raises:
        InputRejected: a link is another user's, or links lead in a circle.
    """
    trusted = (os.geteuid(), 0)
    # Without links, so that the parent of a folder is where `..` leads.
    current = Path(os.path.realpath(folder))
    pending = [*PurePosixPath(name).parts]
    hops = 0
    while pending:
        part = pending.pop(0)
        if part == "..":
            current = current.parent
            continue
        candidate = current / part
        try:
            facts = candidate.lstat()
        except (OSError, ValueError):
            return  # missing, or a name that no file can have: its reader says so
        if not stat.S_ISLNK(facts.st_mode):
            current = candidate
            continue
        hops += 1
        if hops > MOST_HOPS:
            raise _circle(folder, name)
        for path, owner in ((candidate, facts.st_uid), (current, current.stat().st_uid)):
            if owner not in trusted:
                raise InputRejected(
                    f"file {shown(name)} is reached through a link of another user",
                    where=folder,
                    why=f"{path} belongs to user {owner}; such a link may lead to a file that only you can read",
                    fix="if you trust its owner, copy the folder with its files: cp -rL",
                )
        target = PurePosixPath(os.readlink(candidate))
        if target.is_absolute():
            current, target = Path("/"), target.relative_to("/")
        pending[:0] = target.parts


def _circle(folder: Path, name: str) -> InputRejected:
    return InputRejected(f"file {shown(name)} is a link that leads in a circle", where=folder)
