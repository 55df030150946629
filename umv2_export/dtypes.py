"""Element types: the names on the command line and in manifests, and those of torch.

onnx_ir.DataType has no such names: fp32 is FLOAT or f32 there, and int64 is INT64 or i64.
"""

import torch

__all__ = ["dtype_name", "torch_dtype"]

_BY_NAME = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    return _BY_NAME[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype."""
    return next(name for name, known in _BY_NAME.items() if known == dtype)
