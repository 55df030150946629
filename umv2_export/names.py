"""Names that a user may type. Free of heavy imports: the command line offers them as choices."""

__all__ = [
    "BUILD_RUNTIMES",
    "DTYPES",
    "KEY_DTYPES",
    "MOE_FORMS",
    "QUERY_LAYOUTS",
    "RUNTIMES",
    "SCHEMES",
    "TABLE_DTYPES",
    "TARGETS",
]

BUILD_RUNTIMES = ("tensorrt", "tensorrt-rtx")
RUNTIMES = ("torch", "onnxruntime", "onnxruntime-native", "onnxruntime-cuda", *BUILD_RUNTIMES)
DTYPES = ("fp32", "fp16", "bf16")
MOE_FORMS = ("standard", "contrib")
KEY_DTYPES = ("same", "fp16", "bf16")
TABLE_DTYPES = ("same", *DTYPES, "int8")
TARGETS = ("any", "gpu")
QUERY_LAYOUTS = ("auto", "released", "per-rank")
SCHEMES = ("released", "principled")
