"""Which runtime each model of a benchmark runs in: a comparison of two runtimes is none of two models."""

from collections.abc import Sequence

from umv2_export.bundle import Bundle
from umv2_export.errors import InvalidRequest

__all__ = ["choose_runtimes"]

STOCK, NATIVE = "onnxruntime", "onnxruntime-native"


def choose_runtimes(
    model: Bundle, baselines: Sequence[Bundle], runtime: str | None, baseline_runtime: str | None
) -> list[str]:
    """The runtime of the model, and of each baseline.

    Args:
        model: that is measured.
        baselines: beside it.
        runtime: of the model, as the user named it; None: the fastest that it supports.
        baseline_runtime: likewise; None: the named one of the model where a baseline supports it, else the fastest.

    Raises:
        InvalidRequest: the native ops were asked for, and a baseline has none of them.
    """
    for baseline in baselines:
        if baseline_runtime == NATIVE and not _has_ops(baseline):
            raise InvalidRequest(
                f"--baseline-runtime {NATIVE}: this baseline holds no ops for the native ones to replace",
                where=baseline.path,
                fix=f"leave out --baseline-runtime, or pass {STOCK}",
            )
    named = baseline_runtime or (STOCK if runtime == STOCK else None)
    return [runtime or _fastest(model), *(named or _fastest(baseline) for baseline in baselines)]


def _fastest(bundle: Bundle) -> str:
    """The native ops where there are any: measured on every model with memory layers, they are the faster ones."""
    return NATIVE if _has_ops(bundle) else STOCK


def _has_ops(bundle: Bundle) -> bool:
    return bundle.config.memory.layers > 0 and bundle.manifest.functions == "local"
