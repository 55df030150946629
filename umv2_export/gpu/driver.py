"""The CUDA driver: what GPU there is, and the launch of a compiled kernel. Free of torch and of the CUDA toolkit."""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from umv2_export.errors import EnvironmentUnfit

__all__ = [
    "Argument",
    "Device",
    "Function",
    "compute_capability",
    "device_count",
    "device_name",
    "open_device",
    "pointer",
    "size",
]

LIBRARY = "libcuda.so.1"

# Numbers of the driver's interface, which never change.
_NO_DEVICE = 100
_MAJOR, _MINOR = 75, 76
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

# What a kernel may use without asking.
DEFAULT_SHARED_BYTES = 48 * 1024

Argument = ctypes.c_uint64 | ctypes.c_int32
"""An argument of a kernel: a pointer or a size."""

pointer = ctypes.c_uint64
size = ctypes.c_int32

_HANDLE, _INT, _POINTER, _BYTES, _TEXT = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_size_t,
    ctypes.c_char_p,
)

# Functions and their parameters; all return a result code.
_SIGNATURES: dict[str, list[object]] = {
    "cuInit": [ctypes.c_uint],
    "cuGetErrorName": [_INT, ctypes.POINTER(_TEXT)],
    "cuGetErrorString": [_INT, ctypes.POINTER(_TEXT)],
    "cuDeviceGetCount": [ctypes.POINTER(_INT)],
    "cuDeviceGet": [ctypes.POINTER(_INT), _INT],
    "cuDeviceGetName": [_TEXT, _INT, _INT],
    "cuDeviceGetAttribute": [ctypes.POINTER(_INT), _INT, _INT],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_HANDLE), _INT],
    "cuDevicePrimaryCtxRelease_v2": [_INT],
    "cuCtxSetCurrent": [_HANDLE],
    "cuCtxSynchronize": [],
    "cuStreamCreate": [ctypes.POINTER(_HANDLE), ctypes.c_uint],
    "cuStreamDestroy_v2": [_HANDLE],
    "cuModuleLoadData": [ctypes.POINTER(_HANDLE), _TEXT],
    "cuModuleUnload": [_HANDLE],
    "cuModuleGetFunction": [ctypes.POINTER(_HANDLE), _HANDLE, _TEXT],
    "cuFuncSetAttribute": [_HANDLE, _INT, _INT],
    "cuLaunchKernel": [
        _HANDLE,
        *[ctypes.c_uint] * 7,
        _HANDLE,
        ctypes.POINTER(_HANDLE),
        ctypes.POINTER(_HANDLE),
    ],
    "cuMemAlloc_v2": [ctypes.POINTER(_POINTER), _BYTES],
    "cuMemFree_v2": [_POINTER],
    "cuMemcpyHtoD_v2": [_POINTER, _TEXT, _BYTES],
    "cuMemcpyDtoH_v2": [_TEXT, _POINTER, _BYTES],
}


def device_count() -> int:
    """Number of GPUs, at least one.

    Raises:
        EnvironmentUnfit: there is no driver or no GPU.
    """
    count = _INT()
    _call("cuDeviceGetCount", ctypes.byref(count))
    return count.value


def device_name(number: int = 0) -> str:
    """Name of a GPU, such as NVIDIA L4.

    Raises:
        EnvironmentUnfit: there is no driver or no such GPU.
    """
    name = ctypes.create_string_buffer(256)
    _call("cuDeviceGetName", name, len(name), _device(number))
    return name.value.decode(errors="replace")


def compute_capability(number: int = 0) -> str:
    """Compute capability of a GPU, such as 8.9.

    Raises:
        EnvironmentUnfit: there is no driver or no such GPU.
    """
    device = _device(number)
    parts = []
    for attribute in (_MAJOR, _MINOR):
        part = _INT()
        _call("cuDeviceGetAttribute", ctypes.byref(part), attribute, device)
        parts.append(part.value)
    return ".".join(map(str, parts))


class Function:
    """A kernel of a loaded module.

    Args:
        handle: of the driver.
        shared_bytes: dynamic shared memory of every launch.
    """

    def __init__(self, handle: ctypes.c_void_p, shared_bytes: int) -> None:
        self._handle = handle
        self._shared_bytes = shared_bytes
        if shared_bytes > DEFAULT_SHARED_BYTES:
            _call("cuFuncSetAttribute", handle, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Argument],
        *,
        stream: int = 0,
    ) -> None:
        """Start the kernel; errors of its run come with the next `synchronize`.

        Args:
            grid: programs along x, y and z.
            block: threads of a program.
            arguments: in order, each a `pointer` or a `size`.
            stream: handle; 0 is the default stream.

        Raises:
            EnvironmentUnfit: the driver refuses the launch.
        """
        places = (_HANDLE * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        _call("cuLaunchKernel", self._handle, *grid, *block, self._shared_bytes, stream, places, None)


class Device:
    """A GPU whose primary context is current; `open_device` makes one."""

    def __init__(self) -> None:
        self._modules: list[ctypes.c_void_p] = []
        self._streams: list[ctypes.c_void_p] = []
        self._memory: list[int] = []

    def load(self, image: bytes, entry: str, *, shared_bytes: int = 0) -> Function:
        """A kernel of an image.

        Args:
            image: cubin or PTX.
            entry: its name in the image.
            shared_bytes: dynamic shared memory of its launches.

        Raises:
            EnvironmentUnfit: the driver refuses the image, or it has no such kernel.
        """
        module, function = _HANDLE(), _HANDLE()
        # A bytes object ends with a zero, as PTX must.
        _call("cuModuleLoadData", ctypes.byref(module), image)
        self._modules.append(module)
        _call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        return Function(function, shared_bytes)

    def stream(self) -> int:
        """Handle of a new stream, destroyed with the device; it and the copies of this class wait for each other."""
        stream = _HANDLE()
        _call("cuStreamCreate", ctypes.byref(stream), 0)
        self._streams.append(stream)
        return stream.value or 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What the block allocates is freed at its end; what a failed block leaves, with the device."""
        before = len(self._memory)
        yield
        while len(self._memory) > before:
            _call("cuMemFree_v2", self._memory.pop())

    def allocate(self, count: int) -> int:
        """Address of `count` bytes, freed with the device."""
        address = _POINTER()
        _call("cuMemAlloc_v2", ctypes.byref(address), max(1, count))
        self._memory.append(address.value)
        return address.value

    def upload(self, data: bytes) -> int:
        """Address of a copy of `data`, freed with the device."""
        address = self.allocate(len(data))
        _call("cuMemcpyHtoD_v2", address, data, len(data))
        return address

    def download(self, address: int, count: int) -> bytes:
        """`count` bytes at an address, when the launches before have ended."""
        data = ctypes.create_string_buffer(count)
        _call("cuMemcpyDtoH_v2", data, address, count)
        return data.raw

    def synchronize(self) -> None:
        """Wait for all launches.

        Raises:
            EnvironmentUnfit: one of them failed.
        """
        _call("cuCtxSynchronize")

    def _free(self) -> None:
        for address in self._memory:
            _call("cuMemFree_v2", address)
        for stream in self._streams:
            _call("cuStreamDestroy_v2", stream)
        for module in self._modules:
            _call("cuModuleUnload", module)


@contextmanager
def open_device(number: int = 0) -> Iterator[Device]:
    """A GPU, with its primary context current in this thread; at the end its modules and memory are freed.

    Raises:
        EnvironmentUnfit: there is no driver or no such GPU.
    """
    handle, context = _device(number), _HANDLE()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    try:
        _call("cuCtxSetCurrent", context)
        device = Device()
        yield device
        device._free()
    finally:
        # What a failed block leaves goes with the context.
        _call("cuDevicePrimaryCtxRelease_v2", handle)


def _device(number: int) -> ctypes.c_int:
    handle = _INT()
    _call("cuDeviceGet", ctypes.byref(handle), number)
    return handle


def _call(name: str, *arguments: object) -> None:
    library = _library()
    _check(library, name, getattr(library, name)(*arguments))


@functools.cache
def _library() -> ctypes.CDLL:
    """The driver, loaded and started."""
    try:
        library = ctypes.CDLL(LIBRARY)
        for name, parameters in _SIGNATURES.items():
            getattr(library, name).argtypes = parameters
    except (OSError, AttributeError) as error:
        raise EnvironmentUnfit(
            "there is no CUDA driver",
            why=str(error),
            fix="install the driver of NVIDIA; a container also needs the runtime option --gpus all",
        ) from error
    _check(library, "cuInit", library.cuInit(0))
    return library


def _check(library: ctypes.CDLL, name: str, result: int) -> None:
    if not result:
        return
    texts = []
    for describe in (library.cuGetErrorName, library.cuGetErrorString):
        text = _TEXT()
        describe(result, ctypes.byref(text))
        texts.append((text.value or b"unknown error").decode(errors="replace"))
    why = f"{texts[0]} ({result}): {texts[1]}"
    if result == _NO_DEVICE:
        raise EnvironmentUnfit("there is no GPU", why=why, fix="see what nvidia-smi says")
    raise EnvironmentUnfit(f"the CUDA driver refused {name}", why=why)
