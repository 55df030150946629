"""Export UltraMemV2 memory-layer models to ONNX, and prove that the exported model computes the same.

This module imports nothing: it is loaded before an interrupt of `umv2-export` is dealt with.
"""

__all__ = ["__version__", "cuda_library", "native_library"]

__version__ = "0.1.0"


def native_library() -> str:
    """Path of the custom-op library for ONNX Runtime on a CPU, for `SessionOptions.register_custom_ops_library`.

    Raises:
        EnvironmentUnfit: this installation was built without it.
    """
    return _built("libumv2_onnxruntime.so")


def cuda_library() -> str:
    """Path of the custom-op library for ONNX Runtime's CUDA provider, for the same call; see docs/gpu.md.

    Raises:
        EnvironmentUnfit: this installation was built without it.
    """
    return _built("libumv2_onnxruntime_cuda.so")


def _built(name: str) -> str:
    from pathlib import Path  # noqa: PLC0415 - see above

    from umv2_export.errors import EnvironmentUnfit  # noqa: PLC0415

    # In an editable installation Python files lie in the source tree and built ones in site-packages.
    for folder in __path__:
        if (Path(folder) / name).is_file():
            return str(Path(folder) / name)
    raise EnvironmentUnfit(
        f"the native op library {name} is not installed",
        where=Path(__file__).parent,
        fix="install the package where a C++ compiler is at hand: pip install .",
    )
