"""The contract of each custom op, one file an op: torch definition, eager reference, ONNX schema, ONNX body.

Legend of shape suffixes here and in `umv2_export/model`: B batch, S sequence, T tokens (B*S), D hidden, H heads, N keys
per side, R Tucker rank, C Tucker cores, M row top-k, K hits per token, P pre-value size, V value size.
"""

from typing import NamedTuple

import onnx_ir as ir

from umv2_export.ops.domain import DOMAIN, VERSION
from umv2_export.ops.experts import ExpertsSignature, experts
from umv2_export.ops.key_scores import KeyScoresSignature, key_scores
from umv2_export.ops.memory_lookup import memory_lookup
from umv2_export.ops.memory_lookup_onnx import LookupSignature
from umv2_export.ops.static_attention import AttentionSignature, static_attention
from umv2_export.ops.tucker_topk import function_body as tucker_topk_body
from umv2_export.ops.tucker_topk import tucker_topk

__all__ = [
    "DOMAIN",
    "VERSION",
    "AttentionSignature",
    "ExpertsSignature",
    "KeyScoresSignature",
    "LookupSignature",
    "OpSignatures",
    "experts",
    "key_scores",
    "memory_lookup",
    "static_attention",
    "tucker_topk",
]


class OpSignatures(NamedTuple):
    """What the nodes of one model have in common, for the ops that it holds; TuckerTopK is the same in all models."""

    key_scores: KeyScoresSignature | None = None
    lookup: LookupSignature | None = None
    experts: ExpertsSignature | None = None
    attention: AttentionSignature | None = None

    def function_bodies(self, *, opset: int) -> list[ir.Function]:
        """The bodies of the ops that the model holds."""
        bodies = [signature.function_body(opset=opset) for signature in self if signature is not None]
        return bodies if self.lookup is None else [*bodies, tucker_topk_body(opset=opset)]
