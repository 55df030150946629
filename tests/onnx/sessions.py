"""A user's view of a bundle: a plain inference session over model.onnx, no code of this project."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import openvino

__all__ = ["Array", "Step", "greedy_tokens", "onnxruntime_step", "openvino_step", "prefill_feed"]

Array = npt.NDArray[Any]

# Feed by input name -> outputs by name.
Step = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def onnxruntime_step(model: Path, library: str | None = None) -> Step:
    """ONNX Runtime, stock or with a library of ops."""
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, dict(feed)), strict=True))


def openvino_step(model: Path) -> Step:
    """OpenVINO in fp32."""
    compiled = openvino.Core().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def step(feed: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = compiled(dict(feed))
        return {output.get_any_name(): outputs[output] for output in compiled.outputs}

    return step


def prefill_feed(ids: Array, layers: int, heads: int, head_size: int, dtype: type = np.float32) -> dict[str, Array]:
    """Input for a prefill: a cache of length 0."""
    feed: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for i in range(layers):
        for kind in ("key", "value"):
            feed[f"past_key_values.{i}.{kind}"] = np.zeros((len(ids), heads, 0, head_size), dtype=dtype)
    return feed


def greedy_tokens(step: Step, feed: dict[str, Array], *, vocab_size: int, count: int) -> Array:
    """Greedy continuation of all rows through the cache."""
    tokens = []
    for _ in range(count):
        outputs = step(feed)
        best = outputs["logits"][:, -1, :vocab_size].argmax(-1)
        tokens.append(best)
        mask = np.concatenate([feed["attention_mask"], np.ones((len(best), 1), np.int64)], axis=1)
        feed = {"input_ids": best[:, None], "attention_mask": mask}
        feed |= {
            name.replace("present", "past_key_values"): value
            for name, value in outputs.items()
            if name.startswith("present")
        }
    return np.stack(tokens, axis=1)
