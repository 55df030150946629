"""Peak resident memory of one decode step, in a process of its own: python -m umv2_export.bench.resident.

BUNDLE RUNTIME BATCH PAST
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from umv2_export.bundle import Bundle
from umv2_export.runtimes import StepInput, open_runtime

__all__ = ["peak_resident"]


def peak_resident(bundle: Path, runtime: str, batch: int, past: int) -> dict[str, int] | None:
    """Bytes at the peak (with mapped files), and of anonymous memory at the end; None where the process failed.

    The interpreter, torch and copies of the cache at this project's own interface are counted too: 230 MB and more.
    """
    command = [sys.executable, "-m", "umv2_export.bench.resident", str(bundle), runtime, str(batch), str(past)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return None
    sizes: dict[str, int] = json.loads(result.stdout)
    return sizes


def _measure(path: Path, runtime: str, batch: int, past: int) -> dict[str, int]:
    bundle = Bundle(path)
    config = bundle.config
    opened = open_runtime(runtime, bundle)
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((batch, config.kv_heads, past, config.head_size), dtype=np.float32)
    step = StepInput(
        rng.integers(0, config.vocab_size, (batch, 1)),
        np.ones((batch, past + 1), dtype=np.int64),
        [(cache, cache)] * config.num_layers,
    )
    opened.run(step)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status, re.MULTILINE)}
    return {"peak": sizes["VmHWM"], "anonymous": sizes["RssAnon"]}


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
