"""Model configurations, and the tensors that follow from them."""

from umv2_export.config.bounds import INT32_MAX, MOST_REPEATS
from umv2_export.config.memory import Activation, MemoryConfig, QueryLayout
from umv2_export.config.model import ExpertsConfig, ModelConfig
from umv2_export.config.tensors import TABLES, Role, TensorSpec, checkpoint_tensors, count_parameters, tensor_shapes

__all__ = [
    "INT32_MAX",
    "MOST_REPEATS",
    "TABLES",
    "Activation",
    "ExpertsConfig",
    "MemoryConfig",
    "ModelConfig",
    "QueryLayout",
    "Role",
    "TensorSpec",
    "checkpoint_tensors",
    "count_parameters",
    "tensor_shapes",
]
