"""Names of tensors as trainers write them -> those of the model itself."""

import base64
import binascii
from collections.abc import Mapping
from typing import TypeVar

from umv2_export.checkpoint.pickle_reader import read_pickle
from umv2_export.errors import InputRejected, Unsupported, shown

__all__ = ["decoded_names", "unwrapped_names"]

# Modules that wrap another one and add their attribute to its name: torch.compile, data parallelism, FSDP, activation
# checkpoints, Fabric.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")

# FSDP's one tensor of all parameters of a module, where it was not asked for the original ones.
_FLAT = ("_flat_param", "flat_param")

# An attribute that holds the model, as Lightning's modules have: part of every name, or of none.
_ATTRIBUTE = "model."

# The longest name of the released models has 70 characters.
MAX_NAME_BYTES = 4096

Value = TypeVar("Value")


def unwrapped_names(tensors: Mapping[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """The tensors under their names without wrappers, and the wrappers that were met.

    Raises:
        InputRejected: two names are the same without their wrappers.
        Unsupported: a tensor holds several parameters, joined.
    """
    found: list[str] = []
    result: dict[str, Value] = {}
    attribute = bool(tensors) and all(name.startswith(_ATTRIBUTE) for name in map(_without_wrappers, tensors))
    if attribute:
        found.append(_ATTRIBUTE)
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[-1] in _FLAT:
            raise Unsupported(
                f"tensor {name!r} holds all parameters of a module, flat and joined",
                why="FSDP saved its own shards",
                fix="save a full state dict: FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT)",
            )
        found += [f"{part}." for part in parts if part in WRAPPERS]
        short = _without_wrappers(name)
        short = short.removeprefix(_ATTRIBUTE) if attribute else short
        if short in result:
            raise InputRejected(
                f"two tensors are named {short!r}", why=f"{name!r} is one of them, once its wrappers are left out"
            )
        result[short] = tensor
    return result, list(dict.fromkeys(found))


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def decoded_names(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The tensors under their plain names, where `unshard.py --safe-tensors` wrote the names.

    Such a name is base64 of a pickle of ((name,), False). Names that are not base64 are plain ones already.

    Raises:
        InputRejected: a name is neither.
    """
    if any("." in name for name in tensors):
        return dict(tensors)
    result = {}
    for name, tensor in tensors.items():
        plain = _decoded(name)
        if plain in result:
            raise InputRejected(f"two tensors are named {plain!r}")
        result[plain] = tensor
    return result


def _decoded(name: str) -> str:
    problem = InputRejected(
        f"tensor name {shown(name)} is neither plain nor one of unshard.py --safe-tensors",
        why="its names are base64 of a pickled tuple ((name,), False); nothing else is decoded",
    )
    if len(name) > MAX_NAME_BYTES:
        raise problem
    try:
        value = read_pickle(base64.b64decode(name, altchars=b"-_", validate=True), allowed=())
    except (binascii.Error, ValueError, InputRejected) as error:
        raise problem from error
    match value:
        case ((str(plain),), False):
            return plain
        case (tuple(_), True):
            raise InputRejected(f"tensor {shown(name)} is a pickled value, not a tensor", fix="save the model alone")
        case _:
            raise problem
