"""The cache of compiled kernels: what it is keyed by, and when it is made anew. Nothing is compiled here."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.stand_in_kernels import write_stand_in_kernels
from umv2_export.errors import EnvironmentUnfit, Unsupported
from umv2_export.gpu import cache
from umv2_export.gpu.archive import ARCHIVE_FILE
from umv2_export.gpu.lookup_variants import lookup_variant
from umv2_export.gpu.topk_variants import topk_variant
from umv2_export.gpu.variants import Variant
from umv2_export.progress import Tracker

Builds = list[Path]
Cached = Callable[..., Path]


def variants(value_dim: int = 32) -> list[Variant]:
    lookup = lookup_variant(
        torch.float32,
        torch.float32,
        shards=1,
        cores=2,
        grouped=False,
        pre_value_dim=16,
        value_dim=value_dim,
        gelu=False,
    )
    return [lookup, topk_variant(torch.float32, ranks=2, cores=2, row_topk=8, topk=8)]


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    """The folders that were built since the test began."""
    built: Builds = []

    def build(
        folder: Path, wanted: Sequence[Variant], architectures: Sequence[str], track: Tracker, *, replace_target: bool
    ) -> None:
        time.sleep(0.05)
        write_stand_in_kernels(folder, wanted, architectures)
        built.append(folder)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "build_kernels", build)
    return built


def cached(wanted: Any, architecture: str = "8.9") -> Path:
    return cache.cached_kernels(wanted, architecture)


def test_kernels_are_built_once_into_the_cache_folder_of_the_user(builds: Builds, tmp_path: Path) -> None:
    first, second = cached(variants()), cached(variants())
    assert first == second == builds[0] / ARCHIVE_FILE
    assert len(builds) == 1
    assert first.is_file()
    assert first.is_relative_to(tmp_path / "cache" / "umv2-export" / "kernels")


def test_other_kernels_another_gpu_or_another_version_is_another_folder(
    builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(variants())
    cached(variants(value_dim=64))
    cached(variants(), "8.0")
    monkeypatch.setattr(cache, "__version__", "9.9.9")
    cached(variants())
    monkeypatch.setattr("triton.__version__", "9.9.9")
    cached(variants())
    assert len(set(builds)) == 5


def test_changed_kernel_sources_are_compiled_anew(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(variants())
    (tmp_path / "changed.py").write_text("# another kernel")
    monkeypatch.setattr("umv2_export.kernels.triton.__path__", [str(tmp_path)])
    cached(variants())
    assert len(set(builds)) == 2


@pytest.mark.parametrize("damage", ["cut", "removed", "image"])
def test_a_damaged_folder_is_made_anew(damage: str, builds: Builds) -> None:
    pack = cached(variants())
    if damage == "cut":
        pack.write_bytes(pack.read_bytes()[:-1])
    elif damage == "removed":
        pack.unlink()
    else:
        next(pack.parent.glob("*.cubin")).write_bytes(b"another")
    whole = cached(variants()).read_bytes()
    assert len(builds) == 2
    assert whole == cached(variants()).read_bytes()


def test_of_two_that_ask_at_once_one_builds_and_the_other_waits(builds: Builds) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(cached(variants()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert found == [builds[0] / ARCHIVE_FILE] * 2


def test_a_cache_that_cannot_be_written_says_what_to_set(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EnvironmentUnfit, match="XDG_CACHE_HOME"):
        cached(variants())


def test_a_gpu_of_a_later_minor_version_gets_the_kernels_of_the_one_before(builds: Builds) -> None:
    assert cached(variants(), "12.1") == cached(variants(), "12.0")
    assert len(builds) == 1


def test_an_architecture_that_nothing_is_compiled_for_is_unsupported(builds: Builds) -> None:
    with pytest.raises(Unsupported, match=r"7\.5") as caught:
        cached(variants(), "7.5")
    assert "8.0, 8.6" in (caught.value.why or "")


def test_without_triton_nothing_is_compiled(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(EnvironmentUnfit, match="triton"):
        cached(variants())


def test_a_service_without_a_home_is_told_what_to_set(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    with pytest.raises(EnvironmentUnfit, match="no folder for GPU kernels"):
        cached(variants())
