"""What this machine offers: versions, CPU features, GPU."""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

from umv2_export import __version__, cuda_library, native_library
from umv2_export.cpu_kernels import cpu_target
from umv2_export.errors import EnvironmentUnfit
from umv2_export.gpu.driver import compute_capability
from umv2_export.names import BUILD_RUNTIMES, RUNTIMES

__all__ = ["describe_environment", "describe_machine"]

PACKAGES = (
    "torch",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "safetensors",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tokenizers",
    "openvino",
    "triton",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
)

# What the kernels of runtimes look for.
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve")


def describe_environment() -> dict[str, object]:
    """Versions of packages (None: not installed), processor, memory, GPU, and the runtimes that can be used."""
    packages = {name: _version(name) for name in PACKAGES}
    has_onnxruntime = _runs_onnxruntime()
    native = _native()
    available = {
        "torch": True,
        "onnxruntime": has_onnxruntime,
        "onnxruntime-native": has_onnxruntime and native is not None,
        "onnxruntime-cuda": has_onnxruntime and _runs_cuda(),
        **{name: _runs_engines(name) for name in BUILD_RUNTIMES},
    }
    return {
        "umv2_export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "architecture": platform.machine(),
            "model": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "features": [name for name in CPU_FEATURES if name in _cpu_flags()],
        },
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpu(),
        "native_library": native,
        "packages": packages,
        "runtimes": {name: available[name] for name in RUNTIMES},
    }


def describe_machine() -> dict[str, object]:
    """What a measurement was made on, in a few plain facts."""
    native = _native()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "processor": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "memory, GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernels": "none" if native is None else native["kernels"],
        "umv2-export": __version__,
        "onnxruntime": _version("onnxruntime") or _version("onnxruntime-gpu") or "none",
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> dict[str, str] | None:
    """Path of the native op library and the kernels it uses here, or None where it was not built."""
    try:
        return {"path": native_library(), "kernels": cpu_target()}
    except EnvironmentUnfit:
        return None


def _runs_onnxruntime() -> bool:
    """ONNX Runtime is installed, and not too old."""
    from umv2_export.runtimes import require_runtime  # noqa: PLC0415 - imports torch

    try:
        require_runtime("onnxruntime")
    except EnvironmentUnfit:
        return False
    return True


def _runs_cuda() -> bool:
    """ONNX Runtime loads its CUDA provider, and our ops for it are there."""
    from umv2_export.runtimes.cuda import require_cuda  # noqa: PLC0415 - needs ONNX Runtime, an optional package

    try:
        cuda_library()
        require_cuda()
    except EnvironmentUnfit:
        return False
    return True


def _runs_engines(runtime: str) -> bool:
    """There is a GPU, and the library that runs engines of this runtime loads."""
    try:
        compute_capability()
        from umv2_export.engines.backends import BACKENDS  # noqa: PLC0415 - imports torch

        BACKENDS[runtime].load()
    except EnvironmentUnfit:
        return False
    return True


def _cpu_info(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split("\t")[0].strip() == field), "")


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or "unknown"


def _cpu_flags() -> set[str]:
    return set((_cpu_info("flags") or _cpu_info("Features")).split())


def _gpu() -> str | None:
    """The GPU that the driver names, or None; torch is not asked, its CPU build sees none."""
    folder = Path("/proc/driver/nvidia/gpus")
    if not folder.is_dir():
        return None
    names = []
    for entry in sorted(folder.iterdir()):
        lines = (entry / "information").read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return ", ".join(names) or None
