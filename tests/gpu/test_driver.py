"""The binding of the CUDA driver, against the stand-in driver in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.compiled import compiled_folder
from tests.gpu.stand_in import stand_in_environment, write_kernels
from umv2_export.errors import EnvironmentUnfit
from umv2_export.gpu import driver
from umv2_export.gpu.index import CompiledKernel, read_index

PRELUDE = """
import json
from pathlib import Path
from umv2_export.errors import EnvironmentUnfit
from umv2_export.gpu import driver

def refusal(function, *arguments):
    try:
        function(*arguments)
    except EnvironmentUnfit as error:
        return error.message()
"""


def run(script: str, **environment: Any) -> Any:
    """What a script prints as JSON, with the stand-in in place of a driver."""
    command = [sys.executable, "-c", PRELUDE + script]
    done = subprocess.run(command, env=stand_in_environment(**environment), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def lookup() -> tuple[Path, CompiledKernel]:
    """A compiled kernel and its folder."""
    folder = compiled_folder("plain", "8.9")
    return folder, next(kernel for kernel in read_index(folder) if kernel.op == "MemoryLookup")


def test_it_tells_what_gpu_there_is() -> None:
    script = "print(json.dumps([driver.device_count(), driver.device_name(), driver.compute_capability()]))"
    assert run(script, capability="12.0") == [1, "stand-in", "12.0"]


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-of-no-machine.so.1")
    driver._library.cache_clear()
    yield
    driver._library.cache_clear()


@pytest.mark.usefixtures("no_driver")
def test_a_machine_without_a_driver_is_told_what_to_do() -> None:
    with pytest.raises(EnvironmentUnfit, match="no CUDA driver") as caught:
        driver.compute_capability()
    assert caught.value.fix is not None
    assert "libcuda-of-no-machine" in str(caught.value.why)


def test_a_machine_without_a_gpu_is_told_so_in_the_words_of_the_driver() -> None:
    message = run("print(json.dumps(refusal(driver.device_count)))", devices=0)
    assert message.startswith("there is no GPU")
    assert "CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device is detected" in message


def test_what_was_uploaded_is_downloaded() -> None:
    script = """
with driver.open_device() as device:
    first, second = device.upload(b"seven\\0bytes"), device.upload(b"")
    print(json.dumps([device.download(first, 11).decode(), first % 256, first != second]))
"""
    assert run(script) == ["seven\0bytes", 0, True]


def test_memory_of_a_scope_is_freed_with_it_and_streams_are_live() -> None:
    script = """
import ctypes
library = driver._library()
def holds(address):
    return library.cuMemGetAddressRange_v2(*map(ctypes.byref, (ctypes.c_uint64(), ctypes.c_size_t())), address) == 0
with driver.open_device() as device:
    kept = device.upload(b"kept")
    with device.scope():
        left = ctypes.c_uint64(device.upload(b"left"))
        print(json.dumps([holds(left)]), end=" ")
    stream = device.stream()
    is_stream = library.cuStreamGetFlags(ctypes.c_void_p(stream), ctypes.byref(ctypes.c_uint())) == 0
    facts = [holds(left), device.download(kept, 4).decode(), is_stream, refusal(device.download, kept, 5) is None]
    print(json.dumps(facts))
"""
    command = [sys.executable, "-c", PRELUDE + script]
    done = subprocess.run(command, env=stand_in_environment(), capture_output=True, text=True, check=True)
    assert done.stdout == '[true] [false, "kept", true, false]\n'


def test_refusals_are_given_in_the_words_of_the_driver(lookup: tuple[Path, CompiledKernel]) -> None:
    folder, kernel = lookup
    script = f"""
ptx, cubin = (Path("{folder}", name).read_bytes() for name in ("{kernel.ptx}", "{kernel.cubin}"))
with driver.open_device() as device:
    known = device.load(cubin, "{kernel.entry}")
    print(json.dumps([
        refusal(device.load, b"neither", "x"),
        refusal(device.load, cubin, "another_kernel"),
        refusal(known.launch, (1, 1, 1), (1, 1, 1), []),
        refusal(driver.compute_capability, 7),
    ]))
"""
    kinds = ["INVALID_IMAGE (200)", "NOT_FOUND (500)", "NOT_SUPPORTED (801)", "INVALID_DEVICE (101)"]
    names = ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuDeviceGet"]
    for message, kind, name in zip(run(script), kinds, names, strict=True):
        assert f"CUDA_ERROR_{kind}: " in message
        assert message.startswith(f"the CUDA driver refused {name}\n")


@pytest.mark.parametrize("image", ["ptx", "cubin"])
def test_a_kernel_of_a_newer_architecture_is_refused(lookup: tuple[Path, CompiledKernel], image: str) -> None:
    folder, kernel = lookup
    script = f"""
image = Path("{folder}", "{getattr(kernel, image)}").read_bytes()
with driver.open_device() as device:
    print(json.dumps(refusal(device.load, image, "{kernel.entry}")))
"""
    assert run(script) is None
    assert "CUDA_ERROR_" in run(script, capability="8.6")


def test_shared_memory_above_48_kib_is_asked_for(lookup: tuple[Path, CompiledKernel], tmp_path: Path) -> None:
    folder, kernel = lookup
    kernels, log = tmp_path / "kernels.txt", tmp_path / "log.jsonl"
    write_kernels(kernels, [folder])
    script = f"""
image = Path("{folder}", "{kernel.ptx}").read_bytes()
with driver.open_device() as device:
    address = device.upload(bytes(4096))
    function = device.load(image, "{kernel.entry}", shared_bytes=65536)
    arguments = [driver.pointer(address)] * 3 + [driver.size(n) for n in (1, 4, 4, 0, 32)] + [driver.pointer(address)]
    function.launch((2, 1, 1), {kernel.block}, arguments, stream=5)
    device.synchronize()
print(json.dumps(address))
"""
    address = run(script, kernels=kernels, log=log)
    (launch,) = map(json.loads, log.read_text().splitlines())
    assert launch == {
        "entry": kernel.entry,
        "grid": [2, 1, 1],
        "block": list(kernel.block),
        "shared": 65536,
        "stream": 5,
        "arguments": [address, address, address, 1, 4, 4, 0, 32, address],
    }
