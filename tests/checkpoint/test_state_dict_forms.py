"""State dicts as trainers wrap, name and store them, and what lies beside them."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.variants import VALUES, changed_tensors, copy_golden, load_golden, mapped_file
from tests.command import run_command
from tests.limits import resident_bytes, within_limits
from umv2_export.checkpoint import open_checkpoint
from umv2_export.checkpoint.state_dict import MODEL_KEYS, load_state_dict
from umv2_export.errors import InputRejected, Umv2Error, Unsupported


def rename(official: Path, rename: Callable[[str], str]) -> None:
    state = torch.load(official / "model.pt", weights_only=True)
    torch.save({rename(name): tensor for name, tensor in state.items()}, official / "model.pt")


def assert_is_golden(official: Path) -> list[str]:
    """Every tensor is that of the golden checkpoint; returns the notes."""
    checkpoint, expected = open_checkpoint(official), load_golden()
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
    return list(checkpoint.notes)


# Wrapped names.


@pytest.mark.parametrize(
    ("form", "noted"),
    [
        ("_orig_mod.{}", "_orig_mod."),
        ("module.{}", "module."),
        ("_fsdp_wrapped_module.{}", "_fsdp_wrapped_module."),
        ("module._orig_mod.{}", "module., _orig_mod."),
        ("_orig_mod.module._fsdp_wrapped_module.{}", "_orig_mod., module., _fsdp_wrapped_module."),
        ("module.module.{}", "module."),
        ("model.{}", "model."),
        ("model._orig_mod.{}", "model., _orig_mod."),
        ("_forward_module.model.{}", "model., _forward_module."),
    ],
)
def test_names_of_wrappers_are_left_out_and_told(tmp_path: Path, form: str, noted: str) -> None:
    official = copy_golden(tmp_path)
    rename(official, form.format)
    assert assert_is_golden(official) == [f"model.pt: names are read without {noted}"]


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_orig_mod", "module", "_checkpoint_wrapped_module"])
def test_a_wrapper_around_each_block_is_left_out(tmp_path: Path, wrapper: str) -> None:
    official = copy_golden(tmp_path)
    rename(official, lambda name: name.replace("blocks.1.", f"blocks.1.{wrapper}.").replace("keys", f"{wrapper}.keys"))
    assert assert_is_golden(official) == [f"model.pt: names are read without {wrapper}."]


def test_two_names_that_are_the_same_without_their_wrappers_are_refused(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        state["module." + VALUES] = state[VALUES] + 1
    with pytest.raises(InputRejected, match=f"two tensors are named '{VALUES}'"):
        open_checkpoint(official)


@pytest.mark.parametrize("leaf", ["_flat_param", "flat_param"])
def test_flat_parameters_of_fsdp_say_what_to_save(tmp_path: Path, leaf: str) -> None:
    torch.save({f"_fsdp_wrapped_module.{leaf}": torch.zeros(9)}, tmp_path / "model.pt")
    with pytest.raises(Unsupported, match="flat and joined") as caught:
        load_state_dict(tmp_path / "model.pt")
    assert "FULL_STATE_DICT" in str(caught.value.fix)


def test_a_command_tells_the_wrappers_on_stderr(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    rename(official, "module.{}".format)
    result = run_command("convert", official, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0
    assert "note: model.pt: names are read without module." in result.stderr


# State dicts below a key.


def moments(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"state": {i: {"step": torch.tensor(3.0), "exp_avg": t} for i, t in enumerate(state.values())}}


@pytest.mark.parametrize("path", [*((key,) for key in MODEL_KEYS), ("model", "state_dict")])
def test_a_model_below_a_key_is_read_and_told(tmp_path: Path, path: tuple[str, ...]) -> None:
    official = copy_golden(tmp_path)
    state: Any = load_golden()
    for key in reversed(path):
        state = {key: state, "epoch": 3, "lr": 1e-3, "done": None, "args": ["a", True]}
    torch.save(state, official / "model.pt")
    assert assert_is_golden(official) == [f"model.pt: the model lies under {'.'.join(path)}"]


def test_an_optimizer_beside_the_model_is_never_read(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    state = load_golden()
    optimizer = {**moments(state), "big": torch.zeros(2**26)}
    torch.save({"model": state, "optimizer": optimizer}, official / "model.pt")
    del optimizer
    open_checkpoint(official)
    before = resident_bytes()
    with within_limits():
        table = open_checkpoint(official).read(VALUES)
    assert mapped_file(table) == official / "model.pt"
    assert resident_bytes() - before < 2**24


def test_code_beside_the_model_is_refused_all_the_same(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    torch.save({"model": load_golden(), "args": Path("x")}, official / "model.pt")
    with pytest.raises(InputRejected, match="holds more than tensors") as caught:
        open_checkpoint(official)
    assert "pathlib" in str(caught.value.why)
    assert "state_dict()" in str(caught.value.fix)


def test_a_model_under_both_keys_is_refused(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    torch.save({"model": load_golden(), "state_dict": load_golden()}, official / "model.pt")
    with pytest.raises(InputRejected, match="both 'model' and 'state_dict'"):
        open_checkpoint(official)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"model": 3}, {"weights": {"a": torch.zeros(1)}}, {1: None}])
def test_a_file_without_a_model_says_where_it_was_looked_for(tmp_path: Path, content: Any) -> None:
    official = copy_golden(tmp_path)
    torch.save(content, official / "model.pt")
    with pytest.raises(InputRejected, match="not a state dict of named tensors"):
        open_checkpoint(official)


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_state_dict_of_a_run_in_16_bits_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        for name, tensor in state.items():
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    checkpoint = open_checkpoint(official)
    assert {tensor.dtype for name, tensor in checkpoint.tensors.items() if "shuffle" not in name} == {dtype}


# What else lies in the folder.


@pytest.mark.parametrize(
    "name",
    ["optim.pt", "train.pt", "other.pt", "rng.pt", "optim.safetensors", "train/rank0.pt", "optim/rank0.pt", "x.bin"],
)
def test_other_files_of_a_run_are_never_opened(tmp_path: Path, name: str) -> None:
    official = copy_golden(tmp_path)
    (official / name).parent.mkdir(exist_ok=True)
    (official / name).write_bytes(b"garbage\x80\x02cos\nsystem\n")
    (official / name).chmod(0)
    with (official / "huge.pt").open("wb") as huge:
        huge.truncate(2**40)
    assert assert_is_golden(official) == []
    result = run_command("convert", official, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


# model.safetensors, with names of unshard.py.


def encoded(name: str, tail: bytes = b"\x85\x94\x89\x86\x94.") -> str:
    pickled = b"\x80\x04\x8c" + bytes([len(name)]) + name.encode() + b"\x94" + tail
    return base64.urlsafe_b64encode(pickled).decode()


def to_safetensors(official: Path, rename: Callable[[str], str]) -> None:
    state = torch.load(official / "model.pt", weights_only=True)
    (official / "model.pt").unlink()
    save_file({rename(name): tensor for name, tensor in state.items()}, official / "model.safetensors")


@pytest.mark.parametrize("form", [encoded, str, "module.{}".format, lambda name: encoded(f"_orig_mod.{name}")])
def test_safetensors_with_encoded_or_plain_names_are_read(tmp_path: Path, form: Callable[[str], str]) -> None:
    official = copy_golden(tmp_path)
    to_safetensors(official, form)
    assert_is_golden(official)


@pytest.mark.parametrize(
    "name",
    [
        "bm90IGEgcGlja2xl",
        "x",
        "====",
        "é" * 9,
        encoded("a.b", b"\x85\x94\x88\x86\x94."),
        encoded("a.b", b"."),
        encoded("a.b", b"\x8c\x01x\x86\x94\x89\x86\x94."),
        encoded("a.b", b"0cos\nsystem\n\x8c\x02id\x85R."),
        encoded("a.b", b"\x85R."),
        base64.b64encode(b"\x80\x04c__builtin__\nbytearray\n\x8a\x04\x00\x00\x00\x7f\x85R.").decode(),
        base64.b64encode(b"\x80\x04K\x01\x85\x89\x86.").decode(),
        "gA" * 3000,
    ],
)
def test_a_name_that_is_neither_is_refused_and_not_unpickled(tmp_path: Path, name: str) -> None:
    official = copy_golden(tmp_path)
    to_safetensors(official, lambda plain: name if plain == VALUES else encoded(plain))
    with within_limits(), pytest.raises(Umv2Error) as caught:
        open_checkpoint(official)
    assert len(caught.value.message()) < 2000


def test_two_encodings_of_one_name_are_refused(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    state = load_golden()
    (official / "model.pt").unlink()
    tensors = {encoded(name): tensor for name, tensor in state.items()}
    save_file({**tensors, encoded(VALUES, b"\x85\x89\x86."): state[VALUES] + 1}, official / "model.safetensors")
    with pytest.raises(InputRejected, match=f"two tensors are named '{VALUES}'"):
        open_checkpoint(official)


def test_where_both_files_are_there_the_one_that_is_not_read_is_told(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    (official / "model.safetensors").write_bytes(b"garbage")
    assert assert_is_golden(official) == ["model.safetensors is not read: model.pt is there"]
