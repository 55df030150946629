"""Names of runtimes. Free of heavy imports: the command line offers them as choices."""

__all__ = ["BUILD_RUNTIMES", "RUNTIMES"]

BUILD_RUNTIMES = ("tensorrt", "tensorrt-rtx")
RUNTIMES = ("torch", "onnxruntime", "onnxruntime-native", "onnxruntime-cuda", *BUILD_RUNTIMES)
