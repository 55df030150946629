"""Whether ONNX Runtime is installed, and recent enough."""

from packaging.version import Version

from umv2_export.errors import EnvironmentUnfit
from umv2_export.onnx.minimum import OLDEST_ONNXRUNTIME

__all__ = ["require_runtime"]


def require_runtime(
    name: str,
    minimum: str = OLDEST_ONNXRUNTIME,
    *,
    where: object = None,
    why: str = "older releases refuse the graph, or compute something else",
) -> None:
    """Notice before long work begins that ONNX Runtime is not installed, or older than what it is to run.

    Other runtimes notice when they are opened.

    Args:
        name: of the runtime.
        minimum: the oldest release that will do.
        where: what needs it.
        why: what is wrong with older ones.

    Raises:
        EnvironmentUnfit: it is not installed, or older.
    """
    if not name.startswith("onnxruntime"):
        return
    try:
        import onnxruntime  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise EnvironmentUnfit(
            "ONNX Runtime is not installed", fix="pip install 'umv2-export[cpu]' (or onnxruntime-gpu)"
        ) from error
    if Version(onnxruntime.__version__) < Version(minimum):
        package = "onnxruntime-gpu" if name == "onnxruntime-cuda" else "onnxruntime"
        raise EnvironmentUnfit(
            f"ONNX Runtime {onnxruntime.__version__} is installed, {minimum} or later is needed",
            where=where,
            why=why,
            fix=f"pip install --upgrade '{package}>={minimum}'",
        )
