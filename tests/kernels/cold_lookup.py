"""One lookup with a cold table, to be run under cachegrind: prints the rows that it hits, as JSON.

The table is memory that nothing has touched, so no line of it is in the simulated cache.
"""

import json
import mmap
import os
import sys

import numpy as np

from tests.kernels.kernel_calls import memory_lookup

ROWS, PRE_VALUE, VALUE, HITS = 120_000, 192, 192, 32


def main(tokens: int) -> None:
    """Look the first `tokens` of 256 tokens up, rows repeated among them; all else is the same for any number."""
    rng = np.random.default_rng(0)
    # A page-aligned table, as files are mapped.
    memory = mmap.mmap(-1, ROWS * (PRE_VALUE + VALUE) * 4)
    table = np.frombuffer(memory, dtype=np.float32).reshape(ROWS, PRE_VALUE + VALUE)
    indices = rng.integers(0, ROWS, (256, HITS))
    scores = rng.standard_normal((256, HITS, 2)).astype(np.float32)
    query = rng.standard_normal((256, PRE_VALUE)).astype(np.float32)
    print(json.dumps({"rows": sorted(set(indices.ravel().tolist())), "row_bytes": table.strides[0]}), flush=True)
    memory_lookup("avx2", indices[:tokens], scores[:tokens], [table], pre_value_dim=PRE_VALUE, query=query[:tokens])
    # What python reads again as it winds up is none of the op's traffic.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
