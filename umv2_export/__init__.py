"""Export UltraMemV2 memory-layer models to ONNX, and prove that the exported model computes the same.

This module stays free of heavy imports: `umv2-export --help` loads it.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
