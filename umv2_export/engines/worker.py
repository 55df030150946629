"""Parse, build and refit in a process of its own: python -m umv2_export.engines.worker JOB.

A library can end a process (TensorRT-RTX does where its parser meets a plugin), and must not take the command line with
it. Whatever happens to a worker, here it is an error with a name. An engine goes to an inherited descriptor, not to a
path: a worker that outlives its parent then writes to a file that nobody can see any more, and not into the output of
the next run.
"""

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umv2_export import errors
from umv2_export.engines.tasks import build, refit
from umv2_export.errors import BuildFailed, EnvironmentUnfit, Umv2Error

__all__ = ["main", "run_worker"]

TASKS = {"build": build, "refit": refit}

WORKER = (sys.executable, "-m", "umv2_export.engines.worker")

# Shown of the worker's log where it failed.
LOG_LINES = 12


def run_worker(title: str, job: Mapping[str, Any], engine: Path, folder: Path, *, where: Path) -> dict[str, Any]:
    """Do a job in another process.

    Args:
        title: of the library that does it.
        job: task, module of the library, and what the task reads.
        engine: new file that the engine is written to.
        folder: for files that the two processes exchange.
        where: what the job is about, for messages.

    Returns:
        What the task returns.

    Raises:
        BuildFailed: the library failed or crashed.
        EnvironmentUnfit: it lacks something.
        InputRejected: it refuses a file.
        OSError: a file could not be read or written.
    """
    job_file, result_file = folder / "job.json", folder / "result.json"
    with engine.open("xb") as out:
        whole = {**job, "engine": out.fileno(), "result": str(result_file)}
        job_file.write_text(json.dumps(whole), encoding="utf-8")
        process = subprocess.run(
            [*WORKER, str(job_file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[out.fileno()],
            check=False,
        )
    log = process.stdout.decode(errors="replace").strip().splitlines()[-LOG_LINES:]
    # Without a result it crashed; one that was written counts, even where the library dies as it is unloaded.
    if not result_file.is_file():
        raise BuildFailed(f"{title} {_ending(process.returncode)}", where=where, why="\n".join(log))
    result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    if "os_error" in result:
        number, text, file = result["os_error"]
        raise OSError(number, text, file or str(engine))
    if "error" in result:
        kind, facts = result["error"]
        why = "\n".join([*(facts["why"] or "").splitlines()[:LOG_LINES], *log])
        raise getattr(errors, kind)(
            f"{title}: {facts['what']}", where=facts["where"] or where, why=why, fix=facts["fix"]
        )
    return result


def _ending(returncode: int) -> str:
    """How a process ended that left no result."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    name = signal.Signals(-returncode).name
    return f"was ended by {name}" + (", which is often the lack of memory" if name == "SIGKILL" else "")


def main(job_file: Path) -> None:
    """Do a job and write down what came of it.

    Args:
        job_file: JSON: task (`build` or `refit`), module (of the library), engine (descriptor to write to), result
            (path), and what the task reads.

    The result is JSON: what the task returns; or `error`, the name of a class of `umv2_export.errors` and its
    arguments; or `os_error`, number, text and file (None: the engine), where a file could not be read or written.
    """
    job = json.loads(job_file.read_text(encoding="utf-8"))
    try:
        result = TASKS[job["task"]](importlib.import_module(job["module"]), job)
    except Umv2Error as error:
        result = _failure(error)
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            file = None if error.filename is None else str(error.filename)
            result = {"os_error": [error.errno, error.strerror, file]}
        else:
            result = _failure(EnvironmentUnfit("a library does not load", why=str(error)))
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def _failure(error: Umv2Error) -> dict[str, Any]:
    facts = {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}
    return {"error": [type(error).__name__, facts]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
