"""Nodes of a graph: which compiled kernel serves one, the sizes and the grid it is launched with, its outputs.

Dimensions are ints, or expressions of a runtime that builds an engine before it knows them. Of an expression only
`+`, `-` and `*` are used, with the expression on the left, so one code serves both. Where a dimension must be a number,
a function that the caller passes tells it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from umv2_export.errors import Unsupported
from umv2_export.gpu.arguments import MAX_SIZE
from umv2_export.gpu.index import CompiledKernel
from umv2_export.gpu.lookup_variants import LookupVariant, is_gelu
from umv2_export.gpu.topk_variants import MAX_ADDRESSES, TopkVariant
from umv2_export.gpu.variants import Variant

__all__ = ["Dimension", "Known", "LookupNode", "Node", "TopkNode", "choose_kernel"]

Dimension = Any
"""An int, or an expression of a runtime."""

Known = Callable[[Dimension], int | None]
"""The number that a dimension has; None: it is not known yet."""

_FIX = "compile the kernels of this bundle: umv2-export kernels BUNDLE -o KERNELS"


@dataclass(frozen=True)
class Node(ABC):
    """One node of a graph.

    Attributes:
        shapes: input -> dimensions, in the order of the op.
        dtypes: input -> element type, such as float16.
    """

    op: ClassVar[str]

    shapes: Mapping[str, Sequence[Dimension]]
    dtypes: Mapping[str, str]

    @property
    @abstractmethod
    def outputs(self) -> list[tuple[tuple[Dimension, ...], str | None]]:
        """Shape of each output, and the input whose dtype it has; None: int64."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Dimension]:
        """The values of the arguments of kind `size`, by name."""

    @property
    @abstractmethod
    def programs(self) -> dict[str, Dimension]:
        """The values of the names that a grid is written in."""

    @property
    @abstractmethod
    def decisive(self) -> list[Dimension]:
        """The dimensions that choose between kernels."""

    @abstractmethod
    def misfits(self, variant: Variant, known: Known) -> Iterator[str]:
        """Why a kernel cannot serve the node; dimensions that are not known are taken to fit."""

    def size_arguments(self, kernel: CompiledKernel) -> list[Dimension]:
        """The values of the kernel's arguments of kind `size`, in order."""
        return [self.sizes[argument["name"]] for argument in kernel.arguments if argument["kind"] == "size"]

    def grid(self, kernel: CompiledKernel) -> tuple[Dimension, Dimension, Dimension]:
        """Programs along x, y and z."""
        x, y, z = (self.programs[name] if name in self.programs else int(name) for name in kernel.grid)
        return x, y, z


@dataclass(frozen=True)
class TopkNode(Node):
    """A node TuckerTopK, with its attributes."""

    op = TopkVariant.op

    row_topk: int
    topk: int

    @property
    def outputs(self) -> list[tuple[tuple[Dimension, ...], str | None]]:
        """Addresses [T, H*K] and scores [T, H*K, C]."""
        tokens, heads = self.shapes["row_scores"][0], self.shapes["u"][0]
        hits = heads * self.topk
        return [((tokens, hits), None), ((tokens, hits, self.shapes["cores"][0]), "row_scores")]

    @property
    def sizes(self) -> dict[str, Dimension]:
        """N, M and K."""
        return {"keys_per_side": self.shapes["row_scores"][2], "row_topk": self.row_topk, "topk": self.topk}

    @property
    def programs(self) -> dict[str, Dimension]:
        """One for each token and head."""
        return {"tokens": self.shapes["row_scores"][0], "heads": self.shapes["u"][0]}

    @property
    def decisive(self) -> list[Dimension]:
        """R and C."""
        return [self.shapes["u"][1], self.shapes["cores"][0]]

    def misfits(self, variant: Variant, known: Known) -> Iterator[str]:
        """See `Node.misfits`."""
        if not isinstance(variant, TopkVariant):
            yield f"it is a kernel of {variant.op}"
            return
        yield from _different(
            ("scores", _element(variant.scores_dtype), self.dtypes["row_scores"]),
            ("ranks", variant.ranks, known(self.shapes["u"][1])),
            ("cores", variant.cores, known(self.shapes["cores"][0])),
        )
        keys_per_side = known(self.shapes["row_scores"][2])
        yield from _too_small(
            ("row_topk", variant.block_m, self.row_topk),
            ("topk", variant.block_k, self.topk),
            ("addresses", MAX_ADDRESSES, None if keys_per_side is None else keys_per_side**2),
        )


@dataclass(frozen=True)
class LookupNode(Node):
    """A node MemoryLookup, with its attributes.

    Raises:
        InputRejected: the activation is none that the op has.
    """

    op = LookupVariant.op

    pre_value_dim: int
    activation: str
    rows_per_shard: int
    groups: int = 1

    def __post_init__(self) -> None:
        is_gelu(self.activation)

    @property
    def value_dim(self) -> Dimension:
        """V."""
        return self.shapes["rows_0"][1] - self.pre_value_dim

    @property
    def table_rows(self) -> Dimension:
        """Rows of all shards."""
        first, *others = [shape[0] for name, shape in self.shapes.items() if name.startswith("rows_")]
        for rows in others:
            first = first + rows
        return first

    @property
    def outputs(self) -> list[tuple[tuple[Dimension, ...], str | None]]:
        """The sums [T, G*V]."""
        return [((self.shapes["indices"][0], self.value_dim * self.groups), "scores")]

    @property
    def sizes(self) -> dict[str, Dimension]:
        """Hits of a token, rows of all shards and of one, P and V."""
        return {
            "hits": self.shapes["indices"][1],
            "table_rows": self.table_rows,
            "rows_per_shard": self.rows_per_shard,
            "pre_value_dim": self.pre_value_dim,
            "value_dim": self.value_dim,
        }

    @property
    def programs(self) -> dict[str, Dimension]:
        """One for each token and group."""
        return {"tokens": self.shapes["indices"][0], "groups": self.groups}

    @property
    def decisive(self) -> list[Dimension]:
        """P + V and C."""
        return [self.shapes["rows_0"][1], self.shapes["scores"][2]]

    def misfits(self, variant: Variant, known: Known) -> Iterator[str]:
        """See `Node.misfits`."""
        if not isinstance(variant, LookupVariant):
            yield f"it is a kernel of {variant.op}"
            return
        if variant.split:
            # What launches one kernel and has no memory beside inputs and outputs cannot add splits.
            yield "it sums splits, which another kernel adds"
        width = known(self.shapes["rows_0"][1])
        value_dim = None if width is None else width - self.pre_value_dim
        yield from _different(
            ("scores", _element(variant.scores_dtype), self.dtypes["scores"]),
            ("rows", _element(variant.rows_dtype), self.dtypes["rows_0"]),
            ("cores", variant.cores, known(self.shapes["scores"][2])),
            ("groups", "several" if variant.grouped else "one", "several" if self.groups > 1 else "one"),
            ("pre-values", variant.pre_values, self.pre_value_dim > 0),
            ("activation", "gelu" if variant.gelu else "none", self.activation),
        )
        yield from _too_small(
            ("shards", variant.shards, sum(name.startswith("rows_") for name in self.shapes)),
            ("pre_value_dim", variant.block_p, self.pre_value_dim),
            ("value_dim", variant.block_v, value_dim),
            ("rows", MAX_SIZE, known(self.table_rows)),
        )
        for name, size in (("pre_value_dim", self.pre_value_dim), ("value_dim", value_dim)):
            if size is not None and size % variant.divisor:
                yield f"{name} in multiples of {variant.divisor}, not {size}"


def choose_kernel(kernels: Sequence[CompiledKernel], node: Node, known: Known = int) -> CompiledKernel:
    """The kernel that serves a node.

    Args:
        kernels: of one architecture, in the order of their index.
        node: to be served.
        known: the number that a dimension has, or None.

    Raises:
        Unsupported: no kernel fits, or several do and the dimensions that choose between them are not known.
    """
    fitting, misfits = [], []
    for kernel in kernels:
        if kernel.op != node.op:
            continue
        reasons = list(node.misfits(kernel.typed_variant(), known))
        if reasons:
            misfits.append(f"{kernel.name}: {'; '.join(reasons)}")
        else:
            fitting.append(kernel)
    if not fitting:
        raise Unsupported(
            f"no compiled kernel fits a node {node.op}", why="\n".join(misfits) or "there is none of this op", fix=_FIX
        )
    if len(fitting) > 1 and any(known(dimension) is None for dimension in node.decisive):
        names = ", ".join(kernel.name for kernel in fitting)
        raise Unsupported(
            f"several kernels may fit a node {node.op}", why=f"its dimensions are not known yet: {names}", fix=_FIX
        )
    # All compute the same, and the index has the one of the least waste first.
    return fitting[0]


def _element(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _different(*facts: tuple[str, object, object]) -> Iterator[str]:
    """Facts (name, of the kernel, of the node) that differ."""
    for name, own, asked in facts:
        if asked is not None and own != asked:
            yield f"{name} {own} instead of {asked}"


def _too_small(*facts: tuple[str, int, int | None]) -> Iterator[str]:
    """Facts (name, at most, of the node) that do not hold."""
    for name, limit, asked in facts:
        if asked is not None and asked > limit:
            yield f"{name} up to {limit}, not {asked}"
