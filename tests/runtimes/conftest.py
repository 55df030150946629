"""Engines run where the stand-ins for TensorRT and the CUDA driver are."""

from tests.engines.conftest import stand_in

__all__ = ["stand_in"]
