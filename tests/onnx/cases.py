"""Cases with outputs of the authors' code: inputs of a prefill, and what must come out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.conftest import CHECKPOINTS
from tests.onnx.sessions import Array, Step, prefill_feed

__all__ = ["LOGITS_ATOL", "Case", "case_of"]

LOGITS_ATOL = 2e-4


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what its authors' code computes.

    Attributes:
        path: of the checkpoint.
        feed: inputs of a prefill.
        logits: of it.
        greedy: continuation of the first prompt.
    """

    path: Path
    feed: dict[str, Array]
    logits: Array
    greedy: list[int]

    @property
    def prompt(self) -> list[int]:
        """The first."""
        return [int(token) for token in self.feed["input_ids"][0]]

    def assert_computed_by(self, step: Step) -> None:
        """The logits are the authors'."""
        np.testing.assert_allclose(step(self.feed)["logits"], self.logits, rtol=0, atol=LOGITS_ATOL)


def case_of(name: str, model: onnx.ModelProto) -> Case:
    """The case of that name, its cache in the shapes of an exported graph."""
    with np.load(CHECKPOINTS[name] / "expected.npz") as arrays:
        expected: dict[str, Any] = dict(arrays)
    caches = [value for value in model.graph.input if value.name.endswith(".key")]
    heads, head_size = (caches[0].type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
    feed = prefill_feed(expected["input_ids"], len(caches), heads, head_size)
    return Case(CHECKPOINTS[name], feed, expected["logits"], np.atleast_2d(expected["greedy"])[0].tolist())
