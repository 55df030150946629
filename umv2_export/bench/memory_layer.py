"""An ONNX model of one memory layer of random weights, projections and keys included."""

from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from umv2_export.bench.single_op import OPSET
from umv2_export.config import ModelConfig
from umv2_export.layout import TableLayout
from umv2_export.model.folded import FoldedMemoryLayer, FoldedPool
from umv2_export.onnx.passes import attach_bodies, make_reproducible, simplify
from umv2_export.onnx.signatures import op_signatures
from umv2_export.onnx.translations import quiet_exporter, translations
from umv2_export.ops import DOMAIN, VERSION

__all__ = ["memory_layer_model"]


def memory_layer_model(config: ModelConfig, folder: Path, key_dtype: torch.dtype = torch.float32) -> Path:
    """One memory layer of random weights, projections and keys included: input `hidden` [T, D], output `output`."""
    layout = TableLayout.of(config.memory, torch.float32, 2 * 10**9)
    signatures = op_signatures(config, layout)
    with quiet_exporter():
        program = torch.onnx.export(
            _Layer(config, layout, key_dtype),
            (torch.zeros(3, config.hidden_size),),
            dynamo=True,
            dynamic_shapes=({0: "tokens"},),
            input_names=["hidden"],
            output_names=["output"],
            opset_version=OPSET,
            custom_translation_table=translations(signatures),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export returned no program")
    program.model.opset_imports[DOMAIN] = VERSION
    simplify(program.model)
    attach_bodies(program.model, signatures, opset=OPSET)
    make_reproducible(program.model)
    ir.save(program.model, folder / "layer.onnx", external_data="layer.data")
    return folder / "layer.onnx"


class _Layer(nn.Module):
    """A memory layer alone, its scores of a size that keeps outputs near 1."""

    def __init__(self, config: ModelConfig, layout: TableLayout, key_dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = FoldedMemoryLayer(config, 0, layout=layout, key_dtype=key_dtype)
        self.pool = FoldedPool(layout)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.layer.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(drawn * parameter.shape[-1] ** -0.5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(hidden, self.pool, None)[0]
        return output
