"""What people do to a graph before they run it, and whether it still computes the authors' logits afterwards."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon
import onnxslim
import pytest
from onnx import version_converter
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from tests.onnx.cases import LOGITS_ATOL, case_of
from tests.onnx.sessions import Array, onnxruntime_step
from umv2_export import native_library

Exported = Callable[..., tuple[Path, dict[str, Any]]]

INLINED = ("--inline-functions", "--shard-size", "30KB")
BUNDLES = {
    "memory": ("v2_shared_ring",),
    "experts": ("olmoe",),
    "memory, inlined": ("v2_shared_ring", *INLINED),
    "experts, contrib": ("olmoe", "--moe-form", "contrib"),
}


def by_graphsurgeon(source: Path, target: Path) -> None:
    graph = onnx_graphsurgeon.import_onnx(onnx.load(source))
    onnx.save(onnx_graphsurgeon.export_onnx(graph.fold_constants().cleanup().toposort()), target)


def by_onnxslim(source: Path, target: Path) -> None:
    onnx.save(onnxslim.slim(onnx.load(source)), target)


def by_polygraphy(source: Path, target: Path) -> None:
    command = [str(Path(sys.executable).with_name("polygraphy")), "surgeon", "sanitize", "--fold-constants"]
    subprocess.run([*command, str(source), "-o", str(target)], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["memory", "experts", "memory, inlined"])
@pytest.mark.parametrize("fold", [by_graphsurgeon, by_onnxslim, by_polygraphy])
def test_a_bundle_whose_constants_a_tool_folded_computes_the_same(
    name: str, fold: Callable[[Path, Path], None], exported: Exported, tmp_path: Path
) -> None:
    source, target = exported(*BUNDLES[name])[0] / "model.onnx", tmp_path / "folded.onnx"
    fold(source, target)
    folded = onnx.load(target)
    assert len(folded.graph.node) < len(onnx.load(source, load_external_data=False).graph.node)
    case_of(BUNDLES[name][0], folded).assert_computed_by(onnxruntime_step(target))


def test_the_native_library_runs_what_a_tool_folded(exported: Exported, tmp_path: Path) -> None:
    by_graphsurgeon(exported("v2_shared_ring")[0] / "model.onnx", tmp_path / "folded.onnx")
    folded = onnx.load(tmp_path / "folded.onnx")
    # The kernels run, and no body does.
    del folded.functions[:]
    onnx.save(folded, tmp_path / "without.onnx")
    step = onnxruntime_step(tmp_path / "without.onnx", native_library())
    case_of("v2_shared_ring", folded).assert_computed_by(step)


@pytest.mark.parametrize("name", ["memory, inlined", "experts, contrib"])
def test_a_bundle_without_functions_can_be_converted_to_another_opset(
    name: str, exported: Exported, tmp_path: Path
) -> None:
    converted = version_converter.convert_version(onnx.load(exported(*BUNDLES[name])[0] / "model.onnx"), 23)
    assert {entry.domain: entry.version for entry in converted.opset_import}[""] == 23
    onnx.save(converted, tmp_path / "converted.onnx")
    case_of(BUNDLES[name][0], converted).assert_computed_by(onnxruntime_step(tmp_path / "converted.onnx"))


class GatherElements(OpRun):
    """That of ONNX uses numpy.choose, which takes up to 64 candidates; rows and columns have more keys."""

    def _run(self, data: Array, indices: Array, axis: int) -> tuple[Array]:
        return (np.take_along_axis(data, indices, axis),)


@pytest.mark.parametrize(("name", "replaced"), [("experts", []), ("memory, inlined", [GatherElements])])
def test_the_reference_evaluator_of_onnx_computes_the_authors_logits(
    name: str, replaced: list[type[OpRun]], exported: Exported
) -> None:
    model = onnx.load(exported(*BUNDLES[name])[0] / "model.onnx")
    evaluator = ReferenceEvaluator(model, new_ops=replaced)
    case = case_of(BUNDLES[name][0], model)
    (logits,) = evaluator.run(["logits"], case.feed)
    np.testing.assert_allclose(np.asarray(logits), case.logits, rtol=0, atol=LOGITS_ATOL)
