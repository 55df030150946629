"""The tensors of the authors' state dicts -> ours: other names for experts, and what no forward reads left out."""

import re
from collections.abc import Mapping

from umv2_export.checkpoint.checkpoint import CheckpointTensor
from umv2_export.checkpoint.official_config import SIZE, OfficialModel, TensorFacts
from umv2_export.errors import InputRejected

__all__ = ["our_tensors", "tensor_facts"]

# Derived copies of the cores that forks of the released code save.
IGNORED_TENSORS = ("tucker_core_uv", "tucker_core_stacked")

_MEMORY_LAYER = re.compile(r"transformer\.mem_blocks\.(\d{1,6})\.(.+)")
_EXPERTS = re.compile(r"(transformer\.blocks\.\d{1,6}\.)ffn\.(experts\.mlp\.(?:w1|v1|w2)|router\.layer\.weight)")


def our_tensors(theirs: Mapping[str, CheckpointTensor], model: OfficialModel) -> dict[str, CheckpointTensor]:
    """Name the tensors as `tensor_shapes` does.

    Memory layers whose output is never added are left out, and the others counted anew.

    Raises:
        InputRejected: a router or a stack of experts is missing, or has another shape.
    """
    position = {old: new for new, old in enumerate(model.insertion.added)}
    ours: dict[str, CheckpointTensor] = {}
    stacks: dict[str, dict[str, CheckpointTensor]] = {}
    for name, tensor in theirs.items():
        if name.rpartition(".")[2] in IGNORED_TENSORS:
            continue
        if layer := _MEMORY_LAYER.fullmatch(name):
            old = int(layer[1])
            if old < model.insertion.layers and old not in position:
                continue
            new_name = f"transformer.mem_blocks.{position.get(old, old)}.{layer[2]}"
            ours[new_name] = tensor.renamed(new_name)
        elif model.kind == "none" and name.startswith("transformer.full_memory_layer."):
            continue  # their Memory+ makes its table even where no layer reads it
        elif model.has_experts and (expert := _EXPERTS.fullmatch(name)):
            stacks.setdefault(expert[1], {})[expert[2]] = tensor
        else:
            ours[name] = tensor
    if model.has_experts:
        sizes = model.fields.read("moe_num_experts", SIZE), model.expert_size, model.fields.read("d_model", SIZE)
        for i in range(model.fields.read("n_layers", SIZE)):
            block = f"transformer.blocks.{i}."
            ours |= _experts(block, stacks.pop(block, {}), sizes)
    # Blocks that the configuration does not have: refused, by their own names.
    return ours | {f"{block}ffn.{name}": tensor for block, stack in stacks.items() for name, tensor in stack.items()}


def _experts(
    block: str, stack: Mapping[str, CheckpointTensor], sizes: tuple[int, int, int]
) -> dict[str, CheckpointTensor]:
    """The experts of a block, from w1, v1 and w2 [E * I, d]: silu(x w1) * (x v1), then w2 transposed.

    Args:
        block: its name, with a dot behind.
        stack: its tensors, by their names behind `ffn.`.
        sizes: experts E, inner size I, hidden size d.
    """
    count, inner, width = sizes
    shapes = {"router.layer.weight": (count, width)}
    shapes |= {f"experts.mlp.{name}": (count * inner, width) for name in ("w1", "v1", "w2")}
    for name, shape in shapes.items():
        if name not in stack:
            raise InputRejected(f"tensor '{block}ffn.{name}' missing", why="the configuration asks for it")
        if stack[name].shape != shape:
            raise InputRejected(
                f"tensor '{block}ffn.{name}' has shape {list(stack[name].shape)}, the configuration says {list(shape)}",
                why=f"{count} experts of inner size {inner}",
            )
    tensors = {block + "router.weight": stack["router.layer.weight"].renamed(block + "router.weight")}
    gate, linear, out = (stack[f"experts.mlp.{name}"].joined().chunk(count) for name in ("w1", "v1", "w2"))
    for e in range(count):
        for name, parts, transposed in (("ff_proj", [linear[e], gate[e]], False), ("ff_out", [out[e]], True)):
            full = f"{block}experts.{e}.{name}.weight"
            allow = stack["experts.mlp.w1"].allow_non_finite
            tensors[full] = CheckpointTensor(full, parts, allow, axis=0, transposed=transposed)
    return tensors


def tensor_facts(ours: Mapping[str, CheckpointTensor], model: OfficialModel) -> TensorFacts | None:
    """What the first memory layer's shapes tell; None without memory layers.

    Raises:
        InputRejected: its keys or cores are missing, or have other dimensions.
    """
    if model.kind == "none":
        return None
    layer = "transformer.mem_blocks.0."
    keys = ours.get(layer + "keys")
    if keys is None:
        raise InputRejected(f"tensor '{layer}keys' missing", why="the configuration has memory layers")
    if model.kind == "memory_plus":
        return TensorFacts(1, 1, 1)
    cores = sum(name.startswith(layer + "tucker_core.") for name in ours)
    if not cores or len(keys.shape) != 5 or not keys.shape[-1]:
        raise InputRejected(
            f"tensor '{layer}keys' has shape {list(keys.shape)} and there are {cores} '{layer}tucker_core.*'",
            why="expected keys [heads, 2, keys per side, key size, Tucker rank] and at least one core",
        )
    projection, value_dim = ours.get(layer + "values_proj.weight"), model.fields.read("mem_vdim", SIZE)
    groups = 1 if projection is None or len(projection.shape) != 2 else max(1, projection.shape[1] // value_dim)
    return TensorFacts(keys.shape[-1], cores, groups)
