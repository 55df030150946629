"""Files of torch.save: nothing in them is run, and none takes more memory or time than its own bytes."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.archives import call, global_name, integer, pickled_dict, storage, tensor, text, write_archive
from tests.limits import within_limits
from umv2_export.checkpoint.pickle_reader import MAX_OPCODES, read_pickle
from umv2_export.checkpoint.state_dict import load_state_dict
from umv2_export.errors import InputRejected, Umv2Error

SIX_FLOATS = torch.arange(6.0)
STORED = {"0": SIX_FLOATS.numpy().tobytes()}

# A tuple of two of itself, 60 times: 2^60 items for whoever walks through it, in 400 bytes.
BOMB = b")\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60))


def load(tmp_path: Path, pickle: bytes) -> dict[str, torch.Tensor]:
    write_archive(tmp_path / "model.pt", pickle, STORED)
    return dict(load_state_dict(tmp_path / "model.pt").tensors)


def test_what_the_test_writes_is_what_torch_reads(tmp_path: Path) -> None:
    state = load(tmp_path, pickled_dict({"a": tensor()}))
    read_by_torch = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(state["a"], read_by_torch["a"])
    assert torch.equal(state["a"], SIX_FLOATS.reshape(2, 3))


@pytest.mark.parametrize(
    "function",
    [
        *("builtins.bytearray", "__builtin__.bytearray", "builtins.bytes", "builtins.list", "builtins.range"),
        *("torch.Size", "torch.FloatTensor", "torch.empty", "torch.zeros", "torch.device", "torch.Tensor"),
        *("torch.nn.parameter.Parameter", "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor"),
        *("torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_nested_tensor"),
        *("torch._utils._rebuild_wrapper_subclass", "torch._utils._rebuild_device_tensor_from_numpy"),
        *("torch._utils._rebuild_device_tensor_from_cpu_tensor", "torch._utils._rebuild_parameter_with_state"),
        *("torch._tensor._rebuild_from_type_v2", "torch.sparse_coo_tensor", "torch.serialization._get_layout"),
        *("torch.storage._load_from_bytes", "torch.jit._pickle.build_intlist", "numpy.ndarray", "numpy.dtype"),
        *("numpy.core.multiarray._reconstruct", "_codecs.encode", "collections.Counter", "os.system", "builtins.eval"),
    ],
)
def test_a_call_that_no_state_dict_needs_is_refused_by_name(tmp_path: Path, function: str) -> None:
    with within_limits(), pytest.raises(InputRejected, match="holds more than tensors") as caught:
        load(tmp_path, pickled_dict({"a": tensor(), "b": call(function, integer(3 * 10**9))}))
    assert function in str(caught.value.why)


@pytest.mark.parametrize("function", ["torch.FloatStorage", "torch.storage.UntypedStorage", "torch.float32"])
def test_a_name_that_tensors_need_is_not_called_for_its_own_sake(tmp_path: Path, function: str) -> None:
    with within_limits(), pytest.raises(InputRejected, match="'a' is not a plain array"):
        load(tmp_path, pickled_dict({"a": call(function, integer(3 * 10**9))}))


def test_the_386_bytes_that_took_3_gb_are_refused(tmp_path: Path) -> None:
    with within_limits(memory_bytes=10**8), pytest.raises(InputRejected, match="holds more than tensors"):
        load(tmp_path, b"\x80\x02" + call("builtins.bytearray", integer(3 * 10**9)) + b".")


@pytest.mark.parametrize(
    "value",
    [
        b"\x8b" + (2**24).to_bytes(4, "little") + b"\x7f" * 2**24,
        b"\x8a\xff" + b"\x7f" * 255,
        b"L" + b"9" * 4000 + b"L\n",
        b"I" + b"9" * 4000 + b"\n",
        b"B" + (5).to_bytes(4, "little") + b"bytes",
        b"\x96" + (5).to_bytes(8, "little") + b"bytes",
        b"\x8f",
        b"i__builtin__\nbytearray\n",
        b"\x82\x01",
        b"P0\n",
        b"(c__builtin__\nbytearray\nJ\xff\xff\xff\x7fo",
    ],
    ids=["LONG4", "LONG1", "LONG", "INT", "BINBYTES", "BYTEARRAY8", "SET", "INST", "EXT1", "PERSID", "OBJ"],
)
def test_an_operation_that_no_state_dict_needs_is_refused(tmp_path: Path, value: bytes) -> None:
    with within_limits(), pytest.raises(InputRejected):
        load(tmp_path, b"\x80\x02}" + text("a") + value + b"s.")


@pytest.mark.parametrize(
    "pickle",
    [
        b"",
        b".",
        b"\x80\x02}",
        b"\x80\x02}.}",
        b"\x80\x02}}.",
        b"\x80\x02(}.",
        b"\x80\x02h\x07.",
        b"\x80\x02t.",
        b"\x80\x02R.",
        b"\x80\x02}s.",
        b"\x80\x02}(X",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02}(" + text("a") + b"u.",
        b"\x80\x02]" + text("a") + text("b") + b"s.",
        b"\x80\x02}" + text("a") + b"a.",
        b"\x80\x02" + text("a") + b")R.",
        pickled_dict({"a": tensor()})[:-1],
        b"\x80\x02}(" + text("a") + tensor() + text("a") + tensor() + b"u.",
        b"\x80\x02}" + text("a") + tensor() + b"s}" + text("x") + b"Ksb.",
    ],
)
def test_a_pickle_that_is_corrupt_is_rejected(tmp_path: Path, pickle: bytes) -> None:
    with pytest.raises(InputRejected):
        load(tmp_path, pickle)


@pytest.mark.parametrize(
    "pickle",
    [
        pickled_dict({"a": BOMB}),
        b"\x80\x02}" + BOMB + tensor() + b"s.",
        pickled_dict({"a": BOMB + b"Q"}),
        pickled_dict({"a": call("torch._utils._rebuild_tensor_v2", storage(), integer(0), BOMB, BOMB, b"\x89", b"}")}),
        pickled_dict({"a": call("torch._utils._rebuild_parameter", BOMB, b"\x89", b"}")}),
        pickled_dict({"model": BOMB}),
        b"\x80\x02]\x94" + b"h\x00a" * 1000 + b".",
        pickled_dict({"model": b"}\x94" + text("model") + b"h\x00s"}),
    ],
    ids=["value", "key", "storage", "size", "parameter", "model", "list of itself", "dictionary of itself"],
)
def test_a_value_that_holds_itself_many_times_costs_nothing(tmp_path: Path, pickle: bytes) -> None:
    with within_limits(memory_bytes=10**8), pytest.raises(InputRejected) as caught:
        load(tmp_path, pickle)
    assert len(caught.value.message()) < 2000


@pytest.mark.parametrize("operations", [b"]" * 2 * MAX_OPCODES, b"(" * 2 * MAX_OPCODES, b"\x80\x02" * 2 * MAX_OPCODES])
def test_more_operations_than_any_checkpoint_has_are_not_read(tmp_path: Path, operations: bytes) -> None:
    with within_limits(cpu_seconds=20), pytest.raises(InputRejected, match=f"more than {MAX_OPCODES} operations"):
        load(tmp_path, operations)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"size": (2, 4), "stride": (4, 1)}, "view of 8 elements into a storage of 6"),
        ({"offset": 1}, "view of 7 elements into a storage of 6"),
        ({"size": (2**40, 2**40), "stride": (0, 0)}, f"has {2**80} elements, its storage 6"),
        ({"size": (7,), "stride": (0,)}, "has 7 elements, its storage 6"),
        ({"size": (2**62,), "stride": (1,)}, "not a plain array"),
        ({"size": (-2,), "stride": (1,)}, "not a plain array"),
        ({"size": (2,), "stride": (-1,)}, "not a plain array"),
        ({"offset": -1}, "not a plain array"),
        ({"offset": 2**70}, "not a plain array"),
        ({"size": (2, 3), "stride": (1,)}, "not a plain array"),
        ({"size": (1,) * 9, "stride": (1,) * 9}, "not a plain array"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with within_limits(), pytest.raises(InputRejected, match=problem):
        load(tmp_path, pickled_dict({"a": tensor(**changes)}))


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (storage(elements=7), "has 24 bytes, its description says 28"),
        (storage(elements=5), "has 24 bytes, its description says 20"),
        (storage(elements=2**40), "has 24 bytes"),
        (storage(elements=-6), "has 24 bytes"),
        (storage(kind="torch.DoubleStorage"), "has 24 bytes, its description says 48"),
        (storage(key="1"), "storage of tensor 'a' is missing"),
        (storage(key="../0"), "storage of tensor 'a' is missing"),
        (storage(kind="torch.float32"), "not a plain array"),
        (text("0"), "not a plain array"),
        (b"N", "not a plain array"),
    ],
)
def test_a_storage_that_is_not_as_described_is_refused(tmp_path: Path, place: bytes, problem: str) -> None:
    with within_limits(), pytest.raises(InputRejected, match=problem):
        load(tmp_path, pickled_dict({"a": tensor(place)}))


@pytest.mark.parametrize("location", ["cuda:0", "cuda:7", "npu:3", "mps", "xla:1"])
def test_the_device_that_a_tensor_was_saved_from_does_not_matter(tmp_path: Path, location: str) -> None:
    assert torch.equal(
        load(tmp_path, pickled_dict({"a": tensor(storage(location=location))}))["a"], SIX_FLOATS.reshape(2, 3)
    )


@pytest.mark.parametrize("kind", ["tensor", "parameter", "bfloat16", "view", "0-d", "empty", "shared", "v3"])
def test_every_form_of_a_plain_tensor_is_the_one_that_torch_reads(tmp_path: Path, kind: str) -> None:
    base = torch.randn(4, 6)
    saved: dict[str, Any] = {
        "tensor": base,
        "parameter": torch.nn.Parameter(base),
        "bfloat16": base.bfloat16(),
        "view": base[1:3, 2:5],
        "0-d": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "shared": base[0],
        "v3": base.to(torch.float8_e4m3fn),
    }
    torch.save({"other": base, "a": saved[kind]}, tmp_path / "model.pt")
    state = load_state_dict(tmp_path / "model.pt").tensors
    reference = torch.load(tmp_path / "model.pt", weights_only=True)["a"]
    assert (state["a"].dtype, state["a"].shape, state["a"].stride()) == (
        reference.dtype,
        reference.shape,
        reference.stride(),
    )
    assert torch.equal(state["a"].float(), reference.float())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_state_dict_of_a_module_is_read_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    torch.save({"model": state, "optim": {"lr": 0.1}}, tmp_path / "model.pt", pickle_protocol=protocol)
    read = load_state_dict(tmp_path / "model.pt").tensors
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["conjugated", "negated"])
def test_a_tensor_that_its_bytes_alone_do_not_tell_is_refused(tmp_path: Path, kind: str) -> None:
    base = torch.randn(3, dtype=torch.complex64)
    torch.save({"a": base.conj() if kind == "conjugated" else base.conj().imag}, tmp_path / "model.pt")
    with pytest.raises(InputRejected, match="'a' is not a plain array"):
        load_state_dict(tmp_path / "model.pt")


def test_a_torchscript_archive_says_what_to_save(tmp_path: Path) -> None:
    write_archive(tmp_path / "model.pt", b"\x80\x02}.")
    with zipfile.ZipFile(tmp_path / "model.pt", "a") as archive:
        archive.writestr("model/code/__torch__.py", "class M: pass")
        archive.writestr("model/constants.pkl", b"\x80\x02).")
    with pytest.raises(InputRejected, match="TorchScript") as caught:
        load_state_dict(tmp_path / "model.pt")
    assert "state_dict()" in str(caught.value.fix)


def test_a_file_of_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", pickled_dict({"a": tensor()}))
        archive.writestr("model/byteorder", "big")
        archive.writestr("model/data/0", STORED["0"])
    with pytest.raises(Umv2Error, match="big-endian"):
        load_state_dict(tmp_path / "model.pt")


def test_an_entry_that_stands_twice_is_refused(tmp_path: Path) -> None:
    write_archive(tmp_path / "model.pt", pickled_dict({"a": tensor()}), STORED)
    with zipfile.ZipFile(tmp_path / "model.pt", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("model/data/0", bytes(24))
    with pytest.raises(InputRejected, match="entries of"):
        load_state_dict(tmp_path / "model.pt")


def test_a_pickle_without_its_checksum_says_so(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(77.0)}, tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(data.replace(text("a"), text("b"), 1))
    with pytest.raises(InputRejected, match="not what its checksum says"):
        load_state_dict(tmp_path / "model.pt")


def test_a_value_of_the_pickle_is_shared_as_it_was_saved() -> None:
    value = read_pickle(b"\x80\x02]\x94h\x00\x86.", ())
    assert value[0] is value[1]


def test_a_name_alone_is_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="not a state dict"):
        load(tmp_path, pickled_dict({"a": global_name("torch.FloatStorage")}))
