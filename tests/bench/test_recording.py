"""What is timed is what is counted: the step after the traced text hits the rows that the trace says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umv2_export.bench.recording import record_routing
from umv2_export.bundle import Bundle
from umv2_export.errors import InvalidRequest
from umv2_export.runtimes import StepInput, open_runtime

Exported = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.mark.parametrize("past", [0, 1, 9])
def test_a_decode_step_on_the_traced_cache_hits_the_traced_rows(past: int, exported: Exported) -> None:
    bundle = Bundle(exported("v2_shared_ring")[0])
    runtime = open_runtime("onnxruntime", bundle)
    ids = np.random.default_rng(0).integers(0, bundle.config.vocab_size, 200)
    trace = record_routing(runtime, bundle, ids, sequences=5, length=past + 1)
    assert trace.past[0][0].shape[2] == past
    step = StepInput(trace.token_ids, np.ones((5, past + 1), dtype=np.int64), trace.past)
    probes = runtime.run(step, probe=True).probes
    for j in range(bundle.config.memory.layers):
        found, traced = (np.sort(p[f"addresses.{j}"], axis=-1) for p in (probes, trace.probes))
        np.testing.assert_array_equal(found, traced)
    for i in range(bundle.config.num_layers):
        np.testing.assert_allclose(probes[f"normed.{i}"][:, 0], trace.probes[f"normed.{i}"], rtol=0, atol=1e-4)


def test_a_text_that_is_too_short_is_refused(exported: Exported) -> None:
    bundle = Bundle(exported("v2_shared_ring")[0])
    with pytest.raises(InvalidRequest, match="6 tokens"):
        record_routing(open_runtime("torch", bundle), bundle, np.arange(6), sequences=5, length=4)
