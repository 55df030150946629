"""What decode steps allocate and copy, in a process with large_allocations.c in front: BUNDLE RUNTIME BATCH LENGTH."""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

from umv2_export.bundle import Bundle
from umv2_export.runtimes import open_runtime
from umv2_export.runtimes.decoding import GrowingDecoder, KeepsCache

STEPS = 4


def main() -> None:
    """Print the counts of steps of the runtime's own decoder, and of steps that hand the cache in and out."""
    path, name, batch, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    counter = ctypes.CDLL(None)
    large = ctypes.c_size_t.in_dll(counter, "umv2_large_bytes")
    counts = [ctypes.c_long.in_dll(counter, f"umv2_{what}") for what in ("allocations", "copies")]
    bundle = Bundle(Path(path))
    config = bundle.config
    runtime = open_runtime(name, bundle)
    assert isinstance(runtime, KeepsCache)
    ids = np.ones((batch, length // 2), dtype=np.int64)
    found = []
    for decoder in (runtime.decoder(batch, length), GrowingDecoder(runtime, config, batch)):
        decoder.step(ids, np.ones_like(ids))
        decoder.step(ids[:, :1], np.ones((batch, ids.shape[1] + 1), dtype=np.int64))
        # Half of the cache is in use, and a copy of that counts too.
        large.value = batch * config.kv_heads * config.head_size * 4 * ids.shape[1]
        for count in counts:
            count.value = 0
        for i in range(STEPS):
            decoder.step(ids[:, :1], np.ones((batch, ids.shape[1] + 2 + i), dtype=np.int64))
        found.append([count.value for count in counts])
        large.value = ctypes.c_size_t(-1).value
    print(json.dumps(found))


if __name__ == "__main__":
    main()
