"""The folded model -> an ONNX graph, traced on fake tensors: no weight is allocated or read."""

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from umv2_export.dtypes import dtype_name
from umv2_export.interface import graph_inputs, graph_outputs, inner_names
from umv2_export.layout import FoldedForm
from umv2_export.model.folded import folded_model
from umv2_export.model.transformer import KeyValue, LanguageModel
from umv2_export.onnx.signatures import form_signatures
from umv2_export.onnx.translations import quiet_exporter, translations
from umv2_export.ops import DOMAIN, VERSION
from umv2_export.ops.domain import CONTRIB_DOMAIN

__all__ = ["trace"]

# Distinct, and none is 1: torch.export takes a size of 1 for a constant.
_BATCH, _SEQUENCE, _PAST, _MAX_LENGTH = 2, 3, 5, 11


def trace(form: FoldedForm, *, opset: int) -> ir.Model:
    """Export the folded model.

    Args:
        form: the model.
        opset: version of the standard ops.

    Returns:
        The graph with the custom ops opaque, its initializers without data; inner values have their names, but are not
        outputs.
    """
    config, dtype = form.config, form.dtype
    with FakeTensorMode():
        model = _Traced(folded_model(form))
    static = form.cache == "static"
    cache_shape = (_BATCH, config.kv_heads, _MAX_LENGTH if static else _PAST, config.head_size)
    # Every cache tensor is an object of its own: shared ones trace into a graph that is wrong for past > 0, silently.
    past = [
        (torch.zeros(cache_shape, dtype=dtype), torch.zeros(cache_shape, dtype=dtype)) for _ in range(config.num_layers)
    ]
    inputs, outputs = (side(config, dtype_name(dtype), form.cache) for side in (graph_inputs, graph_outputs))
    ids_axes, mask_axes, *cache_axes = (
        {i: axis for i, axis in enumerate(value.axes) if isinstance(axis, str)} for value in inputs
    )
    with quiet_exporter():
        program = torch.onnx.export(
            model,
            (
                torch.zeros((_BATCH, _SEQUENCE), dtype=torch.int64),
                torch.ones((_BATCH, _PAST + _SEQUENCE), dtype=torch.int64),
                past,
            ),
            dynamo=True,
            dynamic_shapes=(ids_axes, mask_axes, list(zip(cache_axes[::2], cache_axes[1::2], strict=True))),
            input_names=[value.name for value in inputs],
            output_names=[*(value.name for value in outputs), *inner_names(config)],
            opset_version=opset,
            custom_translation_table=translations(form_signatures(form)),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export returned no program")
    graph = program.model.graph
    del graph.outputs[len(outputs) :]
    if config.experts is not None or config.memory.layers:
        program.model.opset_imports[CONTRIB_DOMAIN if form.moe_form == "contrib" else DOMAIN] = VERSION
    if static:
        program.model.opset_imports.update({DOMAIN: VERSION, CONTRIB_DOMAIN: VERSION})
    return program.model


class _Traced(nn.Module):
    """The model with its outputs and inner values as one flat tuple."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.transformer = model.transformer

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: list[KeyValue]
    ) -> tuple[torch.Tensor, ...]:
        output = self.transformer(input_ids, attention_mask, past_key_values, None)
        present = [tensor for key_value in output.present for tensor in key_value]
        return (output.logits.float(), *present, *output.inner.values())
