"""Run a worker and read what came of it; whatever happens to it, here it is an error with a name."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from umv2_export import errors
from umv2_export.engines.plan import Library
from umv2_export.errors import BuildFailed

__all__ = ["run_worker"]

WORKER = (sys.executable, "-m", "umv2_export.engines.worker")

# Shown of the worker's log where it failed.
LOG_LINES = 12


def run_worker(
    library: Library, job: Mapping[str, Any], engine: IO[bytes], folder: Path, *, where: Path
) -> dict[str, Any]:
    """Do a job in another process.

    Args:
        library: that does it.
        job: task, and what the task reads.
        engine: file that the engine is written to.
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
    whole = {**job, "module": library.module, "engine": engine.fileno(), "result": str(result_file)}
    job_file.write_text(json.dumps(whole), encoding="utf-8")
    process = subprocess.run(
        [*WORKER, str(job_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[engine.fileno()],
        check=False,
    )
    log = process.stdout.decode(errors="replace").strip().splitlines()[-LOG_LINES:]
    # Without a result it crashed; one that was written counts, even where the library dies as it is unloaded.
    if not result_file.is_file():
        raise BuildFailed(f"{library.title} {_ending(process.returncode)}", where=where, why="\n".join(log))
    result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    if "os_error" in result:
        number, text, file = result["os_error"]
        raise OSError(number, text, file or engine.name)
    if "error" in result:
        kind, facts = result["error"]
        why = "\n".join([*(facts["why"] or "").splitlines()[:LOG_LINES], *log])
        raise getattr(errors, kind)(
            f"{library.title}: {facts['what']}", where=facts["where"] or where, why=why, fix=facts["fix"]
        )
    return result


def _ending(returncode: int) -> str:
    """How a process ended that left no result."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    name = signal.Signals(-returncode).name
    return f"was ended by {name}" + (", which is often the lack of memory" if name == "SIGKILL" else "")
