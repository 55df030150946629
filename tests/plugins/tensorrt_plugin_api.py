"""A stand-in for `tensorrt` and `tensorrt.plugin`, strict with signatures as they are; dimensions are expressions.

Functions get strings as they come through the ONNX parser and TensorRT's Python layer: with a zero at the end.
"""

import enum
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

__all__ = ["DataType", "Expression", "KernelLaunchParams", "Plugin", "TensorDesc", "stand_in", "value"]

ATTRIBUTE_TYPES = (int, float, bool, str, bytes)
TYPE_NAMES = ("FP32", "FP16", "BF16", "INT8", "INT32", "INT64", "BOOL", "FP8")


class DataType(enum.Enum):
    """As the bindings name element types."""

    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8


class Expression:
    """A dimension: a constant, one that the engine is told when it runs, or a fake.

    Args:
        compute: its value from the values of dynamic dimensions.
        kind: constant, dynamic or fake.
    """

    def __init__(self, compute: Callable[[Mapping[str, int]], int] | int, kind: str = "constant") -> None:
        self._compute = compute if callable(compute) else lambda _, number=compute: number
        self._kind = kind

    @classmethod
    def dynamic(cls, name: str) -> "Expression":
        """A dimension that has its value when the engine runs."""
        return cls(lambda values: values[name], "dynamic")

    @classmethod
    def fake(cls) -> "Expression":
        """A dimension without a value."""
        return cls(0, "fake")

    def _operation(self, other: "Expression | int", compute: Callable[[int, int], int]) -> "Expression":
        other = Expression(other) if isinstance(other, int) else other
        kinds = {self._kind, other._kind}
        kind = next(kind for kind in ("fake", "dynamic", "constant") if kind in kinds)
        left, right = self._compute, other._compute
        return Expression(lambda values: compute(left(values), right(values)), kind)

    # There are no reflected operators: an int on the left is an error.
    def __add__(self, other: "Expression | int") -> "Expression":
        return self._operation(other, lambda a, b: a + b)

    def __sub__(self, other: "Expression | int") -> "Expression":
        return self._operation(other, lambda a, b: a - b)

    def __mul__(self, other: "Expression | int") -> "Expression":
        return self._operation(other, lambda a, b: a * b)

    def __eq__(self, other: object) -> Any:
        raise AssertionError("comparing expressions builds another one, which says nothing")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise AssertionError("an expression has no truth")

    @property
    def is_fake(self) -> bool:
        return self._kind == "fake"

    @property
    def is_constant(self) -> bool:
        if self.is_fake:
            raise RuntimeError("not accessible for fake expressions")
        return self._kind == "constant"

    def constant_value(self) -> int:
        if not self.is_constant:
            raise RuntimeError("not accessible for expressions that are not constant")
        return self._compute({})

    def at(self, values: Mapping[str, int]) -> int:
        """For tests: the value when the dynamic dimensions have these."""
        assert not self.is_fake
        return self._compute(values)


def value(dimension: Any, values: Mapping[str, int]) -> Any:
    """What a dimension, a launch parameter or an extra argument is when the engine runs."""
    return dimension.at(values) if isinstance(dimension, Expression) else dimension


@dataclass
class TensorDesc:
    """An input or output while an engine is built."""

    shape_expr: Sequence[Expression]
    dtype: DataType | None = None


@dataclass
class KernelLaunchParams:
    """Launch parameters; others cannot be set."""

    __slots__ = ("block_x", "block_y", "block_z", "grid_x", "grid_y", "grid_z", "shared_mem")


class SymInt32:
    """An extra argument."""

    def __init__(self, number: Expression | int) -> None:
        assert isinstance(number, (Expression, int))
        self.number = number


class SymIntExprs:
    """Extra arguments, all of which must be set."""

    def __init__(self, length: int) -> None:
        self._values: list[SymInt32 | None] = [None] * length

    def __setitem__(self, index: int, number: SymInt32) -> None:
        assert isinstance(number, SymInt32)
        self._values[index] = number

    def at(self, values: Mapping[str, int]) -> list[int]:
        """For tests: the arguments when the dynamic dimensions have these values."""
        assert all(isinstance(number, SymInt32) for number in self._values)
        return [value(number.number, values) for number in self._values if number is not None]


class AutoTuneCombination:
    """Dtypes of inputs and outputs."""

    def __init__(self, io_types: str, layouts: str) -> None:
        self.types = [part.strip() for part in io_types.split(",")]
        assert all(part in TYPE_NAMES for part in self.types), io_types
        assert layouts == "LINEAR"


@dataclass
class Plugin:
    """What was registered under an id.

    Attributes:
        inputs, attributes, outputs: names; name -> type; how many.
        functions: kind -> function, called as TensorRT calls it.
        raw: kind -> the same without the zeros at the ends of strings.
    """

    inputs: list[str]
    attributes: dict[str, type]
    outputs: int
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    raw: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def add(self, kind: str, function: Callable[..., Any]) -> None:
        """Keep a function, raw and as it is called."""
        self.raw[kind], self.functions[kind] = function, _as_parsed(function)


def _as_parsed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as TensorRT calls it; tests/engines/test_tensorrt_rtx.py shows the zero that a real parser sets."""

    def terminated(argument: Any) -> Any:
        return argument + "\0" if isinstance(argument, str) else argument

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return function(*map(terminated, arguments), **{name: terminated(value) for name, value in named.items()})

    return call


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        if parameter.kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            raise ValueError(f"argument {name} is neither positional-or-keyword nor keyword-only")
        if parameter.default is not inspect.Parameter.empty:
            raise ValueError(f"argument {name} has a default")
    return parameters


def _outputs(annotation: Any) -> int:
    if typing.get_origin(annotation) is tuple:
        if not all(issubclass(part, TensorDesc) for part in typing.get_args(annotation)):
            raise ValueError("a tuple of TensorDesc must be returned")
        return len(typing.get_args(annotation))
    if not inspect.isclass(annotation) or not issubclass(annotation, TensorDesc):
        raise ValueError("TensorDesc, or a tuple of it, must be returned")
    return 1


def _check_result(kind: str, annotation: Any) -> None:
    if kind != "aot_impl":
        if annotation is not inspect.Signature.empty:
            raise ValueError("this stand-in compares no annotations of results: leave them out")
        return
    if typing.get_origin(annotation) is not tuple or len(typing.get_args(annotation)) != 4:
        raise ValueError(f"the result of aot_impl is annotated {annotation}")
    entry, ptx, launch, extra = typing.get_args(annotation)
    if entry not in (str, bytes) or ptx not in (str, bytes):
        raise ValueError("entry and PTX must be str or bytes")
    if not issubclass(launch, KernelLaunchParams) or not issubclass(extra, SymIntExprs):
        raise ValueError("launch parameters and extra arguments must be annotated as such")


def _described(function: Callable[..., Any]) -> Plugin:
    inputs: list[str] = []
    attributes: dict[str, type] = {}
    for name, parameter in _parameters(function).items():
        if parameter.annotation is inspect.Parameter.empty:
            raise ValueError(f"argument {name} has no annotation")
        if issubclass(parameter.annotation, TensorDesc):
            if attributes:
                raise ValueError(f"the input {name} comes after an attribute")
            inputs.append(name)
        elif parameter.annotation in ATTRIBUTE_TYPES:
            attributes[name] = parameter.annotation
        else:
            raise ValueError(f"attribute {name} has the type {parameter.annotation}")
    return Plugin(inputs, attributes, _outputs(inspect.signature(function).return_annotation))


def stand_in() -> tuple[types.ModuleType, types.ModuleType, dict[str, Plugin]]:
    """The two modules, and the plugins that will be registered with them."""
    plugins: dict[str, Plugin] = {}

    def register(plugin_id: str) -> Callable[..., Any]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            namespace, name = plugin_id.split("::")
            assert namespace
            assert name
            if plugin_id in plugins:
                raise ValueError(f"{plugin_id} is registered already")
            plugins[plugin_id] = _described(function)
            plugins[plugin_id].add("register", function)
            return function

        return decorate

    def implementation(kind: str, last: Sequence[str]) -> Callable[[str], Callable[..., Any]]:
        def of(plugin_id: str) -> Callable[..., Any]:
            def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
                plugin = plugins[plugin_id]
                expected = [*plugin.inputs, *plugin.attributes, *last]
                parameters = _parameters(function)
                if list(parameters) != expected:
                    raise ValueError(f"{kind} has the arguments {list(parameters)}, expected {expected}")
                _check_result(kind, inspect.signature(function).return_annotation)
                plugin.add(kind, function)
                return function

            return decorate

        return of

    def from_shape_expr(shape_expr: tuple[Any, ...], dtype: DataType) -> TensorDesc:
        assert isinstance(shape_expr, tuple)
        return TensorDesc([Expression(part) if isinstance(part, int) else part for part in shape_expr], dtype)

    tensorrt, plugin = (module_from_spec(ModuleSpec(name, None)) for name in ("tensorrt", "tensorrt.plugin"))
    members: dict[str, Any] = {
        "register": register,
        "autotune": implementation("autotune", ["outputs"]),
        "aot_impl": implementation("aot_impl", ["outputs", "tactic"]),
        "impl": implementation("impl", ["outputs", "stream"]),
        "from_shape_expr": from_shape_expr,
        "TensorDesc": TensorDesc,
        "KernelLaunchParams": KernelLaunchParams,
        "SymIntExprs": SymIntExprs,
        "SymInt32": SymInt32,
        "AutoTuneCombination": AutoTuneCombination,
    }
    for name, member in members.items():
        setattr(plugin, name, member)
    for name, member in {"__version__": "10.13.0.35", "DataType": DataType, "plugin": plugin}.items():
        setattr(tensorrt, name, member)
    return tensorrt, plugin, plugins
