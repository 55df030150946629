"""Checkpoints of several files: joined where that can be told from the files, else refused with what to do."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.variants import (
    GOLDEN,
    VALUES,
    copy_golden,
    load_golden,
    mapped_file,
)
from tests.command import run_command
from tests.golden import TRAINED_CASES
from tests.limits import within_limits
from tests.onnx.sessions import greedy_tokens, onnxruntime_step, prefill_feed
from umv2_export.checkpoint import open_checkpoint
from umv2_export.errors import InputRejected, Umv2Error, Unsupported
from umv2_export.model import reference_model
from umv2_export.model.transformer import empty_past

LAYOUTS = Path(__file__).parents[1] / "data" / "layouts"
TRAINED = {case.name: case for case in TRAINED_CASES}
ATOL = 2e-4


def copy_layout(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(LAYOUTS / name, folder / name))


def assert_logits(checkpoint: Path) -> None:
    """The torch reference of a checkpoint agrees with the authors' own outputs beside it."""
    model = reference_model(open_checkpoint(checkpoint))
    with np.load(checkpoint / "expected.npz") as authors:
        ids = torch.from_numpy(authors["input_ids"])
        logits = model(ids, torch.ones_like(ids), empty_past(model.config, len(ids))).logits
        np.testing.assert_allclose(logits.detach(), authors["logits"], rtol=0, atol=ATOL)


# model.safetensors of scripts/unshard.py --safe-tensors.


def test_safetensors_of_unshard_have_the_authors_logits_in_torch() -> None:
    assert_logits(LAYOUTS / "safetensors")


def test_safetensors_of_unshard_have_the_authors_logits_in_stock_onnx_runtime(tmp_path: Path) -> None:
    result = run_command("onnx", LAYOUTS / "safetensors", "-o", tmp_path / "bundle")
    assert result.exit_code == 0, result.stderr
    step = onnxruntime_step(tmp_path / "bundle" / "model.onnx")
    with np.load(LAYOUTS / "safetensors" / "expected.npz") as authors:
        feed = prefill_feed(authors["input_ids"], layers=3, heads=4, head_size=16)
        np.testing.assert_allclose(step(feed)["logits"], authors["logits"], rtol=0, atol=ATOL)
        tokens = greedy_tokens(step, feed, vocab_size=250, count=authors["greedy"].shape[1])
        np.testing.assert_array_equal(tokens, authors["greedy"])


# torch_legacy and local.


def test_torch_legacy_is_refused_with_the_command_that_joins_it(tmp_path: Path) -> None:
    result = run_command("onnx", LAYOUTS / "sharded_torch_legacy", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 5
    error = json.loads(result.stdout)["error"]
    assert "torch_legacy" in error["what"]
    assert "nothing is unpickled" in error["why"]
    folder = LAYOUTS / "sharded_torch_legacy"
    assert f"scripts/unshard.py {folder} {folder}-unsharded --type torch_legacy --model-only" in error["fix"]


def test_torch_legacy_is_never_opened(tmp_path: Path) -> None:
    folder = copy_layout(tmp_path, "sharded_torch_legacy")
    for rank in (0, 1):
        (folder / f"rank{rank}.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        (folder / f"rank{rank}.pt").chmod(0)
    with pytest.raises(Unsupported, match="torch_legacy"):
        open_checkpoint(folder)


def test_flat_shards_in_a_folder_model_are_refused_with_what_the_run_must_set(tmp_path: Path) -> None:
    folder = copy_layout(tmp_path, "sharded_torch_legacy")
    (folder / "model").mkdir()
    for rank in (0, 1):
        (folder / f"rank{rank}.pt").rename(folder / "model" / f"rank{rank}.pt")
    with pytest.raises(Unsupported, match="local") as caught:
        open_checkpoint(folder)
    assert "save_interval_unsharded" in str(caught.value.fix)
    assert "--type local" in str(caught.value.fix)


def test_a_joined_file_beside_the_shards_is_read(tmp_path: Path) -> None:
    folder = copy_layout(tmp_path, "sharded_torch_legacy")
    shutil.copy(GOLDEN["v2_shared_ring"] / "model.pt", folder)
    shutil.copy(GOLDEN["v2_shared_ring"] / "config.yaml", folder)
    assert open_checkpoint(folder).tensors.keys() == load_golden().keys()


# torch_new: torch.distributed.checkpoint.


def test_torch_new_without_metadata_is_refused_with_the_command_that_converts_it() -> None:
    result = run_command("inspect", LAYOUTS / "sharded_torch_new", "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert error["what"] == ".metadata is empty"
    folder = LAYOUTS / "sharded_torch_new"
    command = f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder}/model_and_optim"
    assert f"python -m {command} {folder}-unsharded/model.pt" in error["fix"]


def test_torch_new_of_two_ranks_is_joined_bit_for_bit() -> None:
    checkpoint, expected = open_checkpoint(LAYOUTS / "distributed"), load_golden("v2_insert_map")
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
    assert_logits(LAYOUTS / "distributed")


def test_what_the_command_of_torch_converts_is_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = copy_layout(tmp_path, "distributed")
    dcp_to_torch_save(folder / "model_and_optim", folder / "model.pt")
    shutil.rmtree(folder / "model_and_optim")
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.read(VALUES), load_golden("v2_insert_map")[VALUES])
    assert "model.pt: the model lies under model" in checkpoint.notes


@pytest.mark.parametrize("layout", ["at the top", "without an optimizer"])
def test_other_layouts_of_torch_distributed_checkpoint_are_read(tmp_path: Path, layout: str) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = copy_golden(tmp_path)
    (folder / "model.pt").unlink()
    target = folder if layout == "at the top" else folder / "model_and_optim"
    with pytest.warns(UserWarning, match="single process"):
        save(load_golden(), checkpoint_id=target, no_dist=True)
    opened = open_checkpoint(folder)
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in load_golden().items())
    assert mapped_file(opened.read(VALUES)) == target / "__0_0.distcp"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"ChunkStorageMetadata", b"ChunkStorageMetadatb"),
        (b"\x8c\x05torch\x94\x8c\x07float32", b"\x8c\x02os\x94\x8c\x0apopen\0\0\0\0\0"),
        (b"__1_0.distcp", b"../0.distcp\0"),
        (b"__1_0.distcp", b"__2_0.distcp"),
        (b"relative_path", b"relative_pat_"),
        (b"storage_data", b"storage_dat_"),
        (b"values_for_look_up", b"values_for_look_uq"),
    ],
)
def test_metadata_that_was_changed_is_rejected(tmp_path: Path, old: bytes, new: bytes) -> None:
    folder = copy_layout(tmp_path, "distributed")
    file = folder / "model_and_optim" / ".metadata"
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    with within_limits(), pytest.raises(InputRejected) as caught:
        open_checkpoint(folder)
    assert "dcp_to_torch" in str(caught.value.fix)


@pytest.mark.parametrize("size", [0, 1000, 300_000])
def test_a_truncated_part_is_rejected(tmp_path: Path, size: int) -> None:
    folder = copy_layout(tmp_path, "distributed")
    file = folder / "model_and_optim" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputRejected, match="truncated") as caught:
        open_checkpoint(folder)
    assert caught.value.where == str(file)


# olmo_core.


def save_olmo_core(folder: Path, state: dict[str, torch.Tensor], ranks: int = 3) -> None:
    """As ai2-olmo-core 0.1.0 does: each rank a run of each tensor's elements, cut wherever the ranks' share ends."""
    tensors: dict[str, Any] = {}
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for number, (name, tensor) in enumerate(state.items()):
        flat, total = tensor.reshape(-1), tensor.numel()
        # Some whole in one file, some cut inside of a row.
        cuts = [0, *sorted([total * (number % 3) // 2, total * (number % 5) // 4]), total]
        files = {}
        for rank, (start, stop) in enumerate(itertools.pairwise(cuts)):
            shards[rank][name] = flat[start:stop].clone()
            files[f"rank_{rank}.safetensors"] = {
                "flattened_offsets": [[start, stop]],
                "local_shape": None,
                "global_offset": None,
            }
        tensors[name] = {
            "shape": list(tensor.shape),
            "is_sharded": True,
            "dtype": "F32",
            "shard_spec_per_file": files,
        }
    (folder / "model").mkdir(parents=True)
    for rank, shard in enumerate(shards):
        save_file(shard, folder / "model" / f"rank_{rank}.safetensors")
    (folder / "model" / "metadata.json").write_text(json.dumps({"tensors": tensors}))


def test_olmo_core_with_memory_layers_is_refused_with_what_the_run_must_set() -> None:
    result = run_command("inspect", LAYOUTS / "sharded_olmo_core", "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert "transformer.mem_blocks.0.shuffle_index" in error["what"]
    assert "3 memory layers" in error["what"]
    assert "nothing else can tell" in error["why"]
    assert "save_interval_unsharded" in error["fix"]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The golden checkpoint as olmo_core would save it, if it saved buffers of floats."""
    folder = copy_golden(tmp_path)
    state = load_golden()
    (folder / "model.pt").unlink()
    dense = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    save_olmo_core(folder, dense)
    return folder


def joined(folder: Path) -> dict[str, torch.Tensor]:
    from umv2_export.checkpoint import olmo_core

    return dict(olmo_core.read_olmo_core(folder).tensors)


@pytest.fixture
def dense(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model without memory layers, in three files."""
    state = {name: tensor for name, tensor in load_golden().items() if ".mem_blocks." not in name}
    save_olmo_core(tmp_path / "step1", state)
    return tmp_path / "step1", state


def test_a_model_without_memory_layers_is_joined_bit_for_bit(dense: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, state = dense
    tensors = joined(folder)
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["dense_no_mem", "moe_baseline"])
def test_experts_and_dense_models_of_olmo_core_have_the_authors_logits(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(TRAINED[name], tmp_path / name))
    save_olmo_core(folder, torch.load(folder / "model.pt", weights_only=True))
    (folder / "model.pt").unlink()
    assert_logits(folder)


def test_a_tensor_that_was_not_sharded_is_read(dense: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, state = dense
    name = "transformer.wte.weight"
    document = json.loads((folder / "model" / "metadata.json").read_text())
    whole = {"flattened_offsets": None, "local_shape": None, "global_offset": None}
    document["tensors"][name] |= {"is_sharded": False, "shard_spec_per_file": {"rank_0.safetensors": whole}}
    (folder / "model" / "metadata.json").write_text(json.dumps(document))
    file = folder / "model" / "rank_0.safetensors"
    save_file({**load_file(file), name: state[name]}, file)
    assert torch.equal(joined(folder)[name], state[name])


def test_memory_layers_without_their_shuffle_index_are_named(sharded: Path) -> None:
    with pytest.raises(InputRejected, match=r"shuffle_index' and 2 more of 3 memory layers"):
        open_checkpoint(sharded)


def spoil_shape(metadata: dict[str, Any], name: str) -> None:
    metadata[name]["shape"][0] += 1


def spoil_huge_shape(metadata: dict[str, Any], name: str) -> None:
    metadata[name]["shape"] = [2**31 - 1, 2**31 - 1]


def spoil_shape_type(metadata: dict[str, Any], name: str) -> None:
    metadata[name]["shape"] = "many"


def spoil_offsets(metadata: dict[str, Any], name: str) -> None:
    for facts in metadata[name]["shard_spec_per_file"].values():
        facts["flattened_offsets"] = [[start + 1, stop + 1] for start, stop in facts["flattened_offsets"]]


def spoil_pairs(metadata: dict[str, Any], name: str) -> None:
    for facts in metadata[name]["shard_spec_per_file"].values():
        facts["flattened_offsets"] = [[0]]


def spoil_dimensions(metadata: dict[str, Any], name: str) -> None:
    for facts in metadata[name]["shard_spec_per_file"].values():
        facts["flattened_offsets"] = None


def spoil_file(metadata: dict[str, Any], name: str) -> None:
    metadata[name]["shard_spec_per_file"]["../rank_0.safetensors"] = {"flattened_offsets": [[0, 1]]}


def spoil_files(metadata: dict[str, Any], name: str) -> None:
    metadata[name]["shard_spec_per_file"] = 3


def spoil_lost_rank(metadata: dict[str, Any], name: str) -> None:
    del metadata[name]["shard_spec_per_file"]["rank_2.safetensors"]


def spoil_dtype(metadata: dict[str, Any], name: str) -> None:
    metadata[name]["dtype"] = "F64"


@pytest.mark.parametrize(
    "spoil",
    [
        *(spoil_shape, spoil_huge_shape, spoil_shape_type, spoil_offsets, spoil_pairs, spoil_dimensions, spoil_file),
        *(spoil_files, spoil_lost_rank, spoil_dtype),
    ],
)
def test_metadata_of_olmo_core_that_contradicts_its_files_is_refused(
    dense: tuple[Path, dict[str, torch.Tensor]], spoil: Callable[[dict[str, Any], str], None]
) -> None:
    folder, _ = dense
    file = folder / "model" / "metadata.json"
    document = json.loads(file.read_text())
    spoil(document["tensors"], "transformer.wte.weight")
    file.write_text(json.dumps(document))
    with within_limits(), pytest.raises(Umv2Error):
        joined(folder)


def test_a_rank_that_is_missing_is_named(dense: tuple[Path, dict[str, torch.Tensor]]) -> None:
    (dense[0] / "model" / "rank_1.safetensors").unlink()
    with pytest.raises(InputRejected, match=r"rank_1\.safetensors"):
        joined(dense[0])


def test_the_golden_files_of_olmo_core_are_cut_as_the_tests_cut_them() -> None:
    """Its parameters, joined as the reader joins them, are tensors of the model."""
    folder = LAYOUTS / "sharded_olmo_core" / "model"
    facts = json.loads((folder / "metadata.json").read_text())["tensors"]["transformer.wte.weight"]
    parts = [load_file(folder / f"rank_{rank}.safetensors")["transformer.wte.weight"] for rank in (0, 1)]
    assert [list(spec["flattened_offsets"][0]) for spec in facts["shard_spec_per_file"].values()] == [
        [0, len(parts[0])],
        [len(parts[0]), facts["shape"][0] * facts["shape"][1]],
    ]
