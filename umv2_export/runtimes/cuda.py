"""What ONNX Runtime needs to run a bundle on a GPU: a card, the CUDA provider, and compiled kernels."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx.parser

from umv2_export.bundle import Bundle
from umv2_export.errors import EnvironmentUnfit
from umv2_export.gpu.driver import compute_capability
from umv2_export.progress import progress_bars

__all__ = ["PROVIDER", "PROVIDER_OPTIONS", "kernels_of", "require_cuda", "require_provider"]

PROVIDER = "CUDAExecutionProvider"

# With TF32, products of 10 bits would swap rows that fp32 tells apart.
PROVIDER_OPTIONS = {"use_tf32": "0"}

# Where our ops find their kernels, when a session is made.
KERNELS_VARIABLE = "UMV2_GPU_KERNELS"

_INSTALL_CUDA = "pip install 'onnxruntime-gpu[cuda,cudnn]'"

_EMPTY_MODEL = '<ir_version: 8, opset_import: ["": 18]> nothing (float[N] x) => (float[N] y) { y = Identity (x) }'


def require_cuda() -> str:
    """The compute capability of the GPU that ONNX Runtime computes on.

    Raises:
        EnvironmentUnfit: there is no GPU, or the installed ONNX Runtime has no CUDA provider or cannot load it.
    """
    capability = compute_capability()
    import onnxruntime  # noqa: PLC0415 - an optional package

    if hasattr(onnxruntime, "preload_dlls"):
        # Finds the libraries of CUDA in the wheels of NVIDIA; what it prints must not mix with results.
        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()
    # Whether the provider loads shows in a session. One of the bundle would fail first, for want of kernels of our ops.
    model = onnx.parser.parse_model(_EMPTY_MODEL).SerializeToString()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified provider")
        try:
            session = onnxruntime.InferenceSession(model, providers=[(PROVIDER, PROVIDER_OPTIONS)], enable_fallback=0)
        except Exception as error:  # its exception classes share no base but Exception
            raise EnvironmentUnfit(
                f"ONNX Runtime {onnxruntime.__version__} could not load its {PROVIDER}",
                why=str(error).strip(),
                fix=_INSTALL_CUDA,
            ) from error
    require_provider(session)
    return capability


def require_provider(session: Any) -> None:
    """Refuse a session that ONNX Runtime made without the CUDA provider: it says so on stderr only, and goes on.

    Raises:
        EnvironmentUnfit: the CUDA provider is not its first.
    """
    if session.get_providers()[0] == PROVIDER:
        return
    import onnxruntime  # noqa: PLC0415 - an optional package

    version = onnxruntime.__version__
    if PROVIDER not in onnxruntime.get_available_providers():
        raise EnvironmentUnfit(
            f"the installed ONNX Runtime {version} has no {PROVIDER}",
            why="it has " + ", ".join(onnxruntime.get_available_providers()),
            fix="pip uninstall onnxruntime, then pip install onnxruntime-gpu: both share one folder",
        )
    raise EnvironmentUnfit(
        f"ONNX Runtime {version} could not load its {PROVIDER}, and would compute on the CPU",
        why="CUDA or cuDNN is missing, or of another version than the one it was built for; see its message above",
        fix=_INSTALL_CUDA,
    )


@contextlib.contextmanager
def kernels_of(bundle: Bundle, capability: str) -> Iterator[None]:
    """Within the block, new sessions find the kernels of a bundle; those that the user names come first.

    Args:
        bundle: whose kernels.
        capability: of the GPU.

    Raises:
        Unsupported: nothing is compiled for this GPU.
        EnvironmentUnfit: Triton is not installed, the cache may not be written, or the file of the user is missing.
        BuildFailed: the compiler failed.
    """
    named = os.environ.get(KERNELS_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise EnvironmentUnfit(
                f"{KERNELS_VARIABLE} names a file that does not exist",
                where=named,
                fix="let it name the kernels.bin that `umv2-export kernels` wrote, or unset it",
            )
        yield
        return
    from umv2_export.gpu.cache import cached_kernels  # noqa: PLC0415 - needs triton, an optional package
    from umv2_export.gpu.variants import node_variants  # noqa: PLC0415

    variants = node_variants(bundle.config, bundle.layout.shards, bundle.layout.dtype)
    with progress_bars() as track:
        os.environ[KERNELS_VARIABLE] = str(cached_kernels(variants, capability, track))
    try:
        yield
    finally:
        del os.environ[KERNELS_VARIABLE]
