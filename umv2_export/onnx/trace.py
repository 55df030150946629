"""The folded model -> an ONNX graph, traced on fake tensors: no weight is allocated or read."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from umv2_export.config import ModelConfig
from umv2_export.layout import TableLayout
from umv2_export.model.folded import folded_model, joined_by_rank, key_matrices, used_chunks
from umv2_export.model.transformer import KeyValue, LanguageModel
from umv2_export.ops import DOMAIN, VERSION, ExpertsSignature, KeyScoresSignature, LookupSignature, OpSignatures
from umv2_export.ops.domain import PLUGIN_ATTRIBUTES
from umv2_export.ops.experts import CONTRIB_DOMAIN, contrib_attributes, contrib_schema
from umv2_export.ops.tucker_topk import schema as tucker_topk_schema
from umv2_export.signature import input_names, output_names

__all__ = [
    "inner_names",
    "op_signatures",
    "part_names",
    "probe_names",
    "quiet_exporter",
    "trace",
    "translations",
]

Signature = TypeVar("Signature")

# Distinct, and none is 1: torch.export takes a size of 1 for a constant.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


def probe_names(config: ModelConfig) -> list[str]:
    """Names of inner values by which parity finds the first layer that differs, and benchmarks what was hit.

    `hidden.{i}` is the input of block i, or for i = num_layers the output of the final norm; `normed.{i}` is what its
    FFN or experts, and memory layers that read there, read.
    """
    hidden = [f"hidden.{i}" for i in range(config.num_layers + 1)]
    kinds = ("row_scores", "col_scores", "addresses")
    retrieved = [f"{kind}.{j}" for j in range(config.memory.layers) for kind in kinds]
    routers = [f"router_logits.{i}" for i in range(config.num_layers if config.experts else 0)]
    return [*hidden, *retrieved, *routers, *part_names(config)[0]]


def inner_names(config: ModelConfig) -> list[str]:
    """All inner values that have a name: probes, and `attention.{i}`, `ffn.{i}` and `memory.{j}`, what parts add."""
    return [*probe_names(config), *(f"attention.{i}" for i in range(config.num_layers)), *part_names(config)[1]]


def part_names(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of inner values between which a benchmark cuts out what differs between two models.

    From `normed.{i}` to `ffn.{i}` and `memory.{j}`, what FFN or experts of block i, and memory layer j, add to the
    residual stream.
    """
    blocks = range(config.num_layers)
    memory = [f"memory.{j}" for j in range(config.memory.layers)]
    return [f"normed.{i}" for i in blocks], [*(f"ffn.{i}" for i in blocks), *memory]


def op_signatures(config: ModelConfig, layout: TableLayout) -> OpSignatures:
    """The arity of the custom ops' nodes in the model."""
    memory = config.memory
    if config.experts is not None:
        chosen = config.experts
        return OpSignatures(experts=ExpertsSignature(chosen.count, chosen.topk, chosen.normalize_topk))
    if not memory.layers:
        return OpSignatures()
    row_matrices, col_matrices = key_matrices(memory)
    return OpSignatures(
        KeyScoresSignature(
            row_chunks=tuple(matrix.chunk for matrix in row_matrices),
            col_chunks=tuple(matrix.chunk for matrix in col_matrices),
            row_heads=tuple(len(matrix.heads) for matrix in row_matrices),
            col_heads=tuple(len(matrix.heads) for matrix in col_matrices),
            query_chunks=len(used_chunks(memory)),
            key_dim=memory.key_dim,
            keys_per_side=memory.stored_side,
            heads=memory.heads,
            ranks=memory.tucker_rank,
            by_rank=joined_by_rank(memory),
            epsilon=config.norm_eps,
        ),
        LookupSignature(
            shards=layout.shards,
            grouped=memory.value_groups > 1,
            pre_values=memory.pre_value_dim > 0,
            activation=memory.activation,
        ),
    )


def trace(
    config: ModelConfig, layout: TableLayout, dtype: torch.dtype, key_dtype: torch.dtype, moe_form: str, *, opset: int
) -> ir.Model:
    """Export the folded model.

    Args:
        config: the model.
        layout: of its tables.
        dtype: of dense weights and cache.
        key_dtype: of keys.
        moe_form: standard or contrib.
        opset: version of the standard ops.

    Returns:
        The graph with the custom ops opaque, its initializers without data; probe and part values have their names, but
        are no outputs.
    """
    with FakeTensorMode():
        model = _Traced(folded_model(config, layout, dtype, key_dtype, moe_form))
    cache_shape = (_BATCH, config.kv_heads, _PAST, config.head_size)
    # Every cache tensor is an object of its own: shared ones trace into a graph that is wrong for past > 0, silently.
    past = [
        (torch.zeros(cache_shape, dtype=dtype), torch.zeros(cache_shape, dtype=dtype)) for _ in range(config.num_layers)
    ]
    cache_axes = {0: "batch", 2: "past_sequence"}
    with quiet_exporter():
        program = torch.onnx.export(
            model,
            (
                torch.zeros((_BATCH, _SEQUENCE), dtype=torch.int64),
                torch.ones((_BATCH, _PAST + _SEQUENCE), dtype=torch.int64),
                past,
            ),
            dynamo=True,
            dynamic_shapes=(
                {0: "batch", 1: "sequence"},
                {0: "batch", 1: "total_sequence"},
                [(cache_axes, cache_axes)] * config.num_layers,
            ),
            input_names=input_names(config),
            output_names=[*output_names(config), *inner_names(config)],
            opset_version=opset,
            custom_translation_table=translations(op_signatures(config, layout)),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export returned no program")
    graph = program.model.graph
    del graph.outputs[len(output_names(config)) :]
    if config.experts is not None or config.memory.layers:
        program.model.opset_imports[CONTRIB_DOMAIN if moe_form == "contrib" else DOMAIN] = VERSION
    return program.model


class _Traced(nn.Module):
    """The model with its outputs and probes as one flat tuple."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.transformer = model.transformer

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: list[KeyValue]
    ) -> tuple[torch.Tensor, ...]:
        output = self.transformer(input_ids, attention_mask, past_key_values, None)
        present = [tensor for key_value in output.present for tensor in key_value]
        routing = [tensor for layer in output.routing for tensor in layer]
        return (
            output.logits.float(),
            *present,
            *output.hidden,
            *routing,
            *output.router_logits,
            *output.normed,
            *output.attention,
            *output.ffn,
            *output.memory,
        )


def translations(signatures: OpSignatures) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Torch op -> ONNX node, all opaque; a translation to an onnxscript function would be inlined."""
    domain = onnxscript.values.Opset(DOMAIN, VERSION)

    def node(schema: OpSchema, inputs: Sequence[Any], **attributes: Any) -> Any:
        return onnxscript.values.Op(domain, schema.name, schema)(*inputs, **attributes)

    def mixture(
        hidden: Any, router_logits: Any, ff_proj: Sequence[Any], ff_out: Sequence[Any], topk: int, normalize: bool
    ) -> Any:
        signature = _of_model(signatures.experts)
        # A stack has a dimension more; the length does not tell one expert from one stack.
        if len(ff_proj[0].shape) == 2:
            return node(signature.schema(), (hidden, router_logits, *ff_proj, *ff_out))
        contrib = onnxscript.values.Opset(CONTRIB_DOMAIN, 1)
        inputs = (hidden, router_logits, ff_proj[0], None, ff_out[0])
        return onnxscript.values.Op(contrib, "MoE", contrib_schema())(*inputs, **contrib_attributes(signature))

    def scores(queries: Any, keys: Sequence[Any], *_: Any) -> Any:
        signature = _of_model(signatures.key_scores)
        return node(signature.schema(), (queries, *keys), **signature.attributes)

    def tucker(row_scores: Any, col_scores: Any, u: Any, v: Any, cores: Any, row_topk: int, topk: int) -> Any:
        inputs = (row_scores, col_scores, u, v, cores)
        return node(tucker_topk_schema(), inputs, row_topk=row_topk, topk=topk, **PLUGIN_ATTRIBUTES)

    def lookup(
        indices: Any,
        scores: Any,
        group: Any,
        query: Any,
        row_scales: Any,
        rows: Sequence[Any],
        pre_value_dim: int,
        activation: str,
        rows_per_shard: int,
        groups: int,
    ) -> Any:
        optional = [tensor for tensor in (group, query, row_scales) if tensor is not None]
        return node(
            _of_model(signatures.lookup).schema(),
            (indices, scores, *optional, *rows),
            pre_value_dim=pre_value_dim,
            activation=activation,
            rows_per_shard=rows_per_shard,
            groups=groups,
            **PLUGIN_ATTRIBUTES,
        )

    return {
        torch.ops.umv2.Experts.default: mixture,
        torch.ops.umv2.KeyScores.default: scores,
        torch.ops.umv2.TuckerTopK.default: tucker,
        torch.ops.umv2.MemoryLookup.default: lookup,
    }


def _of_model(signature: Signature | None) -> Signature:
    """The signature of an op that was met in the model."""
    if signature is None:
        raise AssertionError("the model holds an op of which it has no signature")
    return signature


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's notes on its own internals: a user can do nothing about them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
