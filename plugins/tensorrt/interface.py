"""What the plugins ask of `tensorrt.plugin`, declared anew: it has no types, and is seldom at hand where it is checked.

`python_plugins` relies on the following, which was read and never tried against TensorRT itself:

- `register`, `autotune`, `aot_impl` and `impl` are decorators of functions that they inspect. Inputs come first, by
  name; attributes follow, under their names in the ONNX node; then `outputs`, and `tactic` or `stream`. Parameters are
  positional or keyword, without defaults. `register` demands annotations, `aot_impl` that of its result; where others
  have some, they are compared.
- A plugin name has one number of inputs, so nodes of another arity need another registration.
- Dimensions are expressions. While dtypes are found they are fake: they compute, and have no value. Those of weights
  are constant in every other call. Comparing two builds an expression too, and says nothing.
- A kernel is called with (inputs..., extra arguments..., outputs...), pointers and int32.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

__all__ = ["LaunchParameters", "PluginModule", "ShapeExpression", "SymbolicInts", "TensorDescription"]

Decorator = Callable[[Callable[..., Any]], object]


class ShapeExpression(Protocol):
    """A dimension that may be known only when the engine runs."""

    @property
    def is_fake(self) -> bool:
        """It stands for a dimension and has no value; the other facts may then not be asked for."""

    @property
    def is_constant(self) -> bool:
        """It is known when the engine is built."""

    def constant_value(self) -> int:
        """Its value, if it is known."""


class TensorDescription(Protocol):
    """An input or output while an engine is built.

    Attributes:
        dtype: a `tensorrt.DataType`.
        shape_expr: dimensions.
    """

    dtype: Any

    @property
    def shape_expr(self) -> Sequence[ShapeExpression]:
        """Dimensions."""


class LaunchParameters(Protocol):
    """Grid and block, each an int or an expression, and bytes of dynamic shared memory."""

    grid_x: Any
    grid_y: Any
    grid_z: Any
    block_x: Any
    block_y: Any
    block_z: Any
    shared_mem: Any


class SymbolicInts(Protocol):
    """Extra arguments of a kernel."""

    def __setitem__(self, index: int, value: Any) -> object:
        """Set one."""


class PluginModule(Protocol):
    """`tensorrt.plugin`, as far as it is used."""

    TensorDesc: type[Any]

    def register(self, plugin_id: str) -> Decorator:
        """Decorates the function (inputs, attributes) -> descriptions of outputs."""

    def autotune(self, plugin_id: str) -> Decorator:
        """Decorates the function (inputs, attributes, outputs) -> combinations of dtypes."""

    def aot_impl(self, plugin_id: str) -> Decorator:
        """Decorates the function (inputs, attributes, outputs, tactic) -> (entry, PTX, launch, extra arguments)."""

    def impl(self, plugin_id: str) -> Decorator:
        """Decorates the function (inputs, attributes, outputs, stream), which runs with the engine."""

    def from_shape_expr(self, shape_expr: tuple[Any, ...], dtype: Any) -> TensorDescription:
        """The description of an output."""

    def AutoTuneCombination(self, io_types: str, layouts: str) -> object:  # noqa: N802
        """Dtypes of inputs and outputs, separated by commas, and the layout of all of them."""

    def KernelLaunchParams(self) -> LaunchParameters:  # noqa: N802
        """Launch parameters to be filled."""

    def SymIntExprs(self, length: int) -> SymbolicInts:  # noqa: N802
        """Extra arguments to be filled."""

    def SymInt32(self, value: Any) -> object:  # noqa: N802
        """An int32 argument from an int or an expression."""
