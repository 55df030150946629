"""Launches compiled kernels through the driver, with the arguments in TensorRT's order; run as a process of its own.

python -m tests.gpu.launch_compiled CASE=FOLDER... fails where a result is not that of the float64 oracle.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import oracle
from tests.gpu.compiled import CASES, TOPK_CASE, Case
from tests.models import GOLDEN
from tests.ops.test_memory_lookup import Lookup
from tests.ops.test_tucker_topk import ATOL, assert_same_hits, inputs
from umv2_export.checkpoint import open_checkpoint
from umv2_export.gpu import driver
from umv2_export.gpu.index import CompiledKernel, read_index
from umv2_export.gpu.nodes import LookupNode, Node, TopkNode, choose_kernel

TOKENS = 3
ROWS_PER_SHARD = 41


def launched(
    device: driver.Device, folder: Path, call: Node, arrays: Mapping[str, Any], *, as_cubin: bool
) -> list[np.ndarray[Any, Any]]:
    """The outputs of the kernel of `folder` that serves a call, on these inputs."""
    kernel: CompiledKernel = choose_kernel(read_index(folder), call)
    image = (folder / (kernel.cubin if as_cubin else kernel.ptx)).read_bytes()
    function = device.load(image, kernel.entry, shared_bytes=kernel.shared_bytes)
    outputs = []
    for shape, like in call.outputs:
        outputs.append(np.full(shape, -1, np.int64 if like is None else arrays[like].dtype))
    memory = [device.upload(array.tobytes()) for array in (*arrays.values(), *outputs)]
    sizes = [driver.size(size) for size in call.size_arguments(kernel)]
    pointers = [driver.pointer(address) for address in memory]
    arguments: list[driver.Argument] = [*pointers[: len(arrays)], *sizes, *pointers[len(arrays) :]]
    function.launch(call.grid(kernel), kernel.block, arguments)
    device.synchronize()
    return [
        np.frombuffer(device.download(address, array.nbytes), array.dtype).reshape(array.shape)
        for address, array in zip(memory[len(arrays) :], outputs, strict=True)
    ]


def check_lookup(device: driver.Device, case: Case, folder: Path, *, as_cubin: bool) -> None:
    """A lookup of the golden model's sizes against the oracle."""
    memory = case.memory
    lookup = Lookup(
        tokens=TOKENS,
        hits=memory.heads * memory.topk,
        shards=case.shards,
        rows=str(case.rows).removeprefix("torch.").replace("float32", "float"),
        pre_value_dim=memory.pre_value_dim,
        value_dim=memory.value_dim,
        cores=memory.tucker_cores,
        groups=memory.value_groups,
        activation=memory.activation,
        rows_per_shard=ROWS_PER_SHARD,
    )
    optional = {"group": lookup.group, "query": lookup.query, "row_scales": lookup.row_scales}
    arrays = {
        "indices": lookup.indices,
        "scores": lookup.scores,
        **{name: array for name, array in optional.items() if array is not None},
        **{f"rows_{s}": shard for s, shard in enumerate(lookup.rows)},
    }
    call = LookupNode(*_shapes(arrays), activation=memory.activation, **lookup.attributes)
    (found,) = launched(device, folder, call, arrays, as_cubin=as_cubin)
    np.testing.assert_allclose(found, lookup.by_oracle(), rtol=1e-5, atol=5e-5)


def check_topk(device: driver.Device, folder: Path, *, as_cubin: bool) -> None:
    """A top-k of the golden model's sizes against the oracle."""
    memory = open_checkpoint(GOLDEN[TOPK_CASE]).config.memory
    # Two heads, where the model has one: the sizes of a kernel are arguments.
    arrays = inputs(
        tokens=TOKENS, heads=2, keys=memory.stored_side, ranks=memory.tucker_rank, cores=memory.tucker_cores
    )
    row_topk, topk = memory.row_topk - 1, memory.topk
    found = launched(device, folder, TopkNode(*_shapes(arrays), row_topk, topk), arrays, as_cubin=as_cubin)
    truth = oracle.tucker_topk(*arrays.values(), row_topk=row_topk, topk=topk)
    assert_same_hits(found, list(truth), 2, ATOL[np.float32])


def _shapes(arrays: Mapping[str, Any]) -> tuple[dict[str, Sequence[int]], dict[str, str]]:
    return {name: array.shape for name, array in arrays.items()}, {name: str(a.dtype) for name, a in arrays.items()}


def main(arguments: Sequence[str]) -> None:
    """See the module."""
    folders = dict(argument.split("=", 1) for argument in arguments)
    torch.set_num_threads(1)
    with driver.open_device() as device:
        print(driver.device_name(), driver.compute_capability())
        for as_cubin in (False, True):
            check_topk(device, Path(next(iter(folders.values()))), as_cubin=as_cubin)
            for name, folder in folders.items():
                check_lookup(device, CASES[name], Path(folder), as_cubin=as_cubin)


if __name__ == "__main__":
    main(sys.argv[1:])
