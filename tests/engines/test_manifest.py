"""Engines on disk: what is read, what is refused, and which are trusted."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden import GOLDEN_CASES
from umv2_export.checkpoint import open_checkpoint
from umv2_export.engines.manifest import EngineManifest, describe_engine, read_engine, require_trusted, verify_engine
from umv2_export.errors import CheckFailed, InputRejected

CONTENT = b"compiled code"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine whose file is no code at all: nothing here may deserialise it."""
    (tmp_path / "model.engine").write_bytes(CONTENT)
    shapes = {"input_ids": {"min": [1, 1], "opt": [1, 1], "max": [4, 1]}}
    EngineManifest(
        tool_version="0.1.0",
        runtime="tensorrt-rtx",
        runtime_version="1.7.1.116",
        compute_capabilities=["8.6"],
        version_compatible=False,
        hardware_compatible=False,
        plugins="none",
        weights="included",
        profiles=[{"name": "decode", "shapes": shapes}],
        inputs=[{"name": "input_ids", "dtype": "int64", "axes": ["batch", "sequence"]}],
        outputs=[],
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        bundle="0" * 64,
        graph="1" * 64,
        config=open_checkpoint(GOLDEN_CASES[0]).config.as_dict(),
    ).write(tmp_path)
    return tmp_path


def edit(engine: Path, **fields: Any) -> None:
    document = json.loads((engine / "engine.json").read_text(encoding="utf-8"))
    (engine / "engine.json").write_text(json.dumps({**document, **fields}), encoding="utf-8")


def test_an_engine_is_described_by_its_manifest(engine: Path) -> None:
    facts = describe_engine(engine)
    assert facts["kind"] == "engine"
    assert facts["compute_capabilities"] == ["8.6"]
    assert facts["profiles"]["decode"]["input_ids"]["max"] == [4, 1]
    assert facts["config"]["num_layers"] == open_checkpoint(GOLDEN_CASES[0]).config.num_layers
    assert facts["size"] == len(CONTENT)


def test_a_sound_engine_is_trusted(engine: Path) -> None:
    assert require_trusted(engine, trust=False).file == engine / "model.engine"


@pytest.mark.parametrize("content", [b"hostile! code", b"longer than what was built"])
def test_another_file_in_its_place_is_noticed(engine: Path, content: bytes) -> None:
    (engine / "model.engine").write_bytes(content)
    with pytest.raises(CheckFailed, match="the manifest says"):
        read_engine(engine)
    with pytest.raises(InputRejected, match="not trusted") as caught:
        require_trusted(engine, trust=False)
    assert "--trust-engine" in str(caught.value)
    require_trusted(engine, trust=True)


def test_an_engine_without_a_manifest_is_not_trusted(engine: Path) -> None:
    (engine / "engine.json").unlink()
    with pytest.raises(InputRejected, match=r"engine\.json is missing"):
        read_engine(engine)
    for trust in (False, True):
        with pytest.raises(InputRejected, match="not trusted"):
            require_trusted(engine, trust=trust)


def test_a_sound_engine_is_verified(engine: Path) -> None:
    assert verify_engine(engine).manifest.size == len(CONTENT)


def test_a_file_that_is_not_in_the_manifest_is_noticed(engine: Path) -> None:
    (engine / "plugin.so").write_bytes(b"code")
    with pytest.raises(CheckFailed, match=r"'plugin\.so' is not in the manifest"):
        verify_engine(engine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "umv2-bundle"}, "not the manifest of an engine"),
        ({"format_version": 99}, "format version 99, this tool reads 2"),
        ({"size": "13"}, "field 'size'"),
        ({"sha256": None}, "field 'sha256'"),
        ({"profiles": [{"name": "decode"}]}, "field 'profiles'"),
        ({"inputs": ["input_ids"]}, "field 'inputs'"),
        ({"compute_capabilities": [8.6]}, "field 'compute_capabilities'"),
        ({"config": []}, "field 'config'"),
        ({"plugins": "python"}, "field 'plugins'"),
        ({"weights": ["stripped"]}, "field 'weights'"),
        ({"version_compatible": "no"}, "field 'version_compatible'"),
    ],
)
def test_a_malformed_manifest_is_rejected(engine: Path, fields: dict[str, Any], message: str) -> None:
    edit(engine, **fields)
    with pytest.raises(InputRejected, match=message):
        read_engine(engine)


def test_a_manifest_that_is_no_json_is_rejected(engine: Path) -> None:
    (engine / "engine.json").write_bytes(b"\xff{")
    with pytest.raises(InputRejected, match="not a JSON file"):
        read_engine(engine)
