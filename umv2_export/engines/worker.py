"""Parse, build and refit in a process of its own: python -m umv2_export.engines.worker JOB.

A library can end a process (TensorRT-RTX does where its parser meets a plugin), and must not take the command line with
it. An engine goes to an inherited descriptor, not to a path: a worker that outlives its parent then writes to a file
that nobody can see any more, and not into the output of the next run.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from umv2_export.engines.worker_build import build
from umv2_export.engines.worker_refit import refit
from umv2_export.errors import EnvironmentUnfit, Umv2Error

__all__ = ["main"]

TASKS = {"build": build, "refit": refit}


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
