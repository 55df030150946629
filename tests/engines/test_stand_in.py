"""The stand-in for TensorRT has nothing that TensorRT has not, so a worker that runs with it asks for nothing else.

Compared are names, and parameters by name and order, with the type stubs of TensorRT 10.13; not what they do.
"""

import ast
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from tests.engines.conftest import STAND_IN
from umv2_export.engines import tasks
from umv2_export.runtimes import tensorrt as runtime

Members = dict[str, list[list[str]]]
"""Name -> parameters of each overload of a method, none of anything else."""


def public_members(node: ast.ClassDef) -> Members:
    members: Members = {}
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef):
            overloads = members.setdefault(statement.name, [])
            if not any(
                ast.unparse(d) == "property" or ast.unparse(d).endswith(".setter") for d in statement.decorator_list
            ):
                overloads.append([argument.arg for argument in statement.args.args])
        elif isinstance(statement, ast.AnnAssign):
            members[ast.unparse(statement.target)] = []
        elif isinstance(statement, ast.Assign):
            names = [ast.unparse(target) for target in statement.targets]
            members.update(
                {name: [] for name in (ast.literal_eval(statement.value) if names == ["__slots__"] else names)}
            )
    return {name: value for name, value in members.items() if not name.startswith("_") or name == "__init__"}


def classes(tree: ast.AST) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


@pytest.fixture(scope="module")
def stubs() -> ast.Module:
    try:
        files = importlib.metadata.files("tensorrt-stubs") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install tensorrt-stubs")
    [file] = [file for file in files if str(file) == "tensorrt_bindings/tensorrt.pyi"]
    text = Path(str(file.locate())).read_text(encoding="utf-8")
    # What is no Python: a parameter without a default after others with one, and parameters called `in`.
    return ast.parse(re.sub(r"\bin: ", "in_: ", text.replace("channel_axis: int)", "channel_axis: int = 0)")))


@pytest.fixture(scope="module")
def known(stubs: ast.Module) -> Mapping[str, Members]:
    """Class of TensorRT -> its members, with those of its bases."""
    members: dict[str, Members] = {}
    for node in classes(stubs):
        bases = [members.get(ast.unparse(base), {}) for base in node.bases]
        members[node.name] = {name: value for base in bases for name, value in base.items()} | public_members(node)
    return members


def test_every_class_of_the_stand_in_is_one_of_tensorrt(known: Mapping[str, Members]) -> None:
    tree = ast.parse(STAND_IN.read_text(encoding="utf-8"))
    named = [node.name for node in classes(tree)]
    assert len(named) > 20
    assert set(named) <= set(known)


def test_every_member_of_the_stand_in_is_one_of_tensorrt(known: Mapping[str, Members]) -> None:
    compared = 0
    for node in classes(ast.parse(STAND_IN.read_text(encoding="utf-8"))):
        theirs = known[node.name]
        for name, overloads in public_members(node).items():
            # Of what a library makes itself, the stubs have no constructor.
            assert name in theirs or name == "__init__", f"{node.name}.{name}"
            if overloads and theirs.get(name):
                assert overloads[0] in [wanted[: len(overloads[0])] for wanted in theirs[name]], f"{node.name}.{name}"
                compared += 1
    assert compared > 30


def test_every_function_of_the_stand_in_is_one_of_tensorrt(stubs: ast.Module) -> None:
    theirs = {node.name for node in stubs.body if isinstance(node, ast.FunctionDef)}
    tree = ast.parse(STAND_IN.read_text(encoding="utf-8"))
    ours = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
    assert ours == {"get_plugin_registry"}
    assert ours <= theirs


@pytest.mark.parametrize("module", [tasks, runtime])
def test_what_is_named_of_the_module_is_in_it(module: ModuleType, stubs: ast.Module) -> None:
    source = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    named = {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trt"
    }
    theirs = {node.name for node in stubs.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    # TensorRT-RTX alone compiles for architectures that are named; the version lies in the package.
    assert named - theirs <= {"ComputeCapability", "__version__"}


def test_our_python_plugins_are_registered_as_the_stand_in_registers_its_own() -> None:
    tree = ast.parse(STAND_IN.read_text(encoding="utf-8"))
    [ours] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_register_plugins"]
    plugins = importlib.import_module("umv2_export.plugins.tensorrt.python_plugins")
    parameters = inspect.signature(plugins.register_plugins).parameters.values()
    assert [argument.arg for argument in ours.args.args] == [
        p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert [argument.arg for argument in ours.args.kwonlyargs] == [
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY
    ]


@pytest.mark.parametrize("name", ["DataType", "ICudaEngine", "IExecutionContext", "ILogger", "Runtime", "TensorIOMode"])
def test_what_an_engine_runs_with_is_in_tensorrt_rtx_too(name: str) -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    [ours] = [node for node in classes(ast.parse(STAND_IN.read_text(encoding="utf-8"))) if node.name == name]
    theirs = getattr(tensorrt_rtx, name)
    # Engines and contexts are made by the library alone.
    members = {name: overloads for name, overloads in public_members(ours).items() if name != "__init__"}
    assert members
    for member, overloads in members.items():
        described = str(getattr(theirs, member).__doc__)
        for parameter in [parameter for parameters in overloads[:1] for parameter in parameters[1:]]:
            assert f" {parameter}: " in described, f"{name}.{member}"
