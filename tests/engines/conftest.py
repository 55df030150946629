"""A machine with TensorRT and a GPU, as far as a build or a run can tell."""

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from umv2_export.engines import plugins
from umv2_export.gpu import driver

STAND_IN = Path(__file__).parent / "stand_in" / "tensorrt.py"


class StandIn:
    """What tests tell the stand-in, and what it recorded."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._record = folder / "calls.jsonl"
        self._monkeypatch = monkeypatch
        self.kernels: list[tuple[list[str], list[str]]] = []
        """Ops and architectures of every build of kernels."""

    def behave(self, **behaviour: Any) -> None:
        """Meet another TensorRT, in workers and in this process: see the stand-in for the words."""
        self._monkeypatch.setenv("STAND_IN", json.dumps(behaviour))
        self._monkeypatch.setattr(sys.modules["tensorrt"], "_BEHAVIOUR", behaviour)

    def calls(self, name: str) -> list[list[Any]]:
        """Arguments of each call of a function, in order."""
        return [call[1:] for call in self._read() if call[0] == name]

    def order(self) -> list[str]:
        """Names of all calls."""
        return [str(call[0]) for call in self._read()]

    def _read(self) -> list[list[Any]]:
        if not self._record.is_file():
            return []
        return [json.loads(line) for line in self._record.read_text(encoding="utf-8").splitlines()]


def with_links(bundle: Path, target: Path, linked: Path) -> Path:
    """A copy of a bundle that names what a worker and its parent write, each a link to a file of the user."""
    shutil.copytree(bundle, target)
    (target / "kernels").mkdir()
    document = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    facts = {"size": linked.stat().st_size, "sha256": hashlib.sha256(linked.read_bytes()).hexdigest()}
    for name in ("job.json", "result.json", "timing.cache", "timed.cache", "kernels/kernels.json"):
        (target / name).symlink_to(linked)
        document["files"][name] = facts
    (target / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    return target


@pytest.fixture
def stand_in(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """TensorRT 10.13 and a GPU of compute capability 8.9; kernels are not compiled."""
    folder = tmp_path_factory.mktemp("stand-in")
    known = StandIn(folder, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN.parent))
    monkeypatch.setenv("STAND_IN_CALLS", str(folder / "calls.jsonl"))
    spec = importlib.util.spec_from_file_location("tensorrt", STAND_IN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as scope:
        # It puts plugins of its own in the place of ours, in the worker only.
        scope.setitem(sys.modules, "umv2_export.plugins.tensorrt.python_plugins", module)
        spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(driver, "compute_capability", lambda: "8.9")

    def build_kernels(target: Path, variants: Sequence[Any], architectures: Sequence[str], track: object) -> None:
        known.kernels.append((sorted(variant.op for variant in variants), list(architectures)))
        target.mkdir()
        (target / "kernels.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(plugins, "build_kernels", build_kernels)
    return known
