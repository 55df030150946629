"""Our format: what `convert` writes is what is read back, by the safetensors library too, and nothing else is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.variants import GOLDEN, VALUES, copy_golden, load_golden, mapped_file, split_into_ranks
from tests.limits import resident_bytes, within_limits
from umv2_export.checkpoint import open_checkpoint, own_format
from umv2_export.checkpoint.own_format import checkpoint_streams, save_checkpoint
from umv2_export.config import tensor_shapes
from umv2_export.errors import InputRejected, Unsupported
from umv2_export.presets import PRESETS

INDEX = "model.safetensors.index.json"


def convert(official: Path, target: Path) -> Path:
    """Write an official checkpoint in our format."""
    checkpoint = open_checkpoint(official)
    save_checkpoint(target, checkpoint.config, checkpoint_streams(checkpoint), checkpoint.tokenizer_files)
    return target


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden v2_shared_ring in our format; not to be changed."""
    return convert(GOLDEN["v2_shared_ring"], tmp_path_factory.mktemp("native") / "checkpoint")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


@pytest.fixture
def in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same checkpoint, cut into files of at most 100 kB where a tensor is no larger."""
    monkeypatch.setattr(own_format, "MAX_FILE_BYTES", 100_000)
    return convert(GOLDEN["v2_shared_ring"], tmp_path / "in_files")


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))


def edit_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file, and leave its elements."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors, and save them with the safetensors library."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


# What is written is what is read.


@pytest.mark.parametrize("name", GOLDEN)
def test_conversion_keeps_config_and_tensors(tmp_path: Path, name: str) -> None:
    converted, expected = open_checkpoint(convert(GOLDEN[name], tmp_path / "out")), load_golden(name)
    assert converted.format == "native"
    assert converted.config == open_checkpoint(GOLDEN[name]).config
    assert converted.tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert converted.tensors[key].dtype == tensor.dtype
        assert torch.equal(converted.read(key), tensor), key


@pytest.mark.parametrize("name", ["v1_skip_layer", "v2_expanded_keys"])
def test_the_safetensors_library_reads_the_same_tensors(tmp_path: Path, name: str) -> None:
    tensors, expected = load_file(convert(GOLDEN[name], tmp_path / "out") / "model.safetensors"), load_golden(name)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())


def test_conversion_joins_the_slices_of_a_vertical_parallel_run(tmp_path: Path, original: Path) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    converted = convert(official, tmp_path / "out")
    assert (converted / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()


def test_two_conversions_give_the_same_bytes(tmp_path: Path, original: Path) -> None:
    again = convert(GOLDEN["v2_shared_ring"], tmp_path / "again")
    assert sorted(file.name for file in again.iterdir()) == ["config.json", "model.safetensors"]
    for file in again.iterdir():
        assert file.read_bytes() == (original / file.name).read_bytes()


def test_weights_of_two_bytes_stay_as_they_are(tmp_path: Path, checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({VALUES: tensors[VALUES].bfloat16()}))
    source = open_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "again", source.config, checkpoint_streams(source))
    assert torch.equal(open_checkpoint(tmp_path / "again").read(VALUES), load_golden()[VALUES].bfloat16())


def test_tokenizer_files_are_copied_and_found(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    (official / "tokenizer.json").write_text("{}")
    converted = convert(official, tmp_path / "out")
    assert open_checkpoint(converted).tokenizer_files == [converted / "tokenizer.json"]
    assert (converted / "tokenizer.json").read_text() == "{}"


def test_the_query_layout_can_be_chosen(original: Path) -> None:
    assert open_checkpoint(original).config.memory.query_layout == "released"
    assert open_checkpoint(original, query_layout="per_rank").config.memory.query_layout == "per_rank"


def test_tables_are_mapped_from_the_file(checkpoint: Path) -> None:
    assert mapped_file(open_checkpoint(checkpoint).read(VALUES)) == checkpoint / "model.safetensors"


def test_opening_a_published_size_takes_no_memory(tmp_path: Path) -> None:
    """4.9 GB: its tables are holes in a sparse file, only the permutations are written."""
    config = PRESETS["umv2-227m-1.2b"]
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in tensor_shapes(config).items():
        is_index = name.endswith("shuffle_index")
        size = torch.Size(shape).numel() * (8 if is_index else 4)
        dtype = "I64" if is_index else "F32"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in header.items():
            if name.endswith("shuffle_index"):
                file.seek(8 + len(text) + entry["data_offsets"][0])
                file.write(torch.arange(entry["shape"][0]).numpy().tobytes())
        file.truncate(8 + len(text) + offset)
    document = {"format": "umv2-native", "format_version": 1, "model": config.as_dict()}
    (tmp_path / "config.json").write_text(json.dumps(document))
    before = resident_bytes()
    assert open_checkpoint(tmp_path).size > 4.8 * 10**9
    assert resident_bytes() - before < 64 * 2**20


# Several files.


def test_a_large_checkpoint_is_cut_into_files_of_whole_tensors(in_files: Path) -> None:
    files = sorted(in_files.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= 100_000 or len(sizes) == 1


def test_several_files_hold_the_same_tensors_as_one(in_files: Path) -> None:
    checkpoint, expected = open_checkpoint(in_files), load_golden()
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_the_index_names_the_file_of_every_tensor_and_their_size(in_files: Path) -> None:
    index = json.loads((in_files / INDEX).read_text())
    held = {name: file.name for file in in_files.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_golden().values())


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/tmp/evil.safetensors", "a/../../evil.safetensors", "..\\evil.safetensors", ""]
)
def test_an_index_that_leads_out_of_the_folder_is_rejected(in_files: Path, name: str) -> None:
    shutil.copyfile(min(in_files.glob("*.safetensors")), in_files.parent / "evil.safetensors")
    edit_json(in_files / INDEX, lambda index: index["weight_map"].update({VALUES: name}))
    with pytest.raises(InputRejected, match="leads out of its folder"):
        open_checkpoint(in_files)


@pytest.mark.parametrize("name", ["model-9.safetensors", "x" * 5000, "\ud800", "config.json/x"], ids=lambda n: n[:20])
def test_an_index_that_names_no_file_is_rejected(in_files: Path, name: str) -> None:
    edit_json(in_files / INDEX, lambda index: index["weight_map"].update({VALUES: name}))
    with pytest.raises(InputRejected):
        open_checkpoint(in_files)


@pytest.mark.parametrize("weight_map", [None, [], 7, {}, {VALUES: 3}, {VALUES: None}], ids=str)
def test_an_index_without_a_mapping_to_files_is_rejected(in_files: Path, weight_map: object) -> None:
    edit_json(in_files / INDEX, lambda index: index.update({"weight_map": weight_map}))
    with pytest.raises(InputRejected):
        open_checkpoint(in_files)


def test_a_tensor_in_two_files_is_rejected_by_name(in_files: Path) -> None:
    shutil.copyfile(min(in_files.glob("*.safetensors")), in_files / "copy.safetensors")
    edit_json(in_files / INDEX, lambda index: index["weight_map"].update({"again": "copy.safetensors"}))
    with pytest.raises(InputRejected, match=r"tensor 'transformer\.\S+' stands in two files"):
        open_checkpoint(in_files)


# Spoiled weights.


@pytest.mark.parametrize("part", [0.0, 0.00001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_rejected(checkpoint: Path, part: float) -> None:
    file = checkpoint / "model.safetensors"
    os.truncate(file, int(part * file.stat().st_size))
    with pytest.raises(InputRejected, match="truncated or corrupt") as caught:
        open_checkpoint(checkpoint)
    assert caught.value.where == str(file)


@pytest.mark.parametrize("length", [0, 3, 2**40, 2**64 - 1])
def test_a_header_of_a_wrong_length_is_rejected(checkpoint: Path, length: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with within_limits(), pytest.raises(InputRejected, match="truncated or corrupt"):
        open_checkpoint(checkpoint)


def test_a_header_that_claims_more_than_the_file_is_rejected(checkpoint: Path) -> None:
    def claim(header: dict[str, Any]) -> None:
        last = max(header.values(), key=lambda entry: entry["data_offsets"][1])
        last["shape"] = [10**6, *last["shape"]]
        last["data_offsets"][1] += (10**6 - 1) * (last["data_offsets"][1] - last["data_offsets"][0])

    edit_header(checkpoint / "model.safetensors", claim)
    with pytest.raises(InputRejected, match="truncated or corrupt"):
        open_checkpoint(checkpoint)


def test_tensors_that_overlap_are_rejected(checkpoint: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        header["transformer.blocks.0.k_norm.weight"]["data_offsets"] = [0, 64]

    edit_header(checkpoint / "model.safetensors", overlap)
    with pytest.raises(InputRejected, match="truncated or corrupt"):
        open_checkpoint(checkpoint)


def test_a_folder_without_weights_is_rejected(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputRejected, match=r"file 'model\.safetensors' is missing"):
        open_checkpoint(checkpoint)


def test_a_missing_tensor_is_refused_by_name(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop(VALUES))
    with pytest.raises(InputRejected, match=f"tensor '{VALUES}' missing"):
        open_checkpoint(checkpoint)


def test_an_unknown_tensor_is_refused_by_name(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({"transformer.gate": torch.zeros(3)}))
    with pytest.raises(Unsupported, match=r"unknown tensor 'transformer\.gate'"):
        open_checkpoint(checkpoint)


def test_a_shape_that_contradicts_the_config_names_tensor_and_both_shapes(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({VALUES: torch.zeros(768, 31)}))
    with pytest.raises(InputRejected, match=rf"'{VALUES}' has shape \[768, 31\], the configuration says \[768, 32\]"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.float8_e5m2], ids=str)
def test_a_dtype_that_is_not_implemented_names_the_tensor(checkpoint: Path, dtype: torch.dtype) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({VALUES: tensors[VALUES].to(dtype)}))
    with pytest.raises(Unsupported, match=f"'{VALUES}' has dtype {dtype}"):
        open_checkpoint(checkpoint)


def test_a_shuffle_index_that_is_no_permutation_is_rejected(checkpoint: Path) -> None:
    name = "transformer.mem_blocks.1.shuffle_index"
    edit_tensors(checkpoint, lambda tensors: tensors[name].fill_(3))
    with pytest.raises(InputRejected, match=rf"'{name}' is not a permutation of 0\.\.360"):
        open_checkpoint(checkpoint)


def test_nan_is_reported_with_tensor_and_row(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors[VALUES][41].fill_(float("nan")))
    with pytest.raises(InputRejected, match=f"tensor '{VALUES}' holds NaN in row 41"):
        open_checkpoint(checkpoint).read(VALUES)


# Spoiled configuration.


@pytest.mark.parametrize(
    "text",
    ["", "7", "[]", "{", "null", "{}", '{"format": "umv2-native"}', "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:24] or "empty",
)
def test_a_config_that_is_no_json_object_of_this_format_is_rejected(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(InputRejected):
        open_checkpoint(checkpoint)


def test_a_config_that_is_no_text_is_rejected(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputRejected, match="not a JSON file"):
        open_checkpoint(checkpoint)


def test_a_config_of_more_than_16_mebibytes_is_not_read(checkpoint: Path) -> None:
    os.truncate(checkpoint / "config.json", 2**24 + 1)
    with pytest.raises(InputRejected, match="larger than 16777216 bytes"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused_with_both_versions(checkpoint: Path, version: object) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.update(format_version=version))
    with pytest.raises(InputRejected, match=f"version {version!r}, expected 'umv2-native' version 1"):
        open_checkpoint(checkpoint)


def test_another_format_is_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.update(format="olmo"))
    with pytest.raises(InputRejected, match="format is 'olmo'"):
        open_checkpoint(checkpoint)


def test_an_unknown_field_of_the_model_is_refused_by_name(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config["model"].update(sliding_window=128))
    with pytest.raises(Unsupported, match="unknown field 'sliding_window'"):
        open_checkpoint(checkpoint)


def test_an_unknown_field_of_the_memory_is_refused_by_name(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config["model"]["memory"].update(softmax=True))
    with pytest.raises(Unsupported, match=r"unknown field 'memory\.softmax'"):
        open_checkpoint(checkpoint)


def test_a_missing_field_is_refused_by_name_and_file(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config["model"]["memory"].pop("keys_per_side"))
    with pytest.raises(InputRejected, match=r"field 'memory\.keys_per_side' is missing") as caught:
        open_checkpoint(checkpoint)
    assert caught.value.where == str(checkpoint / "config.json")
