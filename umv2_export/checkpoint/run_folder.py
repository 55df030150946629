"""The folder of a training run: which of its steps is meant.

The authors' trainer writes stepN-unsharded/ and stepN/ (sharded), and names the last one in
latest_checkpointed_iteration.txt; OLMo's links it as latest-unsharded and latest. What is being written is stepN-tmp-*.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from umv2_export.checkpoint.config_file import CONFIG_FILE
from umv2_export.checkpoint.weight_files import has_weights, is_sharded
from umv2_export.errors import InputRejected, shown
from umv2_export.system.links import require_own_links

__all__ = ["Step", "choose_step"]

POINTER_FILE = "latest_checkpointed_iteration.txt"
NATIVE_CONFIG_FILE = "config.json"
LINKS = ("latest-unsharded", "latest")

# Numbers of steps have up to 7 digits.
_STEP = re.compile(r"step([0-9]{1,18})(-unsharded)?")
_UNFINISHED = re.compile(r"step[0-9]{1,18}(-unsharded)?-tmp[0-9-]*")


@dataclass(frozen=True)
class Step:
    """The step of a run that is read.

    Attributes:
        path: its folder.
        notes: which it is, and what else the run holds that the user should know.
        others: folders of the run that could be passed instead.
    """

    path: Path
    notes: tuple[str, ...]
    others: tuple[Path, ...]


def choose_step(run: Path) -> Step | None:
    """The newest unsharded step of a run's folder, or the newest one where all are sharded; None: no such folder.

    Numbers compare as numbers. Links are followed wherever they lead, as the file system does.

    Raises:
        InputRejected: the newest step cannot be told, or there is nothing in it.
    """
    if has_weights(run) or (run / NATIVE_CONFIG_FILE).exists():
        return None
    steps = _steps(run)
    links = [run / name for name in LINKS if (run / name).is_symlink() or (run / name).is_dir()]
    if not steps and not links and not (run / POINTER_FILE).exists() and not _unfinished(run):
        return None
    broken = [path for _, path in steps if not path.is_dir()]
    sharded = {path for _, path in steps if path.is_dir() and _is_sharded(path)}
    candidates = [(number, path) for number, path in steps if path not in sharded] or steps
    if not candidates:
        return _of_link(run, links)
    newest = max(number for number, _ in candidates)
    same = [path for number, path in candidates if number == newest]
    # An empty folder beside a whole one is not a choice; two whole ones are.
    chosen = [path for path in same if path.is_dir() and has_weights(path)] or same
    others = tuple(path for _, path in sorted(steps, reverse=True) if path not in (*chosen, *broken))
    if len(chosen) > 1:
        raise InputRejected(
            f"the newest step stands here {len(chosen)} times: {', '.join(path.name for path in chosen)}",
            where=run,
            fix=f"pass one of them: {chosen[0]}",
        )
    _require_content(chosen[0], others)
    require_own_links(run, chosen[0].name)
    notes = [f"{run} is a run; its step {chosen[0].name} is read"]
    if chosen[0].is_symlink():
        notes.append(f"{chosen[0].name} is a link to {shown(str(chosen[0].resolve()))}")
    newer = [path for number, path in steps if number > newest]
    if newer and has_weights(newer[-1]):
        notes.append(f"{newer[-1].name} is newer and sharded: pass it to read it, or to learn how it is joined")
    elif newer:
        notes.append(f"{newer[-1].name} is newer and sharded, and its weights are not here")
    notes += _disagreements(run, links, chosen[0])
    return Step(chosen[0], tuple(notes), others)


def _steps(run: Path) -> list[tuple[int, Path]]:
    """Number and path of each step, links included, in ascending order."""
    steps = []
    for path in run.iterdir():
        match = _STEP.fullmatch(path.name)
        if match and (path.is_dir() or path.is_symlink()):
            steps.append((int(match[1]), path))
    return sorted(steps)


def _is_sharded(step: Path) -> bool:
    """By what it holds, or by its name: the trainer calls whole ones stepN-unsharded."""
    return is_sharded(step) or not (step.name.endswith("-unsharded") or has_weights(step))


def _of_link(run: Path, links: list[Path]) -> Step:
    """A run whose steps were not copied along, but what the trainer called the latest."""
    for link in links:
        if link.is_dir():
            _require_content(link, ())
            return Step(link, (f"{run} is a run; its {link.name} is read",), ())
    found = [f"{link.name} is a link that leads nowhere" for link in links]
    found += [f"{POINTER_FILE} names {shown(_pointed_to(run))}"] if (run / POINTER_FILE).exists() else []
    found += _unfinished(run)
    raise InputRejected(
        "the run's folder holds no step",
        where=run,
        why=f"{'; '.join(found)}; but no folder stepN or stepN-unsharded is there",
        fix="copy a folder stepN-unsharded, and pass it or the run's folder",
    )


def _require_content(step: Path, others: tuple[Path, ...]) -> None:
    """Refuse a newest step that is not whole: an older one is not what was asked for."""
    if not step.is_dir():
        problem = "is a link that leads nowhere"
    elif not (step / CONFIG_FILE).exists():
        problem = f"has no {CONFIG_FILE}"
    elif not has_weights(step):
        problem = "has no weights"
    else:
        return
    raise InputRejected(
        f"the newest step of the run, {step.name}, is incomplete: it {problem}",
        where=step.parent,
        fix=f"copy it again, or pass an older step: {_listed(others)}" if others else "copy it again",
    )


def _listed(paths: tuple[Path, ...]) -> str:
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _disagreements(run: Path, links: list[Path], chosen: Path) -> list[str]:
    """Where the trainer's own word on what is the latest is another one."""
    notes = []
    named = _pointed_to(run)
    if named is not None and named not in (chosen.name, chosen.name.removesuffix("-unsharded")):
        here = "" if (run / named).is_dir() else ", which is not here"
        notes.append(f"{POINTER_FILE} names {shown(named)}{here}")
    for link in links:
        if not link.is_dir():
            notes.append(f"{link.name} is a link that leads nowhere")
        elif not link.is_symlink():
            notes.append(f"{link.name} is a folder of its own, whose step is not known; it is not read")
        elif not link.samefile(chosen) and link.name == LINKS[0]:
            notes.append(f"{link.name} leads to {shown(link.resolve().name)}")
    return notes + _unfinished(run)


def _unfinished(run: Path) -> list[str]:
    names = sorted(path.name for path in run.iterdir() if _UNFINISHED.fullmatch(path.name))
    return [f"{name} was never finished, and is not read" for name in names]


def _pointed_to(run: Path) -> str | None:
    """What the pointer file names: a folder, or the number of one."""
    file = run / POINTER_FILE
    require_own_links(run, POINTER_FILE)
    if not file.is_file() or file.stat().st_size > 4096:
        return None
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if not text or "/" in text or "\0" in text or len(text) > 255:
        return None
    return f"step{int(text)}" if re.fullmatch("[0-9]{1,18}", text) else text
