"""config.yaml is read as its writer reads it, and costs no more than its size."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkpoint.variants import GOLDEN, copy_golden
from tests.limits import within_limits
from umv2_export.checkpoint import open_checkpoint
from umv2_export.checkpoint.config_file import read_model_fields, read_yaml
from umv2_export.errors import InputRejected

# What OmegaConf 2.4 made of each form; make.py beside it recorded that.
SCALARS: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[1] / "data" / "yaml" / "scalars.json").read_text(encoding="utf-8")
)


def read_value(tmp_path: Path, form: str) -> Any:
    (tmp_path / "config.yaml").write_text(f"value: {form}\n")
    return read_yaml(tmp_path / "config.yaml")["value"]


@pytest.mark.parametrize("form", [form for form, outcome in SCALARS.items() if outcome["type"] != "refused"])
def test_a_scalar_is_what_omegaconf_makes_of_it(tmp_path: Path, form: str) -> None:
    value = read_value(tmp_path, form)
    shown = "nan" if isinstance(value, float) and math.isnan(value) else repr(value)
    assert {"type": type(value).__name__, "value": shown} == SCALARS[form]


@pytest.mark.parametrize("form", [form for form, outcome in SCALARS.items() if outcome["type"] == "refused"])
def test_a_scalar_that_omegaconf_refuses_is_rejected(tmp_path: Path, form: str) -> None:
    with pytest.raises(InputRejected):
        read_value(tmp_path, form)


def test_pyyaml_alone_would_read_other_values() -> None:
    assert isinstance(yaml.safe_load("1e-5"), str)
    assert not isinstance(yaml.safe_load("2024-01-01"), str)


@pytest.mark.parametrize(("form", "theta"), [("1e4", 10000.0), ("1.0E4", 10000.0), ("5e5", 500000.0)])
def test_a_field_in_scientific_notation_is_a_number(tmp_path: Path, form: str, theta: float) -> None:
    official = copy_golden(tmp_path)
    text = (official / "config.yaml").read_text()
    line = next(line for line in text.splitlines() if "rope_theta" in line)
    (official / "config.yaml").write_text(text.replace(line, f"{line.partition(':')[0]}: {form}"))
    assert open_checkpoint(official).config.rope_theta == theta


def test_a_key_that_stands_twice_is_rejected_by_name(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    text = (official / "config.yaml").read_text()
    line = next(line for line in text.splitlines() if "d_model" in line)
    (official / "config.yaml").write_text(text.replace(line, f"{line}\n{line}"))
    with pytest.raises(InputRejected, match="found duplicate key d_model"):
        open_checkpoint(official)


@pytest.mark.parametrize("value", ["${model.n_heads}", "a${oc.env:HOME}", "${path.choose:/a,/b}"])
def test_a_value_that_refers_to_another_is_rejected_by_name(tmp_path: Path, value: str) -> None:
    (tmp_path / "config.yaml").write_text(f"model:\n  d_model: '{value}'\n")
    with pytest.raises(InputRejected, match=r"field 'd_model' is .* refers to another value"):
        read_model_fields(tmp_path / "config.yaml")


def test_a_value_that_is_marked_as_missing_is_missing(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    text = (official / "config.yaml").read_text()
    line = next(line for line in text.splitlines() if "d_model" in line)
    (official / "config.yaml").write_text(text.replace(line, f"{line.partition(':')[0]}: ???"))
    with pytest.raises(InputRejected, match="field 'd_model' is missing"):
        open_checkpoint(official)


def test_anchors_and_merge_keys_are_followed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("base: &b {a: 1, c: 2}\nmodel:\n  <<: *b\n  c: 1e1\n  d: *b\n")
    assert read_model_fields(tmp_path / "config.yaml") == {"a": 1, "c": 10.0, "d": {"a": 1, "c": 2}}


def test_of_two_merged_mappings_the_first_of_a_list_and_the_later_key_win(tmp_path: Path) -> None:
    """As OmegaConf 2.4 read this text."""
    (tmp_path / "config.yaml").write_text(
        "x: &x {a: 1, b: 1}\ny: &y {a: 2, c: 2}\nmodel: {<<: [*x, *y], d: 3}\nother: {<<: *x, d: 3, <<: *y}\n"
    )
    document = read_yaml(tmp_path / "config.yaml")
    assert document["model"] == {"a": 1, "b": 1, "c": 2, "d": 3}
    assert document["other"] == {"a": 2, "b": 1, "c": 2, "d": 3}


def merge_bomb() -> str:
    text = "b0: &b0 {k0: 0, k1: 0, k2: 0}\n"
    return text + "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}], x{i}: 0}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        merge_bomb(),
        "a: &a {<<: *a}",
        "a: &a [*a]\nb: {<<: *a}",
        "a: " + ":".join(["1"] * 100_000),
        "a: " + ":".join(["1"] * 100_000) + ".5",
        "a: 1" + "_" * 100_000 + "0",
        "a: " + "1_" * 100_000 + "1e5",
        "a: 0x" + "f" * 100_000,
        "a: " + "9" * 100_000,
        "a: " + "{a: " * 3000,
        "[" + "a," * 100_000 + "]",
        "\n".join(f"k{i}: 1" for i in range(50_000)),
        "a: 1\n---\nb: 2\n",
        "a: !!python/object/apply:os.getcwd []",
        "a: !!python/object/apply:pathlib.PosixPath [a]",
    ],
    ids=lambda text: text[:12],
)
def test_a_file_that_asks_for_more_than_its_size_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with within_limits(memory_bytes=3 * 10**8, cpu_seconds=20), pytest.raises(InputRejected):
        read_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_file_is_what_safe_yaml_reads(name: str) -> None:
    file = GOLDEN[name] / "config.yaml"
    assert read_yaml(file) == yaml.safe_load(file.read_text())
