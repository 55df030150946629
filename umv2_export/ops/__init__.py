"""The contract of each custom op, one file an op: torch definition, eager reference, ONNX schema, ONNX body.

Legend of shape suffixes here and in `umv2_export/model`: B batch, S sequence, T tokens (B*S), D hidden, H heads, N keys
per side, R Tucker rank, C Tucker cores, M row top-k, K hits per token, P pre-value size, V value size.
"""

from umv2_export.ops.domain import DOMAIN, VERSION
from umv2_export.ops.memory_lookup import LookupSignature, memory_lookup
from umv2_export.ops.tucker_topk import tucker_topk

__all__ = ["DOMAIN", "VERSION", "LookupSignature", "memory_lookup", "tucker_topk"]
