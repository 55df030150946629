"""Optimisation profiles: the ranges of shapes that an engine accepts.

All dynamic axes of a graph are made of three sizes: batch, sequence (new tokens) and past (cached positions). A shape
that the user gives for one input fixes sizes, and these hold for every input.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umv2_export.errors import InputRejected, InvalidRequest, Unsupported

__all__ = ["BOUNDS", "MOST_ELEMENTS", "Bounds", "Profile", "ValueInfo", "check_profiles", "plan_profiles"]

BOUNDS = ("min", "opt", "max")

# Smallest, most frequent and largest size.
Bounds = tuple[int, int, int]

# Axis names of the graph.
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"

# Attention over an empty cache is what prefill does; a batch or a sequence of 0 computes nothing.
_SMALLEST = {BATCH: 1, SEQUENCE: 1, PAST: 0}

# TensorRT's documented limit. The RTX 1.7 builder takes larger tensors without a word (tried: a table of 2^31 + 64
# elements, logits of 4.3e9), and whether its kernels can address them was not tried.
MOST_ELEMENTS = 2**31 - 1

DEFAULT_BATCH: Bounds = (1, 1, 8)
DEFAULT_PREFILL = 128


@dataclass(frozen=True)
class ValueInfo:
    """An input or output of a graph.

    Attributes:
        name: of the tensor.
        dtype: as the manifest of a bundle writes it: float, float16, bfloat16, int64.
        axes: sizes, and names of dynamic axes.
    """

    name: str
    dtype: str
    axes: tuple[int | str, ...]

    @property
    def dims(self) -> list[int]:
        """Sizes with -1 for dynamic axes, as TensorRT writes them."""
        return [axis if isinstance(axis, int) else -1 for axis in self.axes]

    def as_dict(self) -> dict[str, object]:
        """For a manifest."""
        return {"name": self.name, "dtype": self.dtype, "axes": list(self.axes)}


@dataclass(frozen=True)
class Profile:
    """Ranges of the three sizes; past + sequence follows from them.

    Attributes:
        name: prefill or decode.
        batch: sequences.
        sequence: new tokens of a sequence.
        past: cached positions of a sequence.
    """

    name: str
    batch: Bounds
    sequence: Bounds
    past: Bounds

    def shape(self, tensor: ValueInfo, bound: int) -> list[int]:
        """Shape of a tensor at a bound, an index of `BOUNDS`."""
        sizes = {BATCH: self.batch[bound], SEQUENCE: self.sequence[bound], PAST: self.past[bound]}
        sizes[TOTAL] = sizes[SEQUENCE] + sizes[PAST]
        # The exporter names the length of the new cache "past_sequence + sequence".
        return [
            axis if isinstance(axis, int) else sum(sizes[term] for term in axis.split(" + ")) for axis in tensor.axes
        ]

    def shapes(self, inputs: Sequence[ValueInfo]) -> dict[str, dict[str, list[int]]]:
        """Input name -> bound -> shape."""
        return {
            tensor.name: {name: self.shape(tensor, bound) for bound, name in enumerate(BOUNDS)} for tensor in inputs
        }


def plan_profiles(
    inputs: Sequence[ValueInfo], max_sequence_length: int, shapes: Mapping[str, Sequence[str]]
) -> list[Profile]:
    """The profiles `prefill` and `decode`.

    Without shapes, prefill takes 1 to `max_sequence_length` new tokens, and both take 0 to `max_sequence_length` - 1
    cached positions. Shapes of the user hold for prefill, and for decode but for its sequence, which is always 1. A
    bound that is not given is the default, moved as far as the given ones demand.

    Args:
        inputs: of the graph.
        max_sequence_length: of the model, tokens.
        shapes: bound (`BOUNDS`) -> what the user typed, such as "input_ids:1x16".

    Raises:
        InvalidRequest: an input that the graph has not, a shape that does not fit it, or bounds out of order.
        InputRejected: an axis of the graph is none that a bundle has.
    """
    for tensor in inputs:
        for axis in tensor.axes:
            if isinstance(axis, str) and axis not in (*_SMALLEST, TOTAL):
                raise InputRejected(f"input {tensor.name!r} has the unknown axis {axis!r}")
    given = [_sizes(inputs, bound, shapes.get(bound, ())) for bound in BOUNDS]
    prefill = {
        BATCH: DEFAULT_BATCH,
        SEQUENCE: (1, min(DEFAULT_PREFILL, max_sequence_length), max_sequence_length),
        PAST: (0, 0, max_sequence_length - 1),
    }
    decode = {**prefill, PAST: (0, max_sequence_length // 2, max_sequence_length - 1)}
    ranges = {axis: _range("prefill", axis, given, default) for axis, default in prefill.items()}
    past = _range("decode", PAST, given, decode[PAST])
    return [
        Profile("prefill", ranges[BATCH], ranges[SEQUENCE], ranges[PAST]),
        Profile("decode", ranges[BATCH], (1, 1, 1), past),
    ]


def check_profiles(profiles: Sequence[Profile], tensors: Sequence[ValueInfo], where: Path) -> None:
    """Refuse profiles at whose upper end an input or output is too large.

    Raises:
        Unsupported: one is.
    """
    for profile in profiles:
        for tensor in tensors:
            shape = profile.shape(tensor, 2)
            if math.prod(shape) > MOST_ELEMENTS:
                raise Unsupported(
                    f"profile {profile.name!r}: {tensor.name!r} has up to {math.prod(shape)} elements, shape {shape}",
                    where=where,
                    why=f"TensorRT counts to {MOST_ELEMENTS} elements of a tensor",
                    fix="give smaller --max-shapes, such as input_ids:1x1024",
                )


def _sizes(inputs: Sequence[ValueInfo], bound: str, texts: Sequence[str]) -> dict[str, int]:
    """Axis name -> size, as the shapes of one bound fix them."""
    option = f"--{bound}-shapes"
    known = {tensor.name: tensor for tensor in inputs}
    sizes: dict[str, int] = {}
    for text in texts:
        name, _, shape = text.rpartition(":")
        if not name or not re.fullmatch(r"[0-9]{1,10}(x[0-9]{1,10})*", shape):
            raise InvalidRequest(f"{option} {text!r} is not a shape of an input", fix="write input_ids:1x16")
        if name not in known:
            raise InvalidRequest(
                f"{option} names {name!r}, which is not an input of the graph", fix="inputs: " + ", ".join(known)
            )
        axes, dims = known[name].axes, [int(size) for size in shape.split("x")]
        if len(dims) != len(axes):
            wanted = " x ".join(map(str, axes))
            raise InvalidRequest(f"{option} {text!r} has {len(dims)} axes, the input has {len(axes)}: {wanted}")
        for axis, size in zip(axes, dims, strict=True):
            expected = axis if isinstance(axis, int) else sizes.setdefault(axis, size)
            if size != expected:
                raise InvalidRequest(
                    f"{option} {text!r} has {size} where {expected} must stand",
                    why="that axis is fixed in the graph"
                    if isinstance(axis, int)
                    else f"another shape of {option} gives axis {axis!r} that size",
                )
    _resolve_total(sizes, option)
    for axis, smallest in _SMALLEST.items():
        if sizes.get(axis, smallest) < smallest:
            raise InvalidRequest(f"{option} makes {axis} {sizes[axis]}, the graph takes {smallest} or more")
    return sizes


def _resolve_total(sizes: dict[str, int], option: str) -> None:
    """Replace past + sequence by the one of both that is not given."""
    if TOTAL not in sizes:
        return
    total = sizes.pop(TOTAL)
    if SEQUENCE in sizes:
        past = sizes.setdefault(PAST, total - sizes[SEQUENCE])
        if past + sizes[SEQUENCE] != total:
            raise InvalidRequest(
                f"{option} gives {past} cached and {sizes[SEQUENCE]} new positions, and attention_mask {total} in all",
                why="the mask covers cached and new positions",
            )
    elif PAST in sizes:
        sizes[SEQUENCE] = total - sizes[PAST]
    else:
        raise InvalidRequest(
            f"{option} gives attention_mask {total} positions, and not how many of them are cached",
            fix="name input_ids too",
        )


def _range(profile: str, axis: str, given: Sequence[Mapping[str, int]], default: Bounds) -> Bounds:
    """The range of one size: what is given, and the default where nothing is."""
    low, middle, high = (sizes.get(axis) for sizes in given)
    stated = [size for size in (low, middle, high) if size is not None]
    low = min(default[0], *stated) if low is None and stated else default[0] if low is None else low
    high = max(default[2], *stated) if high is None and stated else default[2] if high is None else high
    middle = min(max(default[1], low), high) if middle is None else middle
    if not low <= middle <= high:
        raise InvalidRequest(
            f"profile {profile!r}: {axis} has min {low}, opt {middle}, max {high}", why="it must hold min <= opt <= max"
        )
    return low, middle, high
