"""Records that are not trusted: each refusal has the path of the field, what is allowed and what was found."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.golden import GOLDEN_CASES
from umv2_export.bundle import SCHEMA
from umv2_export.checkpoint import open_checkpoint
from umv2_export.errors import InputRejected, Umv2Error, Unsupported, located
from umv2_export.records.documents import Document
from umv2_export.records.forms import (
    Fields,
    Form,
    Malformed,
    either,
    flag,
    instance,
    integer,
    list_of,
    mapping,
    matching,
    one_of,
    optional,
    positive,
    real,
    record,
    text,
    tuple_of,
)

DOCUMENT = Document("index.json", "an index", "things", "a command", "things", 3, "make them again")


def problem(form: Form[Any], value: object) -> str:
    with pytest.raises(Malformed) as caught:
        form.read(value, "field")
    return str(caught.value)


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (integer(), True, "field must be an integer, got True"),
        (integer(), 3.0, "field must be an integer, got 3.0"),
        (integer(1, 4), 5, "field must be an integer from 1 to 4, got 5"),
        (integer(0), -1, "field must be an integer from 0 to 9223372036854775807, got -1"),
        (flag, 1, "field must be true or false, got 1"),
        (real, float("nan"), "field must be a number, got nan"),
        (real, 10**400, "field must be a number, got 1000"),
        (positive, 0, "field must be a positive number, got 0"),
        (text, 3, "field must be text of at most 4096 characters, got 3"),
        (text, "x" * 4097, "field must be text of at most 4096 characters, got 'xxx"),
        (one_of(None, "a", "b"), ["a"], "field must be one of null, a, b, got ['a']"),
        (matching("[0-9]+", "digits"), "1\n", "field must be digits, got '1\\n'"),
        (optional(flag), 0, "field must be true or false, or null, got 0"),
        (either(flag, integer(0)), "x", "field must be true or false or an integer from 0"),
        (list_of(integer(0)), [0, {}], "field[1] must be an integer from 0"),
        (tuple_of(tuple_of(integer(), 2)), [[0, 1], [0]], "field[1] must be a list of 2, got [0]"),
        (mapping(flag), {"a.b": None}, "field['a.b'] must be true or false, got None"),
        (record({"a": flag}), [], "field must be an object, got []"),
        (record({"a": flag, "b": flag}), {"a": True}, "field.b is missing"),
        (record({"a": flag}), {"a": True, "b": True}, "field.b is unknown"),
        (record({"a": list_of(record({"b": flag}))}), {"a": [{"b": 1}]}, "field.a[0].b must be true or false, got 1"),
    ],
    ids=range(21),
)
def test_a_refusal_says_where_what_is_allowed_and_what_was_found(form: Form[Any], value: Any, expected: str) -> None:
    assert problem(form, value).startswith(expected)


@dataclass(frozen=True)
class Inner:
    """A record in a record."""

    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    """A record with a field of each kind."""

    name: str
    inner: Inner
    ratio: float | None = None


def test_a_dataclass_is_read_by_its_annotations() -> None:
    assert instance(Outer).read({"name": "x", "inner": {"sizes": [1, 2]}}) == Outer("x", Inner((1, 2)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"inner": {}}, "name is missing"),
        ({"name": "x", "inner": {"sizes": [1, "2"]}}, "inner.sizes[1] must be an integer, got '2'"),
        ({"name": "x", "inner": {}, "ratio": True}, "ratio must be a number, or null, got True"),
        ({"name": "x", "inner": {"depth": 1}}, "inner.depth is unknown"),
    ],
    ids=str,
)
def test_what_is_no_such_dataclass_is_refused(value: dict[str, Any], expected: str) -> None:
    with pytest.raises(Malformed, match=expected.replace("[", r"\[")):
        instance(Outer).read(value)


def test_a_name_without_end_is_cut_in_the_message() -> None:
    assert len(problem(record({}), {"x" * 10**6: 1})) < 200


def test_fields_read_one_by_one_are_named_and_located() -> None:
    fields = Fields({"size": "x"}, fix="write it")
    with (
        pytest.raises(InputRejected, match=r"field 'size' must be an integer from 1 .* got 'x'") as caught,
        located("config.yaml"),
    ):
        fields.read("size", integer(1))
    assert caught.value.where == "config.yaml"
    with pytest.raises(InputRejected, match=r"field 'other' is missing") as caught:
        fields.read("other", flag)
    assert caught.value.fix == "write it"
    assert fields.get("other", flag, True) is True


def test_an_error_that_says_where_it_arose_keeps_its_place() -> None:
    with pytest.raises(InputRejected) as caught, located("folder"), located("file"):
        raise InputRejected("it is empty")
    assert caught.value.where == "file"


# Documents of this tool.


def read(folder: Path, **fields: object) -> dict[str, Any]:
    document = {"format": "things", "format_version": 3, "things": [{"size": 1}]} | fields
    (folder / "index.json").write_text(json.dumps(document))
    return DOCUMENT.read(folder, {"things": list_of(record({"size": integer(0)}))})


def test_a_document_comes_back_without_its_head(tmp_path: Path) -> None:
    DOCUMENT.write(tmp_path, {"things": [{"size": 4}]})
    assert DOCUMENT.read(tmp_path, {"things": list_of(record({"size": integer(0)}))}) == {"things": [{"size": 4}]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"format": "other"}, "not an index: its format is not 'things'"),
        ({"format": None}, "not an index"),
        ({"format_version": 4}, "format version 4, this tool reads 3"),
        ({"format_version": []}, r"format version \[\], this tool reads 3"),
        ({"more": 1}, "field 'more' is unknown"),
        ({"things": 1}, "field 'things' is missing or malformed\n.*\n  why: things must be a list, got 1"),
        (
            {"things": [{"size": -1}]},
            r"'things' is missing or malformed\n.*\n  why: things\[0\]\.size must be an int.*-1",
        ),
        (
            {"things": [{"size": 1, "more": 1}]},
            r"'things' is missing or malformed\n.*\n  why: things\[0\]\.more is unknown",
        ),
    ],
    ids=str,
)
def test_another_document_is_refused(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputRejected, match=expected) as caught:
        read(tmp_path, **fields)
    assert caught.value.where == str(tmp_path / "index.json")


def test_a_folder_without_the_document_says_which_command_writes_it(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match=r"no things: index\.json is missing") as caught:
        DOCUMENT.read(tmp_path, {})
    assert caught.value.fix == "pass a folder that `a command` wrote"


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("tables", {"per_layer": True, "rows": -1, "row_size": 1, "rows_per_shard": 1, "shards": 1}, "tables.rows"),
        ("inputs", [{"name": "x", "dtype": "int64", "axes": ["batch", None]}], "inputs[0].axes[1]"),
        ("files", {"model.onnx": {"size": "3", "sha256": "x"}}, "files['model.onnx'].size"),
        ("bytes", {"dense": 0}, "bytes.keys"),
    ],
)
def test_a_manifest_is_refused_by_the_path_of_its_fault(field: str, value: object, path: str) -> None:
    with pytest.raises(Malformed) as caught:
        SCHEMA[field].read(value, field)
    assert caught.value.path == path


def test_an_unknown_field_of_a_model_is_unsupported_and_a_malformed_one_rejected(tmp_path: Path) -> None:
    from umv2_export.config import ModelConfig

    data = json.loads(json.dumps(open_checkpoint(GOLDEN_CASES[0]).config.as_dict()))
    for changes, error in (({"gate": 1}, Unsupported), ({"vocab_size": 1.5}, InputRejected)):
        with pytest.raises(Umv2Error) as caught:
            ModelConfig.from_dict(data | changes, where="manifest.json")
        assert type(caught.value) is error
        assert caught.value.where == "manifest.json"
