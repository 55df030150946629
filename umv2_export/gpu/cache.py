"""Kernels for one GPU, compiled when they are first asked for and kept in the user's cache folder."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import platformdirs
from filelock import FileLock

import umv2_export.kernels.triton
from umv2_export import __version__
from umv2_export.errors import EnvironmentUnfit, InputRejected, Unsupported
from umv2_export.gpu.ahead_of_time import ARCHITECTURES, build_kernels, compiled_for, require_triton
from umv2_export.gpu.archive import ARCHIVE_FILE, archive_kernels
from umv2_export.gpu.index import plain_variant
from umv2_export.gpu.variants import Variant
from umv2_export.progress import Tracker, silent

__all__ = ["cached_kernels"]

_REMEDY = "let XDG_CACHE_HOME name another folder, or UMV2_GPU_KERNELS the kernels.bin of `umv2-export kernels`"


def cached_kernels(variants: Sequence[Variant], architecture: str, track: Tracker = silent) -> Path:
    """The file (`archive.ARCHIVE_FILE`) of these kernels.

    The first time it takes 10 to 30 s, most of them for the top-k. Of processes that ask at once, one compiles.

    Args:
        variants: of the kernels.
        architecture: compute capability, such as 8.9.
        track: progress.

    Raises:
        Unsupported: nothing that is compiled runs on this architecture.
        EnvironmentUnfit: Triton is not installed, or the cache folder may not be written.
        BuildFailed: the compiler failed.
    """
    compiled = compiled_for(architecture)
    if compiled is None:
        raise Unsupported(
            f"a GPU of compute capability {architecture}", why="kernels are compiled for " + ", ".join(ARCHITECTURES)
        )
    require_triton()
    folder = _cache_folder() / _key(variants, compiled)
    if not _is_whole(folder):
        with _alone(folder):
            if not _is_whole(folder):
                build_kernels(folder, variants, [compiled], track, replace_target=True)
    return folder / ARCHIVE_FILE


def _cache_folder() -> Path:
    try:
        return platformdirs.user_cache_path("umv2-export") / "kernels"
    except RuntimeError as error:  # a service has no home
        raise EnvironmentUnfit("there is no folder for GPU kernels", why=str(error), fix=_REMEDY) from error


def _key(variants: Sequence[Variant], architecture: str) -> str:
    """Names all that a build depends on."""
    import triton  # noqa: PLC0415 - an optional package

    versions = {"umv2-export": __version__, "triton": triton.__version__, "architecture": architecture}
    facts = {variant.name: plain_variant(variant) for variant in variants}
    digest = hashlib.sha256(json.dumps([versions, facts]).encode())
    for folder in umv2_export.kernels.triton.__path__:
        for source in sorted(Path(folder).glob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / ARCHIVE_FILE).read_bytes() == archive_kernels(folder)
    except (OSError, InputRejected):
        return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes this folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock")).acquire()
    except OSError as error:
        raise EnvironmentUnfit(
            "the cache of GPU kernels cannot be written",
            where=folder.parent,
            why=str(error),
            fix=_REMEDY,
        ) from error
    with lock:
        yield
