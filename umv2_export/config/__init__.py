"""Model configurations, and the tensors that follow from them."""

from umv2_export.config.bounds import INT32_MAX, MOST_REPEATS
from umv2_export.config.memory import Activation, MemoryConfig, QueryLayout
from umv2_export.config.model import ExpertsConfig, ModelConfig
from umv2_export.config.tensors import BUFFERS, TABLES, count_parameters, tensor_shapes

__all__ = [
    "BUFFERS",
    "INT32_MAX",
    "MOST_REPEATS",
    "TABLES",
    "Activation",
    "ExpertsConfig",
    "MemoryConfig",
    "ModelConfig",
    "QueryLayout",
    "count_parameters",
    "tensor_shapes",
]
