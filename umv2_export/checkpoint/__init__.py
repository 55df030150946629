"""A directory on disk -> configuration + named tensors, mapped lazily."""

from umv2_export.checkpoint.checkpoint import Checkpoint, CheckpointTensor
from umv2_export.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "CheckpointTensor", "open_checkpoint"]
