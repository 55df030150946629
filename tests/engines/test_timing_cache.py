"""Timing caches: kept, checked before use, and required on request."""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import Result, run_command
from tests.engines.conftest import StandIn
from umv2_export.engines.timing_cache import open_timing_cache
from umv2_export.errors import InputRejected

Exported = Callable[..., tuple[Path, dict[str, Any]]]


def build(exported: Exported, target: Path, cache: Path, *options: str) -> Result:
    bundle, _ = exported("v2_shared_ring")
    return run_command(
        "build", bundle, "-o", target, "--runtime", "tensorrt", "--timing-cache", cache, "--force", *options
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with its record, of version 10.13 and compute capability 8.9."""
    open_timing_cache(tmp_path / "cache", tensorrt_version="10.13.0.35", compute_capability="8.9").save(b"some tactics")
    return tmp_path / "cache"


def test_a_build_makes_a_cache_with_a_record(exported: Exported, tmp_path: Path, stand_in: StandIn) -> None:
    result = build(exported, tmp_path / "engine", tmp_path / "cache")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "cache").read_bytes() == b"all tactics"
    assert json.loads((tmp_path / "cache.json").read_text(encoding="utf-8")) == {
        "sha256": hashlib.sha256(b"all tactics").hexdigest(),
        "tensorrt_version": "10.13.0.35",
        "compute_capability": "8.9",
    }
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "cache.json", "engine"]


def test_what_a_build_times_is_added(exported: Exported, tmp_path: Path, cache: Path, stand_in: StandIn) -> None:
    assert build(exported, tmp_path / "engine", cache).exit_code == 0
    assert cache.read_bytes() == b"all tactics"
    assert build(exported, tmp_path / "engine", cache, "--require-timing-cache").exit_code == 0
    assert stand_in.calls("build")[1][0]["flags"] == ["ERROR_ON_TIMING_CACHE_MISS"]


def test_a_required_cache_that_lacks_something_fails_the_build_and_stays_as_it_is(
    exported: Exported, tmp_path: Path, cache: Path, stand_in: StandIn
) -> None:
    result = build(exported, tmp_path / "engine", cache, "--require-timing-cache")
    assert result.exit_code == 6
    assert "a tactic is not in the timing cache" in result.stderr
    assert cache.read_bytes() == b"some tactics"
    assert not (tmp_path / "engine").exists()


def test_a_failed_build_leaves_the_cache_as_it_is(
    exported: Exported, tmp_path: Path, cache: Path, stand_in: StandIn
) -> None:
    stand_in.behave(refuse_graph=True)
    assert build(exported, tmp_path / "engine", cache).exit_code == 6
    assert cache.read_bytes() == b"some tactics"


def test_a_cache_that_tensorrt_refuses_is_rejected(
    exported: Exported, tmp_path: Path, cache: Path, stand_in: StandIn
) -> None:
    stand_in.behave(refuse_cache=True)
    result = build(exported, tmp_path / "engine", cache)
    assert result.exit_code == 3
    assert "refuses the timing cache" in result.stderr


def test_a_cache_that_is_not_what_its_record_says_never_reaches_tensorrt(
    exported: Exported, tmp_path: Path, cache: Path, stand_in: StandIn
) -> None:
    cache.write_bytes(b"hostile tactics")
    result = build(exported, tmp_path / "engine", cache)
    assert result.exit_code == 3
    assert "the timing cache has sha256" in result.stderr
    assert stand_in.order() == []


def test_a_cache_in_the_output_folder_is_refused(exported: Exported, tmp_path: Path, stand_in: StandIn) -> None:
    for options in ([], ["--dry-run"]):
        result = build(exported, tmp_path / "engine", tmp_path / "engine" / "cache", *options)
        assert result.exit_code == 2
        assert "lies in the output folder" in result.stderr
    assert stand_in.order() == []


def test_an_engine_stays_where_its_cache_cannot_be_written(
    exported: Exported, tmp_path: Path, stand_in: StandIn
) -> None:
    (tmp_path / "file").write_bytes(b"")
    result = build(exported, tmp_path / "engine", tmp_path / "file" / "cache")
    assert result.exit_code == 4
    assert run_command("verify", tmp_path / "engine").exit_code == 0


@pytest.mark.parametrize(
    ("version", "compute_capability", "message"),
    [
        ("11.4.0.1", "8.9", r"for tensorrt_version '10\.13\.0\.35', this build has 11\.4\.0\.1"),
        ("10.13.0.35", "9.0", r"for compute_capability '8\.9', this build has 9\.0"),
    ],
)
def test_a_cache_of_another_version_or_gpu_is_rejected(
    version: str, compute_capability: str, message: str, cache: Path
) -> None:
    with pytest.raises(InputRejected, match=message) as caught:
        open_timing_cache(cache, tensorrt_version=version, compute_capability=compute_capability)
    assert "delete both files" in str(caught.value)


def test_builds_that_share_a_cache_take_turns(cache: Path) -> None:
    opened = open_timing_cache(cache, tensorrt_version="10.13.0.35", compute_capability="8.9")
    other = os.open(cache.parent, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    threads = [
        threading.Thread(target=opened.save, args=(b"all tactics",)),
        threading.Thread(
            target=open_timing_cache,
            args=(cache,),
            kwargs={"tensorrt_version": "10.13.0.35", "compute_capability": "8.9"},
        ),
    ]
    for thread in threads:
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    assert cache.read_bytes() == b"some tactics"
    os.close(other)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert cache.read_bytes() == b"all tactics"


def test_a_cache_without_a_record_is_rejected(cache: Path) -> None:
    (cache.parent / "cache.json").unlink()
    with pytest.raises(InputRejected, match="no record"):
        open_timing_cache(cache, tensorrt_version="10.13.0.35", compute_capability="8.9")


def test_a_cache_that_did_not_change_is_not_written(cache: Path) -> None:
    opened = open_timing_cache(cache, tensorrt_version="10.13.0.35", compute_capability="8.9")
    before = cache.stat()
    opened.save(b"some tactics")
    assert (cache.stat().st_ino, cache.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_reading_a_cache_leaves_no_file_beside_it(cache: Path) -> None:
    before = cache.parent.stat().st_mtime_ns
    opened = open_timing_cache(cache, tensorrt_version="10.13.0.35", compute_capability="8.9")
    assert opened.content == b"some tactics"
    assert cache.parent.stat().st_mtime_ns == before
