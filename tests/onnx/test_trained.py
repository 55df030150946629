"""Exports of what the authors' trainer writes: stock ONNX Runtime, and our native ops, against the authors' outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.golden import TRAINED_CASES
from tests.onnx.sessions import Step, greedy_tokens, onnxruntime_step
from umv2_export import native_library

TRAINED = {case.name: case for case in TRAINED_CASES}
Exported = Callable[..., tuple[Path, dict[str, Any]]]

LOGITS_ATOL = 2e-4
VOCAB_SIZE = 250
CAP = {"rowcol_cap_128": ("--row-topk", "128")}
WITHOUT_MEMORY = {"dense_no_mem", "moe_baseline", "rope_theta", "scale_logits"}

# Their graphs are those of another case; `tests/checkpoint` runs them in the reference.
SAME_GRAPH = {"fp32_switches", "heads4_gelu", "layer_norm_eps", "readme_n_kv_heads"}


def native_step(model: Path) -> Step:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(native_library())
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, dict(feed)), strict=True))


@pytest.mark.parametrize("name", sorted(TRAINED.keys() - SAME_GRAPH))
def test_both_runtimes_reproduce_the_authors_logits_and_greedy_tokens(name: str, exported: Exported) -> None:
    bundle, _ = exported(name, *CAP.get(name, ()))
    with np.load(TRAINED[name] / "expected.npz") as arrays:
        authors = dict(arrays)
    steps = [onnxruntime_step(bundle / "model.onnx")]
    if name not in WITHOUT_MEMORY:
        steps.append(native_step(bundle / "model.onnx"))
    ids = authors["input_ids"]
    feed: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for cache in onnxruntime.InferenceSession(bundle / "model.onnx").get_inputs()[2:]:
        feed[cache.name] = np.zeros((len(ids), cache.shape[1], 0, cache.shape[3]), np.float32)
    for step in steps:
        np.testing.assert_allclose(step(feed)["logits"], authors["logits"], rtol=0, atol=LOGITS_ATOL)
        np.testing.assert_array_equal(greedy_tokens(step, feed, vocab_size=VOCAB_SIZE, count=8), authors["greedy"])


def test_the_cache_holds_as_many_heads_as_there_are_keys(exported: Exported) -> None:
    bundle, _ = exported("gqa")
    inputs = {value.name: value.shape for value in onnxruntime.InferenceSession(bundle / "model.onnx").get_inputs()}
    assert inputs["past_key_values.0.key"] == ["batch", 2, "past_sequence", 16]


def test_the_row_of_the_padding_address_is_stored_as_zeros(exported: Exported) -> None:
    bundle, _ = exported("vp_padding_address")
    rows = np.fromfile(bundle / "rows-00001-of-00001.data", np.float32).reshape(-1, 48)
    assert len(rows) == 109
    assert not rows[108].any()
    assert rows[:108].any(axis=1).all()
