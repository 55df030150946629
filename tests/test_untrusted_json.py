"""JSON that is not trusted: what no code here can work with is refused as the file is read, by every command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.command import run_command
from tests.golden import GOLDEN_CASES
from tests.models import random_checkpoint
from umv2_export import bundle as bundle_module
from umv2_export.bundle import Bundle
from umv2_export.commands.description import print_description
from umv2_export.engines.manifest import SCHEMA as ENGINE_SCHEMA
from umv2_export.engines.manifest import EngineManifest, read_engine
from umv2_export.errors import InputRejected, Umv2Error
from umv2_export.inspection import describe_path
from umv2_export.presets import PRESETS
from umv2_export.records.json_files import parse_json, read_json

Exported = Callable[..., tuple[Path, dict[str, Any]]]

RING = next(case for case in GOLDEN_CASES if case.name == "v2_shared_ring")

REFUSED = {
    "NaN": '{"a": NaN}',
    "infinity": '{"a": [-Infinity]}',
    "a real that is infinite": '{"a": 1e999}',
    "4,000 digits": '{"a": ' + "9" * 4000 + "}",
    "5,000 digits": '{"a": ' + "9" * 5000 + "}",
    "a name twice": '{"a": 1, "a": 2}',
    "a name twice further in": '{"b": [{"a": 1, "a": 2}]}',
    "100 lists": '{"a": ' + "[" * 100 + "]" * 100 + "}",
    "100,000 lists": "[" * 100_000,
    "100,000 objects": '{"a":' * 100_000,
    "half a surrogate pair": '{"a": "\\ud800"}',
    "half a surrogate pair in a name": '{"\\udfff": 1}',
    "no UTF-8": '{"a": "\udcff"}',
    "two values": "{} {}",
    "nothing": "",
    "a list": "[]",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_strict_json_object_is_rejected(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.json").write_text(REFUSED[name], encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputRejected, match="JSON"):
        read_json(tmp_path / "file.json")


@pytest.mark.parametrize(
    "text", ['{"model_max_length": 1000000000000000019884624838656}', '{"a": [1.5e300, "\\u00e9", null]}']
)
def test_what_tokenizers_and_configurations_hold_is_read(text: str) -> None:
    assert parse_json(text) == json.loads(text)


def test_names_without_end_are_compared_in_no_time() -> None:
    names = [f'"{i}": 0' for i in range(200_000)]
    with pytest.raises(ValueError, match="stands twice"):
        parse_json("{" + ",".join([*names, '"199999": 0']) + "}")


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("a list",)])
@pytest.mark.parametrize("file", ["manifest.json", "engine.json", "config.json", "model.safetensors.index.json"])
def test_a_file_of_any_kind_is_refused_with_exit_code_3(tmp_path: Path, file: str, name: str) -> None:
    if file == "model.safetensors.index.json":
        random_checkpoint(tmp_path, PRESETS["umv2-tiny"])
        # A single file of the usual name would win over an index.
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / file).write_text(REFUSED[name], encoding="utf-8", errors="surrogateescape")
    result = run_command("inspect", tmp_path)
    assert result.exit_code == 3, result.stderr
    assert file in result.stderr


# Manifests.

STRANGE: list[Any] = [
    None,
    True,
    -1,
    2**63,
    10**99,
    0.5,
    "",
    "x",
    "\u202e",
    [],
    [[]],
    [None],
    {},
    {"x": None},
    {"": {}},
]


def every_place(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of a document: of each list the first entry alone."""
    entries = (
        value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else []
    )
    return [place for key, entry in entries for place in [(*path, key), *every_place(entry, (*path, key))]]


def put(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = json.loads(json.dumps(document))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


def test_every_field_of_a_manifest_has_its_test() -> None:
    assert bundle_module.SCHEMA.keys() == bundle_module.Manifest.__dataclass_fields__.keys()
    assert ENGINE_SCHEMA.keys() == EngineManifest.__dataclass_fields__.keys()


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("v2_shared_ring")[0], tmp_path / "bundle"))


def test_no_strange_value_in_any_place_of_a_manifest_is_a_bug(bundle: Path) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    outcomes: dict[object, tuple[object, ...]] = {}
    for place in every_place(document):
        for value in STRANGE:
            (bundle / "manifest.json").write_text(json.dumps(put(document, place, value)))
            try:
                print_description(describe_path(bundle))
                outcomes["described"] = (place, value)
            except Umv2Error as error:
                outcomes[error.exit_code] = (place, value)
    assert outcomes.keys() == {"described", 3, 5}, outcomes


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("opset",), "18"),
        (("opset",), 17),
        (("source",), []),
        (("source", "sha256"), "x"),
        (("source", "files"), ["config.yaml"]),
        (("inputs",), []),
        (("inputs", 0, "name"), "ids"),
        (("inputs", 2, "axes", 1), 5),
        (("outputs", 0, "dtype"), "float16"),
        (("outputs", 0, "axes"), ["batch", 256]),
        (("logits_columns", "size"), 250),
        (("query_layout",), "per_rank"),
        (("tables", "shards"), 2),
        (("parameters", "total"), 0),
        (("bytes", "rows"), -1),
        (("tool_version",), 1),
        (("stranger",), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_manifest_that_is_malformed_or_contradicts_itself_is_rejected(
    bundle: Path, place: tuple[Any, ...], value: Any, command: str
) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(put(document, place, value)))
    result = run_command(command, bundle)
    assert result.exit_code == 3
    assert str(place[0]) in result.stderr


@pytest.mark.parametrize("value", STRANGE, ids=ascii)
def test_no_strange_value_in_an_engine_manifest_is_a_bug(tmp_path: Path, value: Any) -> None:
    (tmp_path / "model.engine").write_bytes(b"")
    fields: dict[str, Any] = dict.fromkeys(EngineManifest.__dataclass_fields__, "x")
    value_of = {"name": "input_ids", "dtype": "int64", "axes": ["batch", 1]}
    fields |= {"compute_capabilities": ["8.6"], "profiles": [], "inputs": [value_of], "outputs": [], "size": 0}
    fields |= {"version_compatible": False, "hardware_compatible": False, "plugins": "none", "weights": "included"}
    fields |= {"config": PRESETS["umv2-tiny"].as_dict()}
    document = EngineManifest(**fields).as_dict()
    for place in every_place(document):
        if place[0] == "config":
            continue
        (tmp_path / "engine.json").write_text(json.dumps(put(document, place, value)))
        with pytest.raises(Umv2Error) as caught:
            read_engine(tmp_path)
        assert caught.value.exit_code in (1, 3)


# Graphs.


def change_graph(bundle: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change the graph, and its size and hash in the manifest."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    change(model)
    replace_graph(bundle, model.SerializeToString())


def replace_graph(bundle: Path, content: bytes) -> None:
    (bundle / "model.onnx").write_bytes(content)
    document = json.loads((bundle / "manifest.json").read_text())
    from umv2_export.system.files import file_sha256

    document["files"]["model.onnx"] = {"size": len(content), "sha256": file_sha256(bundle / "model.onnx")}
    (bundle / "manifest.json").write_text(json.dumps(document))


def rename(values: Any, number: int, name: str) -> None:
    values[number].name = name


CHANGES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "no present.2.value": lambda model: model.graph.output.pop(),
    "no logits": lambda model: model.graph.output.pop(0),
    "another output": lambda model: model.graph.output.add(name="more"),
    "no attention mask": lambda model: model.graph.input.pop(1),
    "a renamed input": lambda model: rename(model.graph.input, 0, "ids"),
    "an output twice": lambda model: model.graph.output.append(model.graph.output[0]),
    "ids of 32 bits": lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 6),
    "logits of 16 bits": lambda model: setattr(model.graph.output[0].type.tensor_type, "elem_type", 10),
    "a dtype that is none": lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 99),
    "a batch of 1": lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1),
    "no shape": lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
    "no tensor": lambda model: model.graph.input[0].ClearField("type"),
    "another opset": lambda model: setattr(model.opset_import[0], "version", 21),
    "no opset": lambda model: model.ClearField("opset_import"),
    "no nodes": lambda model: model.graph.ClearField("node"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_graph_that_is_not_the_manifests_is_rejected_by_every_command(bundle: Path, name: str) -> None:
    change_graph(bundle, CHANGES[name])
    for command in ("inspect", "verify", "parity"):
        result = run_command(command, bundle)
        assert result.exit_code == 3, (command, result.stderr)
        assert "model.onnx" in result.stderr
    for runtime in ("torch", "onnxruntime", "onnxruntime-native"):
        assert run_command("generate", bundle, "--prompt-ids", "1", "--runtime", runtime).exit_code == 3


@pytest.mark.parametrize("content", [b"", b"\x00", b"noise", bytes(1000)], ids=ascii)
def test_a_file_that_is_no_graph_is_rejected_by_every_command(bundle: Path, content: bytes) -> None:
    replace_graph(bundle, content)
    for command in ("inspect", "verify", "parity"):
        assert run_command(command, bundle).exit_code == 3


def test_an_output_is_rejected_that_manifest_and_graph_lack_alike(bundle: Path) -> None:
    change_graph(bundle, CHANGES["no present.2.value"])
    document = json.loads((bundle / "manifest.json").read_text())
    document["outputs"].pop()
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(InputRejected, match="does not name the outputs of the model"):
        Bundle(bundle)
