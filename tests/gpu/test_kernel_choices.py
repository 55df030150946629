"""Which of several kernels serves a node: one table, kernel_choices.json, for the readers in Python and in C++."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.choose_kernel import choose
from tests.gpu.made_up import lookup, topk
from tests.gpu.stand_in_kernels import entry_name, write_stand_in_kernels
from umv2_export.errors import Unsupported
from umv2_export.gpu.archive import ELEMENT_TYPES
from umv2_export.gpu.index import read_index
from umv2_export.gpu.nodes import LookupNode, Node, TopkNode, choose_kernel
from umv2_export.gpu.variants import Variant

TABLE = json.loads(Path(__file__).with_name("kernel_choices.json").read_text())

cases = pytest.mark.parametrize("case", TABLE, ids=lambda case: case["case"])
either_order = pytest.mark.parametrize("step", [1, -1], ids=["as listed", "reversed"])

LOOKUP: dict[str, Any] = {
    "scores_dtype": "float32",
    "rows_dtype": "float32",
    "shards": 1,
    "cores": 2,
    "grouped": False,
    "pre_value_dim": 64,
    "value_dim": 64,
    "gelu": False,
}
TOPK: dict[str, Any] = {"scores_dtype": "float32", "ranks": 2, "cores": 2}


def variant(facts: dict[str, Any]) -> Variant:
    import torch

    plain = (TOPK if "topk" in facts else LOOKUP) | facts
    typed = {name: getattr(torch, value) if isinstance(value, str) else value for name, value in plain.items()}
    return topk(**typed) if "topk" in facts else lookup(**typed)


def python_node(facts: dict[str, Any]) -> Node:
    """5 tokens of 9 hits or 2 heads of 100 keys."""
    if "topk" in facts:
        n = TOPK | facts
        sides, cores = (5, 2, 100, n["ranks"]), (n["cores"], 2, n["ranks"], n["ranks"])
        shapes = {"row_scores": sides, "col_scores": sides, "u": (2, n["ranks"]), "v": (2, n["ranks"]), "cores": cores}
        return TopkNode(shapes, dict.fromkeys(shapes, n["scores_dtype"]), n["row_topk"], n["topk"])
    n = LOOKUP | facts
    rows = (7, n["pre_value_dim"] + n["value_dim"])
    shapes = {"indices": (5, 9), "scores": (5, 9, n["cores"])} | {f"rows_{s}": rows for s in range(n["shards"])}
    dtypes = {"scores": n["scores_dtype"], "rows_0": n["rows_dtype"]}
    activation = "gelu" if n["gelu"] else "none"
    return LookupNode(shapes, dtypes, n["pre_value_dim"], activation, 7, 2 if n["grouped"] else 1)


def cpp_node(facts: dict[str, Any]) -> list[object]:
    """Arguments of choose_kernel.cpp."""
    n = (TOPK if "topk" in facts else LOOKUP) | facts
    scores = ELEMENT_TYPES[n["scores_dtype"]]
    if "topk" in facts:
        return ["topk", scores, n["ranks"], n["cores"], n["row_topk"], n["topk"]]
    flags = [int(flag) for flag in (n["grouped"], n["pre_value_dim"] > 0, n["gelu"])]
    rows = ELEMENT_TYPES[n["rows_dtype"]]
    return ["lookup", scores, rows, n["shards"], n["cores"], *flags, n["pre_value_dim"], n["value_dim"]]


def write(folder: Path, case: dict[str, Any], step: int) -> tuple[Path, str | None]:
    """The folder of a case; its archive, and the entry that is to be chosen."""
    variants = [variant(facts) for facts in case["kernels"]]
    chosen = None if case["chosen"] is None else entry_name(variants[case["chosen"]], "8.9")
    return write_stand_in_kernels(folder, variants[::step], ["8.9"]), chosen


@cases
@either_order
def test_python_takes_the_kernel_of_the_table(case: dict[str, Any], step: int, tmp_path: Path) -> None:
    _, expected = write(tmp_path, case, step)
    kernels, node = read_index(tmp_path), python_node(case["node"])
    if expected is None:
        with pytest.raises(Unsupported, match="no compiled kernel fits"):
            choose_kernel(kernels, node)
    else:
        assert choose_kernel(kernels, node).entry == expected


@cases
@either_order
def test_cpp_takes_the_kernel_of_the_table(case: dict[str, Any], step: int, tmp_path: Path) -> None:
    archive, expected = write(tmp_path, case, step)
    found = choose(archive, "8.9", *cpp_node(case["node"]))
    if expected is None:
        assert found.returncode == 1
        assert "holds no kernel" in found.stdout
    else:
        assert found.stdout.strip() == expected
