"""Which ONNX Runtime a graph of ours needs at least: measured, see the table in docs/bundle.md."""

from packaging.version import Version

__all__ = ["BENCH_ONNXRUNTIME", "OLDEST_ONNXRUNTIME", "PROBES_ONNXRUNTIME", "minimum_onnxruntime"]

# Of all this tool opens, and what pyproject.toml asks for.
OLDEST_ONNXRUNTIME = "1.20.0"

# The first that finds external data of a graph in memory, such as one whose inner values became outputs.
PROBES_ONNXRUNTIME = "1.21.0"

# The first whose sessions can share threads from Python.
BENCH_ONNXRUNTIME = "1.23.0"

# The first that reads this version of the standard ops; the others are read by the oldest.
_OPSETS = {22: "1.21.0", 23: "1.23.0", 24: "1.24.1"}

# 1.22 does not know the attributes of com.microsoft::MoE that make it SwiGLU, 1.23.0 has no kernel of it for CPUs.
_CONTRIB = "1.23.1"

# The first whose com.microsoft::GroupQueryAttention takes a bias, without which no padding is masked.
_STATIC_CACHE = "1.22.0"

# The first that hands bf16 tensors to Python, through DLPack; numpy knows no bf16.
_BF16 = "1.26.0"


def minimum_onnxruntime(opset: int, dtype: str, moe_form: str | None, cache: str) -> str:
    """The oldest release that computes such a graph right.

    Args:
        opset: version of the standard ops.
        dtype: of dense weights and cache.
        moe_form: of experts: standard, contrib, or None in a model without.
        cache: growing or static.
    """
    needed = [OLDEST_ONNXRUNTIME, _OPSETS.get(opset, OLDEST_ONNXRUNTIME)]
    if moe_form == "contrib":
        needed.append(_CONTRIB)
    if cache == "static":
        needed.append(_STATIC_CACHE)
    if dtype == "bf16":
        needed.append(_BF16)
    return max(needed, key=Version)
