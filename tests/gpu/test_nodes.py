"""Which kernel serves a node, and what it is launched with, from the shapes and attributes of the node."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.made_up import lookup, made_up_folder, topk
from tests.ops.test_memory_lookup import CASES, Lookup
from tests.ops.test_tucker_topk import inputs
from umv2_export.errors import Unsupported
from umv2_export.gpu.index import read_index
from umv2_export.gpu.nodes import LookupNode, TopkNode, choose_kernel
from umv2_export.ops import memory_lookup, tucker_topk

NAMES = ("indices", "scores", "group", "query", "row_scales")


def lookup_call(arguments: tuple[Any, ...]) -> LookupNode:
    """The node that calls the torch op with these arguments."""
    tensors = {name: tensor for name, tensor in zip(NAMES, arguments, strict=False) if tensor is not None}
    tensors |= {f"rows_{s}": shard for s, shard in enumerate(arguments[5])}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return LookupNode(shapes, dtypes, *arguments[6:])


def topk_call(row_topk: int = 8, topk: int = 8, **shape: Any) -> TopkNode:
    arrays = inputs(**{"tokens": 3, "heads": 2, "keys": 20} | shape)
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    return TopkNode({name: array.shape for name, array in arrays.items()}, dtypes, row_topk, topk)


@pytest.mark.parametrize("label", sorted(CASES))
def test_a_lookup_has_the_output_of_the_op(label: str) -> None:
    arguments = Lookup(**CASES[label]).op_arguments()
    assert lookup_call(arguments).outputs == [(tuple(memory_lookup(*arguments).shape), "scores")]


def test_a_topk_has_the_outputs_of_the_op() -> None:
    tensors = [torch.from_numpy(array) for array in inputs(tokens=3, heads=2, keys=20, cores=3).values()]
    shapes = [tuple(output.shape) for output in tucker_topk(*tensors, 5, 7)]
    assert topk_call(5, 7, cores=3).outputs == [(shapes[0], None), (shapes[1], "row_scores")]


def test_sizes_and_grid_of_a_lookup(tmp_path: Path) -> None:
    call = lookup_call(Lookup(tokens=3, hits=8, shards=2, pre_value_dim=16, value_dim=32, groups=4).op_arguments())
    variant = lookup(shards=2, grouped=True, pre_value_dim=16)
    (kernel,) = read_index(made_up_folder(tmp_path, [variant]))
    assert choose_kernel([kernel], call) == kernel
    # hits, table_rows, rows_per_shard, pre_value_dim, value_dim.
    assert call.size_arguments(kernel) == [8, 9, 5, 16, 32]
    assert call.grid(kernel) == (3, 4, 1)


def test_sizes_and_grid_of_a_topk(tmp_path: Path) -> None:
    (kernel,) = read_index(made_up_folder(tmp_path, [topk()]))
    call = topk_call(row_topk=5, topk=7)
    assert choose_kernel([kernel], call) == kernel
    # keys_per_side, row_topk, topk.
    assert call.size_arguments(kernel) == [20, 5, 7]
    assert call.grid(kernel) == (3, 2, 1)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (lookup(scores_dtype=torch.float16, rows_dtype=torch.float16), "scores float16 instead of float32"),
        (lookup(rows_dtype=torch.bfloat16), "rows bfloat16 instead of float32"),
        (lookup(cores=4), "cores 4 instead of 2"),
        (lookup(grouped=True), "groups several instead of one"),
        (lookup(pre_value_dim=0), "pre-values False instead of True"),
        (lookup(gelu=True), "activation gelu instead of none"),
        (lookup(split=True), "it sums splits"),
        (lookup(pre_value_dim=16), "pre_value_dim up to 16, not 24"),
        (lookup(value_dim=16), "value_dim up to 16, not 40"),
        (lookup(pre_value_dim=32, value_dim=64), "pre_value_dim in multiples of 16, not 24"),
    ],
)
def test_a_lookup_that_no_kernel_fits_is_told_why(tmp_path: Path, variant: Any, reason: str) -> None:
    kernels = read_index(made_up_folder(tmp_path, [variant, topk()]))
    call = lookup_call(Lookup(pre_value_dim=24, value_dim=40).op_arguments())
    with pytest.raises(Unsupported, match="no compiled kernel fits a node MemoryLookup") as caught:
        choose_kernel(kernels, call)
    assert reason in str(caught.value.why)
    assert "umv2-export kernels" in str(caught.value.fix)


def test_a_lookup_of_more_shards_than_a_kernel_has_is_told_so(tmp_path: Path) -> None:
    kernels = read_index(made_up_folder(tmp_path, [lookup(shards=2)]))
    with pytest.raises(Unsupported) as caught:
        choose_kernel(kernels, lookup_call(Lookup(shards=3, pre_value_dim=24).op_arguments()))
    assert "shards up to 2, not 3" in str(caught.value.why)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (topk(scores_dtype=torch.bfloat16), "scores bfloat16 instead of float32"),
        (topk(ranks=3), "ranks 3 instead of 2"),
        (topk(cores=1), "cores 1 instead of 2"),
        (topk(row_topk=4), "row_topk up to 4, not 8"),
        (topk(topk=4), "topk up to 4, not 8"),
    ],
)
def test_a_topk_that_no_kernel_fits_is_told_why(tmp_path: Path, variant: Any, reason: str) -> None:
    kernels = read_index(made_up_folder(tmp_path, [variant, lookup()]))
    with pytest.raises(Unsupported) as caught:
        choose_kernel(kernels, topk_call())
    assert reason in str(caught.value.why)


def test_more_rows_than_a_size_counts_have_no_kernel(tmp_path: Path) -> None:
    kernels = read_index(made_up_folder(tmp_path, [lookup(shards=2, value_dim=48)]))
    call = lookup_call(Lookup(shards=2, pre_value_dim=16, value_dim=48).op_arguments())
    for rows, fits in ((2**30 - 1, True), (2**30, False)):
        larger = replace(call, shapes={**call.shapes, "rows_0": (2**30, 64), "rows_1": (rows, 64)})
        if fits:
            assert choose_kernel(kernels, larger) == kernels[0]
        else:
            with pytest.raises(Unsupported, match="no compiled kernel fits"):
                choose_kernel(kernels, larger)


def test_addresses_beyond_31_bits_have_no_kernel(tmp_path: Path) -> None:
    kernels = read_index(made_up_folder(tmp_path, [topk()]))
    call = topk_call()
    for keys, fits in ((46_340, True), (46_341, False)):
        shapes = {**call.shapes, "row_scores": (3, 2, keys, 2)}
        larger = TopkNode(shapes, call.dtypes, call.row_topk, call.topk)
        if fits:
            assert choose_kernel(kernels, larger) == kernels[0]
        else:
            with pytest.raises(Unsupported):
                choose_kernel(kernels, larger)


def test_sizes_that_are_not_known_yet_leave_the_only_kernel_of_the_op(tmp_path: Path) -> None:
    kernels = read_index(made_up_folder(tmp_path, [topk(cores=1), lookup()]))
    [only] = [kernel for kernel in kernels if kernel.op == "TuckerTopK"]
    assert choose_kernel(kernels, topk_call(cores=2), lambda _: None) == only
    several = read_index(made_up_folder(tmp_path, [topk(cores=1), topk(cores=2)]))
    with pytest.raises(Unsupported, match="several kernels"):
        choose_kernel(several, topk_call(cores=2), lambda _: None)
