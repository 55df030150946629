"""How the samples run the command line."""

import subprocess
import sys
from pathlib import Path

__all__ = ["ROOT", "umv2_export"]

ROOT = Path(__file__).parents[1]


def umv2_export(*arguments: object) -> str:
    """Run a command, show it as one would type it, and return what it prints; a sample ends where a command fails."""
    print("\n$ umv2-export", *(str(argument).replace(f"{ROOT}/", "") for argument in arguments), flush=True)
    program = Path(sys.executable).with_name("umv2-export")
    done = subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.replace(f"{ROOT}/", "")
