"""kernels.json, which may come from anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.made_up import lookup, made_up_folder, topk
from umv2_export.errors import InputRejected
from umv2_export.gpu.index import INDEX_FILE, read_index

VARIANTS = [lookup(shards=2, grouped=True), topk()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder."""
    return made_up_folder(tmp_path / "kernels", VARIANTS)


def edit(folder: Path, change: Any) -> None:
    document = json.loads((folder / INDEX_FILE).read_text())
    change(document)
    (folder / INDEX_FILE).write_text(json.dumps(document))


def test_what_was_written_is_read(folder: Path) -> None:
    kernels = read_index(folder)
    assert [kernel.typed_variant() for kernel in kernels] == VARIANTS
    assert [kernel.as_dict() for kernel in kernels] == [
        kernel | {"grid": tuple(kernel["grid"]), "block": tuple(kernel["block"])}
        for kernel in json.loads((folder / INDEX_FILE).read_text())["kernels"]
    ]


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="no GPU kernels") as caught:
        read_index(tmp_path)
    assert caught.value.fix is not None


@pytest.mark.parametrize("kind", ["ptx", "cubin"])
def test_a_file_that_is_not_the_one_that_was_compiled_is_refused(folder: Path, kind: str) -> None:
    file = next(folder.glob(f"*.{kind}"))
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(InputRejected, match="not the one") as caught:
        read_index(folder)
    assert file.name in caught.value.what


@pytest.mark.parametrize("name", ["../outside.ptx", "/etc/passwd", "absent.ptx", "a\0b", ""])
def test_a_file_outside_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside.ptx").write_bytes(b"")

    def point_out(document: Any) -> None:
        kernel = document["kernels"][0]
        kernel["sha256"][name] = kernel["sha256"].pop(kernel["ptx"])
        kernel["ptx"] = name

    edit(folder, point_out)
    with pytest.raises(InputRejected):
        read_index(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3),
        ("op", "Softmax"),
        ("variant", []),
        ("variant", {}),
        ("compute_capability", "newest"),
        ("target", None),
        ("entry", "two words"),
        ("entry", 'x"); evil('),
        ("arguments", []),
        ("grid", ["groups", "tokens", "1"]),
        ("block", [0, 1, 1]),
        ("block", [2048, 1, 1]),
        ("shared_bytes", True),
        ("shared_bytes", -1),
        ("shared_bytes", 2**40),
        ("registers", "many"),
        ("ptx", ["a"]),
        ("sha256", {}),
    ],
)
def test_a_field_of_a_wrong_type_or_value_is_refused(folder: Path, field: str, value: object) -> None:
    edit(folder, lambda document: document["kernels"][1].update({field: value}))
    with pytest.raises(InputRejected, match=r"kernels\[1\] is malformed"):
        read_index(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("divisor", 0),
        ("divisor", 16.0),
        ("shards", 2**40),
        ("cores", True),
        ("grouped", 1),
        ("scores_dtype", "int8"),
        ("rows_dtype", "complex64"),
        ("rows_dtype", ["float32"]),
        ("block_k", -1),
        ("num_warps", 64),
        ("shards", 3),
        ("pre_values", False),
    ],
)
def test_a_variant_that_is_malformed_or_of_other_arguments_is_refused(folder: Path, field: str, value: object) -> None:
    edit(folder, lambda document: document["kernels"][0]["variant"].update({field: value}))
    with pytest.raises(InputRejected, match=r"kernels\[0\] is malformed"):
        read_index(folder)


def test_arguments_in_another_order_are_refused(folder: Path) -> None:
    edit(folder, lambda document: document["kernels"][0]["arguments"].reverse())
    with pytest.raises(InputRejected, match="malformed"):
        read_index(folder)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"format": "umv2-bundle"}, "not an index of kernels"),
        ({"format_version": 1}, "format version 1"),
        ({"kernels": {}}, "kernels"),
        ({"kernels": ["text"]}, r"kernels\[0\]"),
    ],
)
def test_another_document_is_refused(folder: Path, change: dict[str, Any], what: str) -> None:
    edit(folder, lambda document: document.update(change))
    with pytest.raises(InputRejected, match=what):
        read_index(folder)
